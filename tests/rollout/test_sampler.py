"""Tolerance where two computations of one number are compared: 1e-4 nats in float32, for attention with a cache and
without sums in another order; 0.1 in bfloat16, which keeps 8 bits."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import small as models
from metal import Metal
from small import FAMILIES, rollout
from tropism.config import Model
from tropism.maths.logp import log_softmax
from tropism.rollout.sampler import Local, draw
from tropism.training.collate import collate
from tropism.training.model import Policy, byte_tokenizer
from tropism.types import Failure, SamplingParams, Stop, Turn

FLOAT32, BFLOAT16 = 1e-4, 0.1
PROMPTS = [[7, 8, 9, 10, 11, 12], [65], [50, 3, 99], [20, 21, 22, 23, 24, 25, 26, 27], [100, 101, 102]]

families = pytest.mark.parametrize("family", [*FAMILIES, "mistral", "qwen2"])
BY_TRANSFORMERS = ("tiny-mistral", "tiny-gpt2")
"""Families here that the lean decoder does not take: a window shorter than the prompts, another architecture."""


def small(family="tiny-llama", shape=None, **settings):
    """Close to uniform, so that replies seldom end by themselves. mistral: without its window; qwen2: no preset."""
    flat = {"initializer_range": 0.02} | (shape or {})
    if family == "qwen2":
        flat |= {"num_hidden_layers": 2, "vocab_size": 300, "tie_word_embeddings": True}
        config = AutoConfig.for_model("qwen2", **models.SHAPE, **flat)
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config)
        return Policy(module, byte_tokenizer(), Model(path="tiny", device="cpu", **settings))
    if family == "mistral":
        return models.small("tiny-mistral", shape=flat | {"sliding_window": None}, **settings)
    return models.small(family, shape=flat, **settings)


def spread(policy, scale=6.0):
    """Sharpen the random logits: close to uniform ones would leave every comparison to rounding."""
    with torch.no_grad():
        policy.module.get_input_embeddings().weight.mul_(scale)
    return policy


def sampler(policy, stop_ids=None, **settings):
    stop_ids = stop_ids or policy.words.stop_ids
    return Local(policy.module, stop_ids, settings.pop("context", policy.context), policy.precision, **settings)


def forwarded(policy, turns, temperature=1.0, top_k=0):
    """The trainer's own numbers for the same tokens."""
    batch = collate([rollout(turn) for turn in turns], codes={})
    if top_k:
        ids = torch.full((*batch.tokens.shape, top_k), -1)
        for row, turn in enumerate(turns):
            start = len(turn.context)
            ids[row, start : start + len(turn.action)] = torch.tensor(turn.topk_ids)
        batch = batch.replace(topk_ids=ids)
    with torch.no_grad():
        out = policy.forward(batch, temperature)
    return batch, out


