"""AdamW with a schedule, clipping, and a refusal to step on numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tropism.config import Train


class AdamW:
    """Loshchilov and Hutter 2019, arXiv:1711.05101. Weight decay acts on matrices only."""

    def __init__(self, module: nn.Module, train: Train, critic: nn.Module | None = None) -> None:
        self.train = train
        policy = [p for p in module.parameters() if p.requires_grad]
        matrices, others = [p for p in policy if p.ndim > 1], [p for p in policy if p.ndim < 2]
        values = list(critic.parameters()) if critic else []
        self.parameters = policy + values
        share = (train.critic_learning_rate or train.learning_rate) / train.learning_rate
        kinds = [(matrices, train.weight_decay, 1.0), (others, 0.0, 1.0), (values, 0.0, share)]
        groups = [{"params": some, "weight_decay": decay, "share": of} for some, decay, of in kinds if some]
        fused = all(p.is_cuda for p in self.parameters) or None  # a CPU gains next to nothing by it
        self.inner = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=fused)

    def step(self, rate: float) -> dict[str, float]:
        """Clip, move, and forget the gradient. A gradient that is not finite moves nothing and is counted."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        finite = bool(torch.isfinite(norm))
        if finite:
            if self.train.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.train.max_grad_norm, norm)
            for group in self.inner.param_groups:
                group["lr"] = rate * group["share"]
            self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        return {"grad_norm": float(norm), "learning_rate": rate} if finite else {"skipped": 1.0, "not_finite": 1.0}

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def scheduled(train: Train, done: int, total: int) -> float:
    """Learning rate of optimizer step `done` (from 0) of `total`: linear warm-up from 0, then the chosen decay."""
    if done < train.warmup:
        return train.learning_rate * (done + 1) / train.warmup
    share = (done - train.warmup) / max(total - train.warmup, 1)
    fall = {"none": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[train.decay]
    return train.learning_rate * (train.final + (1 - train.final) * fall)
