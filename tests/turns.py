"""Turns written by hand: a row is a turn, every token of it was chosen, and all log-probabilities are given."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.types import Batch


def turns(logp: list[list[float]], *, reward: list[float], told: list[list[float]] | None = None) -> Batch:
    """One turn per row.

    Args:
        logp: under the policy that made the batch.
        reward: of each turn, on its last token.
        told: under the teacher; None where nothing was told.
    """
    proximal, earned = torch.tensor(logp), torch.tensor(reward)
    mask, rows = torch.ones_like(proximal, dtype=torch.bool), torch.arange(len(logp))

    def last(values: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(proximal)[:, 1:], values[:, None]], 1)

    return Batch(
        tokens=mask.long(),
        length=mask.sum(1),
        action_mask=mask,
        token_reward=last(earned),
        turn=mask.long() - 1,
        reward=earned,
        success=earned > 0,
        truncated=earned > 9,
        group=rows,
        episode=rows,
        role=rows * 0,
        domain=rows * 0,
        proximal_logp=proximal,
        behavior_logp=proximal,
        teacher_logp=proximal if told is None else torch.tensor(told),
        has_teacher=torch.full((len(rows),), told is not None),
    )
