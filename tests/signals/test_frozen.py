import pytest
import torch

from small import rollout, small, turn
from tropism.config import Train
from tropism.methods.grpo import GRPO
from tropism.methods.sft import SFT
from tropism.signals.frozen import measure
from tropism.training.collate import collate
from tropism.types import Needs, SamplingParams

BOTH = Needs(measured=frozenset({"proximal_logp", "reference_logp"}))


def played(policy, temperature=1.0):
    prompts = [[7, 8, 9], [65], [1, 2, 3, 4, 5]]
    turns = policy.sampler(prompts, SamplingParams(max_tokens=5, temperature=temperature))
    return collate([rollout(turn) for turn in turns], codes={})


def test_where_sampler_and_trainer_are_one_the_proximal_log_probs_are_the_samplers_own():
    """The very same tensor, so that importance weights are exactly 1."""
    batch = played(small())
    found = measure(batch, GRPO().needs, policy=None, reference=None)
    assert found.proximal_logp is batch.behavior_logp


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_otherwise_the_trainer_measures_them(temperature):
    policy, batch = small(), played(small(seed=1), temperature)
    found = measure(batch, GRPO().needs, policy=policy.measuring(temperature, Train(micro_tokens=16)), reference=None)
    with torch.no_grad():
        out = policy.forward(batch, temperature)
    assert (found.proximal_logp - out.logp).abs().max() < 1e-5
    assert (found.proximal_entropy - out.entropy).abs().max() < 1e-5
    assert (found.proximal_logp - batch.behavior_logp).abs().max() > 0.01
    assert not found.proximal_logp.requires_grad and (found.proximal_logp[~batch.action_mask] == 0).all()


def test_the_reference_is_another_model_on_the_same_context():
    policy, reference = small(), small(seed=2)
    batch = played(policy)
    found = measure(batch, BOTH, policy=None, reference=reference.measuring(1.0, Train()))
    with torch.no_grad():
        assert (found.reference_logp - reference.forward(batch).logp).abs().max() < 1e-5
    assert (found.reference_logp - found.proximal_logp).abs().max() > 0.01


def test_nothing_is_measured_that_no_one_needs():
    batch = played(small())

    def forbidden(batch):
        raise AssertionError("nobody asked")

    assert measure(batch, SFT().needs, policy=forbidden, reference=forbidden) is batch
    assert measure(batch, GRPO(kl=0.0).needs, policy=None, reference=forbidden).reference_logp is None


def test_data_is_measured_by_the_trainer():
    policy, batch = small(), collate([rollout(turn([1, 2], [3, 4], sampled=False))], codes={})
    found = measure(batch, GRPO().needs, policy=policy.measuring(1.0, Train()), reference=None)
    assert found.proximal_logp is not None and (found.proximal_logp[batch.action_mask] < 0).all()


def test_what_nothing_measures_is_said():
    with pytest.raises(NotImplementedError, match="teacher_logp"):
        measure(played(small()), Needs(measured=frozenset({"teacher_logp"})), policy=None, reference=None)
