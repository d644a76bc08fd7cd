"""Does an environment keep its promises? `assert not check_env(Mine)`.

Plays every task twice with replies that no one would expect, and says in words what is broken.
"""

from __future__ import annotations

import inspect
import math
import numbers
import random
from collections.abc import Mapping
from typing import Any

from tropism.envs import Endless, open_source
from tropism.types import Ask, Env, Source, Task

ROLES = ("system", "user", "assistant", "tool")
GARBAGE = (
    "",
    " ",
    "\n\n",
    "no",
    "[",
    "[]",
    "[x]",
    "[-1]",
    "[999]",
    "nan",
    "\x00",
    "é→☃ 你好",
    "[٣]",
    "{}",
    "%s",
    "9" * 5000,
)
LONG = "so " * 20000


class Broken(Exception):
    """What an environment did that it must not do."""


def check_env(
    what: Any, *, tasks: int = 20, max_turns: int = 64, options: Mapping[str, Any] | None = None
) -> list[str]:
    """What is wrong with an environment; empty if nothing was found.

    Args:
        what: an environment class, a source class, a source, or a name such as `file.py:Class`.
        tasks: how many tasks are played, each of them twice with one sibling number and once with another.
        max_turns: an episode must be over after this many replies.
    """
    try:
        source = _source(what, options or {})
    except Exception as error:
        return [f"it cannot be opened: {type(error).__name__}: {error}"]
    found: dict[str, str] = {}
    for number in range(tasks):
        try:
            _check_task(source, number, max_turns)
        except Broken as error:
            found.setdefault(str(error), f"task {number}: {error}")
    return list(found.values())


def _source(what: Any, options: Mapping[str, Any]) -> Source:
    made: Any = what
    if isinstance(what, str):
        made = open_source(what, options, split="train", seed=0)
    elif inspect.isclass(what) and hasattr(what, "open"):
        made = made("train", 0, **options)
    elif inspect.isclass(what):
        made = Endless(what, what.__name__, options, "train", 0)
    source: Source = made
    return source


def _check_task(source: Source, number: int, max_turns: int) -> None:
    task = _call("task", source.task, number)
    if _call("task", source.task, number) != task:
        raise Broken("task(n) gave two different tasks for one n; it must be a function of n.")
    replies: list[str] = []
    first = _play(_call("open", source.open, task, 0), task, random.Random(f"check/{number}"), replies, max_turns)
    again = _play(_call("open", source.open, task, 0), task, None, replies, max_turns)
    for turn, (one, two) in enumerate(zip(first, again, strict=False)):
        if one != two:
            raise Broken(
                f"the same task, sibling and replies gave another episode at turn {turn}: {_short(one)} and then "
                f"{_short(two)}. Draw everything random from task.seed and the sibling number."
            )
    if len(first) != len(again):
        raise Broken(f"the same task, sibling and replies gave {len(first) - 1} turns once and {len(again) - 1} then.")
    sibling = _call("open", source.open, task, 1)
    opening = _call("ask", sibling.ask)
    if opening != first[0][0]:
        raise Broken(
            f"siblings were asked different first questions, {_short(first[0][0])} and {_short(opening)}. Draw the "
            "opening from task.seed alone; the sibling number decides only what comes after the first reply."
        )


Moment = tuple[Ask | None, dict[int, dict[str, float]], dict[int, str | None]]


def _play(env: Env, task: Task, draws: random.Random | None, replies: list[str], max_turns: int) -> list[Moment]:
    """The episode, moment by moment. Without `draws` the replies are those given; with, they are made up and kept."""
    seats, told, seen = {task.seat}, 0, []
    parts: dict[int, set[str]] = {}
    while True:
        ask = _call("ask", env.ask)
        if _call("ask", env.ask) != ask:
            raise Broken("asking twice changed the question. ask() must change nothing; only tell() does.")
        if ask is not None:
            _check_ask(ask)
            seats.add(ask.seat)
        scores = {seat: _check_score(env, seat, parts) for seat in sorted(seats)}
        words = {seat: _check_feedback(env, seat) for seat in sorted(seats)}
        seen.append((ask, scores, words))
        if ask is None:
            if told == 0:
                raise Broken("it was over before the first question, so there is nothing to learn from.")
            return seen
        if told == max_turns:
            raise Broken(f"it still asks after {told} replies. End the episode, also for replies that make no sense.")
        if draws is not None:
            replies.append(_made_up(env, draws))
        if told == len(replies):
            raise Broken("the same task, sibling and replies gave a longer episode the second time.")
        _call("tell", env.tell, replies[told])
        told += 1


def _made_up(env: Env, draws: random.Random) -> str:
    kind = draws.random()
    if kind < 0.5 and hasattr(env, "demonstrate"):
        reply = _call("demonstrate", env.demonstrate)
        if not isinstance(reply, str):
            raise Broken(f"demonstrate() gave {_short(reply)}, but a reply is a text.")
        return reply
    if kind < 0.7:
        return f"[{draws.randrange(1, 10)}]"
    return LONG if kind > 0.97 else draws.choice(GARBAGE)


def _check_ask(ask: Any) -> None:
    if not isinstance(ask, Ask):
        raise Broken(f"ask() gave {_short(ask)}, but must give tropism.types.Ask(seat, prompt), or None at the end.")
    if isinstance(ask.prompt, str) and ask.prompt:
        return
    if not isinstance(ask.prompt, tuple) or not ask.prompt:
        raise Broken(
            f"the prompt is {_short(ask.prompt)}, but must be a text or a tuple of messages, not empty (a list could "
            "still change after it was recorded)."
        )
    for message in ask.prompt:
        if (
            not isinstance(message, Mapping)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise Broken(
                f"a message is {_short(message)}, but must be {{'role': one of {', '.join(ROLES)}, 'content': text}}."
            )


def _check_score(env: Env, seat: int, parts: dict[int, set[str]]) -> dict[str, float]:
    score = _call("score", env.score, seat)
    if not isinstance(score, Mapping):
        raise Broken(f"score({seat}) gave {_short(score)}, but must give named parts such as {{'win': 1.0}}.")
    for name, value in score.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise Broken(f"score({seat})[{name!r}] is {_short(value)}, but every part must be a finite number.")
    if parts.setdefault(seat, set(score)) != set(score):
        raise Broken(
            f"score({seat}) had the parts {sorted(parts[seat])} first and {sorted(score)} later. Every part must be "
            "there from the start, 0 until it is earned."
        )
    for extra in ("weights", "per_reply"):
        unknown = set(getattr(env, extra, ())) - set(score)
        if unknown:
            raise Broken(f"`{extra}` names {sorted(unknown)}, but score({seat}) has only {sorted(score)}.")
    return {name: float(value) for name, value in score.items()}


def _check_feedback(env: Env, seat: int) -> str | None:
    words = _call("feedback", env.feedback, seat)
    if words is not None and not isinstance(words, str):
        raise Broken(f"feedback({seat}) gave {_short(words)}, but must give a text or None.")
    return words


def _call(name: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        shown = ", ".join(_short(a) for a in args if not isinstance(a, Task))
        more = " Any reply is legal: a bad one may end the episode or earn less." if name == "tell" else ""
        raise Broken(f"{name}({shown}) raised {type(error).__name__}: {error}.{more}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
