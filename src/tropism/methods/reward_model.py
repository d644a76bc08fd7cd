"""A reward model: one number for an answer, such that the preferred ones have more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.maths import preference
from tropism.maths.reduce import answer_mean, chosen_minus_rejected, sum_by
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Bradley and Terry's model of preferences. Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 1.

    Credit      none; the loss is direct
    Loss        -log s(r_c - r_r - strength) + center (r_c + r_r)^2, r what a linear head says after the answer's last
                token; on the chosen answer's last token, mean over pairs
    Needs       pairs; of a column `margin`, if there is one, the strength of each preference
    Reduces to  logistic regression on the difference of features, where the backbone does not move

    Every pair is by itself: of several to one prompt, none waits for the others (there all pairs of a prompt are one
    element of a batch). A constant added to every score changes nothing, unless center holds their mean near 0.
    """

    center: float = 0.0
    """Weight of the squared sum of a pair's scores. Eisenstein et al. 2023, arXiv:2312.09244: 0.01."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong: scores then stay finite on data that a model can learn by heart."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        return Needs(live=frozenset({"last_value"}), data=frozenset({"pairs"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return answer_mean(batch.action_mask, batch.success)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        apart = chosen_minus_rejected(out.last_value - batch.reward, batch.success, batch.group)
        values = preference.sigmoid(apart, smoothing=self.label_smoothing)
        values = values + self.center * sum_by(out.last_value, batch.group) ** 2
        told = preference.watched(out.last_value, out.last_value, batch.success, batch.group, batch.action_mask)
        told = {name: value for name, value in told.items() if not name.startswith("logps/")}
        return TokenLoss(values[:, None].expand_as(out.logp), told)
