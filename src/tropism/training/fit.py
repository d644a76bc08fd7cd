"""Offline: rows of data, or an environment's own demonstrations, as rollouts for the same loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch

from tropism.config import Data, Told
from tropism.envs import open_source
from tropism.envs.rows import read_rows
from tropism.errors import ConfigError, GuardStopped
from tropism.rollout.render import Render
from tropism.signals.contexts import paragraphs, with_paragraphs
from tropism.training.checkpoint import State
from tropism.training.collate import rows_of
from tropism.types import Failure, Message, Prompt, Rollout, Source, Stop, Task, Turn, seed_of


@dataclass(frozen=True)
class Reading:
    """Draws `batch` rows a step, in a new order every epoch; a pair is one row and two rollouts."""

    rows: Sequence[tuple[Rollout, ...]]
    batch: int
    seed: int
    left_out: Sequence[str] = ()
    """Why some rows are not among them."""
    balance: bool = False
    """See `balanced`."""

    @cached_property
    def pool(self) -> Sequence[tuple[Rollout, ...]]:
        return balanced(self.rows) if self.balance else self.rows

    def steps(self, epochs: int) -> int:
        """That read every row so many times; the last one begins the next epoch where rows are no multiple."""
        return math.ceil(epochs * len(self.pool) / self.batch)

    def __call__(self, state: State) -> list[Rollout]:
        count, start = len(self.pool), state.cursor
        state.cursor += self.batch
        drawn: list[Rollout] = []
        for place in range(start, state.cursor):
            row = self.pool[order(count, self.seed, place // count)[place % count]]
            # a pair that ends an epoch and begins the next one is drawn twice in a batch: two groups all the same
            drawn += row if len(row) == 1 else [replace(one, group=place) for one in row]
        return drawn


@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """In which order an epoch reads its rows."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


def balanced(rows: Sequence[tuple[Rollout, ...]]) -> list[tuple[Rollout, ...]]:
    """Pairs again, as many whose chosen answer is the longer one as others; those equally long as often as before.

    Raises:
        ConfigError: there is none of one kind.
    """
    by: dict[int, list[tuple[Rollout, ...]]] = {1: [], 0: [], -1: []}
    for row in rows:
        chosen, rejected = (sum(len(turn.action) for turn in one.turns) for one in row)
        by[(chosen > rejected) - (chosen < rejected)].append(row)
    longer, shorter = by[1], by[-1]
    if not (longer and shorter):
        raise ConfigError(
            f"data.balance wants pairs whose chosen answer is the longer one and others, but of {len(rows)} there are "
            f"{len(longer)} and {len(shorter)}. Add some, or drop data.balance."
        )
    most = max(len(longer), len(shorter))
    return [kind[k % len(kind)] for kind in (longer, shorter) for k in range(most)] + by[0]


def sifted(
    rows: Sequence[tuple[Rollout, ...]], limit: float, say: Callable[[str], None]
) -> tuple[list[tuple[Rollout, ...]], list[str]]:
    """(the rows that can be used, why the others cannot), and a line about these.

    Raises:
        GuardStopped: they are more than `limit`, a share of all.
    """
    why = [row[0].failure.reason for row in rows if row[0].failure]
    if not why:
        return list(rows), why
    shown = "\n".join(f"  {reason}" for reason in why[:3])
    said = f"{len(why)} of {len(rows)} rows cannot be used"
    if len(why) > limit * len(rows) or len(why) == len(rows):
        raise GuardStopped(
            f"{said}, more than train.failure_limit = {limit} allows:\n{shown}\nMend the data, or raise the limit."
        )
    say(f"{said} and are left out:\n{shown}")
    return [row for row in rows if not row[0].failure], why


def load_rows(
    data: Data,
    words: Render,
    seed: int,
    context: int = 1 << 30,
    asked: frozenset[str] = frozenset(),
    split: Literal["train", "test"] = "train",
) -> list[tuple[Rollout, ...]]:
    """Everything there is to read, rendered once. What cannot be used is a failure that says why.

    Args:
        context: how many tokens the model can read.
        asked: `Needs.data` of the method.
        split: of an environment that demonstrates.
    """
    if data.demos is not None:
        source = open_source(data.demos.name, data.demos.options, split=split, seed=seed)
        told = [demonstration(source, n, words, data.told) for n in range(data.episodes)]
        if data.told and data.told.share and not any(has_told for _, has_told in told):
            raise ConfigError(
                f"data.told.teacher reads {', '.join(data.told.teacher.reads)}, but in {data.episodes} episodes "
                f"{data.demos.name} advised nothing of that name, so nothing would be told. Read what it advises."
            )
        return [usable((rollout,), context, asked) for rollout, _ in told]
    read = next((reader for name, reader in READERS.items() if name in asked), single)
    return [usable(read(row, n, words), context, asked) for n, row in enumerate(read_rows(data.path, data.split))]


