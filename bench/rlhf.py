"""What came of recipes/rlhf.yaml, seed by seed: python bench/rlhf.py [--seeds 0 1 2] [--run]

Reads the held-out replies that each stage recorded at its end: the same instructions with the same draws, so that two
stages differ by their weights alone. Two tables: how often a stage's reply is worth more than that of `sft` to the same
instruction (gold, ties half), and the stage matrix, which says what a stage did to all that another had taught.
With --run the recipe is trained first, for every seed that has no run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tropism.record import Run

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "ppo", "dpo")
PARTS = ("content", "format", "brevity", "gold")


def at_the_end(run: Path, stage: str) -> dict[int, dict[str, Any]]:
    """Instruction -> the reply, its parts and its length in tokens."""
    record = Run(run / stage)
    last = record.recorded("eval")[-1]
    rows = record.rollouts(last, "eval", ("group", "reply", "rewards", "action")).to_pylist()
    return {
        row["group"]: {"reply": row["reply"], "length": len(row["action"]), **dict(row["rewards"])}
        for row in rows
        if row["rewards"]
    }


def wins(mine: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> float:
    """Share of instructions to which mine is worth more; of equal ones half."""
    both = mine.keys() & theirs.keys()
    return statistics.fmean(
        (mine[n]["gold"] > theirs[n]["gold"]) + (mine[n]["gold"] == theirs[n]["gold"]) / 2 for n in both
    )


def row_of(run: Path, stage: str) -> dict[str, float]:
    """One line of the stage matrix."""
    said = at_the_end(run, stage)
    line = {part: statistics.fmean(one[part] for one in said.values()) for part in PARTS}
    line["distinct"] = len({one["reply"] for one in said.values()}) / len(said)
    line["tokens"] = statistics.fmean(one["length"] for one in said.values())
    line["over sft"] = wins(said, at_the_end(run, "sft"))
    told = [line["kl/episode"] for line in Run(run / stage).metrics() if "kl/episode" in line]
    return line | {"nats": told[-1] if told else float("nan")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--output", default="runs")
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES}
    for seed in given.seeds:
        name = f"rlhf-{seed}"
        if given.run and not (Path(given.output) / name).exists():
            words = ["train", "recipes/rlhf.yaml", f"name={name}", f"seed={seed}", f"output={given.output}"]
            subprocess.run([sys.executable, "-m", "tropism", *words], cwd=ROOT, env=os.environ, check=True)
        for stage in STAGES:
            found[stage].append(row_of(Path(given.output) / name, stage))
    columns = list(found["ppo"][0])
    print("| stage | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for stage, lines in found.items():
        cells = [", ".join(f"{line[column]:.2f}" for line in lines) for column in columns]
        print(f"| {stage} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
