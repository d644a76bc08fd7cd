"""Log-probabilities and entropies from logits. The only place that shifts: the output at t - 1 speaks about token t.

Every number here is of log_softmax(logits / temperature) over the full vocabulary, in float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor


def predicting(mask: Tensor) -> Tensor:
    """Positions whose outputs speak about a masked token of any row: the model's head is needed only there.

    Args:
        mask: [N, T] bool. Column 0 must be empty: nothing comes before the first token, so nothing predicts it.

    Returns:
        [P] positions in ascending order; output p speaks about token p + 1.
    """
    if mask[:, 0].any():
        raise ValueError("predicting: a row starts with an action token, which nothing predicts. Give it a context.")
    return mask.any(0).nonzero().squeeze(1) - 1


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log p_v = l_v / temperature - log sum_u exp(l_u / temperature); half precision is raised to float32 first."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return (logits / temperature).log_softmax(-1)


def entropy(logp: Tensor, p: Tensor | None = None) -> Tensor:
    """H = -sum_v p_v log p_v, in nats; [..., V] -> [...]. A token of probability 0 adds 0.

    Args:
        p: exp(logp), where it is known.
    """
    return -((logp.exp() if p is None else p) * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def of_tokens(logp: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each masked token, put where the token stands.

    Args:
        logp: [N, P, V] log-probabilities at `positions`.
        tokens: [N, T] ids.
        positions: [P] from `predicting`.
        mask: [N, T] bool.

    Returns:
        [N, T]; 0 off the mask.
    """
    chosen = logp.gather(-1, tokens[:, positions + 1, None]).squeeze(-1)
    return placed(chosen, positions, mask)


def of_topk(logp: Tensor, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The same for K ids per token: [N, P, V] and ids [N, T, K] -> [N, T, K]; 0 where an id is -1 (unused)."""
    ids = ids[:, positions + 1]
    chosen = logp.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    return placed(chosen, positions, mask)


def placed(values: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Move [N, P, ...] values spoken at `positions` to the tokens they are about: [N, T, ...], 0 off the mask."""
    out = values.new_zeros(*mask.shape, *values.shape[2:]).index_copy(1, positions + 1, values)
    return out.masked_fill(~mask.reshape(*mask.shape, *[1] * (values.ndim - 2)), 0)
