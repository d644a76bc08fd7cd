"""How long a step of each method takes, over GRPO's, and why: python bench/methods.py [--steps 12] [--json]

The start model of bench/signals.py, its sums, one thread; a few steps of each method in turn, twice over, the first
step of each run left out. The learning rate is so small that all of them draw much the same replies, so what differs
is what the teacher reads, what is measured, and the update. Tokens are those of one step: `student` the rows that are
learned from, `read` what teachers and references read. `allowed` is what reading them may make of a step, 1 + 1.1 x
tokens x seconds of a token / seconds of GRPO's step, where a token takes what it takes the forward pass that teachers
and references use, alone, over the replies of GRPO's first step (median of nine, in each of the two rounds). Shares
of a step are those of the method's own median step. With `--keep FOLDER` the runs stay there: `python bench/floor.py
--run FOLDER/srpo/run` says what one's step is made of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parent))
import peers
import signals
from tropism.recipe import load

PARTS = ("draw", "measure", "update")
TALK = {"recipes/talk.py:Talk": signals.SUMS}


def arms(expert: str) -> dict[str, signals.Stage]:
    """Method -> the stage's method, environment and judge; `expert`: path of the teacher that is another model."""
    found = json.loads(json.dumps(signals.SETTINGS["sums"].arms).replace(signals.EXPERT, expert))
    found |= {name: signals.arm(name, teacher={"who": expert}) for name in ("mopd",)}
    full = {"who": expert, "top_k": "all"}
    found |= {"opd, whole vocabulary": signals.arm("opd", teacher=full)}
    for name, reads in (("follow_up", "follow_up"), ("openclaw", "hint")):
        found[name] = signals.arm(name, reads) | {"env": TALK, "judge": {"who": "recipes/talk.py:judge"}}
    return {"grpo": found.pop("grpo"), "grpo in talk": signals.arm("grpo", env=TALK)} | found


def staged(stage: signals.Stage, steps: int) -> signals.Stage:
    """The same on sums, for so many steps that change next to nothing."""
    stage = {"name": "rl", "env": {"reasoning": signals.SUMS}, "success": {"part": "correct"}} | stage
    train = {"steps": steps, "save_every": 0, "learning_rate": 1e-9}
    stage |= {"sampling": {"groups": 16, "group_size": 8, "max_tokens": 64}, "train": train}
    (options,) = stage["method"].values()
    if "reads" in options.get("teacher", {}):
        options["teacher"] = options["teacher"] | {"must_add": -1}
    return stage


def steps_of(stage: signals.Stage, model: str, steps: int, folder: Path) -> list[dict[str, float]]:
    """Metrics of each step but the first, and `read`, the tokens of teachers and references."""
    stage = staged(stage, steps)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "run", "model": model, "output": str(folder), "stages": [stage]}))
    command = [sys.executable, "-m", "tropism", "train", str(path), "--fresh"]
    done = subprocess.run(command, cwd=signals.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-2000:])
    lines = [json.loads(text) for text in (folder / "run" / "rl" / "metrics.jsonl").read_text().splitlines()]
    referred = "reference_logp" in load(str(path), []).stages[0].method.needs.measured
    return [
        line | {"read": line.get("teacher/tokens", 0.0) + referred * line["num_tokens"] / line["step"]}
        for line in lines
        if "time/update" in line and line["step"] > 1
    ]


def forward_cost(path: Path) -> float:
    """Seconds of a token in the trainer's forward pass without gradient, over what a recipe's first step draws."""
    import torch

    from tropism.api import Lines
    from tropism.training.checkpoint import State
    from tropism.training.collate import collate
    from tropism.training.model import load_policy
    from tropism.training.run import open_job

    torch.set_num_threads(1)
    recipe = load(str(path), [])
    policy, stage = load_policy(recipe.model, 0), recipe.stages[0]
    job = open_job(recipe, stage, recipe.model, policy, path.parent / "cost", Lines())
    batch, forward = collate(job.draw(State()), codes={}), policy.measuring(1.0, stage.train)
    seconds = [peers.timed(lambda: forward(batch)) for _ in range(10)][1:]
    return statistics.median(seconds) / float(batch.length.sum())


def middle(found: list[dict[str, float]], key: str) -> float:
    return statistics.median(step.get(key, 0.0) for step in found)


def line_of(name: str, found: list[dict[str, float]], grpo: float, token: float) -> dict[str, Any]:
    """One row; `grpo`: seconds of its step, `token`: of one that is read."""
    step, read = middle(found, "time/step"), middle(found, "read")
    return {
        "method": name,
        "seconds": round(step, 3),
        "over grpo": round(step / grpo, 2),
        "allowed": round(1 + 1.1 * read * token / grpo, 2) if read else "",
        "student": int(found[-1]["num_tokens"] / found[-1]["step"]),
        "read": int(read),
    } | {part: round(middle(found, f"time/{part}") / step, 2) for part in PARTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--keep", help="folder for the runs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    paths = signals.start("sums")
    with tempfile.TemporaryDirectory() as folder:
        root, costs = Path(given.keep or folder).resolve(), list[float]()
        for _ in range(2):
            for name, stage in arms(paths[signals.EXPERT]).items():
                where = root / name.replace(", ", "-").replace(" ", "-")
                found.setdefault(name, []).extend(steps_of(stage, paths["start"], given.steps, where))
            costs.append(forward_cost(root / "grpo" / "recipe.yaml"))
    lines, token = [], statistics.median(costs)
    for name, steps in found.items():
        base = "grpo in talk" if name in ("grpo in talk", "follow_up", "openclaw") else "grpo"
        lines.append(line_of(name, steps, middle(found[base], "time/step"), token))
    peers.told(lines, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
