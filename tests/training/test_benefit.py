"""The doctor asks a self-teacher whether it can use what it reads, before a run believes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

import secret
import world
from tropism import train
from tropism.api import Lines, doctor, resolved_recipe
from tropism.config import Data, Named, Told
from tropism.errors import CheckFailed
from tropism.methods.grpo import GRPO
from tropism.methods.sft import SFT
from tropism.teacher import Teacher
from tropism.training import benefit
from tropism.training.examine import examine
from tropism.training.model import load_policy
from tropism.training.run import open_job
from tropism.types import Needs

READS = Teacher(reads=("tells",), against=("lies",), say={"tells": "{}"}, closing="")


@dataclass(frozen=True, kw_only=True)
class Taught(GRPO):
    """GRPO that also measures a teacher."""

    teacher: Teacher = READS
    needs = Needs(measured=frozenset({"proximal_logp", "teacher_logp"}), sampling=frozenset({"siblings"}))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A model that says what it is told, and any digit where it is told nothing."""
    folder = tmp_path_factory.mktemp("reader")
    told = Told(teacher=READS, share=0.8)
    result = train(
        SFT(),
        data=Data(demos=Named(name=f"{secret.HERE}:Secret"), episodes=500, told=told),
        model=world.MODEL,
        name="reader",
        output=str(folder),
        train={"steps": 150, "batch": 32, "learning_rate": 1e-2, "threads": 1},
        quiet=True,
    )
    return str(result.model)


def job(model, teacher=READS, **changes):
    stage = {
        "name": "rl",
        "method": Taught(teacher=teacher),
        "env": f"{secret.HERE}:Secret",
        "success": {"part": "right"},
        "sampling": {"groups": 4, "group_size": 2, "max_tokens": 4},
    } | changes
    raw = {"name": "run", "model": world.MODEL | {"path": model, "shape": {}}, "stages": [stage]}
    recipe = resolved_recipe(raw, (), {})
    policy = load_policy(recipe.model, seed=0)
    return open_job(recipe, recipe.stages[0], recipe.model, policy, Path("unused"), Lines())


def test_a_model_that_can_read_is_told_apart_by_no_right_and_wrong_hints(reader):
    opened = job(reader)
    shares = benefit.successes(opened, opened.draw)
    assert shares["of"] == benefit.TASKS * 2
    assert shares["no hint"] < 0.3 and shares["right hint"] > 0.9 and shares["wrong hint"] < 0.1
    line = benefit.check(opened)
    assert line.startswith("teacher: no hint ") and f"right hint {shares['right hint']:.1%}" in line
    examine(opened)
    assert line in opened.watcher.lines


def test_a_model_that_cannot_read_stops_the_run(reader):
    opened = job(reader)
    untaught = load_policy(resolved_recipe(world.grpo("x"), (), {}).model, 0)
    fresh = dataclasses.replace(opened, policy=untaught)
    fresh = dataclasses.replace(fresh, draw=dataclasses.replace(opened.draw, policy=fresh.policy))
    with pytest.raises(CheckFailed, match=r"cannot use what it reads: of 96 turns .* adds 0 points, less than 10"):
        benefit.check(fresh)
    tolerant = dataclasses.replace(READS, must_add=-1.0)
    stage = dataclasses.replace(fresh.stage, method=Taught(teacher=tolerant))
    assert "right hint" in benefit.check(dataclasses.replace(fresh, stage=stage))


def test_the_doctor_does_not_ask_an_untaught_model_what_a_later_stage_will_be_taught():
    """`tropism doctor` of a recipe whose first stage teaches to read, on the model that this stage starts from."""
    rl = {"name": "rl", "method": Taught(), "env": f"{secret.HERE}:Secret", "success": {"part": "right"}}
    rl["sampling"] = {"groups": 4, "group_size": 2, "max_tokens": 4}
    sft = {"name": "sft", "method": "sft", "data": {"demos": f"{secret.HERE}:Secret", "episodes": 8}}
    raw = {"name": "run", "model": world.MODEL}
    lines = doctor(resolved_recipe(raw | {"stages": [sft, rl]}, (), {}))
    assert "teacher: whether its hints help is asked when the stage starts, of the model that it starts from" in lines
    with pytest.raises(CheckFailed, match="cannot use what it reads"):
        doctor(resolved_recipe(raw | {"stages": [rl]}, (), {}))


def test_an_inverted_hint_stops_the_run_too(reader):
    liar = Teacher(reads=("lies",), say={"lies": "{}"}, closing="")
    with pytest.raises(CheckFailed, match="cannot use what it reads"):
        benefit.check(job(reader, liar))


@pytest.mark.parametrize(
    ("teacher", "changes", "says"),
    [
        (READS, {"success": None}, "does not say what a success is"),
        (READS, {"success": {"part": "elsewhere"}}, "does not say what a success is"),
        (dataclasses.replace(READS, against=(), reads=("follow_up",)), {}, "found nothing to read"),
    ],
)
def test_what_cannot_be_checked_is_said(reader, teacher, changes, says):
    assert says in benefit.check(job(reader, teacher, **changes))


def test_another_model_or_one_that_reads_nothing_needs_no_check(reader):
    assert benefit.check(job(reader, Teacher(who=reader, reads=("tells",)))) is None
    assert benefit.check(job(reader, Teacher(who="frozen"))) is None
