"""Sequences that are decoded side by side, and the decoder that every model has: that of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Stream(Protocol):
    """Sequences that are decoded side by side."""

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts; logits [N, V] after each. Their sequences stand behind those that are here."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """Read one token [B] of each sequence; logits [B, V] after it."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences alone, in this order."""
        ...


class WithCache:
    """Any causal language model, decoded by transformers. Padded on the left; all sequences join at once, and first."""

    def __init__(self, module: Any, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        self.module, self.precision, self.cache = module, precision, None
        self.context = int(getattr(module.config, "max_position_embeddings", 1 << 30))

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width, device = max(len(prompt) for prompt in prompts), self.module.device
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        return self.read(tokens, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def next(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        place = (self.place[:, -1:] + 1).clamp(max=self.context - 1)  # one that has ended may stand at the limit
        return self.read(tokens[:, None], place)

    def read(self, tokens: Tensor, place: Tensor) -> Tensor:
        with self.precision():
            out = self.module(
                input_ids=tokens,
                attention_mask=self.mask,
                position_ids=place,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache, self.place = out.past_key_values, place
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        assert self.cache is not None
        self.cache.batch_select_indices(rows)
        self.mask, self.place = self.mask[rows], self.place[rows]
