import math

import pytest
import torch

from toy import bandit, batches_until_learned, forward, gradient, on_policy, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.maths.advantage import group_relative
from tropism.methods.dr_grpo import DrGRPO
from tropism.methods.grpo import GRPO
from tropism.methods.reinforce import REINFORCE
from tropism.methods.reinforce_pp import ReinforcePP
from tropism.types import Credit

close = torch.testing.assert_close

# ------------------------------------------------------------------------------------------------------------ identity


def drawn(weights):
    return pulled(weights, torch.tensor([0, 1, 2, 2, 0, 1, 1, 1]), torch.tensor([1.0, 0.0, 0.5]), size=4)


def test_for_replies_of_one_length_it_is_reinforce_but_for_a_factor():
    """Of eight replies each is compared with all eight here and with the seven others there: 7 / 8, over the std."""
    weights = torch.tensor([[0.2, -0.1, 0.4], [0.0] * 3, [0.0] * 3]).requires_grad_()
    batch = drawn(weights)
    std = batch.reward.std()
    close(gradient(ReinforcePP(), weights, batch), 7 / 8 / std * gradient(REINFORCE(), weights, batch))
    assert gradient(REINFORCE(), weights, batch).abs().max() > 1e-2


def test_with_its_baseline_it_is_dr_grpo_but_for_a_factor():
    weights = torch.tensor([[0.2, -0.1, 0.4], [0.0] * 3, [0.0] * 3]).requires_grad_()
    batch = drawn(weights)
    std = group_relative(batch.reward, batch.group, batch.episode, scale="none").std()
    found = gradient(ReinforcePP(baseline=True), weights, batch)
    close(found, gradient(DrGRPO(longest=1), weights, batch) / std)
    assert (found - gradient(ReinforcePP(), weights, batch)).abs().max() > 1e-2


def test_its_loss_is_grpos_averaged_over_tokens():
    weights, batch = toy_batch()
    credit = ReinforcePP().credit(batch)
    for settings in ({}, {"clip_low": 0.01}, {"clip_high": 0.01}, {"truncate": 0.5}):
        mine, other = ReinforcePP(**settings), GRPO(average="token", **settings)
        close(mine.weights(batch), other.weights(batch))
        loss, same = (method.loss(forward(weights, batch), batch, credit) for method in (mine, other))
        close(loss.values, same.values)
        close(loss.metrics, same.metrics)


@pytest.mark.parametrize("baseline", [False, True])
def test_without_a_reference_weight_the_reference_is_neither_needed_nor_read(baseline):
    weights, batch = toy_batch()
    method, with_kl = (ReinforcePP(baseline=baseline, kl=kl) for kl in (0.0, 0.1))
    assert "reference_logp" not in method.needs.measured and "reference_logp" in with_kl.needs.measured
    assert method.needs.sampling == ({"siblings"} if baseline else {"rollouts"})
    assert "proximal_logp" in method.needs.measured
    plain = gradient(method, weights, batch.replace(reference_logp=None))
    close(gradient(ReinforcePP(baseline=baseline, kl=1e-9), weights, batch), plain, atol=1e-7, rtol=0)
    assert (gradient(with_kl, weights, batch) - plain).abs().max() > 1e-3


def test_a_batch_that_earned_the_same_throughout_leaves_the_policy_as_it_is():
    weights = torch.zeros(2, 2).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 1]), torch.tensor([0.1, 0.1]), size=3)
    for method in (ReinforcePP(), ReinforcePP(baseline=True)):
        assert (gradient(method, weights, batch) == 0).all()


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("baseline", [False, True])
def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely(baseline):
    weights = torch.zeros(4, 4).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.0, 0.0]), size=4)
    slope = gradient(ReinforcePP(baseline=baseline), weights, batch)[0]
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("baseline", [False, True])
def test_the_reference_pulls_back(baseline):
    """Equal rewards: what is likelier than the reference says falls, what is less likely rises."""
    weights = torch.zeros(2, 2).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1]), torch.tensor([1.0, 1.0]), size=2)
    reference = torch.tensor([[0.0, 0.2], [0.0, 0.8]]).log().nan_to_num(neginf=0) * batch.action_mask
    method = ReinforcePP(kl=0.1, baseline=baseline)
    slope = gradient(method, weights, batch.replace(reference_logp=reference))[0]
    assert slope[0] > 0 > slope[1]


