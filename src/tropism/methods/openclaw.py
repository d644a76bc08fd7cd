"""OpenClaw-RL: what comes next scores a reply, and the hint that lies in it says how the reply should have been."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.divergence import among_top_k
from tropism.maths.reduce import sequence_mean, spread
from tropism.maths.surrogate import clipped_surrogate, policy_loss, token_log_ratio
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Needs, Output, TokenLoss


@dataclass(frozen=True, kw_only=True)
class OpenClaw:
    """Learning from the next state, by score and by hint. Wang et al. 2026, arXiv:2603.10165.

    Credit      w_rl times the turn's reward as it is, plus w_hint times log teacher - log proximal for a hinted turn;
                with teacher.top_k the second goes to the likeliest tokens, w_hint p_v / sum p times the same difference
    Loss        PPO's clipped surrogate, over sampled and, with teacher.top_k, over likeliest tokens; every turn with a
                score or a hint counts the same, any other nothing
    Needs       a judge, whose scores are the turns' rewards and whose hints the teacher reads
    Reduces to  REINFORCE with the raw score when w_hint = 0 and the batch is used once; the gradient of KL(policy ||
                teacher) when w_rl = 0, top_k = all and the batch is used once

    top_k = 0 is the first version of the paper, top_k = 4, select = sequence and gap = 1 the second. There a turn
    without a hint is still drawn to the frozen model; here its hint term is exactly 0. The first version takes the
    longest of a panel's hints, here the shortest comes first. Left out: rewards standardised over the actions of one
    step index, for agents with tools.
    """

    clip_low: float = 0.2
    """The ratio to the policy that made the batch may fall to 1 - clip_low before a token stops learning."""
    clip_high: float = 0.28
    """It may rise to 1 + clip_high."""
    w_rl: float = 1.0
    """Weight of the score."""
    w_hint: float = 1.0
    """Weight of what the teacher says under the hint."""
    gap: float | None = None
    """Largest difference of log-probabilities to the teacher that counts, either way; 2 for agents with tools."""
    truncate: float = 2.0
    """Largest weight that corrects for a sampler whose log-probabilities are not the trainer's."""
    teacher: Teacher = Teacher(who="frozen", reads=("hint",))
    """The model as it started, having read the hint."""

    def __post_init__(self) -> None:
        checked(self)
        if min(self.w_rl, self.w_hint) < 0 or self.w_rl + self.w_hint == 0:
            raise ConfigError(
                f"OpenClaw's w_rl is {self.w_rl} and w_hint {self.w_hint}: weights cannot be negative, and if both are "
                "0 nothing is learned. Use 1 and 1."
            )
        if self.gap is not None and self.gap <= 0:
            raise ConfigError(f"OpenClaw's gap is {self.gap}, but then no hint would count. Use 1, or leave it out.")
        if not self.teacher.per_turn:
            raise ConfigError(
                f"OpenClaw's teacher reads {', '.join(self.teacher.reads) or 'nothing'}, but what is learned from a "
                "turn is what came after it. Use reads: [hint]."
            )

    @property
    def needs(self) -> Needs:
        measured, live = {"proximal_logp", "teacher_logp", "has_teacher"}, set()
        if self.teacher.top_k:
            measured |= {"topk_ids", "proximal_topk_logp", "teacher_topk_logp"}
            live = {"topk_logp"}
        sampling = frozenset({"rollouts"})
        return Needs(measured=frozenset(measured), live=frozenset(live), sampling=sampling, by_row=True)

    def told(self, teacher_logp: Tensor, proximal_logp: Tensor) -> Tensor:
        limit = math.inf if self.gap is None else self.gap
        return (teacher_logp - proximal_logp).clamp(-limit, limit)

    def credit(self, batch: Batch) -> Credit:
        score = self.w_rl * spread(batch.token_reward.sum(1), batch.action_mask)  # a row is a turn
        if self.teacher.top_k:
            return Credit(score)
        return Credit(score + self.w_hint * self.told(batch.teacher_logp, batch.proximal_logp) * batch.action_mask)

    def weights(self, batch: Batch) -> Tensor:
        scored = (batch.token_reward.sum(1) != 0) & (self.w_rl > 0)
        counted = scored | batch.has_teacher & (self.w_hint > 0)
        turns = torch.arange(len(batch), device=counted.device)
        return sequence_mean(batch.action_mask & counted[:, None], turns)

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
        if self.teacher.top_k:
            share = among_top_k(batch.proximal_topk_logp, batch.topk_ids)
            deserved = self.told(batch.teacher_topk_logp, batch.proximal_topk_logp) * share
            log_ratio = token_log_ratio(out.topk_logp, batch.proximal_topk_logp)
            hinted, _ = clipped_surrogate(log_ratio, deserved, low=self.clip_low, high=self.clip_high)
            loss = loss + self.w_hint * hinted.sum(-1)
        return TokenLoss(loss, metrics)
