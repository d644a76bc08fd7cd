"""How far two distributions are apart: estimates from one sampled token, and exact sums over a vocabulary.

p learns and carries the gradient, q is fixed, the token was drawn from p, x = log p - log q. As a loss (through log p,
token fixed) an estimate does not follow the divergence that its value estimates (Schulman 2020, "Approximating KL
Divergence"; exact for softmax logits):

    estimate   value              expectation     expected gradient as a loss
    k1         x                  KL(p || q)      0: use it in the reward
    k2         x^2 / 2            biased          grad KL(p || q) = p (x - KL)
    k3         e^-x - 1 + x >= 0  KL(p || q)      grad KL(q || p) = p - q
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropism.maths.check import same_shape


def k1(logp: Tensor, logq: Tensor) -> Tensor:
    """x. Unbiased, either sign, noisy. Its place is the reward."""
    same_shape("k1", logp=logp, logq=logq)
    return logp - logq


def k2(logp: Tensor, logq: Tensor) -> Tensor:
    """x^2 / 2. Biased as a value; as a loss the gradient of KL(p || q)."""
    return k1(logp, logq).square() / 2


def k3(logp: Tensor, logq: Tensor) -> Tensor:
    """e^-x - 1 + x. Unbiased, never negative; as a loss the gradient of the other divergence, KL(q || p)."""
    x = k1(logp, logq)
    return torch.expm1(-x) + x


def steered(weight: float, away: Tensor, episode: Tensor, *, target: float, horizon: int) -> Tensor:
    """The next weight of a divergence that is to stay near a target. Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2.

        weight (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)        n episodes, KL their mean

    [N, T] log p - log q of sampled tokens, 0 off the mask, [N] ids -> []
    """
    count = len(episode.unique())
    missed = (away.sum() / (count or 1) / target - 1).clamp(-0.2, 0.2)
    return weight * (1 + missed * count / horizon)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v): student first, mode seeking. [..., V] -> [...]"""
    return (logp.exp() * k1(logp, logq)).sum(-1)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q || p): teacher first, mass covering. Its gradient on softmax logits is p - q. [..., V] -> [...]"""
    return reverse_kl(logq, logp)


def jensen_shannon(logp: Tensor, logq: Tensor, *, mix: float = 0.5) -> Tensor:
    """Both against their mixture; bounded. GKD, Agarwal et al. 2023, arXiv:2306.13649, eq. 1.

        (1 - mix) KL(p || m) + mix KL(q || m)        m = (1 - mix) p + mix q

    Divided by mix it tends to forward_kl for mix -> 0, divided by 1 - mix to reverse_kl for mix -> 1; at the ends it
    is 0, so they are refused. [..., V] -> [...]
    """
    if not 0 < mix < 1:
        raise ValueError(f"jensen_shannon: mix is {mix}, where it is 0 everywhere. Use forward_kl or reverse_kl.")
    same_shape("jensen_shannon", logp=logp, logq=logq)
    logm = torch.logaddexp(logp + math.log(1 - mix), logq + math.log(mix))
    return (1 - mix) * reverse_kl(logp, logm) + mix * reverse_kl(logq, logm)


def with_tail(topk_logp: Tensor, ids: Tensor | None) -> Tensor:
    """K log-probabilities and one bucket for all other tokens: a distribution again. [..., K] -> [..., K + 1]

        tail = log(1 - sum_k p_k)

    A divergence between two of these is exact for the coarser question, so never above that of the whole vocabulary.

    Args:
        topk_logp: [..., K] of the full softmax, nats.
        ids: [..., K]; -1 marks an unused place, whatever topk_logp holds there. None: K is the whole vocabulary.

    Returns:
        [..., K + 1], all finite; an unused place has probability 0 and adds nothing to a divergence. Of the whole
        vocabulary nothing is left over: [..., K], as given.
    """
    if ids is None:
        return topk_logp
    same_shape("with_tail", topk_logp=topk_logp, ids=ids)
    # Not -inf: 0 * inf is NaN, in the value or in the gradient. exp(-1e4) is 0 in every precision.
    used = topk_logp.masked_fill(ids < 0, -1e4)
    mass = used.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(used.dtype).eps)
    return torch.cat([used, torch.log1p(-mass)], -1)


def among_top_k(topk_logp: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of K tokens as if there were no others. [..., K] -> [..., K]

        w_k = p_k / sum_j p_j

    An expectation over the head of a distribution: with all of the vocabulary the weights are p itself, with less the
    head counts 1 / sum_j p_j times as much.

    Args:
        topk_logp: [..., K] of the full softmax, nats.
        ids: [..., K]; -1 marks an unused place, whatever topk_logp holds there.

    Returns:
        [..., K], summing to 1; 0 where a place is unused, and everywhere if all are.
    """
    same_shape("among_top_k", topk_logp=topk_logp, ids=ids)
    return topk_logp.masked_fill(ids < 0, -1e4).softmax(-1) * (ids >= 0)
