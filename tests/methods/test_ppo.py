import math
from dataclasses import replace

import pytest
import torch

from critics import reply, silent
from toy import V, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.reduce import token_mean
from tropism.maths.returns import gae, rewards_to_go, turn_starts, turn_sum
from tropism.maths.value import clipped_value_loss
from tropism.methods.ppo import PPO
from tropism.types import Credit, Output

close = torch.testing.assert_close


def policy_part(slope):
    return slope[:, :V]


def value_part(slope):
    return slope[:, V]


# ------------------------------------------------------------------------------------------------------------ identity


def test_used_once_with_a_silent_critic_it_is_reinforce():
    weights, batch = toy_batch()
    fresh = silent(on_policy(weights, batch))
    to_go = rewards_to_go(batch.token_reward, batch.action_mask, batch.episode, batch.turn, discount=1.0)
    close(to_go, batch.reward[:, None] * batch.action_mask)  # the toy's rewards come at the end
    objective = -(forward(weights, fresh).logp * to_go * token_mean(batch.action_mask)).sum()
    (reinforce,) = torch.autograd.grad(objective, weights)
    for per in ("token", "turn"):
        close(policy_part(gradient(PPO(per=per, trace=1.0, whiten=False), weights, fresh)), policy_part(reinforce))
    for other in (PPO(trace=1.0), PPO(trace=0.9, whiten=False)):
        assert (policy_part(gradient(other, weights, fresh)) - policy_part(reinforce)).abs().max() > 1e-3
    stale = gradient(PPO(trace=1.0, whiten=False), weights, silent(batch))
    assert (policy_part(stale) - policy_part(reinforce)).abs().max() > 1e-3


@pytest.mark.parametrize("trace", [1.0, 0.95])
def test_used_once_it_is_advantage_actor_critic(trace):
    """Mnih et al. 2016, arXiv:1602.01783, section 4: -A grad log pi + c grad (G - V)^2 / 2. At trace 1 A = G - V."""
    weights, batch = toy_batch()
    out = forward(weights, batch)
    fresh = on_policy(weights, batch).replace(value=out.value.detach(), last_value=out.last_value.detach())
    to_go = rewards_to_go(batch.token_reward, batch.action_mask, batch.episode, batch.turn, discount=0.9)
    facts = (fresh.action_mask, fresh.episode, fresh.turn, fresh.last_value, fresh.truncated & False)
    advantage, goal = gae(fresh.token_reward, fresh.value, *facts, discount=0.9, trace=trace)
    if trace == 1.0:
        close(goal * batch.action_mask, to_go * batch.action_mask)
    actor = -advantage * out.logp
    critic = (goal - out.value).square() / 2
    objective = ((actor + 0.7 * critic) * token_mean(batch.action_mask)).sum()
    (expected,) = torch.autograd.grad(objective, weights)
    assert value_part(expected).abs().max() > 1e-2
    method = PPO(discount=0.9, trace=trace, whiten=False, value_weight=0.7)
    close(gradient(method, weights, fresh), expected)
    close(gradient(replace(method, dual_clip=3.0), weights, fresh), expected)
    assert (gradient(method, weights, batch) - expected).abs().max() > 1e-3
    assert (gradient(replace(method, whiten=True), weights, fresh) - expected).abs().max() > 1e-3


def test_with_trace_zero_the_advantage_is_the_one_step_surprise_of_the_critic():
    batch = reply([0.0, 0.0, 1.0], [0.2, 0.4, 0.6])
    found = PPO(trace=0.0, whiten=False).credit(batch)
    close(found.advantage, torch.tensor([[0.2, 0.2, 0.4]]))
    close(found.target, torch.tensor([[0.4, 0.6, 1.0]]))


def test_turns_of_one_token_are_tokens():
    weights, batch = toy_batch()
    order = batch.action_mask.cumsum(1) + 10 * batch.turn  # every token a turn of its own, in the same order
    apart = batch.replace(turn=torch.where(batch.action_mask, order, -1))
    close(gradient(PPO(per="turn"), weights, apart), gradient(PPO(), weights, batch))
    assert (gradient(PPO(per="turn"), weights, batch) - gradient(PPO(), weights, batch)).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- direction


