import math

import pytest
import torch

from toy import batches_until_learned, forward, gradient, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.methods.dapo import DAPO
from tropism.methods.grpo import GRPO
from tropism.rewards.length import overlong_price
from tropism.types import Credit

close = torch.testing.assert_close


def two_arms(now, before):
    """(weights, batch): arm 0 was drawn when it had probability `before`, and has `now`."""
    old, new = (torch.tensor([[p, 1 - p], [0.5, 0.5]]).log() for p in (before, now))
    return new.requires_grad_(), pulled(old, torch.tensor([0]), torch.tensor([1.0, 0.0]), size=1)


# ------------------------------------------------------------------------------------------------------------ identity


def test_it_is_grpo_averaged_over_tokens_with_a_higher_ceiling():
    weights, batch = toy_batch()
    close(gradient(DAPO(), weights, batch), gradient(GRPO(average="token", clip_high=0.28), weights, batch))
    for other in (GRPO(average="token"), GRPO(clip_high=0.28)):
        assert (gradient(DAPO(), weights, batch) - gradient(other, weights, batch)).abs().max() > 1e-4


def test_groups_that_agree_are_to_be_left_out():
    assert DAPO().needs.sampling == {"siblings", "contrast"} and DAPO().needs.measured == {"proximal_logp"}


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely():
    weights = torch.zeros(4, 4).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.0, 0.0]), size=4)
    slope = gradient(DAPO(), weights, batch)[0]
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "learns"),
    [
        (1.25, 1, 1.25, True),
        (1.3, 1, 1.28, False),
        (1.3, -1, -1.3, True),
        (0.79, -1, -0.8, False),
        (0.79, 1, 0.79, True),
    ],
)
def test_there_is_more_room_above_than_below(ratio, advantage, value, learns):
    """arXiv:2503.14476, section 3.1: 0.2 below, 0.28 above."""
    weights, batch = two_arms(0.5 * ratio, 0.5)
    credit = Credit(advantage * batch.action_mask.double())
    loss = DAPO().loss(forward(weights, batch), batch, credit).values.sum()
    close(-loss, torch.tensor(value).double())
    assert bool(torch.autograd.grad(loss, weights)[0].abs().sum() > 1e-9) is learns


def test_an_unlikely_token_may_rise_further_than_under_grpo():
    """arXiv:2503.14476, section 3.1: from 0.01 to 0.0128, where GRPO stops it at 0.012."""
    for method, limit in ((DAPO(), 0.0128), (GRPO(), 0.012)):
        for p, learns in ((limit - 1e-5, True), (limit + 1e-5, False)):
            weights, batch = two_arms(p, 0.01)
            loss = method.loss(forward(weights, batch), batch, Credit(batch.action_mask.double()))
            assert bool(torch.autograd.grad(loss.values.sum(), weights)[0].abs().sum() > 1e-9) is learns


def test_every_token_of_the_batch_counts_the_same():
    """arXiv:2503.14476, eq. 8. Losses 1 1 1 1 10 and 1 x 9, 10 average to 33 / 15 = 2.2; by sequence to 2.35."""
    mask = torch.arange(10) < torch.tensor([5, 10])[:, None]
    losses = torch.where(torch.arange(10) == torch.tensor([4, 9])[:, None], 10.0, 1.0)
    _, batch = toy_batch()
    number = torch.arange(2)
    fields = {name: torch.zeros(2, 10) if value.ndim > 1 else number for name, value in batch.tensors()}
    pair = batch.replace(**(fields | {"action_mask": mask}))
    close((losses * DAPO().weights(pair)).sum(), torch.tensor(2.2))
    close((losses * GRPO().weights(pair)).sum(), torch.tensor(2.35))


def test_the_price_of_a_long_reply_is_a_reward():
    """arXiv:2503.14476, eq. 13, with L_max 20480 and a cache of 4096."""
    prices = [overlong_price(length) for length in (16384, 17408, 18432, 20480, 21000)]
    assert prices == [0, -0.25, -0.5, -1, -1]


def test_the_credit_of_a_batch_by_hand():
    _, batch = toy_batch()
    std = math.sqrt(torch.tensor([1.0, 0.25, -0.5]).var(correction=0))
    close(DAPO().credit(batch).advantage[1], 0.75 / (std + 1e-6) * batch.action_mask[1])
    close(DAPO(eps=1.0).credit(batch).advantage[3], 0.75 / (std + 1.0) * batch.action_mask[3])


# -------------------------------------------------------------------------------------------------------------- learns


def test_it_learns_a_bandit_with_three_arms():
    assert batches_until_learned(DAPO(), updates=4) <= 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clip_low": -0.1}, "clip_low is -0.1"), ({"eps": 0}, "eps is 0"), ({"truncate": 0}, "truncate is 0")],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"DAPO's {message}"):
        DAPO(**settings)