def usable(row: tuple[Rollout, ...], context: int, asked: frozenset[str] = frozenset()) -> tuple[Rollout, ...]:
    """The row, or the same as failures: of a pair no answer is of use without the other.

    Args:
        asked: `Needs.data` of the method; of pairs and of labels every answer counts once, so it must be one row.
    """
    once = len(row) > 1 or "labels" in asked
    longest = max((len(turn.context) + len(turn.action) for one in row for turn in one.turns), default=0)
    number, reason = row[0].group, ""
    if longest > context:
        reason = f"has {longest} tokens but the model reads at most {context}. Shorten it or use a model with a longer "
        reason += "context."
    elif not all(one.turns and one.turns[-1].reply.strip() for one in row) and len(row) > 1:
        reason = "has an empty answer, which nobody can have preferred or rejected. Drop it."
    elif len(row) > 1 and row[0].turns[-1].reply == row[1].turns[-1].reply:
        reason = "has the same answer twice, from which nothing can be learned. Drop it."
    elif once and max(len(rows_of([one])) for one in row) > 1:
        reason = (
            "has an answer of several turns that the chat template does not write one after another. Keep one turn."
        )
    return tuple(replace(one, failure=Failure("data", f"row {number} {reason}")) for one in row) if reason else row


def demonstration(source: Source, number: int, words: Render, told: Told | None = None) -> tuple[Rollout, bool]:
    """One episode in which the environment answers itself, in some of its replies to what a teacher may read; and
    whether it did so in any."""
    task = source.task(number)
    env: Any = source.open(task, 0)
    if not hasattr(env, "demonstrate"):
        raise ConfigError(
            f"data.demos names {task.env}, which has no `demonstrate`, so it cannot write replies to learn from. "
            "Give the environment that method, or use data.path."
        )
    if told is not None and not hasattr(env, "advise"):
        raise ConfigError(
            f"data.told asks {task.env} what a teacher could be told, but it has no `advise`. Give the environment "
            "that method, or drop data.told."
        )
    said: dict[int, list[Turn]] = {}
    draws, has_told = random.Random(f"told/{number}"), False
    while (ask := env.ask()) is not None:
        turns, reply, prompt = said.setdefault(ask.seat, []), str(env.demonstrate()), ask.prompt
        if told is not None and draws.random() < told.share:
            texts, following = env.advise(draws.random() < told.wrong)
            there = {name: texts[name] for name in told.teacher.reads if name in texts}
            if told.teacher.need != "all" and there:  # every template in its turn
                name = draws.choice(list(there))
                there = {name: there[name]}
            if there:
                has_told = True
                prompt, reply = with_paragraphs(prompt, paragraphs(told.teacher, there)), following
        turns.append(given(prompt, reply, turns[-1] if turns else None, words))
        env.tell(reply)
    turns = [turn for seat in said.values() for turn in seat]
    return Rollout(task=task, group=number, turns=tuple(turns), success=True), has_told


def given(prompt: Prompt, reply: str, before: Turn | None, words: Render) -> Turn:
    return Turn(context=words.context(prompt, before), action=words.action(prompt, reply), prompt=prompt, reply=reply)


def pair(row: Mapping[str, Any], number: int, words: Render) -> tuple[Rollout, ...]:
    """TRL's columns `prompt`, `chosen` and `rejected`, texts or messages; without `prompt` it is how both begin. A
    column `margin`, how strong the preference is, becomes the chosen answer's reward."""
    if row.get("chosen") is None or row.get("rejected") is None:
        raise ConfigError(
            f"row {number} has the columns {', '.join(row)}, but this method learns from pairs: it needs chosen and "
            "rejected, and best prompt too."
        )
    prompt, *answers = split_prompt(row, number)
    rest = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
    both = [single({"prompt": prompt, "completion": answer, **rest}, number, words)[0] for answer in answers]
    strength = row.get("margin") or 0.0
    if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise ConfigError(
            f"row {number} has the margin {strength!r}, but by how much an answer is preferred is 0 or more."
        )
    return replace(both[0], reward=float(strength)), replace(both[1], success=False, sibling=1)


def split_prompt(row: Mapping[str, Any], number: int) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), as TRL splits them: the space before the first word that differs belongs to the
    answers, and of an answer that the other one begins with, its last letter or message."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return row["prompt"], chosen, rejected
    if not isinstance(chosen, str):
        chosen, rejected = list(messages(chosen, number)), list(messages(rejected, number))
    shorter = min(len(chosen), len(rejected))
    same = next((k for k in range(shorter) if chosen[k] != rejected[k]), None)
    if same is None:
        same = max(shorter - 1, 0)
    elif same and chosen[same - 1] == " ":
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def labelled(row: Mapping[str, Any], number: int, words: Render) -> tuple[Rollout, ...]:
    """TRL's columns `prompt`, `completion` and `label`, true where the answer is desirable."""
    if not isinstance(row.get("label"), bool):
        raise ConfigError(
            f"row {number} has label {row.get('label')!r}, but this method learns from answers that are good or bad: "
            "it needs prompt, completion, and label true or false."
        )
    (one,) = single(row, number, words)
    return (replace(one, success=row["label"]),)


