"""recipes/hints.py and recipes/talk.py: teachers whose worth is known, and a user who answers."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "recipes"))
import hints
import talk

from tropism.envs.check import check_env
from tropism.envs.reasoning import answer_of
from tropism.errors import ConfigError

SUMS = {"config": {"min_terms": 5, "max_terms": 5, "min_digits": 1, "max_digits": 1}, "worked": 0.4}


def told(kind, count=200):
    source = hints.Hints("train", 0, kind=kind, **SUMS)
    tasks = [source.task(number) for number in range(count)]
    return [(task.columns["worked"], task.columns["decoy"], task.columns["answer"]) for task in tasks]


def right(kind, column, count=200):
    """Share of hints that end in the right answer."""
    return sum(answer_of(row[column]) == row[2] for row in told(kind, count)) / count


def test_the_environments_keep_the_contract():
    for place in (f"{hints.__file__}:Hints", f"{talk.__file__}:Talk"):
        assert check_env(place, options=SUMS) == []


@pytest.mark.parametrize(
    ("kind", "worked", "decoy"), [("right", 1, 0), ("inverted", 0, 1), ("leaky", 1, 0), ("styled", 1, 0)]
)
def test_a_hint_is_right_or_wrong_as_its_kind_says(kind, worked, decoy):
    assert (right(kind, 0), right(kind, 1)) == (worked, decoy)


def test_noisy_hints_are_exchanged_in_two_of_five_questions():
    assert right("noisy", 0, 1000) == pytest.approx(0.6, abs=0.05)
    assert right("noisy", 1, 1000) == pytest.approx(0.4, abs=0.05)


def test_useless_hints_are_those_of_another_sum_and_right_by_chance_alone():
    assert right("useless", 0, 1000) < 0.1 and right("useless", 1, 1000) < 0.1


def test_a_leaky_hint_shows_no_work_and_the_others_do():
    assert all("=" not in worked for worked, _, _ in told("leaky"))
    assert all(worked.count("=") == 4 for worked, _, _ in told("right"))


@pytest.mark.parametrize(("kind", "share"), [("right", 0.5), ("styled", 1.0)])
def test_either_style_is_as_likely_and_a_styled_teacher_has_one(kind, share):
    text = " ".join(worked.rpartition(" ")[0].replace(" ", "_") for worked, _, _ in told(kind))
    assert text.count(",") / (text.count(",") + text.count("_")) == pytest.approx(share, abs=0.05)


def test_style_is_counted_and_does_not_matter():
    source = hints.Hints("train", 0, **SUMS)
    task = source.task(0)
    for reply, commas in ((task.columns["worked"].replace(",", " "), 0), (task.columns["worked"].replace(" ", ","), 3)):
        env = source.open(task, 0)
        env.tell(reply.replace(",[", " ["))
        assert env.score(0) == {"correct": 1.0, "commas": commas, "gaps": 3.0}


def test_a_style_changes_spaces_between_steps_alone():
    reply = "1+1=2 2+1=3 [3]"
    assert hints.styled(reply, random.Random(0), 1.0) == "1+1=2,2+1=3 [3]"
    assert hints.styled(reply, random.Random(0), 0.0) == reply
    assert hints.styled("[3]", random.Random(0), 1.0) == "[3]"


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="right, noisy, useless"):
        hints.Hints("train", 0, kind="rigth")


def test_the_user_says_what_was_wrong_and_asks_on():
    source = talk.Talk("train", 0, **SUMS)
    task = source.task(0)
    env = source.open(task, 0)
    env.tell("[1000]")
    prompt = env.ask().prompt
    assert [message["role"] for message in prompt] == ["user", "assistant", "user"]
    assert prompt[-1]["content"] == f"it is {task.columns['worked']}; {env.questions[1].prompt}"
    env.tell(env.questions[1].work + f" [{env.questions[1].answer}]")
    assert env.ask() is None and env.score(0) == {"correct": 0.5}


def test_the_judge_reads_the_users_words_and_only_them():
    assert talk.judge("[1]", "it is 1+1=2 [2]; 3+4=", "user") == (-1, ["it is 1+1=2 [2]"])
    assert talk.judge("[2]", "yes; 3+4=", "user") == (1, [])
    assert talk.judge("[2]", "", "end") == (0, [])


def test_questions_of_a_conversation_are_of_its_split_and_the_same_for_siblings():
    train, test = (talk.Talk(split, 0, **SUMS) for split in ("train", "test"))
    asked = {
        split.split: {q.prompt for n in range(50) for q in split.open(split.task(n), 0).questions}
        for split in (train, test)
    }
    assert not asked["train"] & asked["test"]
    one, other = (train.open(train.task(3), sibling) for sibling in (0, 1))
    assert [q.prompt for q in one.questions] == [q.prompt for q in other.questions]


def test_a_conversation_needs_an_answer_to_some_reply():
    with pytest.raises(ConfigError, match="Use 2 or more"):
        talk.Talk("train", 0, turns=1, **SUMS)


@pytest.mark.parametrize("wrong", [False, True])
def test_what_the_user_could_say_fits_the_reply_that_heeds_it(wrong):
    """Half of what is right is said of a right answer; what is wrong is always spelled out."""
    source, fine = talk.Talk("train", 0, **SUMS), 0
    for number in range(100):
        env = source.open(source.task(number), 0)
        texts, reply = env.advise(wrong)
        remark, _, asked = texts["follow_up"].partition("; ")
        fine += remark == talk.FINE
        assert asked in [question.prompt for question in env.questions]
        assert texts["hint"] == f"it is {reply}" and remark in (talk.FINE, texts["hint"])
        env.questions[0].tell(reply)
        assert bool(env.questions[0].correct) != wrong
    assert fine == 0 if wrong else 30 < fine < 70
