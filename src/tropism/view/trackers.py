"""Metrics for TensorBoard, Weights & Biases or trackio, under the same names as in metrics.jsonl.

Every stage is a run of its own, grouped by the name of the recipe, since each stage counts its steps from 1; a resumed
stage is a further run of that group (TensorBoard continues the old one). The services read their own variables:
WANDB_MODE=offline, WANDB_PROJECT, TRACKIO_DIR, TRACKIO_PROJECT and so on. Nothing is sent unless a recipe asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tropism.errors import ConfigError

if TYPE_CHECKING:
    from tropism.types import Rollout

Name = Literal["tensorboard", "wandb", "trackio"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker:
    """A Watcher that passes every number on, and nothing else."""

    def __init__(self, name: Name, run_name: str, config: Mapping[str, Any], folder: Path = Path("runs")) -> None:
        """`folder`: where TensorBoard and an offline wandb write; trackio has its own place, see TRACKIO_DIR."""
        self.name, self.run_name, self.config, self.folder = name, run_name, dict(config), Path(folder)
        self.log: Callable[[int, Mapping[str, float]], None] | None = None
        self.close: Callable[[], None] | None = None
        try:
            self.module: Any = import_module(MODULES[name])
        except ImportError as error:
            raise ConfigError(
                f"report_to names {name}, but it is not installed ({error}). Install it with "
                "`pip install tropism[track]`, or take it out of report_to; metrics.jsonl is written either way."
            ) from error

    def say(self, text: str, mark: tuple[int, int] = (0, 0)) -> None:
        pass

    def begin(self, stage: str, steps: int, done: int) -> None:
        name = f"{self.run_name}-{stage}" + (f"-from-{done}" if done else "")
        start = {"tensorboard": self._tensorboard, "wandb": self._wandb, "trackio": self._trackio}[self.name]
        self.log, self.close = start(name, stage, done)

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Rollout]) -> None:
        if self.log is not None:
            self.log(step, metrics)

    def end(self, stage: str) -> None:
        if self.close is not None:
            self.close()
        self.log = self.close = None

    def _tensorboard(self, name: str, stage: str, done: int) -> tuple[Any, Any]:
        folder = self.folder / "tensorboard" / stage
        writer = self.module.SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        writer.add_text("config", f"```\n{self.config}\n```", done)

        def log(step: int, metrics: Mapping[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        return log, writer.close

    def _wandb(self, name: str, stage: str, done: int) -> tuple[Any, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", "tropism")
        run = self.module.init(
            project=project, name=name, group=self.run_name, config=self.config, dir=str(self.folder), reinit=True
        )
        # wandb drops what comes for a step that has passed, such as an evaluation after it: our step is a metric, too
        run.define_metric("train_step")
        run.define_metric("*", step_metric="train_step")
        return lambda step, metrics: run.log({**metrics, "train_step": step}), run.finish

    def _trackio(self, name: str, stage: str, done: int) -> tuple[Any, Any]:
        project = os.environ.get("TRACKIO_PROJECT", "tropism")
        only = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        run = self.module.init(project=project, name=name, group=self.run_name, config=self.config, **only)
        return lambda step, metrics: run.log(dict(metrics), step=step), run.finish
