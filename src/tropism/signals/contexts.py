"""What a teacher reads: the student's prompt, and what the student was not told.

Nothing here reaches the student: a context is made from a finished rollout, for one forward pass of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tropism.rollout.render import Render
from tropism.teacher import Teacher
from tropism.types import Message, Prompt, Rollout

Told = Mapping[str, Sequence[str]]
"""What there is to read, by name; several texts are several hints to choose from."""


@dataclass(frozen=True)
class Opening:
    """Where a row begins: a rollout, its siblings, and the turn that the row's first action token belongs to."""

    rollout: Rollout
    turn: int
    siblings: Sequence[Rollout]
    """The whole group, the rollout itself included."""


@dataclass(frozen=True)
class Context:
    """Token ids of a teacher's prompt."""

    ids: tuple[int, ...]
    cut: bool = False
    """What it reads did not fit and was shortened."""


def available(opening: Opening, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What of these names there is to read for one row; a name without any text is left out."""
    found = {name: texts_of(opening, name) for name in names}
    kept = {name: tuple(text for text in texts if text.strip()) for name, texts in found.items()}
    return {name: texts for name, texts in kept.items() if texts}


def texts_of(opening: Opening, name: str) -> Sequence[str]:
    """What comes from play, or a column of the task."""
    if name in PLAYED:
        return PLAYED[name](opening)
    value = opening.rollout.task.columns.get(name)
    return [] if value is None else [str(value)]


def sibling(opening: Opening, success: bool) -> Sequence[str]:
    """The replies of the first other member of the group that succeeded, or failed."""
    others = (r for r in opening.siblings if r is not opening.rollout and r.success == success and r.turns)
    return ["\n".join(turn.reply for turn in other.turns) for other in others][:1]


def follow_up(opening: Opening) -> Sequence[str]:
    """What the user said after the reply; for data a column of that name."""
    rollout, number = opening.rollout, opening.turn
    if number + 1 < len(rollout.turns):
        return [added(rollout.turns[number].prompt, rollout.turns[number].reply, rollout.turns[number + 1].prompt)]
    return [str(rollout.task.columns.get("follow_up") or "")]


def added(prompt: Prompt, reply: str, following: Prompt) -> str:
    """The words that came after a reply: the next message of the user, or the rest of a plain text."""
    if isinstance(following, str):
        before = prompt + reply if isinstance(prompt, str) else ""
        return following[len(before) :] if following.startswith(before) else ""
    users = [message["content"] for message in following[len(prompt) :] if message["role"] == "user"]
    return users[-1] if users else ""


PLAYED: dict[str, Callable[[Opening], Sequence[str]]] = {
    "sibling": lambda opening: sibling(opening, True),
    "wrong_sibling": lambda opening: sibling(opening, False),
    "feedback": lambda opening: [opening.rollout.turns[opening.turn].feedback or ""],
    "hint": lambda opening: opening.rollout.turns[opening.turn].hints,
    "follow_up": follow_up,
}
"""What comes from play; any other name is a column of the task."""


def chosen(teacher: Teacher, found: Told) -> dict[str, Sequence[str]] | None:
    """What of it is read, in the order of `reads`; None where what the teacher needs is missing."""
    there = {name: found[name] for name in teacher.reads if name in found}
    if teacher.need == "all":
        return there if len(there) == len(teacher.reads) else None
    if teacher.need == "first":
        there = dict(list(there.items())[:1])
    return there or None


def opposite(teacher: Teacher, read: Told, found: Told) -> dict[str, Sequence[str]] | None:
    """The same paragraphs with what stands against them in their places; None where that is missing."""
    places = dict(zip(teacher.reads, teacher.against, strict=True))
    there = {name: found[places[name]] for name in read if places[name] in found}
    return there if len(there) == len(read) else None


def contexts_of(teacher: Teacher, opening: Opening, read: Told, words: Render, room: int) -> list[Context]:
    """One context per hint to choose from; with one text of everything, one. Empty where not even the prompt fits.

    Args:
        read: paragraph -> its texts.
        room: most tokens of a context.
    """
    several = max((len(texts) for texts in read.values()), default=1) if teacher.select != "first" else 1
    choices = [{name: texts[min(k, len(texts) - 1)] for name, texts in read.items()} for k in range(several)]
    found = [fitting(teacher, opening.rollout.turns[opening.turn].prompt, texts, words, room) for texts in choices]
    return [context for context in found if context is not None]


def fitting(teacher: Teacher, prompt: Prompt, texts: Mapping[str, str], words: Render, room: int) -> Context | None:
    """The teacher's prompt within `room` tokens; if it is longer, its longest text loses its end until it fits."""
    texts, cut = dict(texts), False
    while True:
        ids = tuple(words.context(with_paragraphs(prompt, paragraphs(teacher, texts))))
        over = len(ids) - room
        if over <= 0:
            return Context(ids, cut)
        name = max(texts, key=lambda name: len(texts[name]), default=None)
        if name is None or not texts[name]:
            return None
        kept = words.following(texts[name])[:-over]
        shorter = str(words.tokenizer.decode(kept)) if kept else ""
        texts[name], cut = shorter if len(shorter) < len(texts[name]) else texts[name][:-1], True


def paragraphs(teacher: Teacher, texts: Mapping[str, str]) -> list[str]:
    said = [teacher.words(name).replace("{}", text) for name, text in texts.items()]
    return [*said, teacher.closing] if said and teacher.closing else said


def with_paragraphs(prompt: Prompt, said: Sequence[str]) -> Prompt:
    """A plain prompt with paragraphs after it; of messages, the last user message with paragraphs after it."""
    if not said:
        return prompt
    if isinstance(prompt, str):
        return "\n\n".join([prompt, *said])
    last = max((n for n, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        return (*prompt, {"role": "user", "content": "\n\n".join(said)})
    message: Message = {**prompt[last], "content": "\n\n".join([prompt[last]["content"], *said])}
    return (*prompt[:last], message, *prompt[last + 1 :])
