"""How a CPU's cores are best used: processes of one thread against threads, measured once on a machine and remembered.

What is measured differs a little from day to day, and a run of other processes is another run, to rounding. A decision
is therefore kept beside the machine's other caches: a seed gives one run, however often it is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tropism.config import Model, Recipe, Stage
from tropism.errors import ConfigError

SECONDS = 0.7
"""How long each way of using the cores is measured."""
MOST, LARGE = 8, 16_000_000
"""Processes that are tried unless a recipe asks for more, and weights beyond which none are: every process holds all
of them, and so do the passes that are measured."""


def on_cpu(model: Model) -> bool:
    return model.device == "cpu" or (model.device == "auto" and not torch.cuda.is_available())


def groups_of(stage: Stage) -> tuple[str, int]:
    """(key, value) of how many groups a step has, which processes share."""
    if stage.env:
        return "sampling.groups", stage.sampling.groups
    return "train.batch", stage.train.batch


def to_try(recipe: Recipe) -> int:
    """How many processes are worth a measurement where the recipe leaves their number open: one for each thread that
    torch may use here, while every one has a group. 1 where a stage says how many threads it has, plays ahead beside
    training, or computes elsewhere."""
    if not on_cpu(recipe.model) or any(stage.sampling.ahead or stage.train.threads for stage in recipe.stages):
        return 1
    count = min(MOST, torch.get_num_threads(), *(groups_of(stage)[1] for stage in recipe.stages))
    return count if count > 1 and 0 < size(recipe.model) <= LARGE else 1


def size(model: Model) -> int:
    """How many weights it has; 0 if it cannot be opened, which whoever opens it will say."""
    from tropism.training.model import PRESETS, preset, weights_of

    with contextlib.suppress(ConfigError):
        if model.path not in PRESETS:
            return weights_of(model.path)
        with torch.device("meta"):
            return int(preset(model.path, model.shape, 0)[0].num_parameters())
    return 0


# -------------------------------------------------------------------------------------------------------------- memory


def kept() -> Path:
    """Where decisions are; delete the file to measure again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tropism" / "processes.json"


def name_of(model: Model, count: int) -> str:
    """What a decision is about."""
    ways = f"{count} processes against {torch.get_num_threads()} threads"
    return ", ".join((cpu(), ways, f"torch {torch.__version__}", f"{size(model)} weights", model.compute))


def cpu() -> str:
    """The processor's name, as well as the system knows it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def decisions() -> dict[str, float]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads(kept().read_text())
        return {name: float(faster) for name, faster in found.items()} if isinstance(found, dict) else {}
    return {}


def remember(model: Model, count: int, faster: float) -> None:
    """Keep by how much so many processes were faster; nothing where the file cannot be written."""
    with contextlib.suppress(OSError):
        kept().parent.mkdir(parents=True, exist_ok=True)
        new = kept().with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(decisions() | {name_of(model, count): round(faster, 3)}, indent=1) + "\n")
        new.replace(kept())


def remembered(model: Model, count: int) -> float | None:
    return decisions().get(name_of(model, count))


# --------------------------------------------------------------------------------------------------------------- rates


def probe(model: Model) -> Callable[[], None]:
    """A pass forward and back of the model over 32 rows of 48 tokens."""
    from tropism.training.model import load_policy

    module: Any = load_policy(model, 0).module
    tokens = torch.randint(int(module.config.vocab_size), (32, 48), generator=torch.Generator().manual_seed(0))

    def work() -> None:
        module(input_ids=tokens, use_cache=False).logits.logsumexp(-1).sum().backward()
        module.zero_grad(set_to_none=True)

    return work


def rate(work: Callable[[], None]) -> float:
    """How often a second."""
    work()
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        work()
        times += 1
    return times / (time.perf_counter() - began)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch uses so many for as long as this lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
