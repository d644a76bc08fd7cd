"""GSPO: GRPO with one ratio per answer, since one reward is given per answer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.reduce import sequence_mean, spread
from tropism.maths.surrogate import clipped_surrogate, policy_metrics, sequence_log_ratio
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """Group Sequence Policy Optimization. Zheng et al. 2025, arXiv:2507.18071.

    Credit      an episode's reward, centred and scaled among its siblings, on every token it wrote
    Loss        PPO's clipped surrogate of the geometric mean of an episode's ratios; every episode counts the same
    Needs       rewards that differ between siblings
    Reduces to  GRPO when the batch is used once, and for episodes of one token with GRPO's clipping

    TRL 1.16 with importance_sampling_level="sequence" and no more lets tokens, not episodes, count the same.

    An episode is clipped as a whole. The weight for a sampler that is not the trainer is a geometric mean, too.
    """

    clip_low: float = 3e-4
    """The ratio to the policy that made the batch may fall to 1 - clip_low before an episode stops learning."""
    clip_high: float = 4e-4
    """It may rise to 1 + clip_high. Both are small because a mean over tokens moves little."""
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
        return sequence_mean(batch.action_mask, batch.episode)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        mask, proximal = batch.action_mask, batch.proximal_logp
        log_ratio = sequence_log_ratio(out.logp, proximal, mask, batch.episode)
        loss, clipped = clipped_surrogate(log_ratio, credit.advantage, low=self.clip_low, high=self.clip_high)
        weight = sequence_log_ratio(proximal, batch.behavior_logp, mask, batch.episode).exp().clamp(max=self.truncate)
        return TokenLoss(loss * weight, policy_metrics(log_ratio, clipped, weight))
