"""The same action tokens after another context: what is said of them there, put back where they stand here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tropism.maths.logp import everything
from tropism.types import ABSENT, Batch


def starts(batch: Batch) -> Tensor:
    """[N] place of each row's first action token."""
    return batch.action_mask.int().argmax(1)


def reread(batch: Batch, contexts: Sequence[Sequence[int]]) -> tuple[Batch, Tensor]:
    """The same action tokens after other contexts, and by how many places each row moved to the right: [N]."""
    start, device = starts(batch), batch.tokens.device
    shift = torch.tensor([len(ids) for ids in contexts], device=device) - start
    length = batch.length + shift
    places = torch.arange(int(length.max()), device=device)
    source = places - shift[:, None]
    own = (source >= start[:, None]) & (source < batch.length[:, None])

    def after(value: Tensor, fill: int) -> Tensor:
        index = source.clamp(0, value.shape[1] - 1)
        index = index.reshape(*index.shape, *[1] * (value.ndim - 2)).expand(*index.shape, *value.shape[2:])
        return torch.where(own.reshape(*own.shape, *[1] * (value.ndim - 2)), value.gather(1, index), fill)

    tokens = after(batch.tokens, 0)
    for row, ids in enumerate(contexts):
        tokens[row, : len(ids)] = torch.tensor(ids, device=device)
    kept = {"tokens": tokens, "action_mask": after(batch.action_mask, False), "length": length}
    if batch.topk_ids is not None:
        topk = batch.topk_ids
        once = everything(topk, topk.shape[-1])
        kept["topk_ids"] = topk[:1, :1].expand(*tokens.shape, -1) if once else after(topk, -1)
    blank = torch.zeros(tokens.shape, device=device)
    absent = {name: ABSENT for name, value in batch.tensors() if value.ndim > 1}
    return batch.replace(**(absent | {"token_reward": blank, "turn": blank.long() - 1} | kept)), shift


def moved(values: Tensor, shift: Tensor, mask: Tensor) -> Tensor:
    """What was said at the places of `reread`, put where `mask` has the same tokens; 0 off the mask."""
    index = (torch.arange(mask.shape[1], device=mask.device) + shift[:, None]).clamp(0, values.shape[1] - 1)
    more = [1] * (values.ndim - 2)
    found = values.gather(1, index.reshape(*index.shape, *more).expand(*index.shape, *values.shape[2:]))
    return torch.where(mask.reshape(*mask.shape, *more), found, 0)
