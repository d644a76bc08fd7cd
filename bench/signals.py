"""Every method on one start model, side by side on the cores at hand: python bench/signals.py [SETTING] [--jobs 2]

    all      what follows, one after the other, and the default
    sums     every method on sums of six digits
    late     some of them for ten times as long
    hints    teachers that deserve trust and teachers that do not
    talk     sums in a conversation, for what learns from the user's next message
    game     tic-tac-toe, where feedback is a blunder in words
    both     sums and tic-tac-toe, with an expert of each as teacher

A start model is taught once, by SFT, to answer and to read each of the teacher's prompts (stage sft of the setting's
recipe). Every run then starts from it: same tasks in the same order, same rollouts. Three learning rates are tried on
two seeds for every method alike; the best one, by mean success along the way, is run on other seeds. External teachers
are the start model trained on by GRPO for twice as long, and have lines of their own.

Each finished run is a line of bench/signals/SETTING.jsonl, so a command that was stopped goes on where it was.
`python bench/signals.py SETTING --table` prints the table from those lines and draws the figure, and runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parent))
import curves

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = ROOT / "runs" / "signals", ROOT / "bench" / "signals"
RATES = (1e-4, 2e-4, 4e-4)
TUNED_ON, SEEDS = (100, 101), (0, 1, 2, 3, 4)
EXPERT = "EXPERT"
"""Stands for the path of the start model after GRPO; EXPERT-game for that of the expert called game."""

Stage = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where methods are compared."""

    recipe: str
    """Its stages are `sft`, which makes the start model, and `rl`, whose method is replaced."""
    arms: Mapping[str, Stage]
    """Label -> what is changed in stage `rl`."""
    level: float
    """Success to reach."""
    seeds: tuple[int, ...] = SEEDS
    base_seeds: tuple[int, ...] = ()
    """More seeds of GRPO, so that it is known where five of its own seeds lie."""
    experts: Mapping[str, Stage] = field(default_factory=dict)
    """Likewise, for GRPO."""
    rates_of: str = ""
    """A setting whose learning rates are used. Empty: they are chosen here."""
    times: int = 1
    """How many times the recipe's steps."""


def arm(method: str, *reads: str, env: Any = None, **options: Any) -> Stage:
    """A method whose teacher reads this; more of its teacher's settings with `teacher`."""
    if reads:
        options["teacher"] = {"reads": list(reads)} | options.get("teacher", {})
    return {"method": {method: options}} | ({"env": env} if env else {})


SUMS = {"config": {"min_terms": 6, "max_terms": 6, "min_digits": 1, "max_digits": 1}}
REWARD = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "max_rl", "rloo", "reinforce", "reinforce_pp", "ppo")
CONTRAST = {"against": ["decoy"]}
FIRST = {"need": "first", "must_add": 0}
"""At the start a sibling may add less than ten points: many that are right guessed, and have no work to show."""
OUTER = {"who": EXPERT}
ON_SUMS = (
    {name: arm(name) for name in REWARD}
    | {"sdpo": arm("sdpo", "sibling", "feedback", teacher=FIRST), "sdft": arm("sdft", "worked")}
    | {
        "rlsd": arm("rlsd", "worked"),
        "srpo": arm("srpo", "sibling", teacher={"must_add": 0}),
        "sdpg": arm("sdpg", "worked"),
        "mixed": arm("recipes/mixed.py:Mixed", "sibling", teacher={"must_add": 0}),
    }
    | {name: arm(name, "worked", teacher=CONTRAST) for name in ("rlcsd", "gated")}
    | {name: arm(name, teacher=OUTER) for name in ("opd", "g_opd", "reopold")}
    | {"reopold floor": arm("reopold", teacher=OUTER, switch=0.0, keep=1.0)}
)
"""`mixed` is SRPO without its routing; the floor alone is REOPOLD without its two phases and its choice of tokens."""
KINDS = ("right", "noisy", "useless", "inverted", "leaky", "styled")
PLANTED = {
    "gated": {"teacher": CONTRAST},
    "rlcsd": {"teacher": CONTRAST},
    **{name: {} for name in ("rlsd", "srpo", "sdpo", "sdft")},
}


