"""PPO's divergence: the controller of its weight, k2 in the loss; and whitened rewards."""

import pytest
import torch

from critics import reply
from tropism.errors import ConfigError
from tropism.methods.ppo import PPO
from tropism.types import Credit, Output

close = torch.testing.assert_close


def away(nats, **fields):
    """One reply of two tokens whose log-probabilities are so many nats above the reference's, in all."""
    batch = reply([0.0, 1.0], [0.0, 0.0], **fields)
    return batch.replace(reference_logp=batch.proximal_logp - nats / 2 * batch.action_mask)


def test_the_weight_grows_while_the_policy_is_too_far_and_falls_while_it_is_near():
    method = PPO(kl=0.1, kl_target=2.0, kl_horizon=10, whiten=False)
    far, near = (float(method.remember(away(nats))["kl"]) for nats in (4.0, 0.5))
    assert far == pytest.approx(0.1 * (1 + 0.2 / 10)) and near == pytest.approx(0.1 * (1 - 0.2 / 10))
    again = method.remember(away(4.0).replace(memory={"kl": torch.tensor(far)}))
    assert float(again["kl"]) == pytest.approx(far * 1.02)
    assert PPO(kl=0.1).remember(away(4.0)) == {}


def test_only_what_the_policy_said_is_away():
    method, batch = (
        PPO(kl=0.1, kl_target=2.0, kl_horizon=10, whiten=False),
        away(4.1),
    )  # of which its one action token is half
    batch = batch.replace(action_mask=torch.tensor([[False, True]]))
    assert float(method.remember(batch)["kl"]) == pytest.approx(0.1 * (1 + 0.025 / 10))


def test_in_a_horizon_of_ten_thousand_episodes_it_changes_by_a_fifth():
    step = float(PPO(kl=0.1, kl_target=0.5, whiten=False).remember(away(4.0))["kl"]) / 0.1
    assert (step - 1) * 10_000 == pytest.approx(0.2, rel=1e-3)
    assert float(PPO(kl=0.1, kl_target=0.5, kl_horizon=1).remember(away(4.0))["kl"]) == pytest.approx(0.12)


def test_a_weight_is_told_where_there_is_one():
    assert PPO().credit(away(1.0)).metrics == {} and PPO(kl=0.1).credit(away(1.0)).metrics == {"kl/weight": 0.1}


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_remembered_weight_is_the_one_that_counts(kl_in):
    batch = away(2.0)
    heavy = batch.replace(memory={"kl": torch.tensor(0.7)})
    now, then = PPO(kl=0.1, kl_in=kl_in, whiten=False), PPO(kl=0.7, kl_in=kl_in, whiten=False)
    close(now.credit(heavy).advantage, then.credit(batch).advantage)
    out = Output(logp=batch.proximal_logp, entropy=batch.proximal_logp, value=batch.value)
    close(now.loss(out, heavy, now.credit(heavy)).values, then.loss(out, batch, then.credit(batch)).values)
    assert now.credit(heavy).metrics == {"kl/weight": pytest.approx(0.7)}


def test_k2_in_the_loss_pulls_by_the_distance_itself():
    batch = away(1.0)
    batch = batch.replace(token_reward=batch.token_reward * 0)
    logp = batch.proximal_logp.clone().requires_grad_()
    method = PPO(kl=0.3, kl_in="loss", kl_loss="k2", whiten=False)
    out = Output(logp=logp, entropy=logp, value=batch.value)
    loss = method.loss(out, batch, Credit(torch.zeros_like(logp), batch.value))
    (slope,) = torch.autograd.grad(loss.values.sum(), logp)
    close(slope, 0.3 * 0.5 * batch.action_mask)


def test_whitened_rewards_have_deviation_one_and_keep_their_mean():
    batch = reply([1.0, 3.0, 8.0], [0.0, 0.0, 0.0])
    plain = PPO(trace=1.0, whiten=False, whiten_reward=True).credit(batch).target[batch.action_mask]
    rewards = plain - torch.cat([plain[1:], plain[:1] * 0])  # targets are what is still to be earned
    close(rewards.mean(), torch.tensor(4.0).to(rewards))
    close(rewards.std(), torch.tensor(1.0).to(rewards))


def test_rewards_are_whitened_before_the_divergence_is_taken_from_them():
    """Rewards 0, 0, 1 become their mean plus or minus; then .2 times -.5, .5 and 0 is taken from them."""
    batch = reply([0.0, 0.0, 1.0], [0.0] * 3, reference_logp=torch.tensor([[-1.5, -0.5, -1.0]]))
    found = PPO(kl=0.2, trace=1.0, whiten=False, whiten_reward=True).credit(batch).advantage
    white = torch.tensor([0.0, 0.0, 1.0])
    white = (white - white.mean()) / white.std() + white.mean()
    close(found, (white - 0.2 * torch.tensor([0.5, -0.5, 0.0])).flip(0).cumsum(0).flip(0)[None], atol=1e-5, rtol=0)


def test_the_loss_has_no_bonus_for_entropy():
    batch = away(1.0)
    entropy = batch.proximal_logp.clone().requires_grad_()
    out = Output(logp=batch.proximal_logp.clone().requires_grad_(), entropy=entropy, value=batch.value)
    loss = PPO(kl=0.3, kl_in="loss").loss(out, batch, Credit(torch.ones_like(entropy), batch.value))
    assert torch.autograd.grad(loss.values.sum(), entropy, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    "settings", [{"kl_target": 2.0}, {"kl": 0.1, "kl_target": 0.0}, {"kl": 0.1, "kl_target": 1.0, "kl_horizon": 0}]
)
def test_a_controller_that_cannot_work_is_refused(settings):
    with pytest.raises(ConfigError, match="a weight of 0 never grows"):
        PPO(**settings)
