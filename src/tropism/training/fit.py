"""Offline: rows of data, or an environment's own demonstrations, as rollouts for the same loop."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from tropism.config import Data, Told
from tropism.envs import open_source
from tropism.envs.rows import read_rows
from tropism.errors import ConfigError
from tropism.rollout.render import Render
from tropism.signals.contexts import paragraphs, with_paragraphs
from tropism.training.checkpoint import State
from tropism.types import Failure, Message, Prompt, Rollout, Source, Task, Turn, seed_of


@dataclass(frozen=True)
class Reading:
    """Draws `batch` rollouts a step, in a new order every epoch."""

    rollouts: Sequence[Rollout]
    batch: int
    seed: int

    def __call__(self, state: State) -> list[Rollout]:
        count, start = len(self.rollouts), state.cursor
        state.cursor += self.batch
        places = range(start, state.cursor)
        return [self.rollouts[order(count, self.seed, place // count)[place % count]] for place in places]


@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """In which order an epoch reads its rows."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


def load_rollouts(data: Data, words: Render, seed: int, context: int = 1 << 30) -> list[Rollout]:
    """Everything there is to read, rendered once. What the model cannot read, beyond `context` tokens, is a failure."""
    if data.demos is not None:
        source = open_source(data.demos.name, data.demos.options, split="train", seed=seed)
        told = [demonstration(source, n, words, data.told) for n in range(data.episodes)]
        if data.told and data.told.share and not any(has_told for _, has_told in told):
            raise ConfigError(
                f"data.told.teacher reads {', '.join(data.told.teacher.reads)}, but in {data.episodes} episodes "
                f"{data.demos.name} advised nothing of that name, so nothing would be told. Read what it advises."
            )
        return [readable(rollout, context) for rollout, _ in told]
    rows = read_rows(data.path, data.split)
    return [readable(from_row(row, number, words), context) for number, row in enumerate(rows)]


def readable(rollout: Rollout, context: int) -> Rollout:
    longest = max(len(turn.context) + len(turn.action) for turn in rollout.turns)
    if longest <= context:
        return rollout
    reason = (
        f"row {rollout.group} has {longest} tokens but the model reads at most {context}. Shorten it or use a model "
        "with a longer context."
    )
    return replace(rollout, failure=Failure("data", reason))


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


def from_row(row: Mapping[str, Any], number: int, words: Render) -> Rollout:
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
    return Rollout(task=Task(env="data", columns=row), group=number, turns=tuple(turns), success=True)


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
