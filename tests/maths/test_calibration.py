import pytest
import torch

from tropism.maths.calibration import expected_calibration_error as error

F64 = torch.float64


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def test_by_hand():
    """Two bins: three at .95 of which two are right, one at .55 that is right: (|2 - 2.85| + |1 - .55|) / 4."""
    found = error(numbers(0.95, 0.95, 0.95, 0.55), torch.tensor([True, True, False, True]))
    assert float(found) == pytest.approx((0.85 + 0.45) / 4)


def test_what_is_as_often_right_as_it_says_has_none_and_certainty_that_is_wrong_has_one():
    assert float(error(numbers(*[0.75] * 4), torch.tensor([True, True, True, False]))) == pytest.approx(0)
    assert float(error(numbers(1.0, 1.0), torch.tensor([False, False]))) == 1
    assert float(error(numbers(), torch.tensor([], dtype=torch.bool))) == 0


def test_one_answer_is_a_whole_sample_and_bins_are_a_tenth_wide_unless_told():
    assert float(error(numbers(0.75), torch.tensor([True]))) == pytest.approx(0.25)
    two = numbers(0.41, 0.49), torch.tensor([True, False])
    assert float(error(*two)) == pytest.approx(0.05)
    assert float(error(*two, bins=20)) == pytest.approx((0.59 + 0.49) / 2)


def test_errors_of_one_bin_cancel_and_of_two_do_not():
    right = torch.tensor([True, False])
    assert float(error(numbers(0.5, 0.5), right)) == pytest.approx(0)
    assert float(error(numbers(0.45, 0.55), right)) == pytest.approx(0.55)
    assert float(error(numbers(0.45, 0.55), right, bins=1)) == pytest.approx(0)


def test_more_numbers_than_answers_are_refused():
    with pytest.raises(ValueError, match="must match"):
        error(numbers(0.5), torch.tensor([True, False]))