def slopes(method, batch, value=None):
    """How the objective moves with each log-probability and each value, at the policy that made the batch."""
    logp, value = batch.proximal_logp.clone(), (batch.value if value is None else torch.tensor([value])).clone()
    out = Output(logp=logp.requires_grad_(), entropy=torch.zeros_like(logp), value=value.requires_grad_())
    loss = method.loss(out, batch, method.credit(batch))
    return torch.autograd.grad((loss.values * method.weights(batch)).sum(), (logp, value))


def test_one_step_makes_likelier_what_surprised_the_critic_and_less_likely_what_disappointed_it():
    """The third token brought more than was expected of it, the first two less."""
    logp, value = slopes(PPO(trace=0.0), reply([0.0, 0.0, 1.0], [0.8, 0.5, 0.2]))
    assert (logp[0, :2] > 0).all() and logp[0, 2] < 0
    assert (value[0, :2] > 0).all() and value[0, 2] < 0


def test_one_step_moves_each_value_towards_its_target():
    batch = reply([0.0, 0.0, 1.0], [0.2, 1.4, 0.6])
    _, value = slopes(PPO(trace=1.0), batch)
    assert (value.sign() == torch.tensor([[-1.0, 1.0, -1.0]])).all()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_reference_pulls_back(kl_in):
    """Likelier than the reference: one step lowers it; less likely: it raises it."""
    for logp, sign in ((-1.0, 1), (-3.0, -1)):
        batch = reply([0.0], [0.0], logp=[logp], reference_logp=torch.tensor([[-2.0]]))
        slope, _ = slopes(PPO(kl=0.5, kl_in=kl_in, whiten=False), batch)
        assert sign * slope[0, 0] > 0


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("discount", "trace", "advantage", "target"),
    [
        (1, 1, (0.8, 0.6, 0.4), (1, 1, 1)),
        (1, 0.95, (0.751, 0.58, 0.4), (0.951, 0.98, 1)),
        (0.99, 0.95, (0.7322731, 0.5702, 0.4), (0.9322731, 0.9702, 1)),
        (1, 0, (0.2, 0.2, 0.4), (0.4, 0.6, 1)),
    ],
)
def test_the_credit_by_hand(discount, trace, advantage, target):
    """arXiv:1506.02438, eq. 16. Whitening moves the advantage and leaves the critic's target alone."""
    batch, method = reply([0.0, 0.0, 1.0], [0.2, 0.4, 0.6]), PPO(discount=discount, trace=trace, whiten=False)
    advantage = torch.tensor([advantage], dtype=torch.float64)
    for whiten in (False, True):
        found = replace(method, whiten=whiten).credit(batch)
        expected = (advantage - advantage.mean()) / advantage.std() if whiten else advantage
        close(found.advantage, expected, atol=1e-7, rtol=0)
        close(found.target, torch.tensor([target], dtype=torch.float64))


def test_whitened_advantages_have_mean_zero_over_the_tokens_of_the_batch():
    for per in ("token", "turn"):
        _, batch = toy_batch()
        found = PPO(per=per).credit(batch).advantage[batch.action_mask]
        close(found.mean(), torch.tensor(0.0), atol=1e-12, rtol=0)
        close(found.std(), torch.tensor(1.0))


def test_the_divergence_in_the_reward_by_hand():
    """Stiennon et al. 2020, arXiv:2009.01325, eq. 2: r - kl (log pi - log reference), here at every token; what was
    chosen before it answers for it too."""
    reference = torch.tensor([[-1.5, -0.5, -1.0]])
    batch = reply([0.0, 0.0, 1.0], [0.0, 0.0, 0.0], reference_logp=reference)
    method = PPO(kl=0.2, trace=1.0, whiten=False)
    close(method.credit(batch).advantage, torch.tensor([[1 - 0.1 + 0.1, 1 + 0.1, 1.0]]))
    close(replace(method, kl_in="loss").credit(batch).advantage, torch.ones(1, 3))
    turns = batch.replace(turn=torch.tensor([[0, 1, 1]]))
    close(replace(method, per="turn").credit(turns).advantage, torch.tensor([[1.0, 1.1, 1.1]]))
    close(replace(method, per="turn", trace=0.0).credit(turns).advantage, torch.tensor([[-0.1, 1.1, 1.1]]))
    assert (batch.token_reward == torch.tensor([[0.0, 0.0, 1.0]])).all()


