"""A price on replies that run long."""

from __future__ import annotations

from collections.abc import Sequence

from tropism.types import Rollout, Stop

CACHE = 0.2
"""Share of the token limit, before it, over which `soft_overlong` sets in: the paper's 4,096 of 20,480."""


def soft_overlong(rollouts: Sequence[Rollout], max_tokens: int) -> list[dict[str, list[float]]]:
    """`overlong_price` of every reply, the limit being `sampling.max_tokens`: weigh it positively, it is negative."""
    cache = max(1, round(CACHE * max_tokens))
    return [
        {"soft_overlong": [overlong_price(len(turn.action), longest=max_tokens, cache=cache) for turn in one.turns]}
        for one in rollouts
    ]


def overlong_price(length: int, *, longest: int = 20480, cache: int = 4096) -> float:
    """DAPO's soft overlong punishment. Yu et al. 2025, arXiv:2503.14476, eq. 13.

        R(y) = 0                            |y| <= L - C
               ((L - C) - |y|) / C          L - C < |y| <= L
               -1                           L < |y|

    Nothing is paid up to L - C tokens; from there the price grows evenly to 1 at L, so a reply that was cut off differs
    from one that nearly was.

    Args:
        length: |y|, tokens of the reply.
        longest: L, in tokens.
        cache: C, in tokens, how far before L the price sets in.

    Returns:
        In [-1, 0].
    """
    return max(-1.0, min(0.0, (longest - cache - length) / cache))


def unfinished(rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
    """1 where the last reply ran into the token limit, else 0: with a negative weight, a price on a missing end token.

    Huang et al. 2024, arXiv:2403.17031, detail 23: a reward model has never seen an answer without its end.
    """
    return [{"unfinished": float(rollout.turns[-1].stop is Stop.truncated)} for rollout in rollouts]
