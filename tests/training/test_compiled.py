"""Norms and MLPs by torch.compile: the same numbers to rounding, a copy runs its own weights, a resume is exact."""

from __future__ import annotations

import copy

import pytest
import torch

import tropism
import world
from again import same, train_until
from small import small
from tropism.config import Lora, Model
from tropism.errors import ConfigError
from tropism.training import compiled
from tropism.types import SamplingParams

IDS = torch.tensor([[5, 9, 2, 7, 1], [3, 3, 8, 1, 4], [11, 2, 6, 6, 9]])


def logits(module):
    return module(input_ids=IDS, use_cache=False).logits


def gradient(module):
    logits(module).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("family", ["tiny", "tiny-gemma", "tiny-gpt2"])
def test_logits_and_gradients_are_those_of_the_model_as_it_is(family):
    plain, fast = (small(family, compile=on).module for on in (False, True))
    kinds = {type(part) for part in fast.modules()}
    assert any(type(part) not in kinds for part in plain.modules()), "something is compiled"
    torch.testing.assert_close(logits(fast), logits(plain))
    torch.testing.assert_close(gradient(fast), gradient(plain), atol=1e-6, rtol=1e-4)


def test_a_copy_runs_its_own_weights_and_the_sampler_its_own_code():
    policy = small("tiny", compile=True)
    other, before = copy.deepcopy(policy.module), logits(policy.module)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(0.5 if "norm" in name or "mlp" in name else 1.0)
    assert (logits(other) - before).abs().max() > 0.1
    assert torch.equal(logits(policy.module), before)
    assert policy.sampler.misfit is None
    params = SamplingParams(max_tokens=8, seed=3)
    assert policy.sampler([[1, 2, 3]], params) == small("tiny").sampler([[1, 2, 3]], params)


def test_a_run_that_dies_ends_the_same(tmp_path, monkeypatch):
    def recipe(folder):
        made = world.grpo(folder)
        made["model"] = made["model"] | {"compile": True}
        return made

    whole = tropism.train(recipe(tmp_path / "whole"), quiet=True).path
    train_until(recipe(tmp_path), 4, monkeypatch)
    tropism.train(recipe(tmp_path), resume=True, quiet=True)
    same(tmp_path / "run", whole, "rl")


def test_what_cannot_be_compiled_is_said(monkeypatch):
    with pytest.raises(ConfigError, match=r"model.compile is on and there is an adapter, model.lora"):
        Model(compile=True, lora=Lora())
    with pytest.raises(ConfigError, match="Linear has no part whose class is called"):
        compiled.use(torch.nn.Linear(2, 2), small().precision)

    def as_class(forward):
        return lambda of: type(of.__name__, (of,), {"forward": forward})

    def fails(part, *given):
        raise RuntimeError("no g++\nat all")

    for forward, words in ((fails, r"failed: no g\+\+\. It needs a C\+\+ compiler"), (lambda part, x: x + 1, "differ")):
        monkeypatch.setattr(compiled, "of_kind", as_class(forward))
        with pytest.raises(ConfigError, match=words):
            small("tiny", compile=True)
