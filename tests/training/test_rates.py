"""Micro-batches of the size that is fastest here: which one is taken, and that a resumed run keeps it."""

from __future__ import annotations

import pytest
import torch

import tropism
import world
from again import same, train_until
from tropism import api
from tropism.api import resolved_recipe
from tropism.config import Model
from tropism.record import Run
from tropism.training import plan, rates
from tropism.training.model import load_policy


def recipe(folder, micro_tokens=0, **sampling):
    made = world.grpo(folder)
    made["stages"][0]["train"] |= {"micro_tokens": micro_tokens}
    made["stages"][0]["sampling"] |= sampling
    return made


def found(monkeypatch, by_count, **sampling):
    """What is taken where the rate is a function of the number of micro-batches."""
    monkeypatch.setattr(rates, "rate", lambda work, pieces, seconds: by_count(len(pieces)))
    resolved = resolved_recipe(recipe("", groups=16, group_size=32, max_tokens=8, **sampling), (), {})
    policy = load_policy(Model(**world.MODEL))
    return rates.quickest(resolved, resolved.stages[0], policy, resolved.output)


def test_the_smallest_of_the_fastest_sizes_is_taken():
    assert rates.smallest({512: 90.0, 1024: 98.0, 2048: 100.0, 4096: 99.0}) == 1024
    assert rates.smallest({512: 100.0, 1024: 100.0}) == 512


def test_sizes_are_tried_until_one_holds_the_whole_batch(monkeypatch):
    seen = []
    best, line = found(monkeypatch, lambda count: float(seen.append(count) or 100 / count))
    assert seen == sorted(seen, reverse=True) and seen[-1] == 1 and seen[-2] > 1 and len(seen) >= 3
    assert best == rates.SIZES[len(seen) - 1]
    assert f"of {best} tokens" in line and f"{best}: 100" in line


def test_a_size_that_memory_does_not_suffice_for_ends_the_search(monkeypatch):
    def short(count, least):
        if count <= least:
            raise torch.OutOfMemoryError
        return 100 / count

    counts = []
    found(monkeypatch, lambda count: float(counts.append(count) or 1))
    assert found(monkeypatch, lambda count: short(count, counts[1]))[0] == rates.SIZES[0]
    with pytest.raises(torch.OutOfMemoryError):
        found(monkeypatch, lambda count: short(count, counts[0]))


def test_measuring_leaves_the_weights_as_they_were():
    resolved = resolved_recipe(recipe(""), (), {})
    policy, untouched = (load_policy(Model(**world.MODEL), 0) for _ in range(2))
    best, _ = rates.quickest(resolved, resolved.stages[0], policy, resolved.output, seconds=0.01)
    assert best in rates.SIZES
    for one, other in zip(policy.module.parameters(), untouched.module.parameters(), strict=True):
        assert torch.equal(one, other) and one.grad is None


def test_a_run_takes_it_and_a_resumed_one_keeps_it(tmp_path, monkeypatch, capsys):
    def fixed(size):
        monkeypatch.setattr(rates, "quickest", lambda *_, **__: (size, f"micro-batches: of {size} tokens"))

    fixed(16)
    whole = tropism.train(recipe(tmp_path / "whole")).path
    assert "micro-batches: of 16 tokens" in "".join(capsys.readouterr())
    assert Run(whole / "rl").notes()["micro_tokens"] == {"tokens": 16}
    train_until(recipe(tmp_path), 4, monkeypatch)
    fixed(2048)
    tropism.train(recipe(tmp_path), resume=True, quiet=True)
    assert Run(tmp_path / "run" / "rl").notes()["micro_tokens"] == {"tokens": 16}
    same(tmp_path / "run", whole, "rl")
    same(tropism.train(recipe(tmp_path / "given", 16), quiet=True).path, whole, "rl")


def test_a_plan_measures_it_here_and_takes_the_usual_one_for_a_data_sheet(monkeypatch):
    monkeypatch.setattr(plan, "SECONDS", 0.02)
    monkeypatch.setattr(rates, "rate", lambda work, pieces, seconds: float(len(pieces)))
    here, sheet = (next(iter(api.plan(resolved_recipe(recipe(""), (), {}), name))) for name in ("here", "h100"))
    usual = next(iter(api.plan(resolved_recipe(recipe("", 2048), (), {}), "h100")))
    assert sheet.seconds == usual.seconds and here.seconds["learning"] > 0
