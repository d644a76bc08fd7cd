"""Peak memory of a step above weights and optimizer, by vocabulary, length and group: python bench/memory.py [--json]

One layer of width 64 and a head over the vocabulary, whose numbers are what takes memory. Each figure is of a process
of its own: a measuring pass and an update of GRPO, of distillation on the sampled token (`opd`) or on the teacher's 20
likeliest tokens (`sdpo`), in float32. `MB` is the highest resident memory of the step less what was resident before it,
when weights, gradients and optimizer were there. On Linux, which keeps count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers

TOP_K = 20
METHODS = ("grpo", "opd", "sdpo")
VOCABULARIES, LENGTHS, GROUPS = (1_000, 32_000, 151_936), (64, 256), (8, 32)


def resident(name: str, process: int | str = "self") -> float:
    """VmRSS or VmHWM of a process, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def step(method: str, vocabulary: int, length: int, rows: int) -> float:
    """MB of one step."""
    import torch

    from tropism.config import Model, Train
    from tropism.methods import find
    from tropism.training.collate import collate
    from tropism.training.model import load_policy
    from tropism.training.optim import AdamW
    from tropism.training.update import update
    from tropism.types import Rollout, Task, Turn

    torch.set_num_threads(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = sizes | {"num_key_value_heads": 1, "vocab_size": vocabulary}
    policy = load_policy(Model(path="tiny", shape=shape, device="cpu"), 0)
    asked, train = find(method)(), Train(learning_rate=1e-5)
    optimizer = AdamW(policy.module, train)
    draws = torch.Generator().manual_seed(0)
    made = []
    for n in range(rows):
        ids = torch.randint(1, vocabulary, (16 + length,), generator=draws).tolist()
        turn = Turn(context=ids[:16], action=ids[16:], logp=[-1.0] * length, entropy=[1.0] * length, reward=n % 2)
        made.append(Rollout(task=Task(), group=n // 8, sibling=n % 8, turns=(turn,), reward=n % 2))
    batch = collate(made, codes={})
    for parameter in optimizer.parameters:  # gradients and both moments are there from the first step on
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0)
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    live = "topk_logp" in asked.needs.live
    out = policy.measuring(1.0, train)(batch, TOP_K if live else 0)
    batch = batch.replace(proximal_logp=out.logp, teacher_logp=out.logp - 0.1, teacher_entropy=out.entropy)
    batch = batch.replace(has_teacher=torch.ones(rows, dtype=torch.bool), proximal_entropy=out.entropy)
    if live:
        batch = batch.replace(
            topk_ids=out.topk_ids, proximal_topk_logp=out.topk_logp, teacher_topk_logp=out.topk_logp - 0.1
        )
    update(
        batch, asked.credit(batch), asked, policy.forward, optimizer, lambda k: 1e-5, micro_tokens=train.micro_tokens
    )
    return resident("VmHWM") - before


def measured(*given: Any) -> float:
    words = [sys.executable, __file__, "--one", ",".join(map(str, given))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
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
        found = {method: measured(method, vocabulary, length, count) for method in METHODS}
        sizes = {"vocabulary": vocabulary, "tokens of a reply": length, "replies": count}
        rows.append(sizes | {f"{name} MB": round(mb) for name, mb in found.items()})
        rows[-1]["sdpo over grpo"] = f"{found['sdpo'] / found['grpo']:.2f}"
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
