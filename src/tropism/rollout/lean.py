"""A lean decoder for models of Llama's shape. It reads the transformers module's own weights, anew at every call.

The shape: token embedding, layers of (RMS norm, attention with rotary positions and grouped heads, RMS norm, gated
MLP), RMS norm, linear head; with or without biases, and norms of queries and keys. transformers decodes such a model
with more operations than it takes, which a small one feels (`bench/decode.py`). Here prompts that are equal
are read once, the projections of a layer that read the same input are one product, the cache is written in place, and
sequences join and leave while others go on. A model of another shape is decoded by transformers (`sampler.py`).

Left out: sliding windows that are shorter than the context, rotary positions that change with length, soft caps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from tropism.maths.linear import PLAIN, linear, packed, product, suits
from tropism.rollout.recorded import UNRECORDED, Recorded, Recorder

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Model types of transformers whose code is of the shape; `misfit` compares the numbers all the same."""
GROWTH = 64
"""Places by which a cache grows."""
PACKED_FOR = 128
"""Rows for which a CPU's weights are laid out."""
READ = 1 << 14
"""Prompt tokens that are read at once, padding included."""

Product = Callable[[Tensor], Tensor]


@torch.no_grad()
def misfit(module: Any, precision: Callable[[], Any], record: Recorder | None = None) -> str | None:
    """Why this module cannot be decoded here, with a recorder from recordings; None if it can, which two short prompts
    prove. Without gradient."""
    config = module.config
    if config.model_type not in KINDS:
        return f"{config.model_type} is not of Llama's shape"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        return f"its attention sees {window} tokens at a time"
    kind = module.base_model.rotary_emb.rope_type
    if kind in ("dynamic", "longrope"):
        return f"its positions ({kind}) depend on the length"
    steps = UNRECORDED + 2 if record else 1  # the last of them from a recording
    ids = torch.arange(5 + steps).remainder(config.vocab_size).tolist()
    stream = LeanStream(module, precision, record)
    stream.join([ids[:3], ids[:5]])
    for n in range(steps):
        mine = stream.next(torch.tensor([ids[3 + n], ids[5 + n]], device=module.device)).float()
    if record and not stream.recorder:
        return "its steps cannot be recorded"
    with precision():
        rows = [torch.tensor([ids[: n + steps]], device=module.device) for n in (3, 5)]
        theirs = torch.cat([module(row).logits[:, -1] for row in rows])
    tolerance = (1e-4 if theirs.dtype == torch.float32 else 5e-2) * max(1.0, float(theirs.abs().max()))
    gap = float((mine - theirs.float()).abs().max())
    return None if gap <= tolerance else f"its logits would differ by {gap:.1e}"


@dataclass(frozen=True)
class Layer:
    """One layer's weights as this call sees them; projections that read the same input are one."""

    before: Tensor
    """Weight of the norm before attention."""
    qkv: Product
    query_key: Tensor | None
    """[H + K, D] weights of the norms of queries and keys."""
    out: Product
    between: Tensor
    """Weight of the norm before the MLP."""
    gate_up: Product
    act: Callable[[Tensor], Tensor]
    down: Product


