"""A judge of pairs: asked twice, with either reply first; what does not survive the exchange is a tie.

Judges prefer what they read first, or last, so a win counts only where both orders agree. Zheng et al. 2023,
arXiv:2306.05685, section 3.4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tropism.signals.judge import Answering, read_answers
from tropism.types import Failure

PART = "comparison"
Verdict = Literal["left", "right", "tie"]
Shown = tuple[str, str, str]
"""(prompt, the first reply, the second)"""
Comparer = Callable[[Sequence[Shown], int], "Sequence[int | Failure]"]
"""(what is shown, seed) -> 1 if the first is better, 2 if the second is, 0 if neither."""

QUESTION = """Somebody asked this:
{prompt}

First reply:
{first}

Second reply:
{second}

Which reply is better? Think briefly. Then write \\boxed{1} for the first, \\boxed{2} for the second, or \\boxed{0} if \
neither is better."""
SLOT = re.compile(r"\{(prompt|first|second)\}")
CHOICE = re.compile(r"\\boxed\{\s*([012])\s*\}")


def verdicts(pairs: Sequence[Shown], ask: Comparer, seed: int = 0) -> list[Verdict | Failure]:
    """Of (prompt, left, right) each; a failure where either order gave none."""
    exchanged = [(prompt, right, left) for prompt, left, right in pairs]
    said = list(ask([*pairs, *exchanged], seed))
    return [decided(one, other) for one, other in zip(said[: len(pairs)], said[len(pairs) :], strict=True)]


def decided(one: int | Failure, other: int | Failure) -> Verdict | Failure:
    """`other` was shown the same pair the other way round."""
    for found in (one, other):
        if isinstance(found, Failure):
            return found
    return "left" if (one, other) == (1, 2) else "right" if (one, other) == (2, 1) else "tie"


def by_function(function: Callable[[str, str, str], Any]) -> Comparer:
    """A rule: (prompt, first reply, second reply) -> 1, 2 or 0."""

    def one(shown: Shown) -> int | Failure:
        try:
            answer = function(*shown)
        except Exception as error:  # somebody else's code
            return Failure(PART, f"{type(error).__name__}: {error}")
        return int(answer) if answer in (0, 1, 2) else Failure(PART, f"{answer!r:.80} is not 1, 2 or 0")

    return lambda pairs, seed: [one(shown) for shown in pairs]


def by_model(answering: Answering, question: str = "") -> Comparer:
    """A model that is asked `question`, where {prompt}, {first} and {second} are filled in."""

    def asked(shown: Shown) -> str:
        words = dict(zip(("prompt", "first", "second"), shown, strict=True))
        return SLOT.sub(lambda slot: words[slot[1]], question or QUESTION)

    def compare(pairs: Sequence[Shown], seed: int) -> list[int | Failure]:
        return read_answers(answering, [asked(shown) for shown in pairs], choice_in, seed)

    return compare


def choice_in(answer: str | Failure, asked: str) -> int | Failure:
    """What a model's answer says; its last box counts, for it may have thought aloud before."""
    if isinstance(answer, Failure):
        return answer
    boxes = CHOICE.findall(answer.rpartition(asked)[2])  # some servers repeat the question, which holds boxes itself
    if not boxes:
        return Failure(PART, f"the answer has no \\boxed{{1}}, {{2}} or {{0}}: {answer!r:.120}")
    return int(boxes[-1])
