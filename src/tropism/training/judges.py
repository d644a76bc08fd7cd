"""Opens who scores a stage: its judge (a function, a local model, or a server) and its reward models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tropism.config import Judge, Model, Recipe, Stage
from tropism.envs import open_source
from tropism.errors import ConfigError
from tropism.load import load
from tropism.signals import compare
from tropism.signals.compare import Comparer
from tropism.signals.judge import Answering, Panel, Voter, by_function, by_model, over_http
from tropism.signals.reward_model import Ensemble, by_steps, scales_of, whole
from tropism.training.checkpoint import State
from tropism.training.learn import Playing
from tropism.training.model import Policy, load_policy
from tropism.training.scorer import Scorer
from tropism.types import Failure, Prompt, SamplingParams, seed_of


def open_judge(judge: Judge | None, model: Model, policy: Policy, seed: int = 0) -> Panel | None:
    """
    Args:
        model: how `policy` was loaded; a local judge computes on the same device and in the same precision.
        seed: of what a local judge says.
    """
    if judge is None:
        return None
    if (rule := rule_of(judge)) is not None:
        return Panel(rule, judge.votes, seed)
    answering = open_answering(judge, model, str(policy.device))
    return Panel(by_model(answering, judge.ask), judge.votes, seed)


def open_answering(judge: Judge, model: Model, device: str) -> Answering:
    """A server, or a model on this machine."""
    if judge.served:
        return over_http(
            judge.who,
            judge.model,
            temperature=judge.temperature,
            max_tokens=judge.max_tokens,
            timeout=judge.timeout,
        )
    other = load_policy(Model(path=judge.who, device=device, compute=model.compute))
    return local(other, SamplingParams(temperature=judge.temperature, max_tokens=judge.max_tokens))


def open_comparer(judge: Judge, device: str = "auto") -> Comparer:
    """The same for pairs: a function of (prompt, first reply, second reply), a server, or a model."""
    if (function := function_of(judge, "(prompt, first reply, second reply)")) is not None:
        return compare.by_function(function)
    return compare.by_model(open_answering(judge, Model(), device), judge.ask)


def rule_of(judge: Judge) -> Voter | None:
    """The judge's function, where it is one."""
    function = function_of(judge, "(reply, next message, its role)")
    return None if function is None else by_function(function)


def function_of(judge: Judge, takes: str) -> Callable[..., Any] | None:
    if judge.served or (isinstance(judge.who, str) and ":" not in judge.who):
        return None
    function = load(judge.who) if isinstance(judge.who, str) else judge.who
    if not callable(function) or isinstance(function, type):
        raise ConfigError(
            f"judge.who is {judge.who}, which is a {type(function).__name__}, but must be a function of {takes}."
        )
    found: Callable[..., Any] = function
    return found


def local(policy: Policy, params: SamplingParams) -> Answering:
    """A model on this machine. Its draws depend on the seed and on the place in the list alone."""

    def answering(prompts: Sequence[Prompt], seed: int) -> list[str | Failure]:
        seeded = SamplingParams(temperature=params.temperature, max_tokens=params.max_tokens, seed=seed)
        turns = policy.sampler([policy.words.context(prompt) for prompt in prompts], seeded)
        return [turn if isinstance(turn, Failure) else policy.words.reply(turn.action) for turn in turns]

    return answering


REPLIES = 64
"""Replies of the start model, at least, by which reward models are put on one scale."""


def open_scorer(recipe: Recipe, who: str, policy: Policy, folder: Path) -> Scorer:
    """The reward model of an earlier stage, or of a path, which must read the policy's own tokens."""
    earlier = [stage.name for stage in recipe.stages]
    found = Scorer(str(folder / who) if who in earlier else who, str(policy.device))
    if found.vocabulary != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"the reward model {who} has another tokenizer than the policy, so it would read other words than were "
            "written. Use one that was trained from a model of the same family."
        )
    return found


def open_reward_models(recipe: Recipe, stage: Stage, policy: Policy, folder: Path) -> Ensemble | None:
    """
    Args:
        policy: the stage's start model.
        folder: of the run, where earlier stages are.
    """
    learned = stage.reward_models
    if learned is None:
        return None
    scorers = [open_scorer(recipe, who, policy, folder).at for who in learned.models]
    line = lru_cache(maxsize=None)(lambda token: "\n" in policy.tokenizer.decode([token]))
    members = [by_steps(scores, line, learned.steps) if learned.steps else whole(scores) for scores in scorers]
    ensemble = Ensemble(members, learned.combine, learned.penalty, names=learned.names)
    if not learned.standardise:
        return ensemble
    assert stage.played is not None
    source = open_source(stage.played.name, stage.played.options, split="train", seed=recipe.seed)
    seed = seed_of(recipe.seed, stage.name)
    playing = Playing(stage=stage, source=source, policy=policy, score=list, seed=seed, say=lambda _: None)
    groups = -(-REPLIES // stage.sampling.group_size)
    replies = [one for one in playing.play(State(step=-4), groups, 0) if one.failure is None]
    if not replies:
        raise ConfigError("no reply of the start model could be played, so reward models cannot be put on one scale.")
    return replace(ensemble, scales=tuple(scales_of(ensemble.scores(replies))))
