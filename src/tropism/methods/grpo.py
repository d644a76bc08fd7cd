"""GRPO: every other file in this folder is explained by how it differs; `tropism diff METHOD` prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tropism.maths.advantage import Scale, group_relative
from tropism.maths.divergence import k3
from tropism.maths.reduce import sequence_mean, spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group Relative Policy Optimization. Shao et al. 2024, arXiv:2402.03300.

    Credit      an episode's reward, centred and scaled among its siblings, on every token it wrote
    Loss        PPO's clipped surrogate, plus `kl` times k3 to a frozen reference; every episode counts the same
    Needs       rewards that differ between siblings; reference_logp if kl > 0
    Reduces to  REINFORCE with a group baseline when scale="none" and the batch is used once

    TRL 1.16 has three defaults that are not this: tokens of all groups count the same (loss_type="dapo"), k3 is
    weighted by the ratio (use_bias_correction_kl), and a group's spread is that of a sample plus 1e-4.
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative; 3 is usual."""
    scale: Scale = "std"
    """What centred rewards are divided by: none, std, sample_std, batch_std or mean."""
    eps: float = 1e-6
    """Added to a standard deviation."""
    kl: float = 0.0
    """Weight of the divergence to the reference model in the loss."""
    average: Literal["sequence", "token"] = "sequence"
    """What counts the same: every episode, or every token."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "reference_logp"} if self.kl > 0 else {"proximal_logp"})
        return Needs(measured=measured, sampling=frozenset({"siblings"}), by_advantage=self.kl == 0)

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale=self.scale, eps=self.eps)
        return Credit(spread(advantage, batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        if self.average == "token":
            return token_mean(batch.action_mask)
        return sequence_mean(batch.action_mask, batch.episode)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        loss, metrics = policy_loss(
            out.logp,
            batch.proximal_logp,
            batch.behavior_logp,
            credit.advantage,
            low=self.clip_low,
            high=self.clip_high,
            dual=self.dual_clip,
            limit=self.truncate,
        )
        if self.kl > 0:
            divergence = k3(out.logp, batch.reference_logp)
            loss, metrics["kl"] = loss + self.kl * divergence, divergence.detach()
        return TokenLoss(loss, metrics)
