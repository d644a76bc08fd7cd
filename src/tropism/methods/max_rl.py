"""MaxRL: GRPO divided by the success rate, which climbs the logarithm of success instead of success."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class MaxRL:
    """Maximum Likelihood Reinforcement Learning. Tajwar et al. 2026, arXiv:2602.02710.

    Credit      an episode's reward minus its siblings' mean, divided by that mean; 0 in a group without success
    Loss        PPO's clipped surrogate; every token counts the same
    Needs       rewards of 0 and 1 that differ between siblings; a group of negative mean is left alone
    Reduces to  RLOO for groups of two with rewards of 0 and 1, used once: there the policy gradient is its first term

    With success rate p and groups of G the expected gradient is that of the first G - 1 terms of
    log p = -(1 - p) - (1 - p)^2 / 2 - (1 - p)^3 / 3 - ..., so a rare success counts up to 1 / p times as much.
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        return Needs(measured=frozenset({"proximal_logp"}), sampling=frozenset({"siblings"}), by_advantage=True)

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="mean")
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
