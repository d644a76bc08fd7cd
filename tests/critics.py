"""Replies whose rewards and values are written by hand."""

from __future__ import annotations

import torch

from tropism.types import Batch


def reply(reward, value, *, logp=None, last_value=0.0, truncated=False, turn=None, **fields):
    """One row of action tokens only, with the policy's own log-probabilities."""
    reward, value = torch.tensor([reward]), torch.tensor([value])
    logp = torch.full_like(reward, -1.0) if logp is None else torch.tensor([logp])
    turn = torch.tensor([turn]) if turn else torch.zeros_like(reward, dtype=torch.long)
    zero = torch.zeros(1, dtype=torch.long)
    return Batch(
        tokens=torch.zeros_like(turn),
        length=zero + reward.shape[1],
        action_mask=torch.ones_like(reward, dtype=torch.bool),
        token_reward=reward,
        turn=turn,
        reward=reward.sum(1),
        success=zero.bool(),
        truncated=zero.bool() | truncated,
        group=zero,
        episode=zero,
        role=zero,
        domain=zero,
        behavior_logp=logp,
        proximal_logp=logp,
        value=value,
        last_value=torch.tensor([last_value]),
        **fields,
    )


def silent(batch):
    """The same batch, judged by a critic that says 0."""
    return batch.replace(value=batch.value * 0, last_value=batch.last_value * 0)
