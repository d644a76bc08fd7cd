"""Where the time of a step goes, by kind of operation, and the least that its operations and its bytes could take.

    python bench/floor.py [--sizes 1M,4M] [--compute float32] [--threads 1] [--whole] [--json]
    python bench/floor.py --run runs/tictactoe          a finished run's stages, each from the model that it began with

The step of bench/step.py, with `--whole` its whole work; drawing and update each under torch's profiler: milliseconds
that operations of a kind took by themselves, of a median step; `python` is what no operation accounts for, the
profiler's own time in it. The last two are the least that a phase could take, counted while it runs without the
profiler:

    floor      the products at the rate of the fastest product of two matrices of 1024 x 1024: two operations for each
               weight and token of a pass forward, two more on the way back and two where the weight is trained; the
               head sees only tokens that were chosen, and what rows begin with in common is there once, unless the
               work is whole
    bytes      what must come from memory or go there, at the rate of copying an array that no cache holds. Drawing
               reads the weights for every token of as many sequences as are drawn at once, and for every token the
               keys and values of those before it. Learning reads the weights twice for a micro-batch and writes their
               gradients, writes and reads what is kept for the way back, and moves AdamW's four arrays, seven times
               in all. A cache that holds some of it between two uses spares that part

Were both done at once, the larger would be the least; one after the other, the sum. `half, beside another` is a step of
half the groups, as one of two processes has it, profiled alone and then computed at the share of its rate that `tropism
plan` finds a process to keep while another works. With several threads a kind's time is that of the thread which calls
its operations, and the rates are those of as many.

Of a run, `seconds` is what its record says the stage took with that phase, at as many threads as it had.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peers
import step
from least import Least, counted, moved, to_draw

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
LEAST = ("floor", "bytes")


def kind_of(name: str) -> str:
    if "Optimizer" in name or "foreach" in name or "fused_adam" in name:
        return "optimizer"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


class Watched:
    """A function of the loop, counted and under the profiler by turns."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.profiled = function, False
        self.kinds, self.least = dict[str, float](), Least()
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from torch.profiler import ProfilerActivity, profile

        self.given = args, settings
        if not self.profiled:
            self.least = Least()
            with counted(self.least):
                return self.function(*args, **settings)
        with profile(activities=[ProfilerActivity.CPU]) as told:
            results: list[Any] = []
            whole = 1e3 * peers.timed(lambda: results.append(self.function(*args, **settings)))
        self.kinds = {"whole": whole}
        for event in told.key_averages():
            kind = kind_of(event.key)
            self.kinds[kind] = self.kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e3
        return results[0]


@cache
def limits(compute: str) -> Least:
    """What the threads of this process do in a second."""
    return Least(peers.peak(compute)[0], peers.bandwidth())


def profiled(turn: peers.Turn, turns: int, limits: Least) -> dict[str, dict[str, float]]:
    """Phase -> milliseconds in all, by kind, and at least, of a median turn; limits: what the machine does a second."""
    from tropism.training import learn

    watched = {phase: Watched(getattr(learn, name)) for phase, name in PHASES.items()}
    least: dict[str, list[Least]] = {phase: [] for phase in PHASES}
    kinds: dict[str, list[dict[str, float]]] = {phase: [] for phase in PHASES}
    for phase, name in PHASES.items():
        setattr(learn, name, watched[phase])
    for n in range(2 * turns + 2):  # one of each warms up
        for each in watched.values():
            each.profiled = n % 2 == 1
        turn()
        if n >= 2 and n % 2 == 1:
            for phase, each in watched.items():
                kinds[phase].append(each.kinds)
        elif n >= 2:
            (job, _), (batch, *_, optimizer, _), settings = watched["draw"].given[0], *watched["update"].given
            watched["draw"].least = to_draw(batch, job.policy)
            watched["update"].least.bytes += moved(optimizer.parameters, settings["epochs"] * settings["mini_batches"])
            for phase, each in watched.items():
                least[phase].append(each.least)
    for phase, name in PHASES.items():
        setattr(learn, name, watched[phase].function)
    told = {}
    for phase in PHASES:
        names = dict.fromkeys(name for one in kinds[phase] for name in one)
        told[phase] = {name: statistics.median(one.get(name, 0.0) for one in kinds[phase]) for name in names}
        told[phase]["floor"] = 1e3 * statistics.median(one.operations for one in least[phase]) / limits.operations
        told[phase]["bytes"] = 1e3 * statistics.median(one.bytes for one in least[phase]) / limits.bytes
    return told


