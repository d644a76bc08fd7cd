"""Rows without padding, equal beginnings once: the numbers and the gradients of padded rows."""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from small import FAMILIES, rollout, small, turn
from tropism.config import Train
from tropism.training.collate import collate
from tropism.training.packed import NAME, ROUND, by_torch, in_common, micro_batches, pack, use, used, worth

families = pytest.mark.parametrize("family", FAMILIES)
ROWS = [[1, 2, 3, 4], [1, 2, 3, 5, 6, 7], [8], [1, 2, 3, 5], [1, 2, 3, 5, 6, 7], [9, 1, 2]]
LENGTH = torch.tensor([len(row) for row in ROWS])
TOKENS = torch.tensor([row + [0] * (6 - len(row)) for row in ROWS])


def siblings(groups=3, seed=0, size=4):
    """Prompts of several turns; siblings that say the same for a while, one that repeats another."""
    draw = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(1, 250, (count,), generator=draw).tolist()

    made = []
    for group in range(groups):
        prompt, begun = some(6 + group), some(3)
        for sibling in range(size):
            reply = begun[: sibling % 3 + 1] + some(2 + 3 * sibling) if sibling < size - 1 else begun
            first, more = turn(prompt, reply), some(2)
            made.append(rollout(first, turn([*prompt, *reply, *more], some(3)), group=group))
    return made


def policies(family="tiny", **settings):
    """The same weights, packed and padded."""
    return [small(family, pack=pack, **settings) for pack in (True, False)]


def test_what_rows_begin_with_in_common_stands_once_and_every_token_is_found_again():
    packed = pack(TOKENS, LENGTH)
    assert len(packed.owner) == 4 + 3 + 1 + 3 and packed.ids.shape == packed.positions.shape == (1, ROUND)
    found = packed.ids[0][packed.place].view(TOKENS.shape)
    places = packed.positions[0][packed.place].view(TOKENS.shape)
    for n, row in enumerate(ROWS):
        assert found[n, : len(row)].tolist() == row and places[n, : len(row)].tolist() == list(range(len(row)))
    assert len({int(packed.place.view(TOKENS.shape)[n, 3]) for n in (1, 3, 4)}) == 1
    assert (packed.place[packed.owner] == torch.arange(11)).all()


@pytest.mark.parametrize(
    "one, other", [([], [1]), ([1, 2], [1, 2]), ([1, 2, 3], [1, 2, 4, 3]), ([2], [3]), ([1], [1, 1])]
)
def test_rows_are_compared_from_their_beginning(one, other):
    expected = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert in_common(one, other) == in_common(other, one) == expected


@families
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_packed_rows_have_the_numbers_and_the_gradients_of_padded_ones(family, settings):
    batch, found = collate(siblings(), codes={}), []
    for policy in policies(family, **settings):
        policy.add_critic()
        torch.nn.init.normal_(policy.critic.weight, generator=torch.Generator().manual_seed(1))
        assert policy.packs() == policy.settings.pack
        out = policy.forward(batch, 0.7, top_k=3)
        weights = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(2))
        ((out.logp + out.value) * weights * batch.action_mask).sum().backward()
        slopes = {name: p.grad for name, p in policy.module.named_parameters()}
        found.append((vars(out), slopes))
    (mine, slopes), (theirs, expected) = found
    assert worth(batch) is not None
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=2e-5, rtol=0)
    for name, slope in expected.items():
        scale = float(slope.abs().max())
        torch.testing.assert_close(slopes[name], slope, atol=2e-5 * scale, rtol=0)


def test_the_gradient_of_a_shared_beginning_is_the_sum_over_its_rows():
    """Of one token in each of two equal rows: twice that of one row alone."""
    policy = small("tiny")
    one = rollout(turn([1, 2, 3], [4, 5, 6, 7]))
    slopes = []
    for made in ([one], [one, one], [one, one, one]):
        batch = collate(made, codes={})
        policy.module.zero_grad()
        policy.forward(batch).logp.sum().backward()
        slopes.append(policy.module.get_input_embeddings().weight.grad.clone())
    for count in (2, 3):
        torch.testing.assert_close(slopes[count - 1], count * slopes[0], atol=1e-4, rtol=1e-4)