@families
def test_greedy_tokens_are_those_of_generate(family):
    policy = spread(small(family))
    assert (policy.sampler.misfit is not None) == (family in BY_TRANSFORMERS)
    free = policy.sampler(PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    stops = sorted({free[0].action[5], free[3].action[8]})
    turns = sampler(policy, stops)(PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    assert len({len(turn.action) for turn in turns}) > 1 and {turn.stop for turn in turns} == {*Stop}
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    said = policy.module.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=0
    )[:, width:]
    for turn, expected in zip(turns, said.tolist(), strict=True):
        assert list(turn.action) == expected[: len(turn.action)]
        assert expected[len(turn.action) :] == [0] * (12 - len(turn.action))


@families
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_are_those_that_the_trainer_computes(family, temperature):
    policy = spread(small(family), 3.0)
    params = SamplingParams(temperature=temperature, max_tokens=8, top_k=5)
    turns = sampler(policy, range(0, 260, 12))(PROMPTS * 3, params)
    assert {turn.stop for turn in turns} == {*Stop}
    batch, out = forwarded(policy, turns, temperature, top_k=5)
    assert (batch.behavior_logp - out.logp).abs().max() < FLOAT32
    assert (batch.proximal_entropy - out.entropy).abs().max() < FLOAT32
    assert out.entropy[batch.action_mask].max() - out.entropy[batch.action_mask].min() > 100 * FLOAT32
    for row, turn in enumerate(turns):
        start = len(turn.context)
        mine, theirs = torch.tensor(turn.topk_logp), out.topk_logp[row, start : start + len(turn.action)]
        assert (mine - theirs).abs().max() < FLOAT32


def test_in_bfloat16_the_trainer_computes_nearly_the_same():
    policy = spread(small(compute="bfloat16"), 3.0)
    turns = policy.sampler(PROMPTS, SamplingParams(max_tokens=12))
    batch, out = forwarded(policy, turns)
    assert (batch.behavior_logp - out.logp).abs().max() < BFLOAT16
    assert batch.behavior_logp.dtype == out.logp.dtype == torch.float32


def test_at_temperature_zero_log_probs_are_those_of_temperature_one():
    policy = spread(small())
    turns = policy.sampler(PROMPTS, SamplingParams(temperature=0, max_tokens=6))
    batch, out = forwarded(policy, turns, 1.0)
    assert (batch.behavior_logp - out.logp).abs().max() < FLOAT32


def test_top_k_are_the_likeliest_tokens_and_change_nothing_that_is_drawn():
    policy = spread(small())
    turns = policy.sampler(PROMPTS, SamplingParams(max_tokens=6, top_k=4))
    plain = policy.sampler(PROMPTS, SamplingParams(max_tokens=6))
    for with_top, without in zip(turns, plain, strict=True):
        assert with_top.action == without.action and without.topk_ids is None
        ids = torch.tensor([*with_top.context, *with_top.action])
        with torch.no_grad():
            logp = log_softmax(policy.module(ids[None]).logits[0, len(with_top.context) - 1 : -1], 1.0)
        best = logp.topk(4)
        assert torch.equal(torch.tensor(with_top.topk_ids), best.indices)
        assert (torch.tensor(with_top.topk_logp) - best.values).abs().max() < FLOAT32


def same(one, two):
    assert [turn.action for turn in one] == [turn.action for turn in two]
    assert [turn.stop for turn in one] == [turn.stop for turn in two]
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=FLOAT32, rtol=0)


@families
def test_what_a_prompt_draws_does_not_depend_on_how_the_list_is_cut_into_batches(family):
    policy, params = spread(small(family), 3.0), SamplingParams(max_tokens=10, seed=3)
    whole = sampler(policy, range(40))(PROMPTS * 2, params)
    assert len({turn.action for turn in whole}) == 10
    for rows in (1, 3, 4):
        same(sampler(policy, range(40), rows=rows)(PROMPTS * 2, params), whole)


def test_what_a_prompt_draws_does_not_depend_on_the_other_prompts():
    """Neither on their lengths, which decide the padding, nor on which of them finish earlier."""
    policy, params = spread(small(), 3.0), SamplingParams(max_tokens=10, seed=3)
    whole = sampler(policy, range(40))(PROMPTS, params)
    for n in range(len(PROMPTS)):
        others = [[5] * (9 - n)] * len(PROMPTS)
        others[n] = PROMPTS[n]
        same([sampler(policy, range(40))(others, params)[n]], [whole[n]])
    longer = policy.sampler(PROMPTS, params)
    for short, long in zip(whole, longer, strict=True):
        assert long.action[: len(short.action)] == short.action
    assert any(len(short.action) < len(long.action) for short, long in zip(whole, longer, strict=True))


