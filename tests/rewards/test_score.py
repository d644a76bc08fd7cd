"""Where rewards stand, and what becomes of what could not be scored."""

from __future__ import annotations

import asyncio
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tropism.errors import ConfigError
from tropism.rewards import find_scorer
from tropism.rewards.score import score
from tropism.training.learn import without_contrast
from tropism.training.numbers import rollout_numbers
from tropism.types import Failure, Rollout, Task, Turn


def turn(reply="yes", earned=None, prompt="say yes", tokens=3):
    return Turn(context=[1], action=[2] * tokens, reply=reply, prompt=prompt, earned=earned or {})


def rollout(*turns, failure=None, **columns):
    return Rollout(task=Task(columns=columns), group=0, turns=turns or (turn(),), failure=failure)


def replies(*texts, **columns):
    return [rollout(turn(text), **{k: v[n] for k, v in columns.items()}) for n, text in enumerate(texts)]


def scored_by(function, rollouts, weight=1.0, **more):
    name, scorer, _ = find_scorer(function)
    return score(rollouts, {name: scorer}, {name: weight}, **more)


def test_a_float_lands_on_the_last_turn_a_list_on_each_and_earnings_where_they_were_earned():
    played = rollout(turn(earned={"win": 0.5}), turn(), turn(earned={"win": 0.5, "odd": 3.0}))
    scorers = {"late": lambda rs: [{"late": 2.0}], "each": lambda rs: [{"each": [1.0, 0.0, -4.0]}]}
    (done,) = score([played], scorers, {"win": 10.0, "late": 1.0, "each": 0.5}, ("win", 1.0))
    assert [t.reward for t in done.turns] == [5.5, 0.0, 5.0]
    assert done.reward == 10.5 and done.success
    assert done.rewards == {"win": 1.0, "odd": 3.0, "late": 2.0, "each": -3.0}


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3),
)
def test_the_turns_sum_to_the_rollout_exactly(values, weights):
    turns = [turn(earned={"a": a}) for a, _, _ in values]
    scorers = {"b": lambda rs: [{"b": [b for _, b, _ in values]}], "c": lambda rs: [{"c": values[0][2]}]}
    (done,) = score([rollout(*turns)], scorers, dict(zip("abc", weights, strict=True)))
    assert done.failure is None and sum(t.reward for t in done.turns) == done.reward
    assert done.reward == pytest.approx(sum(w * done.rewards[p] for p, w in zip("abc", weights, strict=True)), abs=1)


def test_parts_without_a_weight_are_recorded_only():
    (done,) = score([rollout(turn(earned={"win": 1.0, "moves": 7.0}))], {}, {"win": 2.0})
    assert done.reward == 2.0 and done.rewards == {"win": 1.0, "moves": 7.0}


def test_a_scorer_with_several_parts_gives_its_weight_to_those_that_have_none():
    def both(reply):
        return {"right": 1.0, "calm": -0.5}

    assert scored_by(both, [rollout()], 2.0)[0].reward == 1.0
    name, scorer, _ = find_scorer(both)
    assert score([rollout()], {name: scorer}, {name: 2.0, "calm": 0.0})[0].reward == 2.0


def test_a_rollout_says_what_its_parts_weigh():
    scorers = {"own": lambda rollouts: [{"x": 1.0, "y": 2.0} for _ in rollouts]}
    (scored,) = score([rollout(turn(earned={"won": 1.0}))], scorers, {"own": 0.5, "y": 0.1, "won": 2.0})
    assert scored.weights == {"x": 0.5, "y": 0.1, "won": 2.0} and scored.reward == pytest.approx(0.5 + 0.2 + 2.0)


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf"), "high", [1.0, float("nan")], np.float64("nan")]
)
def test_what_is_not_a_finite_number_is_a_failure_and_not_a_zero(bad):
    def odd(prompts, completions):
        return [bad if c == "bad" else 1.0 for c in completions]

    good, failed = scored_by(odd, replies("good", "bad"))
    assert good.reward == 1.0 and good.failure is None
    assert failed.failure.where == "odd" and failed.rewards == {} and failed.reward == 0.0


def test_an_exception_fails_only_the_rollout_that_caused_it():
    def fragile(prompts, completions, **kwargs):
        return [float(c) for c in completions]

    done = scored_by(fragile, replies("1", "x", "3"))
    assert [d.reward for d in done] == [1.0, 0.0, 3.0]
    assert [d.failure is None for d in done] == [True, False, True]
    assert done[1].failure == Failure("fragile", "ValueError: could not convert string to float: 'x'")

    def fragile_too(reply):
        return float(reply)

    assert [d.failure is None for d in scored_by(fragile_too, replies("1", "x", "3"))] == [True, False, True]

    def always(rollouts):
        raise RuntimeError("the server is down")

    assert all("the server is down" in d.failure.reason for d in scored_by(always, replies("1", "2")))


