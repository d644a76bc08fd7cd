"""Reward-based learning for language models.

    from tropism import GRPO, train

    result = train(GRPO(clip_high=0.28), env="tictactoe", model="tiny", name="noughts")

Everything is loaded when it is first used: `import tropism` alone loads no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tropism.api import Chat, Result, doctor, evaluate, plan, sample, train
    from tropism.config import Data, Eval, Model, Named, Recipe, Sampling, Stage, Success, Train
    from tropism.envs.check import check_env
    from tropism.errors import CheckFailed, ConfigError, GuardStopped, TropismError
    from tropism.methods.grpo import GRPO
    from tropism.methods.sft import SFT
    from tropism.types import Ask, Env, Failure, Rollout, Task, Turn

__version__ = "0.1.0"

SPINS = "30000"
"""How often a thread of torch looks whether the others are done before it sleeps. libgomp's own number is 300,000, and
where other programs compute, threads then hold cores from those that they wait for (bench/busy.py)."""
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

_HOME = {
    "tropism.api": ("train", "evaluate", "sample", "doctor", "plan", "Chat", "Result"),
    "tropism.methods": ("GRPO", "SFT"),
    "tropism.config": ("Recipe", "Stage", "Model", "Sampling", "Train", "Eval", "Data", "Named", "Success"),
    "tropism.envs.check": ("check_env",),
    "tropism.types": ("Task", "Ask", "Env", "Turn", "Rollout", "Failure"),
    "tropism.errors": ("TropismError", "ConfigError", "CheckFailed", "GuardStopped"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "train",
    "evaluate",
    "sample",
    "doctor",
    "plan",
    "check_env",
    "Chat",
    "Result",
    "GRPO",
    "SFT",
    "Recipe",
    "Stage",
    "Model",
    "Sampling",
    "Train",
    "Eval",
    "Data",
    "Named",
    "Success",
    "Task",
    "Ask",
    "Env",
    "Turn",
    "Rollout",
    "Failure",
    "TropismError",
    "ConfigError",
    "CheckFailed",
    "GuardStopped",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'tropism' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