def test_the_divergence_in_the_loss_by_hand():
    batch = reply([0.0], [0.0], reference_logp=torch.tensor([[-1.0 + math.log(2)]]))
    out = Output(logp=batch.proximal_logp, entropy=batch.value, value=batch.value)
    loss = PPO(kl=0.1, kl_in="loss").loss(out, batch, Credit(torch.zeros(1, 1), torch.zeros(1, 1)))
    close(loss.values, torch.tensor([[0.1 * (2 - math.log(2) - 1)]]))
    close(loss.metrics["kl"], torch.tensor([[2 - math.log(2) - 1]]))


RATIOS = [
    (0.5, 0.5, True, -0.8, False, -0.8),
    (0.8, 0.8, True, -0.8, True, -0.8),
    (1.0, 1.0, True, -1.0, True, -1.0),
    (1.2, 1.2, True, -1.2, True, -1.2),
    (1.5, 1.2, False, -1.5, True, -1.5),
    (4.0, 1.2, False, -4.0, True, -3.0),
]


@pytest.mark.parametrize(("ratio", "gain", "learns", "loss", "unlearns", "dual"), RATIOS)
def test_the_clipped_objective_by_hand(ratio, gain, learns, loss, unlearns, dual):
    """arXiv:1707.06347, eq. 7 and figure 1; arXiv:1912.09729, eq. 5 with c = 3."""
    batch = reply([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], logp=[-3.0, -3.0, -3.0])
    # A hair within the bounds, where rounding does not decide.
    logp = (batch.proximal_logp + math.log(ratio) * (1 - 1e-9)).requires_grad_()
    out = Output(logp=logp, entropy=batch.value, value=batch.value)
    found = []
    for method, advantage in ((PPO(), 1.0), (PPO(), -1.0), (PPO(dual_clip=3.0), -1.0)):
        values = method.loss(out, batch, Credit(torch.full((1, 3), advantage), torch.zeros(1, 3))).values
        (slope,) = torch.autograd.grad(values.sum(), logp)
        found.append((-float(values[0, 0].detach()), bool(slope[0, 0] != 0)))
    assert [value for value, _ in found] == pytest.approx([gain, loss, dual], rel=1e-6)
    assert [moves for _, moves in found] == [learns, unlearns, unlearns and ratio < 3]


def test_the_head_s_loss_by_hand():
    """Target 1; the value moved from 0.5 to 0.6, too far, and away: halves of 0.4, 0.3 and 0.9 squared, times 0.2."""
    batch = reply([0.0, 0.0, 0.0], [0.5, 0.5, 0.5])
    value = torch.tensor([[0.6, 0.9, 0.1]])
    out = Output(logp=batch.proximal_logp, entropy=value, value=value)
    credit = Credit(torch.zeros(1, 3), torch.ones(1, 3))
    loss = PPO(value_weight=0.2).loss(out, batch, credit)
    close(loss.values, 0.2 * torch.tensor([[0.08, 0.045, 0.405]]))
    close(loss.metrics["value/loss"], torch.tensor([[0.08, 0.045, 0.405]]))
    close(loss.metrics["value/clip_ratio"], torch.tensor([[0.0, 1.0, 0.0]]))
    plain = PPO(value_weight=0.2, value_clip=math.inf).loss(out, batch, credit)
    close(plain.values, 0.2 * torch.tensor([[0.08, 0.005, 0.405]]))


def test_the_importance_weight_is_for_the_policy_and_not_for_the_head():
    """Proximal / behavior is 4, cut at 2; the advantage is 1 and the head is 1 off."""
    batch = reply([0.0], [0.0]).replace(behavior_logp=torch.tensor([[-1.0 - math.log(4)]]))
    out = Output(logp=batch.proximal_logp, entropy=batch.value, value=batch.value)
    credit = Credit(torch.ones(1, 1), torch.ones(1, 1))
    close(PPO().loss(out, batch, credit).values, torch.tensor([[-2.0 + 0.1 * 0.5]]))
    close(PPO(truncate=9.0).loss(out, batch, credit).values, torch.tensor([[-4.0 + 0.1 * 0.5]]))


