"""Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 13 and section 3.4: L_max 20480, cache 4096."""

from __future__ import annotations

import pytest

from tropism.errors import ConfigError
from tropism.rewards import find_scorer
from tropism.rewards.length import Overlong, soft_overlong
from tropism.rewards.score import score
from tropism.types import Rollout, Task, Turn


@pytest.mark.parametrize(
    "length, reward",
    [(0, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0), (10**6, -1.0)],
)
def test_the_price_of_length_is_daposs(length, reward):
    assert soft_overlong(length) == reward


def test_every_reply_pays_for_its_own_length():
    turns = tuple(Turn(context=[0], action=[1] * n) for n in (4, 9, 12))
    name, scorer, _ = find_scorer(Overlong(longest=10, cache=4))
    (done,) = score([Rollout(task=Task(), group=0, turns=turns)], {name: scorer}, {name: 2.0})
    assert [t.reward for t in done.turns] == [0.0, -1.5, -2.0] and done.rewards == {"overlong": -1.75}


@pytest.mark.parametrize("longest, cache", [(10, 0), (10, 11), (0, 0)])
def test_a_price_without_room_to_grow_is_refused(longest, cache):
    with pytest.raises(ConfigError, match="0 < cache <= longest"):
        Overlong(longest=longest, cache=cache)
