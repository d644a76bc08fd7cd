"""PPO: a critic, learned beside the policy, says what a token deserves; no siblings are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.divergence import k1, k2, k3, steered
from tropism.maths.reduce import token_mean
from tropism.maths.returns import gae, turn_starts, turn_sum, whiten
from tropism.maths.surrogate import policy_loss
from tropism.maths.value import clipped_value_loss
from tropism.methods.checked import checked
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Proximal Policy Optimization. Schulman et al. 2017, arXiv:1707.06347.

    Credit      generalized advantage estimation (arXiv:1506.02438) with a value head, whitened over the batch; the
                head's target is the advantage before whitening, plus the value
    Loss        PPO's clipped surrogate, plus `value_weight` times the head's clipped squared error, plus `kl` times a
                divergence to a frozen reference if kl_in="loss"; every token counts the same. No bonus for entropy
    Needs       value, last_value and a live value head; reference_logp if kl > 0
    Reduces to  A2C when the batch is used once and whiten=False; REINFORCE when, besides, trace=1 and the critic says 0
    """

    per: Literal["token", "turn"] = "token"
    """What is one action: a token, or a turn. A turn's value is read and learned at its first token alone, its tokens
    share one advantage, and discount and trace act from turn to turn."""
    discount: float = 1.0
    """What a reward is worth one action earlier."""
    trace: float = 0.95
    """GAE's lambda: 1 trusts the rewards that came, 0 the critic."""
    bootstrap: bool = False
    """A truncated episode goes on with the critic's value of where it was cut; else it is worth what it earned. Only
    where the limit is no part of the task: a reply that earned its reward and rambles on would earn it twice, and with
    discount=1 and every episode cut no value is large enough."""
    whiten: bool = True
    """Bring the advantages of a batch to mean 0 and standard deviation 1."""
    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.2
    """It may rise to 1 + clip_high."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative; 3 is usual."""
    value_clip: float = 0.2
    """How far a batch may move a value towards its target; .inf for any distance."""
    value_weight: float = 0.1
    """Weight of the head's loss."""
    whiten_reward: bool = False
    """Divide the rewards of a batch's tokens by their standard deviation, about their mean."""
    kl: float = 0.0
    """Weight of the divergence to the reference model."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Take k1 from the reward of every token, so that the critic learns it too, or add `kl_loss` to the loss."""
    kl_loss: Literal["k2", "k3"] = "k3"
    """k2: the gradient of KL(policy || reference), as in the reward; k3: that of the other divergence. Neither is
    weighted by the ratio: exact where the batch is used once."""
    kl_target: float | None = None
    """Nats per episode: the weight grows while the policy is farther from the reference, and falls while it is
    nearer."""
    kl_horizon: int = 10_000
    """Episodes in which the weight changes by a fifth where the target is missed by a fifth or more."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""

    def __post_init__(self) -> None:
        checked(self)
        if self.kl_target is not None and (self.kl_target <= 0 or self.kl <= 0 or self.kl_horizon < 1):
            raise ConfigError(
                f"PPO's kl_target is {self.kl_target}, kl {self.kl} and kl_horizon {self.kl_horizon}: a weight of 0 "
                "never grows. Use positive numbers; kl is where the weight starts."
            )
        for name in ("value_clip", "value_weight"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"PPO's {name} is {getattr(self, name)}, but then its critic would never learn.")

    @property
    def needs(self) -> Needs:
        measured = frozenset({"proximal_logp", "reference_logp"} if self.kl > 0 else {"proximal_logp"})
        measured |= {"value", "last_value"}
        return Needs(measured=measured, live=frozenset({"value"}), sampling=frozenset({"rollouts"}))

    def decisions(self, batch: Batch) -> Tensor:
        """[N, T] bool: the tokens in whose states the critic is asked."""
        return batch.action_mask if self.per == "token" else turn_starts(batch.turn)

    def weight(self, batch: Batch) -> float:
        """Of the divergence, now."""
        return float(batch.memory.get("kl", self.kl))

    def remember(self, batch: Batch) -> Mapping[str, Tensor]:
        if self.kl_target is None:
            return {}
        away = k1(batch.proximal_logp, batch.reference_logp) * batch.action_mask
        return {"kl": steered(self.weight(batch), away, batch.episode, target=self.kl_target, horizon=self.kl_horizon)}

    def credit(self, batch: Batch) -> Credit:
        reward, states = batch.token_reward, self.decisions(batch)
        if self.whiten_reward:
            reward = whiten(reward, batch.action_mask) + reward[batch.action_mask].mean()
        if self.kl > 0 and self.kl_in == "reward":
            reward = reward - self.weight(batch) * k1(batch.proximal_logp, batch.reference_logp)
        if self.per == "turn":
            reward = turn_sum(reward, batch.turn)
        facts = (reward, batch.value, states, batch.episode, batch.turn, batch.last_value)
        advantage, target = gae(*facts, batch.truncated & self.bootstrap, discount=self.discount, trace=self.trace)
        if self.per == "turn":
            advantage = turn_sum(advantage, batch.turn)
        told = {"kl/weight": self.weight(batch)} if self.kl > 0 else {}
        return Credit(whiten(advantage, batch.action_mask) if self.whiten else advantage, target, told)

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
        error, clipped = clipped_value_loss(out.value, batch.value, credit.target, clip=self.value_clip)
        states = self.decisions(batch)
        loss = loss + self.value_weight * error * states
        metrics |= {"value/loss": error.detach() * states, "value/clip_ratio": (clipped & states).to(loss.dtype)}
        if self.kl > 0 and self.kl_in == "loss":
            divergence = (k2 if self.kl_loss == "k2" else k3)(out.logp, batch.reference_logp)
            loss, metrics["kl"] = loss + self.weight(batch) * divergence, divergence.detach()
        return TokenLoss(loss, metrics)
