"""What the best of n answers is worth, from more than n of them, and how far it is from a single one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropism.maths.check import same_shape


def expected_best(gold: Tensor, proxy: Tensor, n: int) -> Tensor:
    """Mean gold value of the answer that a proxy likes best of n, over all ways to draw n of the N at hand: unbiased.

        sum_i C(i - 1, n - 1) / C(N, n) g_(i)        g_(i) the gold of the answer with the i-th smallest proxy, i from 1

    Ties of the proxy count by the mean of their gold. Gao, Schulman and Hilton 2022, arXiv:2210.10760, appendix I.

    Args:
        gold, proxy: [..., N] of the same answers.

    Returns:
        [...]
    """
    same_shape("expected_best", gold=gold, proxy=proxy)
    count = gold.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"expected_best: n is {n}, but there are {count} answers to draw from. Use 1 to {count}.")
    below = (proxy[..., None, :] < proxy[..., :, None]).sum(-1)
    upto = (proxy[..., None, :] <= proxy[..., :, None]).sum(-1)
    ways = torch.tensor([math.comb(k, n) / math.comb(count, n) for k in range(count + 1)], dtype=torch.float64).to(gold)
    share = (ways[upto] - ways[below]) / (upto - below)  # equal answers split theirs evenly
    return (share * gold).sum(-1)


def kl_of_best(n: int) -> float:
    """Nats between the best of n and one answer: log n - (n - 1) / n; less where answers tie.

    Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; an upper bound, Beirami et al. 2024, arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n
