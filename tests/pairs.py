"""Answers whose log-probabilities are written by hand: pairs 2k and 2k + 1, the first of each chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tropism.types import Batch, Method, Output

F64 = torch.float64
Ragged = Sequence[Sequence[float]]


def answers(
    logp: Ragged, reference: Ragged | None = None, score: Sequence[float] = (), **fields: Any
) -> tuple[Output, Batch]:
    """(what the policy says, batch): one answer per row, after one token of prompt; `Output.logp` is a leaf."""
    width = 1 + max(map(len, logp))

    def square(values: Ragged) -> Tensor:
        return torch.tensor([[0.0, *row, *[0.0] * (width - 1 - len(row))] for row in values], dtype=F64)

    said, row = square(logp).requires_grad_(), torch.arange(len(logp))
    mask = torch.tensor([[0, *[1] * len(one), *[0] * (width - 1 - len(one))] for one in logp]).bool()
    batch = Batch(
        tokens=mask.long(),
        length=mask.sum(1) + 1,
        action_mask=mask,
        token_reward=said.detach() * 0,
        turn=mask.long() - 1,
        reward=torch.zeros(len(logp), dtype=F64),
        success=row % 2 == 0,
        truncated=row < 0,
        group=row // 2,
        episode=row,
        role=row * 0,
        domain=row * 0,
        reference_logp=square(reference or logp),
    )
    last = torch.tensor(list(score), dtype=F64).requires_grad_() if score else None
    return Output(logp=said, entropy=said.detach() * 0, last_value=last), batch.replace(**fields)


def objective(method: Method, out: Output, batch: Batch) -> Tensor:
    """What an optimizer step descends: [] of the whole batch."""
    loss = method.loss(out, batch, method.credit(batch))
    return (loss.values * method.weights(batch)).sum()


def preferred(reward: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), [count] each: answers drawn uniformly, preferred as Bradley and Terry would."""
    one, other = torch.randint(len(reward), (2, count), generator=generator)
    won = torch.rand(count, generator=generator, dtype=F64) < torch.sigmoid(reward[one] - reward[other])
    return torch.where(won, one, other), torch.where(won, other, one)
