"""G-OPD: distillation as reinforcement learning whose reward, what the teacher has learned, may be scaled past 1."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GOPD:
    """Generalized on-policy distillation; ExOPD where it extrapolates. Yang et al. 2026, arXiv:2602.12125.

        A_t = (log teacher - log student) + (reward_scaling - 1) (log teacher - log reference)

    Eq. 14 prints the negative, for descent. The policy at which the expected gradient vanishes is, state by state,
    proportional to teacher^reward_scaling reference^(1 - reward_scaling); A is the same for all tokens there, and above
    0 where reward_scaling > 1.

    Credit      the above, of the token that was sampled; no later token enters it
    Loss        PPO's clipped surrogate with a dual clip; every token counts the same (in the authors' scripts every
                reply)
    Needs       a teacher; reference_logp if reward_scaling is not 1
    Reduces to  opd at reward_scaling = 1, or where the reference is the teacher; at 0 it holds the student to the
                reference
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    dual_clip: float | None = 3.0
    """Largest ratio that counts where the advantage is negative."""
    reward_scaling: float = 1.25
    """0: stay at the reference; below 1: between it and the teacher; 1: the teacher; above: past it, away from the
    reference. The paper found 1.5 unstable."""
    truncate: float = 5.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""
    reference: str = ""
    """Path of the model that the reward is measured from; empty: the student as it started. The teacher as it was
    before its own training makes the reward exactly what that training brought (the paper's reward correction)."""
    teacher: Teacher = Teacher(who="frozen")
    """Whom to follow. Another model's path is the point: frozen is the student as it started, which teaches nothing."""

    def __post_init__(self) -> None:
        checked(self)
        if self.reward_scaling < 0:
            raise ConfigError(
                f"GOPD's reward_scaling is {self.reward_scaling}, which rewards what the teacher avoids. Use 0 or more."
            )

    @property
    def needs(self) -> Needs:
        reference = frozenset({"reference_logp"} if self.reward_scaling != 1 else ())
        measured = reference | {"proximal_logp", "teacher_logp", "has_teacher"}
        return Needs(measured=measured, sampling=frozenset({"rollouts"}))

    def credit(self, batch: Batch) -> Credit:
        advantage = batch.teacher_logp - batch.proximal_logp
        if self.reward_scaling != 1:
            advantage = advantage + (self.reward_scaling - 1) * (batch.teacher_logp - batch.reference_logp)
        return Credit(advantage)

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(spread(batch.has_teacher, batch.action_mask))

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        return TokenLoss(
            *policy_loss(
                out.logp,
                batch.proximal_logp,
                batch.behavior_logp,
                credit.advantage,
                low=self.clip_low,
                high=self.clip_high,
                dual=self.dual_clip,
                limit=self.truncate,
            )
        )
