"""Several environments as one: their tasks in turn, each with the name of its part as domain, so that every domain may
have a teacher of its own. What counts is `earned`: the sum that each environment counts when it is alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from tropism.errors import ConfigError
from tropism.types import Source, Task


class Mix:
    """A source: task n is task n // P of part n % P, for P parts."""

    def __init__(self, split: Literal["train", "test"], seed: int, /, *, parts: Mapping[str, Any]) -> None:
        """
        Args:
            parts: domain -> environment, as in a recipe: {sums: {reasoning: {level: 1}}, game: tictactoe}.
        """
        from tropism.envs import open_source

        if not parts:
            raise ConfigError("mix.parts is empty, so there is nothing to play. Name environments: {sums: reasoning}.")
        self.domains = tuple(parts)
        self.sources: dict[str, Source] = {}
        for domain, given in parts.items():
            name, options = (given, {}) if isinstance(given, str) else next(iter(dict(given).items()))
            self.sources[domain] = open_source(str(name), options or {}, split=split, seed=seed)

    def task(self, number: int) -> Task:
        """Its columns and its seed are those of the part."""
        domain = self.domains[number % len(self.domains)]
        return replace(self.sources[domain].task(number // len(self.domains)), domain=domain)

    def open(self, task: Task, sibling: int) -> Part:
        return Part(self.sources[task.domain].open(task, sibling))


class Part:
    """An environment among others: all that it offers, under one common part of the score."""

    def __init__(self, env: Any) -> None:
        self.env, self.ask, self.tell, self.feedback = env, env.ask, env.tell, env.feedback
        for name in ("demonstrate", "advise"):
            if hasattr(env, name):
                setattr(self, name, getattr(env, name))

    def score(self, seat: int) -> Mapping[str, float]:
        parts = self.env.score(seat)
        weights = getattr(self.env, "weights", dict.fromkeys(parts, 1.0))
        return {"earned": sum(weights.get(name, 0.0) * value for name, value in parts.items())}

    @property
    def weights(self) -> Mapping[str, float]:
        return {"earned": 1.0}
