"""REINFORCE++: PPO without a critic; advantages are compared over the whole batch, not within a group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.divergence import k1, k2
from tropism.maths.reduce import spread, token_mean
from tropism.maths.returns import rewards_to_go, whiten
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class ReinforcePP:
    """REINFORCE++. Hu et al. 2025, arXiv:2501.03262.

    Credit      all reward that follows a token, less `kl` times k1 at each token, whitened over the batch's tokens
    Loss        PPO's clipped surrogate; every token counts the same
    Needs       rollouts of its own; siblings with `baseline`; reference_logp if kl > 0
    Reduces to  REINFORCE but for a factor, for replies of one length that earn at their end, used once, with kl=0;
                so with `baseline` to Dr. GRPO
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    baseline: bool = False
    """The paper's variant for reasoning: an episode's reward minus its siblings' mean on every token it wrote, then
    whitened; the divergence moves from the reward into the loss, as k2."""
    eps: float = 1e-8
    """Added to a standard deviation."""
    kl: float = 0.0
    """Weight of the divergence to the reference model."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        reference = frozenset({"reference_logp"} if self.kl > 0 else ())
        sampling = frozenset({"siblings" if self.baseline else "rollouts"})
        return Needs(measured=reference | {"proximal_logp"}, sampling=sampling)

    def credit(self, batch: Batch) -> Credit:
        mask, reward = batch.action_mask, batch.token_reward
        if self.baseline:
            advantage = spread(group_relative(batch.reward, batch.group, batch.episode, scale="none"), mask)
            return Credit(whiten(advantage, mask, eps=self.eps))
        if self.kl > 0:
            reward = reward - self.kl * k1(batch.proximal_logp, batch.reference_logp)
        return Credit(whiten(rewards_to_go(reward, mask, batch.episode, batch.turn, discount=1.0), mask, eps=self.eps))

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask)

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
        if self.baseline and self.kl > 0:
            divergence = k2(out.logp, batch.reference_logp)
            loss, metrics["kl"] = loss + self.kl * divergence, divergence.detach()
        return TokenLoss(loss, metrics)
