"""Constrained GRPO: one reward to maximise, others to keep above or below a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.advantage import Scale, group_relative
from tropism.maths.reduce import first_row, sequence_mean, spread
from tropism.maths.surrogate import policy_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class Constrained:
    """GRPO with Lagrange multipliers. Dai et al. 2023 (Safe RLHF), arXiv:2310.12773, sec. 3.3.

    Credit      GRPO's, of (reward + sum_k m_k (part_k - limit_k)) / (1 + sum_k m_k), minus where the limit is an upper
                one; m_k is 0 at first, grows while the mean of part k breaks its limit and falls while it keeps it, by
                rate times the distance, and stands higher or lower by damping times the distance of this very step.
                A part that does not apply to an episode stands at its limit there
    Loss        PPO's clipped surrogate; every episode counts the same
    Needs       what each part gave
    Reduces to  GRPO without limits, and while none has been broken

    Give a part that is only to be kept the weight 0 in `rewards`.
    """

    at_least: Mapping[str, float] = field(default_factory=dict)
    """Part of the reward -> what its mean must not fall below."""
    at_most: Mapping[str, float] = field(default_factory=dict)
    """Part -> what its mean must not exceed."""
    rate: float = 0.5
    """How fast a multiplier grows, per step and unit of the part."""
    damping: float = 0.0
    """How far it stands above or below that for a step alone, per unit of the part. At 0, as in the paper, a policy
    that follows quickly swings about its limit. Stooke et al. 2020, arXiv:2007.03964, the proportional term."""
    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    scale: Scale = "std"
    """What centred rewards are divided by: none, std, sample_std, batch_std or mean."""
    eps: float = 1e-6
    """Added to a standard deviation."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)
        if self.rate <= 0 or self.damping < 0:
            raise ConfigError(
                f"Constrained's rate is {self.rate} and damping {self.damping}: at a rate of 0 no limit would ever "
                "count, and damping below 0 would drive its swings. Use 0.5 and 2, say."
            )

    @property
    def needs(self) -> Needs:
        measured, sampling = frozenset({"proximal_logp", "parts"}), frozenset({"siblings"})
        parts = frozenset({*self.at_least, *self.at_most})
        return Needs(measured=measured, sampling=sampling, parts=parts, by_advantage=True)

    def limits(self, batch: Batch) -> list[tuple[str, Tensor, Tensor]]:
        """(name of the multiplier, [N] by how much an episode keeps the limit, by how much their mean breaks it); none
        for a batch in which nothing could be scored."""
        once, given = first_row(batch.episode), {name: batch.parts[:, k] for k, name in enumerate(batch.weighted)}
        if missing := [name for name in self.needs.parts if given and name not in given]:
            raise ConfigError(f"Constrained is about {', '.join(missing)}, but the parts are {', '.join(given)}.")
        found = []
        for sign, way in ((1.0, "at_least"), (-1.0, "at_most")):
            for name, limit in getattr(self, way).items() if given else ():
                kept = sign * (given[name] - limit)
                found.append((f"{name}/{way}", kept.nan_to_num(0.0), -kept[once].nanmean().nan_to_num(0.0)))
        return found

    def credit(self, batch: Batch) -> Credit:
        total, heavy, told = batch.reward, 1.0, {}
        for name, kept, broken in self.limits(batch):
            multiplier = max(0.0, float(batch.memory.get(name, 0.0) + self.damping * broken))
            total, heavy, told[f"multiplier/{name}"] = total + multiplier * kept, heavy + multiplier, multiplier
        advantage = group_relative(total / heavy, batch.group, batch.episode, scale=self.scale, eps=self.eps)
        return Credit(spread(advantage, batch.action_mask), metrics=told)

    def remember(self, batch: Batch) -> Mapping[str, Tensor]:
        memory = dict(batch.memory)
        for name, _, broken in self.limits(batch):
            memory[name] = (memory.get(name, 0.0) + self.rate * broken).clamp(min=0)
        return memory

    def weights(self, batch: Batch) -> Tensor:
        return sequence_mean(batch.action_mask, batch.episode)

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