def test_none_does_not_apply_and_all_none_is_a_failure():
    def only_long(reply):
        return None if len(reply) < 3 else 1.0

    short, long = scored_by(only_long, replies("no", "long"), success=("only_long", 1.0))
    assert "no reward applies" in short.failure.reason and long.reward == 1.0 and long.success
    name, scorer, _ = find_scorer(only_long)
    both = score(replies("no"), {name: scorer, "one": lambda rs: [{"one": 1.0}]}, {name: 1.0, "one": 0.5})
    assert both[0].failure is None and both[0].reward == 0.5 and both[0].rewards == {"one": 1.0}


def test_rollouts_that_failed_already_pass_through_unseen():
    failure = Failure("play", "the prompt does not fit")

    def count(prompts, completions):
        return [float(len(completions))] * len(completions)

    done = scored_by(count, [rollout(failure=failure), rollout(), rollout(failure=failure)])
    assert [d.failure for d in done] == [failure, None, failure] and done[1].reward == 1.0
    assert score([], {}, {"a": 1.0}) == []
    assert scored_by(count, [rollout(failure=failure)], success=("cuont", 1.0), parts=())[0].failure is failure


def test_a_scorer_may_say_itself_that_it_could_not_score():
    done = scored_by(lambda rollouts: [Failure("judge", "no verdict"), {"judge": 1.0}], replies("a", "b"))
    assert done[0].failure == Failure("judge", "no verdict") and done[1].failure is None


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda completions, **k: [1.0], "returned 1 values for 2 rollouts"),
        (lambda completions, **k: 1.0, "returned a float, but must return a list"),
        (lambda rollouts: [{"a": [1.0, 2.0]}] * 2, "gave 2 values of part 'a' for a rollout of 1 turns"),
        (lambda rollouts: [1.0, 2.0], "must give named parts"),
    ],
)
def test_a_reward_of_the_wrong_shape_stops_the_run_with_both_numbers(function, says):
    with pytest.raises(ConfigError, match=says):
        scored_by(function, replies("a", "b"))


def test_names_that_no_one_gives_are_refused_and_those_of_the_environment_are_zero():
    lost = rollout(turn(earned={"loss": 1.0}))
    (done,) = score([lost], {}, {"win": 1.0}, ("win", 1.0), parts=("win", "loss"))
    assert done.failure is None and done.rewards == {"win": 0.0, "loss": 1.0} and not done.success
    assert score([lost], {}, {"win": 1.0})[0].rewards["win"] == 0.0
    for weights, success in [({"wni": 1.0}, None), ({"win": 1.0}, ("wni", 1.0))]:
        with pytest.raises(ConfigError, match=r"there is no reward part 'wni'. Did you mean win\?"):
            score([lost], {}, weights, success, parts=("win", "loss"))


def test_two_authors_of_one_part_are_refused():
    with pytest.raises(ConfigError, match="the environment and again both give a part 'win'"):
        score([rollout()], {"again": lambda rs: [{"win": 1.0}]}, {"win": 1.0}, parts=("win",))


def test_a_weighted_sum_that_overflows_is_a_failure():
    (done,) = score([rollout(turn(earned={"a": 1e308}))], {}, {"a": 1e10})
    assert "not finite" in done.failure.reason and math.isfinite(done.reward)


# ---------------------------------------------------------------------------------------- signatures of other libraries


def test_trl_functions_get_texts_columns_and_extras():
    seen = {}

    def mine(prompts, completions, answer, completion_ids, trainer_state, log_extra, log_metric, absent=7, **kwargs):
        log_extra("column", completions)
        log_metric("name", 1.0)
        seen.update(locals())
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    name, scorer, columns = find_scorer(mine)
    done = score(replies("4", "5", answer=["4", "4"], level=[1, 2]), {name: scorer}, {name: 1.0})
    assert [d.reward for d in done] == [1.0, 0.0] and columns == ("answer",)
    assert seen["prompts"] == ["say yes"] * 2 and seen["completion_ids"] == [[2, 2, 2]] * 2
    assert seen["kwargs"] == {"level": [1, 2]} and seen["absent"] == 7 and seen["trainer_state"].global_step == 0


def test_trl_functions_get_message_lists_for_message_prompts():
    def mine(prompts, completions):
        assert prompts == [[{"role": "user", "content": "hi"}]]
        assert completions == [[{"role": "assistant", "content": "last"}]]
        return [1.0]

    talk = rollout(turn("first", prompt=({"role": "user", "content": "hi"},)), turn("last", prompt=()))
    assert scored_by(mine, [talk])[0].reward == 1.0


