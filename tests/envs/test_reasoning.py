"""reasoning-gym without its holes. Stojanovski et al. 2025, arXiv:2505.24760."""

from __future__ import annotations

import pytest

from tropism.envs import open_source
from tropism.envs.reasoning import HANGING, MANY_RIGHT, answer_of
from tropism.errors import ConfigError

THREE = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
COMPACT = ["chain_sum", "products", "basic_arithmetic", "gcd", "lcm", "spell_backward"]
JUNK = ["", "nan", "inf", "-inf", "None", "-1", "x", "True", "False", "[]", "{}", "9" * 400, "\x00", "é→", "[" * 2000]


def opened(split="train", seed=0, **options):
    return open_source("reasoning", options, split=split, seed=seed)


def prompt(source, number):
    return source.open(source.task(number), 0).ask().prompt[0]["content"]


def scored(source, number, reply):
    env = source.open(source.task(number), 0)
    env.tell(reply)
    return env.score(0)["correct"]


def test_train_and_test_never_share_a_question_whatever_the_seeds():
    train = {prompt(opened("train", seed, config=THREE), n) for seed in (0, 1) for n in range(400)}
    test = {prompt(opened("test", seed, config=THREE), n) for seed in (0, 7) for n in range(400)}
    assert len(train) > 500 and len(test) > 100
    assert not train & test


def test_the_held_out_share_of_all_questions_is_what_was_asked_for():
    from tropism.envs.reasoning import _share

    shares = [_share(f"{n}+1=") for n in range(5000)]
    assert sum(s < 0.1 for s in shares) / 5000 == pytest.approx(0.1, abs=0.017)  # 4 standard errors


def test_task_numbers_are_a_function_and_different_seeds_give_different_tasks():
    source, again, other = opened(seed=3), opened(seed=3), opened(seed=4)
    assert [source.task(n) for n in (9, 0, 5)] == [again.task(n) for n in (9, 0, 5)]
    assert [prompt(source, n) for n in range(20)] != [prompt(other, n) for n in range(20)]


@pytest.mark.parametrize("dataset", COMPACT)
@pytest.mark.parametrize("level", [0, 2])
def test_compact_prompts_are_short_and_their_demonstrations_right(dataset, level):
    source, wordy = opened(dataset=dataset, level=level), opened(dataset=dataset, level=level, compact=False)
    for number in range(40):
        env = source.open(source.task(number), 0)
        short, long = env.ask().prompt[0]["content"], prompt(wordy, number)
        assert len(short) < len(long) / 2 and "answer" not in short
        assert long.endswith("Give the final answer as [answer].")
        env.tell(env.demonstrate())
        assert env.score(0) == {"correct": 1.0} and env.feedback(0) is None


def test_a_compact_sum_means_what_its_answer_says():
    source = opened(config=THREE)
    for number in range(50):
        assert eval(prompt(source, number)[:-1]) == int(source.task(number).columns["answer"])


def test_worked_demonstrations_show_every_step_and_direct_ones_only_the_answer():
    source = opened(config=THREE, worked=0.5)
    said = [source.open(source.task(n), 0) for n in range(200)]
    worked = [env for env in said if " " in env.demonstrate()]
    assert 70 < len(worked) < 130
    for env in worked:
        first, second, answer = env.demonstrate().split()
        for step in (first, second):
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert answer == f"[{right}]" and second.startswith(first.split("=")[1])
    assert all(env.demonstrate() == f"[{env.answer}]" for env in said if env not in worked)


def test_feedback_gives_the_answer_and_its_work_only_after_a_wrong_reply():
    source = opened(config=THREE)
    env = source.open(source.task(0), 0)
    assert env.feedback(0) is None
    env.tell("[no]")
    assert env.feedback(0) == f"it is {env.work} [{env.answer}]"
    assert env.ask() is None


@pytest.mark.parametrize(
    "reply, answer",
    [
        ("[9]", "9"),
        ("4+7=11 [9]", "9"),
        (" 9 ", "9"),
        ("[1] or [ 9 ]", "9"),
        ("[9] ok]", "9"),
        ("[ [9]", "9"),
        ("", ""),
    ],
)
def test_the_last_brackets_are_the_answer_and_without_them_the_reply(reply, answer):
    assert answer_of(reply) == answer


def test_answers_that_are_lists_may_be_bracketed_once_or_twice():
    assert answer_of("so [[1, 2], [3]]") == "[1, 2], [3]"
    source = opened(dataset="manipulate_matrix")
    number = 0
    answer = source.task(number).columns["answer"]
    assert scored(source, number, f"[{answer}]") == 1.0 and scored(source, number, answer) == 1.0


def test_nan_is_no_answer_to_complex_arithmetic():
    import reasoning_gym

    data = reasoning_gym.create_dataset("complex_arithmetic", size=1, seed=0)
    assert data.score_answer("nan", data[0]) == 1.0  # the hole that is closed here
    source = opened(dataset="complex_arithmetic")
    assert [scored(source, n, "[nan]") for n in range(20)] == [0.0] * 20