def test_a_truncated_episode_is_worth_what_it_earned_unless_it_is_said_to_go_on():
    """Pardo et al. 2018, arXiv:1712.00378: then by the critic's value of where it was cut."""
    cut = reply([0.0, 0.5], [0.2, 0.4], last_value=2.0, truncated=True)
    for per, turn in (("token", [0, 0]), ("turn", [0, 1])):
        method, one = PPO(per=per, trace=1.0, discount=0.5, whiten=False), cut.replace(turn=torch.tensor([turn]))
        close(method.credit(one).target, torch.tensor([[0.25, 0.5]]))
        further = replace(method, bootstrap=True)
        close(further.credit(one).target, torch.tensor([[0.5 * (0.5 + 0.5 * 2), 0.5 + 0.5 * 2]]))
        close(further.credit(one.replace(truncated=cut.truncated & False)).target, torch.tensor([[0.25, 0.5]]))


def test_a_turn_shares_one_advantage_and_its_critic_is_asked_and_taught_at_its_first_token_alone():
    weights, batch = toy_batch()
    starts = turn_starts(batch.turn)
    method = PPO(per="turn", trace=0.8, discount=0.9, whiten=False, bootstrap=True)
    assert 0 < starts.sum() < batch.action_mask.sum()
    credit = method.credit(batch)
    reward = turn_sum(batch.token_reward, batch.turn)
    facts = (batch.value, starts, batch.episode, batch.turn, batch.last_value, batch.truncated)
    advantage, target = gae(reward, *facts, discount=0.9, trace=0.8)
    close(credit.advantage, turn_sum(advantage, batch.turn))
    close(credit.target, target)
    deaf = batch.replace(value=torch.where(starts, batch.value, 99.0))
    close(method.credit(deaf).advantage, credit.advantage, rtol=0, atol=0)
    loss = method.loss(forward(weights, batch), batch, credit)
    out = forward(weights, batch)
    error, _ = clipped_value_loss(out.value, batch.value, target, clip=0.2)
    (taught,) = torch.autograd.grad((0.1 * error * starts * token_mean(batch.action_mask)).sum(), weights)
    close(value_part(gradient(method, weights, batch)), value_part(taught))
    assert (loss.metrics["value/loss"][~starts] == 0).all() and (loss.metrics["value/clip_ratio"][~starts] == 0).all()


def test_every_token_counts_the_same():
    _, batch = toy_batch()
    close(PPO().weights(batch), batch.action_mask / 25)


# ------------------------------------------------------------------------------------------------------------ settings


def test_without_a_weight_the_reference_is_not_read_in_either_place():
    weights, batch = toy_batch()
    bare = batch.replace(reference_logp=None)
    for kl_in in ("reward", "loss"):
        close(gradient(PPO(kl_in=kl_in), weights, bare), gradient(PPO(kl=1e-9, kl_in=kl_in), weights, batch))


def test_what_it_needs():
    needs = PPO().needs
    assert needs.measured == {"proximal_logp", "value", "last_value"} and needs.live == {"value"}
    assert needs.sampling == {"rollouts"}
    for kl_in in ("reward", "loss"):
        assert PPO(kl=0.1, kl_in=kl_in).needs.measured - needs.measured == {"reference_logp"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discount": 1.01}, "PPO's discount is 1.01"),
        ({"discount": -0.1}, "discount is -0.1"),
        ({"trace": 1.5}, "trace is 1.5.*0 to 1"),
        ({"value_clip": 0.0}, "value_clip is 0.0.*critic would never learn"),
        ({"value_weight": 0.0}, "value_weight is 0.0"),
        ({"value_weight": -1.0}, "value_weight is -1.0"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"kl": -0.1}, "kl is -0.1"),
        ({"dual_clip": 1.2}, "dual_clip is 1.2"),
        ({"truncate": 0.0}, "truncate is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PPO(**settings)


def test_settings_at_the_edge_are_accepted():
    PPO(discount=0.0, trace=0.0, value_clip=math.inf, value_weight=1e-9, kl=0.0, dual_clip=1.3)
    PPO(discount=1.0, trace=1.0)


def test_a_divergence_in_the_reward_is_not_in_the_loss_too():
    weights, batch = toy_batch()
    said = forward(weights, batch)
    losses = {}
    for where in ("reward", "loss"):
        method = PPO(kl=0.5, kl_in=where)
        losses[where] = method.loss(said, batch, method.credit(batch.replace(reference_logp=batch.proximal_logp)))
    assert "kl" not in losses["reward"].metrics and not losses["loss"].metrics["kl"].requires_grad
    plain = PPO().loss(said, batch, PPO().credit(batch))
    close(losses["reward"].values, plain.values)
    assert (losses["loss"].values - plain.values).abs().max() > 1e-3
