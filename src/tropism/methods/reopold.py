"""REOPOLD: distillation that is not ruled by the tokens a teacher finds impossible."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.reduce import highest, spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class REOPOLD:
    """Relaxed on-policy distillation. Ko et al. 2026, arXiv:2603.11137.

    Credit      R = log teacher - log student of the token that was sampled, at least reward_floor
    Loss        minus ratio times credit; not the ratio is bounded but the reward. The mean over some tokens only: first
                those with R >= reward_floor; after `switch` those where the student is least certain, by a quantile of
                the mini-batch: every optimizer step keeps its share
    Needs       a teacher, proximal_entropy
    Reduces to  opd when reward_floor = -inf, keep = 1, switch = 0 and the batch is used once
    """

    reward_floor: float = -2.0
    """The least a token can earn, nats. A target with a share m of the student in it bounds the reward by
    log(m) / (1 - m): -2.56 for 0.1, -2.01 for 0.2, -1.72 for 0.3, -1.39 for 0.5."""
    keep: float = 0.2
    """Share of the batch's tokens, those of highest student entropy, that learn after the switch; ties are all kept."""
    switch: float = 0.5
    """Share of the run after which the second phase begins."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""
    teacher: Teacher = Teacher(who="frozen")
    """Whom to become. Another model's path is the point: frozen is the student as it started."""

    def __post_init__(self) -> None:
        checked(self)
        if self.reward_floor >= 0:
            raise ConfigError(
                f"REOPOLD's reward_floor is {self.reward_floor}, but then no token is ever discouraged. Use -2, say."
            )
        if not 0 < self.keep <= 1:
            raise ConfigError(f"REOPOLD's keep is {self.keep}, but it is a share of the tokens: above 0, at most 1.")
        if not 0 <= self.switch <= 1:
            raise ConfigError(f"REOPOLD's switch is {self.switch}, but it is a share of the run: use 0 to 1.")

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "proximal_entropy", "teacher_logp", "has_teacher"})
        return Needs(measured=measured, sampling=frozenset({"rollouts"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit((batch.teacher_logp - batch.proximal_logp).clamp(min=self.reward_floor))

    def weights(self, batch: Batch) -> Tensor:
        taught = spread(batch.has_teacher, batch.action_mask)
        if batch.step / batch.steps < self.switch:
            return token_mean(taught & (batch.teacher_logp - batch.proximal_logp >= self.reward_floor))
        return token_mean(highest(batch.proximal_entropy, taught, share=self.keep))

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        return TokenLoss(
            *policy_loss(
                out.logp,
                batch.proximal_logp,
                batch.behavior_logp,
                credit.advantage,
                low=math.inf,
                high=math.inf,
                limit=self.truncate,
            )
        )
