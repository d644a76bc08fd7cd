"""The same loss and advantages as TRL 1.16.0's GRPOTrainer and RLOOTrainer, whose own code computes the other side.

A two-layer Llama made from a config; TRL's `_compute_loss` gets our advantages and log-probabilities. Its
`use_bias_correction_kl` is off: the penalty is the paper's k3 (arXiv:2402.03300, eq. 4), not k3 times the ratio.
"""

import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.rloo_trainer import add_fused_lm_head

from toy import parted
from tropism.maths.advantage import group_relative
from tropism.maths.surrogate import cispo
from tropism.methods.cispo import CISPO
from tropism.methods.dapo import DAPO
from tropism.methods.dr_grpo import DrGRPO
from tropism.methods.gdpo import GDPO
from tropism.methods.grpo import GRPO
from tropism.methods.gspo import GSPO
from tropism.methods.rloo import RLOO
from tropism.types import Batch, Credit, Output

close = torch.testing.assert_close
ROWS, PROMPT, REPLY, V = 8, 3, 6, 11
LENGTHS = (6, 3, 1, 5, 2, 6, 4, 4)


def trainer(folder, kind=GRPOTrainer, reward=None, **settings):
    words = Tokenizer(WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    if kind is GRPOTrainer:
        settings["use_bias_correction_kl"] = False
    args = (GRPOConfig if kind is GRPOTrainer else RLOOConfig)(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_generations=4,
        max_completion_length=REPLY,
        use_cpu=True,
        bf16=False,
        report_to=[],
        **settings,
    )
    made = kind(
        model=tiny(),
        args=args,
        reward_funcs=reward or (lambda completions, **_: [0.0] * len(completions)),
        train_dataset=Dataset.from_list([{"prompt": "2 3"}] * ROWS),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def tiny(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=2, initializer_range=0.5, **shape)).double()


def same_numbers():
    """(TRL's inputs, our batch) of one generation: stale log-probabilities up to a factor of 1.6 away."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, V, (ROWS, PROMPT + REPLY), generator=draw)
    reply = torch.arange(REPLY) < torch.tensor(LENGTHS)[:, None]
    mask = torch.cat([torch.zeros(ROWS, PROMPT, dtype=torch.bool), reply], 1)
    now = logps(tiny(), tokens).detach()
    old, ref = (now + s * torch.randn(now.shape, generator=draw, dtype=torch.float64) for s in (0.25, 0.5))
    number = torch.arange(ROWS)
    reward = torch.randn(ROWS, generator=draw, dtype=torch.float64)
    batch = Batch(
        tokens=tokens,
        length=mask.long().cumsum(1).argmax(1) + 1,
        action_mask=mask,
        token_reward=torch.zeros_like(now),
        turn=mask.long() - 1,
        reward=reward,
        success=reward > 0,
        truncated=number < 0,
        group=number // 4,
        episode=number,
        role=number * 0,
        domain=number * 0,
        proximal_logp=old * mask,
        behavior_logp=old * mask,
        reference_logp=ref * mask,
    )
    inputs = {
        "prompt_ids": tokens[:, :PROMPT],
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": tokens[:, PROMPT:],
        "completion_mask": reply.long(),
        "advantages": group_relative(batch.reward, batch.group, batch.episode),
        "old_per_token_logps": old[:, PROMPT:],
        "ref_per_token_logps": ref[:, PROMPT:],
        "num_items_in_batch": reply.sum(),
    }
    return inputs, batch


def logps(model, tokens):
    """[N, T], entry t about token t; 0 for the first."""
    said = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(tokens), 1, dtype=said.dtype), said], 1)


def slopes(model, loss):
    """One flat gradient of all weights."""
    model.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def mine(method, batch, advantages):
    """(loss, gradient, its TokenLoss) of our side."""
    model = tiny()
    logp = logps(model, batch.tokens) * batch.action_mask
    credit = Credit(advantages[:, None] * batch.action_mask)
    loss = method.loss(Output(logp=logp, entropy=torch.zeros_like(logp)), batch, credit)
    found = (loss.values * method.weights(batch)).sum()
    return found.detach(), slopes(model, found), loss


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"loss_type": "grpo"}, GRPO()),
        ({"loss_type": "grpo"}, GRPO(kl=0.1)),
        ({"loss_type": "grpo", "delta": 1.5}, GRPO(dual_clip=1.5)),
        ({"loss_type": "bnpo"}, GRPO(average="token")),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, GRPO(average="token", clip_high=0.28, kl=0.1)),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, DAPO()),
        ({"loss_type": "dr_grpo"}, DrGRPO(longest=REPLY)),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
            GSPO(),
        ),
        ({"loss_type": "cispo", "epsilon_high": 1.2}, CISPO(clip_high=0.2)),
    ],
    ids=["grpo", "grpo_kl", "delta", "bnpo", "dapo_kl", "dapo", "dr_grpo", "gspo", "cispo"],
)
def test_loss_and_gradient_are_those_of_trl(settings, method, tmp_path):
    inputs, batch = same_numbers()
    theirs = trainer(tmp_path, **settings)
    theirs.beta = getattr(method, "kl", 0.0)  # set late: else the constructor would look for the reference on the hub
    expected = theirs._compute_loss(theirs.model, inputs)
    found, slope, loss = mine(method, batch, inputs["advantages"])
    clipped, weights = loss.metrics["clip_ratio/region_mean"], method.weights(batch)
    assert 0.1 < (clipped * weights).sum() / weights.sum() < 0.9
    close(found, expected.detach(), atol=1e-6, rtol=0)
    close(slope, slopes(theirs.model, expected), atol=1e-6, rtol=0)
    assert slope.abs().max() > 1e-3


def test_what_trl_calls_cispo_by_default_has_no_weight_above_a_fifth(tmp_path):
    """Its cap is absolute, so 0.2 is a fifth of the policy gradient; ours is relative: arXiv:2506.13585, eq. 5."""
    inputs, batch = same_numbers()
    theirs = trainer(tmp_path, loss_type="cispo")
    expected = slopes(theirs.model, theirs._compute_loss(theirs.model, inputs))
    assert (mine(CISPO(clip_high=0.2), batch, inputs["advantages"])[1] - expected).abs().max() > 1e-3
    model = tiny()
    logp = logps(model, batch.tokens) * batch.action_mask
    credit = inputs["advantages"][:, None] * batch.action_mask
    capped, _ = cispo(logp, logp - batch.proximal_logp, credit, low=1.0, high=-0.8)
    close(slopes(model, (capped * CISPO().weights(batch)).sum()), expected, atol=1e-6, rtol=0)


def test_a_sequence_ratio_under_trls_default_average_is_not_gspo(tmp_path):
    """TRL warns and goes on: loss_type="dapo" then counts an answer by its length."""
    inputs, batch = same_numbers()
    limits = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    theirs = trainer(tmp_path, loss_type="dapo", **limits)
    expected = theirs._compute_loss(theirs.model, inputs).detach()
    assert (mine(GSPO(), batch, inputs["advantages"])[0] - expected).abs() > 1e-2


def test_rloo_has_trls_gradient_until_trl_clips_the_product_of_all_ratios(tmp_path):
    """Every token 4 % likelier where the answer was good, less likely where not: nothing for TRL's longer answers."""
    inputs, batch = same_numbers()
    theirs = trainer(tmp_path, RLOOTrainer, beta=0.0)
    now, advantages = logps(tiny(), batch.tokens).detach(), inputs["advantages"] / 4
    for drift in (0.0, 0.04, 0.5):
        old = (now - drift * advantages.sign()[:, None]) * batch.action_mask
        given = {**inputs, "old_logps": old.sum(1), "advantages": advantages}
        expected = slopes(theirs.model, theirs._compute_loss(theirs.model, given))
        _, found, _ = mine(RLOO(), batch.replace(proximal_logp=old, behavior_logp=old), advantages)
        assert found.abs().max() > 1e-2
        if drift == 0.0:
            close(found, expected, atol=1e-6, rtol=0)
        elif drift == 0.04:
            assert (found - expected).abs().max() > 1e-2 and (expected != 0).any()
        else:
            assert (expected == 0).all()


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_advantages_of_rloo_are_those_of_trl(kl, tmp_path):
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.25, -2.0]
    other = trainer(tmp_path, RLOOTrainer, reward=lambda completions, **_: rewards, beta=0.0)
    other.beta, other.ref_model = kl, tiny(seed=1)
    add_fused_lm_head(other.ref_model, temperature=1.0)
    expected = other._generate_and_score_completions([{"prompt": "2 3"}] * ROWS)
    tokens = torch.cat([expected["prompt_ids"], expected["completion_ids"]], 1)
    mask = torch.cat([torch.zeros_like(expected["prompt_ids"]), expected["completion_mask"]], 1).bool()
    number, reward = torch.arange(ROWS), torch.tensor(rewards, dtype=torch.float64)
    _, batch = same_numbers()
    fields = {name: torch.zeros(tokens.shape) if value.ndim > 1 else value for name, value in batch.tensors()}
    proximal, reference = (logps(tiny(seed), tokens).detach() * mask for seed in (0, 1))
    fields |= {"tokens": tokens, "action_mask": mask, "reward": reward, "group": number // 4, "episode": number}
    batch = batch.replace(**(fields | {"proximal_logp": proximal, "reference_logp": reference}))
    found = RLOO(kl=kl).credit(batch).advantage
    assert expected["advantages"].abs().min() > 1e-3
    close(found, expected["advantages"].double()[:, None] * mask, atol=1e-6, rtol=0)


def test_advantages_of_parts_normalised_before_their_sum_are_those_of_trl(tmp_path):
    """Also where a part does not apply, None."""
    parts = [[1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.25, -2.0], [3.0, None, 0.0, 1.0, 0.0, 2.0, None, 0.5]]
    told = [lambda completions, **_: parts[0], lambda completions, **_: parts[1]]
    settings = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]}
    expected = trainer(tmp_path, reward=told, **settings)._generate_and_score_completions([{"prompt": "2 3"}] * ROWS)
    number = torch.arange(ROWS)
    values = [[math.nan if value is None else value for value in part] for part in parts]
    batch = parted(list(map(list, zip(*values, strict=True))), [1.0, 0.5])
    found = GDPO(scale="sample_std", eps=1e-4).credit(batch.replace(group=number // 4)).advantage.sum(1)
    assert found.abs().min() > 0.1
    close(found, expected["advantages"].double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("theirs", "ours"), [("group", "sample_std"), ("none", "none"), ("batch", "batch_std")])
def test_advantages_are_those_of_trl(theirs, ours, tmp_path):
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.25, -2.0]
    other = trainer(tmp_path, reward=lambda completions, **_: rewards, scale_rewards=theirs)
    expected = other._generate_and_score_completions([{"prompt": "2 3"}] * ROWS)["advantages"]
    number = torch.arange(ROWS)
    found = group_relative(torch.tensor(rewards, dtype=torch.float64), number // 4, number, scale=ours, eps=1e-4)
    assert found.abs().min() > 0.1
    close(found, expected.double(), atol=1e-6, rtol=0)
