"""What a critic minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.maths.check import same_shape


def clipped_value_loss(value: Tensor, proximal_value: Tensor, target: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic squared error. Engstrom et al. 2020, arXiv:2005.12729, section 3.

        L_t = max((V_t - G_t)^2, (V'_t + clamp(V_t - V'_t, -clip, clip) - G_t)^2) / 2

    V' is the critic that made the target. At V = V' the gradient is V - G. It vanishes once V has moved by more than
    `clip` towards G, so a rollout batch moves a value by about `clip` at most; V further from G than V' was is always
    pulled back. An infinite clip is the plain squared error (Schulman et al. 2017, arXiv:1707.06347, eq. 9).

    Args:
        value: [N, T] carries the gradient.
        proximal_value, target: [N, T] no gradient.

    Returns:
        (loss [N, T], clipped [N, T] bool: where the gradient is zero).
    """
    same_shape("clipped_value_loss", value=value, proximal_value=proximal_value, target=target)
    near = proximal_value + (value - proximal_value).clamp(-clip, clip)
    free, bounded = (value - target).square(), (near - target).square()
    return torch.maximum(free, bounded) / 2, bounded > free