# --------------------------------------------------------------------------------------------------------- closed form


def test_the_credit_of_a_token_is_what_follows_it():
    """arXiv:2501.03262: r minus kl times k1 from this token on, then mean 0 and deviation 1 over the batch's tokens.

    Row 5 is one episode of four tokens, row 7 one token; the rest is cut off.
    """
    _, batch = toy_batch()
    pair = batch[torch.tensor([5, 7])]
    price = 0.3 * (pair.proximal_logp - pair.reference_logp)
    tokens = pair.action_mask[0].nonzero()[:, 0]
    raw = [pair.reward[0] - price[0, tokens[k:]].sum() for k in range(4)] + [pair.reward[1] - price[1].sum()]
    raw = torch.stack(raw)
    found = ReinforcePP(kl=0.3, eps=0.01).credit(pair).advantage
    close(found[pair.action_mask], (raw - raw.mean()) / (raw.std() + 0.01))
    assert (found[~pair.action_mask] == 0).all()


def test_the_credit_with_a_baseline_by_hand():
    """arXiv:2501.03262: against the siblings first, then over all 25 tokens of the batch; the divergence stays out."""
    _, batch = toy_batch()
    raw = group_relative(batch.reward, batch.group, batch.episode, scale="none")[:, None].expand_as(batch.token_reward)
    raw = raw[batch.action_mask]
    found = ReinforcePP(baseline=True, kl=0.3).credit(batch).advantage[batch.action_mask]
    close(found, (raw - raw.mean()) / (raw.std() + 1e-8))
    close(found.mean(), torch.tensor(0.0))
    close(found.std(), torch.tensor(1.0), atol=1e-7, rtol=0)


def test_a_deviation_no_larger_than_eps_is_not_blown_up():
    """Rewards 2e-8 apart have a deviation of 1.41e-8, and eps is 1e-8."""
    batch = pulled(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0.0, 2e-8]), size=2)
    expected = torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + 1)
    close(ReinforcePP().credit(batch).advantage[:, 1], expected)


def test_only_the_baseline_variant_pays_the_divergence_in_the_loss():
    weights, batch = toy_batch()
    nothing = Credit(torch.zeros_like(batch.token_reward))
    out = forward(weights, batch)
    loss = ReinforcePP(baseline=True, kl=0.3).loss(out, batch, nothing)
    divergence = (out.logp - batch.reference_logp).square() / 2
    close(loss.values, 0.3 * divergence)
    close(loss.metrics["kl"], divergence.detach())
    silent = ReinforcePP(kl=0.3).loss(out, batch, nothing)
    assert (silent.values == 0).all() and "kl" not in silent.metrics


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("updates", [1, 4])
def test_it_learns_a_bandit_with_three_arms(baseline, updates):
    assert batches_until_learned(ReinforcePP(baseline=baseline), updates=updates) <= 40


def test_with_a_reference_in_the_loss_it_stops_at_the_tilted_reference():
    """k2 as a loss follows KL(policy || reference). Two arms of reward 1 and 0, uniform reference.

    With rewards divided by their deviation s = sqrt(p (1 - p)) the optimum has logit 1 / (s kl): 1.2 = logit(.7685) at
    kl = 1 / (1.2 s).
    """
    p = 1 / (1 + math.exp(-1.2))
    kl = 1 / (1.2 * math.sqrt(p * (1 - p)))
    weights, generator = torch.zeros(2, 2).requires_grad_(), torch.Generator().manual_seed(0)
    for step in range(150):
        batch = on_policy(weights, bandit(weights, torch.tensor([1.0, 0.0]), groups=4, size=64, generator=generator))
        batch = batch.replace(reference_logp=math.log(0.5) * batch.action_mask)
        slope = gradient(ReinforcePP(baseline=True, kl=kl), weights, batch)
        weights = (weights - 1.0 / (1 + step / 20) * slope).detach().requires_grad_()
    close(weights[0].softmax(-1)[0], torch.tensor(p), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"clip_low": -0.1}, "clip_low is -0.1"), ({"kl": -1}, "kl is -1"), ({"eps": 0}, "eps is 0")],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"ReinforcePP's {message}"):
        ReinforcePP(**settings)
