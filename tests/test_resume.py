"""N steps are k steps, a kill, and N - k steps: the same weights, rollouts and metrics, bit for bit.

Real kills (SIGKILL, at the places where a run spends its time) happen in processes forked by this file run as a script;
the same end is reached from every single step by an exception that nothing catches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tropism
import world
from again import NAME, RECIPES, Killed, contents, same, train_until
from tropism.config import Model
from tropism.maths.reduce import spread
from tropism.methods.grpo import GRPO
from tropism.record import Run, latest
from tropism.training import checkpoint, learn, ranks
from tropism.training.model import load_policy
from tropism.training.optim import AdamW
from tropism.types import Batch, Credit

STEP = 4
"""A kill happens when this many steps are finished; the last checkpoint is then that of step 3."""


# -------------------------------------------------------------------------------------------------------- real kills


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, due) -> None:
    """Die when `owner.name` is about to be called with arguments for which `due` holds."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if due(*args, **kwargs):
            die()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def now(count: int):
    """True at the count-th call."""
    calls = iter(range(1, count + 1))
    return lambda *_, **__: next(calls, 0) == count


def in_play() -> None:
    from tropism.rollout.play import Episode

    def armed(*_, version=0, **__):
        if version == STEP:
            before(Episode, "tell", now(8))  # the second reply of the second of six episodes
        return False

    before(ranks, "play", armed)


def in_scoring() -> None:
    from tropism.training import scoring

    before(scoring, "score", lambda rollouts, **_: rollouts[0].version == STEP and rollouts[0].task.seed > 0)


def in_reading() -> None:
    from tropism.training.fit import Reading

    before(Reading, "__call__", lambda _, state: state.step == STEP)


def in_measure() -> None:
    before(learn, "measure", lambda batch, *_, **__: batch.step == STEP)


def between_updates() -> None:
    before(AdamW, "step", now(2 * STEP + 2))


def inside_update() -> None:
    before(AdamW, "step", now(STEP + 1))


def inside_write() -> None:
    before(checkpoint, "dump", lambda _, path: ".partial-6" in str(path))


def before_rename() -> None:
    before(os, "replace", lambda old, new: ".partial-6" in str(old))


PLACES = {
    "grpo": [in_play, in_scoring, in_measure, between_updates, inside_write, before_rename],
    "ppo": [in_measure, between_updates, inside_write],
    "sft": [in_reading, in_measure, inside_update, inside_write, before_rename],
}
EVERY = [(kind, place.__name__) for kind, places in PLACES.items() for place in places]


def main(folder: Path) -> None:
    """Start a run for every place, in a process of its own that dies there; what is left is in `folder`."""
    load_policy(Model(**world.MODEL))  # what is imported here is not imported once per place
    ends = {}
    for kind, place in EVERY:
        child = os.fork()
        if child == 0:
            globals()[place]()
            tropism.train(RECIPES[kind](folder / f"{kind}-{place}"), quiet=True)
            os._exit(0)
        ends[f"{kind}-{place}"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / "ends.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert set(json.loads((folder / "ends.json").read_text()).values()) == {-signal.SIGKILL}
    return folder


# ------------------------------------------------------------------------------------------------------------ the proof


def test_the_runs_that_are_compared_learn_and_evaluate_something(whole):
    for kind, run in whole.items():
        record = contents(run, NAME[kind])
        losses = {line["loss"] for line in record["metrics"] if "loss" in line}
        assert len(losses) == 7 and record["state"]["updates"] == (7 if kind == "sft" else 14)
        assert [line["step"] for line in record["metrics"] if "eval/low" in line] == [0, 2, 4, 6, 7]
    weights = load_file(latest(Run(whole["grpo"] / "rl").checkpoints_dir) / "model.safetensors")
    start = load_file(latest(Run(whole["sft"] / "demos").checkpoints_dir) / "model.safetensors")
    assert any((weights[name] - start[name]).abs().max() > 1e-3 for name in weights)
    assert {kind: bool(contents(run, NAME[kind])["critic"]) for kind, run in whole.items()} == {
        "grpo": False,
        "ppo": True,
        "sft": False,
    }


@pytest.mark.parametrize(("kind", "place"), EVERY)
def test_a_killed_run_ends_as_if_it_had_not_been(kind, place, killed, whole):
    folder = killed / f"{kind}-{place}"
    record = Run(folder / "run" / NAME[kind])
    logged = max(line["step"] for line in record.metrics())
    torn = place in ("inside_write", "before_rename")
    assert logged == (6 if torn else STEP)
    assert (record.checkpoints_dir / ".partial-6").exists() == torn
    # With step 4 the best evaluation so far there is a checkpoint of it beside those of every third step.
    start = int(latest(record.checkpoints_dir).name.removeprefix("checkpoint-"))
    assert start in (3, 4) and start <= logged
    tropism.train(RECIPES[kind](folder), resume=True, quiet=True)
    same(folder / "run", whole[kind], NAME[kind])
    assert not (record.checkpoints_dir / ".partial-6").exists()
    aside = [json.loads(line)["step"] for line in record.path.glob("set-aside/1/metrics.jsonl") for line in line.open()]
    assert sorted(set(aside)) == list(range(start + 1, logged + 1))


@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("kind", RECIPES)
def test_whatever_step_a_run_dies_in_it_ends_the_same(kind, step, whole, tmp_path, monkeypatch):
    train_until(RECIPES[kind](tmp_path), step, monkeypatch)
    tropism.train(RECIPES[kind](tmp_path), resume=True, quiet=True)
    same(tmp_path / "run", whole[kind], NAME[kind])


def test_a_run_may_die_more_than_once(whole, tmp_path, monkeypatch):
    train_until(world.grpo(tmp_path), 2, monkeypatch)
    train_until(world.grpo(tmp_path), 5, monkeypatch, resume=True)
    train_until(world.grpo(tmp_path), 6, monkeypatch, resume=True)
    tropism.train(world.grpo(tmp_path), resume=True, quiet=True)
    same(tmp_path / "run", whole["grpo"], "rl")


def test_a_kill_before_the_first_step_starts_again(whole, tmp_path, monkeypatch):
    def dead(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "note", dead)  # the record is there, and nothing in it yet
        tropism.train(world.sft(tmp_path), quiet=True)
    assert (tmp_path / "run" / "demos" / "config.yaml").exists()
    tropism.train(world.sft(tmp_path), resume=True, quiet=True)
    same(tmp_path / "run", whole["sft"], "demos")


def two_stages(folder: Path) -> dict:
    recipe = world.sft(folder, train={"steps": 2})
    recipe["stages"] += world.grpo(folder, train={"steps": 5})["stages"]
    return recipe


def test_a_recipe_that_dies_in_its_second_stage_does_not_redo_the_first(tmp_path, monkeypatch):
    tropism.train(two_stages(tmp_path / "whole"), quiet=True)
    train_until(two_stages(tmp_path / "dead"), 4, monkeypatch)
    first = tmp_path / "dead" / "run" / "demos"
    old = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in first.rglob("*")}
    tropism.train(two_stages(tmp_path / "dead"), resume=True, quiet=True)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in first.rglob("*")} == old
    for stage in ("demos", "rl"):
        same(tmp_path / "dead" / "run", tmp_path / "whole" / "run", stage)


