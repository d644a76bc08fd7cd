"""A batch that is played ahead (`sampling.ahead`): what it saves and what it costs.   python bench/ahead.py [WHAT …]

    time     a step with and without it, where scoring takes no time, where it waits for a second, as for a server, and
             where it computes for a second in Python; there with processes that score (`sampling.reward_workers`) too
    bias     the mean gradient of rollouts that are some steps old, with and without the weight proximal / behavior,
             against that of fresh ones: how much of the fresh one is in it, and the length of the difference over the
             length of the fresh one; 1 and 0 are no bias. Every product is of means over tasks that are not the same,
             so that noise is not taken for length
    learn    GRPO on sums in both ways, three seeds each

`bias` and `learn` begin with the start model of bench/signals.py sums, which is made if it is not there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import peers
import signals
import step

RATE, SEEDS = 4e-4, (0, 1, 2)
BEFORE, LAGS, GROUPS = 6, (1, 4), 256
"""Steps before the rollouts are drawn, how many follow before they are used, tasks of each of the two halves."""
WORTH = {
    "is instant": "",
    "waits 1 s": """

plain = worth


def worth(prompts, completions, **_):
    import time

    time.sleep(1)
    return plain(prompts, completions)
""",
    "computes 1 s": f"""


def worth(reply):
    import time

    end = time.thread_time() + {1 / peers.ROLLOUTS}
    while time.thread_time() < end:
        pass
    return len(set(reply)) / max(len(reply), 1)
""",
}
"""What is added to the file of the reward; a second is that of all rollouts of a step."""
WAYS: dict[str, dict[str, Any]] = {"in turn": {}, "ahead": {"ahead": True}}
APART = {
    "in turn, 2 that score": {"reward_workers": 2},
    "ahead, 1 that scores": {"ahead": True, "reward_workers": 1},
    "ahead, 2 that score": {"ahead": True, "reward_workers": 2},
}


# ----------------------------------------------------------------------------------------------------------------- time


def playing(path: str, folder: str, scoring: str, way: str) -> peers.Turn:
    where = Path(folder) / f"{scoring}-{way}"
    recipe = step.recipe(path, "float32", where)
    with (where / "worth.py").open("a") as file:
        file.write(WORTH[scoring])
    stage = recipe.stages[0]
    sampling = replace(stage.sampling, **(WAYS | APART)[way])
    return step.opened(replace(recipe, stages=(replace(stage, sampling=sampling),)), where)


def times(size: str, turns: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = step.model(size, Path(folder))
        for scoring in WORTH:
            ways = WAYS | APART if scoring.startswith("computes") else WAYS
            given = {"path": path, "folder": folder, "scoring": scoring}
            found = peers.raced({way: (playing, given | {"way": way}) for way in ways}, 1, turns)
            base = peers.quartiles([turn["step"] for turn in found["in turn"]])[0]
            for way, each in found.items():
                middle, low, high = peers.quartiles([turn["step"] for turn in each])
                rows.append(
                    {"size": size, "scoring": scoring, "way": way, "step ms": round(1e3 * middle)}
                    | {"quartiles": f"{1e3 * low:.0f} to {1e3 * high:.0f}", "in turn over it": round(base / middle, 2)}
                )
    return rows


# ----------------------------------------------------------------------------------------------------------------- bias


def grpo(seed: int, **sampling: Any) -> dict[str, Any]:
    paths = {"start": signals.start_model("sums")}
    recipe = signals.recipe_of(signals.SETTINGS["sums"], "grpo", RATE, seed, paths)
    recipe["stages"][0]["sampling"] |= sampling
    return recipe


def bias(seed: int, folder: str) -> list[dict[str, float]]:
    """For every lag, with the weight and without."""
    from tropism.api import Lines, resolved_recipe
    from tropism.training.checkpoint import State
    from tropism.training.learn import one_step
    from tropism.training.model import load_policy
    from tropism.training.run import open_job

    recipe = resolved_recipe(grpo(seed), (), {})
    job = open_job(recipe, recipe.stages[0], recipe.model, load_policy(recipe.model, seed), Path(folder), Lines())
    state, rows = State(), []
    for _ in range(BEFORE):
        one_step(job, state, {})
    old = [rollouts(job, half) for half in (0, 1)]
    for lag in range(1, max(LAGS) + 1):
        one_step(job, state, {})
        if lag in LAGS:
            fresh = [gradient(job, rollouts(job, half), exact=True) for half in (0, 1)]
            for weighted in (True, False):
                stale = [gradient(job, half, exact=not weighted) for half in old]
                along, apart = compared(stale, fresh)
                rows.append({"lag": lag, "weighted": weighted, "of the fresh one": along, "difference": apart})
    return rows


def rollouts(job: Any, half: int) -> list[Any]:
    """Of tasks that no step trains on, always the same ones; drawn by the policy as it is."""
    from tropism.training.checkpoint import State

    state = State(step=1_000_000 + half, cursor=1_000_000 + half * GROUPS)
    found: list[Any] = job.draw.score(job.draw.play(state, GROUPS, 0))
    return found


def gradient(job: Any, played: Sequence[Any], exact: bool) -> Any:
    """Of the method's objective on these rollouts, at the policy as it is; `exact` takes the weight for 1."""
    import torch

    from tropism.signals.frozen import measure
    from tropism.training.collate import collate
    from tropism.training.packed import micro_batches

    method, policy, train = job.stage.method, job.policy, job.stage.train
    batch = collate(played, codes={}, device=policy.device)
    frozen = policy.measuring(1.0, train)
    if exact:
        batch = batch.replace(behavior_logp=frozen(batch).logp)
    batch = measure(batch, method.needs, policy=frozen, exact=exact)
    credit, weights = method.credit(batch), method.weights(batch)
    for rows in micro_batches(batch, train.micro_tokens, packed=policy.packs()):
        width = int(batch.length[rows].max())
        piece = batch[rows].narrow(width)
        result = method.loss(policy.forward(piece), piece, credit[rows].narrow(width))
        (result.values * weights[rows, :width]).sum().backward()
    found = torch.cat([p.grad.flatten().double() for p in job.optimizer.parameters])
    for parameter in job.optimizer.parameters:
        parameter.grad = None
    return found


