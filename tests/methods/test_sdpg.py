"""SDPG: arXiv:2606.04036, and the authors' repository lauyikfung/SDPG at f71329e for what the abstract leaves open."""

import pytest
import torch

from toy import V, bandit, forward, gradient, table, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import k2, reverse_kl
from tropism.methods.grpo import GRPO
from tropism.methods.sdpg import SDPG
from tropism.teacher import Teacher

close = torch.testing.assert_close
PLAIN = GRPO(scale="sample_std", average="token", clip_high=0.28, dual_clip=10.0)


def whole(weights, batch, teacher):
    """The batch with a teacher's word on the whole vocabulary."""
    everything = batch.replace(topk_ids=torch.arange(V).expand(*batch.tokens.shape, V))
    return everything.replace(teacher_topk_logp=forward(teacher, everything).topk_logp.detach())


def test_without_its_two_penalties_it_is_grpo_to_the_bit():
    weights, batch = toy_batch()
    close(gradient(SDPG(distill=0.0, kl=0.0), weights, batch), gradient(PLAIN, weights, batch), rtol=0, atol=0)
    assert "reference_logp" in SDPG().needs.measured and "reference_logp" not in SDPG(kl=0.0).needs.measured
    alone = batch.replace(reference_logp=None)
    close(gradient(SDPG(kl=0.0), weights, alone), gradient(SDPG(kl=0.0), weights, batch), rtol=0, atol=0)


def test_the_loss_is_grpos_plus_reverse_kl_to_the_teacher_plus_k2_to_the_reference():
    weights, batch = toy_batch()
    full = whole(weights, batch, table(7))
    out, method = forward(weights, full), SDPG(distill=0.3, kl=0.2)
    found = method.loss(out, full, method.credit(full))
    surrogate = PLAIN.loss(out, full, PLAIN.credit(full)).values
    teacher = reverse_kl(out.topk_logp, full.teacher_topk_logp) * full.has_teacher[:, None]
    expected = surrogate + 0.3 * teacher + 0.2 * k2(out.logp, full.reference_logp)
    close(found.values[full.action_mask], expected[full.action_mask], atol=1e-9, rtol=0)
    close(found.metrics["divergence"][full.action_mask], teacher[full.action_mask].detach(), atol=1e-9, rtol=0)
    close(method.weights(full), full.action_mask / full.action_mask.sum())


def test_a_row_without_a_teacher_is_only_reinforced():
    weights, batch = toy_batch()
    nobody = batch.replace(has_teacher=torch.zeros_like(batch.success))
    close(gradient(SDPG(kl=0.0, distill=1.0), weights, nobody), gradient(PLAIN, weights, batch), rtol=0, atol=0)


def test_a_teacher_that_says_the_same_changes_nothing():
    weights, batch = toy_batch()
    same = whole(weights, batch, weights)
    close(gradient(SDPG(distill=1.0, kl=0.0), weights, same), gradient(PLAIN, weights, batch), atol=1e-12, rtol=0)


def test_one_step_on_equal_rewards_goes_to_the_teacher():
    weights, batch = toy_batch()
    full = whole(weights, batch, table(7)).replace(reward=batch.reward * 0)
    taught = full.action_mask & full.has_teacher[:, None]

    def away(student):
        return reverse_kl(forward(student, full).topk_logp, full.teacher_topk_logp)[taught].mean()

    after = (weights - 0.1 * gradient(SDPG(distill=1.0, kl=0.0), weights, full)).detach()
    assert away(after) < away(weights.detach()) - 1e-3


@pytest.mark.parametrize("liked", [2, 0], ids=["right", "inverted"])
def test_it_learns_a_bandit_with_three_arms_whatever_the_teacher_likes(liked):
    """At its small weight the teacher shapes, and the reward decides."""
    weights = torch.tensor([[0.5, 0.2, -0.5], [0.0] * 3, [0.0] * 3]).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    told = torch.nn.functional.one_hot(torch.tensor(liked), 3) * 2.0
    for _ in range(60):
        batch = bandit(weights, torch.tensor([0.0, 0.5, 1.0]), groups=4, size=8, generator=generator)
        ids = torch.arange(3).expand(*batch.tokens.shape, 3)
        teacher = (weights[0].detach() + told).log_softmax(-1).expand(ids.shape) * batch.action_mask[..., None]
        batch = batch.replace(
            topk_ids=ids,
            teacher_topk_logp=teacher,
            has_teacher=batch.length > 0,
            reference_logp=batch.proximal_logp,
        )
        weights = (weights - gradient(SDPG(), weights, batch)).detach().requires_grad_()
    assert weights[0].softmax(-1)[2] > 0.95


def test_the_default_teacher_is_the_policy_itself_that_read_the_answer():
    assert SDPG().teacher == Teacher(who="live", reads=("answer",), top_k="all")
    assert (SDPG().distill, SDPG().kl, SDPG().clip_high, SDPG().dual_clip) == (0.001, 0.001, 0.28, 10.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill": -0.1}, "SDPG's distill is -0.1"),
        ({"kl": -0.1}, "SDPG's kl is -0.1"),
        ({"teacher": Teacher(reads=("answer",))}, "SDPG's teacher.top_k is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SDPG(**settings)
