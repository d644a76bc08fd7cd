"""Peak memory of a step above weights and optimizer, by vocabulary, length and group: python bench/memory.py [--json]

One layer of width 64 and a head over the vocabulary, whose numbers are what takes memory. Each figure is of a process
of its own: what a method measures and an update, in float32, of GRPO, of distillation on the sampled token (`opd`), and
of every method that compares a teacher on its 20 likeliest tokens. Each has its own teacher, the student or a copy of
it, which reads the prompt and a worked solution, a sibling or a hint. `MB` is the highest resident memory of the step
less what was resident before it, when weights (the copy's too), gradients and optimizer were there. On Linux, which
keeps count, and with a C library that gives back at once what is freed (glibc): what it keeps for later would count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers

TOP_K = 20
LIKELIEST = ("opd", "sdpo", "sdft", "srpo", "sdpg", "openclaw")
VOCABULARIES, LENGTHS, GROUPS = (1_000, 32_000, 151_936), (64, 256), (8, 32)


def resident(name: str, process: int | str = "self") -> float:
    """VmRSS or VmHWM of a process, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def step(method: str, top_k: int, vocabulary: int, length: int, rows: int) -> float:
    """MB of one step."""
    import torch

    from tropism.config import Model, Train
    from tropism.signals.frozen import measure
    from tropism.teacher import apart
    from tropism.training.collate import collate
    from tropism.training.lora import follower_of
    from tropism.training.model import load_policy
    from tropism.training.optim import AdamW
    from tropism.training.teachers import open_tutor, openings
    from tropism.training.update import update

    torch.set_num_threads(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = sizes | {"num_key_value_heads": 1, "vocab_size": vocabulary}
    model, train, stage = Model(path="tiny", shape=shape, device="cpu"), Train(learning_rate=1e-5), of(method, top_k)
    policy, asked = load_policy(model, 0), stage.method
    student, tutor = policy.measuring(1.0, train), open_tutor(stage, model, policy, None)
    asks_reference = "reference_logp" in asked.needs.measured
    reference = policy.measuring(1.0, train, follower_of(policy.module)) if asks_reference else None
    optimizer = AdamW(policy.module, train)
    made = replies(policy.words.context(PROMPT), vocabulary, length, rows)
    batch = collate(made, codes={}, apart=apart(asked))
    for parameter in optimizer.parameters:  # gradients and both moments are there from the first step on
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0)
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    batch = measure(batch, asked.needs, policy=student, exact=False, reference=reference)
    if tutor:
        batch, told = tutor.measure(batch, openings(made, apart=apart(asked)))
        if told["teacher/share"][0] != rows:
            raise SystemExit(f"{method}: not every reply had a teacher")
    update(
        batch, asked.credit(batch), asked, policy.forward, optimizer, lambda k: 1e-5, micro_tokens=train.micro_tokens
    )
    return resident("VmHWM") - before


PROMPT = "3-0+8+2+2-4="


def of(method: str, top_k: int) -> Any:
    """The stage of a method whose teacher reads a sibling or hint, if it does so by default, or a worked solution."""
    from dataclasses import replace

    from tropism.config import Judge, Named, Stage, Success
    from tropism.methods import find
    from tropism.teacher import teacher_of

    asked = find(method)()
    if teacher := teacher_of(asked):
        reads = teacher.reads if method in ("openclaw", "sdpo", "srpo") else ("worked",)
        asked = replace(asked, teacher=replace(teacher, reads=reads, top_k=top_k))
    env, success = Named(name="sums"), Success(part="correct")
    return Stage(name="rl", method=asked, env=env, success=success, judge=Judge(who="none"))


def replies(context: list[int], vocabulary: int, length: int, rows: int) -> list[Any]:
    """Groups of eight at random over the whole vocabulary; every second one is right, and each was told something."""
    import torch

    from tropism.types import Rollout, Task, Turn

    draws = torch.Generator().manual_seed(0)
    words = ("3-0=3 3+8=11 11+2=13 13+2=15 15-4=11 [11] " * 8)[:length]
    task = Task(columns={"worked": words})
    made = []
    for n in range(rows):
        ids = torch.randint(1, vocabulary, (length,), generator=draws).tolist()
        turn = Turn(
            context=context,
            action=ids,
            logp=[-1.0] * length,
            entropy=[1.0] * length,
            reward=n % 2,
            prompt=PROMPT,
            reply=words,
            feedback="look again",
            hints=(words,),
        )
        rollout = Rollout(task=task, group=n // 8, sibling=n % 8, turns=(turn,), reward=n % 2, success=n % 2 == 1)
        made.append(rollout)
    return made


def measured(*given: Any) -> float:
    words = [sys.executable, __file__, "--one", ",".join(map(str, given))]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        method, *sizes = given.one.split(",")
        print(step(method, *map(int, sizes)))
        return 0
    cases = [(v, LENGTHS[0], GROUPS[0]) for v in VOCABULARIES]
    cases += [(VOCABULARIES[-1], LENGTHS[1], GROUPS[0]), (VOCABULARIES[-1], LENGTHS[0], GROUPS[1])]
    rows = []
    for vocabulary, length, count in cases:
        found = {name: measured(name, 0, vocabulary, length, count) for name in ("grpo", "opd")}
        found |= {f"{name}, 20": measured(name, TOP_K, vocabulary, length, count) for name in LIKELIEST}
        sizes = {"vocabulary": vocabulary, "tokens": length, "replies": count}
        rows.append(sizes | {f"{name} MB": round(mb) for name, mb in found.items()})
        rows[-1]["most over grpo"] = f"{max(found.values()) / found['grpo']:.2f}"
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
