"""A judge of pairs: both orders must agree, nonsense is a failure, and neither is ever a preference."""

import pytest

from tropism.signals.compare import by_function, by_model, choice_in, decided, verdicts
from tropism.types import Failure

BAD = Failure("comparison", "no")


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [(1, 2, "left"), (2, 1, "right"), (1, 1, "tie"), (2, 2, "tie"), (0, 0, "tie"), (1, 0, "tie"), (0, 1, "tie")],
)
def test_only_what_both_orders_say_is_a_preference(one, other, verdict):
    assert decided(one, other) == verdict


def test_a_failure_in_either_order_is_a_failure():
    assert decided(BAD, 2) is BAD and decided(1, BAD) is BAD


def test_a_judge_that_likes_what_comes_first_prefers_nothing_and_an_honest_one_does_wherever_it_stands():
    pairs = [("q", "long answer", "short"), ("q", "ab", "abcd"), ("q", "same", "same")]
    assert verdicts(pairs, by_function(lambda *shown: 1)) == ["tie"] * 3
    longer = by_function(lambda prompt, a, b: 0 if len(a) == len(b) else 1 if len(a) > len(b) else 2)
    assert verdicts(pairs, longer) == ["left", "right", "tie"]


def test_a_rule_that_raises_or_talks_nonsense_is_a_failure_and_no_tie():
    for rule in (lambda *shown: 1 / 0, lambda *shown: "left", lambda *shown: None):
        (found,) = verdicts([("q", "a", "b")], by_function(rule))
        assert isinstance(found, Failure) and found.where == "comparison"


def test_a_model_reads_all_three_as_they_are_and_its_last_box_counts():
    heard = []

    def answering(prompts, seed):
        heard.extend(prompt[0]["content"] for prompt in prompts)
        return ["first \\boxed{2}, no: \\boxed{1}", "\\boxed{2}"]

    (found,) = verdicts([("ask {first}", "one {second}", "two")], by_model(answering))
    assert found == "left" and len(heard) == 2
    assert "ask {first}" in heard[0] and heard[0].index("one {second}") < heard[0].index("two")
    assert heard[1].index("two") < heard[1].index("one {second}")


def test_other_words_and_a_server_that_repeats_the_question():
    asked = []
    ask = by_model(
        lambda prompts, seed: asked.extend(prompts) or ["\\boxed{1}", "\\boxed{2}"], "{first}|{second}|{prompt}"
    )
    assert verdicts([("p", "a", "b")], ask) == ["left"]
    assert [prompt[0]["content"] for prompt in asked] == ["a|b|p", "b|a|p"]
    assert choice_in("which? \\boxed{1} \\boxed{2} I cannot say", "which? \\boxed{1} \\boxed{2}").where == "comparison"
    assert choice_in(BAD, "") is BAD


def test_without_pairs_nobody_is_asked():
    assert verdicts([], by_function(lambda *shown: 1 / 0)) == []
