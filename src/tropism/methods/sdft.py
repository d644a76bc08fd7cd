"""SDFT: the policy, shown a demonstration, teaches the policy that was not; demonstrations without being off-policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.maths.divergence import reverse_kl
from tropism.maths.reduce import token_mean
from tropism.maths.surrogate import importance_weight
from tropism.methods.checked import checked, compared
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SDFT:
    """Self-Distillation Fine-Tuning. Shenfeld et al. 2026, arXiv:2601.19897.

    Credit      none; the loss is direct, and no reward is read
    Loss        KL(student || teacher) over the vocabulary, at every token of the student's own answer, times the
                importance weights of a stale policy and of another sampler; every token counts the same
    Needs       tasks with a column `demonstration`, which the teacher reads
    Reduces to  SDPO with divergence="reverse" and a teacher that says the same

    From the paper: on-policy answers, reverse KL summed over the vocabulary, an EMA teacher. Its rate here, 0.01, is
    a public re-implementation's; the weights are SDPO's, and 1 where a batch is used once.
    """

    teacher: Teacher = Teacher(who="ema", rate=0.01, reads=("demonstration",), top_k="all")
    """Who teaches and what it reads, by default the task's column `demonstration`. With a large vocabulary compare on
    fewer tokens: top_k: 100."""
    truncate: float = 2.0
    """Largest value of each importance weight."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "has_teacher", "topk_ids", "teacher_topk_logp"})
        return Needs(measured=measured, live=frozenset({"topk_logp"}), sampling=frozenset({"rollouts"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask & batch.has_teacher[:, None])

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        student, teacher = compared(out, batch, self.teacher)
        divergence = reverse_kl(student, teacher)
        weight = importance_weight(out.logp, batch.proximal_logp, batch.behavior_logp, limit=self.truncate)
        return TokenLoss(weight * divergence, {"divergence": divergence.detach(), "importance": weight})
