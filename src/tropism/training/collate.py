"""Rollouts to rows. What is an action is known from the turns, never recovered from pad or end ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tropism.types import ABSENT, Batch, Rollout, Stop, Turn


@dataclass
class Row:
    """Turns of one rollout whose contexts extend each other, as one run of tokens."""

    episode: int
    tokens: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, Turn]] = field(default_factory=list)
    """(place of the turn's first action token, number of the turn in its episode, the turn)"""

    def extended_by(self, turn: Turn) -> bool:
        return bool(self.tokens) and list(turn.context[: len(self.tokens)]) == self.tokens

    def add(self, number: int, turn: Turn) -> None:
        self.tokens += turn.context[len(self.tokens) :]
        self.spans.append((len(self.tokens), number, turn))
        self.tokens += turn.action


def rows_of(rollouts: Sequence[Rollout], *, apart: bool = False) -> list[Row]:
    """The rows of everything that can be learned from: failures and silent rollouts are left out.

    `episode` is the rollout's place in the list, so that the record can find it again.

    Args:
        apart: every turn is a row, because a teacher reads something else at each of them.
    """
    rows: list[Row] = []
    for episode, rollout in enumerate(rollouts):
        if rollout.failure is not None:
            continue
        row = Row(episode)
        for number, turn in enumerate(rollout.turns):
            if not turn.action:
                continue
            if row.spans and (apart or not row.extended_by(turn)):
                rows.append(row)
                row = Row(episode)
            row.add(number, turn)
        if row.spans:
            rows.append(row)
    return rows


def collate(
    rollouts: Sequence[Rollout],
    *,
    codes: dict[str, int],
    step: int = 0,
    steps: int = 1,
    memory: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    apart: bool = False,
    parts: bool = False,
) -> Batch:
    """One Batch of all that can be learned from.

    Args:
        rollouts: scored; their order gives the episode numbers.
        codes: domain -> integer, extended here; belongs to the run and to its checkpoints.
        apart: see `rows_of`.
        parts: whether the method asks for what every part of the reward gave.
    """
    rows = rows_of(rollouts, apart=apart)
    of = [rollouts[row.episode] for row in rows]
    shape = (len(rows), max((len(row.tokens) for row in rows), default=1))
    groups: dict[tuple[int, int], int] = {}

    def per_row(values: Iterable[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    def per_token(start: float, dtype: torch.dtype, values: Callable[[int, Turn], Any], *more: int) -> Tensor:
        out = torch.full((*shape, *more), start, dtype=dtype)
        for n, row in enumerate(rows):
            for place, number, turn in row.spans:
                out[n, place : place + len(turn.action)] = torch.as_tensor(values(number, turn), dtype=dtype)
        return out.to(device)

    def last(turn: Turn) -> list[float]:
        return [0.0] * (len(turn.action) - 1) + [turn.reward]

    tokens = torch.zeros(shape, dtype=torch.long)
    for n, row in enumerate(rows):
        tokens[n, : len(row.tokens)] = torch.tensor(row.tokens)

    def sampled(name: str, *more: int, dtype: torch.dtype = torch.float32) -> Any:
        """What the sampler returned, if it did for every turn."""
        if not rows or any(getattr(turn, name) is None for row in rows for _, _, turn in row.spans):
            return ABSENT
        return per_token(0, dtype, lambda _, turn: getattr(turn, name), *more)

    weighted = dict(sorted({name: w for rollout in of for name, w in rollout.weights.items()}.items())) if parts else {}
    likeliest = rows[0].spans[0][2].topk_ids if rows else None
    k = len(likeliest[0]) if likeliest is not None and len(likeliest) else 0
    return Batch(
        tokens=tokens.to(device),
        length=per_row((len(row.tokens) for row in rows), torch.long),
        action_mask=per_token(0, torch.bool, lambda _, turn: [1] * len(turn.action)),
        token_reward=per_token(0, torch.float32, lambda _, turn: last(turn)),
        turn=per_token(-1, torch.long, lambda number, turn: [number] * len(turn.action)),
        reward=per_row((rollout.reward for rollout in of), torch.float32),
        success=per_row((rollout.success for rollout in of), torch.bool),
        truncated=per_row((rollout.turns[-1].stop is Stop.truncated for rollout in of), torch.bool),
        group=per_row((groups.setdefault((r.group, r.task.seat), len(groups)) for r in of), torch.long),
        episode=per_row((row.episode for row in rows), torch.long),
        role=per_row((rollout.task.seat for rollout in of), torch.long),
        domain=per_row((codes.setdefault(rollout.task.domain, len(codes)) for rollout in of), torch.long),
        step=step,
        steps=steps,
        memory=memory or {},
        weighted=weighted,
        parts=per_row((r.rewards.get(name, math.nan) for r in of for name in weighted), torch.float32).view(len(of), -1)
        if weighted
        else ABSENT,
        behavior_logp=sampled("logp"),
        proximal_entropy=sampled("entropy"),
        topk_ids=sampled("topk_ids", k, dtype=torch.long) if k else ABSENT,
        proximal_topk_logp=sampled("topk_logp", k) if k else ABSENT,
    )
