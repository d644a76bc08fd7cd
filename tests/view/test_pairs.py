"""Pairs for a person to judge: what is shown, what is written, undone and resumed, and the screen itself."""

import asyncio
import json

import pytest
import yaml

from small import small
from tropism.cli.label import judged, screen
from tropism.config import Data
from tropism.errors import ConfigError, TropismError
from tropism.record import Run
from tropism.signals import compare
from tropism.training import judges
from tropism.training.fit import load_rows
from tropism.view.pairs import Labels, Pair, pairs_of

REPLIES = [("a", 0.0), ("b", 1.0), ("a", 0.2), ("c", 0.9)]


def recorded(path, replies=REPLIES, turns=1, prompt='[{"role": "user", "content": "q"}]'):
    """A record of two steps, with two tasks and these siblings each."""
    run = Run.create(path, yaml.safe_load("{stages: []}"), {})
    for step in (1, 2):
        rows = [
            {"step": step, "episode": 0, "group": group, "sibling": n, "seat": 0, "turn": turn, "prompt": prompt}
            | {"reply": reply, "total": total}
            for group in (0, 1)
            for n, (reply, total) in enumerate(replies)
            for turn in range(turns)
        ]
        run.save_rollouts(step, rows)
    return run


def test_a_task_shows_the_two_replies_whose_rewards_are_farthest_apart_on_drawn_sides(tmp_path):
    pairs = pairs_of(recorded(tmp_path))
    assert len(pairs) == 4 and all({pair.left, pair.right} == {"a", "b"} for pair in pairs)
    assert pairs == pairs_of(Run(tmp_path)) and len({pair.name for pair in pairs}) == 4
    sides = {tuple(pair.left for pair in pairs_of(Run(tmp_path), seed=seed)) for seed in range(8)}
    assert len(sides) > 1
    assert pairs[0].prompt == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    "how", [{"replies": [("a", 0.0), ("a", 1.0)]}, {"turns": 2}, {"replies": [("", 0.0), ("b", 1.0)]}]
)
def test_without_two_different_replies_of_one_turn_there_is_nothing_to_compare(tmp_path, how):
    with pytest.raises(ConfigError, match="nothing to compare"):
        pairs_of(recorded(tmp_path, **how))


PAIRS = [Pair(f"p{n}", "q: ", f"left {n}", f"right {n}") for n in range(4)]


def written(path):
    return [(row["chosen"], row["rejected"]) for row in map(json.loads, path.read_text().splitlines())]


def test_what_is_said_is_on_disk_at_once_and_ties_are_no_preference(tmp_path):
    labels = Labels(PAIRS, tmp_path / "out.jsonl")
    for answer in ("left", "tie", "right"):
        labels.say(labels.next, answer)
    assert written(tmp_path / "out.jsonl") == [("left 0", "right 0"), ("right 2", "left 2")]
    assert labels.done == 3 and labels.next == PAIRS[3]
    again = Labels(PAIRS, tmp_path / "out.jsonl")
    assert again.next == PAIRS[3] and again.said == labels.said


def test_undo_takes_back_one_after_another_across_sessions_and_then_does_nothing(tmp_path):
    labels = Labels(PAIRS, tmp_path / "out.jsonl")
    labels.say(PAIRS[0], "left")
    labels.say(PAIRS[1], "right")
    again = Labels(PAIRS, tmp_path / "out.jsonl")
    assert again.undo() == PAIRS[1] and again.next == PAIRS[1]
    assert written(tmp_path / "out.jsonl") == [("left 0", "right 0")]
    assert again.undo() == PAIRS[0] and again.undo() is None and written(tmp_path / "out.jsonl") == []


def test_what_was_said_of_other_pairs_stays(tmp_path):
    first = Labels(PAIRS[:2], tmp_path / "out.jsonl")
    first.say(PAIRS[0], "left")
    other = Labels(PAIRS[2:], tmp_path / "out.jsonl")
    other.say(PAIRS[2], "right")
    assert written(tmp_path / "out.jsonl") == [("left 0", "right 0"), ("right 2", "left 2")]
    assert other.undo() == PAIRS[2] and other.undo() is None and other.done == 0
    assert written(tmp_path / "out.jsonl") == [("left 0", "right 0")]


