import pytest
import torch

from toy import bandit, batches_until_learned, expected_gradient, forward, gradient, on_policy, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.methods.dr_grpo import DrGRPO
from tropism.methods.reinforce import REINFORCE
from tropism.methods.rloo import RLOO

close = torch.testing.assert_close

# ------------------------------------------------------------------------------------------------------------ identity


def test_on_a_batch_of_one_group_it_is_reinforce():
    weights, batch = toy_batch()
    together = batch.replace(group=batch.group * 0)
    close(gradient(RLOO(), weights, together), gradient(REINFORCE(), weights, together))
    assert (gradient(RLOO(), weights, batch) - gradient(REINFORCE(), weights, batch)).abs().max() > 1e-2


def test_for_groups_of_four_it_is_dr_grpo_times_four_thirds_while_nothing_has_moved():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch.replace(group=batch.episode // 4))
    close(gradient(RLOO(), weights, fresh), 4 / 3 * gradient(DrGRPO(longest=1), weights, fresh))
    stale = batch.replace(group=batch.episode // 4)
    difference = gradient(RLOO(), weights, stale) - 4 / 3 * gradient(DrGRPO(longest=1), weights, stale)
    assert difference.abs().max() > 1e-2


def test_without_a_reference_weight_the_reference_is_neither_needed_nor_read():
    weights, batch = toy_batch()
    assert "reference_logp" not in RLOO().needs.measured and "reference_logp" in RLOO(kl=0.1).needs.measured
    plain = gradient(RLOO(), weights, batch.replace(reference_logp=None))
    close(gradient(RLOO(kl=1e-9), weights, batch), plain, atol=1e-7, rtol=0)
    assert (gradient(RLOO(kl=0.1), weights, batch) - plain).abs().max() > 1e-2
    assert RLOO().needs.sampling == {"siblings"} and "proximal_logp" in RLOO().needs.measured


def test_a_drift_that_all_siblings_share_costs_nothing():
    """The baseline carries the same price; only the difference in divergence is left."""
    weights = torch.zeros(3, 3).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 0.5]), size=3)
    away = batch.replace(reference_logp=(batch.proximal_logp - 0.7) * batch.action_mask)
    close(gradient(RLOO(kl=0.5), weights, away), gradient(RLOO(), weights, batch))


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely():
    weights = torch.zeros(4, 4).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.0, 0.0]), size=4)
    slope = gradient(RLOO(), weights, batch)[0]
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


def test_the_reference_pulls_back():
    """Equal rewards: what is likelier than the reference says falls, what is less likely rises."""
    weights = torch.zeros(2, 2).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1]), torch.tensor([1.0, 1.0]), size=2)
    reference = torch.tensor([[0.0, 0.2], [0.0, 0.8]]).log().nan_to_num(neginf=0) * batch.action_mask
    slope = gradient(RLOO(kl=0.1), weights, batch.replace(reference_logp=reference))[0]
    assert slope[0] > 0 > slope[1]


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("size", [2, 4])
def test_its_expectation_is_the_gradient_of_the_expected_reward(size):
    """arXiv:2402.14740, section 3.2: unbiased for any group. Dr. GRPO's is short by (G - 1) / G."""
    weights = torch.tensor([[0.2, -0.1, 0.4], [0.0] * 3, [0.0] * 3]).requires_grad_()
    exact = -torch.tensor([0.154024, -0.135985, -0.018038])
    pays = torch.tensor([1.0, 0.0, 0.5])
    close(expected_gradient(RLOO(), weights, pays, size=size)[0], exact, atol=1e-6, rtol=0)
    short = expected_gradient(DrGRPO(longest=1), weights, pays, size=size)[0]
    close(short, exact * (size - 1) / size, atol=1e-6, rtol=0)


def test_the_credit_of_a_worked_group():
    weights, arms = torch.zeros(2, 2), torch.tensor([1, 0, 0, 1, 0, 0, 0, 0])
    credit = RLOO().credit(pulled(weights, arms, torch.tensor([0.0, 1.0]), size=8)).advantage[:, 1]
    close(credit, torch.where(arms == 1, 6 / 7, -2 / 7))


def test_the_price_of_divergence_is_summed_over_an_episode_and_paid_in_reward():
    """Episode 0 stands on rows 1 and 3, its siblings 1 and 2 on rows 5 and 2."""
    _, batch = toy_batch()
    paid = ((batch.proximal_logp - batch.reference_logp) * batch.action_mask).sum(1)
    left = {0: 1 - 0.3 * (paid[1] + paid[3]), 1: -0.5 - 0.3 * paid[5], 2: 0.25 - 0.3 * paid[2]}
    found = RLOO(kl=0.3).credit(batch).advantage
    noise = torch.where(batch.action_mask, 0.0, 1.0)
    close(RLOO(kl=0.3).credit(batch.replace(reference_logp=batch.reference_logp + noise)).advantage, found)
    for row in (1, 3):
        close(found[row], (left[0] - (left[1] + left[2]) / 2) * batch.action_mask[row])
    close(found[5], (left[1] - (left[0] + left[2]) / 2) * batch.action_mask[5])


def test_the_loss_and_the_weight_of_a_token_by_hand():
    weights, batch = toy_batch()
    out, credit = forward(weights, batch), RLOO().credit(batch)
    loss = RLOO(truncate=1.5).loss(out, batch, credit)
    mismatch = (batch.proximal_logp - batch.behavior_logp).exp().clamp(max=1.5)
    close(loss.values, -credit.advantage * out.logp * mismatch)
    close(loss.metrics["sampling/importance_sampling_ratio/mean"], mismatch)
    close(RLOO().weights(batch), batch.action_mask / 8)


# -------------------------------------------------------------------------------------------------------------- learns


def test_it_learns_a_bandit_with_three_arms():
    assert batches_until_learned(RLOO()) <= 150


def test_with_a_reference_it_stops_at_the_tilted_reference():
    """k1 in the reward is KL(policy || reference): the optimum is reference * exp(reward / kl), normalised.

    Two arms of reward 1 and 0, uniform reference, kl 1: p = e / (1 + e).
    """
    weights, generator = torch.zeros(2, 2).requires_grad_(), torch.Generator().manual_seed(0)
    for step in range(150):
        batch = bandit(weights, torch.tensor([1.0, 0.0]), groups=4, size=64, generator=generator)
        batch = batch.replace(reference_logp=torch.tensor(0.5).log() * batch.action_mask)
        weights = (weights - 2.0 / (1 + step / 20) * gradient(RLOO(kl=1.0), weights, batch)).detach().requires_grad_()
    close(weights[0].softmax(-1)[0], torch.tensor(1.0).sigmoid(), atol=0.02, rtol=0)


@pytest.mark.parametrize(("settings", "message"), [({"kl": -1.0}, "kl is -1"), ({"truncate": 0}, "truncate is 0")])
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"RLOO's {message}"):
        RLOO(**settings)
