"""An ensemble of reward models: its three combinations by hand, their order, and what it does with nonsense."""

import math
import random

import pytest

from small import rollout, turn
from tropism.errors import ConfigError
from tropism.signals.reward_model import PART, POOLS, SPREAD, Ensemble, by_steps, scales_of, whole
from tropism.types import Failure, Stop

ROLLOUTS = [rollout(turn([1, 2], [3])), rollout(turn([1], [2]), turn([1, 2, 5], [6, 7]))]


def said(*scores, **settings):
    """What an ensemble says of one rollout to which its members give these scores."""
    members = [lambda turns, score=score: [score] * len(turns) for score in scores]
    return Ensemble(members, **settings)(ROLLOUTS[:1])[0]


def test_combinations_by_hand():
    """Scores 1, 2 and 6: mean 3, variance 14 / 3. Coste et al. 2023, arXiv:2310.02743, section 3."""
    assert said(1.0, 2.0, 6.0) == {PART: 3.0, SPREAD: pytest.approx(math.sqrt(14 / 3))}
    assert said(1.0, 2.0, 6.0, combine="min")[PART] == 1.0
    assert said(1.0, 2.0, 6.0, combine="penalised", penalty=0.5)[PART] == pytest.approx(3 - 7 / 3)


def test_the_worst_case_and_the_penalty_never_say_more_than_the_mean():
    draws = random.Random(0)
    for _ in range(50):
        scores = [draws.gauss(0, 3) for _ in range(4)]
        mean, worst, careful = (said(*scores, combine=way)[PART] for way in ("mean", "min", "penalised"))
        assert worst <= mean and careful <= mean


def test_one_model_is_itself_and_has_no_spread():
    for way in ("mean", "min", "penalised"):
        assert said(2.5, combine=way) == {PART: 2.5}


def test_the_last_reply_is_scored_after_all_that_was_said_before():
    heard = []

    def scores(answers, places):
        heard.extend(zip(answers, places, strict=True))
        return [[float(len(answer))] for answer in answers]

    assert [found[PART] for found in Ensemble([whole(scores)])(ROLLOUTS)] == [3.0, 5.0]
    assert heard == [([1, 2, 3], [2]), ([1, 2, 5, 6, 7], [4])]


@pytest.mark.parametrize(("pool", "value"), [("min", 0.25), ("mean", 0.5), ("product", 0.09375), ("last", 0.5)])
def test_steps_are_probabilities_of_which_one_number_is_made(pool, value):
    """Token 9 ends a step; before the end of the reply it ends no step of its own. Odds 3, 1/3 and 1."""
    heard = []

    def scores(answers, places):
        heard.extend(places)
        return [[math.log(3), -math.log(3), 0.0][-len(some) :] for some in places]

    said = by_steps(scores, lambda token: token == 9, pool)([turn([1, 9], [5, 9, 6, 9, 7, 9, 2]), turn([1], [9])])
    assert heard == [[3, 5, 8], [1]]
    assert said == pytest.approx([value, 0.5])
    assert by_steps(lambda *_: [[-1e9, 1e9]], lambda _: False, "mean")([turn([1], [2])]) == pytest.approx([0.5])


def test_a_line_that_is_empty_is_no_step_and_a_reply_that_was_cut_ends_where_it_does():
    heard = []

    def scores(answers, places):
        heard.extend(places)
        return [[0.0] * len(some) for some in places]

    lines = turn([1], [5, 9, 9, 6, 9, 2]), turn([1], [9, 5, 2]), turn([1], [5, 9, 6], stop=Stop.truncated)
    by_steps(scores, lambda token: token == 9, "last")(lines)
    assert heard == [[2, 6], [1, 3], [2, 3]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", ["min", "mean", "product", "last"])
def test_a_step_without_a_finite_score_fails_its_reply(bad, pool):
    for steps in ([bad, 0.0], [0.0, bad]):
        member = by_steps(lambda *_, steps=steps: [steps], lambda token: False, pool)
        assert isinstance(Ensemble([member])(ROLLOUTS[:1])[0], Failure)


def test_members_are_put_on_one_scale():
    scores = [[1.0, 3.0], [100.0, 500.0], [7.0, 7.0]]
    scales = scales_of(scores)
    assert scales == [(2.0, 1.0), (300.0, 200.0), (7.0, 1.0)]
    members = [lambda answers, some=some: some for some in scores]
    assert [found[PART] for found in Ensemble(members, scales=scales)(ROLLOUTS)] == pytest.approx([-2 / 3, 2 / 3])


def test_scores_that_are_not_finite_make_no_scale_and_a_member_without_any_is_an_error():
    assert scales_of([[1.0, math.nan, 3.0, math.inf]]) == scales_of([[1.0, 3.0]])
    with pytest.raises(ConfigError, match="no reply of the start model with a finite number"):
        scales_of([[1.0], [math.nan, -math.inf]])


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_what_is_not_finite_is_a_failure_and_not_a_number(score):
    found = said(1.0, score)
    assert isinstance(found, Failure) and found.where == PART and "not all of that is finite" in found.reason


def test_more_steps_cannot_raise_the_least_or_the_product_of_them_and_nothing_is_summed():
    for name in ("min", "product"):
        assert POOLS[name]([0.9, 0.4, 0.99]) <= POOLS[name]([0.9, 0.4])
    assert POOLS["mean"]([0.9, 0.4, 0.99]) > POOLS["mean"]([0.9, 0.4]) and "sum" not in POOLS


def test_neither_the_worst_case_nor_the_penalty_is_always_the_more_careful():
    def both(*scores):
        return [said(*scores, combine=way, penalty=0.5)[PART] for way in ("min", "penalised")]

    worst, careful = both(0.0, 1.0)
    assert worst < careful == pytest.approx(0.375)
    worst, careful = both(1.0, 2.0, 6.0)
    assert worst > careful == pytest.approx(2 / 3)
