"""Two objectives that are at odds, ways to want both: python bench/objectives.py [--seeds 0 1 2] [--table]

Instructions of recipes/instructions.py: the more of what was asked for is named (content), the longer the reply and the
less terse. From one start model a policy is trained for each way and setting; a point is what it does on instructions
that are held out.

    weighted      grpo on w content + (1 - w) terse
    decoupled     gdpo with the same weights
    undamped      grpo on terse, content kept at or above a limit by a multiplier that grows and falls with time
    damped        the same with `damping`, chosen on seed 10

Prints a line per setting with the mean over seeds and their range, and which settings no other beats in both (the
front); draws all of them. Each finished run is a line of bench/objectives/points.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from tropism.record import Run
from tropism.view.plots import line_chart

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = ROOT / "runs" / "objectives", ROOT / "bench" / "objectives"
ENV = "recipes/instructions.py:Instructions"
WEIGHTS, LIMITS = (0.2, 0.35, 0.5, 0.65, 0.8), (0.3, 0.5, 0.7)
Line = dict[str, Any]


def settings() -> dict[tuple[str, float], dict[str, Any]]:
    """(way, number) -> what is its own in stage `rl`."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for way, method in (("weighted", "grpo"), ("decoupled", "gdpo")):
        for w in WEIGHTS:
            found[way, w] = {"method": method, "rewards": {"content": w, "terse": round(1 - w, 2)}}
    for way, damping in (("undamped", 0.0), ("damped", 5.0)):
        for limit in LIMITS:
            method = {"constrained": {"at_least": {"content": limit}, "damping": damping}}
            found[way, limit] = {"method": method, "rewards": {"terse": 1.0, "content": 0.0}}
    return found


def recipe_of(way: str, number: float, seed: int, start: str) -> dict[str, Any]:
    stage = {
        "name": "rl",
        "env": ENV,
        "sampling": {"groups": 16, "group_size": 8, "max_tokens": 64},
        "train": {"steps": 80, "learning_rate": 2e-4, "warmup": 5, "record_every": 80},
        "eval": {"every": 80, "tasks": 200},
    }
    name = f"{way}-{number:g}-{seed}"
    return {
        "name": name,
        "model": start,
        "seed": seed,
        "output": str(RUNS),
        "stages": [stage | settings()[way, number]],
    }


def trained(recipe: dict[str, Any]) -> Path:
    """The run's folder."""
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tropism", "train", str(path), "--fresh"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return RUNS / recipe["name"]


def start_model() -> str:
    """What stage `sft` of recipes/rlhf.yaml makes."""
    raw = yaml.safe_load((ROOT / "recipes" / "rlhf.yaml").read_text())
    (stage,) = raw["stages"][:1]
    made = RUNS / "start" / stage["name"] / "checkpoints" / f"checkpoint-{stage['train']['steps']}"
    if not made.exists():
        trained(raw | {"name": "start", "output": str(RUNS), "stages": [stage]})
    return str(made)


def points() -> list[Line]:
    path = RESULTS / "points.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def point(way: str, number: float, seed: int, start: str) -> None:
    run = trained(recipe_of(way, number, seed, start))
    last = [line for line in Run(run / "rl").metrics() if "eval/content" in line][-1]
    line = {"way": way, "number": number, "seed": seed}
    line |= {name: round(last[f"eval/{name}"], 4) for name in ("content", "terse", "gold")}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "points.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, flush=True)


def means(lines: Sequence[Line]) -> dict[tuple[str, float], tuple[float, float]]:
    """(way, number) -> (content, terse), means over seeds."""
    by: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        by.setdefault((line["way"], line["number"]), []).append(line)
    return {
        key: (statistics.fmean(one["content"] for one in of), statistics.fmean(one["terse"] for one in of))
        for key, of in sorted(by.items())
    }


def front(found: dict[tuple[str, float], tuple[float, float]]) -> set[tuple[str, float]]:
    """The settings than which no other is at least as good in both and better in one."""
    return {
        key
        for key, (c, t) in found.items()
        if not any(c2 >= c and t2 >= t and (c2, t2) != (c, t) for c2, t2 in found.values())
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    given = parser.parse_args()
    if not given.table:
        start, known = start_model(), {(line["way"], line["number"], line["seed"]) for line in points()}
        jobs = [(*key, seed) for key in settings() for seed in given.seeds if (*key, seed) not in known]
        with ThreadPoolExecutor(given.jobs) as pool:
            for future in [pool.submit(point, *job, start) for job in jobs]:
                future.result()
    lines = points()
    found, ranges = means(lines), dict[tuple[str, float], list[float]]()
    for line in lines:
        ranges.setdefault((line["way"], line["number"]), []).append(line["content"])
    best = front(found)
    print("| way | number | content (worst to best seed) | terse | on the front |\n" + "|---" * 5 + "|")
    for key, (content, terse) in found.items():
        spread = f"{content:.2f} ({min(ranges[key]):.2f} to {max(ranges[key]):.2f})"
        print(f"| {key[0]} | {key[1]:g} | {spread} | {terse:.2f} | {'yes' if key in best else ''} |")
    series = {way: sorted(at for (kind, _), at in found.items() if kind == way) for way, _ in found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "front.svg").write_text(line_chart("terse over content, held out", series, width=560, height=320))
    return 0


if __name__ == "__main__":
    sys.exit(main())