def test_the_seed_decides_what_is_drawn():
    policy = small()
    first, again, other = (policy.sampler(PROMPTS, SamplingParams(max_tokens=8, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert [turn.action for turn in first] != [turn.action for turn in other]


def test_the_stop_token_is_part_of_the_action_and_has_its_log_prob():
    policy = spread(small(), 2.0)
    turns = sampler(policy, range(128))(PROMPTS * 4, SamplingParams(max_tokens=30))
    finished = [turn for turn in turns if turn.stop is Stop.finished]
    assert len(finished) > 10
    for turn in finished:
        assert turn.action[-1] < 128 and all(token >= 128 for token in turn.action[:-1])
        assert len(turn.logp) == len(turn.entropy) == len(turn.action)
    _, out = forwarded(policy, finished)
    for row, turn in enumerate(finished):
        assert abs(turn.logp[-1] - float(out.logp[row, len(turn.context) + len(turn.action) - 1])) < FLOAT32


def test_a_reply_that_ends_by_itself_at_the_limit_is_finished():
    policy = spread(small())
    likeliest = policy.sampler(PROMPTS, SamplingParams(temperature=0, max_tokens=3))[0].action
    stop, limit = likeliest[2], likeliest.index(likeliest[2]) + 1
    turn = sampler(policy, [stop])(PROMPTS, SamplingParams(temperature=0, max_tokens=limit))[0]
    assert turn.stop is Stop.finished and len(turn.action) == limit
    turn = sampler(policy, [261])(PROMPTS, SamplingParams(temperature=0, max_tokens=limit))[0]
    assert turn.stop is Stop.truncated and len(turn.action) == limit


@families
def test_a_reply_never_leaves_the_context_and_a_prompt_that_fills_it_is_a_failure(family):
    positions = "n_positions" if family == "tiny-gpt2" else "max_position_embeddings"
    policy = small(family, shape={positions: 16})
    prompts = [[1] * n for n in (1, 10, 15, 16, 17, 40)]
    turns = policy.sampler(prompts, SamplingParams(max_tokens=8))
    assert [len(turn.action) for turn in turns[:3]] == [8, 6, 1]
    assert all(turn.stop is Stop.truncated for turn in turns[:3])
    assert all(isinstance(turn, Failure) and turn.where == "play" for turn in turns[3:])
    assert "16 tokens but the model reads at most 16" in turns[3].reason
    _, out = forwarded(policy, turns[:3])
    assert out.logp.isfinite().all()


def test_no_prompts_give_no_turns():
    assert small().sampler([], SamplingParams()) == []


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_distribution(temperature):
    """Pearson's chi-square over 8 tokens has 7 degrees of freedom: 29.9 is passed once in 10,000 runs; the seed is
    fixed. At another temperature than the asked one it is passed by far."""
    policy = spread(small(shape={"vocab_size": 8, "pad_token_id": 0, "eos_token_id": 0}), 4.0)
    count, prompt = 4000, [3, 1, 5]
    turns = sampler(policy, [0], rows=1000)([prompt] * count, SamplingParams(temperature=temperature, max_tokens=1))
    seen = torch.bincount(torch.tensor([turn.action[0] for turn in turns]), minlength=8).double()

    def chi_square(assumed):
        with torch.no_grad():
            expected = log_softmax(policy.module(torch.tensor([prompt])).logits[0, -1], assumed).double().exp() * count
        return float(((seen - expected) ** 2 / expected).sum())

    assert chi_square(temperature) < 29.9
    assert chi_square(temperature * 1.3) > 60


def test_a_draw_takes_the_token_where_the_cumulative_distribution_passes_the_noise():
    logp = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).double().log().expand(6, 4)
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(logp.exp(), noise).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_draw_works_on_metal_which_has_no_float64():
    with FakeTensorMode(), Metal():
        logp = torch.empty(2, 5, device="mps")
        chosen = draw(logp, torch.empty(2, dtype=torch.float64))
        assert chosen.device == logp.device and chosen.shape == (2,)
        with pytest.raises(TypeError, match="no float64"):
            logp.double()


def test_a_token_of_probability_zero_is_never_drawn():
    logp = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).double().log().expand(2, 4)
    assert draw(logp.exp(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_the_weights_are_the_trainers_own():
    """Nothing is kept between calls: a weight that is changed in place changes the next reply."""
    policy, params = spread(small()), SamplingParams(max_tokens=6)
    before = policy.sampler(PROMPTS, params)
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    after = policy.sampler(PROMPTS, params)
    assert [turn.action for turn in before] != [turn.action for turn in after]
    batch, out = forwarded(policy, after)
    assert (batch.behavior_logp - out.logp).abs().max() < FLOAT32
    batch, out = forwarded(policy, before)
    assert (batch.behavior_logp - out.logp).abs().max() > 100 * FLOAT32


def test_a_turn_keeps_its_prompt_and_only_real_tokens():
    policy = small()
    for prompt, turn in zip(PROMPTS, policy.sampler(PROMPTS, SamplingParams(max_tokens=3)), strict=True):
        assert isinstance(turn, Turn) and list(turn.context) == prompt and len(turn.action) == 3
        assert replace(turn, stop=Stop.truncated) == turn
