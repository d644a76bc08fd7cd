"""The over-optimisation laboratory: python bench/overoptimisation.py [--seeds 0 1 2] [--run]

Reads the runs of recipes/overoptimisation.yaml and draws, over the distance from the start, the square root of nats per
reply, what the proxy says and what gold says: of the best of n, of PPO without and with guards, and of DPO. Gold labels
the pairs, with noise; no policy is paid by it and no checkpoint chosen by it. With --run what has no run is trained.
A seed's points are kept in bench/overoptimisation/SEED.json and not made again while that file is there.

    best of n    gold(d) - gold(0) = d (a - b d)          Gao, Schulman and Hilton 2022, arXiv:2210.10760, sec. 3.1
    RL           gold(d) - gold(0) = d (a - b log d)

a and b by least squares; gold turns where the curve is highest. One table of the ends, seed by seed, and one figure.
Then how much a reward model likes length where gold is the same: of pairs by people who like it too, as they are and
balanced.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.config import Model
from tropism.envs import open_source
from tropism.maths.best_of_n import expected_best, kl_of_best
from tropism.record import Run
from tropism.rollout.play import play
from tropism.training.model import load_policy
from tropism.training.scorer import Scorer
from tropism.types import Rollout, SamplingParams, seed_of
from tropism.view.plots import line_chart

sys.path.append(str(Path(__file__).parent))
import curves

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "overoptimisation"
ENV = "recipes/instructions.py:Instructions"
TASKS, SAMPLES, DRAWN = 100, 128, (1, 2, 4, 8, 16, 32, 64, 128)
STAGES = ("unguarded", "guarded", "dpo")
SCORERS = ("rm", "watch", "biased", "balanced")
PAID = {"rm": "guarded", "biased": "longer", "balanced": "corrected"}
"""Reward model -> a stage that it paid, alone or with another, less the divergence's price."""
PROXY, WATCH = "eval/reward_model/rm", "eval/reward_model/watch"

Point = tuple[float, float, float, float]
"""Distance, proxy, the other half's model, gold."""


# ---------------------------------------------------------------------------------------------------------- the points


def evaluated(run: Path, stage: str) -> list[Point]:
    """Of every evaluation of a stage, in its order. A distance that noise makes negative is 0."""
    lines = [line for line in Run(run / stage).metrics() if "eval/gold" in line]
    return [
        (math.sqrt(max(0.0, line["eval/kl/episode"])), line[PROXY], line[WATCH], line["eval/gold"]) for line in lines
    ]


