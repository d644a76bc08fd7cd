"""RLOO: REINFORCE whose baseline is the siblings' mean, each episode's own reward left out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import leave_one_out
from tropism.maths.divergence import k1
from tropism.maths.reduce import constant_mean, spread, sum_by
from tropism.maths.surrogate import truncated_weight
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """REINFORCE Leave-One-Out. Ahmadian et al. 2024, arXiv:2402.14740.

    Credit      an episode's reward, less `kl` times its summed k1 to a frozen reference, minus its siblings' mean
    Loss        -A log pi, summed over an episode; no ratio and no clipping, so use a batch once
    Needs       rewards that differ between siblings; reference_logp if kl > 0
    Reduces to  REINFORCE when the batch is one group; G / (G - 1) times Dr. GRPO's gradient for groups of G

    TRL multiplies the ratios of all tokens of an answer and clips the product at 0.2. Its gradient is this one while
    nothing has moved; on an answer of 500 tokens a drift of 0.0004 per token is enough for it to be 0.
    """

    kl: float = 0.0
    """Weight of the divergence to the reference model in the reward."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "reference_logp"} if self.kl > 0 else {"proximal_logp"})
        return Needs(measured=measured, sampling=frozenset({"siblings"}), by_advantage=self.kl == 0)

    def credit(self, batch: Batch) -> Credit:
        reward = batch.reward
        if self.kl > 0:
            divergence = (k1(batch.proximal_logp, batch.reference_logp) * batch.action_mask).sum(1)
            reward = reward - self.kl * sum_by(divergence, batch.episode)
        return Credit(spread(leave_one_out(reward, batch.group, batch.episode), batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        return constant_mean(batch.action_mask, batch.episode, longest=1)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        weight = truncated_weight(batch.proximal_logp, batch.behavior_logp, limit=self.truncate)
        loss = -credit.advantage * out.logp * weight
        return TokenLoss(loss, {"sampling/importance_sampling_ratio/mean": weight})
