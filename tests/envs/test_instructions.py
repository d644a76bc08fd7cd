"""recipes/instructions.py: the gold reward by hand, and that length is a sign of quality only up to a point."""

import statistics
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "recipes"))
import instructions

from tropism.envs import open_source
from tropism.envs.check import check_env

HERE = f"{instructions.__file__}:Instructions"


def test_the_environment_keeps_the_contract():
    assert check_env(HERE) == []


@pytest.mark.parametrize(
    ("reply", "content", "form", "brevity"),
    [
        ("plum, fig, pear.", 1, 1, 1),
        ("plum, fig, pear", 1, 0, 1),
        ("plum, fig.", 2 / 3, 1, 1),
        ("plum, fig, plum.", (2 - 0.5) / 3, 1, 1),
        ("plum, fig, owl.", (2 - 0.5) / 3, 1, 1),
        ("plum, fig, pear, kiwi.", (3 - 0.5) / 3, 1, 1),
        ("Plum, fig, pear.", 1, 0, 1),
        ("plum, fig, pear. " + "x" * 31, (3 - 0.5) / 3, 0, 0.5),
        ("", 0, 0, 0),
        ("owl, owl, owl.", 0, 1, 1),
    ],
)
def test_criteria_by_hand(reply, content, form, brevity):
    found = instructions.judged(reply, "fruits", 3)
    assert (found["content"], found["format"], found["brevity"]) == pytest.approx((content, form, brevity))
    assert found["gold"] == pytest.approx(0.6 * content + 0.2 * form + 0.2 * brevity)


def test_what_content_is_at_odds_with_counts_letters_and_is_no_part_of_gold():
    assert [instructions.judged("x" * n, "fruits", 3)["terse"] for n in (0, 32, 64, 90)] == [1, 0.5, 0, 0]
    assert instructions.letters("x" * 25) == {"letters": 2.5}
    one, other = (instructions.judged(reply, "fruits", 3) for reply in ("plum, fig, pear.", "plum, melon, peach."))
    assert one["gold"] == other["gold"] and one["terse"] > other["terse"]


def demonstrations(count=2000):
    source = open_source(HERE, {}, split="train", seed=0)
    for number in range(count):
        env = source.open(source.task(number), 0)
        reply = env.demonstrate()
        yield reply, instructions.judged(reply, env.kind, env.count), env.count


def test_demonstrations_are_of_mixed_worth_and_the_longer_one_is_usually_better():
    rows = [(len(reply) / count, judged["gold"]) for reply, judged, count in demonstrations()]
    gold = [value for _, value in rows]
    assert 0.5 < statistics.fmean(gold) < 0.85 and 0.05 < sum(value > 0.99 for value in gold) / len(gold) < 0.4
    short = [value for length, value in rows if length < 4]
    long = [value for length, value in rows if length >= 4]
    assert statistics.fmean(long) > statistics.fmean(short) + 0.1


def test_beyond_what_was_asked_for_length_is_worth_less():
    things = instructions.THINGS["fruits"]
    golds = [instructions.judged(", ".join(things[:n]) + ".", "fruits", 4)["gold"] for n in range(1, 9)]
    assert golds[:4] == sorted(golds[:4]) and golds[3:] == sorted(golds[3:], reverse=True) and max(golds) == 1.0
