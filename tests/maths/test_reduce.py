import pytest
import torch

from tropism.maths.reduce import (
    answer_mean,
    certainty,
    chosen_minus_rejected,
    constant_mean,
    first_row,
    highest,
    last_action,
    sequence_mean,
    speaking,
    spread,
    sum_by,
    token_mean,
)

close = torch.testing.assert_close

# Two answers of 5 and 10 tokens; token losses 1, 1, 1, 1, 10 and nine times 1, then 10.
LOSS = torch.tensor([[1.0] * 4 + [10.0] + [0.0] * 5, [1.0] * 9 + [10.0]], dtype=torch.float64)
MASK = torch.tensor([[True] * 5 + [False] * 5, [True] * 10])
TWO = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("weights", "value", "of_ten_in_short", "of_ten_in_long"),
    [
        (lambda: sequence_mean(MASK, TWO), 2.35, 1 / 10, 1 / 20),
        (lambda: token_mean(MASK), 2.2, 1 / 15, 1 / 15),
        (lambda: constant_mean(MASK, TWO, longest=10), 1.65, 1 / 20, 1 / 20),
        (lambda: constant_mean(MASK, TWO, longest=1), 16.5, 1 / 2, 1 / 2),
    ],
    ids=["mean of sequence means", "token mean", "over a constant length", "mean of sums"],
)
def test_one_batch_has_a_different_loss_under_every_average(weights, value, of_ten_in_short, of_ten_in_long):
    """GRPO, DAPO and Dr. GRPO disagree about what counts the same (arXiv:2503.20783, section 3)."""
    found = weights()
    close((LOSS * found).sum(), torch.tensor(value))
    close(found[0, 4], torch.tensor(of_ten_in_short))
    close(found[1, 9], torch.tensor(of_ten_in_long))
    assert (found[~MASK] == 0).all()


def test_an_episode_counts_once_however_many_rows_it_has():
    """Rows 0 and 2 are one episode of 1 + 3 tokens, row 1 another of 2."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    found = sequence_mean(mask, torch.tensor([7, 2, 7]))
    close(found, torch.tensor([[1 / 8, 0, 0], [1 / 4, 1 / 4, 0], [1 / 8, 1 / 8, 1 / 8]]))
    close(constant_mean(mask, torch.tensor([7, 2, 7]), longest=4), mask / 8)


def test_rows_and_episodes_without_action_tokens_do_not_count():
    mask = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 0]], dtype=torch.bool)
    episode = torch.tensor([0, 1, 1, 2])
    close(sequence_mean(mask, episode), torch.tensor([[0, 0], [1 / 4, 1 / 4], [0, 0], [1 / 2, 0]]))
    close(constant_mean(mask, episode, longest=2), mask / 4)
    close(token_mean(mask), mask / 3)
    close(token_mean(mask[3:]), torch.tensor([[1.0, 0.0]]))


def test_an_empty_mask_gives_zeros_and_no_nan():
    mask, episode = torch.zeros(3, 2, dtype=torch.bool), torch.tensor([0, 0, 1])
    for found in (token_mean(mask), sequence_mean(mask, episode), constant_mean(mask, episode, longest=2)):
        assert found.tolist() == [[0, 0]] * 3
    nothing, nobody = torch.zeros(0, 2, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    for found in (token_mean(nothing), sequence_mean(nothing, nobody), constant_mean(nothing, nobody, longest=2)):
        assert found.shape == (0, 2)


def test_the_weights_of_a_mean_sum_to_one():
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    for found in (token_mean(mask), sequence_mean(mask, torch.tensor([0, 1, 0, 2, 1, 3]))):
        close(found.sum(), torch.tensor(1.0))


def test_spread_puts_a_row_number_on_its_masked_tokens_only():
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert spread(torch.tensor([2.0, -3.0]), mask).tolist() == [[0, 2, 2], [-3, 0, 0]]
    with pytest.raises(ValueError, match="spread: `per_row` is"):
        spread(torch.tensor([1.0, 2.0, 3.0]), mask)


def test_rows_are_summed_by_id_and_told_to_each():
    assert sum_by(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([9, -1, 9, 3])).tolist() == [5, 2, 5, 8]


def test_one_row_of_each_episode_is_marked():
    assert first_row(torch.tensor([5, 2, 5, 5, 9, 2])).tolist() == [True, True, False, False, True, False]


def test_episodes_that_spoke_are_counted_and_never_zero():
    assert speaking(torch.tensor([0, 3, 1, 1]), torch.tensor([0, 1, 1, 2])) == 2
    assert speaking(torch.tensor([0, 0]), torch.tensor([0, 1])) == 1


def test_certainty_weighs_low_entropy_more_and_has_mean_one():
    """exp(-1 / 2) / ((1 + exp(-1 / 2)) / 2) for 1 nat against 0 at caution 1 / 2."""
    entropy, mask = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[True, True, False]])
    low = torch.tensor(-0.5).exp()
    expected = torch.stack([2 / (1 + low), 2 * low / (1 + low), torch.tensor(0.0)])
    torch.testing.assert_close(certainty(entropy, mask, caution=0.5)[0], expected)
    torch.testing.assert_close(certainty(entropy + 900, mask, caution=0.5)[0], expected)
    assert (certainty(entropy, mask & False, caution=0.5) == 0).all()


def test_the_highest_share_is_one_of_the_masked_tokens_and_ties_are_kept():
    values = torch.tensor([[0.1, 1.2, 0.6, 0.05], [0.9, 0.3, 9.0, 9.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert highest(values, mask, share=0.5).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert highest(values, mask, share=1.0).equal(mask) and highest(values * 0, mask, share=0.1).equal(mask)
    assert highest(values, mask, share=0.01).sum() == 1
    assert not highest(values, mask & False, share=0.5).any()


def test_the_last_action_of_each_row_is_marked_and_nothing_else():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]).bool()
    marked = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(last_action(mask), marked)


def test_an_answer_counts_once_by_its_last_token_and_only_where_it_is_to_count():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    rows = torch.tensor([True, False, True, True])
    close(answer_mean(mask, rows), torch.tensor([[0, 0, 0.5, 0], [0] * 4, [0, 0, 0.5, 0], [0] * 4]))
    close(answer_mean(mask[:1], rows[:1]), torch.tensor([[0, 0, 1.0, 0]]))
    assert (answer_mean(mask, rows & False) == 0).all() and (answer_mean(mask[3:], rows[3:]) == 0).all()


def test_a_pair_s_difference_is_told_to_both_rows_in_any_order():
    values, chosen = torch.tensor([5.0, 1.0, 2.0, 9.0]), torch.tensor([True, False, True, False])
    assert chosen_minus_rejected(values, chosen, torch.tensor([7, 3, 3, 7])).tolist() == [-4, 1, 1, -4]


@pytest.mark.parametrize(
    ("chosen", "group"),
    [
        ([True, True], [0, 0]),
        ([False, False], [0, 0]),
        ([True, False], [0, 1]),
        ([True, False, False], [0, 0, 0]),
        ([True, False, True, True], [0, 0, 1, 1]),
        ([True, False, True], [0, 0, 1]),
    ],
)
def test_what_is_not_a_pair_is_refused(chosen, group):
    with pytest.raises(ValueError, match="a pair is one chosen and one rejected"):
        chosen_minus_rejected(torch.ones(len(group)), torch.tensor(chosen), torch.tensor(group))
