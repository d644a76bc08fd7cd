import math

import pytest
import torch

from tropism.maths.logp import entropy, log_softmax, placed, predicting

close = torch.testing.assert_close

MASK = torch.tensor([[False, False, True, True], [False, False, True, False]])


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


def test_a_state_speaks_about_the_token_after_it():
    """Row 0 wrote tokens at places 2 and 3, spoken about at 1 and 2; row 1, whose places begin at 4, one at place 2."""
    assert predicting(MASK).tolist() == [1, 2, 5]
    assert predicting(torch.tensor([[False, True, False, True, False]])).tolist() == [0, 2]
    assert predicting(torch.zeros(2, 3, dtype=torch.bool)).tolist() == []


def test_a_row_that_starts_with_an_action_is_refused():
    with pytest.raises(ValueError, match="Give it a context"):
        predicting(torch.tensor([[False, True], [True, True]]))


def test_values_stand_at_their_tokens_and_zero_elsewhere():
    close(placed(torch.tensor([1.0, 2.0, 3.0]), MASK), torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 0.0]]))
    wide = placed(torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]), MASK)
    assert wide.shape == (2, 4, 2) and wide[1, 2].tolist() == [3.0, 6.0] and wide.sum() == 21
