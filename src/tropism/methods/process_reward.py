"""Process and outcome reward models: is this step right, and is this going to be?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tropism.maths.reduce import last_action, token_mean
from tropism.maths.returns import turn_sum
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class ProcessReward:
    """A probability for every step. Lightman et al. 2023, arXiv:2305.20050, sec. 2.6; of whole answers Cobbe et al.
    2021, arXiv:2110.14168, sec. 4.

    Credit      none; a token's target is the label of its step
    Loss        binary cross-entropy of s(r), r what a linear head says after a step's last token (per: step), or after
                each of its tokens (per: token); mean over these
    Needs       steps: answers of one or more steps with a label each
    Reduces to  logistic regression on features, where the backbone does not move

    An outcome reward model is one whose answers are a single step, with per: token.
    """

    per: Literal["step", "token"] = "step"
    """Where the label must be known: once the step is over, or all along it."""

    @property
    def needs(self) -> Needs:
        return Needs(live=frozenset({"value", "last_value"}), data=frozenset({"steps"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(turn_sum(batch.token_reward, batch.turn))

    def judged(self, batch: Batch) -> Tensor:
        """[N, T] bool: the tokens after which the head is asked."""
        following = batch.turn.roll(-1, 1)
        if self.per == "token":
            within = batch.action_mask & (following >= 0)
        else:
            within = batch.action_mask & (following > batch.turn)
        return within | last_action(batch.action_mask)

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(self.judged(batch))

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        end, where = last_action(batch.action_mask), self.judged(batch)
        after = torch.where(end, out.last_value[:, None], out.value.roll(-1, 1))
        values = (softplus(after) - credit.advantage * after) * where
        right = ((after > 0) == (credit.advantage > 0.5)).to(values.dtype)
        good = where & (credit.advantage > 0.5)
        told = {"accuracy": (right, where), "accuracy/right": (right, good), "accuracy/wrong": (right, where & ~good)}
        return TokenLoss(values, told)
