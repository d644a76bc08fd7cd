import math

import pytest
import torch

from toy import batches_until_learned, forward, gradient, on_policy, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.maths.advantage import group_relative
from tropism.methods.cispo import CISPO
from tropism.methods.grpo import GRPO
from tropism.types import Credit

close = torch.testing.assert_close

# ------------------------------------------------------------------------------------------------------------ identity


def test_while_nothing_has_moved_it_is_reinforce_with_the_advantage_of_grpo():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    advantage = group_relative(batch.reward, batch.group, batch.episode)
    objective = -(forward(weights, fresh).logp * advantage[:, None]).sum() / 25
    close(gradient(CISPO(), weights, fresh), torch.autograd.grad(objective, weights)[0])
    close(gradient(CISPO(), weights, fresh), gradient(GRPO(average="token"), weights, fresh))
    assert (gradient(CISPO(), weights, batch) - gradient(GRPO(average="token"), weights, batch)).abs().max() > 1e-3


def test_where_nothing_is_clipped_its_gradient_is_that_of_the_plain_ratio():
    """grad of -r A is -r A grad log pi: detaching the ratio loses nothing but the value."""
    weights, batch = toy_batch()
    method = CISPO(clip_high=1e9)
    assert not method.loss(forward(weights, batch), batch, method.credit(batch)).metrics["clip_ratio/region_mean"].any()
    unclipped = GRPO(average="token", clip_low=1e9, clip_high=1e9)
    close(gradient(method, weights, batch), gradient(unclipped, weights, batch))


def test_it_needs_siblings():
    assert CISPO().needs.sampling == {"siblings"} and CISPO().needs.measured == {"proximal_logp"}


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely():
    weights = torch.zeros(4, 4).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.0, 0.0]), size=4)
    slope = gradient(CISPO(), weights, batch)[0]
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(
    ("settings", "ratio", "weight"),
    [
        ({}, 0.01, 0.01),
        ({}, 1.5, 1.5),
        ({}, 4.9, 4.9),
        ({}, 5.5, 5.0),
        ({"clip_low": 0.2, "clip_high": 0.2}, 0.5, 0.8),
        ({"clip_low": 0.2, "clip_high": 0.2}, 1.5, 1.2),
    ],
)
def test_the_weight_is_clipped_and_the_token_still_learns(settings, ratio, weight, advantage):
    """arXiv:2506.13585, eq. 4 and 5. Arm 0 had probability 0.1 when it was drawn."""
    old, new = (torch.tensor([[p, 1 - p], [0.5, 0.5]]).log() for p in (0.1, 0.1 * ratio))
    batch = pulled(old, torch.tensor([0]), torch.tensor([1.0, 0.0]), size=1)
    out = forward(new.requires_grad_(), batch)
    loss = CISPO(**settings).loss(out, batch, Credit(advantage * batch.action_mask.double()))
    close(loss.values.sum(), torch.tensor(-weight * advantage * math.log(0.1 * ratio)))
    (slope,) = torch.autograd.grad(loss.values.sum(), out.logp)
    close(slope[0, 1], torch.tensor(-weight * advantage))
    assert bool(loss.metrics["clip_ratio/region_mean"][0, 1]) is (abs(weight - ratio) > 1e-9)
    close(loss.metrics["ratio"][0, 1], torch.tensor(ratio))


def test_the_importance_weight_multiplies_it():
    weights, batch = toy_batch()
    credit = CISPO().credit(batch)
    loss = CISPO(truncate=1.5).loss(forward(weights, batch), batch, credit)
    same = batch.replace(behavior_logp=batch.proximal_logp)
    mismatch = (batch.proximal_logp - batch.behavior_logp).exp().clamp(max=1.5)
    close(loss.values, CISPO().loss(forward(weights, same), same, credit).values * mismatch)
    close(loss.metrics["sampling/importance_sampling_ratio/mean"], mismatch)


def test_the_credit_and_the_weights_of_a_batch_by_hand():
    _, batch = toy_batch()
    std = math.sqrt(torch.tensor([1.0, 0.25, -0.5]).var(correction=0))
    close(CISPO().credit(batch).advantage[1], 0.75 / (std + 1e-6) * batch.action_mask[1])
    close(CISPO(eps=1.0).credit(batch).advantage[3], 0.75 / (std + 1.0) * batch.action_mask[3])
    close(CISPO().weights(batch), batch.action_mask / 25)


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("updates", [1, 4])
def test_it_learns_a_bandit_with_three_arms(updates):
    assert batches_until_learned(CISPO(), updates=updates) <= 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clip_low": -0.1}, "clip_low is -0.1"), ({"eps": 0}, "eps is 0"), ({"truncate": 0}, "truncate is 0")],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"CISPO's {message}"):
        CISPO(**settings)
