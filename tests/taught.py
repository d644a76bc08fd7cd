"""Replies whose log-probabilities are written by hand, and one state of which every token is drawn once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tropism.types import Batch, Method, Output

P, Q, R = (torch.tensor(p, dtype=torch.float64) for p in ((0.5, 0.3, 0.2), (0.2, 0.7, 0.1), (0.6, 0.2, 0.2)))
"""Student, teacher and reference in that state."""

Ragged = Sequence[Sequence[float]]


def replies(
    student: Ragged | Tensor,
    teacher: Ragged | Tensor,
    *,
    behavior: Ragged | Tensor | None = None,
    reference: Ragged | Tensor | None = None,
    entropy: Ragged | Tensor | None = None,
    taught: Sequence[bool] | None = None,
    step: int = 0,
    steps: int = 1,
) -> tuple[Output, Batch]:
    """(what the policy says, batch): one reply per row, nothing in front of it, padded with 0.

    Sampler, trainer and policy are one unless `behavior` says otherwise; `Output.logp` is a leaf.
    """
    rows = len(student)
    length = torch.tensor([len(row) for row in student])
    width = int(length.max())

    def square(values: Ragged | Tensor | None) -> Tensor:
        if values is None:
            return logp.detach().clone()
        return torch.tensor([[*map(float, row), *[0.0] * (width - len(row))] for row in values], dtype=torch.float64)

    logp = square(student)
    mask, number = torch.arange(width) < length[:, None], torch.arange(rows)
    zero = torch.zeros(rows, dtype=torch.float64)
    batch = Batch(
        tokens=mask.long(),
        length=length,
        action_mask=mask,
        token_reward=logp * 0,
        turn=mask.long() - 1,
        reward=zero,
        success=zero > 0,
        truncated=zero > 0,
        group=number,
        episode=number,
        role=number * 0,
        domain=number * 0,
        step=step,
        steps=steps,
        behavior_logp=square(behavior),
        proximal_logp=logp.clone(),
        proximal_entropy=logp * 0 if entropy is None else square(entropy),
        reference_logp=square(reference),
        teacher_logp=square(teacher),
        has_teacher=torch.ones(rows, dtype=torch.bool) if taught is None else torch.tensor(taught),
    )
    return Output(logp=logp.requires_grad_(), entropy=batch.proximal_entropy), batch


def state(logits: Tensor, teacher: Tensor, reference: Tensor = R, ids: Sequence[int] = ()) -> tuple[Output, Batch]:
    """Row v is the reply that consists of token v alone, as the policy with these logits would draw it.

    Args:
        teacher, reference: [V] probabilities.
        ids: the tokens on which student and teacher are compared; all of them if none is named.
    """
    logp = logits.log_softmax(-1)
    columns = [[[float(value)] for value in values] for values in (logp.detach(), teacher.log(), reference.log())]
    _, batch = replies(columns[0], columns[1], reference=columns[2])
    kept = torch.tensor(ids or range(len(logits))).expand(len(logits), 1, -1)
    batch = batch.replace(
        topk_ids=kept,
        proximal_topk_logp=logp.detach()[kept.clamp(min=0)],
        teacher_topk_logp=teacher.log()[kept.clamp(min=0)],
    )
    out = Output(logp=logp[:, None], entropy=logp[:, None].detach() * 0, topk_logp=logp[kept.clamp(min=0)])
    return out, batch


def expected_gradient(method: Method, logits: Tensor, teacher: Tensor, reference: Tensor = R) -> Tensor:
    """[V] of one token drawn from the policy, before any average: sum_v p_v grad loss_v over the tokens that count."""
    logits = logits.detach().clone().requires_grad_()
    out, batch = state(logits, teacher, reference)
    counted = method.weights(batch) > 0
    values = method.loss(out, batch, method.credit(batch)).values
    shares = logits.softmax(-1).detach()[:, None]
    return torch.autograd.grad((values * counted * shares).sum(), logits)[0]


def descend(method: Method, logits: Tensor, teacher: Tensor, reference: Tensor = R, steps: int = 400) -> Tensor:
    """[V] probabilities after `steps` steps along the expected gradient, at rate 1."""
    for _ in range(steps):
        logits = logits - expected_gradient(method, logits, teacher, reference)
    return logits.softmax(-1)


def slopes(method: Method, out: Output, batch: Batch) -> Tensor:
    """[N, T] gradient of one optimizer step to the log-probability of each token."""
    loss = method.loss(out, batch, method.credit(batch))
    return torch.autograd.grad((loss.values * method.weights(batch)).sum(), out.logp)[0]
