"""The task of bench/planted.py, and what gated makes of teachers whose worth is known."""

import sys
from pathlib import Path

import pytest
import torch

from tropism.methods.gated import Gated
from tropism.methods.grpo import GRPO

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import planted

close = torch.testing.assert_close


def test_answers_succeed_as_often_as_is_said():
    world, weights = planted.World(1), torch.randn(planted.FEATURES, planted.WORDS)
    counted = sum(float(world.play(weights).reward.mean()) for _ in range(300)) / 300
    assert counted == pytest.approx(world.chance(weights), abs=0.01) and 0.01 < counted < 0.99
    assert world.chance(weights * 0) == pytest.approx(0.07, abs=0.03)


def test_what_a_teacher_says_is_what_it_was_planted_to_say():
    world, weights = planted.World(1), torch.zeros(planted.FEATURES, planted.WORDS)
    batch, key = world.play(weights), world.is_key
    for teacher, sign in (("right", 1), ("inverted", -1), ("styled", 1), ("leaky", 1)):
        told = world.taught(batch, teacher, weights, weights)
        words = (told.teacher_logp - told.counter_logp)[:, 1:]
        hit, free = batch.tokens[:, 1:] == world.right[batch.group], world.free[batch.group]
        assert (sign * words[key[batch.group] & hit]).min() > 0.4
        assert words[free].abs().max() < 1e-5
        assert (told.teacher_logp - batch.proximal_logp)[:, 1:][free].abs().max() > 0.1 or teacher != "styled"
    noise = [world.taught(batch, "useless", weights, weights).teacher_logp for _ in range(2)]
    assert (noise[0] - noise[1])[:, 1:].abs().mean() > 0.1


@pytest.fixture(scope="module")
def runs():
    """One seed of each teacher, and of GRPO; `python bench/planted.py` has five and more."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    methods = dict.fromkeys(("right", "useless", "inverted", "styled"), (Gated(), 16.0)) | {"grpo": (GRPO(), 8.0)}
    methods |= {"salient": (Gated(saliency=0.5), 16.0)}
    found = {
        name: planted.train(method, name if name not in ("grpo", "salient") else "right", seed=0, rate=rate, steps=80)
        for name, (method, rate) in methods.items()
    }
    torch.set_default_dtype(before)
    return found


def test_a_useless_teacher_is_never_trusted_more_than_a_twentieth(runs):
    assert runs["useless"].most_trust <= 0.05


def test_a_right_teacher_is_trusted_and_so_is_an_inverted_one_the_other_way_round(runs):
    assert runs["right"].trust > 0.3 and runs["right"].slope > 0.5
    assert runs["inverted"].trust > 0.1 and runs["inverted"].slope < -0.2


def test_with_saliency_what_matters_is_found_sooner_where_hints_are_right(runs):
    assert runs["salient"].area > runs["right"].area + 0.05


def test_style_that_both_hints_bring_does_not_reach_the_student(runs):
    close(runs["styled"].drift, runs["right"].drift, rtol=0, atol=1e-6)


def test_with_no_teacher_does_it_fall_behind_grpo_or_drift_further(runs):
    grpo = runs.pop("grpo")
    assert grpo.success > 0.5
    for run in runs.values():
        assert run.success > grpo.success - 0.05 and run.drift < grpo.drift + 0.1
