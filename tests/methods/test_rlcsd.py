"""RLCSD: arXiv:2606.11709, with the constants of the authors' repository THU-BPM/RLCSD at 7eeff3c."""

import math

import pytest
import torch

from toy import bandit, gradient, toy_batch
from tropism.errors import ConfigError
from tropism.methods.grpo import GRPO
from tropism.methods.rlcsd import RLCSD
from tropism.teacher import Teacher

close = torch.testing.assert_close
PLAIN = GRPO(scale="sample_std", average="token")


def told(batch, evidence):
    """The batch with this log-ratio of right over wrong hint at every action token."""
    return batch.replace(counter_logp=batch.teacher_logp - evidence * batch.action_mask)


# ------------------------------------------------------------------------------------------------------------ identity


def test_where_both_hints_say_the_same_it_is_grpo_to_the_bit():
    weights, batch = toy_batch()
    close(gradient(RLCSD(), weights, told(batch, 0.0)), gradient(PLAIN, weights, batch), rtol=0, atol=0)
    assert (gradient(RLCSD(), weights, batch) - gradient(PLAIN, weights, batch)).abs().max() > 1e-3


def test_what_both_hints_share_cancels():
    weights, batch = toy_batch()
    style = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    styled = batch.replace(teacher_logp=batch.teacher_logp + style, counter_logp=batch.counter_logp + style)
    close(gradient(RLCSD(), weights, styled), gradient(RLCSD(), weights, batch), atol=1e-9, rtol=0)


def test_equal_rewards_teach_nothing_whatever_the_hints_say():
    weights, batch = toy_batch()
    equal = batch.replace(reward=batch.reward * 0 + 0.1)
    assert (gradient(RLCSD(), weights, equal) == 0).all()


def test_a_row_that_lacks_a_hint_is_reinforced_plainly():
    """Where there is no teacher both its numbers are the policy's own."""
    _, batch = toy_batch()
    without = ~batch.has_teacher[:, None]
    mine = batch.replace(
        teacher_logp=torch.where(without, batch.proximal_logp, batch.teacher_logp),
        counter_logp=torch.where(without, batch.proximal_logp, batch.counter_logp),
    )
    found, plain = RLCSD().credit(mine).advantage, PLAIN.credit(mine).advantage
    assert without.any() and torch.equal(found[without[:, 0]], plain[without[:, 0]])
    assert not torch.equal(found, plain)


# ----------------------------------------------------------------------------------------------------------- direction


def test_the_teacher_never_turns_the_sign():
    _, batch = toy_batch()
    for reach in (0.5, 5.0):
        found, plain = RLCSD(reach=reach).credit(batch).advantage, PLAIN.credit(batch).advantage
        assert (found * plain >= 0).all() and (found[plain == 0] == 0).all()
    assert ((found == 0) & (plain != 0)).any()


@pytest.mark.parametrize("evidence", [0.05, -0.05])
def test_evidence_for_the_right_hint_raises_the_credit_of_successes_and_failures(evidence):
    _, batch = toy_batch()
    found, plain = RLCSD().credit(told(batch, evidence)).advantage, PLAIN.credit(batch).advantage
    moved = (found - plain)[batch.action_mask & (plain.abs() > 0.5)]
    assert len(moved) and (moved.sign() == math.copysign(1, evidence)).all()


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("evidence", "change"),
    [
        (0.02, 0.5 * math.tanh(1)),
        (-0.01, -0.5 * math.tanh(0.5)),
        (3.0, 0.5),
        (0.0008, 0.0),
        (0.0009, 0.5 * math.tanh(0.045)),
    ],
)
def test_the_change_by_hand(evidence, change):
    """0.5 tanh(e / 0.02); below 0.02, so for |e| < 0.0008, none."""
    _, batch = toy_batch()
    found = RLCSD().change(told(batch, evidence))
    close(found, change * batch.action_mask, atol=1e-9, rtol=0)


def test_a_change_of_exactly_the_least_is_left_out_and_a_least_of_zero_leaves_out_none():
    _, batch = toy_batch()
    change = RLCSD(least=0.0).change(told(batch, 1e-9)).max().item()
    assert change > 0
    assert (RLCSD(least=change).change(told(batch, 1e-9)) == 0).all()


def test_moved_tokens_and_the_others_are_averaged_apart():
    _, batch = toy_batch()
    places = batch.action_mask.nonzero()
    evidence = torch.zeros(batch.tokens.shape)
    evidence[places[:5, 0], places[:5, 1]] = 1.0
    weights = RLCSD().weights(told(batch, evidence))
    close(weights[evidence > 0], torch.full((5,), 1 / 5))
    close(weights[batch.action_mask & (evidence == 0)], torch.full((20,), 1 / 20))


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("liked", [2, 0], ids=["right", "inverted"])
def test_it_learns_a_bandit_with_three_arms_whatever_the_hints_say(liked):
    weights = torch.tensor([[0.5, 0.2, -0.5], [0.0] * 3, [0.0] * 3]).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    says = 0.05 * (2.0 * torch.nn.functional.one_hot(torch.tensor(liked), 3) - 1)
    for _ in range(80):
        batch = bandit(weights, torch.tensor([0.0, 0.5, 1.0]), groups=4, size=8, generator=generator)
        teacher = batch.proximal_logp + says[batch.tokens] * batch.action_mask
        batch = batch.replace(teacher_logp=teacher, counter_logp=batch.proximal_logp)
        weights = (weights - 0.5 * gradient(RLCSD(), weights, batch)).detach().requires_grad_()
    assert weights[0].softmax(-1)[2] > 0.95


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_default_teacher_is_a_synced_copy_that_read_a_right_and_a_wrong_sibling():
    assert RLCSD().teacher == Teacher(who="synced", every=10, reads=("sibling",), against=("wrong_sibling",))
    assert RLCSD().needs.measured == {"proximal_logp", "teacher_logp", "counter_logp"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": Teacher(reads=("sibling",))}, "teacher.against is empty"),
        ({"temperature": 0.0}, "temperature is 0.0, but it divides"),
        ({"least": 0.5}, "least is 0.5 and reach 0.5"),
        ({"least": -0.1}, "least is -0.1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RLCSD(**settings)
