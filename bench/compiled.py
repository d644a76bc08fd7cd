"""Does torch.compile pay?   python bench/compiled.py [--sizes 1M,4M] [--json]

The forward and backward pass of a step of GRPO (`bench/step.py`'s), with the model as it is and norms and MLPs compiled
(`model.compile`), in one thread, in turn; each case in a fresh process, as a run is. `pays after`: how many steps win
the seconds of compiling back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import step

TURNS = 9


def passes(policy: Any, rows: list[Any]) -> Callable[[], None]:
    from tropism.training.rates import learning

    work = learning(policy, 1.0)

    def once() -> None:
        for piece in rows:
            work(piece)

    return once


def row(size: str, compute: str, folder: Path) -> dict[str, Any]:
    import torch
    import torch._inductor.config

    from tropism.training.model import load_policy
    from tropism.training.rates import pieces
    from tropism.training.workload import counted

    peers.settled(1)
    torch._inductor.config.force_disable_caches = True
    where = folder / f"{size}-{compute}"
    recipe = step.recipe(step.model(size, folder), compute, where)
    stage = recipe.stages[0]
    plain = load_policy(recipe.model, 0)
    rows = pieces(plain, counted(recipe, stage, plain, where), stage.train.micro_tokens)
    loading = peers.timed(lambda: load_policy(recipe.model, 0))
    began = time.perf_counter()
    works = {
        "as it is": passes(plain, rows),
        "compiled": passes(load_policy(replace(recipe.model, compile=True)), rows),
    }
    works["compiled"]()
    spent = time.perf_counter() - began - loading
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(TURNS):
        for name, work in works.items():
            took[name].append(peers.timed(work))
    (one, *_), (two, low, high) = (peers.quartiles(found) for found in took.values())
    return {
        "size": size,
        "compute": compute,
        "as it is ms": round(1e3 * one),
        "compiled ms": round(1e3 * two),
        "quartiles": f"{1e3 * low:.0f} to {1e3 * high:.0f}",
        "times as fast": round(one / two, 2),
        "seconds to compile": round(spent - two, 1),
        "pays after": f"{(spent - two) / (one - two):.0f} steps" if one > two else "never",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1M,4M")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cases = [(size, compute) for size in given.sizes.split(",") for compute in ("float32", "bfloat16")]
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}  # as a run's start is
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, **fresh) as pool:
        rows = [pool.submit(row, *case, Path(folder)).result() for case in cases]
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
