"""Checkpoints: a Hugging Face directory, and beside it everything that resume needs.

    checkpoint-N/            config.json, model.safetensors, tokenizer files: `from_pretrained` loads it
    checkpoint-N/state/      trainer.json (readable), trainer.pt (optimizer, memory, random number generators),
                             weights.pt (float32 weights, only where the directory holds another dtype, or an adapter),
                             critic.pt, teacher.pt (only where the method has a critic, or a teacher that moves)
    checkpoint-N/reward_model/   where the method scores answers: a sequence classifier with one label

A checkpoint is written under another name, flushed to disk and renamed, and renamed again before it is deleted: it is
whole, or it is not there.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from tropism.errors import TropismError
from tropism.record import STATE, saved_in, saving
from tropism.signals.teacher import Tutor
from tropism.training.lora import adapted, load_adapter, moving_state
from tropism.training.model import Policy
from tropism.training.optim import AdamW
from tropism.training.scorer import SCORER, is_scorer, save_scorer
from tropism.types import Rollout


@dataclass
class State:
    """All that moves during a stage, beside weights and optimizer."""

    step: int = 0
    """Finished steps."""
    cursor: int = 0
    """Next task, or next row of data."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What the method remembers."""
    domains: dict[str, int] = field(default_factory=dict)
    """Codes of the domains seen so far."""
    quiet: int = 0
    """Steps in a row without any signal."""
    untaught: int = 0
    """Steps in a row in which the teacher had nothing to say."""
    updates: int = 0
    """Optimizer steps that moved the weights."""
    tokens: int = 0
    """Tokens trained on."""
    best: float | None = None
    """The best value so far of the metric that chooses the best checkpoint."""
    best_step: int = 0
    waiting: tuple[int, list[Rollout]] | None = None
    """The next step's batch, where it is played ahead, and the task that it begins with."""


def save(path: Path, policy: Policy, optimizer: AdamW, state: State, tutor: Tutor | None = None) -> Path:
    """Write checkpoint-N under `path`, whole or not at all. A step that was saved before is not saved again."""
    final = path / f"checkpoint-{state.step}"
    partial = path / f"{PARTIAL}{state.step}"
    if final.exists():
        return final
    for torn in path.glob(f"{PARTIAL}*"):
        shutil.rmtree(torn)
    try:
        with saving(final), disk_errors():
            write(partial, policy, optimizer, state, tutor)
            flush(partial)
            os.replace(partial, final)
            flush(path)
    except TropismError:  # a full disk should not stay full of this
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def write(partial: Path, policy: Policy, optimizer: AdamW, state: State, tutor: Tutor | None) -> None:
    """Everything in `save`'s list, on disk when this returns."""
    facts = dict(vars(state))
    trainer = {"optimizer": optimizer.state_dict(), "random": generators()}
    trainer |= {name: facts.pop(name) for name in ("memory", "waiting")}
    (partial / "state").mkdir(parents=True)
    policy.save(partial)
    if is_scorer(policy):
        save_scorer(policy, partial / SCORER)
    if policy.settings.save != "float32" or adapted(policy.module):
        dump(moving_state(policy.module), partial / EXACT)
    for name, module in beside(policy, tutor).items():
        dump(moving_state(module), partial / "state" / f"{name}.pt")
    dump(trainer, partial / STATE)
    (partial / "state" / "trainer.json").write_text(json.dumps(facts, indent=1))
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
        flush(file)


def beside(policy: Policy, tutor: Tutor | None) -> dict[str, Any]:
    """Modules that move with the policy and are no part of it. A frozen teacher is the stage's start, so not here."""
    critic = {"critic": policy.critic} if policy.critic is not None else {}
    moves = tutor is not None and tutor.teacher.who in ("ema", "synced")
    return critic | ({"teacher": tutor.copy} if tutor is not None and moves else {})


def dump(value: Any, path: Path) -> None:
    """`torch.save`, which hides a full disk behind an error of its own."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextmanager
def disk_errors() -> Iterator[None]:
    """safetensors says why a file could not be written, but not as an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), str(error)) from error


PARTIAL = ".partial-"
EXACT = Path("state") / "weights.pt"


def restore(path: Path, policy: Policy, optimizer: AdamW, tutor: Tutor | None = None) -> State:
    """Bring weights, optimizer and random number generators back; returns the rest."""
    from safetensors.torch import load_model

    device = policy.device
    exact = path / EXACT
    if exact.exists():
        put_back(policy.module, torch.load(exact, map_location=device, weights_only=True))
    else:
        load_model(policy.module, path / "model.safetensors", device=str(device))
    for name, module in beside(policy, tutor).items():
        put_back(module, torch.load(path / "state" / f"{name}.pt", map_location=device, weights_only=True))
    saved = torch.load(path / STATE, map_location="cpu", weights_only=False)
    optimizer.load_state_dict(saved["optimizer"])
    set_generators(saved["random"])
    facts = json.loads((path / "state" / "trainer.json").read_text())
    memory = {name: value.to(device) for name, value in saved["memory"].items()}
    return State(**facts, memory=memory, waiting=saved.get("waiting"))


def prune(path: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` and the best."""
    found = saved_in(path)
    for step in sorted(found)[:-keep]:
        if step != best_step:
            gone = path / f"{PARTIAL}{step}"
            os.replace(found[step], gone)
            shutil.rmtree(gone)


def generators() -> dict[str, Any]:
    """The state of every global random number generator: the library draws from none, a user's reward may."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    found["numpy"] = numpy.random.get_state(legacy=False)  # noqa: NPY002
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def put_back(module: Any, state: dict[str, Tensor]) -> None:
    load_adapter(module, state) if adapted(module) else module.load_state_dict(state)


def set_generators(saved: dict[str, Any]) -> None:
    random.setstate(saved["python"])
    numpy.random.set_state(saved["numpy"])  # noqa: NPY002
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