def hinted(kind: str) -> dict[str, Any]:
    return {"recipes/hints.py:Hints": SUMS | {"kind": kind}}


def untested(stage: Stage) -> Stage:
    """For a teacher that is meant to be bad: start all the same."""
    (options,) = stage["method"].values()
    options["teacher"] = options["teacher"] | {"must_add": -1}
    return stage


SETTINGS = {
    "sums": Setting("recipes/signals.yaml", ON_SUMS, 0.85, experts={EXPERT: {}}),
    "late": Setting(
        "recipes/signals.yaml",
        {name: ON_SUMS[name] for name in ("grpo", "sdpo", "srpo", "gated")},
        0.85,
        seeds=(0, 1, 2),
        rates_of="sums",
        times=10,
    ),
    "hints": Setting(
        "recipes/signals-hints.yaml",
        {"grpo": arm("grpo")}
        | {
            f"{name} {kind}": untested(arm(name, "worked", env=hinted(kind), **options))
            for kind in KINDS
            for name, options in PLANTED.items()
        },
        0.85,
        base_seeds=tuple(range(100)),
        rates_of="sums",
    ),
    "talk": Setting(
        "recipes/signals-talk.yaml",
        {"grpo": arm("grpo"), "follow_up": arm("follow_up", "follow_up"), "openclaw": arm("openclaw", "hint")}
        | {"openclaw score": arm("openclaw", "hint", w_hint=0), "openclaw hint": arm("openclaw", "hint", w_rl=0)},
        0.85,
    ),
    # A sibling that won adds nothing to a turn that is answered again (--doctor), and the game has no other contrast:
    # the teacher of gated is a useless one here. Feedback adds 9 points or more, by seed.
    "game": Setting(
        "recipes/signals-game.yaml",
        {
            "grpo": arm("grpo"),
            "ppo": arm("ppo"),
            "gated": arm("gated", "sibling", teacher={"against": ["wrong_sibling"], "must_add": -1}),
        }
        | {name: arm(name, "feedback", teacher={"must_add": 0.05}) for name in ("sdpo", "rlsd", "srpo")}
        | {name: arm(name, teacher=OUTER) for name in ("opd", "g_opd")},
        0.7,
        experts={EXPERT: {}},
    ),
    "both": Setting(
        "recipes/signals-both.yaml",
        {"grpo": arm("grpo"), "mopd": arm("mopd", teacher={"who": {"sums": "EXPERT-sums", "game": "EXPERT-game"}})}
        | {f"opd {name}": arm("opd", teacher={"who": f"EXPERT-{name}"}) for name in ("sums", "game")},
        0.7,
        experts={
            "EXPERT-sums": {"env": {"reasoning": SUMS}, "success": {"part": "correct"}},
            "EXPERT-game": {"env": "tictactoe", "success": {"part": "win"}},
        },
    ),
}


# ---------------------------------------------------------------------------------------------------------------- runs


def recipe_of(setting: Setting, label: str, rate: float, seed: int, paths: Mapping[str, str]) -> dict[str, Any]:
    """The `rl` stage alone, from the start model, with this method."""
    arms = {**setting.arms, **setting.experts}
    raw = yaml.safe_load((ROOT / setting.recipe).read_text())
    stage = next(stage for stage in raw["stages"] if stage["name"] == "rl")
    words = {key: teacher_words(stage)[key] for key in ("say", "closing")}
    change = {"method": {"grpo": {}}} | json.loads(json.dumps(arms[label]))
    (options,) = change["method"].values()
    if teacher := options.get("teacher"):
        teacher |= words if "reads" in teacher else {"who": named(teacher["who"], paths)}
    stage |= change
    more = 2 if label in setting.experts else setting.times
    stage["train"] |= {"learning_rate": rate, "steps": stage["train"]["steps"] * more}
    name = f"{label}-{rate:g}-{seed}".replace(" ", "-").lower()
    return {"name": name, "model": paths["start"], "seed": seed, "stages": [stage]}


def teacher_words(stage: Stage) -> dict[str, Any]:
    (options,) = stage["method"].values()
    found: dict[str, Any] = options["teacher"]
    return found


