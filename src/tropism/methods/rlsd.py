"""RLSD: the reward decides up or down for the whole answer, the teacher how much of it each token gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.advantage import group_relative
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class RLSD:
    """Self-Distilled RLVR. Yang et al. 2026, arXiv:2604.03128, eq. 15.

    Credit      GRPO's advantage A, times 1 - l + l clip((q / p)^sign(A), 1 - clip_weight, 1 + clip_weight) at each
                token: q the teacher's probability, p the student's, l a share that falls to 0 over `decay` steps
    Loss        PPO's clipped surrogate; every token counts the same
    Needs       rewards that differ between siblings; a teacher that read the task's column `answer`
    Reduces to  GRPO with scale="sample_std" and average="token" where the teacher agrees with the student, with
                clip_weight 0, and from step `decay` on

    The sign is never the teacher's: where A < 0, tokens that it likes get less blame. Eq. 16 of the paper, which has no
    gradient as printed, is not what its code does and not what is done here. p is the policy that made the batch; the
    authors' code takes the one being updated, the same in a batch's first optimizer step.
    """

    teacher: Teacher = Teacher(who="synced", every=10, reads=("answer",))
    """Who teaches and what it reads."""
    share: float = 0.5
    """How much of the credit the teacher decides at the start: l at step 0."""
    decay: int = 50
    """Steps until that has fallen to 0, in a straight line; 0 keeps it."""
    clip_weight: float = 0.2
    """How far from 1 a token's weight may be."""
    negative_only: bool = False
    """Weigh only answers with a negative advantage, against correct ones getting shorter."""
    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.28
    """It may rise to 1 + clip_high."""
    dual_clip: float | None = 3.0
    """Largest ratio that counts where the advantage is negative."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)
        if not 0 <= self.share <= 1:
            raise ConfigError(f"RLSD's share is {self.share}, but it is a part of the credit: use 0.5, say.")

    @property
    def needs(self) -> Needs:
        return Needs(
            measured=frozenset({"proximal_logp", "teacher_logp"}), sampling=frozenset({"siblings"}), by_advantage=True
        )

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="sample_std")
        advantage = spread(advantage, batch.action_mask)
        evidence = batch.teacher_logp - batch.proximal_logp
        free = (advantage.sign() * evidence).exp()
        weight = free.clamp(1 - self.clip_weight, 1 + self.clip_weight)
        clipped = (weight != free)[batch.action_mask]
        if self.negative_only:
            weight = torch.where(advantage < 0, weight, 1.0)
        share = self.share * max(0.0, 1 - batch.step / self.decay) if self.decay else self.share
        told = {"teacher/clipped": float(clipped.double().mean())} if len(clipped) else {}
        return Credit(advantage * (1 + share * (weight - 1)), metrics=told)

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        loss, metrics = policy_loss(
            out.logp,
            batch.proximal_logp,
            batch.behavior_logp,
            credit.advantage,
            low=self.clip_low,
            high=self.clip_high,
            dual=self.dual_clip,
            limit=self.truncate,
        )
        return TokenLoss(loss, metrics)
