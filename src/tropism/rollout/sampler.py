"""The local sampler: decodes with the trainer's own module, so its weights are never stale and never copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tropism.maths.logp import entropy, log_softmax
from tropism.types import Failure, SamplingParams, Stop, Turn


class Local:
    """A `Sampler` over any causal language model of transformers, with a KV cache.

    Log-probs, entropies and top-K are of softmax(logits / temperature) over the full vocabulary, which is also what
    tokens are drawn from. Rows that have ended leave the batch once they are half of it. What a prompt draws depends on
    the seed and on its place in the list alone (to rounding): not on which prompts finish earlier, nor on how the list
    is cut into batches.

    Args:
        model: a causal language model; read in place.
        stop_ids: ids that end a reply.
        context: longest sequence that the model can read, in tokens.
        precision: enters the forward pass's autocast, the same one that training uses.
        rows: prompts decoded at once.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        context: int,
        precision: Callable[[], AbstractContextManager[Any]],
        rows: int = 256,
    ) -> None:
        self.model, self.context, self.precision, self.rows = model, context, precision, rows
        self.stops = torch.tensor(sorted(stop_ids), device=model.device)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Turn | Failure]:
        generator = torch.Generator().manual_seed(params.seed)
        noise = torch.rand(len(prompts), params.max_tokens, generator=generator, dtype=torch.float64)
        turns: list[Turn | Failure] = [self.too_long(prompt) for prompt in prompts]
        fits = [n for n, prompt in enumerate(prompts) if len(prompt) < self.context]
        fits.sort(key=lambda n: len(prompts[n]))
        for start in range(0, len(fits), self.rows):
            chunk = fits[start : start + self.rows]
            drawn = self.decode([prompts[n] for n in chunk], noise[chunk], params)
            for n, turn in zip(chunk, drawn, strict=True):
                turns[n] = turn
        return turns

    def too_long(self, prompt: Sequence[int]) -> Failure:
        return Failure(
            "play",
            f"the prompt has {len(prompt)} tokens but the model reads at most {self.context}, so there is no room for "
            "a reply. Shorten the prompt or use a model with a longer context.",
        )

    def decode(self, prompts: list[Sequence[int]], noise: Tensor, params: SamplingParams) -> list[Turn]:
        """One reply to each prompt. Rows that have ended leave the batch once they are half of it."""
        device, width, n = self.model.device, max(len(prompt) for prompt in prompts), len(prompts)
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        room = torch.tensor([min(params.max_tokens, self.context - len(p)) for p in prompts], device=device)
        most = int(room.max())
        said = Said(n, most, params.top_k, device)
        rows, live = torch.arange(n, device=device), torch.ones(n, dtype=torch.bool, device=device)
        noise, cache = noise.to("cpu" if device.type == "mps" else device), None  # Metal has no float64
        for step in range(most):
            with self.precision():
                out = self.model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=place,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            cache, logp = out.past_key_values, log_softmax(out.logits[:, -1], params.temperature or 1.0)
            chosen = logp.argmax(-1) if params.temperature == 0 else draw(logp, noise[rows.to(noise.device), step])
            said.write(rows, step, live, chosen, logp)
            live = live & ~torch.isin(chosen, self.stops) & (step + 1 < room[rows])
            alive = int(live.sum())
            if alive == 0:
                break
            tokens, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            place = (place[:, -1:] + 1).clamp(max=self.context - 1)  # a row that has ended may stand at the limit
            if alive * 2 <= len(live):
                keep = live.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                tokens, place, mask, rows, live = tokens[keep], place[keep], mask[keep], rows[keep], live[keep]
        return said.turns(prompts, set(self.stops.tolist()))


class Said:
    """What was chosen so far: [N, longest reply], read up to `length` of each row."""

    def __init__(self, rows: int, longest: int, top_k: int, device: torch.device) -> None:
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.action = torch.zeros(rows, longest, dtype=torch.long, device=device)
        self.logp, self.entropy = (torch.zeros(rows, longest, device=device) for _ in range(2))
        self.topk_ids = torch.zeros(rows, longest, top_k, dtype=torch.long, device=device)
        self.topk_logp = torch.zeros(rows, longest, top_k, device=device)

    def write(self, rows: Tensor, step: int, live: Tensor, chosen: Tensor, logp: Tensor) -> None:
        self.length[rows] += live
        self.action[rows, step] = chosen
        self.logp[rows, step] = logp.gather(-1, chosen[:, None])[:, 0]
        self.entropy[rows, step] = entropy(logp)
        if self.topk_ids.shape[-1]:
            top = logp.topk(self.topk_ids.shape[-1])
            self.topk_ids[rows, step], self.topk_logp[rows, step] = top.indices, top.values

    def turns(self, prompts: list[Sequence[int]], stops: set[int]) -> list[Turn]:
        top_k, lengths = self.topk_ids.shape[-1], self.length.tolist()
        columns = {"action": self.action, "logp": self.logp, "entropy": self.entropy}
        if top_k:
            columns |= {"topk_ids": self.topk_ids, "topk_logp": self.topk_logp}
        lists = {name: values.tolist() for name, values in columns.items()}
        turns = []
        for n, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            fields: dict[str, Any] = {name: tuple(values[n][:length]) for name, values in lists.items()}
            stop = Stop.finished if fields["action"][-1] in stops else Stop.truncated
            turns.append(Turn(context=tuple(prompt), stop=stop, **fields))
        return turns


def draw(logp: Tensor, noise: Tensor) -> Tensor:
    """The token at which the cumulative distribution first exceeds `noise` in [0, 1): [N, V], [N] -> [N].

    In float64, and where `noise` is.
    """
    cumulative = logp.to(noise.device).double().exp().cumsum(-1)
    aim = (noise * cumulative[:, -1])[:, None]
    chosen = torch.searchsorted(cumulative, aim, right=True)[:, 0].clamp(max=logp.shape[-1] - 1)
    return chosen.to(logp.device)
