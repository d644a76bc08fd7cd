"""GRPO, and by its settings two of its descendants.

    Dr. GRPO (Liu et al. 2025, arXiv:2503.20783)      scale="none", average="constant", longest=sampling.max_tokens
    DAPO's loss (Yu et al. 2025, arXiv:2503.14476)    average="token", clip_high=0.28

DAPO's refill of groups without contrast and its penalty on long replies are not losses, so they are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.advantage import Scale, group_relative
from tropism.maths.divergence import k3
from tropism.maths.reduce import constant_mean, sequence_mean, spread, token_mean
from tropism.maths.surrogate import clipped_surrogate, token_log_ratio, truncated_weight
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group Relative Policy Optimization. Shao et al. 2024, arXiv:2402.03300.

    Credit      an episode's reward, centred and scaled among its siblings, on every token it wrote
    Loss        PPO's clipped surrogate, plus `kl` times k3 to a frozen reference; every episode counts the same
    Needs       rewards that differ between siblings; reference_logp if kl > 0
    Reduces to  REINFORCE with a group baseline when scale="none" and the batch is used once
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative; 3 is usual."""
    scale: Scale = "std"
    """What centred rewards are divided by: none, std, sample_std, batch_std or mean."""
    eps: float = 1e-6
    """Added to a standard deviation."""
    kl: float = 0.0
    """Weight of the divergence to the reference model in the loss."""
    average: Literal["sequence", "token", "constant"] = "sequence"
    """What counts the same: every episode, every token, or every token over a constant length."""
    longest: int = 0
    """That constant, in tokens."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"GRPO's {name} is {getattr(self, name)}, but cannot be negative.")
        if self.eps <= 0:
            raise ConfigError(f"GRPO's eps is {self.eps}, but siblings that all earned the same give 0 / 0. Use 1e-6.")
        if self.truncate <= 0:
            raise ConfigError(f"GRPO's truncate is {self.truncate}, but then no token would count. Use 2, or more.")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(
                f"GRPO's dual_clip is {self.dual_clip}: nothing with a negative advantage would be unlearned once its "
                f"ratio passes that. Use more than 1 + clip_high = {1 + self.clip_high}; 3 is usual."
            )
        if self.average == "constant" and self.longest < 1:
            raise ConfigError(
                f"GRPO averages over a constant length, but longest is {self.longest}. "
                "Set longest to sampling.max_tokens, or use average: sequence or token."
            )
        if self.average != "constant" and self.longest:
            raise ConfigError(
                f"GRPO's longest is {self.longest}, but average is {self.average}, which does not read it. "
                "Drop longest, or use average: constant."
            )

    @property
    def needs(self) -> Needs:
        reference = frozenset({"reference_logp"} if self.kl > 0 else ())
        return Needs(measured=reference | {"proximal_logp"}, sampling=frozenset({"siblings"}))

    def credit(self, batch: Batch) -> Credit:
        advantage = group_relative(batch.reward, batch.group, batch.episode, scale=self.scale, eps=self.eps)
        return Credit(spread(advantage, batch.action_mask))

    def weights(self, batch: Batch) -> Tensor:
        if self.average == "token":
            return token_mean(batch.action_mask)
        if self.average == "constant":
            return constant_mean(batch.action_mask, batch.episode, longest=self.longest)
        return sequence_mean(batch.action_mask, batch.episode)

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        assert batch.proximal_logp is not None
        assert batch.behavior_logp is not None
        log_ratio = token_log_ratio(out.logp, batch.proximal_logp)
        loss, clipped = clipped_surrogate(
            log_ratio, credit.advantage, low=self.clip_low, high=self.clip_high, dual=self.dual_clip
        )
        weight = truncated_weight(batch.proximal_logp, batch.behavior_logp, limit=self.truncate)
        loss = loss * weight
        metrics = {
            "clip_ratio/region_mean": clipped.to(loss.dtype),
            "ratio": log_ratio.detach().exp(),
            "sampling/importance_sampling_ratio/mean": weight,
        }
        if self.kl > 0:
            assert batch.reference_logp is not None
            divergence = k3(out.logp, batch.reference_logp)
            loss, metrics["kl"] = loss + self.kl * divergence, divergence.detach()
        return TokenLoss(loss, metrics)
