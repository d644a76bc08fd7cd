import pytest

from tropism import check_env
from tropism.envs import open_source
from tropism.envs.user import PLEASED, TASTES, THINGS, User, judge
from tropism.errors import ConfigError
from tropism.types import Task


def talk(env, *replies):
    """What the user said after each reply."""
    said = []
    for reply in replies:
        env.tell(reply)
        ask = env.ask()
        said.append(ask.prompt[-1]["content"] if ask else None)
    return said


@pytest.mark.parametrize("options", [{}, {"taste": "any", "turns": 1}, {"taste": "lower"}, {"taste": "closing"}])
def test_it_keeps_the_promises_of_an_environment(options):
    assert check_env("user", options=options) == []


@pytest.mark.parametrize(
    ("taste", "good", "bad"),
    [("short", ["oak", "twelve chars"], ["", "thirteen char"]), ("lower", ["an oak 7"], ["", "Oak"]),
     ("closing", ["Oak bye", "bye"], ["", "bye Oak"])],
)  # fmt: skip
def test_the_next_message_says_what_was_wrong_and_nothing_else_does(taste, good, bad):
    for reply in good + bad:
        env = User(Task(), taste=taste, turns=2)
        (opening,) = env.ask().prompt
        (following,) = talk(env, reply)
        remark = PLEASED if reply in good else TASTES[taste][1]
        assert opening["content"].startswith("Name one ") and following.startswith(f"{remark} Name one ")
        assert env.feedback(0) == remark
        assert env.score(0) == {"pleased": 0.5 * (reply in good)}


def test_after_the_last_reply_the_user_is_gone():
    env = User(Task(), turns=3)
    said = talk(env, "oak", "oak", "oak")
    assert [bool(message) for message in said] == [True, True, False] and env.score(0) == {"pleased": 1.0}
    env.tell("one more")
    assert env.score(0) == {"pleased": 1.0} and len(env.heard) == 6


def test_what_is_demonstrated_pleases_half_of_the_time():
    source = open_source("user", {"taste": "any", "turns": 1}, split="train", seed=0)
    pleased = 0.0
    for number in range(200):
        env = source.open(source.task(number), 0)
        assert env.demonstrate() == env.demonstrate()
        env.tell(env.demonstrate())
        pleased += env.score(0)["pleased"]
    assert 80 < pleased < 120
    assert not any(fits(reply) for fits, _, _ in TASTES.values() for reply in THINGS.values())
    assert all(fits(pleasing(reply)) for fits, _, pleasing in TASTES.values() for reply in THINGS.values())


@pytest.mark.parametrize("wrong", [False, True])
def test_right_advice_pleases_and_wrong_advice_is_another_users(wrong):
    for seed in range(20):
        env = User(Task(seed=seed), taste="any")
        texts, reply = env.advise(wrong)
        complaint = TASTES[env.taste][1]
        assert (texts["hint"] == complaint) is not wrong and texts["follow_up"].startswith(texts["hint"])
        if not wrong:
            talk(env, reply)
            assert env.feedback(0) == PLEASED


def test_the_rule_judge_reads_what_the_user_said():
    for taste, (_, complaint, _) in TASTES.items():
        env = User(Task(), taste=taste, turns=3)
        bad, good = talk(env, "A BEAR FROM THE NORTH", "bye")
        assert judge("", bad, "user") == (-1, [complaint]) and len(complaint) > 10
        assert judge("", good, "user") == (1, [])
    assert judge("", "Name one tree.", "user") == (0, [])


def test_users_of_any_taste_differ_and_siblings_share_one():
    tastes = {User(Task(seed=seed), taste="any").taste for seed in range(30)}
    assert tastes == set(TASTES)
    assert User(Task(seed=5), 0, taste="any").taste == User(Task(seed=5), 1, taste="any").taste


@pytest.mark.parametrize(
    ("options", "message"),
    [({"taste": "shrt"}, "no taste 'shrt'. Did you mean short"), ({"turns": 0}, "user.turns is 0")],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        open_source("user", options, split="train", seed=0)
