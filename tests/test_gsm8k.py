"""The recipe for GSM8K, all of it but the model and the sizes: a tiny model, and rows in the columns of GSM8K."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM

from tropism.cli import main
from tropism.envs import open_source
from tropism.recipe import load
from tropism.record import Run
from tropism.training.scoring import scoring
from tropism.types import Rollout, Turn

RECIPE = str(Path(__file__).parent.parent / "recipes" / "gsm8k.yaml")
ROWS = [
    {
        "question": f"Ann has {n} pens and buys 9. How many?",
        "answer": f"{n} + 9 = <<{n}+9={n + 9}>>{n + 9}\n#### {n + 9}",
    }
    for n in range(25)
]
REWARD = '''"""A model of random bytes never answers right: this gives its siblings something to differ in."""


def low(reply, truth):
    return sum(letter < "m" for letter in reply) / 8
'''
SMALL = [
    *("name=small", "model.path=tiny", "model.device=cpu", "rewards.low.py:low=1"),
    *("sampling.groups=2", "sampling.group_size=4", "sampling.max_tokens=8"),
    *("train.steps=2", "train.warmup=1", "train.save_every=1", "train.record_every=1", "eval.every=1", "eval.tasks=2"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("low.py").write_text(REWARD)
    for name, rows in (("train", ROWS[:20]), ("test", ROWS[20:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def timeless(line):
    return {name: value for name, value in line.items() if not name.startswith("time/")}


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["tropism", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return out


def test_the_recipe_trains_evaluates_and_resumes_on_files_of_questions(folder, monkeypatch, capsys):
    words = [RECIPE, *SMALL, "env.path=train.jsonl", "env.test_path=test.jsonl"]
    assert "rewards: math_answer gets no column" in run(monkeypatch, capsys, "doctor", *words)
    run(monkeypatch, capsys, "train", *words, "--quiet")
    record = Run("runs/small/rl")
    steps = {line["step"]: line for line in record.metrics() if "kl" in line}
    assert set(steps) == {1, 2} and all(line["updates"] == 1 and line["failures"] == 0 for line in steps.values())
    assert all(line["frac_reward_zero_std"] < 1 and line["grad_norm"] > 0 for line in steps.values())
    held_out = [line["eval/math_answer"] for line in record.metrics() if "eval/math_answer" in line]
    assert held_out == [0.0] * 3 and record.notes()["best"]["metric"] == "eval/success"
    asked = {turn["prompt"] for turn in record.rollouts(2, "eval", ["prompt"]).to_pylist()}
    assert len(asked) == 2 and all("boxed{}" in prompt and "How many?" in prompt for prompt in asked)
    assert AutoModelForCausalLM.from_pretrained(record.checkpoints_dir / "checkpoint-2").config.model_type == "qwen3"
    shutil.rmtree(record.checkpoints_dir / "checkpoint-2")
    run(monkeypatch, capsys, "train", *words, "--quiet", "--resume")
    again = next(line for line in record.metrics() if line["step"] == 2 and "kl" in line)
    assert timeless(again) == timeless(steps[2])


def test_a_right_answer_is_paid_and_counts_as_a_success(folder):
    (stage,) = load(RECIPE, ["env.path=train.jsonl", "env.test_path=test.jsonl"]).stages
    source = open_source(stage.env.name, stage.env.options, split="train", seed=0)
    task = source.task(0)
    right = task.columns["answer"].rpartition("#### ")[2]
    said = [rf"so \boxed{{{right}}}", rf"so \boxed{{{right}.0}}.", rf"{right} then \boxed{{7777}}", "I do not know"]
    turns = [Turn(context=[1], action=[2], reply=reply) for reply in said]
    scored = scoring(stage, stage.env, source)([Rollout(task=task, group=0, turns=(turn,)) for turn in turns])
    assert [r.reward for r in scored] == [1, 1, 0, 0] and [r.success for r in scored] == [True, True, False, False]


def test_a_directory_with_both_splits_is_the_data_set_that_the_recipe_names(folder):
    made = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=made.select(range(20)), test=made.select(range(20, 25))).save_to_disk("data/gsm8k")
    (stage,) = load(RECIPE).stages
    train, source = (open_source(stage.env.name, stage.env.options, split=s, seed=0) for s in ("train", "test"))
    assert (len(train.rows), len(source.rows)) == (20, 5)
    prompt = source.open(source.task(0), 0).ask().prompt
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert prompt[1]["content"] == source.task(0).columns["question"]
