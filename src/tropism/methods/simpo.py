"""SimPO: DPO without a reference, by the mean log-probability of a token, with a gap to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths import preference
from tropism.maths.reduce import answer_mean, chosen_minus_rejected
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SimPO:
    """Simple preference optimization. Meng et al. 2024, arXiv:2405.14734, eq. 6.

    Credit      none; the loss is direct
    Loss        -log s(beta (mean log p of the chosen answer's tokens - that of the rejected one) - gap); a pair's loss
                stands on the last token of its chosen answer, and every pair counts the same
    Needs       pairs
    Reduces to  DPO with gap 0 where the reference is uniform and answers are equally long, beta there being beta / n

    Nothing holds the policy near its start but the learning rate: use a small one.
    """

    beta: float = 2.5
    """Slope of the reward in the mean log-probability."""
    gap: float = 1.375
    """By how much the chosen answer should win; gamma in the paper, where gap / beta is about 0.55."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong."""

    def __post_init__(self) -> None:
        checked(self)
        if self.beta <= 0:
            raise ConfigError(f"SimPO's beta is {self.beta}, but must be above 0: use 2.5, say.")
        if self.gap < 0:
            raise ConfigError(f"SimPO's gap is {self.gap}, but a chosen answer should not lose: use 0, or more.")

    @property
    def needs(self) -> Needs:
        return Needs(data=frozenset({"pairs"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return answer_mean(batch.action_mask, batch.success)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        logp = (out.logp * batch.action_mask).sum(1)
        reward = self.beta * logp / batch.action_mask.sum(1)
        apart = chosen_minus_rejected(reward, batch.success, batch.group) - self.gap
        values = preference.sigmoid(apart, smoothing=self.label_smoothing)
        told = preference.watched(reward, logp, batch.success, batch.group, batch.action_mask)
        return TokenLoss(values[:, None].expand_as(out.logp), told)