def compared(stale: Sequence[Any], fresh: Sequence[Any]) -> tuple[float, float]:
    """(the stale mean gradient along the fresh one, over its length; length of their difference over the same), from
    two halves each. Not a number where the fresh one is lost in noise."""
    own, other = float(stale[0] @ stale[1]), float(fresh[0] @ fresh[1])
    if other <= 0:
        return math.nan, math.nan
    both = float(stale[0] @ fresh[1] + stale[1] @ fresh[0]) / 2
    return both / other, (max(own - 2 * both + other, 0.0) / other) ** 0.5


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def biases() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        found = [row for seed in SEEDS for row in bias(seed, folder)]
    rows = []
    for lag in LAGS:
        for weighted in (True, False):
            mine = [row for row in found if row["lag"] == lag and row["weighted"] == weighted]
            shown = {name: spread([row[name] for row in mine]) for name in ("of the fresh one", "difference")}
            rows.append({"steps old": lag, "weight": "proximal / behavior" if weighted else "none"} | shown)
    return rows


# ---------------------------------------------------------------------------------------------------------------- learn


def learnt(jobs: int) -> list[dict[str, Any]]:
    ways = {"in turn": {}, "ahead": {"ahead": True}}
    with tempfile.TemporaryDirectory() as folder, signals.workers(jobs) as pool:
        begun = {
            (way, seed): pool.submit(signals.trained, grpo(seed, **sampling), Path(folder) / way)
            for way, sampling in ways.items()
            for seed in SEEDS
        }
        told = {key: signals.told(future.result()[0]) for key, future in begun.items()}
    rows = []
    for way in ways:
        mine = [told[way, seed] for seed in SEEDS]
        along, end = [statistics.mean(one["success"]) for one in mine], [one["held_out"][-1] for one in mine]
        rows.append({"way": way, "along the way": spread(along), "held out": spread(end)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="*", default=["time", "bias", "learn"], help="time, bias, learn")
    parser.add_argument("--sizes", default="1M,4M")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of learn")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    peers.settled(1)
    made = {
        "time": lambda: [row for size in given.sizes.split(",") for row in times(size, given.turns)],
        "bias": biases,
        "learn": lambda: learnt(given.jobs),
    }
    for what in given.what:
        peers.told(made[what](), peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
