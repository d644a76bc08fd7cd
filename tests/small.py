"""Language models of a few thousand weights, and rollouts written by hand."""

from __future__ import annotations

from typing import Any

from tropism.config import Model
from tropism.training.model import Policy, load_policy
from tropism.types import Failure, Rollout, Task, Turn

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
GPT2 = {"n_embd": 32, "n_head": 2}
FAMILIES = {
    "tiny-llama": SHAPE,
    "tiny": SHAPE,
    "tiny-mistral": SHAPE | {"sliding_window": 4},
    "tiny-gemma": SHAPE,
    "tiny-gpt2": GPT2,
}
"""Preset -> a shape that runs in milliseconds. Mistral's window is shorter than the prompts of the tests."""


def small(path: str = "tiny-llama", seed: int = 0, shape: dict[str, Any] | None = None, **settings: Any) -> Policy:
    return load_policy(Model(path=path, shape=FAMILIES[path] | (shape or {}), device="cpu", **settings), seed)


def turn(context: list[int], action: list[int], *, sampled: bool = True, **fields: Any) -> Turn:
    if sampled:
        fields = {"logp": [-0.5] * len(action), "entropy": [0.1] * len(action)} | fields
    return Turn(context=context, action=action, **fields)


def rollout(*turns: Turn, group: int = 0, seat: int = 0, failure: Failure | None = None, **fields: Any) -> Rollout:
    """Scored: its reward is the sum of what its turns earned."""
    total = sum(turn.reward for turn in turns)
    task = Task(seat=seat, domain=fields.pop("domain", ""))
    return Rollout(task=task, group=group, turns=turns, reward=total, failure=failure, **fields)
