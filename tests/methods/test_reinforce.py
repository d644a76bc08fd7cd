import pytest
import torch

from toy import batches_until_learned, expected_gradient, forward, gradient, on_policy, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.maths.reduce import first_row
from tropism.methods.cispo import CISPO
from tropism.methods.dapo import DAPO
from tropism.methods.gspo import GSPO
from tropism.methods.max_rl import MaxRL
from tropism.methods.reinforce import REINFORCE
from tropism.methods.reinforce_pp import ReinforcePP
from tropism.methods.rloo import RLOO
from tropism.methods.sft import SFT

close = torch.testing.assert_close

# ------------------------------------------------------------------------------------------------------------ identity


def test_on_a_batch_of_one_group_it_is_rloo():
    weights, batch = toy_batch()
    close(
        gradient(REINFORCE(), weights, batch.replace(group=batch.group * 0)),
        gradient(RLOO(), weights, batch.replace(group=batch.group * 0)),
    )
    assert (gradient(REINFORCE(), weights, batch) - gradient(RLOO(), weights, batch)).abs().max() > 1e-2


def test_with_reward_one_and_no_baseline_it_is_maximum_likelihood():
    """25 tokens in 8 episodes: a sum over an episode where SFT takes the mean over tokens."""
    weights, batch = toy_batch()
    batch = on_policy(weights, batch.replace(reward=torch.ones_like(batch.reward)))
    close(gradient(REINFORCE(baseline="none"), weights, batch), 25 / 8 * gradient(SFT(), weights, batch))


def test_groups_do_not_matter():
    weights, batch = toy_batch()
    alone = batch.replace(group=batch.episode)
    assert gradient(REINFORCE(), weights, alone).abs().max() > 1e-2
    close(gradient(REINFORCE(), weights, alone), gradient(REINFORCE(), weights, batch))
    assert REINFORCE().needs.sampling == {"rollouts"} and REINFORCE().needs.measured == {"proximal_logp"}


def test_the_policy_that_made_the_batch_matters_only_where_it_was_not_the_sampler():
    weights, batch = toy_batch()
    same = batch.replace(behavior_logp=batch.proximal_logp)
    close(gradient(REINFORCE(), weights, same), gradient(REINFORCE(), weights, on_policy(weights, batch)))
    assert (gradient(REINFORCE(), weights, same) - gradient(REINFORCE(), weights, batch)).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely():
    weights = torch.zeros(4, 4).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.0, 0.0]), size=1)
    slope = gradient(REINFORCE(), weights, batch)[0]
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("baseline", ["none", "others"])
@pytest.mark.parametrize("size", [2, 3])
def test_its_expectation_is_the_gradient_of_the_expected_reward(baseline, size):
    """Williams 1992, theorem 1. Probabilities (.337585, .250089, .412327), rewards (1, 0, .5)."""
    weights = torch.tensor([[0.2, -0.1, 0.4], [0.0] * 3, [0.0] * 3]).requires_grad_()
    found = expected_gradient(REINFORCE(baseline=baseline), weights, torch.tensor([1.0, 0.0, 0.5]), size=size)
    close(found[0], -torch.tensor([0.154024, -0.135985, -0.018038]), atol=1e-6, rtol=0)


def test_the_credit_of_a_batch_by_hand():
    """Eight episodes earned 4.75 in all; episode 0, with 1, is compared with 3.75 / 7, on both of its rows."""
    _, batch = toy_batch()
    close(batch.reward[first_row(batch.episode)].sum(), torch.tensor(4.75))
    for row in (1, 3):
        close(REINFORCE().credit(batch).advantage[row], (1 - 3.75 / 7) * batch.action_mask[row])
    close(REINFORCE(baseline="none").credit(batch).advantage, batch.reward[:, None] * batch.action_mask)


def test_the_loss_and_the_weight_of_a_token_by_hand():
    weights, batch = toy_batch()
    out, credit = forward(weights, batch), REINFORCE().credit(batch)
    loss = REINFORCE(truncate=1.5).loss(out, batch, credit)
    mismatch = (batch.proximal_logp - batch.behavior_logp).exp().clamp(max=1.5)
    assert (mismatch == 1.5).any() and (mismatch < 1.4).any()
    close(loss.values, -credit.advantage * out.logp * mismatch)
    close(loss.metrics["sampling/importance_sampling_ratio/mean"], mismatch)
    close(REINFORCE().weights(batch), batch.action_mask / 8)


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("baseline", ["none", "others"])
def test_it_learns_a_bandit_with_three_arms(baseline):
    assert batches_until_learned(REINFORCE(baseline=baseline)) <= 150


@pytest.mark.parametrize(
    "method", [RLOO(), DAPO(), GSPO(), CISPO(), MaxRL(), ReinforcePP()], ids=lambda m: type(m).__name__
)
def test_no_later_method_needs_three_times_as_many_batches(method):
    """Two updates a batch, so that ratios move and clipping binds."""
    assert batches_until_learned(method, updates=2) <= 3 * batches_until_learned(REINFORCE(), updates=2)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="REINFORCE's truncate is 0"):
        REINFORCE(truncate=0)
