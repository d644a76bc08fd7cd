"""Who scores the student's tokens a second time, and what it may read that the student may not: settings only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tropism.errors import ConfigError

PER_TURN = ("feedback", "follow_up", "hint")
"""What differs from turn to turn of one episode, so that every turn becomes a row."""

SAY = {
    "sibling": "A correct answer to this:\n{}",
    "wrong_sibling": "A wrong answer to this:\n{}",
    "feedback": "What was said about an earlier attempt:\n{}",
    "follow_up": "The user's next message, which the answer should anticipate:\n{}",
    "hint": "A hint from the user:\n{}",
}
"""How each thing that a teacher may read is introduced; {} is its place."""
COLUMN = "A reference solution:\n{}"
"""The same for a column of the task."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model that reads the student's own tokens, perhaps after a better prompt.

    Its prompt is the student's, with what it `reads` and then `closing` appended to the last user message, each as a
    paragraph. Where that is longer than the model can read, what it reads is cut at its end; nothing else is.
    """

    who: str | Mapping[str, str] = "live"
    """live: the student itself; frozen: as it started; ema or synced: a copy that follows it; another model's path;
    or a path for every domain of the tasks."""
    rate: float = 0.05
    """ema: share of the student that enters the copy after each rollout batch. Of an adapter each of the two factors is
    averaged, which is not the average of their product."""
    every: int = 10
    """synced: rollout batches between two copies."""
    reads: tuple[str, ...] = ()
    """sibling, wrong_sibling, feedback, follow_up, hint, or the name of a column of the task."""
    need: Literal["all", "any", "first"] = "all"
    """Which of `reads` must be there: all of them; any, and all that are there are read; or the first one found."""
    against: tuple[str, ...] = ()
    """What stands in their places, in the same words, when `counter_logp` is measured: the opposite hint."""
    say: Mapping[str, str] = field(default_factory=dict)
    """Other words than the usual ones, by what is read: {feedback: "The referee said: {}"}."""
    closing: str = "Now answer the request above."
    """The last paragraph of its prompt."""
    top_k: int | Literal["all"] = 0
    """How many tokens of the vocabulary it is compared on at each place; 0: only the one that was sampled."""
    support: Literal["student", "teacher", "overlap"] = "student"
    """Whose likeliest tokens those are; overlap: those of the student's that are also the teacher's."""
    select: Literal["first", "sequence", "token"] = "first"
    """Which of several hints: the first; the one under which teacher and student share most of their likeliest tokens
    over the whole reply; or at each token."""
    must_add: float = 0.1
    """What it reads must add so much to the share of successes before a run starts, where it is the student itself; -1
    asks for nothing, not even that it says something else than the student."""

    def __post_init__(self) -> None:
        if self.who == "" or self.who == {}:
            raise ConfigError("teacher.who is empty. Use live, frozen, ema, synced, a model's path, or one per domain.")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"teacher.rate is {self.rate}, but it is a share of the student: use 0.05, say.")
        if self.every < 1:
            raise ConfigError(f"teacher.every is {self.every}, but must be at least 1.")
        if len(set(self.reads)) < len(self.reads):
            raise ConfigError(f"teacher.reads names something twice: {', '.join(self.reads)}.")
        if self.against and len(self.against) != len(self.reads):
            raise ConfigError(
                f"teacher.against has {len(self.against)} entries and teacher.reads {len(self.reads)}, but each entry "
                "stands in the place of one: give as many."
            )
        if isinstance(self.top_k, int) and self.top_k < 0:
            raise ConfigError(f"teacher.top_k is {self.top_k}. Use 0 for the sampled token, or all for the vocabulary.")
        if self.select != "first" and not self.top_k:
            raise ConfigError(
                f"teacher.select is {self.select}, which compares likeliest tokens, but teacher.top_k is 0. Use 4, say."
            )
        for name, text in self.say.items():
            if text.count("{}") != 1:
                raise ConfigError(f"teacher.say.{name} is {text!r}, but needs one {{}}, the place of what is read.")

    def words(self, name: str) -> str:
        """The text around what is read."""
        return self.say.get(name) or SAY.get(name, COLUMN)

    @property
    def per_turn(self) -> bool:
        return any(name in PER_TURN for name in (*self.reads, *self.against))


def teacher_of(method: object) -> Teacher | None:
    """The teacher in a method's settings, if it has one."""
    found = getattr(method, "teacher", None)
    return found if isinstance(found, Teacher) else None


def apart(method: object) -> bool:
    """Every turn is a row: the method's teacher reads something else at each of them."""
    teacher = teacher_of(method)
    return teacher is not None and teacher.per_turn


def likeliest(method: object) -> int:
    """How many of its likeliest tokens the sampler should return, since the method will compare a teacher on them."""
    teacher = teacher_of(method)
    return teacher.top_k if teacher and teacher.top_k != "all" and teacher.support != "teacher" else 0
