"""What SRPO's routing is compared with (arXiv:2604.02288, ablation): reward and teacher at once, on every reply."""

from dataclasses import dataclass

from tropism.maths.advantage import group_relative
from tropism.maths.divergence import jensen_shannon
from tropism.maths.reduce import spread, token_mean
from tropism.maths.surrogate import importance_weight, policy_loss
from tropism.methods.checked import compared
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """GRPO's loss and SDPO's, mixed.

    Credit      an episode's reward minus the mean of its siblings
    Loss        share times PPO's clipped surrogate, and 1 - share times SDPO's divergence where there is a teacher
    Needs       rewards that differ between siblings; a teacher that read a correct sibling
    Reduces to  SRPO without its routing: GRPO with scale="none" and average="token" for share=1, SDPO for share=0 where
                everybody has a teacher
    """

    share: float = 0.9
    """Of the reward's loss."""
    teacher: Teacher = Teacher(who="ema", rate=0.05, reads=("sibling",), top_k=100)
    clip_low: float = 0.2
    clip_high: float = 0.28
    truncate: float = 2.0

    needs = Needs(
        measured=frozenset({"proximal_logp", "has_teacher", "topk_ids", "teacher_topk_logp"}),
        live=frozenset({"topk_logp"}),
        sampling=frozenset({"siblings"}),
    )

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale="none")
        return Credit(spread(advantage, batch.action_mask))

    def weights(self, batch: Batch):
        return token_mean(batch.action_mask)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        stale = (batch.proximal_logp, batch.behavior_logp)
        bounds = {"low": self.clip_low, "high": self.clip_high, "limit": self.truncate}
        reward, metrics = policy_loss(out.logp, *stale, credit.advantage, **bounds)
        told = importance_weight(out.logp, *stale, limit=self.truncate) * jensen_shannon(
            *compared(out, batch, self.teacher)
        )
        told = told * batch.has_teacher[:, None]
        return TokenLoss(self.share * reward + (1 - self.share) * told, metrics)
