"""Log-probabilities and entropies from logits. The only place that shifts: the output at t - 1 speaks about token t.

Every number here is of log_softmax(logits / temperature) over the full vocabulary, in float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def predicting(mask: Tensor) -> Tensor:
    """Where the states stand that speak about masked tokens: [M] flat places n T + t - 1, in the order of `mask`.

    Args:
        mask: [N, T] bool. Column 0 must be empty: nothing comes before the first token, so nothing predicts it.
    """
    if mask[:, 0].any():
        raise ValueError("predicting: a row starts with an action token, which nothing predicts. Give it a context.")
    return mask.flatten().nonzero().squeeze(1) - 1


def placed(values: Tensor, mask: Tensor) -> Tensor:
    """[M, ...] values of the masked tokens, put where these stand: [N, T, ...], 0 elsewhere."""
    places = mask.flatten().nonzero().squeeze(1)
    out = values.new_zeros(mask.numel(), *values.shape[1:])
    return out.index_copy(0, places, values).view(*mask.shape, *values.shape[1:])


def everything(ids: Tensor, vocabulary: int) -> bool:
    """Whether ids [..., K] are the whole vocabulary in its order, held once for all places: nothing need be looked up.

    `torch.arange(vocabulary).expand(...)` is; nothing else should be one view of so many ids.
    """
    return ids.shape[-1] == vocabulary and not any(ids.stride()[:-1])


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log p_v = l_v / temperature - log sum_u exp(l_u / temperature); half precision is raised to float32 first."""
    if logits.dtype in HALF:
        logits = logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def entropy(logp: Tensor, p: Tensor | None = None) -> Tensor:
    """H = -sum_v p_v log p_v, in nats; [..., V] -> [...]. A token of probability 0 adds 0. Without gradient.

    Args:
        p: exp(logp), where it is known.
    """
    logp = logp.detach()
    return -((logp.exp() if p is None else p) * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
