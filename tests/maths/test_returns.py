import math

import pytest
import torch

from tropism.maths.returns import chains, gae, rewards_to_go, turn_starts, turn_sum, whiten

close = torch.testing.assert_close


# -------------------------------------------------------------------------------------------------------------- GAE


def one_row(reward, value):
    mask, zero = torch.ones(1, len(reward), dtype=torch.bool), torch.zeros(1)
    return torch.tensor([reward]), torch.tensor([value]), mask, zero.long(), mask.long() - 1, zero, zero.bool()


@pytest.mark.parametrize(
    ("discount", "trace", "advantage", "target"),
    [
        (1, 1, (0.8, 0.6, 0.4), (1, 1, 1)),
        (1, 0.95, (0.751, 0.58, 0.4), (0.951, 0.98, 1)),
        (0.99, 0.95, (0.7322731, 0.5702, 0.4), (0.9322731, 0.9702, 1)),
        (1, 0, (0.2, 0.2, 0.4), (0.4, 0.6, 1)),
    ],
)
def test_gae_by_hand(discount, trace, advantage, target):
    """arXiv:1506.02438, eq. 16: trace 1 is the return minus the value, trace 0 the TD error."""
    found = gae(*one_row([0.0, 0.0, 1.0], [0.2, 0.4, 0.6]), discount=discount, trace=trace)
    close(found[0][0], torch.tensor(advantage, dtype=torch.float64), atol=1e-9, rtol=0)
    close(found[1][0], torch.tensor(target, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_truncated_episode_goes_on_with_the_value_after_its_last_token():
    reward, value, mask, episode, turn, _, _ = one_row([0.0, 1.0], [0.5, 0.25])
    last, cut = torch.tensor([2.0]), torch.tensor([True])
    found, _ = gae(reward, value, mask, episode, turn, last, cut, discount=0.5, trace=1.0)
    close(found[0], torch.tensor([0.5 * (1 + 0.5 * 2) - 0.5, 1 + 0.5 * 2 - 0.25]))
    finished, _ = gae(reward, value, mask, episode, turn, last, ~cut, discount=0.5, trace=1.0)
    close(finished[0], torch.tensor([0.5 - 0.5, 1 - 0.25]))


GENERATOR = torch.Generator().manual_seed(3)


def scattered():
    """Episode 8 chose five tokens: turn 0 on row 2, turn 1 on row 0, turn 2 on row 0; episode 3 two, on row 1."""
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    turn = torch.tensor([[-1, 1, -1, 2, 2, -1], [0, -1, -1, -1, 1, -1], [-1, -1, 0, 0, -1, -1]])
    reward = torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64) * mask
    value = torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64)
    last = torch.tensor([5.0, 7.0, 11.0], dtype=torch.float64)
    order = {8: [(2, 2), (2, 3), (0, 1), (0, 3), (0, 4)], 3: [(1, 0), (1, 4)]}
    return reward, value, mask, torch.tensor([8, 3, 8]), turn, last, torch.tensor([True, False, True]), order


def test_gae_runs_along_turns_across_rows_and_skips_what_the_policy_did_not_write():
    *fields, order = scattered()
    reward, value, mask, *_ = fields
    advantage, target = gae(*fields, discount=0.9, trace=0.8)
    for episode, places in order.items():
        carry, following = 0.0, 5.0 if episode == 8 else 0.0  # row 0 holds the last token of episode 8
        for place in reversed(places):
            carry = reward[place] + 0.9 * following - value[place] + 0.9 * 0.8 * carry
            following = value[place]
            close(advantage[place], carry)
            close(target[place], carry + value[place])
    assert (advantage[~mask] == 0).all() and (target[~mask] == 0).all()


def test_rewards_to_go_are_the_return_from_each_token_on():
    reward, _, mask, episode, turn, _, _, order = scattered()
    found = rewards_to_go(reward, mask, episode, turn, discount=0.9)
    for places in order.values():
        for i, place in enumerate(places):
            close(found[place], sum(0.9**k * reward[later] for k, later in enumerate(places[i:])))
    assert (found[~mask] == 0).all()


def test_order_of_rows_does_not_matter():
    *fields, _ = scattered()
    shuffled = [field[[1, 2, 0]] for field in fields]
    for plain, found in zip(
        gae(*fields, discount=0.9, trace=0.8), gae(*shuffled, discount=0.9, trace=0.8), strict=True
    ):
        close(found, plain[[1, 2, 0]])


