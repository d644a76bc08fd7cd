"""What a frozen model says of rows that are read again and again, computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tropism.signals.frozen import Forward
from tropism.training.collate import collate
from tropism.types import Batch, Output, Rollout

Key = tuple[tuple[int, ...], tuple[bool, ...]]
"""A row: its tokens, and which of them are actions."""


class Remembered:
    """A `Forward` that has seen the data. Rows are computed in blocks, in the order of the data, whoever asks first: so
    no number depends on which rows a step draws together, and a resumed run finds the same ones.

    Args:
        forward: of weights that never move.
        rows: what will be read; anything else is computed when it is asked for, and not kept.
        block: how many of them are computed together.
    """

    def __init__(self, forward: Forward, rows: Sequence[tuple[Rollout, ...]], block: int, device: torch.device) -> None:
        self.forward, self.device = forward, device
        self.blocks = [[one for row in rows[k : k + block] for one in row] for k in range(0, len(rows), block)]
        self.number = {key: n for n, block in enumerate(self.blocks) for key in keys(self.batch(block))}
        self.known: dict[Key, tuple[Tensor, Tensor]] = {}

    def batch(self, block: Sequence[Rollout]) -> Batch:
        return collate(block, codes={}, device=self.device)

    def __call__(self, batch: Batch, top_k: int = 0) -> Output:
        asked = keys(batch)
        if top_k or any(key not in self.number for key in asked):
            return self.forward(batch, top_k)
        for n in sorted({self.number[key] for key in asked if key not in self.known}):
            self.read(self.batch(self.blocks[n]))
        out = Output(logp=torch.zeros_like(batch.token_reward), entropy=torch.zeros_like(batch.token_reward))
        for n, key in enumerate(asked):
            out.logp[n, : len(key[0])], out.entropy[n, : len(key[0])] = self.known[key]
        return out

    def read(self, batch: Batch) -> None:
        said = self.forward(batch)
        for n, key in enumerate(keys(batch)):
            self.known[key] = (said.logp[n, : len(key[0])].clone(), said.entropy[n, : len(key[0])].clone())


def keys(batch: Batch) -> list[Key]:
    rows = zip(batch.tokens.tolist(), batch.action_mask.tolist(), batch.length.tolist(), strict=True)
    return [(tuple(tokens[:length]), tuple(actions[:length])) for tokens, actions, length in rows]
