"""A batch is played while the one before it trains: by weights that stand still, exactly so after a resume."""

from __future__ import annotations

import threading

import pytest
import torch

import tropism
import world
from again import same, train_until
from tropism.api import resolved_recipe
from tropism.config import Model, Recipe
from tropism.errors import ConfigError, GuardStopped
from tropism.record import Run
from tropism.training import learn
from tropism.training.ahead import Ahead
from tropism.training.checkpoint import State
from tropism.training.learn import Playing
from tropism.training.model import load_policy

WAIT = 60.0
"""Seconds after which a test gives up on the other thread."""


def recipe(folder, **changes):
    made = world.grpo(folder, **changes)
    made["stages"][0]["sampling"] |= {"ahead": True}
    return made


def playing(score=list):
    given = recipe("", rewards={"low": 1.0})
    stage = resolved_recipe(given, (), {}).stages[0]
    policy = load_policy(Model(**world.MODEL))
    return Playing(stage=stage, source=world.World("train", 0), policy=policy, score=score, seed=0, say=lambda _: None)


def test_a_batch_is_what_the_weights_before_the_update_would_have_played():
    """Although the policy has moved when it is played; the cursor and the version say so."""
    draw = playing()
    expected = draw(after := State(step=5, cursor=3))
    started, moved = threading.Event(), threading.Event()

    def scored(rollouts):
        started.set()
        assert moved.wait(WAIT)
        return list(rollouts)

    ahead, state = Ahead(playing(scored)), State(step=4, cursor=3)
    ahead.begin(state)
    with torch.no_grad():
        for parameter in ahead.module.parameters():
            parameter.mul_(-1)
    assert started.wait(WAIT)
    moved.set()
    ahead.end(state)
    cursor, found = state.waiting
    assert (cursor, state.cursor, state.step) == (3, after.cursor, 4)
    assert [r.turns for r in found] == [r.turns for r in expected]
    assert {r.version for r in found} == {4} and {r.version for r in expected} == {5}
    ahead.begin(state)
    ahead.end(state)
    assert [r.turns for r in state.waiting[1]] != [r.turns for r in found], "the copy follows"


def test_scoring_and_the_update_happen_at_the_same_time(tmp_path, monkeypatch):
    """Each waits until the other has begun, which would never end if one came after the other."""
    scoring, training, real = threading.Event(), threading.Event(), learn.update

    def slow(completions):
        if threading.current_thread() is not threading.main_thread():
            scoring.set()
            assert training.wait(WAIT)
        return [float(len(reply)) for reply in completions]

    def update(*args, **kwargs):
        training.set()
        assert scoring.wait(WAIT)
        return real(*args, **kwargs)

    monkeypatch.setattr(learn, "update", update)
    done = tropism.train(recipe(tmp_path, rewards={slow: 1.0}, train={"steps": 2}), quiet=True)
    run = Run(done.path / "rl")
    assert [run.rollouts(step, columns=["version"])["version"][0].as_py() for step in (1, 2)] == [0, 0]


def test_the_weight_corrects_for_the_step_between(tmp_path):
    """It is 1 for the first batch, which the policy itself has played, and not for those that are a step old."""
    done = tropism.train(recipe(tmp_path, eval={"every": 0}), quiet=True)
    weights = [line["sampling/importance_sampling_ratio/mean"] for line in Run(done.path / "rl").metrics()]
    assert weights[0] == pytest.approx(1, abs=1e-5) and all(abs(weight - 1) > 1e-4 for weight in weights[2:])


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_dies_ends_the_same(step, tmp_path, monkeypatch):
    """The batch that waits, and the generators that its rewards drew from, are in the checkpoint."""
    whole = tropism.train(recipe(tmp_path / "whole"), quiet=True).path
    train_until(recipe(tmp_path), step, monkeypatch)
    tropism.train(recipe(tmp_path), resume=True, quiet=True)
    same(tmp_path / "run", whole, "rl")


def test_a_batch_that_could_not_be_scored_is_drawn_again(tmp_path, monkeypatch):
    given = recipe(tmp_path, rewards={f"{world.HERE}:breaking": 1.0})
    with pytest.raises(GuardStopped, match="the judge does not answer"):
        tropism.train(given, quiet=True)
    run = Run(tmp_path / "run" / "rl")
    reached = max(line["step"] for line in run.metrics())
    monkeypatch.setenv("WORLD_WELL", "1")
    tropism.train(given, resume=True, quiet=True)
    assert max(line["step"] for line in run.metrics()) == 7 > reached
    groups = [run.rollouts(n, columns=["group"])["group"].to_pylist() for n in run.recorded()]
    assert sorted({group for step in groups for group in step}) == list(range(7 * 3)), "no task is lost"


def test_a_batch_that_failed_is_not_kept_by_the_checkpoint_of_its_step(tmp_path, monkeypatch):
    """What waits there has failed; it is drawn again, so that a mended cause lets the run go on."""
    given = recipe(tmp_path, rewards={f"{world.HERE}:breaking": 1.0}, train={"save_every": 1}, eval={"every": 0})
    with pytest.raises(GuardStopped, match="the judge does not answer"):
        tropism.train(given, quiet=True)
    monkeypatch.setenv("WORLD_WELL", "1")
    tropism.train(given, resume=True, quiet=True)
    assert max(line["step"] for line in Run(tmp_path / "run" / "rl").metrics()) == 7


def test_it_is_for_one_process():
    with pytest.raises(ConfigError, match=r"sampling\.ahead, but what is played ahead is played by one process"):
        Recipe(**vars(resolved_recipe(recipe(""), (), {})) | {"processes": 2})
