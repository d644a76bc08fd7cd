import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tropism
import world
from small import FAMILIES, GPT2, SHAPE, rollout, small, turn
from tropism.config import Model, Train
from tropism.errors import ConfigError
from tropism.record import Run, latest
from tropism.training.collate import collate
from tropism.training.lora import follower_of
from tropism.training.model import load_policy
from tropism.types import SamplingParams

families = pytest.mark.parametrize("family", FAMILIES)


def batch():
    made = [rollout(turn([1, 2, 3], [4, 5, 6])), rollout(turn([7], [8, 9, 10, 11, 12])), rollout(turn([9, 9], [5]))]
    return collate(made, codes={})


def logp(policy, temperature=1.0):
    with torch.no_grad():
        return policy.forward(batch(), temperature).logp


@families
def test_what_is_saved_is_what_from_pretrained_loads(family, tmp_path):
    """Bit for bit: as a policy and in plain transformers, with its tokenizer and chat template."""
    policy = small(family, seed=3)
    policy.save(tmp_path)
    assert torch.equal(logp(load_policy(Model(path=str(tmp_path), device="cpu"))), logp(policy))
    module, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(module.eval()(ids).logits, policy.module(ids).logits)
    messages = [{"role": "user", "content": "é → 漢"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert rendered == policy.words.context(tuple(messages))
    assert module.generation_config.eos_token_id == tokenizer.eos_token_id == policy.words.stop_ids[0]


def test_a_checkpoint_is_a_hugging_face_directory_that_everybody_may_read(tmp_path):
    before = os.umask(0o077)
    try:
        small().save(tmp_path)
    finally:
        os.umask(before)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files)
    assert set(files.values()) == {0o644}


@families
def test_weights_are_saved_in_bfloat16_where_that_is_asked_and_stay_float32_in_memory(family, tmp_path):
    policy = small(family, save="bfloat16")
    policy.save(tmp_path / "half")
    small(family).save(tmp_path / "full")
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")}
    assert size["half"] < 0.6 * size["full"]
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(weight.dtype == torch.float32 for weight in policy.module.parameters())
    again = load_policy(Model(path=str(tmp_path / "half"), device="cpu"))
    for mine, theirs in zip(again.module.parameters(), policy.module.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16).float())