@families
def test_a_model_that_may_be_packed_computes_what_it_did_when_called_as_ever(family):
    packed, padded = small(family), small(family)
    padded.module.set_attn_implementation("sdpa")
    assert packed.module.config._attn_implementation == NAME != padded.module.config._attn_implementation
    mask = torch.ones_like(TOKENS).masked_fill(torch.arange(6) >= LENGTH[:, None], 0)
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            found = [policy.module(input_ids=TOKENS, **given).logits for policy in (packed, padded)]
            assert torch.equal(*found)


def test_a_model_whose_attention_is_another_stays_padded():
    policy = small()
    policy.module.set_attn_implementation("eager")
    use(policy.module, policy.precision)
    assert not policy.packs()


def test_a_model_that_mixes_rows_stays_padded():
    """As a convolution over tokens or a state that is carried along would."""
    policy, seen = small(), []
    policy.module.set_attn_implementation("sdpa")
    attention = policy.module.base_model.layers[0].self_attn
    forward = attention.forward

    def mixing(hidden_states, **given):
        seen.append(hidden_states.shape)
        return forward(hidden_states=hidden_states + hidden_states.roll(1, 1), **given)

    attention.forward = mixing
    use(policy.module, policy.precision)
    assert seen and not policy.packs()


def test_a_model_that_takes_no_such_input_stays_padded():
    policy = small()
    policy.module.set_attn_implementation("sdpa")
    forward = policy.module.forward
    policy.module.forward = lambda input_ids, use_cache=False: forward(input_ids=input_ids, use_cache=use_cache)
    use(policy.module, policy.precision)
    assert not policy.packs()


@pytest.mark.parametrize(
    ("kind", "settings", "packs"),
    [
        ("mixtral", {"num_local_experts": 2}, True),
        ("phimoe", {"num_local_experts": 2, "num_experts_per_tok": 2}, False),
    ],
)
def test_a_model_that_does_not_say_how_far_a_token_sees_stays_padded(kind, settings, packs):
    """Its window is in the mask alone, which packed rows do not have; three short rows would not show it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = sizes | {"num_key_value_heads": 1, "vocab_size": 64, "sliding_window": 4, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, **shape, **settings)
    module = AutoModelForCausalLM.from_config(config).eval()
    use(module, contextlib.nullcontext)
    assert used(module) == packs


def test_rows_with_little_in_common_stay_padded():
    alone = collate([rollout(turn([n, 2, 3], [4, 5])) for n in (1, 7)], codes={})
    assert worth(alone) is None


@pytest.mark.parametrize("tokens", [1, 12, 25, 1000])
@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row_once_and_stay_in_bounds(tokens, packed):
    batch = collate(siblings(), codes={})
    parts = list(micro_batches(batch, tokens, packed=packed))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(batch)))
    for part in parts:
        rows = batch[part]
        padded = len(part) * int(rows.length.max())
        counted = len(pack(rows.tokens, rows.length).owner) if packed else padded
        assert len(part) == 1 or (counted <= tokens and padded <= 4 * tokens)
    assert len(parts) == 1 or tokens < 1000
    whole = list(micro_batches(batch, tokens, batch.group, packed=packed))
    assert all(len(batch.group[part].unique()) <= len(part) // 4 for part in whole)


def test_measuring_in_any_number_of_packed_parts_is_one_padded_pass():
    batch, (packed, padded) = collate(siblings(), codes={}), policies()
    with torch.no_grad():
        whole = padded.forward(batch, 0.7)
    for tokens in (1, 30, 1000):
        found = packed.measuring(0.7, Train(micro_tokens=tokens))(batch)
        torch.testing.assert_close(found.logp, whole.logp, atol=1e-5, rtol=0)


def test_half_precision_is_raised_in_attention_on_a_cpu_and_lowered_again():
    """Under autocast too, whatever the precision of queries and keys: the result of float32, rounded."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 7, 8, generator=draw).bfloat16() for _ in range(3))
    module = small().module.base_model.layers[0].self_attn
    given = {"mask": None, "options": {"is_causal": True, "scaling": 0.3}}
    module.num_key_value_groups = 1
    expected, _ = by_torch(module, query.float(), key.float(), value.float(), **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = by_torch(module, query.float(), key.float(), value, **given)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
