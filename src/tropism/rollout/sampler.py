"""The local sampler: decodes with the trainer's own weights, so they are never stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tropism.maths.logp import entropy, log_softmax
from tropism.rollout.lean import LeanStream, misfit
from tropism.rollout.recorded import cuda_graph
from tropism.rollout.stream import Stream, WithCache
from tropism.types import Failure, SamplingParams, Stop, Turn


class Local:
    """A `Sampler` over any causal language model of transformers, with a KV cache.

    Log-probs, entropies and top-K are of softmax(logits / temperature) over the full vocabulary, which is also what
    tokens are drawn from. What a prompt draws depends on the seed and on its number alone (to rounding): not on which
    prompts finish earlier, nor on how many are decoded at once.

    Args:
        model: a causal language model; read in place.
        stop_ids: ids that end a reply.
        context: longest sequence that the model can read, in tokens.
        precision: enters the forward pass's autocast, the same one that training uses.
        rows: sequences decoded at once.
        lean: use the lean decoder where the model allows it.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        context: int,
        precision: Callable[[], AbstractContextManager[Any]],
        rows: int = 256,
        lean: bool = True,
    ) -> None:
        self.model, self.context, self.precision, self.rows, self.lean = model, context, precision, rows, lean
        self.stops = torch.tensor(sorted(stop_ids), device=model.device)

    @cached_property
    def misfit(self) -> str | None:
        """Why transformers decodes; None where the lean decoder does."""
        with torch.inference_mode():
            return misfit(self.model, self.precision) if self.lean else "the lean decoder is off"

    @cached_property
    def unrecorded(self) -> str | None:
        """Why the lean decoder's steps are not recorded; None where they are."""
        if self.model.device.type != "cuda":
            return "there is no GPU"
        with torch.inference_mode():
            return self.misfit or misfit(self.model, self.precision, cuda_graph)

    def stream(self) -> Stream:
        if self.misfit is None:
            return LeanStream(self.model, self.precision, cuda_graph if self.unrecorded is None else None)
        return WithCache(self.model, self.precision)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Turn | Failure]:
        generator = torch.Generator().manual_seed(params.seed)
        places = list(params.places or range(len(prompts)))
        noise = torch.rand(max(places, default=-1) + 1, params.max_tokens, generator=generator, dtype=torch.float64)
        noise = noise[places]
        turns: list[Turn | Failure] = [self.too_long(prompt) for prompt in prompts]
        fits = [n for n, prompt in enumerate(prompts) if len(prompt) < self.context]
        fits.sort(key=lambda n: len(prompts[n]))
        size = max(1, len(fits)) if self.misfit is None else self.rows
        for start in range(0, len(fits), size):
            some = fits[start : start + size]
            drawn = self.decode(self.stream(), [prompts[n] for n in some], noise[some], params)
            for n, turn in zip(some, drawn, strict=True):
                turns[n] = turn
        return turns

    def too_long(self, prompt: Sequence[int]) -> Failure:
        return Failure(
            "play",
            f"the prompt has {len(prompt)} tokens but the model reads at most {self.context}, so there is no room for "
            "a reply. Shorten the prompt or use a model with a longer context.",
        )

    def decode(self, stream: Stream, prompts: list[Sequence[int]], noise: Tensor, params: SamplingParams) -> list[Turn]:
        """One reply to each prompt. Once a quarter of the sequences have ended they leave, and others take over."""
        device = self.model.device
        room = torch.tensor([min(params.max_tokens, self.context - len(p)) for p in prompts], device=device)
        said = Said(len(prompts), int(room.max()), params.top_k, device)
        noise = noise.to("cpu" if device.type == "mps" else device)  # Metal has no float64
        rows, live = torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, dtype=torch.bool, device=device)
        step, logits, begun = rows, torch.empty(0, device=device), 0
        while True:
            if begun < len(prompts) and len(rows) <= self.rows * 3 // 4:
                new = torch.arange(begun, min(len(prompts), begun + self.rows - len(rows)), device=device)
                begun += len(new)
                joined = stream.join([prompts[n] for n in new.tolist()])
                logits = torch.cat([logits, joined]) if len(rows) else joined
                rows, step = torch.cat([rows, new]), torch.cat([step, torch.zeros_like(new)])
                live = torch.cat([live, torch.ones_like(new, dtype=torch.bool)])
            logp = log_softmax(logits, params.temperature or 1.0)
            p = logp.exp()
            at = noise[rows.to(noise.device), step.to(noise.device)]
            chosen = logp.argmax(-1) if params.temperature == 0 else draw(p, at)
            said.write(rows, torch.where(live, step, said.longest), live, chosen, logp, p)
            step = step + live
            live = live & ~torch.isin(chosen, self.stops) & (step < room[rows])
            step = step.clamp(max=said.longest - 1)  # only of what has ended
            alive = int(live.sum())
            if alive * 4 <= len(live) * 3:
                keep = live.nonzero()[:, 0]
                stream.keep(keep)
                rows, step, live, chosen = rows[keep], step[keep], live[keep], chosen[keep]
            if alive:
                logits = stream.next(chosen)
            elif begun == len(prompts):
                return said.turns(prompts, set(self.stops.tolist()))


