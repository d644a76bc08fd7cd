"""Several processes as one: batches are gathered, gradients are summed, methods know nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tropism.rollout.play import play
from tropism.types import FLAT, Batch, Rollout, Task

T = TypeVar("T")


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

    @property
    def first(self) -> bool:
        """The process that writes, speaks and decides."""
        return self.rank == 0

    def agree(self, work: Callable[..., T], *given: Any) -> T:
        """What the first process finds, in all of them; the others wait for it."""
        if self.size == 1:
            return work(*given)
        found: list[Any] = [work(*given) if self.first else None]
        dist.broadcast_object_list(found, 0)
        told: T = found[0]
        return told

    def play(self, tasks: Sequence[tuple[Task, int, int]], *given: Any, **settings: Any) -> list[Rollout]:
        """`rollout.play`: each process plays some groups, and all get what one alone would play, in its order."""
        if self.size == 1:
            return play(tasks, *given, **settings)
        groups = {group: n for n, group in enumerate(dict.fromkeys(group for _, group, _ in tasks))}
        mine = [n for n, (_, group, _) in enumerate(tasks) if groups[group] % self.size == self.rank]
        own = play([tasks[n] for n in mine], *given, **settings, places=mine)
        everyone: list[list[Rollout]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, own)
        number = {(group, sibling): n for n, (_, group, sibling) in enumerate(tasks)}
        return sorted((r for part in everyone for r in part), key=lambda r: number[r.group, r.sibling])

    def deal(self, batch: Batch) -> list[Tensor]:
        """Rows of each process: groups stay whole, the largest come first, and go to whoever has the fewest tokens."""
        if self.size == 1:
            return [torch.arange(len(batch), device=batch.tokens.device)]
        names, index = batch.group.unique(return_inverse=True)
        tokens = torch.zeros(len(names), dtype=torch.long).index_add(0, index.cpu(), batch.length.cpu())
        load, owner = [0] * self.size, torch.zeros(len(names), dtype=torch.long)
        for name in tokens.argsort(descending=True, stable=True).tolist():
            owner[name] = load.index(min(load))
            load[int(owner[name])] += int(tokens[name])
        dealt = owner.to(index.device)[index]
        return [(dealt == rank).nonzero()[:, 0] for rank in range(self.size)]

    def share(self, batch: Batch, dealt: Sequence[Tensor]) -> Batch:
        """This process's rows, no wider than they must be."""
        if self.size == 1:
            return batch
        rows = batch[dealt[self.rank]]
        return rows.narrow(int(rows.length.max()) if len(rows) else 1)  # fewer groups than processes may be left

    def whole(self, batch: Batch, own: Batch, dealt: Sequence[Tensor]) -> Batch:
        """The batch with what the processes measured of their rows; fields [N, T, K] are None."""
        if self.size == 1:
            return own
        gathered, _ = self.gather(own)
        back = torch.cat(list(dealt)).argsort()
        return gathered[back].replace(group=batch.group, episode=batch.episode)

    def rows(self, values: Tensor, dealt: Sequence[Tensor], width: int) -> Tensor:
        """[n, t] of this process's rows -> [N, T] of all."""
        if self.size == 1:
            return values
        everyone: list[Tensor] = [values] * self.size
        dist.all_gather_object(everyone, values.cpu())
        together = torch.cat([padded(part, width, 0) for part in everyone])
        return together[torch.cat([part.cpu() for part in dealt]).argsort()]

    def means(self, numbers: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Of (sum, over how many) of each process the mean over all; 0 over none. What counts tokens is a sum."""
        total = self.total({name: value for name, (value, _) in numbers.items()})
        count = self.total({name: 1.0 if name.endswith("/tokens") else over for name, (_, over) in numbers.items()})
        return {name: v if name.endswith("/tokens") else v / max(count[name], 1.0) for name, v in total.items()}

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

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
        if self.size == 1:
            return
        for parameter in optimizer.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in optimizer.parameters]
        together = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(together)
        for grad, summed in zip(grads, together.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def padded(value: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill)
