"""Sums in a conversation: the user asks one, says what was wrong with the reply, and asks the next."""

import random
from collections.abc import Mapping
from typing import Any, Literal

from tropism.envs.reasoning import Question, Reasoning
from tropism.errors import ConfigError
from tropism.types import Ask, Message, Task

FINE = "yes"


class Talk(Reasoning):
    """A source: each task is a conversation over `turns` tasks of `reasoning`."""

    def __init__(self, split: Literal["train", "test"], seed: int, /, *, turns: int = 2, **options: Any) -> None:
        if turns < 2:
            raise ConfigError(f"talk.turns is {turns}, but nobody would answer the last reply. Use 2 or more.")
        super().__init__(split, seed, **options)
        self.turns = turns

    def open(self, task: Task, sibling: int) -> "Conversation":
        first = super().open(task, sibling)
        others = [self.task(seed % 2**20) for seed in random.Random(task.seed).choices(range(2**20), k=self.turns - 1)]
        return Conversation([first, *(super(Talk, self).open(other, sibling) for other in others)], task.seed)


class Conversation:
    """Questions one after another. After the last reply the user is gone and says nothing about it."""

    weights: Mapping[str, float] = {"correct": 1.0}

    def __init__(self, questions: list[Question], seed: int) -> None:
        self.questions, self.seed, self.answered = questions, seed, 0
        self.heard: list[Message] = [{"role": "user", "content": questions[0].prompt}]

    def ask(self) -> Ask | None:
        return Ask(0, tuple(self.heard)) if self.answered < len(self.questions) else None

    def tell(self, reply: str) -> None:
        if self.ask() is None:
            return
        self.questions[self.answered].tell(reply)
        self.answered += 1
        self.heard.append({"role": "assistant", "content": reply})
        if self.answered < len(self.questions):
            self.heard.append({"role": "user", "content": self.message(self.feedback(0) or FINE)})

    def message(self, remark: str) -> str:
        return f"{remark}; {self.questions[self.answered].prompt}"

    def score(self, seat: int) -> Mapping[str, float]:
        return {"correct": sum(bool(question.correct) for question in self.questions) / len(self.questions)}

    def feedback(self, seat: int) -> str | None:
        return self.questions[self.answered - 1].feedback(seat) if self.answered else None

    def demonstrate(self) -> str:
        return self.questions[self.answered].demonstrate()

    def advise(self, wrong: bool) -> tuple[Mapping[str, str], str]:
        """What this user would say of a wrong answer, or would say if wrong, and the reply that heeds it; half of what
        is right is said of a right answer, whose follow-up says no more than that it was right."""
        texts, reply = self.questions[self.answered].advise(wrong)
        draws = random.Random(f"next/{self.seed}/{self.answered}")
        asked, fine = draws.choice(self.questions).prompt, not wrong and draws.random() < 0.5
        return {"hint": texts["feedback"], "follow_up": f"{FINE if fine else texts['feedback']}; {asked}"}, reply


def judge(reply: str, following: str, role: str) -> tuple[int, list[str]]:
    """+1 if the user goes on content; -1 if the user says what the answer is, which is the hint."""
    remark = following.partition(";")[0]
    return (1, []) if remark == FINE else (-1, [remark]) if remark.startswith("it is ") else (0, [])
