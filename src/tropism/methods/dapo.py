"""DAPO: GRPO that lets unlikely tokens rise further, counts every token alike and draws until siblings differ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class DAPO:
    """Decoupled Clip and Dynamic sAmpling Policy Optimization. Yu et al. 2025, arXiv:2503.14476.

    Credit      an episode's reward, centred and scaled among its siblings, on every token it wrote
    Loss        PPO's clipped surrogate, with more room above than below; every token counts the same
    Needs       groups whose rewards differ: those that agree are left out and others drawn (sampling.contrast_on)
    Reduces to  GRPO with average="token", clip_high=0.28 and no reference, on a batch that is already full

    Its fourth part, a price on replies that come near the token limit, is a reward: rewards: {…, soft_overlong: 1}.
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.28
    """It may rise to 1 + clip_high: a token of probability 0.01 to 0.0128, where 0.2 stops at 0.012."""
    eps: float = 1e-6
    """Added to a standard deviation."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        return Needs(
            measured=frozenset({"proximal_logp"}), sampling=frozenset({"siblings", "contrast"}), by_advantage=True
        )

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="std", eps=self.eps)
        return Credit(spread(advantage, batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask)

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