def row(middle: dict[str, float], share: float = 1.0) -> dict[str, Any]:
    """What is shown of a phase; `share`: of all of it."""
    shown = {kind: round(share * middle.get(kind, 0.0)) for kind in (*KINDS, "optimizer", "other")}
    rest = middle["whole"] - sum(value for name, value in middle.items() if name not in ("whole", *LEAST))
    least = {name: round(share * middle[name]) for name in LEAST}
    return {"ms": round(share * middle["whole"])} | shown | {"python": round(share * rest)} | least


def measured(size: str, compute: str, turns: int, threads: int = 1, whole: bool = False) -> list[dict[str, Any]]:
    """A row of each phase, and with one thread one of a step as one of two processes has it."""
    from tropism.training.processes import rate_beside

    groups, rows = peers.ROLLOUTS // peers.GROUP, dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        path = step.model(size, Path(folder))
        for part in (1, 2) if threads == 1 else (1,):
            where = Path(folder) / str(part)
            recipe = step.recipe(path, compute, where, whole=whole, groups=groups // part)
            found = profiled(step.opened(recipe, where), turns, limits(compute))
            if part == 1:
                rows |= {phase: row(found[phase]) for phase in ("draw", "update")}  # nothing is measured
                continue
            draw, update = found["draw"], found["update"]
            both = {name: draw.get(name, 0.0) + update.get(name, 0.0) for name in draw | update}
            rows["half, beside another"] = row(both, 1 / rate_beside(recipe.model, 2))
    about = {"size": size, "compute": compute, "threads": threads, "work": "whole" if whole else "packed"}
    return [about | {"phase": name} | told for name, told in rows.items()]


def of_run(path: Path, turns: int, threads: int = 1) -> list[dict[str, Any]]:
    """A row of each phase of each stage of a finished run."""
    from dataclasses import replace

    from tropism.api import resolved_recipe
    from tropism.record import stages_of

    runs = stages_of(path)
    config = {name: value for name, value in runs[0].config.items() if name not in ("stage", "versions")}
    recipe, rows = resolved_recipe(config, (), {}), list[dict[str, Any]]()
    about, limit = {"compute": recipe.model.compute, "threads": threads}, limits(recipe.model.compute)
    models = {"": recipe.model}  # stage -> what it left; "": what the next one starts from unless it names another
    for stage, run in zip(recipe.stages, runs, strict=True):
        steps = [line for line in run.metrics() if line.get("time/update")]
        with tempfile.TemporaryDirectory() as folder:
            begun = replace(recipe, model=models[stage.start], stages=(replace(stage, start=""),))
            turn = step.opened(begun, Path(folder))
            for phase, middle in profiled(turn, turns, limit).items():
                spent = sum(line[f"time/{phase}"] or 0.0 for line in steps)
                if not middle.get("products"):  # rows are read, not drawn, and nothing need be measured
                    continue
                told = about | {"stage": stage.name, "steps": len(steps), "phase": phase, "seconds": round(spent)}
                rows.append(told | row(middle))
        models[""] = models[stage.name] = replace(recipe.model, path=str(run.path), shape={})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1M,4M")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="every row passed whole, and none left out")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a finished run, instead of sizes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    peers.settled(given.threads)
    rows = of_run(given.run, given.turns, given.threads) if given.run else []
    for size in given.sizes.split(",") if not given.run else ():
        for compute in given.compute.split(","):
            rows += measured(size, compute, given.turns, given.threads, given.whole)
    about = peers.versions("torch", "transformers")
    for compute in dict.fromkeys(each["compute"] for each in rows):
        limit = limits(compute)
        about |= {compute: f"{limit.operations / 1e9:.0f} GFLOP/s", "copying": f"{limit.bytes / 1e9:.1f} GB/s"}
    peers.told(rows, about, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
