"""DPO and its nearest kin: pairs teach the policy directly, without a reward model and without sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths import preference
from tropism.maths.reduce import answer_mean, chosen_minus_rejected
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Direct preference optimization. Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

    Credit      none; the loss is direct
    Loss        -log s(m), m = beta times what chosen and rejected answer differ by in log p - log q; a pair's loss
                stands on the last token of its chosen answer, and every pair counts the same
    Needs       pairs, and the model as it started, q
    Reduces to  log 2 where the policy is its reference, whatever beta (of sigmoid and robust); with smoothing 0 robust
                is sigmoid; simpo with gap 0 where the reference is uniform and answers are equally long

    TRL 1.16 ignores label_smoothing in its sigmoid loss; here smoothing does in both what it says.

    The best policy under Bradley and Terry's model is q exp(reward / beta), normalised: that of RL with beta KL.
    """

    beta: float = 0.1
    """How hard the reference pulls back: the smaller, the farther the policy goes for the same margin."""
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """robust: unbiased where labels are flipped; hinge: no gradient beyond margin 1; ipo: towards a difference of
    1 / (2 beta) in the mean log-ratio of a token, and no further."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong, for sigmoid (cDPO) and robust."""

    def __post_init__(self) -> None:
        checked(self)
        if self.beta <= 0:
            raise ConfigError(f"DPO's beta is {self.beta}, but must be above 0: use 0.1, say.")
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ConfigError(
                f"DPO's label_smoothing is {self.label_smoothing}, but {self.loss_type} has none. Use sigmoid, robust."
            )

    @property
    def needs(self) -> Needs:
        return Needs(measured=frozenset({"reference_logp"}), data=frozenset({"pairs"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return answer_mean(batch.action_mask, batch.success)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        logp = (out.logp * batch.action_mask).sum(1)
        gain = logp - (batch.reference_logp * batch.action_mask).sum(1)
        if self.loss_type == "ipo":
            apart = chosen_minus_rejected(gain / batch.action_mask.sum(1), batch.success, batch.group)
            values = preference.squared(apart, target=1 / (2 * self.beta))
        else:
            apart = self.beta * chosen_minus_rejected(gain, batch.success, batch.group)
            values = {
                "sigmoid": lambda: preference.sigmoid(apart, smoothing=self.label_smoothing),
                "robust": lambda: preference.robust(apart, flipped=self.label_smoothing),
                "hinge": lambda: preference.hinge(apart),
            }[self.loss_type]()
        told = preference.watched(self.beta * gain, logp, batch.success, batch.group, batch.action_mask)
        return TokenLoss(values[:, None].expand_as(out.logp), told)
