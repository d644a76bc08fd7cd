"""Is a probability as often right as it says?"""

from __future__ import annotations

from torch import Tensor

from tropism.maths.check import same_shape


def expected_calibration_error(confidence: Tensor, right: Tensor, *, bins: int = 10) -> Tensor:
    """Mean distance of confidence and accuracy, bin by bin. Guo et al. 2017, arXiv:1706.04599, eq. 3.

        sum_b n_b / n |accuracy_b - mean confidence_b|        b of equal width over [0, 1]

    Args:
        confidence: [N] in [0, 1]; right: [N] bool. None at all give 0.
    """
    same_shape("expected_calibration_error", confidence=confidence, right=right)
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = confidence.new_zeros(bins).index_add(0, which, right.to(confidence.dtype) - confidence)
    return gap.abs().sum() / max(1, len(confidence))