def test_a_hub_id_is_loaded_from_the_offline_cache(tmp_path):
    cache = tmp_path / "hub" / "models--somebody--speaker"
    small().save(cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    code = (
        "from tropism.config import Model\nfrom tropism.training.model import load_policy\n"
        "import torch\n"
        "policy = load_policy(Model(path='somebody/speaker', device='cpu'))\n"
        "print(float(policy.module(torch.tensor([[1, 2, 3]])).logits.detach().abs().sum()), policy.words.chat)\n"
        "try: load_policy(Model(path='somebody/else'))\nexcept Exception as error: print(type(error).__name__, error)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    with torch.no_grad():
        expected = float(small().module(torch.tensor([[1, 2, 3]])).logits.abs().sum())
    assert first == f"{expected} True"
    assert second.startswith("ConfigError model.path 'somebody/else' could not be loaded")


@families
def test_a_directory_without_a_tokenizer_is_refused(family, tmp_path):
    """transformers would make an empty one for most families, and every prompt would be empty."""
    small(family).save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"has a model but no tokenizer.*Copy tokenizer\.json"):
        load_policy(Model(path=str(tmp_path)))


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/place", "runs/a/b", "nowhere/at-all"])
def test_a_directory_that_does_not_exist_is_refused(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no such directory|could not be loaded"):
        load_policy(Model(path=path))


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a model"):
        load_policy(Model(path=str(tmp_path)))


@pytest.mark.parametrize("damage", ["torn", "missing", "config", "tokenizer"])
def test_a_damaged_directory_is_refused(tmp_path, damage):
    small().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "torn":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    else:
        (tmp_path / f"{damage}.json").write_text("{")
    with pytest.raises(ConfigError, match=r"could not be loaded|no tokenizer that can be loaded"):
        load_policy(Model(path=str(tmp_path)))


def test_an_unknown_key_of_the_shape_is_refused():
    with pytest.raises(ConfigError, match=r"model\.shape\.hiden_size is not a setting of qwen3.*hidden_size"):
        load_policy(Model(path="tiny", shape={"hiden_size": 32}))


def test_the_shape_of_given_weights_cannot_be_changed(tmp_path):
    small().save(tmp_path)
    with pytest.raises(ConfigError, match=r"Drop model\.shape, or start from a preset: tiny"):
        load_policy(Model(path=str(tmp_path), shape={"hidden_size": 32}))


def test_a_shape_overrides_the_preset():
    assert small(shape={"num_hidden_layers": 1}).module.config.num_hidden_layers == 1
    assert small().module.config.hidden_size == 32 and small("tiny-gpt2").context == 1024


def test_the_seed_decides_the_weights_of_a_preset_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logp(first), logp(again)) and not torch.equal(logp(first), logp(other))


@families
def test_forward_is_the_log_softmax_of_the_model_at_each_action_token(family):
    policy, rows = small(family), batch()
    found = logp(policy, 0.5)
    for n in range(len(rows)):
        ids = rows.tokens[n, : rows.length[n]]
        with torch.no_grad():
            whole = (policy.module(ids[None]).logits[0] / 0.5).log_softmax(-1)
        for t in range(len(ids)):
            expected = float(whole[t - 1, ids[t]]) if rows.action_mask[n, t] else 0.0
            assert float(found[n, t]) == pytest.approx(expected, abs=1e-4)
    assert (found[~rows.action_mask] == 0).all()


@families
def test_what_stands_in_the_padding_does_not_matter(family):
    policy, rows = small(family), batch()
    beyond = torch.arange(rows.tokens.shape[1]) >= rows.length[:, None]
    dirty = rows.replace(tokens=torch.where(beyond, 99, rows.tokens))
    with torch.no_grad():
        assert torch.equal(policy.forward(dirty).logp, policy.forward(rows).logp)


def test_measuring_is_forward_in_any_number_of_parts():
    policy, rows = small(), batch()
    with torch.no_grad():
        whole = policy.forward(rows, 0.7)
    for tokens in (1, 12, 1000):
        found = policy.measuring(0.7, Train(micro_tokens=tokens))(rows)
        assert found.logp.shape == rows.tokens.shape and not found.logp.requires_grad
        torch.testing.assert_close(found.logp, whole.logp, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.entropy, whole.entropy, atol=1e-5, rtol=0)


def judged(family="tiny-llama", **settings):
    """A policy with a critic that has something to say."""
    policy = small(family, **settings)
    policy.add_critic()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        policy.critic.weight.copy_(torch.randn(policy.critic.weight.shape, generator=generator))
        policy.critic.bias.fill_(0.5)
    return policy


@families
def test_a_value_is_of_the_state_in_which_the_token_was_chosen(family):
    """The head reads the hidden state of the token before, and for `last_value` that of the row's last token."""
    policy, rows = judged(family), batch()
    with torch.no_grad():
        out = policy.forward(rows)
        for n in range(len(rows)):
            ids = rows.tokens[n, : rows.length[n]]
            states = policy.module.base_model(ids[None]).last_hidden_state[0]
            values = states @ policy.critic.weight[0] + 0.5
            assert values.std() > 0.1
            for t in range(rows.tokens.shape[1]):
                expected = float(values[t - 1]) if rows.action_mask[n, t] else 0.0
                assert float(out.value[n, t]) == pytest.approx(expected, abs=1e-4)
            assert float(out.last_value[n]) == pytest.approx(float(values[-1]), abs=1e-4)


@families
def test_a_new_critic_says_zero_and_leaves_the_policy_as_it_was(family):
    policy = small(family)
    before = policy.forward(batch())
    assert before.value is None and before.last_value is None
    policy.add_critic()
    after = policy.forward(batch())
    assert (after.value == 0).all() and (after.last_value == 0).all()
    assert torch.equal(after.logp, before.logp) and torch.equal(after.entropy, before.entropy)


def test_a_critic_reads_the_policy_s_own_weights_alone():
    policy, other = judged(), small(seed=4)
    assert policy.forward(batch(), module=other.module).value is None


@families
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"compute": "bfloat16"}])
def test_the_gradient_of_a_value_reaches_head_and_body(family, settings):
    policy, plain = judged(family, **settings), judged(family)
    found = []
    for one in (policy, plain):
        out = one.forward(batch())
        assert out.value.dtype == torch.float32
        (out.value.sum() + out.last_value.sum()).backward()
        body = [p.grad for p in one.module.parameters() if p.grad is not None]
        found.append((torch.cat([grad.flatten() for grad in body]), one.critic.weight.grad, one.critic.bias.grad))
    (body, weight, bias), wanted = found
    assert body.abs().max() > 1e-3 and weight.abs().max() > 1e-3 and float(bias) == 8 + 3 + 1
    loose = {"rtol": 0.1, "atol": 0.1 * float(wanted[0].abs().max())} if "compute" in settings else {}
    torch.testing.assert_close(body, wanted[0], **loose)


