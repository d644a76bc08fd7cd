"""Learning from user follow-ups: the policy reads its own reply again, knowing what the user said to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.reduce import sequence_mean, spread
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class FollowUp:
    """Self-distillation from the user's next message. Kleine Buening et al. 2026, arXiv:2603.12273.

    Credit      log teacher - log proximal, the teacher being the policy after it has read the user's next message;
                online minus its mean over the reply, on data as it is
    Loss        PPO's clipped surrogate; on data -A log p, without the first `skip` tokens; every reply that the user
                answered counts the same
    Needs       a user who answers: the next turn of an episode or conversation, or a column follow_up
    Reduces to  REINFORCE with that credit when the batch is used once; the gradient of KL(policy || teacher) in
                expectation over the policy's own tokens, uncentred

    On logged replies of another model it is not an unbiased estimate of that gradient, though the paper says so: the
    tokens were not drawn from the policy. Their live variant cuts the credit to 2 nats either way; nothing is cut here.
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    skip: int = 2
    """On data, how many first tokens of a reply do not count: the teacher's other prompt shifts them most."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""
    teacher: Teacher = Teacher(who="live", reads=("follow_up",))
    """The policy itself, having read the user's next message."""

    def __post_init__(self) -> None:
        checked(self)
        if self.skip < 0:
            raise ConfigError(f"FollowUp's skip is {self.skip}, but is a number of tokens. Use 2, or 0.")
        if not self.teacher.per_turn:
            raise ConfigError(
                f"FollowUp's teacher reads {', '.join(self.teacher.reads) or 'nothing'}, but what is learned from a "
                "reply is what came after it. Use reads: [follow_up]."
            )

    @property
    def needs(self) -> Needs:
        return Needs(measured=frozenset({"proximal_logp", "teacher_logp", "has_teacher"}), by_row=True)

    def credit(self, batch: Batch) -> Credit:
        told = (batch.teacher_logp - batch.proximal_logp) * batch.action_mask
        if batch.behavior_logp is None:
            return Credit(told)
        mean = told.sum(1) / batch.action_mask.sum(1).clamp(min=1)  # a row is a turn
        return Credit(told - spread(mean, batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        counted = batch.action_mask & batch.has_teacher[:, None]
        if batch.behavior_logp is None:
            counted = counted & (batch.action_mask.cumsum(1) > self.skip)
        return sequence_mean(counted, torch.arange(len(batch), device=counted.device))

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        if batch.behavior_logp is None:
            return TokenLoss(-credit.advantage * out.logp)
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
