import pytest

import world
from tropism.envs import open_source
from tropism.envs.check import check_env
from tropism.errors import ConfigError

SUMS = {"reasoning": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}
PARTS = {"sums": SUMS, "game": "tictactoe"}


def opened(**options):
    return open_source("mix", {"parts": PARTS} | options, split="train", seed=0)


def test_the_parts_take_turns_and_each_has_its_domain():
    mix, alone = opened(), open_source("tictactoe", {}, split="train", seed=0)
    tasks = [mix.task(number) for number in range(6)]
    assert [task.domain for task in tasks] == ["sums", "game"] * 3
    assert [task.env for task in tasks[:2]] == ["reasoning", "tictactoe"]
    assert [task.seed for task in tasks[1::2]] == [alone.task(number).seed for number in range(3)]


def test_what_counts_is_what_each_part_counts_alone():
    mix = opened()
    sums, game = mix.task(0), mix.task(1)
    env = mix.open(sums, 0)
    assert env.score(0) == {"earned": 0.0}
    env.tell(f"[{sums.columns['answer']}]")
    assert env.score(0) == {"earned": 1.0} and env.weights == {"earned": 1.0}
    env = mix.open(game, 0)
    env.tell("resign")
    assert env.score(game.seat) == {"earned": -1.0} and env.feedback(game.seat).startswith("there was no move")


def test_a_part_demonstrates_and_advises_if_it_can_alone():
    mix = opened()
    for number in range(2):
        env = mix.open(mix.task(number), 0)
        assert "[" in env.demonstrate() and env.advise(False)[1]
    mute = opened(parts={"a": f"{world.HERE}:World"})
    assert not hasattr(mute.open(mute.task(0), 0), "advise")


def test_it_keeps_the_promises_of_an_environment():
    assert check_env("mix", options={"parts": PARTS}, tasks=8) == []


@pytest.mark.parametrize(
    ("parts", "message"), [({}, "parts is empty"), ({"a": "tictactow"}, "there is no environment 'tictactow'")]
)
def test_parts_that_cannot_be_are_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        open_source("mix", {"parts": parts}, split="train", seed=0)