def test_not_every_word_answers_game_of_life_halting():
    import reasoning_gym

    data = reasoning_gym.create_dataset("game_of_life_halting", size=1, seed=0)
    assert data.score_answer("banana", data[0]) == 1.0
    source = opened(dataset="game_of_life_halting")
    assert [scored(source, n, "[banana]") for n in range(3)] == [0.0] * 3
    assert scored(source, 0, f"[{source.task(0).columns['answer']}]") == 1.0


def test_a_reply_that_contains_the_answer_is_not_the_answer():
    import reasoning_gym

    data = reasoning_gym.create_dataset("spell_backward", size=1, seed=0)
    assert data.score_answer(data[0]["answer"] + "!", data[0]) > 0.5
    source = opened(dataset="spell_backward")
    answer = source.task(0).columns["answer"]
    assert scored(source, 0, f"[{answer}!]") == 0.0 and scored(source, 0, f"{answer}{answer}") == 0.0


@pytest.mark.parametrize(
    "dataset", ["prime_factorization", "boxnet", "coin_flip", "calendar_arithmetic", "time_intervals", "graph_color"]
)
def test_junk_earns_nothing_and_breaks_nothing(dataset):
    source = opened(dataset=dataset)
    for junk in JUNK:
        assert scored(source, 0, junk) == 0.0 and scored(source, 0, f"[{junk}]") == 0.0


FAST = sorted(MANY_RIGHT - {"knight_swap", "sokoban", "boxnet", "propositional_logic", "rush_hour"})


@pytest.mark.parametrize("dataset", FAST)
def test_where_many_answers_are_right_junk_is_still_wrong(dataset):
    source = opened(dataset=dataset)
    for junk in JUNK:
        assert scored(source, 1, junk) == 0.0, junk


def test_where_many_answers_are_right_another_than_the_reference_is_accepted():
    source = opened(dataset="graph_color")
    task = source.task(0)
    item = source.item(task.seed)
    colours = item["metadata"]["possible_answer"]
    number = len(item["metadata"]["puzzle"]["color_options"])
    renamed = {v: (c % number) + 1 for v, c in colours.items()}
    import json

    assert scored(source, 0, json.dumps(renamed)) == 1.0


@pytest.mark.parametrize("dataset", HANGING)
def test_combinations_that_never_return_are_refused(dataset):
    with pytest.raises(ConfigError, match="never ends or fails"):
        opened(dataset=dataset, level=2)
    if HANGING[dataset]:
        assert prompt(opened(dataset=dataset, level=HANGING[dataset] - 1), 0)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"dataset": "chain_summ"}, "Did you mean chain_sum?"),
        ({"config": {"min_term": 3}}, "Did you mean min_terms?"),
        ({"config": {"min_terms": 5, "max_terms": 2}}, "refuses its settings"),
        ({"level": -1}, "start at 0"),
        ({"dataset": "gcd", "worked": 0.5}, "cannot show the work of gcd"),
        ({"worked": 2}, "share of the demonstrations"),
        ({"holdout": 0}, "each split needs questions"),
        ({"dataset": "acre", "level": 1}, "no levels"),
        ({"datasets": "gcd"}, "Did you mean dataset?"),
    ],
)
def test_impossible_options_are_refused_with_the_way_out(options, says):
    with pytest.raises(ConfigError) as error:
        opened(**options)
    assert says in str(error.value)


def test_a_data_set_with_too_few_questions_for_a_split_says_so():
    with pytest.raises(ConfigError, match="too few different questions"):
        opened("test", dataset="coin_flip", config={"min_trials": 3, "max_trials": 3}, holdout=1e-6)


def test_a_worked_sum_is_right_and_its_decoy_slips_once_and_goes_on_from_there():
    source = opened(config=THREE)
    for number in range(40):
        columns = source.task(number).columns
        assert scored(source, number, columns["worked"]) == 1 and scored(source, number, columns["decoy"]) == 0
        steps = columns["decoy"].split(" [")[0].split()
        slips = [eval(step.split("=")[0]) - int(step.split("=")[1]) for step in steps]
        assert sum(slip != 0 for slip in slips) == 1
        assert columns["decoy"] == columns["decoy"].split(" [")[0] + f" [{steps[-1].split('=')[1]}]"


def test_advice_is_the_worked_sum_or_the_decoy_and_the_reply_follows_it():
    source = opened(config=THREE)
    task = source.task(0)
    for wrong, name in ((False, "worked"), (True, "decoy")):
        texts, reply = source.open(task, 0).advise(wrong)
        assert reply == texts["worked"] == texts["sibling"] == task.columns[name]
        assert texts["feedback"] == f"it is {reply}"
    other = opened(dataset="gcd")
    assert "worked" not in other.task(0).columns and other.open(other.task(0), 0).advise(False)[0] == {}
