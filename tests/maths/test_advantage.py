import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tropism.maths.advantage import group_relative, leave_one_out

close = torch.testing.assert_close
SCALES = ("none", "std", "sample_std", "batch_std", "mean")


def siblings(*rewards):
    """One group, one row per episode."""
    return torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.long), torch.arange(len(rewards))


# ----------------------------------------------------------------------------------------------------- group statistics


@pytest.mark.parametrize(
    ("advantage", "success", "failure"),
    [
        (leave_one_out, 6 / 7, -2 / 7),
        (lambda *a: group_relative(*a, scale="none"), 0.75, -0.25),
        (lambda *a: group_relative(*a, scale="sample_std", eps=1e-4), 1.61984, -0.53995),
        (lambda *a: group_relative(*a, scale="sample_std", eps=1e-6), 1.62018, -0.54006),
        (lambda *a: group_relative(*a, scale="std", eps=0.0), 1.73205, -0.57735),
        (lambda *a: group_relative(*a, scale="mean"), 3.0, -1.0),
        (lambda *a: group_relative(*a, scale="batch_std", eps=0.0), 1.62019, -0.54006),
    ],
    ids=["RLOO", "Dr. GRPO", "TRL", "verl", "population", "MaxRL", "batch"],
)
def test_one_group_has_a_different_advantage_under_every_convention(advantage, success, failure):
    found = advantage(*siblings(1.0, 0, 0, 1, 0, 0, 0, 0))
    expected = torch.tensor([success if i in (0, 3) else failure for i in range(8)])
    close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wins", "plus", "minus"), [(1, 2.646, -0.378), (2, 1.732, -0.577), (4, 1, -1), (6, 0.577, -1.732)]
)
def test_with_binary_rewards_the_advantage_is_a_function_of_the_success_rate(wins, plus, minus):
    """A+ = sqrt((1 - p) / p), A- = -sqrt(p / (1 - p)), mean |A| = 2 sqrt(p (1 - p)); the docstring's last column."""
    p = wins / 8
    rewards = siblings(*[1.0] * wins, *[0.0] * (8 - wins))
    found = group_relative(*rewards, eps=0.0)
    close(found[0], torch.tensor(math.sqrt((1 - p) / p)))
    close(found[-1], torch.tensor(-math.sqrt(p / (1 - p))))
    close(found[[0, -1]], torch.tensor([plus, minus], dtype=torch.float64), atol=5e-4, rtol=0)
    close(found.abs().mean(), torch.tensor(2 * math.sqrt(p * (1 - p))))
    close(group_relative(*rewards, scale="none")[0], torch.tensor(1 - p))
    close(group_relative(*rewards, scale="mean")[0], torch.tensor((1 - p) / p))
    close(group_relative(*rewards, scale="sample_std", eps=0.0)[0], torch.tensor(math.sqrt((1 - p) / p * 7 / 8)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.0, -0.7, 1e6 + 0.1])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_group_of_equal_rewards_says_exactly_nothing(scale, dtype, value, size):
    """Rounding leaves mean(0.1, 0.1, 0.1) - 0.1 = 1e-17; divided by a std of the same size it would be a signal."""
    rewards = siblings(*[value] * size)
    assert (group_relative(rewards[0].to(dtype), *rewards[1:], scale=scale) == 0).all()
    assert (leave_one_out(rewards[0].to(dtype), *rewards[1:]) == 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_an_episode_counts_once_however_many_rows_it_has(scale):
    reward, group = torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0]), torch.tensor([4, 4, 4, 9, 9])
    rows = torch.tensor([2, 0, 3, 0, 1, 4, 0])
    plain = group_relative(reward, group, torch.arange(5), scale=scale)
    assert plain.abs().min() < plain.abs().max()
    close(group_relative(reward[rows], group[rows], rows + 10, scale=scale), plain[rows])
    close(leave_one_out(reward[rows], group[rows], rows + 10), leave_one_out(reward, group, torch.arange(5))[rows])


@pytest.mark.parametrize("scale", ["none", "std", "sample_std", "mean"])
def test_unequal_groups_are_as_if_each_were_alone(scale):
    reward, group = torch.tensor([1.0, 5.0, 0.0, 2.0, 7.0, 1.0]), torch.tensor([3, 8, 3, 8, 1, 3])
    together = group_relative(reward, group, torch.arange(6), scale=scale)
    for number in (3, 8, 1):
        alone = group_relative(*siblings(*reward[group == number].tolist()), scale=scale)
        close(together[group == number], alone)


