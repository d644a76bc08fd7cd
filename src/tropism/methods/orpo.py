"""ORPO: SFT on the chosen answer, and its odds against the rejected one, in one stage and without a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths import preference
from tropism.maths.reduce import answer_mean, chosen_minus_rejected
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class ORPO:
    """Odds ratio preference optimization. Hong et al. 2024, arXiv:2403.07691, eq. 6.

    Credit      none; the loss is direct
    Loss        - mean log p of the chosen answer's tokens + beta (-log s(log-odds apart)), odds p / (1 - p) of the
                geometric mean p of an answer's token probabilities; on the chosen answer's last token, mean over pairs
    Needs       pairs
    Reduces to  SFT on the chosen answers with beta 0, every answer counting the same

    TRL 1.16 has the prompt's tokens in the first term; here an answer's alone, as in the paper.
    """

    beta: float = 0.1
    """Weight of the odds; lambda in the paper."""

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ConfigError(f"ORPO's beta is {self.beta}, which would prefer the rejected answer. Use 0.1, say.")

    @property
    def needs(self) -> Needs:
        return Needs(data=frozenset({"pairs"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return answer_mean(batch.action_mask, batch.success)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        logp = (out.logp * batch.action_mask).sum(1)
        mean = logp / batch.action_mask.sum(1)
        apart = chosen_minus_rejected(preference.log_odds(mean), batch.success, batch.group)
        values = -mean + self.beta * preference.sigmoid(apart)
        told = preference.watched(self.beta * mean, logp, batch.success, batch.group, batch.action_mask)
        return TokenLoss(values[:, None].expand_as(out.logp), told)
