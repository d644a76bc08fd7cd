"""A step on as many threads as there are cores, alone and while another program computes: python bench/busy.py [--json]

torch's threads on Linux (libgomp) wait for each other by trying again and again, for long; a thread that waits so on a
core that the one it waits for needs holds up both. `import tropism` makes them try `GOMP_SPINCOUNT` times and then
sleep, unless the variable, or OMP_WAIT_POLICY, says something else. The step of bench/step.py, each way in a process of
its own, in turns; the other program is a Python loop on every core.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
import step
import tropism

WAYS = {"libgomp's own": "300000", "tropism's": tropism.SPINS}
TURNS = {"no": 9, "yes": 9}


def loop() -> None:
    while True:
        pass


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """So many processes that compute."""
    others = [multiprocessing.get_context("spawn").Process(target=loop, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()


def rows(size: str, threads: int, busy: str) -> list[dict[str, Any]]:
    """A row of each way; they take turns."""
    with tempfile.TemporaryDirectory() as folder:
        path, waiting = step.model(size, Path(folder)), dict[str, peers.Peer]()
        for way, count in WAYS.items():
            os.environ["GOMP_SPINCOUNT"] = count
            waiting[way] = peers.Peer(step.tropism, threads, path=path, compute="float32", folder=f"{folder}/{count}")
        with beside(threads * (busy == "yes")):
            found = peers.taking_turns(waiting, TURNS[busy], warm=1)
        for peer in waiting.values():
            peer.end()
    told = []
    for way, turns in found.items():
        middle, low, high = peers.quartiles([1e3 * turn["step"] for turn in turns])
        told.append(
            {"size": size, "threads": threads, "another program computes": busy, "threads wait": way}
            | {"step ms": round(middle), "quartiles": f"{low:.0f} to {high:.0f}"}
        )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="1M")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    told = [row for busy in TURNS for row in rows(given.size, given.threads, busy)]
    peers.told(told, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
