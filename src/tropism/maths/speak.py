"""What hidden states say of the tokens that came next: the head and `logp.py` in one, in chunks of tokens, with a
gradient that computes each chunk again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tropism.maths.linear import linear
from tropism.maths.logp import HALF, entropy, everything, log_softmax

MOST = 1 << 26
"""Bytes that one array of numbers over the vocabulary may take. What would take more is computed in chunks of tokens,
and again in the backward pass."""


@dataclass(frozen=True)
class Said:
    """What M states say of the tokens that came next."""

    logp: Tensor
    """[M]"""
    entropy: Tensor
    """[M]"""
    topk_ids: Tensor | None = None
    """[M, K] the likeliest tokens, where they were asked for."""
    topk_logp: Tensor | None = None
    """[M, K] of the ids that were given, 0 where one is -1 (unused); where none were, of the likeliest."""


def said(
    states: Tensor,
    tokens: Tensor,
    temperature: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    top_k: int = 0,
    most: int = MOST,
) -> Said:
    """Log-probability of each token, entropy, and log-probabilities of K ids: with gradient, but to `topk_ids`.

    No array over the vocabulary is larger than `most` bytes: beyond it the head runs in chunks of tokens, forwards and
    again backwards, so that at a vocabulary of 151,936 a token takes 0.6 MB only while its chunk is at work.

        d log p_t / d l_v = ([v = t] - p_v) / temperature        d H / d l_v = -p_v (log p_v + H) / temperature

    Args:
        states: [M, hidden], or with no weight the logits [M, V].
        tokens: [M] ids.
        weight, bias: of the head, [V, hidden] and [V].
        ids: [M, K]; -1 is an unused place.
        top_k: how many of the likeliest to return.
    """
    vocabulary = states.shape[-1] if weight is None else weight.shape[0]
    rows = max(1, most // (4 * vocabulary))

    logp, entropies, best, topk = Speak.apply(  # type: ignore[no-untyped-call]
        states, weight, bias, tokens, ids, temperature, top_k, rows
    )
    return Said(logp, entropies, best if top_k else None, topk if top_k or ids is not None else None)


class Speak(torch.autograd.Function):
    """The chunks of `said`. Within one chunk the probabilities are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        ids: Tensor | None,
        temperature: float,
        top_k: int,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        device = states.device.type
        if weight is not None:
            ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
            states, weight = states.to(ctx.dtype), weight.to(ctx.dtype)
            bias = None if bias is None else bias.to(ctx.dtype)
        ctx.temperature, ctx.rows, ctx.kept = temperature, rows, None
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for n, part in enumerate(states.split(rows)):
            some = slice(n * rows, n * rows + len(part))
            logp = log_softmax(head(part, weight, bias), temperature)
            p = logp.exp()
            best = logp.topk(top_k).indices
            at = best if ids is None else ids[some]
            found.append((gathered(logp, tokens[some, None])[:, 0], entropy(logp, p), best, gathered(logp, at)))
            if len(part) == len(states):
                ctx.kept = p
        outputs = tuple(torch.cat(column) for column in zip(*found, strict=True))
        ctx.save_for_backward(states, weight, bias, tokens, outputs[2] if ids is None else ids, outputs[1])
        ctx.mark_non_differentiable(outputs[2])
        return outputs  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logp: Any, by_entropy: Any, _: Any, by_topk: Any) -> Any:
        states, weight, bias, tokens, ids, entropies = ctx.saved_tensors
        by_states, by_weight, by_bias = [], None, None
        for n, part in enumerate(states.split(ctx.rows)):
            some = slice(n * ctx.rows, n * ctx.rows + len(part))
            p = log_softmax(head(part, weight, bias), ctx.temperature).exp() if ctx.kept is None else ctx.kept
            g = by_logits(
                p,
                (tokens[some], None if by_logp is None else by_logp[some] / ctx.temperature),
                (entropies[some], None if by_entropy is None else by_entropy[some] / ctx.temperature),
                (ids[some], None if by_topk is None else by_topk[some] / ctx.temperature),
            )
            if weight is None:
                by_states.append(g)
                continue
            g = g.to(ctx.dtype)
            by_states.append(g @ weight)
            if ctx.needs_input_grad[1]:
                mine = (g.t() @ part).float() if g.dtype in HALF else g.t() @ part
                by_weight = mine if by_weight is None else by_weight + mine
            if ctx.needs_input_grad[2]:
                mine = g.sum(0, dtype=torch.float32 if g.dtype in HALF else g.dtype)
                by_bias = mine if by_bias is None else by_bias + mine
        return torch.cat(by_states), by_weight, by_bias, None, None, None, None, None


def head(states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return states if weight is None else linear(states, weight, bias)


def gathered(logp: Tensor, ids: Tensor) -> Tensor:
    """[M, K] log-probabilities at ids [M, K]; 0 where an id is -1."""
    return logp if everything(ids, logp.shape[-1]) else logp.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)


def by_logits(
    p: Tensor, logp: tuple[Tensor, Tensor | None], entropies: tuple[Tensor, Tensor | None], topk: tuple[Tensor, Any]
) -> Tensor:
    """Gradient with respect to logits, [M, V], from (what, gradient with respect to it over temperature)."""
    total, (tokens, by_logp), (ids, by_topk) = p.new_zeros(len(p)), logp, topk
    whole = everything(ids, p.shape[-1])
    if by_logp is not None:
        total = total + by_logp
    if by_topk is not None:
        by_topk = by_topk if whole else by_topk.masked_fill(ids < 0, 0.0)
        total = total + by_topk.sum(-1)
    g = p * -total[:, None]
    if by_logp is not None:
        g.scatter_add_(1, tokens[:, None], by_logp[:, None])
    if by_topk is not None:
        g = g.add_(by_topk) if whole else g.scatter_add_(1, ids.clamp(min=0), by_topk)
    value, by_entropy = entropies
    if by_entropy is not None:
        logq = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        g -= by_entropy[:, None] * p * (logq + value[:, None])
    return g
