"""A stage's rewards as one function of rollouts: its scorers, its weights, the environment's own parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tropism.config import Named, Stage
from tropism.envs import find_class
from tropism.errors import ConfigError
from tropism.rewards import bound, find_scorer
from tropism.rewards.score import score
from tropism.signals import reward_model
from tropism.signals.judge import PART, Panel
from tropism.signals.reward_model import Ensemble
from tropism.training.workers import Workers
from tropism.types import Rollout, Source

Scoring = Callable[[Sequence[Rollout]], list[Rollout]]


def scoring(
    stage: Stage, env: Named, source: Source, panel: Panel | None = None, ensemble: Ensemble | None = None
) -> Scoring:
    """`score` with the stage's scorers and weights; without any, the environment's own weights.

    Args:
        source: `env`, opened.
        panel: the stage's judge, opened. It is asked first, so that its hints are on the turns that are scored.
        ensemble: its reward models, opened.
    """
    scorers: dict[str, Any] = {}
    weights: dict[str, float] = {}
    sent: list[Any] = []
    parts = parts_of(source)
    for given, weight in stage.rewards.items():
        if isinstance(given, str) and given in (*parts, *offered(stage)):
            weights[given] = weight
            continue
        name, scorer, _ = find_scorer(given, parts)
        if name in (*scorers, *offered(stage)):
            raise ConfigError(f"two rewards are called {name}, and the record could not tell them apart. Rename one.")
        scorers[name], weights[name] = bound(scorer, stage.sampling.max_tokens), weight
        sent.append(given)
    weights = weights or own_weights(source, parts)
    if not weights:
        raise ConfigError(f"{env.name} has no reward of its own, so the recipe must name one: rewards: {{…: 1.0}}.")
    missing = sorted(stage.method.needs.parts - weights.keys())
    if missing and not scorers:  # a scorer may give parts that only its results name
        raise ConfigError(
            f"{type(stage.method).__name__} is about {', '.join(missing)}, but the reward's parts are "
            f"{', '.join(weights)}. Name it in rewards; with weight 0 if it is to be kept and not to be maximised."
        )
    success = (stage.success.part, stage.success.at_least) if stage.success else None
    if ensemble is not None:
        scorers[reward_model.PART] = ensemble
        weights = dict.fromkeys(ensemble.recorded, 0.0) | weights
    workers = opened(stage.sampling.reward_workers, tuple(sent), stage.sampling.max_tokens) if sent else None

    def read_and_score(rollouts: Sequence[Rollout]) -> list[Rollout]:
        asked = dict(scorers)
        if panel is not None:
            rollouts, found = panel.read(rollouts)
            asked = {PART: lambda live: found} | asked
        if workers is not None:
            asked |= workers.begin(rollouts)
        return score(rollouts, scorers=asked, weights=weights, success=success, parts=parts)

    return read_and_score


@lru_cache(maxsize=1)
def opened(count: int, given: tuple[Any, ...], max_tokens: int) -> Workers | None:
    """Training and evaluation of a stage share them; those of the stage before end."""
    return Workers(count, given, max_tokens) if count else None


def offered(stage: Stage) -> tuple[str, ...]:
    """The names of the parts that the stage's judge and its reward models give."""
    judged = (PART,) if stage.judge else ()
    if stage.reward_models is None:
        return judged
    names = stage.reward_models.names
    return (*judged, reward_model.PART, *reward_model.beside(len(names), names))


def parts_of(source: Source) -> tuple[str, ...]:
    """The names of an environment's own parts of the score."""
    task = source.task(0)
    return tuple(source.open(task, 0).score(task.seat))


def own_weights(source: Source, parts: Sequence[str]) -> dict[str, float]:
    """Which parts of the environment's score count when the recipe does not say."""
    env = source.open(source.task(0), 0)
    declared: Mapping[str, float] | None = getattr(env, "weights", None)
    return dict.fromkeys(parts, 1.0) if declared is None else dict(declared)


def per_reply(env: Named | None) -> frozenset[str]:
    """The parts that reports divide by the number of replies."""
    return frozenset(getattr(find_class(env.name), "per_reply", ())) if env else frozenset()
