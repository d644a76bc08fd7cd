import math
from dataclasses import replace

import pytest
import torch

from toy import bandit, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.advantage import group_relative
from tropism.methods.grpo import GRPO
from tropism.types import Batch, Credit, Output

close = torch.testing.assert_close


def one_token(logp, *, proximal=None, behavior=None, reference=None, reward=(1.0, 0.0)):
    """(Output, Batch) of two siblings that wrote one token each."""
    logp = torch.tensor(logp, dtype=torch.float64).reshape(-1, 1)

    def column(values):
        return logp.clone() if values is None else torch.tensor(values, dtype=torch.float64).reshape(-1, 1)

    number, reward = torch.arange(len(logp)), torch.tensor(reward, dtype=torch.float64)
    batch = Batch(
        tokens=number[:, None],
        length=number + 1,
        action_mask=torch.ones_like(logp, dtype=torch.bool),
        token_reward=reward[:, None],
        turn=torch.zeros_like(number)[:, None],
        reward=reward,
        success=reward > 0,
        truncated=reward > 9,
        group=torch.zeros_like(number),
        episode=number,
        role=number,
        domain=number,
        proximal_logp=column(proximal),
        behavior_logp=column(proximal if behavior is None else behavior),
        reference_logp=column(reference),
    )
    return Output(logp=logp.requires_grad_(), entropy=torch.zeros_like(logp)), batch


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_used_once_and_without_scaling_it_is_reinforce_with_a_group_baseline(average):
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    method = GRPO(scale="none", average=average)
    baseline = group_relative(batch.reward, batch.group, batch.episode, scale="none")
    objective = -(forward(weights, fresh).logp * baseline[:, None] * method.weights(fresh)).sum()
    (reinforce,) = torch.autograd.grad(objective, weights)
    close(gradient(method, weights, fresh), reinforce)
    assert (gradient(method, weights, batch) - reinforce).abs().max() > 1e-3
    close(gradient(replace(method, dual_clip=3.0), weights, fresh), reinforce)


def test_without_a_reference_weight_the_reference_is_neither_needed_nor_read():
    weights, batch = toy_batch()
    assert "reference_logp" not in GRPO().needs.measured and "reference_logp" in GRPO(kl=0.1).needs.measured
    plain = gradient(GRPO(), weights, batch.replace(reference_logp=None))
    close(gradient(GRPO(kl=1e-9), weights, batch), plain, atol=1e-8, rtol=0)
    assert (gradient(GRPO(kl=0.1), weights, batch) - plain).abs().max() > 1e-3


def test_where_sampler_and_trainer_are_one_the_importance_weight_is_exactly_one():
    weights, batch = toy_batch()
    same = batch.replace(behavior_logp=batch.proximal_logp)
    loss = GRPO(truncate=1.0).loss(forward(weights, same), same, GRPO().credit(same))
    assert (loss.metrics["sampling/importance_sampling_ratio/mean"] == 1).all()
    assert (gradient(GRPO(), weights, same) - gradient(GRPO(), weights, batch)).abs().max() > 1e-3


def test_groups_that_say_nothing_leave_the_policy_as_it_is():
    weights, batch = toy_batch()
    silent = (batch.group == 2) | (batch.group == 3)
    assert (GRPO().credit(batch).advantage[silent] == 0).all()
    assert (gradient(GRPO(), weights, batch.replace(reward=batch.reward * 0 + 0.1)) == 0).all()


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("scale", ["none", "std", "sample_std", "batch_std", "mean"])
def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely(scale):
    out, batch = one_token([-1.0] * 4, reward=(0.0, 1.0, 0.0, 0.0))
    method = GRPO(scale=scale)
    loss = method.loss(out, batch, method.credit(batch))
    (slope,) = torch.autograd.grad((loss.values * method.weights(batch)).sum(), out.logp)
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


def test_the_reference_pulls_back():
    """Likelier than the reference: the penalty lowers it; less likely: it raises it."""
    out, batch = one_token([-1.0, -3.0], reference=[-2.0, -2.0], reward=(1.0, 1.0))
    loss = GRPO(kl=0.5).loss(out, batch, GRPO().credit(batch))
    (slope,) = torch.autograd.grad(loss.values.sum(), out.logp)
    assert slope[0] > 0 > slope[1]


# --------------------------------------------------------------------------------------------------------- closed form


def test_the_loss_by_hand():
    """Ratios 1.5 and 0.5, advantages +1 and -1: both clipped, -1.2 and +0.8."""
    out, batch = one_token([math.log(0.6), math.log(0.2)], proximal=[math.log(0.4), math.log(0.4)])
    method = GRPO(eps=1e-12)
    loss = method.loss(out, batch, method.credit(batch))
    close(loss.values.detach(), torch.tensor([[-1.2], [0.8]]))
    close(loss.metrics["clip_ratio/region_mean"], torch.tensor([[1.0], [1.0]]))
    close(loss.metrics["ratio"], torch.tensor([[1.5], [0.5]]))
    wide = GRPO(eps=1e-12, clip_low=0.4, clip_high=0.3).loss(out, batch, method.credit(batch))
    close(wide.values.detach(), torch.tensor([[-1.3], [0.6]]))


