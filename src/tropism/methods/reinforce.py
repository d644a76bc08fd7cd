"""REINFORCE: the policy gradient itself, for any number of rollouts of a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropism.maths.advantage import leave_one_out
from tropism.maths.reduce import constant_mean, spread
from tropism.maths.surrogate import truncated_weight
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class REINFORCE:
    """REINFORCE. Williams 1992, Machine Learning 8, pages 229-256, doi:10.1007/BF00992696.

    Credit      an episode's reward minus the mean of all others in the batch, on every token it wrote
    Loss        -A log pi, summed over an episode; no ratio and no clipping, so use a batch once
    Needs       rollouts of its own; no siblings
    Reduces to  RLOO when the batch is one group; maximum likelihood when every reward is 1 and there is no baseline
    """

    baseline: Literal["none", "others"] = "others"
    """What a reward is compared with: nothing, or the mean reward of all other episodes in the batch. Neither depends
    on what the episode itself earned, so either gradient is unbiased; the second has less noise."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        return Needs(measured=frozenset({"proximal_logp"}), sampling=frozenset({"rollouts"}))

    def credit(self, batch: Batch) -> Credit:
        if self.baseline == "none":
            return Credit(spread(batch.reward, batch.action_mask))
        advantage = leave_one_out(batch.reward, torch.zeros_like(batch.group), batch.episode)
        return Credit(spread(advantage, batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        return constant_mean(batch.action_mask, batch.episode, longest=1)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        weight = truncated_weight(batch.proximal_logp, batch.behavior_logp, limit=self.truncate)
        loss = -credit.advantage * out.logp * weight
        return TokenLoss(loss, {"sampling/importance_sampling_ratio/mean": weight})
