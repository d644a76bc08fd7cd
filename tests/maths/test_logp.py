import math

import pytest
import torch

from tropism.maths.logp import entropy, log_softmax, of_tokens, of_topk, placed, predicting

close = torch.testing.assert_close

TOKENS = torch.tensor([[2, 0, 1, 1], [1, 2, 2, 0]])
MASK = torch.tensor([[False, False, True, True], [False, False, True, False]])


def logits(seed: int = 0, places: int = 2) -> torch.Tensor:
    return torch.randn(2, places, 3, generator=torch.Generator().manual_seed(seed))


def test_log_softmax_by_hand():
    """Logits log 1, log 2, log 5 are probabilities 1/8, 2/8, 5/8; at temperature 1/2 they are 1, 4, 25 over 30."""
    values = torch.tensor([1.0, 2.0, 5.0]).log()
    close(log_softmax(values, 1.0).exp(), torch.tensor([1.0, 2.0, 5.0]) / 8)
    close(log_softmax(values, 0.5).exp(), torch.tensor([1.0, 4.0, 25.0]) / 30)
    close(log_softmax(values + 100, 1.0), log_softmax(values, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_before_it_is_normalised(dtype):
    values = torch.tensor([3.0, -1.0, 0.5], dtype=dtype)
    assert log_softmax(values, 0.7).dtype == torch.float32
    close(log_softmax(values, 0.7), log_softmax(values.float(), 0.7), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_stay(dtype):
    assert log_softmax(torch.zeros(3, dtype=dtype), 1.0).dtype == dtype


def test_entropy_by_hand():
    close(entropy(torch.full((2, 8), 1 / 8).log()), torch.full((2,), math.log(8)))
    close(entropy(torch.tensor([0.5, 0.25, 0.25]).log()), torch.tensor(1.5 * math.log(2)))


def test_a_token_of_probability_zero_adds_nothing_to_the_entropy():
    """Also to its gradient: 0 times minus infinity is not a number."""
    values = torch.tensor([1.0, 2.0, -torch.inf], requires_grad=True)
    found = entropy(log_softmax(values, 1.0))
    close(found, entropy(log_softmax(torch.tensor([1.0, 2.0]), 1.0)))
    (gradient,) = torch.autograd.grad(found, values)
    (without,) = torch.autograd.grad(entropy(log_softmax(values[:2], 1.0)), values)
    close(gradient[:2], without[:2])


def test_positions_are_those_before_a_masked_token_of_any_row():
    assert predicting(MASK).tolist() == [1, 2]
    assert predicting(torch.tensor([[False, True, False, True, False]])).tolist() == [0, 2]
    assert predicting(torch.zeros(2, 3, dtype=torch.bool)).tolist() == []


def test_a_row_that_starts_with_an_action_is_refused():
    with pytest.raises(ValueError, match="Give it a context"):
        predicting(torch.tensor([[False, True], [True, True]]))


def test_the_number_at_a_token_is_about_that_token():
    """Row 0 wrote token 1 at place 2 (spoken at place 1) and token 1 at place 3; row 1 wrote token 2 at place 2."""
    logp = log_softmax(logits(), 1.0)
    found = of_tokens(logp, TOKENS, predicting(MASK), MASK)
    expected = torch.zeros(2, 4)
    expected[0, 2], expected[0, 3], expected[1, 2] = logp[0, 0, 1], logp[0, 1, 1], logp[1, 0, 2]
    close(found, expected, rtol=0, atol=0)


def test_a_gap_between_actions_is_not_shifted_over():
    mask = torch.tensor([[False, True, False, False, True, True]])
    tokens = torch.tensor([[0, 1, 0, 0, 2, 1]])
    logp = log_softmax(logits(1, 3)[:1], 1.0)
    assert predicting(mask).tolist() == [0, 3, 4]
    found = of_tokens(logp, tokens, predicting(mask), mask)
    close(found[0, [1, 4, 5]], logp[0, [0, 1, 2], [1, 2, 1]], rtol=0, atol=0)
    assert (found[0, [0, 2, 3]] == 0).all()


def test_top_k_reads_the_same_places_and_leaves_unused_ones_zero():
    logp = log_softmax(logits(), 1.0)
    ids = torch.full((2, 4, 3), -1)
    ids[0, 2], ids[0, 3], ids[1, 2] = torch.tensor([2, 0, -1]), torch.tensor([1, -1, -1]), torch.tensor([0, 1, 2])
    ids[1, 3] = torch.tensor([0, 1, 2])  # off the mask
    found = of_topk(logp, ids, predicting(MASK), MASK)
    expected = torch.zeros(2, 4, 3)
    expected[0, 2] = torch.tensor([logp[0, 0, 2], logp[0, 0, 0], 0.0])
    expected[0, 3, 0] = logp[0, 1, 1]
    expected[1, 2] = logp[1, 0]
    close(found, expected, rtol=0, atol=0)


def test_every_id_of_top_k_sums_to_probability_one():
    logp = log_softmax(logits(), 1.0)
    found = of_topk(logp, torch.arange(3).expand(2, 4, 3), predicting(MASK), MASK)
    close(found.exp().sum(-1)[MASK], torch.ones(3))


def test_what_is_off_the_mask_is_zero_even_where_it_was_not_finite():
    values = torch.tensor([[1.0, torch.nan], [2.0, torch.inf]])
    mask = torch.tensor([[False, True, False], [False, True, False]])
    close(placed(values, torch.tensor([0, 1]), mask), torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_gradients_agree_with_finite_differences(temperature):
    positions, ids = predicting(MASK), torch.tensor([1, 2, -1]).expand(2, 4, 3)

    def run(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logp = log_softmax(values, temperature)
        spread = placed(entropy(logp), positions, MASK)
        return of_tokens(logp, TOKENS, positions, MASK), of_topk(logp, ids, positions, MASK), spread

    assert torch.autograd.gradcheck(run, (logits().requires_grad_(),))
