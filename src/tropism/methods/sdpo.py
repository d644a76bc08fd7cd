"""SDPO: the policy, told what it could not know while it answered, teaches the policy that had to answer without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.divergence import forward_kl, jensen_shannon, k1, reverse_kl
from tropism.maths.reduce import token_mean
from tropism.maths.surrogate import importance_weight
from tropism.methods.checked import checked, compared
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss

DIVERGENCES = {"jensen_shannon": jensen_shannon, "reverse": reverse_kl, "forward": forward_kl}


@dataclass(frozen=True, kw_only=True)
class SDPO:
    """Self-Distillation Policy Optimization. Hübotter et al. 2026, arXiv:2601.20802.

    Credit      none; the loss is direct, and a reward only says which siblings are correct
    Loss        divergence of student and teacher on the student's likeliest tokens, times the importance weights of a
                stale policy and of another sampler; every token of a row with a teacher counts the same
    Needs       a teacher that read more: a correct sibling, else feedback; rows without either are masked
    Reduces to  REINFORCE with credit log q - log p when top_k is 0 and the batch is used once

    The defaults are between the paper's two settings (jensen_shannon on 100 tokens, reverse on 20). Four differences to
    the authors' code: it averages each sequence first and counts masked rows, as zeros, so its step shrinks with their
    number (here they are not counted); it compares on the likeliest tokens of the policy being updated (here of the one
    that made the batch, the same in a batch's first optimizer step); it drops what a sibling thought between <think>
    and </think> (here a sibling is read whole); and it shuffles the siblings first (here all of a group read its first
    success, and that one the next).
    """

    teacher: Teacher = Teacher(who="ema", rate=0.05, reads=("sibling", "feedback"), need="first", top_k=20)
    """Who teaches, what it reads, and on how many tokens the two are compared."""
    divergence: Literal["jensen_shannon", "reverse", "forward"] = "jensen_shannon"
    """reverse is KL(student || teacher), mode seeking; forward is KL(teacher || student); jensen_shannon both, against
    their mean, and at most log 2. With top_k 0, on the sampled token, only reverse has an estimate."""
    truncate: float = 2.0
    """Largest value of each importance weight."""

    def __post_init__(self) -> None:
        checked(self)
        if not self.teacher.top_k and self.divergence != "reverse":
            raise ConfigError(
                f"SDPO's divergence is {self.divergence}, but teacher.top_k is 0: from the sampled token alone only "
                "reverse can be learned. Use divergence: reverse, or top_k: 20."
            )

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "has_teacher"})
        if not self.teacher.top_k:
            return Needs(measured=measured | {"teacher_logp"})
        measured |= {"topk_ids", "teacher_topk_logp"}
        return Needs(measured=measured, live=frozenset({"topk_logp"}), sampling=frozenset({"rollouts"}))

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask & batch.has_teacher[:, None])

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        if self.teacher.top_k:
            student, teacher = compared(out, batch, self.teacher)
            divergence = DIVERGENCES[self.divergence](student, teacher)
        else:  # in expectation its gradient is that of reverse KL; its value means nothing and may be negative
            divergence = k1(out.logp, batch.teacher_logp).detach() * out.logp
        weight = importance_weight(out.logp, batch.proximal_logp, batch.behavior_logp, limit=self.truncate)
        return TokenLoss(weight * divergence, {"divergence": divergence.detach(), "importance": weight})