def sampled(run: Path, seed: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """(token ids of the start model's replies after their prompts, what gold says of each, tokens of each)."""
    policy = load_policy(Model(path=str(run / "sft"), device="cpu"))
    source = open_source(ENV, {}, split="test", seed=seed)
    tasks = [(source.task(n), n, k) for n in range(TASKS) for k in range(SAMPLES)]
    rollouts: list[Rollout] = []
    for start in range(0, len(tasks), 512):
        params = SamplingParams(max_tokens=64, seed=seed_of(seed, start))
        rollouts += play(tasks[start : start + 512], source, policy.sampler, policy.words, params, max_turns=1)
    answers = [[*one.turns[-1].context, *one.turns[-1].action] for one in rollouts]
    facts = [(one.turns[-1].earned.get("gold", 0.0), float(len(one.turns[-1].action))) for one in rollouts]
    gold, length = torch.tensor(facts, dtype=torch.float64).unbind(1)
    return answers, gold, length


def standard(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std()


def best_of_n(scores: dict[str, Tensor], gold: Tensor) -> list[Point]:
    """Of the start model, over all ways to draw n of its replies; proxies on the scale on which PPO reads them."""
    proxy, watch, true = (one.view(TASKS, SAMPLES) for one in (scores["rm"], scores["watch"], gold))
    best = [[float(expected_best(values, proxy, n).mean()) for values in (proxy, watch, true)] for n in DRAWN]
    return [(math.sqrt(kl_of_best(n)), p, w, g) for n, (p, w, g) in zip(DRAWN, best, strict=True)]


def pull_of_length(score: Tensor, gold: Tensor, length: Tensor) -> float:
    """Standard deviations of score for one of length, where gold is the same: a least-squares coefficient."""
    table = torch.stack([standard(gold), standard(length)], 1)
    return float(torch.linalg.lstsq(table, standard(score)[:, None]).solution[1, 0])


# ----------------------------------------------------------------------------------------------------------- the curves


def linear(d: float) -> float:
    return d


def logarithmic(d: float) -> float:
    return math.log(d)


def fitted(points: Sequence[Point], shape: Callable[[float], float]) -> tuple[float, float]:
    """(a, b) of gold(d) - gold(0) = d (a - b shape(d)), by least squares."""
    start = points[0][3]
    rows = [(d, -d * shape(d), gold - start) for d, _, _, gold in points if d > 0.05]
    table = torch.tensor(rows, dtype=torch.float64)
    found = torch.linalg.lstsq(table[:, :2], table[:, 2:]).solution[:, 0]
    return float(found[0]), float(found[1])


def turn_of(points: Sequence[Point], shape: Callable[[float], float]) -> float | None:
    """The distance at which gold is highest; None where that is more than twice as far as anybody went."""
    a, b = fitted(points, shape)
    if b <= 0:
        return None
    turns = max(0.0, a / (2 * b)) if shape is linear else math.exp(min(a / b - 1, 700.0))
    return turns if turns < 2 * max(point[0] for point in points) else None


def curve(points: Sequence[Point], shape: Callable[[float], float]) -> list[tuple[float, float]]:
    a, b = fitted(points, shape)
    far = max(point[0] for point in points)
    return [(d := far * k / 40, points[0][3] + d * (a - b * shape(d))) for k in range(1, 41)]


# -------------------------------------------------------------------------------------------------------------- results


def line_of(name: str, points: Sequence[Point], shape: Callable[[float], float], chosen: int | None) -> dict[str, Any]:
    """One row: gold at the start, at its best, at the end, and at the checkpoint that was chosen without gold."""
    gold = [point[3] for point in points]
    line = {"what": name, "start": gold[0], "highest": max(gold), "end": gold[-1]}
    line["chosen"] = gold[chosen] if chosen is not None else gold[-1]
    line |= {"proxy": points[-1][1], "distance": points[-1][0], "turns at": turn_of(points, shape) or "–"}
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in line.items()}


def ends(run: Path, stage: str) -> dict[str, float]:
    """Tokens of a reply and gold, before a stage and after."""
    lines = [line for line in Run(run / stage).metrics() if "eval/gold" in line]
    names = {"tokens": "eval/completions/mean_length", "gold": "eval/gold"}
    return {
        f"{name} {when}": round(lines[k][key], 2)
        for name, key in names.items()
        for k, when in ((0, "before"), (-1, "after"))
    }


def of_seed(run: Path, seed: int) -> dict[str, Any]:
    """{"points": what -> points, "rows" and "lengths": the tables', "reward model": held-out accuracy}."""
    kept = RESULTS / f"{seed}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    answers, gold, length = sampled(run, seed)
    scores = {name: standard(torch.tensor(Scorer(str(run / name))(answers)).double()) for name in SCORERS}
    points: dict[str, list[Point]] = {"best of n": best_of_n(scores, gold)}
    rows = [line_of("best of n", points["best of n"], linear, None)]
    for stage in STAGES:
        points[stage] = evaluated(run, stage)
        lines = [line["step"] for line in Run(run / stage).metrics() if "eval/gold" in line]
        best = Run(run / stage).notes()["best"]["step"]
        rows.append(line_of(stage, points[stage], logarithmic, lines.index(best) if stage != "unguarded" else None))
    accuracy = [line for line in Run(run / "rm").metrics() if "eval/rewards/accuracies" in line][-1]
    told = {name.removeprefix("eval/"): value for name, value in accuracy.items() if re.search("accurac|calib", name)}
    lengths = [
        {"reward model": name, "pull of length": round(pull_of_length(scores[name], gold, length), 2)}
        | ({"policy": PAID[name]} | ends(run, PAID[name]) if name in PAID else {})
        for name in SCORERS
    ]
    RESULTS.mkdir(exist_ok=True)
    found = {"points": points, "rows": rows, "lengths": lengths, "reward model": told}
    kept.write_text(json.dumps(found))
    return found


def figure(found: dict[int, dict[str, Any]]) -> str:
    """Of each way two panels: gold with its fitted curve, and the proxy, seed by seed."""
    panels = []
    for name in ("best of n", *STAGES):
        shape = linear if name == "best of n" else logarithmic
        of = {seed: result["points"][name] for seed, result in found.items()}
        gold = {f"seed {seed}": sorted((d, value) for d, _, _, value in points) for seed, points in of.items()}
        gold |= {f"fit {seed}": curve(points, shape) for seed, points in of.items()}
        proxy = {f"seed {seed}": sorted((d, value) for d, value, _, _ in points) for seed, points in of.items()}
        panels += [line_chart(f"{name}: gold over √nats", gold), line_chart(f"{name}: proxy over √nats", proxy)]
    return curves.side_by_side(panels)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--output", default="runs")
    given = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    for seed in given.seeds:
        name = f"overoptimisation-{seed}"
        made = (RESULTS / f"{seed}.json").exists() or (Path(given.output) / name).exists()
        if given.run and not made:
            words = ["train", "recipes/overoptimisation.yaml", f"name={name}", f"seed={seed}", f"output={given.output}"]
            subprocess.run([sys.executable, "-m", "tropism", *words], cwd=ROOT, env=os.environ, check=True)
        found[seed] = of_seed(Path(given.output) / name, seed)
    columns = list(found[given.seeds[0]]["rows"][0])
    print("| seed | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for seed, result in found.items():
        for row in result["rows"]:
            print(f"| {seed} | " + " | ".join(str(row[column]) for column in columns) + " |")
    for seed, result in found.items():
        print(f"\nseed {seed}, the reward model on the other half's pairs: {result['reward model']}")
        for stage in STAGES:
            gold = [point[3] for point in result["points"][stage]]
            late, before = statistics.fmean(gold[-8:]), statistics.fmean(gold[-12:-8])
            print(f"  {stage}: mean gold of the last eight evaluations {late:.2f}, of the four before {before:.2f}")
        for line in result["lengths"]:
            print("  " + ", ".join(f"{key} {value}" for key, value in line.items()))
    (RESULTS / "figure.svg").write_text(figure(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
