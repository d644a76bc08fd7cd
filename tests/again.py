"""Runs that die, and what must be the same after they were resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tropism
import world
from tropism.record import Run, latest, saved_in
from tropism.training import learn, run

RECIPES = {"grpo": world.grpo, "ppo": world.ppo, "sft": world.sft}


class Killed(BaseException):
    """Nothing catches this, so the run ends as if the process had."""


def contents(run: Path, stage: str) -> dict:
    """All of a stage that must not depend on kills."""
    record = Run(run / stage)
    last = latest(record.checkpoints_dir)
    lines = [{name: value for name, value in line.items() if "time/" not in name} for line in record.metrics()]
    kinds = ("train", "eval")
    return {
        "weights": (last / "model.safetensors").read_bytes(),
        "state": json.loads((last / "state" / "trainer.json").read_text()),
        "critic": {name: value.tolist() for name, value in critic_of(last).items()},
        "checkpoints": sorted(saved_in(record.checkpoints_dir)),
        "metrics": lines,
        "rollouts": {(k, n): record.rollouts(n, k).to_pylist() for k in kinds for n in record.recorded(k)},
        "best": record.notes()["best"],
    }


def critic_of(last: Path) -> Mapping[str, Tensor]:
    """Weights of the value head beside a checkpoint; none where the method has none."""
    path = last / "state" / "critic.pt"
    return torch.load(path) if path.exists() else {}


def same(run: Path, other: Path, stage: str) -> None:
    found, wanted = contents(run, stage), contents(other, stage)
    for part in wanted:
        assert found[part] == wanted[part], part


NAME = {"grpo": "rl", "ppo": "rl", "sft": "demos"}


def train_until(recipe: object, step: int, monkeypatch, *, stage: str = "", **how) -> None:
    """Train until `step` steps of that stage, else of any, are finished and one more is due; then stop dead."""
    learnt, staged, now = learn.update, run.run_stage, []

    def update(batch, *args, **kwargs):
        if batch.step == step and stage in ("", now[-1]):
            raise Killed
        return learnt(batch, *args, **kwargs)

    def run_stage(recipe, stage, *args):
        now.append(stage.name)
        return staged(recipe, stage, *args)

    with monkeypatch.context() as patch:
        patch.setattr(learn, "update", update)
        patch.setattr(run, "run_stage", run_stage)
        with pytest.raises(Killed):
            tropism.train(recipe, quiet=True, **how)
