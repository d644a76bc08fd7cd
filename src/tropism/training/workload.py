"""The tokens of one step of a stage, counted on its own tasks or rows before it runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tropism.config import Recipe, Stage
from tropism.envs import open_source
from tropism.errors import ConfigError
from tropism.signals.frozen import TAUGHT
from tropism.teacher import apart, teacher_of
from tropism.training.collate import collate
from tropism.training.fit import demonstration, load_rows
from tropism.training.model import Policy
from tropism.training.packed import micro_batches, pack
from tropism.training.run import located
from tropism.types import Batch, Rollout, Task, Turn

PROBED = 16
"""Tasks that stand for all of a step."""


@dataclass(frozen=True)
class Work:
    """Tokens of one step."""

    batch: Batch
    """A part of it that stands for the whole."""
    share: float
    """Which part."""
    read: int
    """By the sampler, before it speaks."""
    drawn: int
    rows: int
    """Sequences that are drawn side by side."""
    longest: int
    """Tokens that one of them says, over all its turns."""
    learned: int
    """Forward and back."""
    measured: int
    """Forward alone: a reference, a teacher."""
    assumed: str
    """What replies were taken for."""


def counted(recipe: Recipe, stage: Stage, policy: Policy, folder: Path) -> Work:
    """The tokens of one step."""
    found, total, assumed = drawn(recipe, stage, policy) if stage.env else rows(recipe, stage, policy, folder)
    batch = collate(found, codes={}, device=policy.device, apart=apart(stage.method))
    share = len(found) / total
    turns = [list(one.turns) for one in found] if stage.env else []
    said = [sum(len(turn.action) for turn in each) for each in turns]
    first = {tuple(each[0].context) for each in turns}
    later = sum(len(turn.context) for each in turns for turn in each[1:])
    learned = sum(map(len_packed(batch), micro_batches(batch, stage.train.micro_tokens, packed=policy.packs())))
    extra = 0
    if (teacher := teacher_of(stage.method)) is not None and teacher.reads and stage.env:
        extra = sum(said) * (1 + bool(teacher.against))  # what it reads is about as long as a reply
    return Work(
        batch=batch,
        share=share,
        read=round((sum(map(len, first)) + later) / share),
        drawn=round(sum(said) / share),
        rows=total if stage.env else 0,
        longest=max(said, default=0),
        learned=round(learned / share * (stage.train.epochs if stage.env else 1)),
        measured=round((passes(stage) * learned + extra) / share),
        assumed=assumed,
    )


def len_packed(batch: Batch) -> Callable[[Tensor], int]:
    return lambda part: len(pack(batch.tokens[part], batch.length[part]).owner)


def passes(stage: Stage) -> int:
    """How many passes over its rows a step makes without gradient, sampler and trainer being one."""
    needs = stage.method.needs.measured
    count = int("reference_logp" in needs or stage.train.kl_budget is not None) + int(bool({"value"} & needs))
    teacher = teacher_of(stage.method)
    if teacher is not None and needs & TAUGHT:
        count += 1 + bool(teacher.against) + (teacher.support == "teacher")
    return count


def drawn(recipe: Recipe, stage: Stage, policy: Policy) -> tuple[list[Rollout], int, str]:
    """(rollouts of some tasks with their siblings, how many a step has, what replies were taken for). Replies are
    random tokens, as many as the demonstration has, so that siblings have only their prompts in common."""
    assert stage.env is not None
    source, sampling = open_source(stage.env.name, stage.env.options, split="train", seed=recipe.seed), stage.sampling
    draws, found, shown = random.Random(0), list[Rollout](), True
    for number in range(min(sampling.groups, PROBED)):
        task = source.task(number)
        env: Any = source.open(task, 0)
        shown = shown and hasattr(env, "demonstrate")
        if shown:
            turns = demonstration(source, number, policy.words)[0].turns
        else:
            ask = env.ask()
            context = policy.words.context(ask.prompt)
            turns = (Turn(context=context, action=[0] * min(sampling.max_tokens, policy.context - len(context))),)
        for sibling in range(sampling.group_size):
            mine = tuple(other(turn, draws, policy) for turn in turns)
            found.append(Rollout(task=Task(), group=number, sibling=sibling, turns=mine, reward=0.0))
    words = "the environment's demonstrations" if shown else f"they may be, in one turn: {sampling.max_tokens} tokens"
    return found, sampling.groups * sampling.group_size, f"replies as long as {words}"


def other(turn: Turn, draws: random.Random, policy: Policy) -> Turn:
    """As long, of other tokens."""
    action = [draws.randrange(policy.module.config.vocab_size) for _ in turn.action]
    zeros = [0.0] * len(action)
    return replace(turn, action=action, logp=zeros, entropy=zeros, reward=0.0)


def rows(recipe: Recipe, stage: Stage, policy: Policy, folder: Path) -> tuple[list[Rollout], int, str]:
    """Likewise of data: the first rows."""
    data, count = stage.data, min(stage.train.batch, 4 * PROBED)
    assert data is not None
    if data.sampled is not None:
        task = replace(stage, env=data.sampled.env, data=None, sampling=replace(stage.sampling, group_size=1))
        some, _, assumed = drawn(recipe, task, policy)
        pairs = 2 if data.sampled.keep == "pairs" else 1
        return (some * pairs), stage.train.batch * pairs, assumed
    if data.path in [each.name for each in recipe.stages]:
        data = located(data, recipe, folder)
    asked = stage.method.needs.data
    found = load_rows(replace(data, episodes=count), policy.words, recipe.seed, policy.context, asked)[:count]
    if not (usable := [one for row in found for one in row if one.failure is None]):
        raise ConfigError(f"stage {stage.name}: none of the first {len(found)} rows can be used.")
    return usable, stage.train.batch * len(found[0]), f"rows like the first {len(found)}"