def named(who: Any, paths: Mapping[str, str]) -> Any:
    return {domain: paths[name] for domain, name in who.items()} if isinstance(who, dict) else paths[who]


def trained(recipe: dict[str, Any], folder: Path) -> tuple[Path, float]:
    """(the last stage's folder, minutes). A run that fails stops everything: what it says is the answer."""
    from tropism import train

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train(recipe, output=str(folder), fresh=True, quiet=True)
    return folder / recipe["name"] / recipe["stages"][-1]["name"], (time.perf_counter() - began) / 60


def alone() -> None:
    """What a process that runs jobs starts with: one thread, and the paths that recipes are written for."""
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.chdir(ROOT)


def end_with_parent() -> None:
    """Whatever ends it: a worker whose parent was killed would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def workers(count: int) -> ProcessPoolExecutor:
    """So many processes that each do one run after another, so that a run need not load the libraries anew."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=alone)


def told(stage: Path) -> dict[str, Any]:
    """What a run leaves in the results: success of each step and held out, and how its teacher and its style fared."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "success" in line]
    held_out = [round(line["eval/success"], 4) for line in lines if "eval/success" in line]
    kept: dict[str, Any] = {"success": [round(line["success"], 4) for line in steps], "held_out": held_out}
    for name in ("gate/trust", "gate/slope", "teacher/share"):
        if values := [line[name] for line in steps if name in line]:
            kept[name] = [round(value, 4) for value in values]
    for name in ("completions/mean_length", "eval/commas", "eval/gaps", "eval/return"):
        if values := [line[name] for line in lines if name in line]:
            kept[name] = [round(values[0], 4), round(values[-1], 4)]
    return kept


def start_model(name: str) -> str:
    """Path of a setting's start model, made unless it is there to its last step."""
    raw = yaml.safe_load((ROOT / SETTINGS[name].recipe).read_text())
    return str(finished(raw | {"name": "start", "stages": raw["stages"][:1]}, folder_of(name))[0])


def folder_of(name: str) -> Path:
    """Settings of one recipe have one start model."""
    return RUNS / Path(SETTINGS[name].recipe).stem


def start(name: str) -> dict[str, str]:
    """Paths of the start model and of the experts, made likewise."""
    setting, paths = SETTINGS[name], {"start": start_model(name)}
    known = {line["label"] for line in results(name)}
    for label in setting.experts:
        recipe = recipe_of(setting, label, RATES[1], 200, paths)
        path, minutes = finished(recipe, folder_of(name))
        paths[label] = str(path)
        if label not in known:
            keep(name, {"label": label, "rate": RATES[1], "seed": 200} | told(path.parents[1]) | {"minutes": minutes})
    return paths


def finished(recipe: dict[str, Any], folder: Path) -> tuple[Path, float]:
    """(the last checkpoint of a recipe of one stage, minutes). One of a run that was stopped half-way is not it."""
    (stage,) = recipe["stages"]
    last = folder / recipe["name"] / stage["name"] / "checkpoints" / f"checkpoint-{stage['train']['steps']}"
    if last.exists():
        return last, 0.0
    with workers(1) as pool:
        return last, round(pool.submit(trained, recipe, folder).result()[1], 2)


