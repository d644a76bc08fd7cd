"""A process reward model from rows to a reward: trained on steps, saved, and read after every line of a reply."""

import json
import math

import pytest

import tropism
import world
from again import same, train_until
from tropism.config import Model
from tropism.record import Run
from tropism.training.model import load_policy
from tropism.training.scorer import Scorer


def recipe(folder):
    """A line with an a is right, a line with a b is wrong, whatever stands before it."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [("aa", True), ("ab", False), ("ca", True), ("bc", False), ("cac", True)]
    rows = [[kinds[(n * k + k * k) % 5] for k in range(1, 4)] for n in range(40)]
    lines = [
        {"prompt": f"{n}:", "completions": [step for step, _ in row], "labels": [label for _, label in row]}
        for n, row in enumerate(rows)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = world.sft(folder, train={"steps": 2})
    prm = {"name": "prm", "method": "process_reward", "data": {"path": str(folder / "steps.jsonl")}}
    prm["train"] = {"steps": 60, "batch": 10, "learning_rate": 1e-2, "save_every": 60, "threads": 1}
    rl = world.grpo(folder, train={"steps": 2})["stages"][0]
    learned = {"who": "prm", "steps": "min", "standardise": False}
    made["stages"] += [prm, rl | {"reward_models": learned, "rewards": {"reward_model": 1.0}}]
    made["stages"][-1]["eval"] = {"every": 2, "tasks": 3, "best": "eval/reward_model"}
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tropism.train(recipe(tmp_path_factory.mktemp("steps")), quiet=True).path


def test_it_learns_which_lines_are_right(run):
    lines = [line for line in Run(run / "prm").metrics() if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and lines[-1]["loss"] < 0.2
    assert lines[-1]["accuracy"] > 0.95


def test_its_checkpoint_says_after_which_line_it_went_wrong(run):
    words = load_policy(Model(path=str(run / "prm"), device="cpu")).words
    ids = words.context("99:aa\nab\nca")
    ends = [n for n, token in enumerate(ids) if words.tokenizer.decode([token]) == "\n"]
    (scores,) = Scorer(str(run / "prm")).at([ids], [ends])
    assert len(scores) == 2 and scores[0] > 1 and scores[1] < -1


def test_a_policy_is_paid_by_its_worst_line(run):
    """A probability, which a raw score is not."""
    paid = [line["reward"] for line in Run(run / "rl").metrics() if "loss" in line]
    assert len(paid) == 2 and all(0 < value < 1 for value in paid)


def test_a_killed_run_ends_as_if_it_had_not_been(run, tmp_path, monkeypatch):
    train_until(recipe(tmp_path), 1, monkeypatch, stage="rl")
    tropism.train(recipe(tmp_path), resume=True, quiet=True)
    same(tmp_path / "run", run, "rl")


def test_labels_of_its_own_replies_make_an_outcome_reward_model(tmp_path):
    """Every reply is one step, right where the task was solved."""
    made = recipe(tmp_path)
    own = {"env": f"{world.HERE}:World", "tasks": 16, "samples": 4, "keep": "labels"}
    made["stages"][1] |= {"method": {"process_reward": {"per": "token"}}, "data": {"sampled": own}}
    made["stages"][1] |= {"success": {"part": "low", "at_least": 0.5}, "sampling": {"max_tokens": 4}}
    made["stages"] = made["stages"][:2]
    path = tropism.train(made, quiet=True).path
    lines = [line for line in Run(path / "prm").metrics() if "loss" in line]
    assert lines[-1]["accuracy"] > 0.8 and lines[-1]["loss"] < lines[0]["loss"]
