"""From credit to new weights: the one update of every method, online and offline.

The objective of an optimizer step is (values * weights).sum() over its mini-batch. Weights are asked once for the whole
mini-batch, over all ranks; micro-batches and ranks only split the sum, so no split changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tropism.training.packed import micro_batches
from tropism.training.ranks import Ranks
from tropism.types import Batch, Credit, Method, Output

Forward = Callable[[Batch], Output]


class Optimizer(Protocol):
    """What `update` asks of an optimizer; see optim.py."""

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    def step(self, rate: float) -> dict[str, float]: ...


@dataclass
class Metrics:
    """Sums over the tokens where a number applies, so that means never depend on how the batch was split."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor | tuple[Tensor, Tensor]], mask: Tensor) -> None:
        for name, given in values.items():
            value, where = given if isinstance(given, tuple) else (given, mask)
            self.totals[name] = self.totals.get(name, 0.0) + float(summed(value, where))
            self.counts[name] = self.counts.get(name, 0.0) + float(where.sum())

    def means(self) -> dict[str, float]:
        return {name: total / max(self.counts[name], 1.0) for name, total in self.totals.items()}


def summed(values: Tensor, mask: Tensor) -> Tensor:
    """[] sum over the mask in float64; on the CPU, for Metal has no float64."""
    return (values.detach().cpu().double() * mask.cpu()).sum()


def update(
    batch: Batch,
    credit: Credit,
    method: Method,
    forward: Forward,
    optimizer: Optimizer,
    rate: Callable[[int], float],
    *,
    epochs: int = 1,
    mini_batches: int = 1,
    micro_tokens: int = 2048,
    packed: bool = False,
    skip: bool = False,
    seed: int = 0,
    ranks: Ranks | None = None,
    among: Tensor | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Train on one rollout batch.

    Args:
        batch: this rank's rows.
        credit: this rank's rows of the credit of the whole batch.
        packed: whether `forward` packs rows, which `micro_tokens` then counts.
        skip: leave out of the forward pass what does not count, and what has no advantage where the method says that it
            has no gradient either; metrics of the loss are then means over what was not left out.
        rate: learning rate of the k-th optimizer step of this batch, k = 0 … epochs * mini_batches - 1.
        seed: decides which groups share a mini-batch. Siblings stay together: what they have in common, such as equal
            first tokens, then meets advantages that sum to zero, and its gradient cancels instead of becoming noise.

        among: group ids of the whole batch, where this is a share of it: mini-batches are those of one process.

    Returns:
        metrics: means over action tokens, `loss` and `skipped` per optimizer step.
        weights: [N, T] as asked in the last epoch, for the record.
    """
    ranks = ranks or Ranks()
    metrics, done, recorded = Metrics(), 0, torch.zeros_like(credit.advantage)
    losses: list[float] = []
    steps: list[dict[str, float]] = []
    unit = torch.arange(len(batch), device=batch.group.device) if method.needs.by_row else inseparable(batch)
    for epoch in range(epochs):
        for rows in mini_batch_rows(batch.group, mini_batches, seed + epoch, among):
            mini, mini_credit = batch[rows], credit[rows]
            whole, mine = ranks.gather(mini)
            weights = method.weights(whole)[mine][:, : mini.tokens.shape[1]]
            recorded[rows] = weights.to(recorded.dtype)
            loss = torch.zeros((), dtype=torch.float64)
            counts = weights != 0
            if method.needs.by_advantage:
                counts = counts & (mini_credit.advantage != 0)
            if skip:
                heard = deserving(mini, counts.any(1), unit[rows], optimizer, metrics)
            else:
                heard = torch.arange(len(mini), device=rows.device)
            for part in micro_batches(mini[heard], micro_tokens, unit[rows][heard], packed=packed):
                part = heard[part]
                width = int(mini.length[part].max())
                piece, piece_credit = mini[part].narrow(width), mini_credit[part].narrow(width)
                out = forward(piece)
                result = method.loss(out, piece, piece_credit)
                share = (result.values * weights[part, :width]).sum()
                share.backward()
                loss += share.detach().cpu().double()
                metrics.add({"entropy": out.entropy, **result.metrics}, piece.action_mask)
            losses.append(float(ranks.sum(loss)))
            ranks.sum_gradients(optimizer)
            steps.append(optimizer.step(rate(done)) if bool(ranks.sum(weights.abs().sum())) else skipped(optimizer))
            done += 1
    moved = [step for step in steps if "skipped" not in step]
    summary = {name: sum(step[name] for step in moved) / len(moved) for name in (moved[0] if moved else ())}
    summary |= {name: sum(step.get(name, 0.0) for step in steps) for name in ("skipped", "not_finite")}
    summary["loss"] = sum(losses) / len(losses)
    metrics.totals, metrics.counts = ranks.total(metrics.totals), ranks.total(metrics.counts)
    return metrics.means() | summary | {"updates": done - summary["skipped"]}, recorded


def deserving(mini: Batch, counts: Tensor, unit: Tensor, optimizer: Optimizer, metrics: Metrics) -> Tensor:
    """Rows of the units in which a row counts, or of a short one if none does, so that there are metrics. The rest
    leaves a gradient of 0, and the entropy that was measured of it."""
    heard = torch.isin(unit, unit[counts])
    if len(unit) and not heard.any():
        heard = unit == unit[mini.length.argmin()]
    if not heard.all():
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        if mini.proximal_entropy is not None:
            metrics.add({"entropy": mini.proximal_entropy[~heard]}, mini.action_mask[~heard])
    return heard.nonzero()[:, 0]


def skipped(optimizer: Optimizer) -> dict[str, float]:
    """No token counted. What the backward passes left is forgotten: 0 times infinity is not 0."""
    for parameter in optimizer.parameters:
        parameter.grad = None
    return {"skipped": 1.0}


def inseparable(batch: Batch) -> Tensor:
    """[N] ids of what no batch may part: the rows of an episode; offline, where a group is a pair, those of a group."""
    return batch.group if batch.behavior_logp is None else batch.episode


def mini_batch_rows(unit: Tensor, parts: int, seed: int, among: Tensor | None = None) -> Iterator[Tensor]:
    """Cut rows into `parts` mini-batches at random; rows of one unit stay together, and in their order."""
    names = (unit if among is None else among).unique()
    if parts == 1:
        yield torch.arange(len(unit), device=unit.device)
        return
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).to(unit.device)
    for chunk in order.tensor_split(parts):
        yield torch.isin(unit, names[chunk]).nonzero()[:, 0]
