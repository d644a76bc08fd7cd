"""The same loss and advantages as TRL 1.16.0's GRPOTrainer, whose own code computes the other side.

A two-layer Llama made from a config; TRL's `_compute_loss` gets our advantages and log-probabilities. Its
`use_bias_correction_kl` is off: the penalty is the paper's k3 (arXiv:2402.03300, eq. 4), not k3 times the ratio.
"""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from tropism.maths.advantage import group_relative
from tropism.methods.dr_grpo import DrGRPO
from tropism.methods.grpo import GRPO
from tropism.types import Batch, Credit, Output

close = torch.testing.assert_close
ROWS, PROMPT, REPLY, V = 8, 3, 6, 11
LENGTHS = (6, 3, 1, 5, 2, 6, 4, 4)


def trainer(folder, model=None, reward=None, **settings):
    words = Tokenizer(WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_generations=4,
        max_completion_length=REPLY,
        use_cpu=True,
        bf16=False,
        report_to=[],
        use_bias_correction_kl=False,
        **settings,
    )
    made = GRPOTrainer(
        model=model or tiny(),
        args=args,
        reward_funcs=reward or (lambda completions, **_: [0.0] * len(completions)),
        train_dataset=Dataset.from_list([{"prompt": "2 3"}] * ROWS),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def tiny():
    torch.manual_seed(0)
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


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss_type", "method"),
    [
        ("grpo", GRPO(average="sequence")),
        ("dapo", GRPO(average="token", clip_high=0.28)),
        ("dr_grpo", DrGRPO(longest=REPLY)),
    ],
)
def test_loss_and_gradient_are_those_of_trl(loss_type, method, kl, tmp_path):
    inputs, batch = same_numbers()
    if kl:
        if not isinstance(method, GRPO):
            pytest.skip("the paper has no reference")
        method = replace(method, kl=kl)
    theirs = trainer(tmp_path, loss_type=loss_type, epsilon_high=method.clip_high)
    theirs.beta = kl  # set late: with beta > 0 the constructor would look for the reference on the hub
    expected = theirs._compute_loss(theirs.model, inputs)
    expected.backward()

    ours = tiny()
    logp = logps(ours, batch.tokens) * batch.action_mask
    credit = Credit(inputs["advantages"][:, None] * batch.action_mask)
    loss = method.loss(Output(logp=logp, entropy=torch.zeros_like(logp)), batch, credit)
    found = (loss.values * method.weights(batch)).sum()
    found.backward()

    clipped, weights = loss.metrics["clip_ratio/region_mean"], method.weights(batch)
    assert 0.1 < (clipped * weights).sum() / weights.sum() < 0.9
    close(found, expected, atol=1e-6, rtol=0)
    largest = 0.0
    for (name, mine), other in zip(ours.named_parameters(), theirs.model.parameters(), strict=True):
        close(mine.grad, other.grad, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        largest = max(largest, mine.grad.abs().max().item())
    assert largest > 1e-3


@pytest.mark.parametrize(("theirs", "ours"), [("group", "sample_std"), ("none", "none"), ("batch", "batch_std")])
def test_advantages_are_those_of_trl(theirs, ours, tmp_path):
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.25, -2.0]
    other = trainer(tmp_path, reward=lambda completions, **_: rewards, scale_rewards=theirs)
    expected = other._generate_and_score_completions([{"prompt": "2 3"}] * ROWS)["advantages"]
    number = torch.arange(ROWS)
    found = group_relative(torch.tensor(rewards, dtype=torch.float64), number // 4, number, scale=ours, eps=1e-4)
    assert found.abs().min() > 0.1
    close(found, expected.double(), atol=1e-6, rtol=0)
