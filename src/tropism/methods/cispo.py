"""CISPO: GRPO that clips the importance weight and never a token's gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import cispo, policy_metrics, token_log_ratio, truncated_weight
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Clipped Importance Sampling Policy Optimization. MiniMax 2025, arXiv:2506.13585, eq. 4.

    Credit      an episode's reward, centred and scaled among its siblings, on every token it wrote
    Loss        -A log pi times the ratio, clipped and without gradient; every token counts the same
    Needs       rewards that differ between siblings
    Reduces to  REINFORCE with GRPO's advantage when the batch is used once

    The largest weight is 1 + clip_high, as in the paper. TRL's epsilon_high is that weight itself: its 5 is
    clip_high=4 here, and its default of 0.2 makes every weight at most 0.2.
    """

    clip_low: float = 1.0
    """A weight is at least 1 - clip_low; 1 leaves the lower side open, as the paper does."""
    clip_high: float = 4.0
    """A weight is at most 1 + clip_high; 5 is the most in ScaleRL (arXiv:2510.13786)."""
    eps: float = 1e-6
    """Added to a standard deviation."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        return Needs(measured=frozenset({"proximal_logp"}), sampling=frozenset({"siblings"}), by_advantage=True)

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="std", eps=self.eps)
        return Credit(spread(advantage, batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        log_ratio = token_log_ratio(out.logp, batch.proximal_logp)
        loss, clipped = cispo(out.logp, log_ratio, credit.advantage, low=self.clip_low, high=self.clip_high)
        weight = truncated_weight(batch.proximal_logp, batch.behavior_logp, limit=self.truncate)
        return TokenLoss(loss * weight, policy_metrics(log_ratio, clipped, weight))
