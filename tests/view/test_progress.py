from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from tropism.types import Failure, Rollout, Task, Turn
from tropism.view.progress import Progress, table


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)


def terminal(width: int = 110) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, height=40, highlight=False), out


def pipe() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=300, highlight=False), out


def text(out: io.StringIO) -> str:
    """What was written, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def rollout(*replies: str, failure: Failure | None = None, reward: float = 1.0) -> Rollout:
    turns = tuple(Turn(context=[1], action=[2], prompt=f"board{n}\n", reply=reply) for n, reply in enumerate(replies))
    task = Task(env="tictactoe")
    return Rollout(task=task, group=0, turns=turns, reward=reward, rewards={"win": reward}, failure=failure)


def test_the_display_shows_stage_numbers_and_every_turn_of_the_latest_rollout() -> None:
    console, out = terminal()
    with Progress(console=console) as progress:
        progress.begin("play", 20, 5)
        progress.step(5, {"eval/return": -0.13}, [])
        metrics = {"reward": 0.25, "rewards/illegal/mean": 0.031, "loss": 0.5, "learning_rate": 2e-4}
        progress.step(6, metrics, [rollout("early"), rollout("first", "second", "third")])
        progress.end("play")
    shown = text(out)
    for part in ("play", "6/20", "left", "reward 0.25", "illegal 3.1%", "lr 0.0002", "eval/return -0.13", "tictactoe",
                 "board0", "first", "board1", "second", "board2", "third", "win +1"):  # fmt: skip
        assert part in shown, part
    assert "early" not in shown and "loss" not in shown


def test_a_stage_without_rewards_shows_its_loss() -> None:
    console, out = terminal()
    with Progress(console=console) as progress:
        progress.begin("format", 2, 0)
        progress.step(1, {"loss": 0.5}, [])
    assert "loss 0.5" in text(out)


def test_text_of_the_model_is_neither_markup_nor_control() -> None:
    console, out = terminal()
    with Progress(console=console) as progress:
        progress.begin("[bold]play[/bold]", 2, 0)
        progress.say("[red]said[/red] \x1b]0;title\x07")
        progress.step(1, {}, [rollout("[/nothing] [red]x[/red] \x1b[2J\x1b[5m", "\x9b31m")])
    shown = text(out)
    for part in ("[bold]play[/bold]", "[red]said[/red]", "[/nothing] [red]x[/red]", "\u241b[2J", "\ufffd31m"):
        assert part in shown
    for part in ("\x1b[2J", "\x1b[5m", "\x1b]0", "\x07", "\x9b"):
        assert part not in out.getvalue()


def test_the_terminal_is_given_back_after_an_error() -> None:
    console, out = terminal()
    with pytest.raises(KeyboardInterrupt), Progress(console=console) as progress:
        progress.begin("play", 2, 0)
        raise KeyboardInterrupt
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l") >= 0
    assert progress.live is None


def test_what_is_said_stays_above_the_display_and_the_last_picture_stays_too() -> None:
    console, out = terminal()
    with Progress(console=console) as progress:
        progress.say("before")
        progress.begin("play", 2, 0)
        progress.say("during")
        progress.step(2, {"reward": 0.125}, [rollout("the last game")])
        progress.end("play")
        progress.say("after")
    shown = text(out)
    last = shown.rindex("the last game")
    assert shown.index("before") < shown.index("during") < shown.rindex("reward 0.125") < last < shown.index("after")


def test_a_failed_rollout_is_shown_only_if_there_is_no_other_and_then_with_its_reason() -> None:
    failed = rollout("broken", failure=Failure("play", "too long"))
    for rollouts, wanted in (([rollout("fine"), failed], "fine"), ([failed], "too long"), ([rollout()], "tictactoe")):
        console, out = terminal()
        with Progress(console=console) as progress:
            progress.begin("play", 1, 0)
            progress.step(1, {}, rollouts)
        assert wanted in text(out)
        assert ("broken" in text(out)) == (wanted == "too long")


def test_without_a_terminal_there_are_few_plain_lines_and_the_last_step_is_one() -> None:
    console, out = pipe()
    with Progress(console=console) as progress:
        progress.begin("play", 500, 100)
        for step in range(101, 501):
            progress.step(step, {"reward": step / 1000, "num_tokens": 10.0 * step}, [rollout("a game")])
        progress.end("play")
    lines = out.getvalue().splitlines()
    assert lines[0] == "play: 500 steps, 100 of them done before"
    assert [line.split("  ")[0] for line in lines[1:]] == ["play 101/500", "play 500/500"]
    assert "reward 0.5" in lines[-1] and "tokens/s" in lines[-1]
    assert "\x1b" not in out.getvalue() and "a game" not in out.getvalue()


@pytest.mark.parametrize("why", ["NO_COLOR", "quiet"])
def test_on_request_a_terminal_gets_plain_lines_too(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    console, out = terminal()
    with Progress(console=console, quiet=why == "quiet", every=0.0) as progress:
        progress.begin("play", 3, 0)
        for step in (1, 2, 3):
            progress.step(step, {"reward": 0.5, "kl": float("nan")}, [])
    assert len(out.getvalue().splitlines()) == 4
    assert "\x1b" not in out.getvalue()


def test_a_table_keeps_its_text_as_text() -> None:
    console, out = pipe()
    table(["", "[b]return[/b]"], [["start", -0.13], ["end", None]], console)
    assert "[b]return[/b]" in out.getvalue() and "-0.13" in out.getvalue() and "–" in out.getvalue()
