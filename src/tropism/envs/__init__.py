"""Environments: text in, text out. They know nothing of tokens or tensors, are used once, and any reply is legal.

A class of one's own is named `file.py:Class`. It is either an environment,

    class Guess:
        seats = 1                                # optional: tasks are dealt to the seats in turn
        weights = {"right": 1.0}                 # optional: which parts of `score` count; without it all, with weight 1
        per_reply = frozenset({"illegal"})       # optional: parts that reports divide by the number of replies
        def __init__(self, task, sibling, *, high=10): ...           # options are keyword-only
        def ask(self): ...
        def tell(self, reply): ...
        def score(self, seat): ...
        def feedback(self, seat): ...
        def demonstrate(self): ...               # optional: a reply to the current ask, to learn a format from

or a source of tasks, `Class(split, seed, **options)` with `task` and `open`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from tropism.errors import ConfigError
from tropism.load import hint, load
from tropism.types import Env, Source, Task, seed_of

Split = Literal["train", "test"]

ENVS = {
    "tictactoe": "tropism.envs.tictactoe:TicTacToe",
    "reasoning": "tropism.envs.reasoning:Reasoning",
    "user": "tropism.envs.user:User",
    "dataset": "tropism.envs.dataset:Dataset",
    "mix": "tropism.envs.mix:Mix",
}


def find_class(name: str) -> Any:
    """The environment or source of this name."""
    if name not in ENVS and ":" not in name:
        raise ConfigError(f"there is no environment {name!r}. {hint(name, ENVS)} Your own: file.py:Class.")
    found = load(ENVS.get(name, name))
    if not inspect.isclass(found):
        raise ConfigError(f"{name} is a {type(found).__name__}, but an environment is a class with ask, tell, score.")
    return found


def options_of(cls: Any) -> dict[str, Any]:
    """Option -> default, the parameters after (task, sibling) or (split, seed); inspect's `empty` where required."""
    parameters = list(inspect.signature(cls).parameters.values())
    return {p.name: p.default for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def open_source(name: str, options: Mapping[str, Any], *, split: Split, seed: int) -> Source:
    """Tasks of a registered environment, or of a class of one's own. Train and test never share a task's seed."""
    cls = find_class(name)
    is_source = hasattr(cls, "open")
    parameters = inspect.signature(cls).parameters
    if len(parameters) < 2:
        first = "split, seed" if is_source else "task, sibling"
        raise ConfigError(f"{name} takes ({', '.join(parameters)}), but must take ({first}) and then its options.")
    known = options_of(cls)
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in known:
                raise ConfigError(f"{name} has no option {option!r}. {hint(option, known)}")
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"{name} needs the option {option!r}, which was not given.")
    if is_source:
        source: Source = cls(split, seed, **options)
        return source
    endless = Endless(cls, name, options, split, seed)
    endless.open(endless.task(0), 0)  # an option with an impossible value is an error now, not a failed rollout later
    return endless


class Endless:
    """Tasks without end for an environment that makes everything from a seed."""

    def __init__(self, cls: Any, name: str, options: Mapping[str, Any], split: Split, seed: int) -> None:
        self.cls, self.name, self.options, self.split, self.seed = cls, name, dict(options), split, seed

    def task(self, number: int) -> Task:
        seat = number % int(getattr(self.cls, "seats", 1))
        return Task(env=self.name, seed=seed_of(self.seed, self.split, number), seat=seat)

    def open(self, task: Task, sibling: int) -> Env:
        env: Env = self.cls(task, sibling, **self.options)
        return env
