"""From finished rollouts to rewards: named parts, their weighted sum, and where on the turns it stands.

    reward of a turn     =  sum over parts of  weight · what the part gave on this turn
    reward of a rollout  =  sum of the rewards of its turns

A part of the environment stands on the turn that earned it, a scorer's float on the last turn, a scorer's list on each.
What could not be scored becomes a `Failure`, never a 0: nobody should learn that a crash is a bad answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tropism.errors import ConfigError, TropismError
from tropism.load import hint
from tropism.types import Failure, Rollout, Scored, Scorer

EPS = 1e-9
"""By how much rounding may lower a part that is a sum over turns."""


def score(
    rollouts: Sequence[Rollout],
    scorers: Mapping[str, Scorer],
    weights: Mapping[str, float],
    success: tuple[str, float] | None = None,
    *,
    parts: Iterable[str] | None = None,
) -> list[Rollout]:
    """The same rollouts with `rewards`, `weights`, `reward`, `success` and every turn's `reward`, or with a `failure`.

    Args:
        scorers: name -> scorer. They see the rollouts that have no failure yet.
        weights: part -> weight. A scorer's name stands for those of its parts that have no weight of their own. Other
            parts are recorded only.
        success: (part, at least): the rollout is a success where the part reaches this.
        parts: every part of the environment's score; a weight or `success` that names neither these nor a scorer's is
            then an error. Turns do not show a part that they did not change, so without this list any name that no
            scorer gives is taken for a part of the environment, 0 until somebody earns it.
    """
    live = [r for r in rollouts if r.failure is None]
    columns = {name: ask(name, scorer, live) for name, scorer in scorers.items()}
    heavy = dict(weights)
    own = dict.fromkeys([*(parts or ()), *(part for r in live for turn in r.turns for part in turn.earned)])
    seen: dict[str, str] = dict.fromkeys(own, "the environment")
    for name, column in columns.items():
        for part in dict.fromkeys(p for scored in column if not isinstance(scored, Failure) for p in scored):
            if part in seen:
                raise ConfigError(f"{seen[part]} and {name} both give a part {part!r}. Rename one of them.")
            seen[part] = name
            if name in weights:
                heavy.setdefault(part, weights[name])
    asked = [*(w for w in weights if w not in scorers), *([success[0]] if success else [])]
    unknown = [part for part in asked if part not in seen]
    # A scorer that failed everywhere has not shown its parts, so nothing can be said about names.
    if parts is None:
        own |= dict.fromkeys(unknown)
    elif unknown and live and all(any(not isinstance(s, Failure) for s in column) for column in columns.values()):
        raise ConfigError(f"there is no reward part {unknown[0]!r}. {hint(unknown[0], seen)}")
    scores = iter(zip(*columns.values(), strict=True) if columns else ((),) * len(live))
    known = {part: weight for part, weight in heavy.items() if part in seen or part in own}
    return [r if r.failure else replace(_merged(r, next(scores), own, heavy, success), weights=known) for r in rollouts]


def ask(name: str, scorer: Scorer, rollouts: Sequence[Rollout]) -> list[Scored | Failure]:
    """One checked result per rollout. If the whole call raised, each is tried alone: only the bad ones fail."""
    if not rollouts:
        return []
    try:
        found = list(scorer(rollouts))
    except TropismError:
        raise
    except Exception as error:
        if len(rollouts) == 1:
            return [Failure(name, f"{type(error).__name__}: {error}")]
        return [result for rollout in rollouts for result in ask(name, scorer, [rollout])]
    if len(found) != len(rollouts):
        raise ConfigError(
            f"the reward {name} returned {len(found)} values for {len(rollouts)} rollouts. It must return one per "
            "rollout, in order; None where it does not apply."
        )
    return [_checked(name, scored, rollout) for scored, rollout in zip(found, rollouts, strict=True)]


def _checked(name: str, scored: Any, rollout: Rollout) -> Scored | Failure:
    """Numbers as floats and lists of floats, one per turn, 0 where it does not apply; NaN and infinities a Failure."""
    if isinstance(scored, Failure):
        return scored
    if not isinstance(scored, Mapping):
        raise ConfigError(
            f"the reward {name} gave {scored!r:.80} for a rollout, but must give named parts or a Failure."
        )
    checked: dict[str, float | list[float] | None] = {}
    for part, value in scored.items():
        listed = isinstance(value, list | tuple)
        try:
            given = [v for v in (value if listed else [value]) if v is not None]
            numbers = [float(v) for v in given]
        except (TypeError, ValueError):
            return Failure(name, f"part {part} is {value!r:.80}, which is not a number")
        if not all(map(math.isfinite, numbers)):
            return Failure(name, f"part {part} is {value!r:.80}, which is not finite")
        if listed and len(value) != len(rollout.turns):
            raise ConfigError(
                f"the reward {name} gave {len(value)} values of part {part!r} for a rollout of {len(rollout.turns)} "
                "turns. A list holds one number per turn; a single number lands on the last turn."
            )
        if not given:
            checked[part] = None
        else:
            checked[part] = [0.0 if v is None else float(v) for v in value] if listed else numbers[0]
    return checked


def _merged(
    rollout: Rollout,
    scores: Sequence[Scored | Failure],
    own: Iterable[str],
    weights: Mapping[str, float],
    success: tuple[str, float] | None,
) -> Rollout:
    last = len(rollout.turns) - 1
    given: dict[str, list[float]] = {part: [t.earned.get(part, 0.0) for t in rollout.turns] for part in own}
    for scored in scores:
        if isinstance(scored, Failure):
            return replace(rollout, failure=scored)
        for part, value in scored.items():
            if isinstance(value, list):
                given[part] = value
            elif value is not None:
                given[part] = [0.0] * last + [float(value)]  # type: ignore[arg-type]
    if last < 0:
        return replace(rollout, failure=Failure("score", "the rollout has no turns"))
    rewards = {part: math.fsum(values) for part, values in given.items()}
    if weights and not any(part in weights for part in given):
        return replace(rollout, rewards=rewards, failure=Failure("score", "no reward applies: every part is None"))
    per_turn = [sum(weights.get(part, 0.0) * values[t] for part, values in given.items()) for t in range(last + 1)]
    if not all(map(math.isfinite, [*per_turn, *rewards.values()])):
        return replace(rollout, failure=Failure("score", f"the weighted sum is not finite: {rewards}"))
    return replace(
        rollout,
        turns=tuple(replace(t, reward=float(r)) for t, r in zip(rollout.turns, per_turn, strict=True)),
        rewards=rewards,
        reward=float(sum(per_turn)),
        success=success is not None and success[0] in rewards and rewards[success[0]] >= success[1] - EPS,
    )
