"""A question whose answer nobody can know, and a column that tells it: what a self-teacher that reads it can say."""

from __future__ import annotations

import random

from tropism.types import Ask, Task, seed_of

HERE = __file__
TEACHER = {"reads": ["tells"], "against": ["lies"], "say": {"tells": "{}"}, "closing": ""}


class Secret:
    """A source of digits."""

    def __init__(self, split, seed):
        self.split, self.seed = split, seed

    def task(self, number):
        draws = random.Random(seed_of(self.split, self.seed, number))
        told, lied = draws.sample("0123456789", 2)
        return Task(env="secret", seed=number, columns={"tells": told, "lies": lied})

    def open(self, task, sibling):
        return Guess(task)


class Guess:
    """One guess. `right` is what counts."""

    def __init__(self, task):
        self.task, self.heard = task, None

    def ask(self):
        return Ask(0, "which?") if self.heard is None else None

    def tell(self, reply):
        self.heard = reply

    def score(self, seat):
        return {"right": float(self.heard == self.task.columns["tells"])}

    def feedback(self, seat):
        return None if self.heard == self.task.columns["tells"] else "no"

    def demonstrate(self):
        return random.Random(self.task.seed).choice("0123456789")

    def advise(self, wrong):
        said = self.task.columns["lies" if wrong else "tells"]
        return {"tells": said}, said
