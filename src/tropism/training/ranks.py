"""Several processes as one: batches are gathered, gradients are summed, methods know nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tropism.types import FLAT, Batch


class Ranks:
    """The processes that train together; one process is the ordinary case."""

    def __init__(self) -> None:
        here = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)

    def gather(self, batch: Batch) -> tuple[Batch, slice]:
        """The batch of all ranks, padded to one T, and where this rank's rows stand in it.

        [N] and [N, T] fields travel; [N, T, K] fields do not and are None in the result. Every rank numbers its
        episodes and groups from 0, so equal numbers of two ranks are told apart: no group may be parted among ranks.
        """
        if self.size == 1:
            return batch, slice(0, len(batch))
        mine = {name: value.cpu() for name, value in batch.tensors() if value.ndim < 3}
        everyone: list[dict[str, Tensor]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everyone, mine)
        width = max(part["tokens"].shape[1] for part in everyone)
        device = batch.tokens.device
        whole: dict[str, Any] = {name: None for name, value in batch.tensors() if value.ndim == 3}
        for name in mine:
            fill = -1 if name == "turn" else 0
            wide = mine[name].ndim == 2 and name not in FLAT
            parts = [padded(part[name], width, fill) if wide else part[name] for part in everyone]
            whole[name] = torch.cat(parts).to(device)
        rank = torch.cat([torch.full_like(part["episode"], n) for n, part in enumerate(everyone)]).to(device)
        for name in ("episode", "group"):
            whole[name] = torch.stack([rank, whole[name]]).unique(dim=1, return_inverse=True)[1]
        start = sum(len(part["tokens"]) for part in everyone[: self.rank])
        return batch.replace(**whole), slice(start, start + len(batch))

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def total(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sum of named numbers; a rank that had nothing to do may lack some."""
        if self.size == 1:
            return dict(numbers)
        everyone: list[Mapping[str, float]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everyone, dict(numbers))
        names = dict.fromkeys(name for part in everyone for name in part)
        return {name: sum(part.get(name, 0.0) for part in everyone) for name in names}

    def sum_gradients(self, optimizer: Any) -> None:
        """Sum, never average: the weights already divide by what all ranks hold."""
        if self.size > 1:
            for parameter in optimizer.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)


def padded(value: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill)
