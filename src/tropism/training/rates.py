"""How many tokens a second a policy learns from, by the size of its micro-batches: measured on a stage's own rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tropism.config import Recipe, Stage
from tropism.record import Run, Watcher
from tropism.training.model import Policy
from tropism.training.packed import micro_batches
from tropism.training.ranks import Ranks
from tropism.training.workload import Work, counted, spared
from tropism.types import Batch

SIZES = (512, 1024, 2048, 4096, 8192)
"""Tokens of a micro-batch, where the recipe leaves it open."""
NEAR = 0.03
"""Of sizes whose rates differ by no more than this share, the smallest is taken: it needs the least memory."""


def heat_of(stage: Stage) -> float:
    return stage.sampling.temperature if stage.env else 1.0


def learning(policy: Policy, heat: float) -> Callable[[Batch], None]:
    """One forward and backward pass; gradients are left on the weights."""

    def work(piece: Batch) -> None:
        out = policy.forward(piece, heat)
        (out.logp * piece.action_mask).sum().backward()

    return work


def pieces(policy: Policy, work: Work, micro_tokens: int) -> list[Batch]:
    parts = micro_batches(work.batch, micro_tokens, packed=policy.packs())
    return [work.batch[part].narrow(int(work.batch.length[part].max())) for part in parts]


def rate(work: Callable[[Batch], None], pieces: Sequence[Batch], seconds: float) -> float:
    """Tokens a second, in turn over the pieces, after one that does not count."""
    tokens = [spared(piece) for piece in pieces]
    work(pieces[0])
    done, count, began = 0, 0, time.perf_counter()
    while count == 0 or (time.perf_counter() - began < seconds and count < 4 * len(pieces)):
        work(pieces[count % len(pieces)])
        done, count = done + tokens[count % len(pieces)], count + 1
        settled(pieces[0].tokens.device)
    return done / (time.perf_counter() - began)


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quickest(recipe: Recipe, stage: Stage, policy: Policy, folder: Path, seconds: float = 0.4) -> tuple[int, str]:
    """(the size of micro-batches with which a stage learns fastest on this machine, a line that says so). Weights stay
    as they were. A size for which memory does not suffice ends the search.

    Args:
        folder: the run's.
        seconds: for each size.
    """
    work, found = counted(recipe, stage, policy, folder), dict[int, float]()
    for size in SIZES:
        try:
            found[size] = rate(learning(policy, heat_of(stage)), pieces(policy, work, size), seconds)
        except torch.OutOfMemoryError:
            if not found:
                raise
            break
        finally:
            for parameter in policy.module.parameters():
                parameter.grad = None
        if len(pieces(policy, work, size)) == 1:  # what is measured fills no larger one
            break
    best = smallest(found)
    told = ", ".join(f"{size}: {rate:,.0f}" for size, rate in found.items())
    return best, f"micro-batches: of {best} tokens (tokens a second by size, {told})"


def smallest(found: dict[int, float]) -> int:
    """The smallest size whose rate is near the highest."""
    return min(size for size, rate in found.items() if rate >= (1 - NEAR) * max(found.values()))


def sized(recipe: Recipe, stage: Stage, policy: Policy, path: Path, watcher: Watcher) -> Stage:
    """With the size of micro-batches that is fastest here, where the recipe leaves it open; a resumed run keeps its."""
    if stage.train.micro_tokens:
        return stage

    def found() -> int:
        if known := Run(path).notes().get("micro_tokens"):
            return int(known["tokens"])
        tokens, line = quickest(recipe, stage, policy, path.parent)
        watcher.say(line)
        return tokens

    return replace(stage, train=replace(stage.train, micro_tokens=Ranks().agree(found)))
