"""SDPG: GRPO, and beside it a pull towards what the policy would say if it knew the answer, over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.maths.advantage import group_relative
from tropism.maths.divergence import k2, reverse_kl
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked, compared
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class SDPG:
    """Self-Distilled Policy Gradient. Liu et al. 2026, arXiv:2606.04036.

    Credit      an episode's reward, centred and scaled among its siblings, on every token it wrote
    Loss        PPO's clipped surrogate, plus `distill` times KL(student || teacher) over the vocabulary, plus `kl`
                times k2 to a frozen reference; every token counts the same
    Needs       rewards that differ between siblings; a teacher that read the task's column `answer`; reference_logp
                if kl > 0
    Reduces to  GRPO with scale="sample_std" and average="token" when distill=0 and kl=0

    The authors' code caps the divergence of a token at 20 nats; here it is not capped.
    """

    teacher: Teacher = Teacher(who="live", reads=("answer",), top_k="all")
    """Who teaches and what it reads. With a large vocabulary compare on fewer tokens: top_k: 100."""
    distill: float = 0.001
    """Weight of the divergence to the teacher."""
    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.28
    """It may rise to 1 + clip_high."""
    dual_clip: float | None = 10.0
    """Largest ratio that counts where the advantage is negative."""
    kl: float = 0.001
    """Weight of the divergence to the reference model in the loss."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)

    @property
    def needs(self) -> Needs:
        reference = frozenset({"reference_logp"} if self.kl > 0 else ())
        measured = reference | {"proximal_logp", "has_teacher", "topk_ids", "teacher_topk_logp"}
        return Needs(measured=measured, live=frozenset({"topk_logp"}), sampling=frozenset({"siblings"}))

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="sample_std")
        return Credit(spread(advantage, batch.action_mask))

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
        student, teacher = compared(out, batch, self.teacher)
        divergence = reverse_kl(student, teacher) * batch.has_teacher[:, None]
        loss, metrics["divergence"] = loss + self.distill * divergence, divergence.detach()
        if self.kl > 0:
            divergence = k2(out.logp, batch.reference_logp)
            loss, metrics["kl"] = loss + self.kl * divergence, divergence.detach()
        return TokenLoss(loss, metrics)