def stepped(row: Mapping[str, Any], number: int, words: Render) -> tuple[Rollout, ...]:
    """TRL's columns `prompt`, `completions` and `labels`: steps, each ended by a line break, and whether each is right;
    or `completion` and `label`, one step. A label is true, false or a probability. A step is a turn that earns it."""
    steps, labels = row.get("completions"), row.get("labels")
    whole = steps is None and labels is None
    if whole:
        steps, labels = [row.get("completion")], [row.get("label")]
        if isinstance(steps[0], list) and len(steps[0]) == 1:  # one message of the assistant
            steps = [messages(steps[0], number)[0]["content"]]
    if not steps or not labels or len(steps) != len(labels) or not all(isinstance(step, str) for step in steps):
        raise ConfigError(
            f"row {number} has the columns {', '.join(row)}, but this method learns from steps: it needs prompt, and "
            "completions and labels of one length, or completion (a text or one message) and label."
        )
    steps = steps if whole else [step.removesuffix("\n") for step in steps]
    if not all(step.strip() for step in steps) or (not whole and any("\n" in step for step in steps)):
        raise ConfigError(
            f"row {number} has the steps {steps!r:.120}, but each is one line that says something: scores are read at "
            "line ends. Split steps at line breaks, and drop empty ones."
        )
    if not all(isinstance(label, bool | int | float) and 0 <= label <= 1 for label in labels):
        raise ConfigError(f"row {number} has the labels {labels!r:.120}, but each is true, false or a probability.")
    prompt = row.get("prompt") or ""
    prompt = prompt if isinstance(prompt, str) else tuple(messages(prompt, number))
    context, turns = words.context(prompt), list[Turn]()
    for k, (step, label) in enumerate(zip(steps, labels, strict=True), 1):
        action = words.action(prompt, step) if k == len(steps) else list(words.following(step + "\n"))
        stop = Stop.finished if k == len(steps) else Stop.truncated
        turns.append(Turn(context=context, action=action, stop=stop, prompt=prompt, reply=step, reward=float(label)))
        context = [*context, *action]
    task, total = Task(env="data", columns=row), float(sum(labels))
    return (Rollout(task=task, group=number, turns=tuple(turns), reward=total, success=all(labels)),)


def single(row: Mapping[str, Any], number: int, words: Render) -> tuple[Rollout, ...]:
    """TRL's columns: `messages`, or `prompt` and `completion`, or `text`. Every assistant message is learned from.

    What the user says after the last of them becomes the column `follow_up`, where the row has none.
    """
    turns: list[Turn] = []
    rest: Sequence[Message] = ()
    if row.get("messages") is not None:
        rest = messages(row["messages"], number)
        turns = conversation((), rest, words)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            turns = [given(prompt, str(completion), None, words)]
        else:
            rest = messages(completion, number)
            turns = conversation(messages(prompt, number), rest, words)
    elif row.get("text") is not None:
        ids = words.context(str(row["text"]))
        turns = [Turn(context=ids[:1], action=[*ids[1:], words.stop_ids[0]], reply=str(row["text"]))]
    if not turns:
        raise ConfigError(
            f"row {number} has the columns {', '.join(row)}, but learning from it needs messages with an assistant's "
            "reply, or prompt and completion, or text."
        )
    if rest and rest[-1]["role"] == "user":
        row = {"follow_up": rest[-1]["content"], **row}
    return (Rollout(task=Task(env="data", columns=row), group=number, turns=tuple(turns), success=True),)


def messages(value: Any, number: int) -> Sequence[Message]:
    """The same value, if it is a list of messages."""
    listed = isinstance(value, list | tuple) and all(isinstance(message, Mapping) for message in value)
    if listed and all(isinstance(message.get(key), str) for message in value for key in ("role", "content")):
        found: Sequence[Message] = value
        return found
    raise ConfigError(
        f"row {number} has {value!r:.120} where messages should be. Write a list of "
        "{'role': text, 'content': text}; a prompt and its completion are both texts or both lists."
    )


def conversation(past: Sequence[Message], rest: Sequence[Message], words: Render) -> list[Turn]:
    turns: list[Turn] = []
    heard = list(past)
    for message in rest:
        if message["role"] == "assistant":
            before = turns[-1] if turns else None
            turns.append(given(tuple(heard), message["content"], before, words))
        heard.append({"role": message["role"], "content": message["content"]})
    return turns


READERS = {"pairs": pair, "labels": labelled, "steps": stepped}
"""`Needs.data` -> how a row is read."""
