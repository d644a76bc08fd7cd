"""The tokens of one step of a stage, counted on its own tasks or rows before it runs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from tropism.config import Named, Recipe, Sampling, Stage, Train
from tropism.envs import open_source
from tropism.envs.rows import read_rows
from tropism.errors import ConfigError
from tropism.signals.frozen import TAUGHT
from tropism.teacher import apart, teacher_of
from tropism.training.collate import collate
from tropism.training.fit import demonstration, load_rows
from tropism.training.model import Policy, weights_of
from tropism.training.packed import micro_batches, pack
from tropism.training.sampled import ROWS, located
from tropism.training.teachers import SELF
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
    """Forward alone, by a reference or a teacher; what a larger model reads counts more, in proportion to weights."""
    assumed: str
    """What replies were taken for."""


def counted(recipe: Recipe, stage: Stage, policy: Policy, folder: Path) -> Work:
    """The tokens of one step."""
    found, total, assumed = (
        drawn(recipe, stage.env, stage.sampling, policy) if stage.env else rows(recipe, stage, policy, folder)
    )
    batch = collate(found, codes={}, device=policy.device, apart=apart(stage.method))
    share = len(found) / total
    turns = [list(one.turns) for one in found] if stage.env else []
    said = [sum(len(turn.action) for turn in each) for each in turns]
    first = {tuple(each[0].context) for each in turns}
    later = sum(len(turn.context) for each in turns for turn in each[1:])
    size = stage.train.micro_tokens or Train.micro_tokens
    learned = sum(spared(batch[part]) for part in micro_batches(batch, size, packed=policy.packs()))
    extra, large = 0.0, [weights / policy.module.num_parameters() for weights in teachers(stage, policy)]
    if (teacher := teacher_of(stage.method)) is not None and teacher.reads and stage.env:
        extra = sum(said) * (1 + bool(teacher.against)) * mean(large)  # what it reads is about as long as a reply
    return Work(
        batch=batch,
        share=share,
        read=round((sum(map(len, first)) + later) / share),
        drawn=round(sum(said) / share),
        rows=total if stage.env else 0,
        longest=max(said, default=0),
        learned=round(learned / share * (stage.train.epochs if stage.env else 1)),
        measured=round((passes(stage, large) * learned + extra) / share),
        assumed=assumed,
    )


def spared(batch: Batch) -> int:
    """Tokens of a micro-batch once what its rows begin with in common is spared."""
    return len(pack(batch.tokens, batch.length).owner)


def referred(stage: Stage) -> bool:
    """Whether a step measures the model that the stage starts as."""
    return "reference_logp" in stage.method.needs.measured or stage.train.kl_budget is not None


def passes(stage: Stage, large: Sequence[float]) -> float:
    """How many passes of the policy over its rows a step makes without gradient, sampler and trainer being one."""
    needs = stage.method.needs.measured
    count = float(int(referred(stage)) + int("value" in needs))
    teacher = teacher_of(stage.method)
    if teacher is not None and needs & TAUGHT:
        count += (1 + bool(teacher.against)) * mean(large) + (teacher.support == "teacher")
    return count


def teachers(stage: Stage, policy: Policy) -> list[int]:
    """Weights of each model that teaches; the policy itself or a copy of it is as large as the policy. Of several, each
    is taken to teach as many tokens.

    Raises:
        ConfigError: one cannot be found.
    """
    teacher = teacher_of(stage.method)
    if teacher is None:
        return []
    names = [teacher.who] if isinstance(teacher.who, str) else dict.fromkeys(teacher.who.values())
    return [int(policy.module.num_parameters()) if name in SELF else weights_of(name) for name in names]


def parted(work: Work, stage: Stage, count: int) -> Work:
    """What the process with the most to do has of it: no group is parted."""
    groups = stage.sampling.groups if stage.env else stage.train.batch
    part = math.ceil(groups / count) / groups
    rows = min(len(work.batch), math.ceil(part * len(work.batch) / work.share))
    return replace(
        work,
        batch=work.batch[:rows],
        share=min(1.0, work.share / part),
        rows=math.ceil(part * work.rows),
        **{name: math.ceil(part * getattr(work, name)) for name in ("read", "drawn", "learned", "measured")},
    )


def drawn(recipe: Recipe, env: Named, sampling: Sampling, policy: Policy) -> tuple[list[Rollout], int, str]:
    """(rollouts of some tasks with their siblings, how many a step has, what replies were taken for). Replies are
    random tokens, as many as the demonstration has, so that siblings have only their prompts in common."""
    source = open_source(env.name, env.options, split="train", seed=recipe.seed)
    draws, found, shown = random.Random(0), list[Rollout](), True
    for number in range(min(sampling.groups, PROBED)):
        task = source.task(number)
        episode: Any = source.open(task, 0)
        try:
            shown = shown and hasattr(episode, "demonstrate")
            turns = demonstration(source, number, policy.words)[0].turns if shown else ()
        except ConfigError:  # it could, but knows no answer to this task
            shown = False
        if not shown:
            ask = episode.ask()
            context = policy.words.context(ask.prompt)
            turns = (Turn(context=context, action=[0] * min(sampling.max_tokens, policy.context - len(context))),)
        for sibling in range(sampling.group_size):
            mine = tuple(other(turn, draws, policy) for turn in turns)
            found.append(Rollout(task=Task(), group=number, sibling=sibling, turns=mine, reward=0.0))
    words = "the environment's demonstrations" if shown else f"they may be, in one turn: {sampling.max_tokens} tokens"
    return found, sampling.groups * sampling.group_size, f"replies as long as {words}"


def lasting(recipe: Recipe, stage: Stage, folder: Path) -> int:
    """Steps of a stage. One that samples its rows may keep fewer of them and be shorter; one that balances pairs reads
    some again and is longer."""
    data = stage.data
    if stage.train.steps or data is None:
        return stage.train.steps
    earlier = {each.name: each for each in recipe.stages}.get(data.path)
    if earlier is not None and not (folder / data.path / ROWS).exists():
        return lasting(recipe, replace(stage, data=earlier.data), folder)
    if data.sampled is not None:
        kept = data.sampled
        each = {"pairs": kept.samples // 2, "best": kept.top, "random": kept.top}.get(kept.keep, kept.samples)
        count = kept.tasks * each
    else:
        here = located(data, recipe, folder)
        count = data.episodes if data.demos else len(read_rows(here.path, here.split))
    return math.ceil(stage.train.epochs * count / stage.train.batch)


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
        each = 2 if data.sampled.keep == "pairs" else 1
        kept = replace(stage.sampling, group_size=each)
        some, _, assumed = drawn(recipe, data.sampled.env, kept, policy)
        return some, stage.train.batch * each, assumed
    earlier = {each.name: each for each in recipe.stages}.get(data.path)
    if earlier is not None and not (folder / data.path / ROWS).exists():  # not written yet, so as it would be
        return rows(recipe, replace(stage, data=earlier.data, sampling=earlier.sampling), policy, folder)
    data = located(data, recipe, folder)
    asked = stage.method.needs.data
    first = replace(data, episodes=count) if data.demos else data
    found = load_rows(first, policy.words, recipe.seed, policy.context, asked)[:count]
    if not (usable := [one for row in found for one in row if one.failure is None]):
        raise ConfigError(f"stage {stage.name}: none of the first {len(found)} rows can be used.")
    return usable, stage.train.batch * len(found[0]), f"rows like the first {len(found)}"