@families
def test_bfloat16_computes_nearly_the_same_and_keeps_float32_weights(family):
    """Eight bits of mantissa: within 0.1 nats, and not equal."""
    half = logp(small(family, compute="bfloat16"))
    difference = (half - logp(small(family))).abs().max()
    assert 0 < difference < 0.1 and half.dtype == torch.float32
    policy = small(family, compute="bfloat16")
    policy.forward(batch()).logp.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.module.parameters())


def gradient(policy):
    out = policy.forward(batch())
    (out.logp.sum() + out.entropy.sum()).backward()
    return torch.cat([weight.grad.flatten() for weight in policy.module.parameters()])


@families
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_gradient_checkpointing_runs_layers_twice_and_gives_the_same_gradient(family, compute):
    runs = {}
    for on in (False, True):
        policy = small(family, gradient_checkpointing=on, compute=compute)
        assert policy.parted  # which reads a few tokens, once
        inner = [part for name, part in policy.module.named_modules() if name.endswith("attn")]
        calls = []
        for part in inner:
            part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        runs[on] = (gradient(policy), len(calls))
    assert runs[True][1] == 2 * runs[False][1] > 0
    torch.testing.assert_close(runs[True][0], runs[False][0], rtol=1e-5, atol=1e-6)


@families
def test_gradient_checkpointing_leaves_the_sampler_alone(family):
    params = SamplingParams(max_tokens=5)
    one, other = (small(family, gradient_checkpointing=on).sampler([[1, 2, 3]], params) for on in (False, True))
    assert one == other


def test_a_copy_of_a_model_that_recomputes_runs_its_own_layers():
    """A frozen teacher must not follow its student."""
    policy = small(gradient_checkpointing=True)
    teacher = policy.measuring(1.0, Train(), follower_of(policy.module))
    before = teacher(batch()).logp
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(0.5)
    assert torch.equal(teacher(batch()).logp, before)
    assert not torch.allclose(logp(policy), before)


def test_recomputing_leaves_the_global_generator_alone():
    """A reward of the next batch may draw from it at the same time (sampling.ahead)."""
    policy = small(gradient_checkpointing=True)
    loss = policy.forward(batch()).logp.sum()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    handle = next(iter(policy.module.parameters())).register_hook(lambda _: torch.rand(1) and None)
    first = torch.rand(1)
    handle.remove()
    loss.backward()
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_dropout_is_off():
    """GPT-2's configuration asks for 10 %; sampler and loss must speak about one distribution."""
    policy = small("tiny-gpt2")
    assert policy.module.config.resid_pdrop == 0.1
    assert torch.equal(gradient(small("tiny-gpt2")), gradient(policy))


@pytest.mark.parametrize(("name", "kind"), [("cpu", {"cpu"}), ("auto", {"cpu", "cuda", "mps"})])
def test_the_device_is_the_one_asked_for(name, kind):
    policy = load_policy(Model(path="tiny-llama", shape=SHAPE, device=name))
    assert policy.device.type in kind
    assert {p.device.type for p in policy.module.parameters()} == {policy.device.type}


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps:7", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=f"model.device is '{name}', which cannot be used here: .*Use auto, or cpu"):
        load_policy(Model(path="tiny-llama", shape=SHAPE, device=name))


def test_presets_have_about_half_a_million_weights():
    for name in FAMILIES:
        count = sum(p.numel() for p in load_policy(Model(path=name, device="cpu")).module.parameters())
        assert 3e5 < count < 8e5, (name, count)
    assert small("tiny-gpt2", shape=GPT2 | {"n_layer": 1}).module.config.n_layer == 1


@families
def test_of_a_model_that_is_backbone_and_head_only_actions_go_through_the_head(family):
    policy, seen = small(family), []
    assert policy.parted
    policy.module.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
    rows = batch()
    assert policy.forward(rows).logp[rows.action_mask].abs().min() > 0 and not seen


def test_a_model_that_caps_its_logits_is_asked_for_them_whole():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=262, num_hidden_layers=1, head_dim=16, final_logit_softcapping=2.0, **shape)
    policy = small()
    policy.module = Gemma2ForCausalLM(config).eval()
    assert not policy.parted
    with torch.no_grad():
        unkept = policy.forward(batch())
    kept = policy.forward(batch())
    assert torch.allclose(unkept.logp, kept.logp, atol=1e-6) and kept.logp.requires_grad


def test_a_run_or_a_stage_stands_for_its_last_checkpoint(tmp_path):
    run = tropism.train(world.sft(tmp_path / "made"), quiet=True).path
    last = latest(Run(run / "demos").checkpoints_dir)
    weights = [load_policy(Model(path=str(path))).module.state_dict() for path in (run, run / "demos", last)]
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=0, atol=0)
