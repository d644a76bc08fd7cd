"""Gated: what a teacher's words say about success becomes a value function, used as far as it has proved right.

Weights such as exp(sign(A) d), d the log-ratio of teacher and student, have an even and an odd part in d:

    A w(sign(A) d) = A (w(d) + w(-d)) / 2 + |A| (w(d) - w(-d)) / 2

The second does not depend on the sign of the reward: it is distillation, and carries the teacher's style into tokens
that do not matter. Here the log-ratio is evidence instead (maths/evidence.py): it cancels style by contrast, says how
likely success is after every token, and moves credit between tokens only.

The gradient is unbiased where V_{t-1} does not depend on y_t given what came before: the hint must not depend on the
answer it is held against (so feedback on it is refused), fit and mean come from earlier batches, siblings leave out the
answer itself. A hint from siblings is there for all of a group or not used in it; which groups have one still depends
on outcomes. A column of the task is free of that. Every answer counts the same, as in GRPO, however long; a baseline
that is not the siblings' mean would then favour lengths, and is freed of that (evidence.credited).

`saliency` weighs tokens by |d| on top, trusted or not. The derivation does not ask for it; where hints are right, what
matters is found sooner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths import evidence
from tropism.maths.advantage import leave_one_out
from tropism.maths.reduce import sequence_mean, sum_by
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class Gated:
    """Calibrated self-distilled credit, ours: trusted as far as it has explained outcomes that it had not seen.

    Credit      (V_t - V_{t-1}) + m (R - V_t), m = max(1 - trust, floor): R is 1 for a success, V_t its probability from
                siblings and from what a teacher says of the tokens so far; and what frees it of length. What the
                reward pays beyond success is credited by leave-one-out
    Loss        PPO's clipped surrogate; every episode counts the same
    Needs       siblings and a named success; a teacher that read a right and a wrong hint, or teacher=None
    Reduces to  R - q without trust or teacher where answers are equally long, and with shrink=0 RLOO's credit where
                siblings differ; the unbiased critic R - V_{t-1} with floor=1; V_t - V_{t-1} with full trust and floor=0

    A batch in which all succeed or all fail is not silent: R - q is small there, and not 0. `gate/style` is what both
    hints say in common of the student's tokens, in nats: where it rises, the policy copies how a hinted model talks.
    """

    teacher: Teacher | None = Teacher(reads=("sibling",), against=("wrong_sibling",))
    """Who reads what, against what. With against=() it is compared with the student, and style does not cancel. None:
    siblings alone, which is GRPO with a steadier baseline."""
    gate: bool = True
    """Use the evidence as far as it is trusted. False: record how good it is, and learn without it."""
    shrink: float = 1.0
    """Half the number of siblings that the mean of earlier batches counts for."""
    bound: float = 3.0
    """Most that one token can say, in nats."""
    floor: float = 0.1
    """Share of what V leaves unexplained that is credited however great the trust."""
    saliency: float = 0.0
    """Share of a token's credit that goes by how much the evidence moves there; needs a contrast."""
    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)
        if min(self.shrink, self.floor, self.saliency) < 0 or self.bound <= 0 or max(self.floor, self.saliency) > 1:
            raise ConfigError(
                f"Gated's shrink is {self.shrink}, bound {self.bound}, floor {self.floor}, saliency {self.saliency}. "
                "Use 0 or more siblings, more than 0 nats, and shares from 0 to 1."
            )
        if self.saliency and not (self.teacher and self.teacher.against):
            raise ConfigError("Gated's saliency weighs tokens by style too without teacher.against: set it, or use 0.")
        if self.teacher and (self.teacher.per_turn or (self.teacher.need != "all" and len(self.teacher.reads) > 1)):
            raise ConfigError(
                f"Gated's teacher reads {', '.join(self.teacher.reads)} (need: {self.teacher.need}): what depends on "
                "the outcome would know the reward. Use sibling against wrong_sibling, or a task's columns; need: all."
            )

    @property
    def needs(self) -> Needs:
        told = {"teacher_logp", "has_teacher"} if self.teacher else set()
        told |= {"counter_logp"} if self.teacher and self.teacher.against else set()
        return Needs(measured=frozenset(told | {"proximal_logp"}), sampling=frozenset({"siblings"}))

    def read(self, batch: Batch) -> evidence.Reading:
        """What is to be expected of every answer, and along it, from all but this batch's outcomes."""
        outcome, told = batch.success.to(batch.reward.dtype), torch.zeros_like(batch.success)
        mean = batch.memory.get("mean", 0.5)  # at first Laplace's rule of succession
        expected = evidence.shrunk_baseline(outcome, batch.group, batch.episode, mean, shrink=self.shrink)
        words = torch.zeros_like(batch.proximal_logp)
        if self.teacher:
            told = sum_by((~batch.has_teacher).long(), batch.group) == 0
            other = batch.counter_logp if self.teacher.against else batch.proximal_logp
            words = (batch.teacher_logp - other).clamp(-self.bound, self.bound)
        fit = batch.memory.get("fit", words.new_zeros(5)).to(words)
        return evidence.read(outcome, expected, told, words, fit, batch.action_mask, batch.episode, batch.turn)

    def credit(self, batch: Batch) -> Credit:
        seen, trust = self.read(batch), float(batch.memory.get("trust", 0.0)) * self.gate
        value, before, mix = evidence.trusted(seen, trust, self.floor)
        advantage = evidence.credited(value, before, seen, mix, batch.group, batch.episode)
        advantage *= evidence.salient(seen, batch.memory, self.saliency)
        beyond = leave_one_out(batch.reward - seen.outcome, batch.group, batch.episode)[:, None]
        gap = batch.teacher_logp - batch.proximal_logp if self.teacher and self.teacher.against else None
        metrics = evidence.watched(batch.memory, seen, batch.group, gap) if self.teacher else {}
        return Credit((advantage + beyond) * batch.action_mask, metrics=metrics)

    def remember(self, batch: Batch) -> Mapping[str, Tensor]:
        return evidence.learned(batch.memory, batch.step, self.read(batch), batch.group, batch.episode)

    def weights(self, batch: Batch) -> Tensor:
        return sequence_mean(batch.action_mask, batch.episode)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
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