def test_the_dual_clip_by_hand():
    """Ratio 4 with advantage -1: 4 without, 3 with."""
    out, batch = one_token([math.log(0.8)] * 2, proximal=[math.log(0.2)] * 2)
    credit = Credit(torch.tensor([[-1.0], [-1.0]]))
    close(GRPO().loss(out, batch, credit).values.detach(), torch.tensor([[4.0], [4.0]]))
    close(GRPO(dual_clip=3.0).loss(out, batch, credit).values.detach(), torch.tensor([[3.0], [3.0]]))


def test_the_importance_weight_by_hand():
    """Proximal / behavior is 1.5 and 4; the second is truncated to 2. It multiplies the surrogate, not the penalty."""
    out, batch = one_token(
        [math.log(0.3), math.log(0.4)],
        behavior=[math.log(0.2), math.log(0.1)],
        reference=[math.log(0.6), math.log(0.4)],
    )
    credit = Credit(torch.tensor([[1.0], [-1.0]]))
    loss = GRPO().loss(out, batch, credit)
    close(loss.values.detach(), torch.tensor([[-1.5], [2.0]]))
    close(loss.metrics["sampling/importance_sampling_ratio/mean"], torch.tensor([[1.5], [2.0]]))
    penalty = 2 - math.log(2) - 1
    anchored = GRPO(kl=0.1).loss(out, batch, credit)
    close(anchored.values.detach(), torch.tensor([[-1.5 + 0.1 * penalty], [2.0]]))
    close(anchored.metrics["kl"], torch.tensor([[penalty], [0.0]]))
    close(GRPO(truncate=9.0).loss(out, batch, credit).values.detach(), torch.tensor([[-1.5], [4.0]]))


def test_the_credit_of_a_batch_by_hand():
    """Group 0 earned 1, 0.25, -0.5, 1 for episodes 0, 2, 1, 3: episode 0 counts once, with two rows."""
    _, batch = toy_batch()
    rewards = torch.tensor([1.0, 0.25, -0.5])
    found = GRPO(scale="none").credit(batch).advantage
    for row, number in ((1, 0), (3, 0), (2, 1), (5, 2)):
        close(found[row], (rewards[number] - 0.25) * batch.action_mask[row])
    std = rewards.var(correction=0).sqrt()
    close(GRPO().credit(batch).advantage[1], 0.75 / (std + 1e-6) * batch.action_mask[1])
    close(GRPO(eps=1.0, scale="sample_std").credit(batch).advantage[1], 0.75 / (1.75) * batch.action_mask[1])


@pytest.mark.parametrize(("average", "weight"), [("sequence", 1 / (8 * 6)), ("token", 1 / 25)])
def test_the_weight_of_a_token_by_hand(average, weight):
    """25 action tokens in 8 episodes; the one on rows 1 and 3 wrote 6 of them."""
    _, batch = toy_batch()
    found = GRPO(average=average).weights(batch)
    for row in (1, 3):
        close(found[row], weight * batch.action_mask[row])


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize(
    "method",
    [
        GRPO(),
        GRPO(average="token", clip_high=0.28, dual_clip=3.0),
        GRPO(scale="mean"),
    ],
    ids=["grpo", "token", "mean"],
)
def test_it_learns_a_bandit_with_three_arms(method):
    """To more than 0.95 on the best arm, which starts as the least likely; four updates per batch."""
    weights = torch.tensor([[0.5, 0.2, -0.5], [0.0] * 3, [0.0] * 3]).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([weights], lr=1.0)
    for _ in range(40):
        batch = bandit(weights, torch.tensor([0.0, 0.5, 1.0]), groups=4, size=8, generator=generator)
        for _ in range(4):
            weights.grad = gradient(method, weights, batch)
            optimizer.step()
    assert weights[0].softmax(-1)[2] > 0.95
    assert (weights[1:] == 0).all()


def test_with_a_reference_it_stops_at_the_distribution_that_the_penalty_allows():
    """k3 in the loss is a penalty on KL(reference || policy): the optimum solves p (r - E r) = kl (p - reference).

    Two arms of reward 1 and 0, uniform reference, kl 1: p (1 - p) = p - 1/2, so p = sqrt(1/2).
    """
    weights = torch.zeros(2, 2).requires_grad_()
    method, generator = GRPO(scale="none", kl=1.0), torch.Generator().manual_seed(0)
    for step in range(150):
        batch = bandit(weights, torch.tensor([1.0, 0.0]), groups=4, size=64, generator=generator)
        batch = batch.replace(reference_logp=math.log(0.5) * batch.action_mask)
        weights = (weights - 1.0 / (1 + step / 20) * gradient(method, weights, batch)).detach().requires_grad_()
    close(weights[0].softmax(-1)[0], torch.tensor(math.sqrt(0.5)), atol=0.02, rtol=0)


# ------------------------------------------------------------------------------------------------------------ settings


def test_siblings_are_needed():
    assert GRPO().needs.sampling == {"siblings"} and "proximal_logp" in GRPO().needs.measured


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": -0.1}, "GRPO's clip_low is -0.1"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"kl": -1.0}, "kl is -1.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": 0.0}, "eps is 0.0.*0 / 0"),
        ({"truncate": -2.0}, "truncate is -2.0"),
        ({"truncate": 0.0}, "truncate is 0.0.*no token"),
        ({"dual_clip": 1.2}, "dual_clip is 1.2.*1 \\+ clip_high = 1.2"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GRPO(**settings)


def test_settings_at_the_edge_are_accepted():
    GRPO(clip_low=0.0, clip_high=0.0, eps=1e-12, kl=0.0, truncate=0.1, dual_clip=1.1)
