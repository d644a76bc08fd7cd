"""MOPD: one student, and for every domain of its tasks the model that is best at it as teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.reduce import sequence_mean, spread
from tropism.maths.surrogate import masked_weight
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class MOPD:
    """Multi-domain on-policy distillation. Yang et al. 2026 (Nemotron-Cascade 2), arXiv:2603.19220.

    Credit      log teacher - log student of the token that was sampled; the teacher is that of the task's domain alone
    Loss        -w credit log p: no clipping, for the batch is meant to be used once; w corrects for the sampler and
                drops tokens on which it is too far from the trainer; every episode counts the same, a dropped token
                counting in its length
    Needs       a teacher; one per domain with teacher.who: {domain: path}. A domain without one is an error
    Reduces to  opd with episodes counted alike, when there is one teacher, sampler and trainer are one and the batch is
                used once
    """

    ratio_low: float = 0.5
    """A token whose probability under the trainer over that under the sampler is below this is dropped."""
    ratio_high: float = 2.0
    """So is one above this; both bounds are kept."""
    teacher: Teacher = Teacher(who="frozen")
    """Whom to become: {math: PATH, chat: OTHER} is the point; frozen is the student as it started, for every domain."""

    def __post_init__(self) -> None:
        checked(self)
        if not 0 <= self.ratio_low < 1 < self.ratio_high:
            raise ConfigError(
                f"MOPD's ratio_low is {self.ratio_low} and ratio_high {self.ratio_high}, which drops tokens on which "
                "sampler and trainer agree. 1 must lie between them: use 0.5 and 2."
            )

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "teacher_logp", "has_teacher"})
        return Needs(measured=measured, sampling=frozenset({"rollouts"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(batch.teacher_logp - batch.proximal_logp)

    def weights(self, batch: Batch) -> Tensor:
        return sequence_mean(spread(batch.has_teacher, batch.action_mask), batch.episode)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        weight = masked_weight(batch.proximal_logp, batch.behavior_logp, low=self.ratio_low, high=self.ratio_high)
        dropped = (weight == 0).to(weight.dtype)
        metrics = {"sampling/importance_sampling_ratio/mean": weight, "sampling/dropped": dropped}
        return TokenLoss(-weight * credit.advantage * out.logp, metrics)
