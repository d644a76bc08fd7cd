"""A price on replies that run long."""

from __future__ import annotations


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
