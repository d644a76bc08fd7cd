"""Where the time of a step goes, by kind of operation, and the least that its products could take.

    python bench/floor.py [--sizes 1M,4M] [--compute float32] [--json]
    python bench/floor.py --run runs/tictactoe          a finished run's stages, each from the model that it began with

The step of bench/step.py in one thread, drawing and update each under torch's profiler: milliseconds that operations
of a kind took by themselves, of a median step; `python` is what no operation accounts for, the profiler's own time in
it. `floor` is what the products would take at the rate of the fastest product of two matrices of 1024 x 1024: two
operations for each weight and token that is drawn, six for each that is learned from, what rows begin with in common
once; of what teachers read none is computed. `half, beside another` is not measured but computed: half of all that, as
one of two processes has it, at the share of its rate that `tropism plan` finds a process to keep while another works.

Of a run, `seconds` is what its record says the stage took with that phase, at as many threads as it had.
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
PHASES = {"draw": "drawn", "measure": "measured", "update": "update"}
"""Part of a step -> the function of the loop that it is."""


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
    """Phase -> milliseconds of its products at this rate, from what `update` was given. Where some rows have an
    advantage, the others are passed over."""
    from tropism.training.packed import pack

    batch, credit, optimizer = given[0], given[1], given[4]
    weights = sum(parameter.numel() for parameter in optimizer.parameters)
    heard = (credit.advantage != 0).any(1)
    rows = batch[heard] if heard.any() else batch
    learned, drawn = len(pack(rows.tokens, rows.length).owner), int(batch.action_mask.sum())
    return {"draw": 2e3 * weights * drawn / rate, "measure": 0.0, "update": 6e3 * weights * learned / rate}


def profiled(turn: peers.Turn, turns: int, rate: float) -> dict[str, dict[str, float]]:
    """Phase -> milliseconds in all, by kind, and at least, of a median turn."""
    from tropism.training import learn

    watched = {phase: Watched(getattr(learn, name)) for phase, name in PHASES.items()}
    found: list[dict[str, dict[str, float]]] = []
    for phase, name in PHASES.items():
        setattr(learn, name, watched[phase])
    for n in range(turns + 2):
        turn()
        if n >= 2:
            least = floors(watched["update"].given, rate)
            found.append({name: each.kinds | {"floor": least[name]} for name, each in watched.items()})
    for phase, name in PHASES.items():
        setattr(learn, name, watched[phase].function)
    told = {}
    for phase in PHASES:
        names = dict.fromkeys(name for one in found for name in one[phase])
        told[phase] = {name: statistics.median(one[phase].get(name, 0.0) for one in found) for name in names}
    return told


def row(middle: dict[str, float], share: float = 1.0) -> dict[str, Any]:
    """What is shown of a phase; `share`: of all of it."""
    shown = {kind: round(share * middle.get(kind, 0.0)) for kind in (*KINDS, "optimizer", "other")}
    rest = middle["whole"] - sum(value for name, value in middle.items() if name not in ("whole", "floor"))
    return (
        {"ms": round(share * middle["whole"])}
        | shown
        | {"python": round(share * rest), "floor": round(share * middle["floor"])}
    )


def measured(size: str, compute: str, turns: int) -> list[dict[str, Any]]:
    """A row of each phase, and one of both as one of two processes has them."""
    from tropism.training.processes import rate_beside

    with tempfile.TemporaryDirectory() as folder:
        recipe = step.recipe(step.model(size, Path(folder)), compute, Path(folder) / "run")
        found = profiled(step.opened(recipe, Path(folder)), turns, peers.peak(compute)[0])
        del found["measure"]  # nothing is
        share = 0.5 / rate_beside(recipe.model, 2)
    both = {name: sum(phase.get(name, 0.0) for phase in found.values()) for name in found["update"] | found["draw"]}
    rows = {name: row(middle) for name, middle in found.items()} | {"half, beside another": row(both, share)}
    return [{"size": size, "compute": compute, "phase": name} | told for name, told in rows.items()]


def of_run(path: Path, turns: int) -> list[dict[str, Any]]:
    """A row of each phase of each stage of a finished run."""
    from dataclasses import replace

    from tropism.api import resolved_recipe
    from tropism.record import stages_of

    runs, rate = stages_of(path), peers.peak("float32")[0]
    config = {name: value for name, value in runs[0].config.items() if name not in ("stage", "versions")}
    recipe, rows = resolved_recipe(config, (), {}), list[dict[str, Any]]()
    models = {"": recipe.model}  # stage -> what it left; "": what the next one starts from unless it names another
    for stage, run in zip(recipe.stages, runs, strict=True):
        steps = [line for line in run.metrics() if line.get("time/update")]
        with tempfile.TemporaryDirectory() as folder:
            begun = replace(recipe, model=models[stage.start], stages=(replace(stage, start=""),))
            turn = step.opened(begun, Path(folder))
            for phase, middle in profiled(turn, turns, rate).items():
                spent = sum(line[f"time/{phase}"] or 0.0 for line in steps)
                if not middle.get("products"):  # rows are read, not drawn, and nothing need be measured
                    continue
                rows.append(
                    {"stage": stage.name, "steps": len(steps), "phase": phase, "seconds": round(spent)} | row(middle)
                )
        models[""] = models[stage.name] = replace(recipe.model, path=str(run.path), shape={})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1M,4M")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a finished run, instead of sizes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    peers.settled(1)
    rows = of_run(given.run, given.turns) if given.run else []
    for size in given.sizes.split(",") if not given.run else ():
        for compute in given.compute.split(","):
            rows += measured(size, compute, given.turns)
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