def test_scaling_by_the_batch_uses_one_standard_deviation_for_all_groups():
    """Of all rewards about their common mean, the sample value (Lite PPO, arXiv:2508.08221)."""
    reward, group = torch.tensor([1.0, 0.0, 5.0, 4.0]), torch.tensor([0, 0, 1, 1])
    found = group_relative(reward, group, torch.arange(4), scale="batch_std", eps=0.5)
    close(found, torch.tensor([0.5, -0.5, 0.5, -0.5]) / (math.sqrt(17 / 3) + 0.5))
    close(group_relative(*siblings(0.0, 1.0), scale="batch_std", eps=0.0), torch.tensor([-1, 1]) * math.sqrt(0.5))


def test_scaling_by_the_mean_is_silent_where_the_mean_is_not_positive():
    assert group_relative(*siblings(-1.0, 1.0), scale="mean").tolist() == [0, 0]
    assert group_relative(*siblings(-3.0, 1.0), scale="mean").tolist() == [0, 0]
    close(group_relative(*siblings(-1.0, 2.0), scale="mean"), torch.tensor([-3.0, 3.0]))


def test_eps_is_added_to_the_standard_deviation():
    close(group_relative(*siblings(1.0, 3.0), eps=1.0), torch.tensor([-0.5, 0.5]))
    close(group_relative(*siblings(1.0, 3.0), scale="sample_std", eps=1.0), torch.tensor([-1, 1]) / (math.sqrt(2) + 1))


def test_the_default_is_the_population_standard_deviation_and_a_millionth():
    found = group_relative(*siblings(0.0, 2e-6))
    close(found, torch.tensor([-0.5, 0.5]), atol=1e-9, rtol=0)


def test_group_statistics_refuse_to_broadcast():
    with pytest.raises(ValueError, match="group statistics: `reward` is"):
        group_relative(torch.zeros(3), torch.zeros(2, dtype=torch.long), torch.arange(3))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 3)), min_size=1, max_size=12))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(rows):
    reward = torch.tensor([r for r, _ in rows], dtype=torch.float64)
    group = torch.tensor([g for _, g in rows])
    for found in (
        group_relative(reward, group, torch.arange(len(rows))),
        leave_one_out(reward, group, torch.arange(len(rows))),
    ):
        for number in group.unique():
            mine = group == number
            assert abs(found[mine].sum()) < 1e-9
            assert (found[mine][reward[mine].argsort()].diff() >= -1e-12).all()


# --------------------------------------------------------------------------------------------------- exact expectations


LOGITS = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
PAYS = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
GRADIENT = torch.tensor([0.154024, -0.135985, -0.018038], dtype=torch.float64)


def expected_gradient(advantage, size):
    """Of mean_i A_i grad log p(y_i), over every tuple of `size` answers of a three-armed softmax."""
    p = LOGITS.softmax(-1)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=size)))
    group = torch.arange(len(tuples))[:, None].expand(-1, size).flatten()
    credit = advantage(PAYS[tuples].flatten(), group, torch.arange(tuples.numel())).reshape(tuples.shape)
    score = torch.eye(3)[tuples] - p
    return (p[tuples].prod(1)[:, None] * (credit[..., None] * score).mean(1)).sum(0)


def test_the_oracle_itself_is_the_gradient_of_expected_reward():
    logits = LOGITS.clone().requires_grad_()
    value = (logits.softmax(-1) * PAYS).sum()
    close(value.detach(), torch.tensor(0.543748), atol=1e-6, rtol=0)
    close(torch.autograd.grad(value, logits)[0], GRADIENT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_leave_one_out_is_unbiased_and_plain_centring_is_short_by_g_minus_1_over_g(size):
    """Ahmadian et al. 2024, arXiv:2402.14740: only the others' rewards make an independent baseline."""
    close(expected_gradient(leave_one_out, size), GRADIENT, atol=1e-6, rtol=0)
    centred = expected_gradient(lambda *a: group_relative(*a, scale="none"), size)
    close(centred, GRADIENT * (size - 1) / size, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "expected"), [(2, (0.158088, -0.132585, -0.025503)), (4, (0.292493, -0.244092, -0.048401))]
)
def test_dividing_by_the_standard_deviation_changes_the_direction(size, expected):
    """GRPO's expected gradient is not along that of the expected reward (arXiv:2503.20783, section 3.1)."""
    found = expected_gradient(lambda *a: group_relative(*a, scale="sample_std", eps=1e-4), size)
    close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    assert torch.cosine_similarity(found, GRADIENT, dim=0) < 0.9995
