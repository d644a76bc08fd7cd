"""A price on replies that run long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tropism.errors import ConfigError
from tropism.types import Rollout, Scored


def soft_overlong(length: int, *, longest: int = 20480, cache: int = 4096) -> float:
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


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """`soft_overlong` as a scorer: every reply pays for its own length."""

    longest: int = 20480
    """Tokens from which the price is 1; usually sampling.max_tokens."""
    cache: int = 4096
    """Tokens over which the price grows from 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.longest:
            raise ConfigError(f"Overlong has cache {self.cache} and longest {self.longest}; use 0 < cache <= longest.")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        return [
            {"overlong": [soft_overlong(len(t.action), longest=self.longest, cache=self.cache) for t in r.turns]}
            for r in rollouts
        ]
