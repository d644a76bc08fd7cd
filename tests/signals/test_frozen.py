import pytest
import torch

from small import rollout, small, turn
from tropism.config import Train
from tropism.methods.grpo import GRPO
from tropism.methods.sft import SFT
from tropism.signals.frozen import measure, top_k
from tropism.training.collate import collate
from tropism.types import Needs, SamplingParams

VALUED = Needs(measured=frozenset({"proximal_logp", "value", "last_value"}))
BOTH = Needs(measured=frozenset({"proximal_logp", "reference_logp"}))


def forbidden(batch, top_k=0):
    raise AssertionError("nobody asked")


def played(policy, temperature=1.0):
    prompts = [[7, 8, 9], [65], [1, 2, 3, 4, 5]]
    turns = policy.sampler(prompts, SamplingParams(max_tokens=5, temperature=temperature))
    return collate([rollout(turn) for turn in turns], codes={})


def test_where_sampler_and_trainer_are_one_the_proximal_log_probs_are_the_samplers_own():
    """The very same tensor, so that importance weights are exactly 1."""
    batch = played(small())
    found = measure(batch, GRPO().needs, policy=forbidden, exact=True)
    assert found.proximal_logp is batch.behavior_logp


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_otherwise_the_trainer_measures_them(temperature):
    policy, batch = small(), played(small(seed=1), temperature)
    found = measure(batch, GRPO().needs, policy=policy.measuring(temperature, Train(micro_tokens=16)), exact=False)
    with torch.no_grad():
        out = policy.forward(batch, temperature)
    assert (found.proximal_logp - out.logp).abs().max() < 1e-5
    assert (found.proximal_entropy - out.entropy).abs().max() < 1e-5
    assert (found.proximal_logp - batch.behavior_logp).abs().max() > 0.01
    assert not found.proximal_logp.requires_grad and (found.proximal_logp[~batch.action_mask] == 0).all()


def test_the_reference_is_another_model_on_the_same_context():
    policy, reference = small(), small(seed=2)
    batch = played(policy)
    found = measure(batch, BOTH, policy=forbidden, exact=True, reference=reference.measuring(1.0, Train()))
    with torch.no_grad():
        assert (found.reference_logp - reference.forward(batch).logp).abs().max() < 1e-5
    assert (found.reference_logp - found.proximal_logp).abs().max() > 0.01


def test_nothing_is_measured_that_no_one_needs():
    batch = played(small())
    found = measure(batch, SFT().needs, policy=forbidden, exact=False, reference=forbidden)
    assert found.proximal_logp is None
    assert measure(batch, GRPO(kl=0.0).needs, policy=forbidden, exact=True, reference=forbidden).reference_logp is None


def test_data_is_measured_by_the_trainer():
    policy, batch = small(), collate([rollout(turn([1, 2], [3, 4], sampled=False))], codes={})
    found = measure(batch, GRPO().needs, policy=policy.measuring(1.0, Train()), exact=True)
    assert found.proximal_logp is not None and (found.proximal_logp[batch.action_mask] < 0).all()


def test_the_likeliest_tokens_are_the_samplers_own_or_measured():
    policy = small()
    turns = policy.sampler([[7, 8, 9], [65]], SamplingParams(max_tokens=5, top_k=3))
    batch = collate([rollout(turn) for turn in turns], codes={})
    frozen = policy.measuring(1.0, Train())
    same = top_k(measure(batch, GRPO().needs, policy=forbidden, exact=True), forbidden, 3, 262)
    measured = top_k(measure(batch, GRPO().needs, policy=frozen, exact=False), frozen, 3, 262)
    assert (same.topk_ids == measured.topk_ids).all() and same.topk_ids[batch.action_mask].max() > 0
    assert (same.proximal_topk_logp - measured.proximal_topk_logp).abs().max() < 1e-4
    everything = top_k(batch.replace(proximal_topk_logp=None, topk_ids=None), frozen, 262, 262)
    mass = everything.proximal_topk_logp.exp().sum(-1)[batch.action_mask]
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-5)


def test_values_are_measured_by_the_critic():
    policy = small()
    policy.add_critic()
    torch.nn.init.normal_(policy.critic.weight)
    batch = played(policy)
    found = measure(batch, VALUED, policy=policy.measuring(1.0, Train(micro_tokens=8)), exact=True)
    with torch.no_grad():
        out = policy.forward(batch)
    assert (found.value - out.value).abs().max() < 1e-5 and (found.last_value - out.last_value).abs().max() < 1e-5
    assert found.value[batch.action_mask].abs().min() > 0 and (found.value[~batch.action_mask] == 0).all()
    assert found.proximal_logp is batch.behavior_logp
