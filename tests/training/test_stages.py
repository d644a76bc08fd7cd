"""Stages: each starts from the one before, or from an earlier one that it names."""

import pytest

import tropism
import world
from again import same, train_until
from tropism.errors import ConfigError
from tropism.record import Run


def three(folder, start="demos"):
    recipe = world.sft(folder, train={"steps": 2})
    rl = world.grpo(folder, train={"steps": 3})["stages"][0]
    recipe["stages"] += [rl, rl | {"name": "again", "start": start}]
    return recipe


def evaluated(run, stage):
    return [line["eval/low"] for line in Run(run / stage).metrics() if "eval/low" in line]


def test_a_stage_may_start_from_an_earlier_one_and_a_resume_knows(tmp_path, monkeypatch):
    run = tropism.train(three(tmp_path / "whole"), quiet=True).path
    demos, rl, again = (evaluated(run, stage) for stage in ("demos", "rl", "again"))
    assert demos[-1] == rl[0] == again[0] != rl[-1]
    train_until(three(tmp_path / "dead"), 2, monkeypatch)
    tropism.train(three(tmp_path / "dead"), resume=True, quiet=True)
    same(tmp_path / "dead" / "run", run, "again")


def test_without_a_name_it_starts_from_the_one_before(tmp_path):
    run = tropism.train(three(tmp_path, start=""), quiet=True).path
    assert evaluated(run, "again")[0] == evaluated(run, "rl")[-1] != evaluated(run, "demos")[-1]


@pytest.mark.parametrize("start", ["again", "later", "rl.x"])
def test_a_stage_that_is_not_there_yet_is_refused(start, tmp_path):
    with pytest.raises(ConfigError, match=r"stage 'again' starts from .*, but the stages before it are: demos, rl"):
        tropism.train(three(tmp_path, start), quiet=True)
