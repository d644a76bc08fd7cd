"""Every method on one start model, side by side on the cores at hand: python bench/signals.py [sums] [--jobs 2]

A start model is taught once, by SFT, to answer and to read each of the teacher's prompts (recipes/signals.yaml, stage
sft). Every run then starts from it: same tasks in the same order, same rollouts. Three
learning rates are tried on two seeds for every method alike; the best one, by mean success along the way, is run on
five other seeds. External teachers are the start model trained on by GRPO, whose cost is in the table.

Each finished run is a line of bench/signals/SETTING.jsonl, so a command that was stopped goes on where it was.
`python bench/signals.py SETTING --table` prints the table from those lines and draws the figure, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tropism.view.plots import line_chart

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = ROOT / "runs" / "signals", ROOT / "bench" / "signals"
RATES = (1e-4, 2e-4, 4e-4)
TUNED_ON, SEEDS = (100, 101), (0, 1, 2, 3, 4)
EXPERT = "EXPERT"
"""Stands for the path of the start model after GRPO."""


@dataclass(frozen=True)
class Setting:
    """Where methods are compared."""

    recipe: str
    """Its stages are `sft`, which makes the start model, and `rl`, whose method is replaced."""
    methods: dict[str, dict[str, Any]]
    level: float
    """Success to reach."""


def read(*names: str, **more: Any) -> dict[str, Any]:
    return {"teacher": {"reads": list(names), **more}}


REWARD = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "max_rl", "rloo", "reinforce", "reinforce_pp", "ppo")
HINTS = {"reads": ["worked"], "against": ["decoy"]}
EITHER = read("sibling", "feedback", need="first")
OUTER = {"teacher": {"who": EXPERT}}
SETTINGS = {
    "sums": Setting(
        "recipes/signals.yaml",
        {name: {} for name in REWARD}
        | {"sdpo": EITHER, "sdft": read("worked"), "rlsd": read("worked"), "srpo": read("sibling")}
        | {"rlcsd": {"teacher": HINTS}, "gated": {"teacher": HINTS}, "sdpg": read("worked")}
        | {"opd": OUTER, "g_opd": OUTER, "reopold": OUTER},
        0.85,
    ),
}


# ---------------------------------------------------------------------------------------------------------------- runs


def recipe_of(setting: Setting, method: str, rate: float, seed: int, paths: dict[str, str]) -> dict[str, Any]:
    """The `rl` stage alone, from the start model, with this method."""
    raw = yaml.safe_load((ROOT / setting.recipe).read_text())
    stage = next(stage for stage in raw["stages"] if stage["name"] == "rl")
    words = {key: stage["method"]["sdpo"]["teacher"][key] for key in ("say", "closing")}
    options = json.loads(json.dumps(setting.methods[method]))
    if teacher := options.get("teacher"):
        teacher |= words if "reads" in teacher else {"who": paths[EXPERT]}
    stage |= {"method": {method: options}, "train": stage["train"] | {"learning_rate": rate}}
    return {"name": f"{method}-{rate:g}-{seed}", "model": paths["start"], "seed": seed, "stages": [stage]}


def trained(recipe: dict[str, Any], folder: Path) -> tuple[Path, float]:
    """(the stage's folder, minutes). A run that fails stops everything: what it says is the answer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output": str(folder)}))
    command = [sys.executable, "-m", "tropism", "train", str(path), "--fresh"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return folder / recipe["name"] / recipe["stages"][-1]["name"], (time.perf_counter() - began) / 60


def curve(stage: Path) -> dict[str, Any]:
    """What a run leaves in the results: success of each step and held out at the end, and how its teacher fared."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "success" in line]
    held_out = [line["eval/success"] for line in lines if "eval/success" in line]
    kept = {"success": [round(line["success"], 4) for line in steps], "held_out": held_out}
    for name in ("gate/trust", "gate/slope", "teacher/share", "completions/mean_length"):
        if values := [line[name] for line in steps if name in line]:
            kept[name] = [round(values[0], 4), round(values[-1], 4)]
    return kept


def start(name: str, setting: Setting) -> dict[str, str]:
    """Paths of the start model and of the expert, made unless they are there to their last step."""
    raw, folder = yaml.safe_load((ROOT / setting.recipe).read_text()), RUNS / name
    made = raw | {"name": "start", "stages": raw["stages"][:1]}
    paths = {"start": str(finished(made, folder))}
    expert = recipe_of(setting, "grpo", RATES[1], 200, paths) | {"name": "expert"}
    expert["stages"][0]["train"]["steps"] *= 2
    return paths | {EXPERT: str(finished(expert, folder))}


def finished(recipe: dict[str, Any], folder: Path) -> Path:
    """The last checkpoint of a recipe of one stage. One of a run that was stopped half-way is not it."""
    (stage,) = recipe["stages"]
    last = folder / recipe["name"] / stage["name"] / "checkpoints" / f"checkpoint-{stage['train']['steps']}"
    if not last.exists():
        trained(recipe, folder)
    return last


def results(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(name: str, jobs: list[tuple[str, float, int]], paths: dict[str, str], cores: int) -> None:
    """Every job that has no line yet, `cores` at a time."""
    known = {(line["method"], line["rate"], line["seed"]) for line in results(name)}
    missing = [job for job in jobs if job not in known]
    RESULTS.mkdir(exist_ok=True)

    def one(job: tuple[str, float, int]) -> None:
        stage, minutes = trained(recipe_of(SETTINGS[name], *job, paths), RUNS / name)
        line = dict(zip(("method", "rate", "seed"), job, strict=True)) | curve(stage) | {"minutes": round(minutes, 2)}
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(stage.parent)
        print(f"{job[0]:<13} {job[1]:g}  seed {job[2]:<3}  {line['held_out'][-1]:.3f}  {minutes:.1f} min", flush=True)

    with ThreadPoolExecutor(cores) as pool:
        for future in [pool.submit(one, job) for job in missing]:
            future.result()


# ------------------------------------------------------------------------------------------------------------- reading


def along(line: dict[str, Any]) -> float:
    """Mean success along the way, which is the area under the learning curve."""
    return statistics.fmean(line["success"])


def of(lines: Sequence[dict[str, Any]], method: str, rate: float | None, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [line for line in lines if (line["method"], line["rate"]) == (method, rate) and line["seed"] in seeds]


def best_rate(lines: Sequence[dict[str, Any]], method: str) -> float | None:
    """The learning rate with the best mean success along the way on the tuning seeds; None before all were tried."""
    tried = {rate: [along(line) for line in of(lines, method, rate, TUNED_ON)] for rate in RATES}
    if any(len(values) < len(TUNED_ON) for values in tried.values()):
        return None
    return max(tried, key=lambda rate: statistics.fmean(tried[rate]))


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """The middle 95 % of the means of bootstrap samples."""
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(draws))
    return means[draws // 40], means[-draws // 40]


def with_interval(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{statistics.fmean(values):.3f} ({low:.3f} to {high:.3f})"


def reaching(success: Sequence[float], level: float, window: int = 5) -> int | None:
    """Steps until the mean of `window` steps reaches the level."""
    for end in range(window, len(success) + 1):
        if statistics.fmean(success[end - window : end]) >= level:
            return end
    return None


def table(name: str) -> Iterator[str]:
    """A row per method: the rate that was chosen, and over seeds the success along the way, at the end, the worst."""
    setting, lines = SETTINGS[name], results(name)
    yield "| method | learning rate | along the way (95 %) | held out (95 %) | worst seed | steps to reach |"
    yield "|---|---|---|---|---|---|"
    for method in setting.methods:
        rate = best_rate(lines, method)
        if not (found := of(lines, method, rate, SEEDS)):
            continue
        ends, ways = [line["held_out"][-1] for line in found], [along(line) for line in found]
        steps = sorted(reaching(line["success"], setting.level) or 10**6 for line in found)[len(found) // 2]
        means = " | ".join(with_interval(values) for values in (ways, ends))
        yield f"| {method} | {rate:g} | {means} | {min(ends):.3f} | {steps if steps < 10**6 else 'never'} |"


def figure(name: str) -> str:
    """Mean success over steps, a line per method."""
    lines, series = results(name), {}
    for method in SETTINGS[name].methods:
        if found := of(lines, method, best_rate(lines, method), SEEDS):
            means = [statistics.fmean(values) for values in zip(*(line["success"] for line in found), strict=False)]
            series[method] = [(5 * k + 5, statistics.fmean(means[5 * k : 5 * k + 5])) for k in range(len(means) // 5)]
    return line_chart(f"success on {name}, by step", series, width=900, height=420)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=SETTINGS, nargs="?", default="sums")
    parser.add_argument("--methods", default="", help="only these, with commas between them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    given = parser.parse_args()
    name = given.setting
    if not given.table:
        methods = [m for m in SETTINGS[name].methods if not given.methods or m in given.methods.split(",")]
        paths = start(name, SETTINGS[name])
        run(name, [(m, rate, seed) for m in methods for seed in TUNED_ON for rate in RATES], paths, given.jobs)
        chosen = {m: best_rate(results(name), m) for m in methods}
        run(name, [(m, rate, seed) for m, rate in chosen.items() if rate for seed in SEEDS], paths, given.jobs)
    print("\n".join(table(name)))
    (RESULTS / f"{name}.svg").write_text(figure(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
