"""GDPO against Liu et al. 2026, arXiv:2601.05242, and against TRL's normalisation of rewards before their sum."""

import pytest
import torch

from toy import batches_until_learned, gradient, parted, pulled, table, toy_batch
from tropism.methods.gdpo import GDPO
from tropism.methods.grpo import GRPO

close = torch.testing.assert_close
F64 = torch.float64


def advantages(method, batch):
    return method.credit(batch).advantage.sum(1)


def test_with_one_part_it_is_grpo_times_one_number():
    batch = parted([[0.0], [1.0], [1.0], [3.0], [0.0], [0.0], [2.0], [2.0]], [1.0])
    ours, theirs = advantages(GDPO(), batch), advantages(GRPO(), batch)
    close(ours, theirs * (ours / theirs)[0], atol=1e-5, rtol=1e-5)


def test_its_loss_is_grpos():
    weights, batch = toy_batch()
    batch = batch.replace(weighted={"all": 1.0}, parts=batch.reward[:, None])
    ours, theirs = gradient(GDPO(), weights, batch), gradient(GRPO(), weights, batch)
    close(ours, theirs * (ours.norm() / theirs.norm()))
    assert vars(GDPO()) == {name: vars(GRPO())[name] for name in vars(GDPO())}


def test_by_hand():
    """Both parts -1 and 1 among four siblings: sums -2, 0, 0, 2 over their deviation, the root of 8 / 3."""
    found = advantages(GDPO(eps=1e-9), parted([[0, 0], [0, 1], [1, 0], [1, 1]], [1.0, 1.0]))
    close(found, torch.tensor([-2.0, 0.0, 0.0, 2.0], dtype=F64) / (8 / 3) ** 0.5)


def test_what_a_sum_confuses_the_parts_tell_apart():
    """Rewards (0, 1) or (0, 2) against (0, 0): of one group GRPO makes the same of both. Sec. 3."""
    one, two = parted([[0, 1], [0, 0]], [1.0, 1.0], size=2), parted([[1, 1], [0, 0]], [1.0, 1.0], size=2)
    close(advantages(GRPO(), one), advantages(GRPO(), two), atol=1e-5, rtol=0)
    both = parted([[0, 1], [0, 0], [1, 1], [0, 0]], [1.0, 1.0], size=2)
    once, _, twice, _ = advantages(GDPO(), both)
    close(twice, 2 * once, atol=1e-5, rtol=1e-5)


def test_a_part_of_small_spread_counts_by_its_weight():
    small = [[0.0, 0.00], [10.0, 0.00], [0.0, 0.01], [10.0, 0.01]]
    found = advantages(GDPO(eps=1e-12), parted(small, [1.0, 3.0]))
    close(found[2] - found[0], 3 * (found[1] - found[0]))
    drowned = advantages(GRPO(), parted(small, [1.0, 3.0]))
    assert drowned[2] - drowned[0] < 0.01 * (drowned[1] - drowned[0])


def test_a_negative_weight_turns_a_part_round():
    found = advantages(GDPO(), parted([[0.0], [1.0]], [-1.0], size=2))
    assert found[0] > 0 > found[1]


def test_it_is_brought_to_mean_0_and_deviation_1_over_episodes():
    _, batch = toy_batch()
    credit, first = GDPO().credit(batch).advantage, torch.tensor([1, 2, 4, 5, 6, 7, 8, 0])
    once = torch.stack([credit[row][batch.action_mask[row]][0] for row in first])
    close(once.mean(), torch.tensor(0.0, dtype=F64), atol=1e-6, rtol=0)
    close(once.std(), torch.tensor(1.0, dtype=F64), atol=1e-5, rtol=0)


def test_a_part_that_does_not_apply_to_a_sibling_compares_the_others():
    nan = float("nan")
    some = parted([[0, nan], [1, 1], [2, 3], [3, nan]], [1.0, 1.0])
    apart = parted([[0, 2], [1, 1], [2, 3], [3, 2]], [1.0, 1.0])  # two at the mean of the others add nothing
    found = advantages(GDPO(scale="none", eps=1e-9), some)
    close(found, advantages(GDPO(scale="none", eps=1e-9), apart))


def test_parts_that_cancel_earn_nothing():
    """In float32 their sum is rounding, which the batch's deviation would make as large as any signal."""
    part = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    batch = parted([[0.0, 0.0, 0.0]] * 16, [0.5, 0.5, 1.0])
    parts = torch.stack([part, 1 - part, 0 * part], 1)
    assert (GDPO().credit(batch.replace(parts=parts, reward=0 * part)).advantage == 0).all()


def test_small_rewards_are_no_rounding():
    batch = parted([[0.0, 0.0], [1e-6, 0.0], [0.0, 1e-6], [1e-6, 1e-6]], [1.0, 1.0])
    found = advantages(GDPO(scale="none", eps=1e-12), batch)
    close(found, torch.tensor([-2.0, 0.0, 0.0, 2.0], dtype=F64) / (8 / 3) ** 0.5, atol=1e-4, rtol=0)


def test_parts_that_say_nothing_earn_nothing():
    assert (advantages(GDPO(), parted([[1, 2]] * 4, [1.0, 1.0])) == 0).all()


def test_one_step_follows_the_parts():
    weights = table()
    arms, reward = torch.tensor([0, 1, 1, 2]), torch.tensor([0.0, 1.0, 0.5, 0.0, 0.0, 0.0], dtype=F64)
    slope = gradient(GDPO(), weights, pulled(weights, arms, reward, size=4))
    assert slope[0, 1] < 0 < slope[0, 0]


@pytest.mark.parametrize("updates", [1, 3])
def test_it_learns_a_bandit_with_three_arms(updates):
    assert batches_until_learned(GDPO(), updates=updates) <= 80
