"""RLCSD: what the teacher likes after a right hint more than after a wrong one is about the task, not about style."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.advantage import group_relative
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class RLCSD:
    """Reinforcement Learning with Contrastive Self-Distillation. Pan et al. 2026, arXiv:2606.11709.

    Credit      GRPO's advantage A, moved by s = reach tanh(e / temperature) where |s| > least, and to 0 rather than
                beyond it: e the teacher's log-probability after a right answer minus that after a wrong one
    Loss        PPO's clipped surrogate; the mean over moved tokens plus the mean over all others
    Needs       rewards that differ between siblings; a teacher that read a correct and a wrong sibling
    Reduces to  GRPO with scale="sample_std" and average="token" where both hints say the same

    What any hint changes cancels in e. The authors' code averages the wrong side over up to four siblings and leaves
    out answers that lack one of the two hints; here there is one wrong sibling, and those answers are reinforced.
    """

    teacher: Teacher = Teacher(who="synced", every=10, reads=("sibling",), against=("wrong_sibling",))
    """Who teaches, what it reads, and what stands in its place for the comparison."""
    reach: float = 0.5
    """Largest change of an advantage."""
    temperature: float = 0.02
    """Evidence, in nats, at which three quarters of that is reached."""
    least: float = 0.02
    """Smaller changes are left out."""
    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)
        if not self.teacher.against:
            raise ConfigError("RLCSD compares two hints, but teacher.against is empty. Use wrong_sibling, say.")
        if self.temperature <= 0:
            raise ConfigError(f"RLCSD's temperature is {self.temperature}, but it divides. Use 0.02, say.")
        if not 0 <= self.least < self.reach:
            raise ConfigError(f"RLCSD's least is {self.least} and reach {self.reach}: nothing would be moved.")

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "teacher_logp", "counter_logp"})
        return Needs(measured=measured, sampling=frozenset({"siblings"}), by_advantage=True)

    def change(self, batch: Batch) -> Tensor:
        """[N, T] what the teacher adds to the advantage."""
        change = self.reach * ((batch.teacher_logp - batch.counter_logp) / self.temperature).tanh()
        return change * (batch.action_mask & (change.abs() > self.least))

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="sample_std")
        advantage = spread(advantage, batch.action_mask)
        sign = advantage.sign()
        return Credit(sign * (advantage.abs() + sign * self.change(batch)).clamp(min=0))

    def weights(self, batch: Batch) -> Tensor:
        moved = self.change(batch) != 0
        return token_mean(moved) + token_mean(batch.action_mask & ~moved)

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
        return TokenLoss(loss, metrics)