def test_chains_list_an_episodes_tokens_in_the_order_they_were_chosen():
    _, _, mask, episode, turn, *_ = scattered()
    assert chains(mask, episode, turn).tolist() == [[-1, -1, -1, 6, 10], [14, 15, 1, 3, 4]]


def test_a_batch_without_action_tokens_gives_zeros():
    reward, value, mask, *rest, _ = scattered()
    for found in gae(reward, value, mask & False, *rest, discount=0.9, trace=0.8):
        assert found.tolist() == [[0] * 6] * 3


def test_gae_refuses_to_broadcast():
    reward, value, *rest, _ = scattered()
    with pytest.raises(ValueError, match=r"gae: .* `value` is"):
        gae(reward, value[:, :1], *rest, discount=1.0, trace=1.0)


# --------------------------------------------------------------------------------------------------- turns, whitening


TURN = torch.tensor([[-1, 1, 1, -1, 2, -1], [0, 0, 1, 2, 2, -1], [-1, -1, 0, -1, 0, 0]])
"""One episode on rows 2 and 0, another on row 1, whose turns touch; a turn may have a gap."""


def test_a_turn_starts_at_its_first_action_token():
    found = turn_starts(TURN).nonzero().tolist()
    assert found == [[0, 1], [0, 4], [1, 0], [1, 2], [1, 3], [2, 2]]
    assert not turn_starts(TURN * 0 - 1).any() and turn_starts(TURN[:0]).shape == (0, 6)


def test_the_sum_of_a_turn_is_told_to_each_of_its_tokens_and_to_nothing_else():
    values = torch.arange(18.0).reshape(3, 6)
    found = turn_sum(values, TURN)
    assert found.tolist() == [[0, 3, 3, 0, 4, 0], [13, 13, 8, 19, 19, 0], [0, 0, 47, 0, 47, 47]]
    close(turn_sum(torch.where(TURN < 0, 1e9, values), TURN), found)


def test_gae_of_turns_by_hand():
    """The tokens of a turn are one action: its reward stands on its first token, and its last one says nothing of V."""
    *fields, _ = scattered()
    reward, value, mask, episode, turn, last, truncated = fields
    starts = turn_starts(turn)
    found, target = gae(turn_sum(reward, turn), value, starts, episode, turn, last, truncated, discount=0.9, trace=0.8)
    after, carry = 5.0, 0.0  # episode 8 was cut off after row 0
    for places in ([(0, 3), (0, 4)], [(0, 1)], [(2, 2), (2, 3)]):
        earned, first = sum(reward[place] for place in places), value[places[0]]
        carry = earned + 0.9 * after - first + 0.9 * 0.8 * carry
        after = first
        close(found[places[0]], carry)
        close(target[places[0]], carry + first)
        close(turn_sum(found, turn)[places[-1]], carry)
    close(found[1, 4], reward[1, 4] - value[1, 4])
    assert (found[~starts] == 0).all() and (target[~starts] == 0).all() and starts.sum() == 5 < mask.sum()


def test_whitened_numbers_have_mean_zero_and_standard_deviation_one_over_the_mask():
    values, mask = torch.tensor([[1.0, 9.0, 3.0], [5.0, 7.0, -40.0]]), torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    found = whiten(values, mask)
    close(found, torch.tensor([[-3.0, 0, -1], [1, 3, 0]]) / math.sqrt(20 / 3))
    close(whiten(100 * values + 7, mask), found)
    close(whiten(values, mask, eps=math.sqrt(20 / 3)), found / 2)
    pair = torch.tensor([0.0, 1.0])
    close(whiten(pair, pair >= 0), torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    tiny = math.sqrt(2) * 1e-8 * pair.double()  # its standard deviation is the 1e-8 that is added
    close(whiten(tiny, pair >= 0), torch.tensor([-1.0, 1.0]).double() / math.sqrt(8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -0.7, 1e6 + 0.1])
def test_whitening_makes_no_signal_of_equal_numbers(dtype, value):
    values = torch.full((3, 3), value, dtype=dtype)
    for count in (0, 1, 7):
        mask = torch.arange(9).reshape(3, 3) < count
        assert (whiten(values, mask) == 0).all()
