"""How many processes are worth a measurement, and that a machine is asked once."""

import json
import os
from dataclasses import replace

import pytest
import torch

import world
from tropism.api import resolved_recipe
from tropism.config import Model
from tropism.training import cores


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Four threads, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with cores.threads(4):
        yield


def recipe(folder, **sampling):
    made = world.grpo(folder, train={"threads": 0})
    made["stages"][0]["sampling"] |= {"groups": 6} | sampling
    return resolved_recipe(made, (), {})


def test_one_is_tried_for_each_thread_that_has_a_group(tmp_path):
    assert cores.to_try(recipe(tmp_path)) == 4
    assert cores.to_try(recipe(tmp_path, groups=3)) == 3
    assert cores.to_try(resolved_recipe(world.sft(tmp_path, train={"threads": 0, "batch": 2}), (), {})) == 2
    with cores.threads(12):
        assert cores.to_try(recipe(tmp_path, groups=64)) == cores.MOST
    with cores.threads(1):
        assert cores.to_try(recipe(tmp_path)) == 1


def test_none_is_tried_where_processes_cannot_help(tmp_path, monkeypatch):
    assert cores.to_try(recipe(tmp_path, ahead=True)) == 1
    assert cores.to_try(resolved_recipe(world.grpo(tmp_path, train={"threads": 4}), (), {})) == 1
    found = recipe(tmp_path)
    assert cores.to_try(replace(found, model=replace(found.model, device="cuda"))) == 1
    assert cores.to_try(replace(found, model=Model(path="./nowhere"))) == 1, "who opens it says what is wrong"
    monkeypatch.setattr(cores, "LARGE", 1000)
    assert cores.to_try(found) == 1


def test_a_preset_is_counted_without_being_made():
    shape = {"hidden_size": 64, "num_hidden_layers": 1}
    from tropism.training.model import load_policy

    made = load_policy(Model(path="tiny", shape=shape)).module
    assert (
        cores.size(Model(path="tiny", shape=shape))
        == made.num_parameters()
        == sum(p.numel() for p in made.parameters())
    )


def test_a_decision_is_of_one_machine_and_one_size_of_model():
    model = Model(path="tiny")
    assert cores.remembered(model, 4) is None
    cores.remember(model, 4, 1.23456)
    assert cores.remembered(model, 4) == 1.235
    (name,) = json.loads(cores.kept().read_text())
    assert cores.cpu() in name and "4 processes against 4 threads" in name and torch.__version__ in name
    others = [replace(model, compute="bfloat16"), replace(model, shape={"num_hidden_layers": 1})]
    assert [cores.remembered(other, 4) for other in others] == [None, None] and cores.remembered(model, 3) is None
    with cores.threads(2):
        assert cores.remembered(model, 4) is None
    cores.remember(model, 3, 0.5)
    assert cores.remembered(model, 4) == 1.235 and cores.remembered(model, 3) == 0.5
    assert os.listdir(cores.kept().parent) == ["processes.json"]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"it": []}'])
def test_a_file_that_cannot_be_read_is_nothing_remembered(text):
    cores.kept().parent.mkdir(parents=True)
    cores.kept().write_text(text)
    assert cores.remembered(Model(path="tiny"), 2) is None


def test_where_nothing_can_be_kept_nothing_is(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cores.remember(Model(path="tiny"), 2, 1.5)
    assert cores.remembered(Model(path="tiny"), 2) is None
