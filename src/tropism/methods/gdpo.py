"""GDPO: GRPO for rewards of several parts, each held against the siblings by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.maths.advantage import Scale, group_relative
from tropism.maths.reduce import sequence_mean, spread
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GDPO:
    """Group reward-decoupled normalization. Liu et al. 2026, arXiv:2601.05242.

    Credit      sum_k w_k A_k, A_k GRPO's advantage of part k of the reward alone; brought to mean 0 and standard
                deviation 1 over the batch's episodes
    Loss        PPO's clipped surrogate; every episode counts the same
    Needs       what each part gave
    Reduces to  GRPO with one part, times one number per batch

    A sum of two parts tells (1, 0) from (0, 1) only by their weights, and a part of small spread drowns in another's.
    Here every part that differs between siblings counts by its weight. A part that does not apply to a rollout says
    nothing about it, and compares the others without it.
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    scale: Scale = "std"
    """What each part, centred among siblings, is divided by: none, std, sample_std, batch_std or mean."""
    eps: float = 1e-6
    """Added to a standard deviation."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        return Needs(
            measured=frozenset({"proximal_logp", "parts"}), sampling=frozenset({"siblings"}), by_advantage=True
        )

    def credit(self, batch: Batch) -> Credit:
        total, size = torch.zeros_like(batch.reward), torch.zeros_like(batch.reward)
        for k, weight in enumerate(batch.weighted.values()):
            there = batch.parts[:, k].isfinite()
            told = batch.parts[there, k], batch.group[there], batch.episode[there]
            mine = weight * group_relative(*told, scale=self.scale, eps=self.eps)
            total[there], size[there] = total[there] + mine, size[there] + mine.abs()
        total = total.masked_fill(
            total.abs() < 1e-5 * size, 0
        )  # parts that cancel leave rounding, which would be scaled up
        everyone = torch.zeros_like(batch.group), batch.episode
        return Credit(spread(group_relative(total, *everyone, scale="batch_std", eps=self.eps), batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        return sequence_mean(batch.action_mask, batch.episode)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        loss, metrics = policy_loss(
            out.logp,
            batch.proximal_logp,
            batch.behavior_logp,
            credit.advantage,
            low=self.clip_low,
            high=self.clip_high,
            limit=self.truncate,
        )
        return TokenLoss(loss, metrics)
