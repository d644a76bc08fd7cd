import math

import pytest
import torch

from toy import batches_until_learned, forward, gradient, on_policy, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.methods.grpo import GRPO
from tropism.methods.gspo import GSPO
from tropism.types import Credit, Output

close = torch.testing.assert_close


def one_reply(log_ratios, *, mismatch=(0.0, 0.0, 0.0)):
    """(Output, Batch) of one reply of three tokens whose log ratios are these."""
    _, batch = toy_batch()
    mask, proximal = torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), -2.0)
    fields = {name: torch.zeros(1, 3) if value.ndim > 1 else torch.zeros(1) for name, value in batch.tensors()}
    fields |= {"action_mask": mask, "episode": torch.tensor([4]), "group": torch.tensor([0])}
    fields |= {"proximal_logp": proximal, "behavior_logp": proximal - torch.tensor([mismatch])}
    logp = (proximal + torch.tensor([log_ratios])).requires_grad_()
    return Output(logp=logp, entropy=torch.zeros(1, 3)), batch.replace(**fields)


# ------------------------------------------------------------------------------------------------------------ identity


def test_while_nothing_has_moved_it_is_grpo():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    close(gradient(GSPO(), weights, fresh), gradient(GRPO(), weights, fresh))
    wide = {"clip_low": 0.2, "clip_high": 0.2}
    assert (gradient(GSPO(**wide), weights, batch) - gradient(GRPO(**wide), weights, batch)).abs().max() > 1e-3


def test_on_replies_of_one_token_it_is_grpo():
    old, new = torch.zeros(3, 3), torch.tensor([[0.3, 0.0, -0.4], [0.0] * 3, [0.0] * 3]).requires_grad_()
    batch = pulled(old, torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 0.0, 0.5]), size=4)
    close(gradient(GSPO(clip_low=0.2, clip_high=0.2), new, batch), gradient(GRPO(), new, batch))
    assert (gradient(GSPO(), new, batch) - gradient(GRPO(), new, batch)).abs().max() > 1e-2


def test_it_needs_siblings():
    assert GSPO().needs.sampling == {"siblings"} and GSPO().needs.measured == {"proximal_logp"}


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely():
    weights = torch.zeros(4, 4).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.0, 0.0]), size=4)
    slope = gradient(GSPO(), weights, batch)[0]
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


# --------------------------------------------------------------------------------------------------------- closed form


def test_the_loss_by_hand():
    """arXiv:2507.18071, eq. 7 and 10: log ratios .1, -.2, .3 have the geometric mean 1.06894, on each token."""
    out, batch = one_reply([0.1, -0.2, 0.3])
    method = GSPO(clip_low=0.2, clip_high=0.2)
    loss = method.loss(out, batch, Credit(torch.full((1, 3), 2.0)))
    close(loss.values.detach(), torch.full((1, 3), -2 * 1.06894), atol=1e-4, rtol=0)
    (slope,) = torch.autograd.grad((loss.values * method.weights(batch)).sum(), out.logp)
    close(slope, torch.full((1, 3), -2 * math.exp(0.2 / 3) / 3))


@pytest.mark.parametrize(
    ("mean", "advantage", "learns"),
    [(3.9e-4, 1, True), (4.1e-4, 1, False), (4.1e-4, -1, True), (-2.9e-4, -1, True), (-3.1e-4, -1, False)],
)
def test_an_episode_is_clipped_as_a_whole_at_the_papers_limits(mean, advantage, learns):
    """arXiv:2507.18071, section 5.1: 3e-4 below, 4e-4 above. Its tokens may each be far beyond."""
    out, batch = one_reply([0.5 + mean, -0.7 + mean, 0.2 + mean])
    loss = GSPO().loss(out, batch, Credit(torch.full((1, 3), float(advantage))))
    (slope,) = torch.autograd.grad(loss.values.sum(), out.logp)
    assert ((slope != 0) == learns).all()
    assert (loss.metrics["clip_ratio/region_mean"] == (not learns)).all()
    close(loss.metrics["ratio"], torch.full((1, 3), mean).exp())


def test_the_importance_weight_is_a_geometric_mean_too_and_is_truncated():
    out, batch = one_reply([0.0, 0.0, 0.0], mismatch=(0.6, -0.3, 0.3))
    far, off = one_reply([0.0, 0.0, 0.0], mismatch=(1.6, 0.7, 0.7))
    assert (GSPO().loss(far, off, Credit(torch.ones(1, 3))).values == -2).all()
    for limit, expected in ((2.0, math.exp(0.2)), (1.1, 1.1)):
        loss = GSPO(truncate=limit).loss(out, batch, Credit(torch.ones(1, 3)))
        close(loss.values.detach(), torch.full((1, 3), -expected))
        close(loss.metrics["sampling/importance_sampling_ratio/mean"], torch.full((1, 3), expected))


def test_a_ratio_spans_the_rows_of_its_episode_and_every_episode_counts_the_same():
    weights, batch = toy_batch()
    ratio = GSPO().loss(forward(weights, batch), batch, GSPO().credit(batch)).metrics["ratio"]
    first, second = (ratio[row][batch.action_mask[row]] for row in (1, 3))
    close(first, first[0].expand_as(first))
    close(second, first[0].expand_as(second))
    close(GSPO().weights(batch)[1], batch.action_mask[1] / (8 * 6))


def test_the_credit_of_a_batch_by_hand():
    _, batch = toy_batch()
    std = math.sqrt(torch.tensor([1.0, 0.25, -0.5]).var(correction=0))
    close(GSPO().credit(batch).advantage[1], 0.75 / (std + 1e-6) * batch.action_mask[1])
    close(GSPO(eps=1.0).credit(batch).advantage[3], 0.75 / (std + 1.0) * batch.action_mask[3])


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("updates", [1, 4])
def test_it_learns_a_bandit_with_three_arms(updates):
    assert batches_until_learned(GSPO(), updates=updates) <= 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clip_high": -0.1}, "clip_high is -0.1"), ({"eps": 0}, "eps is 0"), ({"truncate": 0}, "truncate is 0")],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"GSPO's {message}"):
        GSPO(**settings)
