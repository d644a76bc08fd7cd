"""Where the time of a step goes, by kind of operation, and the least that its products could take.

    python bench/floor.py [--sizes 1M,4M] [--compute float32] [--json]

The step of bench/step.py in one thread, drawing and update each under torch's profiler: milliseconds that operations
of a kind took by themselves, of a median step; `python` is what no operation accounts for, the profiler's own time in
it. `floor` is what the products would take at the rate of the fastest product of two matrices of 1024 x 1024: two
operations for each weight and token that is drawn, six for each that is learned from, what rows begin with in common
once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import step

KINDS: dict[str, tuple[str, ...]] = {
    "products": ("_linear_pointwise", "_reorder_linear", "aten::mm", "aten::addmm"),
    "attention": ("attention", "aten::bmm", "aten::baddbmm"),
    "moving data": ("copy", "index", "cat", "clone", "zero", "fill", "scatter", "empty", "roll", "sort", "to"),
    "softmax and draws": ("softmax", "logsumexp", "cumsum", "search", "exp", "gather", "arg", "isin", "log"),
    "norms and activations": (
        "rsqrt",
        "mean",
        "pow",
        "silu",
        "sigmoid",
        "mul",
        "add",
        "sub",
        "neg",
        "div",
        "sum",
        "norm",
    ),
}
"""Kind -> parts of the names of its operations; the first kind that fits counts."""
PHASES = ("draw", "update")


def kind_of(name: str) -> str:
    if "Optimizer" in name or "foreach" in name or "fused_adam" in name:
        return "optimizer"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


class Watched:
    """A function of the loop, under the profiler whenever it runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.kinds = function, dict[str, float]()
        self.given: tuple[Any, ...] = ()

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from torch.profiler import ProfilerActivity, profile

        self.given = args
        with profile(activities=[ProfilerActivity.CPU]) as told:
            results: list[Any] = []
            whole = 1e3 * peers.timed(lambda: results.append(self.function(*args, **settings)))
        self.kinds = {"whole": whole}
        for event in told.key_averages():
            kind = kind_of(event.key)
            self.kinds[kind] = self.kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e3
        return results[0]


def floors(given: tuple[Any, ...], rate: float) -> dict[str, float]:
    """Phase -> milliseconds of its products at this rate, from what `update` was given."""
    from tropism.training.packed import pack

    batch, optimizer = given[0], given[4]
    weights = sum(parameter.numel() for parameter in optimizer.parameters)
    learned, drawn = len(pack(batch.tokens, batch.length).owner), int(batch.action_mask.sum())
    return {"draw": 2e3 * weights * drawn / rate, "update": 6e3 * weights * learned / rate}


def measured(size: str, compute: str, turns: int) -> list[dict[str, Any]]:
    """A row of each phase."""
    from tropism.training import learn

    watched = {"draw": Watched(learn.drawn), "update": Watched(learn.update)}
    found: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        turn = step.opened(step.recipe(step.model(size, Path(folder)), compute, Path(folder) / "run"), Path(folder))
        learn.drawn, learn.update = watched["draw"], watched["update"]  # type: ignore[assignment]
        for n in range(turns + 2):
            turn()
            if n >= 2:
                found.append({name: dict(each.kinds) for name, each in watched.items()})
        learn.drawn, learn.update = (each.function for each in watched.values())  # type: ignore[assignment]
    floor = floors(watched["update"].given, peers.peak(compute)[0])
    rows = []
    for phase in PHASES:
        names = dict.fromkeys(name for one in found for name in one[phase])
        middle = {name: statistics.median(one[phase].get(name, 0.0) for one in found) for name in names}
        whole = middle.pop("whole")
        shown = {kind: round(middle.get(kind, 0.0)) for kind in (*KINDS, "optimizer", "other")}
        shown |= {"python": round(whole - sum(middle.values())), "floor": round(floor[phase])}
        rows.append({"size": size, "compute": compute, "phase": phase, "ms": round(whole)} | shown)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1M,4M")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    peers.settled(1)
    rows = [
        row
        for size in given.sizes.split(",")
        for compute in given.compute.split(",")
        for row in measured(size, compute, given.turns)
    ]
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
