"""Opens a stage's judge: a function, a local model, or a server."""

from __future__ import annotations

from collections.abc import Sequence

from tropism.config import Judge, Model
from tropism.errors import ConfigError
from tropism.load import load
from tropism.signals.judge import Answering, Panel, Voter, by_function, by_model, over_http
from tropism.training.model import Policy, load_policy
from tropism.types import Failure, Prompt, SamplingParams


def open_judge(judge: Judge | None, model: Model, policy: Policy) -> Panel | None:
    """
    Args:
        model: how `policy` was loaded; a local judge computes on the same device and in the same precision.
    """
    if judge is None:
        return None
    if (rule := rule_of(judge)) is not None:
        return Panel(rule, judge.votes)
    if judge.served:
        answering = over_http(
            judge.who,
            judge.model,
            temperature=judge.temperature,
            max_tokens=judge.max_tokens,
            timeout=judge.timeout,
        )
    else:
        other = load_policy(Model(path=judge.who, device=str(policy.device), compute=model.compute))
        answering = local(other, SamplingParams(temperature=judge.temperature, max_tokens=judge.max_tokens))
    return Panel(by_model(answering, judge.ask), judge.votes)


def rule_of(judge: Judge) -> Voter | None:
    """The judge's function, where it is one."""
    if judge.served or (isinstance(judge.who, str) and ":" not in judge.who):
        return None
    function = load(judge.who) if isinstance(judge.who, str) else judge.who
    if not callable(function) or isinstance(function, type):
        raise ConfigError(
            f"judge.who is {judge.who}, which is a {type(function).__name__}, but must be a function of (reply, next "
            "message, its role)."
        )
    return by_function(function)


def local(policy: Policy, params: SamplingParams) -> Answering:
    """A model on this machine. Its draws depend on the seed and on the place in the list alone."""

    def answering(prompts: Sequence[Prompt], seed: int) -> list[str | Failure]:
        seeded = SamplingParams(temperature=params.temperature, max_tokens=params.max_tokens, seed=seed)
        turns = policy.sampler([policy.words.context(prompt) for prompt in prompts], seeded)
        return [turn if isinstance(turn, Failure) else policy.words.reply(turn.action) for turn in turns]

    return answering