def test_preferences_of_messages_are_what_a_method_of_pairs_reads(tmp_path):
    pair = Pair("p", [{"role": "user", "content": "q"}], "good", "bad")
    labels = Labels([pair], tmp_path / "out.jsonl")
    labels.say(pair, "left")
    data = Data(path=str(tmp_path / "out.jsonl"))
    ((chosen, rejected),) = load_rows(data, small("tiny").words, 0, asked=frozenset({"pairs"}))
    assert (chosen.turns[0].reply, rejected.turns[0].reply) == ("good", "bad")


def pressed(labels, *keys):
    """The screen's texts after these keys, in a terminal that is not there."""
    pytest.importorskip("textual")

    async def go():
        app = screen(labels)
        async with app.run_test(size=(100, 30)) as pilot:
            await pilot.press(*keys)
            await pilot.pause()
            return {name: str(app.query_one(f"#{name}").render()) for name in ("prompt", "left", "right")}

    return asyncio.run(go())


def test_the_screen_shows_a_pair_and_its_keys_do_what_they_say(tmp_path):
    labels = Labels(PAIRS, tmp_path / "out.jsonl")
    assert pressed(labels) == {"prompt": "q: ", "left": "left 0", "right": "right 0"}
    assert pressed(labels, "left", "2", "t")["left"] == "left 3"
    assert labels.said == {"p0": "left", "p1": "right", "p2": "tie"}
    assert pressed(labels, "u")["left"] == "left 2"
    assert labels.done == 2


def test_markup_in_a_reply_is_shown_and_not_obeyed(tmp_path):
    labels = Labels([Pair("p", "q", "[bold]x[/bold] [5]", "y")], tmp_path / "out.jsonl")
    assert pressed(labels)["left"] == "[bold]x[/bold] [5]"


# ------------------------------------------------------------------------------------------------------------- a judge


def longer(prompt, first, second):
    return 0 if len(first) == len(second) else 1 if len(first) > len(second) else 2


def broken(prompt, first, second):
    raise RuntimeError("no idea")


def sometimes(prompt, first, second):
    return 1 / 0 if "left 0" in (first, second) else longer(prompt, first, second)


def test_a_judge_writes_the_same_file_and_what_it_fails_at_stays_open(tmp_path, capsys):
    labels = Labels(PAIRS, tmp_path / "out.jsonl")
    judged(labels, f"{__file__}:sometimes", "", 0)
    assert written(tmp_path / "out.jsonl") == [(f"right {n}", f"left {n}") for n in (1, 2, 3)]
    assert labels.next == PAIRS[0] and "1 of 4 pairs could not be judged" in capsys.readouterr().out
    judged(labels, f"{__file__}:longer", "", 0)
    assert labels.next is None and len(written(tmp_path / "out.jsonl")) == 4


def test_a_judge_that_never_says_anything_is_an_error(tmp_path):
    with pytest.raises(TropismError, match="gave no verdict at all"):
        judged(Labels(PAIRS, tmp_path / "out.jsonl"), f"{__file__}:broken", "", 0)


def test_the_command_labels_a_run_by_a_judge(tmp_path, capsys):
    from tropism.cli.label import label

    recorded(tmp_path, replies=[("short", 0.0), ("rather long", 1.0)])
    label(str(tmp_path), out=str(tmp_path / "p.jsonl"), judge=f"{__file__}:longer")
    assert [chosen[0]["content"] for chosen, _ in written(tmp_path / "p.jsonl")] == ["rather long"] * 4
    assert "4 of 4 pairs seen; preferences in" in capsys.readouterr().out


def test_a_model_that_judges_pairs_is_asked_for_its_likeliest_verdict(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(judges, "open_comparer", lambda judge: seen.append(judge) or compare.by_function(longer))
    judged(Labels(PAIRS, tmp_path / "out.jsonl"), "some/model", "", 0)
    assert [judge.temperature for judge in seen] == [0.0]
