import pytest
import torch

from toy import batches_until_learned, expected_gradient, gradient, on_policy, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.methods.grpo import GRPO
from tropism.methods.max_rl import MaxRL
from tropism.methods.rloo import RLOO

close = torch.testing.assert_close
LOGITS = [[0.2, -0.1, 0.4], [0.0] * 3, [0.0] * 3]

# ------------------------------------------------------------------------------------------------------------ identity


def test_for_pairs_of_success_and_failure_it_is_rloo():
    """The lonely success of two is worth (1 - .5) / .5 = 1 to MaxRL and 1 - 0 to RLOO. One token per reply."""
    weights = torch.tensor(LOGITS).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 2, 0, 0]), torch.tensor([1.0, 0.0, 0.0]), size=2)
    close(gradient(MaxRL(), weights, batch), gradient(RLOO(), weights, batch))
    assert gradient(MaxRL(), weights, batch).abs().max() > 0.1
    batch = pulled(weights, torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 0.0]), size=3)
    close(gradient(MaxRL(), weights, batch), 2 * gradient(RLOO(), weights, batch))


def test_it_is_grpo_with_another_divisor():
    weights, batch = toy_batch()
    close(gradient(MaxRL(), weights, batch), gradient(GRPO(scale="mean", average="token"), weights, batch))
    assert (gradient(MaxRL(), weights, batch) - gradient(GRPO(average="token"), weights, batch)).abs().max() > 1e-2


def test_clipping_has_its_limits():
    weights, batch = toy_batch()
    plain = gradient(MaxRL(), weights, batch)
    for settings in ({"clip_low": 0.01}, {"clip_high": 0.01}, {"truncate": 0.5}):
        other = gradient(MaxRL(**settings), weights, batch)
        close(other, gradient(GRPO(scale="mean", average="token", **settings), weights, batch))
        assert (other - plain).abs().max() > 1e-5


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely():
    weights = torch.zeros(4, 4).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 1.0, 0.0, 0.0]), size=4)
    slope = gradient(MaxRL(), weights, batch)[0]
    assert slope[1] < 0 and (slope[[0, 2, 3]] > 0).all()


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("size", [2, 3, 5])
def test_its_expectation_climbs_the_first_terms_of_the_logarithm_of_success(size):
    """arXiv:2602.02710: log p = -sum_k (1 - p)^k / k. Groups of G, silent without a success, give G - 1 terms of it."""
    weights = torch.tensor(LOGITS).requires_grad_()
    p = weights[0].softmax(-1)[0]
    terms = -sum((1 - p) ** k / k for k in range(1, size))
    (slope,) = torch.autograd.grad(terms, weights)
    found = expected_gradient(MaxRL(), weights, torch.tensor([1.0, 0.0, 0.0]), size=size)
    close(found, -slope)


def test_with_many_siblings_a_rare_success_counts_one_over_p_times_as_much():
    """The factor on the gradient of p is (1 - (1 - p)^(G - 1)) / p: 1 for pairs, 1 / p in the limit."""
    weights = torch.tensor([[1.2, 0.0], [0.0, 0.0]]).requires_grad_()  # arm 1 succeeds, p = 0.23
    p = weights[0].softmax(-1)[1].item()
    for size in (2, 10):
        found = expected_gradient(MaxRL(), weights, torch.tensor([0.0, 1.0]), size=size)[0, 1]
        close(-found, torch.tensor((1 - (1 - p) ** (size - 1)) / p * p * (1 - p)))
    assert abs(-found / (1 - p) - 1) < 0.1


def test_the_credit_of_a_worked_group():
    """Two of eight succeed: 0.75 / 0.25 and -1."""
    weights, arms = torch.zeros(2, 2), torch.tensor([1, 0, 0, 1, 0, 0, 0, 0])
    credit = MaxRL().credit(pulled(weights, arms, torch.tensor([0.0, 1.0]), size=8)).advantage[:, 1]
    close(credit, torch.where(arms == 1, 3.0, -1.0))


def test_a_group_without_success_is_silent():
    weights = torch.zeros(2, 2).requires_grad_()
    batch = pulled(weights, torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1.0]), size=2)
    assert (MaxRL().credit(batch).advantage == 0).all()
    below = pulled(weights, torch.tensor([0, 1]), torch.tensor([-2.0, 1.0]), size=2)
    assert (MaxRL().credit(below).advantage == 0).all()


def test_every_token_of_the_batch_counts_the_same():
    _, batch = toy_batch()
    close(MaxRL().weights(batch), batch.action_mask / 25)
    assert MaxRL().needs.sampling == {"siblings"} and MaxRL().needs.measured == {"proximal_logp"}


def test_a_batch_that_the_policy_itself_made_has_no_clipping():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    close(gradient(MaxRL(clip_low=1e-9, clip_high=1e-9), weights, fresh), gradient(MaxRL(), weights, fresh))


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("updates", [1, 4])
def test_it_learns_a_bandit_with_three_arms(updates):
    assert batches_until_learned(MaxRL(), updates=updates) <= 100


@pytest.mark.parametrize(
    ("settings", "message"), [({"clip_low": -0.1}, "clip_low is -0.1"), ({"truncate": 0}, "truncate is 0")]
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"MaxRL's {message}"):
        MaxRL(**settings)
