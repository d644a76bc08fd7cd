"""Supervised fine-tuning: GRPO's opposite end, where the data has already decided what every token deserves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.maths.reduce import token_mean
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning: maximum likelihood of every token that was written.

    Credit      none; the loss is direct
    Loss        -log p of every action token; every token counts the same
    Needs       nothing
    Reduces to  REINFORCE with advantage 1 on data, averaged over tokens
    """

    @property
    def needs(self) -> Needs:
        return Needs()

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        return TokenLoss(-out.logp)