def examined(name: str, labels: list[str], paths: Mapping[str, str]) -> None:
    """What the doctor says of each self-teacher before it starts, on two seeds; where it reads a sibling, of a wrong
    one too. What is wrong with a reply, or what a user says next, has no opposite."""
    for label in labels:
        for seed in (0, 1):
            recipe = recipe_of(SETTINGS[name], label, RATES[1], seed, paths) | {"output": str(RUNS / "doctor")}
            (options,) = recipe["stages"][0]["method"].values()
            if options.get("teacher", {}).get("reads") == ["sibling"]:
                options["teacher"]["against"] = ["wrong_sibling"]
            path = RUNS / "doctor.yaml"
            path.write_text(yaml.safe_dump(recipe))
            words = [sys.executable, "-m", "tropism", "doctor", str(path)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
            told = [line for line in (done.stdout + done.stderr).splitlines() if "no hint" in line]
            print(f"{label:<10} seed {seed}  {told[0] if told else 'reads nothing'}", flush=True)


def results(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(name: str, line: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(name: str, jobs: list[tuple[str, float, int]], paths: Mapping[str, str], cores: int) -> None:
    """Every job that has no line yet, `cores` at a time."""
    known = {(line["label"], line["rate"], line["seed"]) for line in results(name)}
    missing = [job for job in jobs if job not in known]
    with workers(cores) as pool:
        begun = {pool.submit(trained, recipe_of(SETTINGS[name], *job, paths), RUNS / name): job for job in missing}
        for future in as_completed(begun):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            (stage, minutes), (label, rate, seed) = future.result(), begun[future]
            line = {"label": label, "rate": rate, "seed": seed} | told(stage) | {"minutes": round(minutes, 2)}
            keep(name, line)
            shutil.rmtree(stage.parent)
            print(f"{label:<16} {rate:g}  seed {seed:<3}  {line['held_out'][-1]:.3f}  {minutes:.1f} min", flush=True)


def chosen_rates(name: str) -> dict[str, float]:
    """Arm -> its learning rate, of those for which it is known."""
    setting = SETTINGS[name]
    lines = results(setting.rates_of or name)
    found = {label: curves.best_rate(lines, label_of_rate(setting, label), RATES, TUNED_ON) for label in setting.arms}
    return {label: rate for label, rate in found.items() if rate}


def label_of_rate(setting: Setting, label: str) -> str:
    """Where rates come from another setting, the method's name there."""
    return label.split()[0] if setting.rates_of else label


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=["all", *SETTINGS], nargs="?", default="all")
    parser.add_argument("--arms", default="", help="only these, with commas between them")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the setting's; draws no figure")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--doctor", action="store_true", help="only say what hints add to the start model")
    given = parser.parse_args()
    names = list(SETTINGS) if given.setting == "all" else [given.setting]
    if asked := set(filter(None, given.arms.split(","))):
        if odd := asked - {label for name in names for label in SETTINGS[name].arms}:
            parser.error(f"no arm is called {', '.join(sorted(odd))}")
        names = [name for name in names if asked & set(SETTINGS[name].arms)]
    for name in names:
        compared(name, given)
    return 0


def compared(name: str, given: argparse.Namespace) -> None:
    """Everything that is asked of one setting."""
    setting = SETTINGS[name]
    seeds = tuple(given.seeds or setting.seeds)
    if not given.table:
        arms = [label for label in setting.arms if not given.arms or label in given.arms.split(",")]
        paths = start(name)
        if given.doctor:
            examined(name, arms, paths)
            return
        if not setting.rates_of:
            run(name, [(m, rate, seed) for m in arms for seed in TUNED_ON for rate in RATES], paths, given.jobs)
        rates = {label: rate for label, rate in chosen_rates(name).items() if label in arms}
        if left := [label for label in arms if label not in rates]:
            raise SystemExit(f"{', '.join(left)}: run {setting.rates_of} first, which chooses the learning rates.")
        jobs = [(label, rate, seed) for label, rate in rates.items() for seed in seeds]
        more = [seed for seed in setting.base_seeds if seed not in seeds]
        run(name, jobs + [("grpo", rates["grpo"], seed) for seed in more if "grpo" in rates], paths, given.jobs)
    found = curves.chosen(results(name), chosen_rates(name), seeds)
    print("\n".join(curves.table(found, setting.level)))
    if name == "hints":
        base = curves.chosen(results(name), chosen_rates(name), setting.base_seeds).get("grpo")
        told = curves.second_table(found, base) if base else ["no second table before grpo has run"]
        print("", *told, sep="\n")
    if setting.times > 1:
        print("", *curves.long_table(found), sep="\n")
    print("", curves.spent(results(name)), sep="\n")
    RESULTS.mkdir(exist_ok=True)
    if seeds == setting.seeds:
        (RESULTS / f"{name}.svg").write_text(curves.figure(f"success on {name}, by step", found))


if __name__ == "__main__":
    sys.exit(main())
