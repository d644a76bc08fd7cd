"""Sums whose hints are as good as you ask for: what does a method do with a teacher that does not deserve trust?

    right      the worked sum, against one with a slip in it
    noisy      the two exchanged in two questions of five
    useless    both of another sum
    inverted   the two exchanged
    leaky      the answer alone, which spares the work, against a wrong one
    styled     right, in a style that does not matter

The style is what stands between two steps: a space or a comma, either as likely in demonstrations. A teacher has read
commas alone if it is `styled`. `commas` / `gaps` is how often the policy writes one.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from tropism.envs.reasoning import Question, Reasoning
from tropism.errors import ConfigError
from tropism.types import Task

KINDS = ("right", "noisy", "useless", "inverted", "leaky", "styled")


class Hints(Reasoning):
    """A source: the tasks of `reasoning`, whose columns worked and decoy are what the kind says."""

    def __init__(self, split: Literal["train", "test"], seed: int, /, *, kind: str = "right", **options: Any) -> None:
        if kind not in KINDS:
            raise ConfigError(f"hints are not {kind!r}. Use one of {', '.join(KINDS)}.")
        self.kind = kind
        super().__init__(split, seed, **options)

    def task(self, number: int) -> Task:
        task = super().task(number)
        draws = random.Random(f"hints/{task.seed}")
        told = super().task(number + 7919) if self.kind == "useless" else task
        worked, decoy = told.columns["worked"], told.columns["decoy"]
        if self.kind == "inverted" or (self.kind == "noisy" and draws.random() < 0.4):
            worked, decoy = decoy, worked
        if self.kind == "leaky":
            worked, decoy = worked.split()[-1], decoy.split()[-1]
        share = 1.0 if self.kind == "styled" else 0.5
        written = {"worked": styled(worked, draws, share), "decoy": styled(decoy, draws, share)}
        return replace(task, columns={**task.columns, **written})

    def open(self, task: Task, sibling: int) -> "Styled":
        asked = super().open(task, sibling)
        return Styled(asked, random.Random(f"style/{task.seed}/{sibling}"))


class Styled:
    """A question whose demonstrations have commas or spaces between their steps."""

    weights: Mapping[str, float] = {"correct": 1.0}

    def __init__(self, asked: Question, draws: random.Random) -> None:
        self.asked, self.draws, self.reply = asked, draws, ""
        self.ask, self.feedback = asked.ask, asked.feedback

    def tell(self, reply: str) -> None:
        self.asked.tell(reply)
        self.reply = reply

    def score(self, seat: int) -> Mapping[str, float]:
        work = self.reply.rpartition("[")[0].strip()
        commas, spaces = float(work.count(",")), float(work.count(" "))
        return {**self.asked.score(seat), "commas": commas, "gaps": commas + spaces}

    def demonstrate(self) -> str:
        return styled(self.asked.demonstrate(), self.draws, 0.5)

    def advise(self, wrong: bool) -> tuple[Mapping[str, str], str]:
        _, reply = self.asked.advise(wrong)
        reply = styled(reply, self.draws, self.draws.choice((0.5, 1.0)))
        reply = reply.split()[-1] if self.draws.random() < 0.2 else reply
        return {"worked": reply, "sibling": reply}, reply


def styled(reply: str, draws: random.Random, share: float) -> str:
    """Commas for this share of the spaces between steps; before the answer stays a space."""
    *steps, answer = reply.split(" ")
    gaps = ["," if draws.random() < share else " " for _ in steps[1:]]
    work = "".join(gap + step for gap, step in zip(["", *gaps], steps, strict=False))
    return f"{work} {answer}" if work else answer
