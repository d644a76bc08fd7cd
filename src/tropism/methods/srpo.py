"""SRPO: every answer goes one way. Failures with a correct sibling are distilled, all others are reinforced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.divergence import jensen_shannon
from tropism.maths.reduce import certainty, spread, token_mean
from tropism.maths.surrogate import importance_weight, policy_loss
from tropism.methods.checked import checked, compared
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SRPO:
    """Sample-Routed Policy Optimization. Li et al. 2026, arXiv:2604.02288.

    Credit      an episode's reward minus the mean of all its siblings, whichever way they go
    Loss        PPO's clipped surrogate; of failures with a teacher instead SDPO's divergence, each token weighted by
                exp(-caution H) over its mean, H the teacher's entropy; one mean over all tokens of the optimizer step
    Needs       rewards that differ between siblings; a teacher that read a correct sibling
    Reduces to  GRPO with scale="none" and average="token" where nobody has a teacher; SDPO with caution=0 where
                everybody failed and has one

    With rewards of 0 and 1 only successes have an advantage to reinforce, so none of it is negative: all that pushes
    down is distillation. Other rewards, or failures without a teacher beside a success, bring `advantage/least` below
    0. A failure among failures has no sibling to read, and neither way moves it.
    """

    teacher: Teacher = Teacher(who="ema", rate=0.05, reads=("sibling",), top_k=100)
    """Who teaches, what it reads, and on how many tokens the two are compared."""
    caution: float = 1.0
    """How fast a token of a failure counts less where the teacher is unsure, per nat; 0: all count the same."""
    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.28
    """It may rise to 1 + clip_high."""
    truncate: float = 2.0
    """Largest value of each importance weight."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        taught = frozenset({"has_teacher", "teacher_entropy", "topk_ids", "teacher_topk_logp"})
        live, sampling = frozenset({"topk_logp"}), frozenset({"siblings"})
        return Needs(measured=taught | {"proximal_logp"}, live=live, sampling=sampling)

    def distilled(self, batch: Batch) -> Tensor:
        """[N, T] bool: tokens of failures that have a teacher."""
        return batch.action_mask & (batch.has_teacher & ~batch.success)[:, None]

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="none")
        credit = spread(advantage, batch.action_mask)
        reinforced = credit[batch.action_mask & ~self.distilled(batch)]
        return Credit(credit, metrics={"advantage/least": float(reinforced.min())} if len(reinforced) else {})

    def weights(self, batch: Batch) -> Tensor:
        distilled = self.distilled(batch)
        sure = certainty(batch.teacher_entropy, distilled, caution=self.caution)
        return token_mean(batch.action_mask) * torch.where(distilled, sure, 1.0)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        loss, metrics = policy_loss(
            out.logp,
            batch.proximal_logp,
            batch.behavior_logp,
            credit.advantage,
            low=self.clip_low,
            high=self.clip_high,
            limit=self.truncate,
        )
        student, teacher = compared(out, batch, self.teacher)
        weight = importance_weight(out.logp, batch.proximal_logp, batch.behavior_logp, limit=self.truncate)
        distilled = self.distilled(batch)
        loss = torch.where(distilled, weight * jensen_shannon(student, teacher), loss)
        return TokenLoss(loss, metrics | {"distilled": distilled.to(loss.dtype)})
