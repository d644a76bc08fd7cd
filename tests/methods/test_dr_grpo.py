import math

import pytest
import torch

from toy import bandit, forward, gradient, on_policy, toy_batch
from tropism.config import Sampling
from tropism.errors import ConfigError
from tropism.maths.advantage import leave_one_out
from tropism.methods.dr_grpo import DrGRPO
from tropism.methods.grpo import GRPO

close = torch.testing.assert_close


def test_used_once_it_is_rloo_but_for_a_factor():
    """(G - 1) / G for groups of G, here 4."""
    weights = torch.zeros(2, 2).requires_grad_()
    batch = bandit(weights, torch.tensor([1.0, 0.0]), groups=3, size=4, generator=torch.Generator().manual_seed(0))
    rloo = leave_one_out(batch.reward, batch.group, batch.episode)
    objective = -(forward(weights, batch).logp * rloo[:, None] * DrGRPO(longest=1).weights(batch)).sum()
    (expected,) = torch.autograd.grad(objective, weights)
    assert expected.abs().max() > 1e-2
    close(gradient(DrGRPO(longest=1), weights, batch), 0.75 * expected)


def test_the_constant_scales_every_gradient_alike():
    weights, batch = toy_batch()
    close(gradient(DrGRPO(longest=10), weights, batch), 4 * gradient(DrGRPO(longest=40), weights, batch))


def test_the_weight_of_a_token_by_hand():
    """One over 8 episodes of at most 10 tokens, however many an episode wrote."""
    _, batch = toy_batch()
    close(DrGRPO(longest=10).weights(batch), batch.action_mask / 80)


def test_a_long_wrong_answer_is_not_blamed_less_per_token():
    """GRPO divides by the length of the episode, which hides long failures; here every token counts the same."""
    _, batch = toy_batch()
    for method, same in ((DrGRPO(), True), (GRPO(), False)):
        per_token = method.weights(batch).sum(1) / batch.action_mask.sum(1)
        assert (per_token.max() - per_token.min() < 1e-9) == same


def test_a_question_that_is_nearly_solved_does_not_count_more():
    """The lonely failure of a group of n gets 1/n - 1, not -sqrt(n - 1)."""
    _, batch = toy_batch()
    one = batch[torch.tensor([1, 2, 3, 5])].replace(reward=torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    close(DrGRPO().credit(one).advantage[3].min(), torch.tensor(1 / 3 - 1).double())
    close(GRPO(eps=1e-12).credit(one).advantage[3].min(), torch.tensor(-math.sqrt(2)).double())


def test_it_learns_a_bandit_with_three_arms():
    weights = torch.tensor([[0.5, 0.2, -0.5], [0.0] * 3, [0.0] * 3]).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for _ in range(160):
        batch = bandit(weights, torch.tensor([0.0, 0.5, 1.0]), groups=4, size=8, generator=generator)
        weights = (weights - gradient(DrGRPO(longest=1), weights, batch)).detach().requires_grad_()
    assert weights[0].softmax(-1)[2] > 0.95


def test_a_batch_that_the_policy_itself_made_has_no_clipping():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    loss = DrGRPO().loss(forward(weights, fresh), fresh, DrGRPO().credit(fresh))
    assert (loss.metrics["clip_ratio/region_mean"] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"), [({"longest": 0}, "longest is 0"), ({"truncate": 0}, "truncate is 0")]
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DrGRPO(**settings)


def test_the_defaults():
    """PPO's clip, the longest reply that sampling allows by default, importance weights of at most 2."""
    method = DrGRPO()
    assert (method.clip_low, method.clip_high, method.longest, method.truncate) == (0.2, 0.2, 256, 2.0)
    assert method.longest == Sampling().max_tokens
