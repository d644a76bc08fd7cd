"""On-policy distillation: the student writes, and a teacher says of every token how likely it would have been."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.divergence import forward_kl, jensen_shannon, reverse_kl
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked, compared
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class OPD:
    """On-policy distillation (GKD on the student's own replies). Agarwal et al. 2023, arXiv:2306.13649.

    Credit      log teacher - log student of the token that was sampled; none with teacher.top_k, which is direct
    Loss        PPO's clipped surrogate, or the divergence over top_k tokens and one bucket for the rest; every token
                with a teacher counts the same
    Needs       a teacher: another model's path in teacher.who is the point, frozen holds the student where it began
    Reduces to  no gradient where the teacher is the student; by sampled token the expected gradient is that of
                divergence="reverse" with top_k="all"
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    divergence: Literal["reverse", "forward", "jensen_shannon"] = "reverse"
    """reverse: KL(student || teacher), mode seeking; forward: KL(teacher || student), mass covering; or both of them
    against their mixture. All but reverse take teacher.top_k > 0."""
    mix: float = 0.5
    """jensen_shannon: share of the teacher in the mixture. Towards 0 it is mix times forward, towards 1 it is 1 - mix
    times reverse: scale the learning rate with it."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's. By sampled token only:
    the direct loss asks nothing of the token."""
    teacher: Teacher = Teacher(who="frozen")
    """Whom to become. top_k: 0 asks it of the sampled token, 20 of that many tokens, all of the whole vocabulary."""

    def __post_init__(self) -> None:
        checked(self)
        if self.divergence != "reverse" and not self.teacher.top_k:
            raise ConfigError(
                f"OPD's divergence is {self.divergence}, but teacher.top_k is 0: what the student sampled says nothing "
                "of the tokens that only the teacher would have chosen. Set teacher.top_k to 20, say, or use reverse."
            )

    @property
    def needs(self) -> Needs:
        direct = {"topk_ids", "teacher_topk_logp"} if self.teacher.top_k else set()
        measured = frozenset({"proximal_logp", "teacher_logp", "has_teacher"} | direct)
        if direct:  # compared on tokens that need not be the student's own
            return Needs(measured=measured, live=frozenset({"topk_logp"}))
        return Needs(measured=measured, sampling=frozenset({"rollouts"}))

    def credit(self, batch: Batch) -> Credit:
        if self.teacher.top_k:
            return Credit(torch.zeros_like(batch.token_reward))
        return Credit(batch.teacher_logp - batch.proximal_logp)

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(spread(batch.has_teacher, batch.action_mask))

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        if self.teacher.top_k:
            one_way = {"reverse": reverse_kl, "forward": forward_kl}
            divergence = one_way.get(self.divergence) or partial(jensen_shannon, mix=self.mix)
            loss = divergence(*compared(out, batch, self.teacher))
            return TokenLoss(loss, {"divergence": loss.detach()})
        return TokenLoss(
            *policy_loss(
                out.logp,
                batch.proximal_logp,
                batch.behavior_logp,
                credit.advantage,
                low=self.clip_low,
                high=self.clip_high,
                limit=self.truncate,
            )
        )
