"""Rows of a batch as one row without padding, in which what rows begin with in common stands once.

Siblings share a prompt, the turns of an episode share all that was said before. A causal model's state at a token
depends on the tokens up to it alone, so equal beginnings have equal states, which are computed once; their gradient is
the sum over the rows that begin so. Only attention still sees row by row: queries, keys and values are spread over
padded rows, and what comes of them is collected again. Numbers are those of padded rows, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from tropism.maths.logp import HALF
from tropism.types import Batch

NAME = "tropism"
"""Of the attention, in the registry of transformers."""
ROUND = 64
"""Tokens are filled up to a multiple of it: oneDNN compiles its products for every number of rows that it meets."""


@dataclass(frozen=True)
class Packed:
    """M tokens for N rows of at most T, filled up to M' with tokens that nothing reads.

    Attributes:
        ids: [1, M'] tokens.
        positions: [1, M'] of each in its row.
        place: [N T] where a row's token stands among the M; 0 where there is padding.
        owner: [M] the first padded place of each, n T + t.
        shared: (row, an earlier row, how many tokens they begin with in common), where there are any.
        shape: (N, T).
    """

    ids: Tensor
    positions: Tensor
    place: Tensor
    owner: Tensor
    shared: tuple[tuple[int, int, int], ...]
    shape: tuple[int, int]


def pack(tokens: Tensor, length: Tensor) -> Packed:
    """[N, T], [N] -> the same rows, packed."""
    rows = [row[:size] for row, size in zip(tokens.tolist(), length.tolist(), strict=True)]
    start = torch.zeros(len(rows), dtype=torch.long)
    order = sorted(range(len(rows)), key=rows.__getitem__)
    shared = []
    for earlier, row in pairwise(order):
        if size := in_common(rows[earlier], rows[row]):
            start[row] = size
            shared.append((row, earlier, size))
    span = torch.arange(tokens.shape[1])
    own = (span >= start[:, None]) & (span < length.cpu()[:, None])
    place = (own.flatten().cumsum(0) - 1).view(own.shape) * own
    for row, earlier, size in shared:
        place[row, :size] = place[earlier, :size]
    owner = own.flatten().nonzero()[:, 0].to(tokens.device)
    filler = (0, -len(owner) % ROUND)
    return Packed(
        ids=pad(tokens.flatten()[owner], filler)[None],
        positions=pad(owner % tokens.shape[1], filler)[None],
        place=place.flatten().to(tokens.device),
        owner=owner,
        shared=tuple(shared),
        shape=(len(rows), tokens.shape[1]),
    )


def in_common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    both = min(len(one), len(other))
    if one[:both] == other[:both]:
        return both
    low, high = 0, both
    while low < high:  # the longest equal beginning, by halves: slices compare fast
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def micro_batches(batch: Batch, tokens: int, unit: Tensor | None = None, *, packed: bool) -> Iterator[Tensor]:
    """Cut rows into micro-batches of at most so many tokens, those of like length or with one beginning together.

    Args:
        unit: [N] rows of one id stay together, even if they are too many; None: every row alone.
        packed: count tokens as `pack` would leave them, and allow four times as many padded ones, which are all that
            attention sees; else count padded ones.
    """
    rows = [row[:size] for row, size in zip(batch.tokens.tolist(), batch.length.tolist(), strict=True)]
    family = batch.group.tolist() if packed else list(range(len(rows)))
    widest: dict[int, int] = {}
    for name, row in zip(family, rows, strict=True):
        widest[name] = max(widest.get(name, 0), len(row))
    units: dict[int, list[int]] = {}
    for n, name in enumerate(range(len(rows)) if unit is None else unit.tolist()):
        units.setdefault(name, []).append(n)
    ranked = sorted(
        (max(widest[family[n]] for n in some), family[some[0]], sorted(rows[n] for n in some), some)
        for some in units.values()
    )
    part: list[int] = []
    spent, width, last = 0, 0, list[int]()
    for _, _, own, some in ranked:
        cost = sum(len(row) - in_common(before, row) for before, row in zip([last, *own], own, strict=False))
        width = max(width, *map(len, own))
        padded = width * (len(part) + len(own))
        if part and ((packed and spent + cost > tokens) or padded > (4 if packed else 1) * tokens):
            yield torch.tensor(sorted(part), device=batch.tokens.device)
            part, spent, width, cost = [], 0, max(map(len, own)), cost + in_common(last, own[0])
        part, spent, last = part + some, spent + cost, own[-1]
    if part:
        yield torch.tensor(sorted(part), device=batch.tokens.device)


# ------------------------------------------------------------------------------------------------------------ attention


def use(module: Any, precision: Callable[[], Any]) -> None:
    """Let a causal language model of transformers read packed rows, if its attention is torch's and three short rows
    prove that it reads them right; else it stays as it is. Called as ever, it computes what it did."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if module.config._attn_implementation != "sdpa" or getattr(module.config, "attention_chunk_size", None):
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    module.config._attn_implementation = NAME
    if not proven(module, precision):
        module.config._attn_implementation = "sdpa"


def used(module: Any) -> bool:
    return bool(module.config._attn_implementation == NAME)


def worth(batch: Batch) -> Packed | None:
    """The batch packed, if that spares a tenth of the tokens."""
    packed = pack(batch.tokens, batch.length)
    return packed if len(packed.owner) <= 0.9 * batch.tokens.numel() else None


@torch.no_grad()
def proven(module: Any, precision: Callable[[], Any]) -> bool:
    """Packed rows give the logits of padded ones, to rounding."""
    rows = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 5, 0], [2, 1, 0, 0, 0]], device=module.device)
    packed = pack(rows, torch.tensor([5, 4, 2], device=module.device))
    with precision():
        padded = module(input_ids=rows, use_cache=False).logits.flatten(0, 1)[packed.owner]
        try:
            mine = module(**inputs(packed), use_cache=False).logits[0, : len(packed.owner)]
        except (TypeError, ValueError, RuntimeError, IndexError):  # it takes no such input, or stumbles over it
            return False
    tolerance = (1e-4 if padded.dtype == torch.float32 else 5e-2) * max(1.0, float(padded.abs().max()))
    return float((mine - padded).float().abs().max()) <= tolerance


