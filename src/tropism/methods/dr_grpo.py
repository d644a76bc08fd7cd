"""Dr. GRPO: GRPO without its two biases, towards easy and hard questions and towards long wrong answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.reduce import constant_mean, spread
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class DrGRPO:
    """GRPO Done Right. Liu et al. 2025, arXiv:2503.20783.

    Credit      an episode's reward minus its siblings' mean; not divided by anything
    Loss        PPO's clipped surrogate, summed over an episode and divided by a constant
    Needs       rewards that differ between siblings
    Reduces to  (G - 1) / G times RLOO's gradient for groups of G, when the batch is used once
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    longest: int = 256
    """The constant, in tokens; sampling.max_tokens is usual. It scales every gradient alike, which AdamW does not see
    and gradient clipping does."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        return Needs(measured=frozenset({"proximal_logp"}), sampling=frozenset({"siblings"}), by_advantage=True)

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="none")
        return Credit(spread(advantage, batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        return constant_mean(batch.action_mask, batch.episode, longest=self.longest)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        return TokenLoss(
            *policy_loss(
                out.logp,
                batch.proximal_logp,
                batch.behavior_logp,
                credit.advantage,
                low=self.clip_low,
                high=self.clip_high,
                limit=self.truncate,
            )
        )