class Said:
    """What was chosen so far: [N, longest reply + 1], read up to `length` of each row; the last place is for scraps."""

    def __init__(self, rows: int, longest: int, top_k: int, device: torch.device) -> None:
        self.longest = longest
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.action = torch.zeros(rows, longest + 1, dtype=torch.long, device=device)
        self.logp, self.entropy = (torch.zeros(rows, longest + 1, device=device) for _ in range(2))
        self.topk_ids = torch.zeros(rows, longest + 1, top_k, dtype=torch.long, device=device)
        self.topk_logp = torch.zeros(rows, longest + 1, top_k, device=device)

    def write(self, rows: Tensor, places: Tensor, live: Tensor, chosen: Tensor, logp: Tensor, p: Tensor) -> None:
        self.length[rows] += live
        self.action[rows, places] = chosen
        self.logp[rows, places] = logp.gather(-1, chosen[:, None])[:, 0]
        self.entropy[rows, places] = entropy(logp, p)
        if self.topk_ids.shape[-1]:
            top = logp.topk(self.topk_ids.shape[-1])
            self.topk_ids[rows, places], self.topk_logp[rows, places] = top.indices, top.values

    def turns(self, prompts: list[Sequence[int]], stops: set[int]) -> list[Turn]:
        top_k, lengths = self.topk_ids.shape[-1], self.length.tolist()
        columns = {"action": self.action, "logp": self.logp, "entropy": self.entropy}
        lists = {name: values.tolist() for name, values in columns.items()}
        wide = {"topk_ids": self.topk_ids, "topk_logp": self.topk_logp} if top_k else {}
        arrays = {name: values.cpu().numpy() for name, values in wide.items()}  # lists would be ten times as large
        turns = []
        for n, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            fields: dict[str, Any] = {name: tuple(values[n][:length]) for name, values in lists.items()}
            fields |= {name: values[n, :length] for name, values in arrays.items()}
            stop = Stop.finished if fields["action"][-1] in stops else Stop.truncated
            turns.append(Turn(context=tuple(prompt), stop=stop, **fields))
        return turns


def draw(p: Tensor, noise: Tensor) -> Tensor:
    """The token at which the cumulative distribution first exceeds `noise` in [0, 1): [N, V], [N] -> [N].

    Summed in float64, and where `noise` is.
    """
    cumulative = p.to(noise.device).cumsum(-1, dtype=torch.float64)
    aim = (noise * cumulative[:, -1])[:, None]
    chosen = torch.searchsorted(cumulative, aim, right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    return chosen.to(p.device)
