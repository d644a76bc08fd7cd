"""What a resume accepts, refuses and says; what a checkpoint holds."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tropism
import world
from again import NAME, Killed, contents, same, train_until
from tropism.config import Model, Train
from tropism.errors import ConfigError
from tropism.record import Run, saved_in
from tropism.training import checkpoint
from tropism.training import run as training
from tropism.training.model import load_policy
from tropism.training.optim import AdamW


def test_a_run_that_saves_bfloat16_resumes_from_float32(tmp_path, monkeypatch):
    def recipe(folder):
        return world.grpo(folder) | {"model": world.MODEL | {"save": "bfloat16"}}

    tropism.train(recipe(tmp_path / "whole"), quiet=True)
    train_until(recipe(tmp_path / "dead"), 4, monkeypatch)
    tropism.train(recipe(tmp_path / "dead"), resume=True, quiet=True)
    same(tmp_path / "dead" / "run", tmp_path / "whole" / "run", "rl")
    last = tmp_path / "dead" / "run" / "rl" / "checkpoints" / "checkpoint-7"
    assert {value.dtype for value in load_file(last / "model.safetensors").values()} == {torch.bfloat16}
    exact, other = (
        torch.load(tmp_path / k / last.relative_to(tmp_path / "dead") / checkpoint.EXACT) for k in ("dead", "whole")
    )
    assert all(value.dtype is torch.float32 for value in exact.values())
    torch.testing.assert_close(exact, other, rtol=0, atol=0)


def test_a_changed_recipe_is_refused_key_by_key(tmp_path, monkeypatch):
    train_until(world.grpo(tmp_path), 4, monkeypatch)
    changed = world.grpo(tmp_path, train={"learning_rate": 2e-2}, sampling={"groups": 4})
    with pytest.raises(ConfigError) as refused:
        tropism.train(changed, resume=True, quiet=True)
    said = str(refused.value)
    assert refused.value.code == 2
    assert "train.learning_rate: 0.01 -> 0.02" in said and "sampling.groups: 3 -> 4" in said
    assert "train.steps" not in said and "output" not in said


def test_a_finished_run_is_not_a_success_again(whole, tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume") as refused:
        tropism.train(world.sft(whole["sft"].parent), resume=True, quiet=True)
    assert refused.value.code != 0


FREED = {"failure_limit": 0.5, "patience": 9, "keep": 3, "save_every": 2, "record_every": 1}


def test_what_moves_no_weight_may_be_changed_on_resume_and_is_said(whole, tmp_path, monkeypatch, capsys):
    train_until(world.grpo(tmp_path), 4, monkeypatch)
    changed = world.grpo(tmp_path, train=FREED) | {"report_to": ["tensorboard"]}
    tropism.train(changed, resume=True)
    said = capsys.readouterr().err
    for key in ("failure_limit: 0.1 -> 0.5", "patience: 20 -> 9", "keep: 2 -> 3", "save_every: 3 -> 2"):
        assert f"rl.train.{key}" in said
    assert "report_to" in said and "record_every" not in said
    found, wanted = contents(tmp_path / "run", "rl"), contents(whole["grpo"], "rl")
    assert all(found[part] == wanted[part] for part in wanted if part != "checkpoints")


@pytest.mark.parametrize(
    ("section", "key", "value"), [("eval", "every", 3), ("eval", "tasks", 2), ("train", "steps", 9)]
)
def test_what_changes_a_number_may_not(section, key, value, whole):
    changed = world.grpo(whole["grpo"].parent, **{section: {key: value}})
    with pytest.raises(ConfigError, match=rf"another recipe(.|\n)*rl.{section}.{key}: \d+ -> {value}"):
        tropism.train(changed, resume=True, quiet=True)


def test_a_run_that_dies_between_its_last_checkpoint_and_its_report_is_finished_by_a_resume(
    whole, tmp_path, monkeypatch
):
    def dead(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tropism.api, "before_and_after", dead)
        tropism.train(world.grpo(tmp_path), quiet=True)
    assert not (tmp_path / "run" / "report.html").exists()
    done = tropism.train(world.grpo(tmp_path), resume=True, quiet=True)
    assert done.report.exists() and done.table[1] and "table" in Run(done.path / "rl").notes()
    same(done.path, whole["grpo"], "rl")
    with pytest.raises(ConfigError, match="nothing to resume"):
        tropism.train(world.grpo(tmp_path), resume=True, quiet=True)


def test_a_kill_inside_the_first_write_of_a_run_does_not_stand_in_the_way(whole, tmp_path, capsys):
    stage = tmp_path / "run" / "demos"
    stage.mkdir(parents=True)
    (stage / ".config.yaml.partial").write_bytes(b"name: r")
    tropism.train(world.sft(tmp_path), resume=True)
    assert f"nothing to resume at {tmp_path / 'run'}: starting" in capsys.readouterr().err
    same(tmp_path / "run", whole["sft"], "demos")


def test_other_versions_and_another_device_are_said_on_resume(tmp_path, monkeypatch, capsys):
    train_until(world.sft(tmp_path), 4, monkeypatch)
    config = tmp_path / "run" / "demos" / "config.yaml"
    kept = yaml.safe_load(config.read_text())
    assert kept["versions"]["device"] == "cpu" and kept["versions"]["datasets"] == metadata.version("datasets")
    config.write_text(yaml.safe_dump(kept | {"versions": kept["versions"] | {"datasets": "0.1", "device": "abacus"}}))
    tropism.train(world.sft(tmp_path), resume=True)
    said = capsys.readouterr().err
    assert "resumed on other ground" in said and "datasets: '0.1' -> " in said and "device: 'abacus' -> 'cpu'" in said


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(training, "DISTRIBUTIONS", ("torch", "tropism-that-nobody-wrote"))
    assert set(training.versions(torch.device("cpu"))) == {"torch", "python", "threads", "device"}


def test_a_checkpoint_is_on_disk_with_its_folder_s_entries_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, real, rename = [], checkpoint.flush, os.replace

    def flush(path):
        flushed.append(path)
        real(path)

    def replace(old, new):
        assert Path(new).name != "checkpoint-0" or {Path(old), *Path(old).rglob("*")} == set(flushed)
        rename(old, new)

    monkeypatch.setattr(checkpoint, "flush", flush)
    monkeypatch.setattr(os, "replace", replace)
    policy = load_policy(Model(**world.MODEL))
    checkpoint.save(tmp_path, policy, AdamW(policy.module, Train()), checkpoint.State())
    assert flushed[-1] == tmp_path and (tmp_path / "checkpoint-0" / checkpoint.STATE).exists()


def test_the_best_checkpoint_is_kept_and_is_the_best(whole):
    for kind, run in whole.items():
        record = Run(run / NAME[kind])
        values = {line["step"]: line["eval/low"] for line in record.metrics() if "eval/low" in line}
        best = record.notes()["best"]
        assert best == {"metric": "eval/low", "value": max(values.values()), "step": max(values, key=values.get)}
        assert best["step"] == 0 or best["step"] in saved_in(record.checkpoints_dir)
