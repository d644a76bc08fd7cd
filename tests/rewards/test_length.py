"""Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 13 and section 3.4: L_max 20480, cache 4096."""

from __future__ import annotations

import pytest

from tropism.rewards.length import soft_overlong


@pytest.mark.parametrize(
    "length, reward",
    [(0, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0), (10**6, -1.0)],
)
def test_the_price_of_length_is_daposs(length, reward):
    assert soft_overlong(length) == reward
