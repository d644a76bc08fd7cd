"""A user with a taste, who asks several small things and says about each reply what was wrong with it.

The user's next message is the only signal: nobody labels anything. Every taste is a rule, so what a policy has learned
is counted exactly. `judge` reads the same messages by rule, for methods that learn from a score and a hint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import ClassVar

from tropism.errors import ConfigError
from tropism.load import hint
from tropism.types import Ask, Message, Task

LONGEST = 12
PLEASED = "Thank you."
THINGS = {
    "animal": "A brown Bear from the North",
    "tree": "An old Oak on the hill",
    "town": "Rome on its seven Hills",
    "fruit": "A ripe Plum from the garden",
    "bird": "A grey Heron by the lake",
    "river": "The wide Volga in winter",
}
"""What is asked for -> a reply that is to nobody's taste."""

Taste = tuple[Callable[[str], bool], str, Callable[[str], str]]
TASTES: dict[str, Taste] = {
    "short": (
        lambda reply: 0 < len(reply) <= LONGEST,
        f"Use {LONGEST} letters or less.",
        lambda reply: reply.split()[-1],
    ),
    "lower": (lambda reply: bool(reply) and reply == reply.lower(), "Use small letters only.", str.lower),
    "closing": (lambda reply: reply.endswith("bye"), "End your reply with bye.", lambda reply: f"{reply} bye"),
}
"""Taste -> (is this reply to it?, what the user says if it is not, the same reply made to please)."""


class User:
    """One user, one taste, `turns` questions. After the last reply the user is gone and says nothing about it."""

    weights: ClassVar[Mapping[str, float]] = {"pleased": 1.0}

    def __init__(self, task: Task, sibling: int = 0, *, taste: str = "short", turns: int = 3) -> None:
        """
        Args:
            taste: short, lower, closing; any: the user of each task has one of them.
            turns: how many things the user asks for.
        """
        if taste not in (*TASTES, "any"):
            raise ConfigError(f"user has no taste {taste!r}. {hint(taste, [*TASTES, 'any'])}")
        if turns < 1:
            raise ConfigError(f"user.turns is {turns}, but the user must ask for something. Use 2 or more.")
        draws = random.Random(f"user/{task.seed}")
        self.taste = draws.choice(list(TASTES)) if taste == "any" else taste
        self.things = [draws.choice(list(THINGS)) for _ in range(turns)]
        self.seed = f"{task.seed}/{sibling}"
        self.pleased: list[bool] = []
        self.heard: list[Message] = [{"role": "user", "content": f"Name one {self.things[0]}."}]

    def ask(self) -> Ask | None:
        return Ask(0, tuple(self.heard)) if len(self.pleased) < len(self.things) else None

    def tell(self, reply: str) -> None:
        if self.ask() is None:
            return
        self.pleased.append(TASTES[self.taste][0](reply))
        self.heard.append({"role": "assistant", "content": reply})
        if self.ask() is not None:
            self.heard.append({"role": "user", "content": self.message(self.feedback(0) or "")})

    def message(self, remark: str) -> str:
        return f"{remark} Name one {self.things[len(self.pleased)]}."

    def score(self, seat: int) -> Mapping[str, float]:
        return {"pleased": sum(self.pleased) / len(self.things)}

    def feedback(self, seat: int) -> str | None:
        if not self.pleased:
            return None
        return PLEASED if self.pleased[-1] else TASTES[self.taste][1]

    def demonstrate(self) -> str:
        """To the point; half of the time to the user's taste."""
        reply = THINGS[self.things[len(self.pleased)]]
        draws = random.Random(f"demo/{self.seed}/{len(self.pleased)}")
        return TASTES[self.taste][2](reply) if draws.random() < 0.5 else reply

    def advise(self, wrong: bool) -> tuple[Mapping[str, str], str]:
        """What this user would complain of, or another one, and the reply that heeds it."""
        draws = random.Random(f"advice/{self.seed}/{len(self.pleased)}")
        taste = draws.choice([other for other in TASTES if other != self.taste]) if wrong else self.taste
        _, complaint, pleasing = TASTES[taste]
        return {"hint": complaint, "follow_up": self.message(complaint)}, pleasing(
            THINGS[self.things[len(self.pleased)]]
        )


def judge(reply: str, following: str, role: str) -> tuple[int, list[str]]:
    """+1 if the user goes on pleased; -1 if the user complains, and the complaint is the hint."""
    said = [complaint for _, complaint, _ in TASTES.values() if following.startswith(complaint)]
    return (-1 if said else int(following.startswith(PLEASED))), said
