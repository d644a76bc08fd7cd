"""One or several reward models as a reward: what they say together of a reply, and how far they disagree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tropism.errors import ConfigError
from tropism.types import Failure, Rollout, Scored, Stop, Turn

PART, SPREAD = "reward_model", "reward_model/spread"
"""The reward, and the standard deviation of the members: what a user can see of a reply that fools one of them."""


def beside(members: int, names: Sequence[str]) -> tuple[str, ...]:
    """The parts that several give beside the reward: how far they disagree, and what each says by itself."""
    return (SPREAD, *(f"{PART}/{name}" for name in names)) if members > 1 else ()


Scores = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[Sequence[float]]]
"""Token ids of prompts with their replies, and places in each -> a score at each place."""

Member = Callable[[Sequence[Turn]], Sequence[float]]
"""Replies, each after all that was said before -> a score each."""

POOLS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": statistics.fmean,
    "product": math.prod,
    "last": lambda steps: steps[-1],
}


def whole(scores: Scores) -> Member:
    """A reply's score is the one after its last token."""

    def member(turns: Sequence[Turn]) -> list[float]:
        answers = [[*turn.context, *turn.action] for turn in turns]
        return [score for (score,) in scores(answers, [[len(ids) - 1] for ids in answers])]

    return member


def by_steps(scores: Scores, ends: Callable[[int], bool], pool: str) -> Member:
    """A probability after every step, and one number made of these. Lightman et al. 2023, arXiv:2305.20050, sec. 2.6.

    Args:
        ends: token id -> does it end a line? A line that is empty is no step; the end of a reply ends its last one.
        pool: one of POOLS.
    """

    def places(turn: Turn) -> list[int]:
        words = turn.action[:-1] if turn.stop is Stop.finished else turn.action
        lines = [k for k, token in enumerate(words[:-1]) if ends(token) and not (k and ends(words[k - 1]))]
        return [len(turn.context) + k for k in (*lines, len(turn.action) - 1)]

    def member(turns: Sequence[Turn]) -> list[float]:
        found = scores([[*turn.context, *turn.action] for turn in turns], [places(turn) for turn in turns])
        finite = [all(map(math.isfinite, steps)) for steps in found]
        return [
            POOLS[pool]([1 / (1 + math.exp(-max(-700.0, score))) for score in steps]) if good else math.nan
            for steps, good in zip(found, finite, strict=True)
        ]

    return member


@dataclass(frozen=True)
class Ensemble:
    """A scorer. Each member is first put on one scale, then they are combined. Coste et al. 2023, arXiv:2310.02743.

        mean         mean_i r_i
        min          min_i r_i                        the worst case
        penalised    mean_i r_i - penalty var_i r_i   uncertainty-weighted; 0.5 for best-of-n there, 0.1 for PPO

    The variance is that of the members that there are (over n, not n - 1; theirs in PPO is over n - 1).
    What all members like for a wrong reason, such as length, none of the three can see.
    """

    members: Sequence[Member]
    combine: Literal["mean", "min", "penalised"] = "mean"
    penalty: float = 0.5
    scales: Sequence[tuple[float, float]] = ()
    """Of each member, the mean and the standard deviation that become 0 and 1; empty: scores as they are."""
    names: Sequence[str] = ()
    """Of each member; with several, what each says is a part too."""

    @property
    def recorded(self) -> tuple[str, ...]:
        """The parts that count nothing unless a recipe names them: the reward must not count twice."""
        return beside(len(self.members), self.names)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored | Failure]:
        said = [self.scaled(n, scores) for n, scores in enumerate(self.scores(rollouts))]
        return [self.together(scores) for scores in zip(*said, strict=True)]

    def scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Of each member, one per rollout: what it says of the last reply after all that was said before."""
        return [list(member([rollout.turns[-1] for rollout in rollouts])) for member in self.members]

    def scaled(self, member: int, scores: Sequence[float]) -> list[float]:
        mean, deviation = self.scales[member] if self.scales else (0.0, 1.0)
        return [(score - mean) / deviation for score in scores]

    def together(self, scores: Sequence[float]) -> Scored | Failure:
        if not all(map(math.isfinite, scores)):
            return Failure(PART, f"the reward models say {', '.join(map(str, scores))}, and not all of that is finite")
        mean, variance = statistics.fmean(scores), statistics.pvariance(scores)
        combined = {"mean": mean, "min": min(scores), "penalised": mean - self.penalty * variance}[self.combine]
        return {PART: combined} | dict(zip(self.recorded, (math.sqrt(variance), *scores), strict=False))


def scales_of(scores: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Mean and standard deviation of each member's finite scores; a member that says the same of everything keeps its
    unit.

    Raises:
        ConfigError: none of a member's is finite.
    """
    found = [[score for score in one if math.isfinite(score)] for one in scores]
    if not all(found):
        raise ConfigError(
            "a reward model scores no reply of the start model with a finite number, so it cannot be put on a scale. "
            "Look at its training (metrics.jsonl of its stage), and train it again."
        )
    return [(statistics.fmean(one), statistics.pstdev(one) or 1.0) for one in found]
