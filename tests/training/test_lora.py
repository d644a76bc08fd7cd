"""Adapters: equal to peft's own, off they are the start, they learn, resume and reach the sampler."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tropism
import world
from again import same, train_until
from small import FAMILIES, rollout, small, turn
from tropism.config import Lora, Model, Train
from tropism.errors import CheckFailed, ConfigError
from tropism.record import Run, latest
from tropism.training.collate import collate
from tropism.training.examine import perturbed
from tropism.training.lora import adapter_state, follower_of, merged_state
from tropism.training.model import load_policy
from tropism.training.optim import AdamW
from tropism.training.scorer import Scorer, save_scorer

peft = pytest.importorskip("peft")
close = torch.testing.assert_close
families = pytest.mark.parametrize("family", FAMILIES)


def batch():
    made = [rollout(turn([1, 2, 3], [4, 5, 6])), rollout(turn([7], [8, 9, 10, 11, 12])), rollout(turn([9, 9], [5]))]
    return collate(made, codes={})


def logp(policy, start=False):
    return policy.measuring(1.0, Train(), start=start)(batch()).logp


@pytest.fixture
def adapted(tmp_path):
    """A policy with an adapter that says something, on a base that lies in a directory."""

    def make(family="tiny", **lora):
        small(family, seed=3).save(tmp_path / "base")
        policy = load_policy(Model(path=str(tmp_path / "base"), device="cpu", lora=Lora(rank=4, **lora)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in adapter_state(policy.module).values():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        return policy

    return make


@families
def test_an_adapter_starts_as_nothing_and_off_it_is_the_start(family, adapted, tmp_path):
    policy = adapted(family)
    base = logp(load_policy(Model(path=str(tmp_path / "base"), device="cpu")))
    fresh = load_policy(Model(path=str(tmp_path / "base"), device="cpu", lora=Lora()))
    assert torch.equal(logp(fresh), base) and torch.equal(logp(policy, start=True), base)
    assert (logp(policy) - base).abs().max() > 0.01, "on again"


@families
def test_a_saved_adapter_is_what_peft_and_transformers_load(family, adapted, tmp_path):
    policy = adapted(family)
    policy.save(tmp_path / "saved")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "saved").iterdir()
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        own = policy.module(ids).logits
        close(theirs(ids).logits, own, rtol=0, atol=1e-5)
        close(plain(ids).logits, own, rtol=0, atol=1e-5)
    close(logp(load_policy(Model(path=str(tmp_path / "saved"), device="cpu"))), logp(policy), rtol=0, atol=1e-5)


def test_an_adapter_on_an_adapter_is_loaded_with_both(adapted, tmp_path):
    """By the next stage, and by peft, which takes a whole model: that is written beside."""
    adapted().save(tmp_path / "first")
    policy = load_policy(Model(path=str(tmp_path / "first"), device="cpu", lora=Lora(rank=2)), seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter_state(policy.module).values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    for name in ("second", "again"):
        policy.save(tmp_path / name)
    again = load_policy(Model(path=str(tmp_path / "second"), device="cpu"))
    close(logp(again), logp(policy), rtol=0, atol=1e-5)
    base = json.loads((tmp_path / "second" / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "second").eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        close(theirs(ids).logits, policy.module(ids).logits, rtol=0, atol=1e-5)
    (tmp_path / "first" / "adapter_config.json").rename(tmp_path / "gone.json")
    close(logp(load_policy(Model(path=str(tmp_path / "again"), device="cpu"))), logp(policy), rtol=0, atol=1e-5)


@families
def test_a_merged_checkpoint_is_a_plain_model_that_says_the_same(family, adapted, tmp_path):
    policy = adapted(family, merge=True)
    policy.save(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert not any("lora" in name for name in plain.state_dict())
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        close(plain(ids).logits, policy.module(ids).logits, rtol=0, atol=1e-5)
    assert (tmp_path / "saved" / "adapter" / "adapter_config.json").exists()
    assert set(merged_state(policy.module)) == set(plain.state_dict())


def test_a_reward_model_with_an_adapter_is_saved_merged(adapted, tmp_path):
    policy = adapted()
    policy.add_critic(bias=False)
    torch.nn.init.normal_(policy.critic.weight)
    save_scorer(policy, tmp_path / "rm")
    with torch.no_grad():
        own = policy.critic(policy.module.base_model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1])
    assert Scorer(str(tmp_path / "rm"))([[5, 6, 7]])[0] == pytest.approx(float(own), abs=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "gpt2" not in family])
def test_weights_in_four_bits_say_nearly_the_same_and_merged_what_was_trained(family, adapted, tmp_path):
    policy = adapted(family, quantize=True)
    layers = [
        m for m in policy.module.modules() if type(m).__name__ == "Linear4bit" and hasattr(m.weight, "quant_state")
    ]
    assert layers and all(layer.weight.dtype == torch.uint8 for layer in layers)
    base = logp(load_policy(Model(path=str(tmp_path / "base"), device="cpu")))
    rounding = (logp(policy, start=True) - base).abs().max()
    assert 0 < rounding < 1 and (logp(policy) - logp(policy, start=True)).abs().max() > 0.01
    state = merged_state(policy.module)
    plain = load_policy(Model(path=str(tmp_path / "base"), device="cpu"))
    plain.module.load_state_dict(state)
    close(logp(plain), logp(policy), rtol=0, atol=1e-4)


def test_an_adapter_on_four_bits_learns_and_is_saved_as_any_other(tmp_path):
    run = tropism.train(recipe(tmp_path, {"grpo": {"kl": 0.1}}, quantize=True), quiet=True)
    lines = [line for line in Run(run.path / "rl").metrics() if "loss" in line]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 1e-5
    whole = load_policy(Model(path=str(run.path), device="cpu"))
    base = load_policy(Model(path=str(tmp_path / "run"), device="cpu"))
    assert (logp(whole) - logp(base)).abs().max() > 1e-3


def test_a_model_without_linear_layers_cannot_be_held_in_four_bits(adapted):
    with pytest.raises(ConfigError, match="no linear layers that could be held in 4 bits"):
        adapted("tiny-gpt2", quantize=True)


def test_only_the_adapter_learns_and_a_follower_copies_nothing_else(adapted):
    policy = adapted()
    moving = AdamW(policy.module, Train()).parameters
    assert len(moving) == len(adapter_state(policy.module)) and sum(p.numel() for p in moving) < 0.5 * sum(
        p.numel() for p in policy.module.parameters()
    )
    copy = follower_of(policy.module)
    shared = {id(p) for p in policy.module.parameters()} & {id(p) for p in copy.parameters()}
    assert len(shared) == len(list(policy.module.parameters())) - len(moving)
    assert not any(p.requires_grad for p in copy.parameters())


def test_the_doctor_moves_the_adapter_alone_and_sees_that_rollouts_change(adapted):
    policy = adapted()
    with torch.no_grad():
        for name, value in adapter_state(policy.module).items():
            if "lora_B" in name:
                value.zero_()
    before, frozen = logp(policy), [p.clone() for p in policy.module.parameters() if not p.requires_grad]
    with perturbed(policy):
        assert (logp(policy) - before).abs().max() > 1e-3
        assert all(
            torch.equal(a, p)
            for a, p in zip(frozen, [p for p in policy.module.parameters() if not p.requires_grad], strict=True)
        )
    assert torch.equal(logp(policy), before)


def recipe(folder, method=None, **lora):
    """Demonstrations to the whole model; then a method on an adapter, in a run of its own."""
    made = world.sft(folder, train={"steps": 4})
    if not (folder / "run").exists():
        tropism.train(made, quiet=True)
    rl = world.grpo(folder, train={"steps": 4, "save_every": 2})
    rl["model"] = {"path": str(folder / "run"), "device": "cpu", "lora": {"rank": 4, **lora}}
    rl["stages"][0]["train"] |= {"learning_rate": 1e-2, "mini_batches": 1, "epochs": 1}
    if method:
        rl["stages"][0]["method"] = method
    return rl | {"name": "adapter"}


def test_a_run_trains_the_adapter_and_the_reference_is_its_start(tmp_path):
    run = tropism.train(recipe(tmp_path, {"grpo": {"kl": 0.1}}), quiet=True)
    lines = [line for line in Run(run.path / "rl").metrics() if "loss" in line]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 1e-5
    told = json.loads((run.model / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"].endswith("checkpoint-4") and not (run.model / "model.safetensors").exists()
    policy = load_policy(Model(path=str(run.path), device="cpu"))
    assert (logp(policy) - logp(load_policy(Model(path=str(tmp_path / "run"), device="cpu")))).abs().max() > 1e-3


METHODS = {
    "grpo": ({"grpo": {"kl": 0.1}}, {}),
    "merged": ({"grpo": {}}, {"merge": True}),
    "four bits": ({"grpo": {"kl": 0.1}}, {"quantize": True}),
    "four bits, merged": ({"grpo": {}}, {"quantize": True, "merge": True}),
    "ppo": ({"ppo": {}}, {}),
    "ema": ({"rlsd": {"teacher": {"reads": ["answer"], "who": "ema", "must_add": -1, "closing": ""}}}, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_as_if_it_had_not_been(name, tmp_path, monkeypatch):
    method, lora = METHODS[name]
    for way in ("whole", "dead"):
        made = recipe(tmp_path, method, **lora) | {"output": str(tmp_path / way)}
        if way == "dead":
            train_until(made, 3, monkeypatch, stage="rl")
        tropism.train(made, resume=way == "dead", quiet=True)
    runs = [tmp_path / way / "adapter" for way in ("dead", "whole")]
    ends = [latest(Run(run / "rl").checkpoints_dir) for run in runs]
    exact = [torch.load(end / "state" / "weights.pt") for end in ends]
    assert exact[0].keys() == exact[1].keys() and all(torch.equal(exact[0][k], exact[1][k]) for k in exact[0])
    assert all("lora_" in key for key in exact[0])
    losses = [[line["loss"] for line in Run(run / "rl").metrics() if "loss" in line] for run in runs]
    assert losses[0] == losses[1] and len(set(losses[0])) > 1
    if name == "merged":
        same(*runs, "rl")


def test_a_stage_after_an_adapter_starts_from_what_it_learned(tmp_path):
    made = recipe(tmp_path)
    made["stages"].append(made["stages"][0] | {"name": "more"})
    run = tropism.train(made, quiet=True).path
    ends = [[line["eval/low"] for line in Run(run / stage).metrics() if "eval/low" in line] for stage in ("rl", "more")]
    assert ends[0][-1] == pytest.approx(ends[1][0])
    told = json.loads((latest(Run(run / "more").checkpoints_dir) / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"].endswith("/more/checkpoints/adapters-base")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"path": "tiny", "lora": {}}, "preset tiny, whose weights are random"),
        ({"lora": {"rank": 0}}, "lora.rank is 0"),
        ({"lora": {"alpha": 0.0}}, "lora.alpha is 0.0"),
        ({"lora": {"targets": ["nonesuch"]}}, "model.lora.targets is nonesuch"),
    ],
)
def test_what_cannot_be_adapted_is_said(model, says, tmp_path):
    made = recipe(tmp_path)
    made["model"] |= model
    with pytest.raises((ConfigError, CheckFailed), match=says):
        tropism.train(made, quiet=True)
