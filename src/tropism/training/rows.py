"""Rollouts and tensors as the record's rows: one per turn, every number beside the token it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from tropism.training.collate import rows_of
from tropism.types import Batch, Rollout

AUTHORS = ("proximal_logp", "reference_logp", "teacher_logp", "counter_logp", "value")


def record_rows(
    rollouts: Sequence[Rollout],
    batch: Batch | None = None,
    advantage: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    apart: bool = False,
) -> list[dict[str, Any]]:
    """One dict per turn for `Run.save_rollouts`; tensors of turns that were trained on are cut to their tokens."""
    tensors = {"advantage": advantage, "weight": weight}
    if batch is not None:
        tensors |= {name: getattr(batch, name) for name in AUTHORS}
    places = {
        (row.episode, number): (n, start, start + len(turn.action))
        for n, row in enumerate(rows_of(rollouts, apart=apart) if batch is not None else ())
        for start, number, turn in row.spans
    }
    lists = {name: value.detach().float().cpu().tolist() for name, value in tensors.items() if value is not None}
    rows: list[dict[str, Any]] = []
    for episode, rollout in enumerate(rollouts):
        task = asdict(rollout.task)
        shared = {
            "episode": episode,
            "group": rollout.group,
            "sibling": rollout.sibling,
            "task_seed": task["seed"],
            "version": rollout.version,
            "total": rollout.reward,
            "rewards": dict(rollout.rewards),
            "success": rollout.success,
            "failure": f"{rollout.failure.where}: {rollout.failure.reason}" if rollout.failure else None,
        } | {name: task[name] for name in ("seat", "level", "domain", "env")}
        if not rollout.turns:
            rows.append(shared | {"turn": -1})
        for number, turn in enumerate(rollout.turns):
            row = shared | {"turn": number, "context": turn.context, "action": turn.action}
            row |= {"behavior_logp": turn.logp, "entropy": turn.entropy, "prompt": turn.prompt, "reply": turn.reply}
            row |= {"feedback": turn.feedback, "stop": str(turn.stop), "reward": turn.reward}
            row |= {"hints": "\n".join(turn.hints) or None}
            if (episode, number) in places:
                n, start, stop = places[episode, number]
                row |= {name: values[n][start:stop] for name, values in lists.items()}
            rows.append(row)
    return rows
