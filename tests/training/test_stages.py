"""Stages: each starts from the one before, or from an earlier one that it names."""

import pytest
import torch

import tropism
import world
from again import same, train_until
from tropism.errors import ConfigError
from tropism.record import Run
from tropism.training import run as run_module


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


def test_threads_of_one_stage_are_not_the_next_ones(tmp_path, monkeypatch):
    """Else a resume in the second would compute with another number."""
    before, seen = torch.get_num_threads(), []
    real = run_module.run_stage

    def run_stage(*args):
        seen.append(torch.get_num_threads())
        return real(*args)

    monkeypatch.setattr(run_module, "run_stage", run_stage)
    first, second = (world.sft(tmp_path, train={"steps": 1, "threads": n}) for n in (1, 0))
    second["stages"][0]["name"] = "more"
    torch.set_num_threads(3)
    try:
        tropism.train(first | {"stages": [*first["stages"], *second["stages"]]}, quiet=True)
        assert seen == [1, 3] and torch.get_num_threads() == 3
        monkeypatch.setattr(run_module, "run_stage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tropism.train(first, fresh=True, quiet=True)
        assert torch.get_num_threads() == 3, "of a run that failed too"
    finally:
        torch.set_num_threads(before)