class LeanStream:
    """Sequences that are decoded side by side: `join` reads prompts, `next` a token of each, `keep` forgets the others.

    Args:
        module: a causal language model of one of `KINDS`.
        precision: enters the autocast of training; half precision is what the products are computed in.
        recorder: steps are done again from recordings of it, over all places of the cache, as long as it can.
    """

    def __init__(self, module: Any, precision: Callable[[], Any], recorder: Recorder | None = None) -> None:
        self.module, self.precision, config = module, precision, module.config
        self.recorder = recorder
        self.recorded: Recorded | None = None
        """A step of the sequences and the caches that there are."""
        with precision():
            on = torch.is_autocast_enabled(module.device.type)
            self.dtype = torch.get_autocast_dtype(module.device.type) if on else torch.float32
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.shift = config.rms_norm_eps, 1.0 if config.model_type == "gemma" else 0.0
        self.layers = [self.layer(each) for each in module.base_model.layers]
        self.head = joined([module.get_output_embeddings()], self.dtype)
        self.last = module.base_model.norm.weight + self.shift
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.place = torch.zeros(0, dtype=torch.long, device=module.device)
        """[B] how many tokens of each sequence have been read."""
        self.longest = 0

    def layer(self, part: Any) -> Layer:
        attention, mlp = part.self_attn, part.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            weights = [(attention.q_norm.weight, self.heads), (attention.k_norm.weight, self.groups)]
            norms = torch.cat([(weight + self.shift).expand(count, -1) for weight, count in weights])
        return Layer(
            before=part.input_layernorm.weight + self.shift,
            qkv=joined([attention.q_proj, attention.k_proj, attention.v_proj], self.dtype),
            query_key=norms,
            out=joined([attention.o_proj], self.dtype),
            between=part.post_attention_layernorm.weight + self.shift,
            gate_up=joined([mlp.gate_proj, mlp.up_proj], self.dtype),
            act=mlp.act_fn,
            down=joined([mlp.down_proj], self.dtype),
        )

    # --------------------------------------------------------------------------------------------------- sequences

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, equal ones once; logits [N, V] after each. Their sequences stand behind those that are here."""
        unique = {tuple(prompt): None for prompt in prompts}
        number = {prompt: n for n, prompt in enumerate(unique)}
        index = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=self.module.device)
        lengths = torch.tensor([len(prompt) for prompt in unique], device=self.module.device)
        longest, here = max(map(len, unique)), len(self.place)
        self.reserve(longest, here + len(prompts))
        logits, start, size = [], 0, max(1, READ // longest)
        for some in torch.arange(len(unique)).split(size):
            chunk = list(unique)[start : start + len(some)]
            start += len(chunk)
            found, cached = self.read(chunk, lengths[some])
            logits.append(found)
            to = (index >= int(some[0])) & (index <= int(some[-1]))
            rows, which = to.nonzero()[:, 0] + here, index[to] - int(some[0])
            for mine, new in zip([*self.keys, *self.values], cached, strict=True):
                mine[rows, :, : new.shape[2]] = new[which]
        self.place, self.recorded = torch.cat([self.place, lengths[index]]), None
        self.longest = max(self.longest, longest)
        return torch.cat(logits)[index]

    def next(self, tokens: Tensor) -> Tensor:
        """Read one token [B] of each sequence; logits [B, V] after it."""
        self.reserve(self.longest + 1, len(tokens))
        self.longest += 1
        logits = self.replayed(tokens) if self.recorder else None
        if logits is None:
            logits = self.step(tokens, self.place, places=self.longest)
        self.place = self.place + 1
        return logits

    def replayed(self, tokens: Tensor) -> Tensor | None:
        """The same from a recording. None, and no more of them in this stream, where it cannot be."""
        assert self.recorder is not None
        if self.recorded is None:
            step = partial(self.step, places=self.keys[0].shape[2])
            self.recorded = Recorded(step, self.recorder, tokens, self.place)
        try:
            return self.recorded(tokens, self.place)
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without recordings of its steps: {error}", stacklevel=2)
            self.recorder = self.recorded = None
            return None

    def step(self, tokens: Tensor, place: Tensor, places: int) -> Tensor:
        """Logits [B, V] after tokens [B] at place [B], which is written to the caches; attends to their first places.

        With the same number of places, neither shapes nor memory, but for tokens and place, differ from step to step.
        """
        size = len(tokens)
        span = torch.arange(places, device=tokens.device)
        bias = torch.zeros(size, 1, 1, places, dtype=self.dtype, device=tokens.device)
        bias.masked_fill_((span > place[:, None])[:, None, None], -torch.inf)
        rows = torch.arange(size, device=tokens.device)
        grouped = (size, self.groups, self.heads // self.groups, self.width)
        by_products = tokens.device.type == "cpu" and self.dtype == torch.float32
        scores = bias.expand(*grouped[:3], -1).flatten(0, 1) if by_products else bias

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.keys[number], self.values[number]
            keys[rows, :, place], values[rows, :, place] = key[:, 0], value[:, 0]
            keys, values = keys[:size, :, :places], values[:size, :, :places]
            query = query.reshape(grouped)
            if not by_products:
                return scaled_dot_product_attention(query, keys, values, attn_mask=bias)
            keys = keys.flatten(0, 1).transpose(1, 2)  # one query each: two products beat torch's kernel
            seen = torch.baddbmm(scores, query.flatten(0, 1), keys, alpha=self.width**-0.5).softmax(-1)
            return torch.bmm(seen, values.flatten(0, 1))

        hidden = self.run(tokens[:, None], place[:, None], attend)
        return self.head(hidden[:, 0].to(self.dtype))

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences alone, in this order."""
        self.place, self.recorded = self.place[rows], None
        self.longest = int(self.place.max()) if len(rows) else 0
        for caches in (self.keys, self.values):
            for number, cache in enumerate(caches):
                caches[number] = cache[rows]

    def reserve(self, places: int, rows: int) -> None:
        """Room in every cache for so many rows of so many places."""
        if not self.keys:
            empty = torch.empty(0, self.groups, 0, self.width, dtype=self.dtype, device=self.place.device)
            self.keys, self.values = ([empty] * len(self.layers) for _ in range(2))
        have = self.keys[0].shape
        if places <= have[2] and rows <= have[0]:
            return
        places, self.recorded = have[2] if places <= have[2] else places + GROWTH, None
        for caches in (self.keys, self.values):
            for number, old in enumerate(caches):
                caches[number] = old.new_zeros(max(rows, have[0]), self.groups, places, self.width)
                caches[number][: have[0], :, : have[2]] = old

    # ----------------------------------------------------------------------------------------------------- the model

    def read(self, prompts: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits [N, V] after each prompt, keys and then values [N, K, T, D] of each layer), padded on the right."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=lengths.device)
        keys, values = [], []

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            keys.append(key)
            values.append(value)
            seen = scaled_dot_product_attention(query.transpose(1, 2), key, value, is_causal=True, enable_gqa=True)
            return seen.transpose(1, 2)

        place = torch.arange(longest, device=tokens.device).expand(len(prompts), -1)
        hidden = self.run(tokens, place, attend)
        rows = torch.arange(len(prompts), device=tokens.device)
        return self.head(hidden[rows, lengths - 1].to(self.dtype)), [*keys, *values]

    def run(self, tokens: Tensor, place: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The backbone: tokens [N, T] -> normed hidden states [N, T, hidden].

        Args:
            attend: (number of the layer, queries [N, T, H, D], keys and values [N, T, K, D]) -> [N, T, H, D], or
                anything that holds the same numbers in the same order.
        """
        base, dtype = self.module.base_model, self.dtype
        with self.precision():
            hidden = base.embed_tokens(tokens)
            cos, sin = base.rotary_emb(hidden, position_ids=place)
            half = self.width // 2
            cos, sin = cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]
            for number, layer in enumerate(self.layers):
                normed = rms_norm(hidden, hidden.shape[-1:], layer.before, self.eps).to(dtype)
                parts = layer.qkv(normed).view(*tokens.shape, self.heads + 2 * self.groups, self.width)
                both, value = parts[:, :, : self.heads + self.groups], parts[:, :, self.heads + self.groups :]
                if layer.query_key is not None:
                    both = rms_norm(both.float(), (self.width,), None, self.eps) * layer.query_key
                both = torch.addcmul(both * cos, both.roll(half, -1), sin).to(dtype)
                seen = attend(number, both[:, :, : self.heads], both[:, :, self.heads :], value)
                hidden = hidden + layer.out(seen.reshape(*tokens.shape, self.heads * self.width))
                normed = rms_norm(hidden, hidden.shape[-1:], layer.between, self.eps).to(dtype)
                gate, up = layer.gate_up(normed).chunk(2, -1)
                hidden = hidden + layer.down(layer.act(gate) * up)
            return rms_norm(hidden, hidden.shape[-1:], self.last, self.eps)


def joined(parts: Sequence[Any], dtype: torch.dtype) -> Product:
    """Layers that read the same input as one: [N, in] -> [N, sum of out]. What is not plain is called as it is."""
    if not all(type(part) in PLAIN for part in parts):
        return (lambda x: parts[0](x)) if len(parts) == 1 else (lambda x: torch.cat([part(x) for part in parts], -1))
    weight = torch.cat([part.weight for part in parts]).to(dtype)
    given = [part.bias for part in parts]
    bias = None if given[0] is None else torch.cat(given).to(dtype)
    if suits(weight, weight):
        laid_out = packed(weight, PACKED_FOR)
        return lambda x: product(x, laid_out, bias)
    return lambda x: linear(x, weight, bias)