def test_async_functions_are_awaited_also_inside_a_running_loop():
    async def mine(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0 for _ in completions]

    async def notebook():
        return scored_by(mine, replies("a", "b"))

    assert [d.reward for d in scored_by(mine, replies("a"))] == [1.0]
    assert [d.reward for d in asyncio.run(notebook())] == [1.0, 1.0]


def test_arrays_and_numpy_numbers_are_lists_of_numbers():
    assert scored_by(lambda completions: np.ones(len(completions)), replies("a"))[0].reward == 1.0
    assert scored_by(lambda completions: [np.float32(0.5), True], replies("a", "b"))[1].reward == 1.0


def test_verl_functions_get_the_ground_truth_and_may_return_parts():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return {"score": float(solution_str == ground_truth), "extra": float(extra_info["index"])}

    row = {"data_source": "gsm8k", "reward_model": {"ground_truth": "4"}, "extra_info": {"index": 3}}
    (done,) = scored_by(compute_score, [rollout(turn("4"), **row)])
    assert done.rewards == {"compute_score": 1.0, "extra": 3.0}


def test_reply_functions_get_the_truth_or_the_columns_they_name():
    assert scored_by(lambda reply, truth: float(reply == truth), replies("4", solution=["4"]))[0].reward == 1.0
    assert scored_by(lambda reply, level, x=2: float(level + x), replies("4", level=[3]))[0].reward == 5.0


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda reply, truth: 1.0, "no column answer, solution, ground_truth: it has level"),
        (lambda reply, levle: 1.0, "asks for 'levle', which is no column. Did you mean level?"),
        (lambda completions, levle, **k: [1.0], "asks for 'levle', which is no column. Did you mean level?"),
        (lambda solution_str, ground_truth: 1.0, "no column answer"),
    ],
)
def test_a_column_that_is_not_there_is_an_error_and_not_a_failure(function, says):
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        scored_by(function, replies("4", level=[1]))


def test_rewards_are_found_by_name_and_by_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\nx = 1\n")
    name, scorer, columns = find_scorer(f"{file}:length")
    assert name == "length" and columns == ()
    assert score(replies("four"), {name: scorer}, {name: 1.0})[0].reward == 4.0
    name, scorer, _ = find_scorer("exact_match")
    done = score(replies(" 4\n", "44", answer=["4", "4"]), {name: scorer}, {name: 1.0})
    assert [d.reward for d in done] == [1.0, 0.0]
    for given_name, says in [
        ("exact_mach", "Did you mean exact_match"),
        ("wni", "Did you mean win"),
        (f"{file}:lenght", "Did you mean length"),
        (f"{file}:x", "is a int, but must be a function"),
    ]:
        with pytest.raises(ConfigError, match=says):
            find_scorer(given_name, ("win",))
    with pytest.raises(ConfigError, match="a signature that we do not know"):
        find_scorer(lambda text: 1.0)


def test_a_part_may_apply_to_some_turns_only():
    """None among the numbers of a list: nothing is earned there; a list of None alone does not apply at all."""
    rollout = Rollout(task=Task(), group=0, turns=tuple(Turn(context=[1], action=[2]) for _ in range(3)))
    (some,) = score([rollout], {"mine": lambda rs: [{"mine": [None, 2.0, None]} for _ in rs]}, {"mine": 0.5})
    assert [turn.reward for turn in some.turns] == [0.0, 1.0, 0.0] and some.rewards == {"mine": 2.0}
    (none,) = score([rollout], {"mine": lambda rs: [{"mine": [None, None, None]} for _ in rs]}, {"mine": 0.5})
    assert none.rewards == {} and "no reward applies" in none.failure.reason
    with pytest.raises(ConfigError, match="2 values of part 'mine' for a rollout of 3 turns"):
        score([rollout], {"mine": lambda rs: [{"mine": [None, 1.0]} for _ in rs]}, {"mine": 0.5})


def test_a_sum_over_turns_reaches_what_it_reaches_to_rounding():
    """Of a score that ends at 1 exactly the changes sum up to a little less."""
    totals = [0.0, 0.5, 0.1, 0.8, -0.4, 1.0]
    changes = [after - before for before, after in pairwise(totals)]
    made = [rollout(*(turn(earned={"won": change}) for change in each)) for each in (changes, [1.0])]
    assert math.fsum(changes) < 1.0
    found = score(made, {}, {"won": 1.0}, ("won", 1.0))
    assert [one.success for one in found] == [True, True]
    assert rollout_numbers(found)["frac_reward_zero_std"] == 1.0
    assert without_contrast(found, "reward")[1] == 0
