import math

import pytest
import torch

from tropism.maths.value import clipped_value_loss

close = torch.testing.assert_close


def value_loss(value, old, target, clip=0.2):
    value = torch.tensor([[value]], requires_grad=True)
    loss, clipped = clipped_value_loss(value, torch.tensor([[old]]), torch.tensor([[target]]), clip=clip)
    return float(loss.detach()), float(torch.autograd.grad(loss.sum(), value)[0]), bool(clipped)


@pytest.mark.parametrize(
    ("value", "loss", "slope", "clipped"),
    [
        (0.5, 0.125, -0.5, False),  # where the batch was made
        (0.6, 0.08, -0.4, False),  # within reach of it
        (0.9, 0.045, 0.0, True),  # further towards the target: as if it stood at 0.7
        (1.5, 0.125, 0.5, False),  # beyond it, and by more than 0.7 is short of it: pulled back
        (1.2, 0.045, 0.0, True),  # beyond it by less: left alone
        (0.1, 0.405, -0.9, False),  # away from it: pulled back, however far
        (-3.0, 8.0, -4.0, False),
    ],
)
def test_the_loss_and_its_slope_by_hand(value, loss, slope, clipped):
    """Engstrom et al. 2020, arXiv:2005.12729, section 3: old value 0.5, target 1, clip 0.2; so 0.3 off at best."""
    assert value_loss(value, 0.5, 1.0) == pytest.approx((loss, slope, clipped))


@pytest.mark.parametrize("value", [-2.0, 0.5, 0.9, 1.2, 5.0])
def test_without_a_clip_it_is_half_the_squared_error(value):
    """Schulman et al. 2017, arXiv:1707.06347, eq. 9."""
    assert value_loss(value, 0.5, 1.0, math.inf) == pytest.approx(((value - 1) ** 2 / 2, value - 1, False))


def test_it_is_never_below_half_the_squared_error():
    generator = torch.Generator().manual_seed(0)
    value, old, target = (torch.randn(50, 4, generator=generator) for _ in range(3))
    loss, clipped = clipped_value_loss(value, old, target, clip=0.3)
    plain = (value - target).square() / 2
    assert (loss >= plain).all() and 0 < clipped.sum() < clipped.numel()
    close(loss[~clipped], plain[~clipped])
    assert (loss[clipped] > plain[clipped]).all()


def test_where_it_says_clipped_the_gradient_is_zero_and_elsewhere_it_is_that_of_the_error():
    generator = torch.Generator().manual_seed(1)
    value, old, target = (torch.randn(50, 4, generator=generator) for _ in range(3))
    value.requires_grad_()
    loss, clipped = clipped_value_loss(value, old, target, clip=0.3)
    (slope,) = torch.autograd.grad(loss.sum(), value)
    close(slope, torch.where(clipped, 0.0, value.detach() - target))


def test_it_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"clipped_value_loss: `target` is \[2\]"):
        clipped_value_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2), clip=0.2)
