"""Log-probs of a finished batch under weights that do not move: the policy before its update, a reference."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tropism.signals.reread import reread, starts
from tropism.types import ABSENT, Batch, Needs, Output


class Forward(Protocol):
    """A forward pass without gradient, over any number of rows.

    `Output.topk_logp` is at `batch.topk_ids` where the batch has them, else at `Output.topk_ids`: the `top_k` likeliest
    tokens at every action token.
    """

    def __call__(self, batch: Batch, top_k: int = 0) -> Output: ...


TAUGHT = frozenset({"teacher_logp", "counter_logp", "teacher_entropy", "has_teacher"})
TAUGHT |= {"topk_ids", "proximal_topk_logp", "teacher_topk_logp"}
"""What a teacher measures."""
MEASURED = TAUGHT | {"parts", "proximal_logp", "proximal_entropy", "reference_logp", "mismatch", "value", "last_value"}
"""All that can be measured."""


def measure(
    batch: Batch,
    needs: Needs,
    *,
    policy: Forward,
    exact: bool,
    reference: Forward | None = None,
    before: Batch | None = None,
    context: int = 1 << 30,
) -> Batch:
    """The batch with every field of `needs.measured` that does not take a teacher.

    Args:
        policy: the trainer's forward.
        exact: sampler and trainer are one, so that `proximal_logp` is `behavior_logp` itself and importance weights are
            exactly 1.
        reference: the frozen start model's forward; only asked where needed.
        before: the rows that stand before these in the whole batch, where this is a share of it; `mismatch` takes their
            answers.
        context: how many tokens the model can read.
    """
    wanted = needs.measured - TAUGHT
    if exact and batch.behavior_logp is not None:
        batch = batch.replace(proximal_logp=batch.behavior_logp)
    else:  # what the sampler said of other tokens is not the trainer's either
        batch = batch.replace(proximal_entropy=ABSENT, topk_ids=ABSENT, proximal_topk_logp=ABSENT)
    lacking = [name for name in ("proximal_logp", "proximal_entropy") if getattr(batch, name) is None]
    if {"value", "last_value", *lacking} & wanted:
        out = policy(batch)
        batch = batch.replace(**{name: getattr(out, name.removeprefix("proximal_")) for name in lacking})
        if out.value is not None:
            batch = batch.replace(value=out.value, last_value=out.last_value)
    if "reference_logp" in wanted:
        assert reference is not None
        batch = batch.replace(reference_logp=reference(batch).logp)
    if "mismatch" in wanted:
        assert reference is not None
        before = batch[torch.arange(-1, len(batch) - 1) % max(len(batch), 1)] if before is None else before
        batch = batch.replace(mismatch=mismatch(batch, before, policy, reference, context))
    return batch


def mismatch(batch: Batch, before: Batch, policy: Forward, reference: Forward, context: int = 1 << 30) -> Tensor:
    """[N] log p - log q of the row before's answer to this row's prompt; the first row has the last one's answer.
    Of one that does not fit behind this prompt, as much as does."""
    prompts = [row[:start] for row, start in zip(batch.tokens.tolist(), starts(batch).tolist(), strict=True)]
    other, _ = reread(before, prompts)
    other = other.replace(length=other.length.clamp(max=context)).narrow(context)
    return ((policy(other).logp - reference(other).logp) * other.action_mask).sum(1)


def top_k(batch: Batch, policy: Forward, k: int, vocabulary: int) -> Batch:
    """The student's likeliest tokens at every action token; the sampler's own where it returned them.

    Args:
        k: how many; `vocabulary`: all of them.
    """
    if k >= vocabulary:
        batch = batch.replace(topk_ids=all_of(batch, vocabulary))
    if batch.topk_ids is not None and batch.proximal_topk_logp is not None:
        return batch
    out = policy(batch, 0 if batch.topk_ids is not None else k)
    ids = batch.topk_ids if batch.topk_ids is not None else out.topk_ids
    return batch.replace(topk_ids=ids, proximal_topk_logp=out.topk_logp)


def all_of(batch: Batch, vocabulary: int) -> Tensor:
    """[N, T, V] every token at every place, held once."""
    return torch.arange(vocabulary, device=batch.tokens.device).expand(*batch.tokens.shape, vocabulary)
