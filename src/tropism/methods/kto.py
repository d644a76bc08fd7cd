"""KTO: answers that are good or bad by themselves, weighed as people weigh gains and losses; no pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths import preference
from tropism.maths.reduce import answer_mean, last_action
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Kahneman-Tversky optimization. Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.

    Credit      z, which answers are held against: the mean log p - log q of the batch's answers to each other's
                prompts, or 0 if that is less
    Loss        1 - s(beta (x - z)) for a desirable answer, 1 - s(beta (z - x)) for another, x = log p - log q of the
                answer, each times its weight; on the last token, mean over answers
    Needs       labels, and the model as it started, q
    Reduces to  half the mean weight where the policy is its reference

    z is a mean over a batch: batches below 16 answers make it noise.
    """

    beta: float = 0.1
    """How hard the reference pulls back."""
    desirable_weight: float = 1.0
    """Weight of a desirable answer. The paper keeps weight times number, desirable over other, between 1 and 4/3."""
    undesirable_weight: float = 1.0
    """Weight of any other."""

    def __post_init__(self) -> None:
        weights = self.desirable_weight, self.undesirable_weight
        if self.beta <= 0 or min(weights) < 0 or sum(weights) == 0:
            raise ConfigError(
                f"KTO's beta is {self.beta} and its weights {weights[0]} and {weights[1]}. Use a beta above 0, such as "
                "0.1, and weights of 0 or more, not both 0."
            )

    @property
    def needs(self) -> Needs:
        return Needs(measured=frozenset({"reference_logp", "mismatch"}), data=frozenset({"labels"}))

    def credit(self, batch: Batch) -> Credit:
        drift = batch.mismatch.mean().clamp(min=0)
        return Credit(drift * batch.action_mask, metrics={"kto/drift": float(drift)})

    def weights(self, batch: Batch) -> Tensor:
        return answer_mean(batch.action_mask, torch.ones_like(batch.success))

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        gain = ((out.logp - batch.reference_logp) * batch.action_mask).sum(1)
        values = preference.prospect(gain, credit.advantage.amax(1), batch.success, beta=self.beta)
        values = values * torch.where(batch.success, self.desirable_weight, self.undesirable_weight)
        end, reward = last_action(batch.action_mask), (self.beta * gain).detach()[:, None].expand_as(out.logp)
        told = {
            "rewards/desirable": (reward, end & batch.success[:, None]),
            "rewards/undesirable": (reward, end & ~batch.success[:, None]),
        }
        return TokenLoss(values[:, None].expand_as(out.logp), told)
