"""What `tropism plan` says of a GRPO step, and what the step takes: python bench/plan.py [--sizes 1M,4M,20M] [--json]

The step of bench/step.py: 16 prompts of 16 tokens, 8 replies each of at most 48 tokens, random weights, one thread,
float32. Time is compared right after the plan and in its process: the median of five steps. Memory is the highest
resident memory of a fresh process that makes the same steps. With `--processes 2` the steps are made by two processes
of one thread that train as one, and memory is that of both. On Linux, which keeps count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory
import peers
import step


def one(size: str, planning: bool, count: int, steps: int = 5) -> dict[str, float]:
    """Of this process: what was planned, if that is asked for, and what was measured."""
    peers.settled(1)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = step.model(size, Path(folder))
        recipe = step.recipe(path, "float32", Path(folder))
        if planning:
            from tropism import api

            (plan,) = api.plan(dataclasses.replace(recipe, processes=count))
            found |= {"planned s": plan.step, "planned GB": plan.peak / 1e9}
        peer = peers.Peer(step.tropism, 1, count, path=path, compute="float32", folder=folder) if count > 1 else None
        turn = peer.turn if peer else step.opened(recipe, Path(folder))
        turn()
        found["s"] = statistics.median(turn()["step"] for _ in range(steps))
        work = [process.pid for process in peer.processes] if peer else ["self"]
        found["GB"] = sum(memory.resident("VmHWM", process) for process in work) / 1000
        if peer:
            peer.end()
    return found


def measured(size: str, planning: bool, count: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--one", f"{size},{planning:d},{count}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1M,4M,20M")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        size, planning, count = given.one.split(",")
        print(json.dumps(one(size, planning == "1", int(count))))
        return 0
    rows: list[dict[str, Any]] = []
    for size in given.sizes.split(","):
        both, alone = (measured(size, planning, given.processes) for planning in (True, False))
        rows.append(
            {
                "size": size,
                "processes": given.processes,
                "planned s": round(both["planned s"], 2),
                "measured s": round(both["s"], 2),
                "time": f"{both['planned s'] / both['s'] - 1:+.0%}",
                "planned GB": round(both["planned GB"], 2),
                "measured GB": round(alone["GB"], 2),
                "memory": f"{both['planned GB'] / alone['GB'] - 1:+.0%}",
            }
        )
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
