"""A step of GRPO against TRL's, side by side: python bench/step.py [--sizes 1M,4M] [--compute float32] [--json]

    tropism            its defaults, but for what a step is: 16 prompts, 8 replies each, at most 48 tokens
    tropism, whole     an update of the same work as TRL's: every prompt once for each reply, and what has no advantage
                       too; while drawing, siblings read their prompt once in either
    TRL, tuned         no gradient checkpointing, micro-batches of 32, no logging
    TRL, defaults      as it is installed, which is in bfloat16 whatever is asked of the others

One model, made once and loaded by all; the same prompts; a reward that costs nothing. Both draw with temperature 1, and
random weights seldom end a reply early, so that a step is about 128 x 48 new tokens. `generate` is all until a step's
rewards are there, `update` the rest. With `--processes 2` each peer is two processes, told of each other as torchrun
does: TRL's data parallelism and ours (`processes: 2`). With `--threads 2` ours is as it is installed, which is two
processes of one thread where they were measured to be faster (`processes: auto`), beside the same as one process.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import peers

STEPS = 1_000_000
"""More than will be asked for: a run that is stopped from outside."""


def model(size: str, folder: Path) -> str:
    """A directory that both load."""
    from tropism.config import Model
    from tropism.training.model import load_policy

    path = folder / size
    shape = peers.SHAPES[size] | {"initializer_range": 0.02}
    load_policy(Model(path="tiny", shape=shape), 0).save(path)
    return str(path)


def recipe(
    path: str,
    compute: str,
    where: Path,
    whole: bool = False,
    device: str = "cpu",
    groups: int = peers.ROLLOUTS // peers.GROUP,
    reply: int = peers.REPLY,
) -> Any:
    """As `tropism train` would read it; its data and its reward are files in this folder."""
    from tropism.api import resolved_recipe

    (where / "rows").mkdir(parents=True)
    rows = [f'{{"prompt": "{text}"}}\n' for text in peers.prompts(256)]
    (where / "rows" / "rows.jsonl").write_text("".join(rows))
    (where / "worth.py").write_text(
        "def worth(prompts, completions, **_):\n    return [len(set(c)) / max(len(c), 1) for c in completions]\n"
    )
    return resolved_recipe(
        {
            "name": "step",
            "model": {"path": path, "compute": compute, "device": device, "pack": not whole},
            "method": "grpo",
            "env": {"dataset": {"path": str(where / "rows" / "rows.jsonl"), "holdout": 0}},
            "rewards": {f"{where}/worth.py:worth": 1.0},
            "sampling": {"groups": groups, "group_size": peers.GROUP, "max_tokens": reply},
            "train": {"steps": STEPS, "learning_rate": 1e-6, "record_every": STEPS, "skip": not whole},
            "eval": {"every": 0},
        },
        (),
        {},
    )


def opened(recipe: Any, where: Path) -> peers.Turn:
    """Its stage as `tropism train` opens it; a turn is one pass of its loop."""
    from tropism.api import Lines
    from tropism.training.checkpoint import State
    from tropism.training.learn import one_step
    from tropism.training.model import load_policy
    from tropism.training.run import open_job

    stage, state = recipe.stages[0], State()
    job = open_job(recipe, stage, recipe.model, load_policy(recipe.model, 0), where / "run", Lines())

    def turn() -> dict[str, float]:
        times: dict[str, float] = {}
        metrics: dict[str, float] = {}
        whole = peers.timed(lambda: metrics.update(one_step(job, state, times)[0]))
        played = stage.sampling.groups * stage.sampling.group_size / job.ranks.size
        tokens = metrics.get("completions/mean_length", 0.0) * played  # of rows nothing is drawn
        return {"step": whole, "generate": times["draw"], "update": whole - times["draw"], "tokens": tokens}

    return turn


def tropism(path: str, compute: str, folder: str, **settings: Any) -> peers.Turn:
    name = "-".join(map(str, (compute, *settings.values())))
    where = Path(folder) / f"tropism-{name}-{os.environ.get('RANK', 0)}"
    return opened(recipe(path, compute, where, **settings), where)


def trl(path: str, compute: str, folder: str, tuned: bool, device: str = "cpu", reply: int = peers.REPLY) -> peers.Turn:
    """Its trainer in a thread, held before each step until a turn is asked for."""
    import logging

    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    logging.disable(logging.WARNING)
    ask: queue.Queue[bool] = queue.Queue()
    told: queue.Queue[Any] = queue.Queue()
    tune: dict[str, Any] = {"gradient_checkpointing": False, "per_device_train_batch_size": 32, "logging_steps": 10**9}
    tune["bf16"] = compute == "bfloat16"
    defaults: dict[str, Any] = {"per_device_train_batch_size": 8}
    chosen = tune if tuned else defaults
    share = peers.ROLLOUTS // int(os.environ.get("WORLD_SIZE", 1))
    size = chosen["per_device_train_batch_size"] = min(chosen["per_device_train_batch_size"], share)
    arguments = GRPOConfig(
        output_dir=f"{folder}/trl-{compute}-{tuned}",
        use_cpu=device == "cpu",
        max_steps=STEPS,
        learning_rate=1e-6,
        num_generations=peers.GROUP,
        max_completion_length=reply,
        gradient_accumulation_steps=share // size,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **chosen,
    )

    class Gate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            ask.get()
            self.times: dict[str, float] = {}
            self.began = peers.time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            whole = peers.time.perf_counter() - self.began
            told.put({"step": whole, "update": whole - self.times["generate"], **self.times})

    gate = Gate()

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out: list[Any] = []
            seconds = peers.timed(lambda: out.append(super(Timed, self)._generate_and_score_completions(inputs)))
            gate.times |= {"generate": seconds, "tokens": float(out[0]["completion_mask"].sum())}
            return out[0]

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(path),
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=lambda completions, **_: [peers.worth(text) for text in completions],
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in peers.prompts(256)]),
        callbacks=[gate],
    )

    def train() -> None:
        try:
            trainer.train()
        except Exception as error:  # whatever it is, the turn that waits for it should say it
            told.put(error)

    threading.Thread(target=train, daemon=True).start()

    def turn() -> dict[str, float]:
        ask.put(True)
        found = told.get(timeout=600)
        if isinstance(found, Exception):
            raise found
        return dict(found)

    return turn


INSTALLED = {"TRL, defaults": "bfloat16"}
"""Peer -> its own precision, where it has one."""
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tropism": (tropism, {"whole": False}),
    "tropism, whole": (tropism, {"whole": True}),
    "TRL, tuned": (trl, {"tuned": True}),
    "TRL, defaults": (trl, {"tuned": False}),
}


def installed(path: str, compute: str, folder: str, threads: int) -> int:
    """How many processes ours is unless told."""
    from tropism.training import cores, processes

    with cores.threads(threads):
        return processes.decided(recipe(path, compute, Path(folder) / "decided"))


def compared(
    size: str, compute: str, threads: int, turns: int, folder: Path, processes: int = 1
) -> list[dict[str, Any]]:
    path = model(size, folder)
    settings = {"path": path, "compute": compute, "folder": str(folder / f"{size}-{compute}-{threads}-{processes}")}
    makers = {name: (make, settings | more) for name, (make, more) in PEERS.items()}
    parts = installed(threads=threads, **settings) if threads > 1 else 1
    parted = dict.fromkeys(("tropism", "tropism, whole"), parts)
    if parts > 1:
        makers["tropism, one process"] = (tropism, settings | {"whole": False, "groups": 16})
    found = peers.raced(makers, threads, turns, processes=processes, parted=parted)
    base = statistics.median(turn["step"] for turn in found["TRL, tuned"])
    rows = []
    for name, each in found.items():
        middle, low, high = peers.quartiles([turn["step"] for turn in each])
        parts = {part: statistics.median(turn[part] for turn in each) for part in ("generate", "update", "tokens")}
        rows.append(
            {
                "size": size,
                "compute": INSTALLED.get(name, compute),
                "processes": processes * parted.get(name, 1),
                "threads": threads // parted.get(name, 1),
                "peer": name,
                "step ms": round(1e3 * middle),
                "quartiles": f"{1e3 * low:.0f} to {1e3 * high:.0f}",
                "generate ms": round(1e3 * parts["generate"]),
                "update ms": round(1e3 * parts["update"]),
                "tokens": round(parts["tokens"]),
                "TRL tuned over it": round(base / middle, 2),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1M,4M")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in given.sizes.split(","):
            for compute in given.compute.split(","):
                for threads in map(int, given.threads.split(",")):
                    rows += compared(size, compute, threads, given.turns, Path(folder), given.processes)
    about = peers.versions("torch", "transformers", "trl")
    about["prompts"] = f"{peers.ROLLOUTS // peers.GROUP} of {peers.PROMPT} tokens, {peers.GROUP} replies each"
    peers.told(rows, about, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
