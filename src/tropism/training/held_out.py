"""Held-out rows of data: the loss and the metrics of a method, without learning from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tropism.config import Train
from tropism.maths.calibration import expected_calibration_error
from tropism.maths.reduce import chosen_minus_rejected
from tropism.signals.frozen import Forward, measure
from tropism.training.collate import collate
from tropism.training.model import Policy
from tropism.training.packed import micro_batches
from tropism.training.update import Metrics, inseparable
from tropism.types import Rollout


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Reads `rows` with the weights of the moment, as one batch."""

    rows: Sequence[tuple[Rollout, ...]]
    method: Any
    policy: Policy
    train: Train
    reference: Forward | None = None

    @torch.no_grad()
    def __call__(self, version: int) -> tuple[dict[str, float], list[Rollout]]:
        """(metrics named eval/…, no rollouts). Of pairs also how often the model is right where the chosen answer is
        the longer or the shorter one, and how far its probability of being right is from the truth."""
        read = [replace(one, group=n) for n, row in enumerate(self.rows) for one in row]
        batch = collate(read, codes={}, device=self.policy.device)
        forward = self.policy.measuring(1.0, self.train)
        batch = measure(
            batch,
            self.method.needs,
            policy=forward,
            exact=False,
            reference=self.reference,
            context=self.policy.context,
        )
        credit, weights = self.method.credit(batch), self.method.weights(batch)
        metrics, loss = Metrics(), 0.0
        margins: list[Tensor] = []
        longer: list[Tensor] = []
        for part in micro_batches(batch, self.train.micro_tokens, inseparable(batch), packed=self.policy.packs()):
            width = int(batch.length[part].max())
            piece = batch[part].narrow(width)
            out = self.policy.forward(piece)
            result = self.method.loss(out, piece, credit[part].narrow(width))
            loss += float((result.values * weights[part, :width]).sum())
            metrics.add({"entropy": out.entropy, **result.metrics}, piece.action_mask)
            if "rewards/margins" in result.metrics:
                value, where = result.metrics["rewards/margins"]
                tokens = piece.action_mask.sum(1).float()
                margins.append(value[where])
                longer.append(chosen_minus_rejected(tokens, piece.success, piece.group)[where.any(1)])
        numbers = {"loss": loss} | metrics.means()
        if margins:
            numbers |= of_pairs(torch.cat(margins), torch.cat(longer))
        return {f"eval/{name}": value for name, value in numbers.items()}, []


def of_pairs(margin: Tensor, longer: Tensor) -> dict[str, float]:
    """
    Args:
        margin: [P] chosen minus rejected; s(margin) is read as the probability that the chosen answer is preferred,
            which it is of a reward model and of DPO's sigmoid, and of other losses as far as their margin is one.
        longer: [P] by how many tokens the chosen answer is longer.
    """
    right, sure = margin > 0, torch.sigmoid(margin.abs())
    found = {"calibration": float(expected_calibration_error(sure, right))}
    for name, where in (("longer", longer > 0), ("equal", longer == 0), ("shorter", longer < 0)):
        if where.any():
            found[f"accuracy/{name}"] = float(right[where].float().mean())
    return found