@dataclass(frozen=True, kw_only=True)
class Remembering(GRPO):
    """A running mean as the baseline, and another credit in the domain that was seen first."""

    def credit(self, batch: Batch) -> Credit:
        mean = batch.memory.get("mean", batch.reward.new_zeros(()))
        return Credit(spread((batch.reward - mean) * (1 + batch.domain), batch.action_mask))

    def remember(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"mean": 0.5 * batch.memory.get("mean", 0.0) + 0.5 * batch.reward.mean()}


def test_memory_and_the_codes_of_domains_come_back(tmp_path, monkeypatch):
    def recipe(folder):
        sampling = {"groups": 2, "group_size": 2, "max_tokens": 4}  # so that another domain is first after a resume
        return tropism.api.resolved_recipe(world.grpo(folder, method=Remembering(), sampling=sampling), (), {})

    tropism.train(recipe(tmp_path / "whole"), quiet=True)
    train_until(recipe(tmp_path / "dead"), 4, monkeypatch)
    record = Run(tmp_path / "dead" / "run" / "rl")
    saved = torch.load(record.checkpoints_dir / "checkpoint-3" / checkpoint.STATE, weights_only=False)
    assert saved["memory"]["mean"] != 0
    tropism.train(recipe(tmp_path / "dead"), resume=True, quiet=True)
    same(tmp_path / "dead" / "run", tmp_path / "whole" / "run", "rl")
    assert contents(record.path.parent, "rl")["state"]["domains"] == {"a": 0, "b": 1, "c": 2}


def test_what_a_method_has_learned_of_its_teacher_comes_back(tmp_path, monkeypatch):
    """Every later slope, and the values made with it, depend on the window of tokens that gated remembers."""

    def recipe(folder):
        made = world.grpo(folder, success={"part": "low", "at_least": 0.5})
        teacher = {"reads": ["answer"], "against": ["other"], "must_add": -1}
        made["stages"][0]["method"] = {"gated": {"teacher": teacher}}
        return made

    tropism.train(recipe(tmp_path / "whole"), quiet=True)
    for step in (1, 5):
        train_until(recipe(tmp_path / "dead"), step, monkeypatch, resume=step > 1)
    record = Run(tmp_path / "dead" / "run" / "rl")
    saved = torch.load(record.checkpoints_dir / "checkpoint-3" / checkpoint.STATE, weights_only=False)["memory"]
    assert saved["tokens"][:, 0].unique().tolist() == [0, 1, 2] and len(saved["groups"]) > 0 and saved["fit"][0] != 0
    tropism.train(recipe(tmp_path / "dead"), resume=True, quiet=True)
    same(tmp_path / "dead" / "run", tmp_path / "whole" / "run", "rl")
    slopes = [line["gate/slope"] for line in record.metrics() if "gate/slope" in line]
    assert slopes[0] == 0 and len(set(slopes)) == 7


if __name__ == "__main__":
    main(Path(sys.argv[1]))