def inputs(packed: Packed) -> dict[str, Any]:
    """What a model is called with. A mask of four dimensions is one that the model leaves alone."""
    mask = torch.zeros(1, 1, 1, 1, device=packed.ids.device)
    return {"input_ids": packed.ids, "position_ids": packed.positions, "attention_mask": mask, "packed": packed}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Queries [1, H, M', D], keys and values [1, K, M', D] -> [1, M', H, D], each row for itself; without `packed`,
    torch's attention as transformers calls it."""
    if packed is None:
        return by_torch(module, query, key, value, attention_mask, options)
    if "sliding_window" not in options and windowed(module.config):
        raise ValueError("it does not say how far a token sees")
    rows, longest = packed.shape
    into, out_of = cast(Any, Spread).apply, cast(Any, Collect).apply
    query, key, value = (
        into(part[0].transpose(0, 1).flatten(1), packed).view(rows, longest, -1, part.shape[-1]).transpose(1, 2)
        for part in (query, key, value)
    )
    mask = within(longest, options.get("sliding_window"), query.device)
    seen, _ = by_torch(module, query, key, value, mask, options | {"is_causal": mask is None})
    return out_of(seen.flatten(2).flatten(0, 1), packed).view(1, -1, *seen.shape[2:]), None


def by_torch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, None]:
    """Torch's attention, as transformers calls it. Half precision is raised on a CPU, where the backward pass of torch
    2.13 is slower in bfloat16 than in float32."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sdpa, dtype = cast(Any, sdpa_attention_forward), value.dtype
    if query.device.type != "cpu" or dtype not in HALF:
        return cast(tuple[Tensor, None], sdpa(module, query, key, value, mask, **options))
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    with torch.autocast("cpu", enabled=False):
        seen, _ = sdpa(module, query.float(), key.float(), value.float(), mask, **options)
    return seen.to(dtype), None


def windowed(config: Any) -> bool:
    return bool(getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None))


def within(longest: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, T, T] which tokens a token sees, itself the last of them; None: every one before it."""
    if not window or window >= longest:
        return None
    span = torch.arange(longest, device=device)
    ahead = span[:, None] - span
    return ((ahead >= 0) & (ahead < window))[None, None]


def spread(flat: Tensor, packed: Packed | None) -> Tensor:
    """[M', W] -> [N T, W]; what is not packed is so already."""
    return flat if packed is None else flat.index_select(0, packed.place)


class Spread(torch.autograd.Function):
    """[M', W] -> [N T, W]. The gradient of a token is the sum over the rows that it stands in."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return spread(flat, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        packed = ctx.packed
        if packed.shared:
            rows = g.view(*packed.shape, -1).clone()
            for row, earlier, size in reversed(packed.shared):
                rows[earlier, :size] += rows[row, :size]
            g = rows.flatten(0, 1)
        return filled(g, packed), None


class Collect(torch.autograd.Function):
    """[N T, W] -> [M', W], each token's from the row that owns it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return filled(rows, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        out = g.new_zeros(len(ctx.packed.place), g.shape[1])
        out[ctx.packed.owner] = g[: len(ctx.packed.owner)]
        return out, None


def filled(rows: Tensor, packed: Packed) -> Tensor:
    """[N T, W] -> [M', W], 0 where nothing reads."""
    out = rows.new_zeros(packed.ids.shape[1], rows.shape[1])
    torch.index_select(rows, 0, packed.owner, out=out[: len(packed.owner)])
    return out
