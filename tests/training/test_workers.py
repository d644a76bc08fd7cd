"""Reward functions in processes of their own: the same results, and who dies takes nobody along."""

from __future__ import annotations

import gc
import importlib
import time
from dataclasses import replace

import pytest

import tropism
import world
from again import same, train_until
from tropism import Failure
from tropism.errors import ConfigError
from tropism.record import Run
from tropism.rewards import bound, find_scorer
from tropism.rewards.answer import exact_match
from tropism.rewards.score import score
from tropism.training.scoring import opened
from tropism.training.workers import Workers
from tropism.types import Rollout, Task, Turn

FUNCTIONS = """
import os, random, time
import tropism
import world
from again import same, train_until
from tropism import Failure

def length(reply, truth):
    print("said aside")
    return {"letters": len(reply), "right": float(reply == truth)}

def uneven(reply):
    return {"odd": 1.0, "none": None, "nan": float("nan"), "bad": 1 / 0 if reply == "bad" else 2.0}[reply]

def together(prompts, completions, answer, **columns):
    return [len(completions) + len(text) for text in completions]

def everything(rollouts, max_tokens):
    found = {"limit": max_tokens}
    return [found if r.turns[-1].reply else Failure("everything", "empty") for r in rollouts]

def deadly(reply):
    if reply == "die":
        os._exit(1)
    return 1.0

def where(reply):
    time.sleep(0.05)
    return {"pid": os.getpid()}

def drawn(reply):
    return random.random()

def wanting(reply, missing):
    return 1.0
"""


def replies(*texts, failure=None, truth="two"):
    turns = [Turn(context=[1], action=[2], reply=text, prompt="say") for text in texts]
    return [Rollout(task=Task(columns={"answer": truth}), group=0, turns=(turn,), failure=failure) for turn in turns]


@pytest.fixture
def named(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return lambda *names: [f"{tmp_path / 'mine.py'}:{name}" for name in names]


def by_workers(given, rollouts, count=2):
    workers = Workers(count, given, 9)
    return score(rollouts, workers.begin(rollouts), dict.fromkeys(workers.given, 1.0))


def test_they_score_as_the_run_itself_does(named):
    given = named("length", "together", "everything")
    texts = ["two", "four", "", "eleven", *("x" * n for n in range(1, 20))]
    played = [*replies(*texts), *replies("no", failure=Failure("play", "lost"))]
    here = {name: bound(scorer, 9) for name, scorer, _ in map(find_scorer, given)}
    wanted = score(played, here, dict.fromkeys(here, 1.0))
    assert by_workers(given, played) == wanted
    assert wanted[0].rewards == {"letters": 3, "right": 1.0, "together": 23 + 3, "limit": 9}
    assert wanted[2].failure.reason == "empty"


def test_what_cannot_be_scored_is_the_same_failure(named):
    given, played = named("uneven"), replies("odd", "none", "nan", "bad")
    name, scorer, _ = find_scorer(given[0])
    assert by_workers(given, played) == score(played, {name: scorer}, {name: 1.0})


def test_a_function_of_one_reply_is_called_in_all_of_them_at_once(named):
    done = by_workers(named("where"), replies(*"abcdefghijklmnop"))
    assert len({r.rewards["pid"] for r in done}) == 2


def test_one_that_dies_takes_no_other_rollout_along_and_is_started_again(named):
    workers = Workers(2, named("deadly"), 9)
    for _ in range(2):
        played = replies(*(["fine"] * 9), "die", *(["fine"] * 9))
        done = score(played, workers.begin(played), {"deadly": 1.0})
        assert [r.failure.reason for r in done if r.failure] == ["the process that scored it died"]
        assert done[9].failure and sum(r.reward for r in done) == 18


def test_what_they_draw_is_decided_by_the_rollouts(named):
    given = named("drawn")
    first, again = (by_workers(given, replies(*"abcdefgh")) for _ in range(2))
    assert first == again
    later = by_workers(given, [replace(r, version=1) for r in replies(*"abcdefgh")])
    assert [r.reward for r in later] != [r.reward for r in first]


def test_what_is_wrong_with_the_recipe_is_said_by_the_run(named):
    with pytest.raises(ConfigError, match="asks for 'missing'"):
        by_workers(named("wanting"), replies("a", "b"))
    with pytest.raises(ConfigError, match=r"given the reward .*lambda.*Name it as file.py:name"):
        Workers(1, [lambda reply: 1.0], 9)
    assert by_workers([exact_match], replies("a", truth="a"))[0].reward == 1.0


def test_what_cannot_be_sent_is_named_and_leaves_the_process_at_work(named):
    workers = Workers(1, named("length"), 9)
    bad = replies("a")[0]
    bad = replace(bad, task=Task(columns={"answer": "a", "call": lambda: 1}))
    with pytest.raises(ConfigError, match=r"the column 'call' of a task cannot be sent: .*lambda.* reward_workers: 0"):
        score([bad], workers.begin([bad]), {"length": 1.0})
    fine = replies("a", truth="a")
    assert score(fine, workers.begin(fine), {"length": 1.0})[0].reward == 2.0


def test_a_reward_that_cannot_be_imported_there_is_an_error_and_no_death(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def one(reply):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = importlib.import_module("only_here").one
    workers, played = Workers(1, [given], 9), replies("a")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"cannot load a reward or a task \(ModuleNotFoundError: .*only_here"):
        score(played, workers.begin(played), {"one": 1.0})


def test_they_end_with_the_object_that_started_them(named):
    workers, played = Workers(1, named("length"), 9), replies("a", truth="a")
    score(played, workers.begin(played), {"length": 1.0})
    worker = workers.free.get()
    process = worker.process
    assert process.poll() is None
    del worker, workers
    gc.collect()
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is not None


def recipe(folder, workers):
    made = world.grpo(folder)
    made["stages"][0]["sampling"] |= {"reward_workers": workers}
    return made


def test_a_run_learns_the_same_with_them_and_without(tmp_path):
    runs = []
    for count in (0, 2):
        made = recipe(tmp_path / str(count), count)
        made["stages"][0]["rewards"] = {"low": 1.0, "soft_overlong": 0.5}
        runs.append(tropism.train(made, quiet=True).path)
    same(*runs, "rl")


def test_a_run_whose_rewards_draw_ends_the_same_if_it_dies(tmp_path, monkeypatch):
    whole = tropism.train(recipe(tmp_path / "whole", 1), quiet=True).path
    train_until(recipe(tmp_path, 1), 4, monkeypatch)
    opened.cache_clear()  # in a new process nothing is left of the first
    tropism.train(recipe(tmp_path, 1), resume=True, quiet=True)
    same(tmp_path / "run", whole, "rl")
    drawn = {r["reward"] for r in Run(whole / "rl").rollouts(7).to_pylist()}
    assert len(drawn) > 3, "the reward draws"
