"""Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 13 and section 3.4: L_max 20480, cache 4096."""

from __future__ import annotations

import pytest

from small import rollout, turn
from tropism.envs import open_source
from tropism.recipe import resolve
from tropism.rewards import find_scorer
from tropism.rewards.length import overlong_price, soft_overlong
from tropism.training.scoring import scoring
from tropism.types import Stop


@pytest.mark.parametrize(
    "length, reward",
    [(0, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0), (10**6, -1.0)],
)
def test_the_price_of_length_is_daposs(length, reward):
    assert overlong_price(length) == reward


def test_an_answer_without_its_end_pays_by_its_last_reply():
    name, scorer, _ = find_scorer("unfinished")
    done, cut = turn([1], [2]), turn([1, 2], [3], stop=Stop.truncated)
    assert name == "unfinished"
    assert scorer([rollout(done), rollout(done, cut), rollout(cut, done)]) == [
        {"unfinished": 0.0},
        {"unfinished": 1.0},
        {"unfinished": 0.0},
    ]


def test_every_reply_pays_for_the_last_fifth_before_the_limit():
    cut = rollout(turn([1], [2] * 10), turn([1], [2] * 8), turn([1], [2] * 9))
    assert soft_overlong([cut], max_tokens=10) == [{"soft_overlong": [-1.0, 0.0, -0.5]}]
    assert soft_overlong([rollout(turn([1], [2]))], max_tokens=1) == [{"soft_overlong": [-1.0]}]


def test_a_recipe_names_it_and_its_limit_is_that_of_the_recipe():
    recipe = {"method": "dapo", "env": "tictactoe", "rewards": {"win": 1, "soft_overlong": 1}}
    (stage,) = resolve(recipe | {"sampling": {"max_tokens": 10}}).stages
    score = scoring(stage, stage.env, open_source("tictactoe", {}, split="train", seed=0))
    (scored,) = score([rollout(turn([1], [2] * 9))])
    assert scored.failure is None and scored.rewards["soft_overlong"] == scored.reward == -0.5
