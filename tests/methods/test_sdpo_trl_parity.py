"""The same distillation loss and gradient as TRL 1.16.0's SDPOTrainer, whose own code computes the other side.

Its mean counts a sequence as one however long, and counts masked ones as 0; ours counts tokens that have a teacher.
So values are compared under its mean, and the two means with each other.
"""

from types import SimpleNamespace

import pytest
import torch
from trl.experimental.sdpo.sdpo_trainer import DistillationLogits, SDPOTrainer

from tropism.methods.sdpo import SDPO
from tropism.teacher import Teacher
from tropism.types import Batch, Output

close = torch.testing.assert_close
N, T, V, K = 6, 5, 11, 4
LENGTHS, TAUGHT = (5, 3, 1, 4, 2, 5), (1, 1, 1, 0, 1, 1)
ALPHA = {"forward": 0.0, "jensen_shannon": 0.5, "reverse": 1.0}
MODES = [("topk_logits", K, d) for d in ALPHA] + [("full_logits", "all", d) for d in ALPHA]
MODES += [("sampled_token", 0, "reverse")]


def same_numbers():
    """(student logits, teacher logits, sampled tokens, log-probabilities of a stale policy, mask)."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(N, T, V, generator=draw) for _ in range(2))
    tokens = torch.randint(V, (N, T), generator=draw)
    old = student.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] + 0.5 * torch.randn(N, T, generator=draw)
    return student, teacher, tokens, old, torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def theirs(mode, divergence, student, teacher, tokens, old, mask):
    args = SimpleNamespace(
        distillation_mode=mode,
        distillation_topk=K,
        distillation_alpha=ALPHA[divergence],
        distillation_add_tail=True,
        distillation_is_clip=2.0,
    )
    trainer = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(gather=lambda value: value),
        _log_self_distillation_metric=lambda *_: None,
    )
    loss_mask = mask * torch.tensor(TAUGHT)[:, None]
    logits = DistillationLogits(
        completion_ids=tokens,
        completion_mask=mask.long(),
        loss_mask=loss_mask,
        student_logits=student,
        teacher_logits=teacher,
    )
    loss = SDPOTrainer._compute_self_distillation_loss
    return loss(trainer, SimpleNamespace(training=True), {"old_per_token_logps": old}, logits)


def ours(method, student, teacher, tokens, old, mask, support=None):
    """(Batch, loss per token) on the `top_k` likeliest tokens of `support`, by default the student's own."""
    number, k = torch.arange(N), V if method.teacher.top_k == "all" else method.teacher.top_k
    ids = (student if support is None else support).topk(k).indices if k else None
    logp, logq = student.log_softmax(-1), teacher.log_softmax(-1)
    sampled = logp.gather(-1, tokens[..., None])[..., 0]
    batch = Batch(
        tokens=tokens,
        length=torch.tensor(LENGTHS),
        action_mask=mask,
        token_reward=torch.zeros(N, T),
        turn=mask.long() - 1,
        reward=number * 0.0,
        success=number < 0,
        truncated=number < 0,
        group=number,
        episode=number,
        role=number,
        domain=number,
        proximal_logp=old,
        behavior_logp=old,
        has_teacher=torch.tensor(TAUGHT).bool(),
        teacher_logp=logq.gather(-1, tokens[..., None])[..., 0],
        topk_ids=ids,
        teacher_topk_logp=logq.gather(-1, ids) if k else None,
    )
    out = Output(logp=sampled, entropy=sampled * 0, topk_logp=logp.gather(-1, ids) if k else None)
    return batch, method.loss(out, batch, method.credit(batch)).values


@pytest.mark.parametrize(("mode", "top_k", "divergence"), MODES)
def test_loss_and_gradient_are_those_of_trl(mode, top_k, divergence):
    student, *fixed = same_numbers()
    method = SDPO(teacher=Teacher(who="ema", reads=("sibling",), top_k=top_k), divergence=divergence)
    student.requires_grad_()
    expected = theirs(mode, divergence, student, *fixed)
    (slope,) = torch.autograd.grad(expected, student)

    batch, values = ours(method, student, *fixed)
    mask = batch.action_mask & batch.has_teacher[:, None]
    their_mean = mask / mask.sum(1, keepdim=True).clamp(min=1) / N
    found = (values * their_mean).sum()
    close(found, expected, atol=1e-6, rtol=0)
    close(torch.autograd.grad(found, student, retain_graph=True)[0], slope, atol=1e-6, rtol=0)
    assert slope.abs().max() > 1e-3
    clipped = (values.detach() != 0) & ((batch.proximal_logp - student.detach().log_softmax(-1).amax(-1)) < 0)
    assert clipped.any()

    our_mean = method.weights(batch)
    close(our_mean, mask / mask.sum())
    assert ((values * our_mean).sum() - expected).abs() > 1e-3


def test_after_a_step_trl_compares_on_other_tokens_and_we_on_those_of_the_policy_that_made_the_batch():
    student, *fixed = same_numbers()
    method = SDPO(teacher=Teacher(who="ema", reads=("sibling",), top_k=K))
    generator = torch.Generator().manual_seed(1)
    before = student + torch.randn(student.shape, generator=generator)
    batch, values = ours(method, student, *fixed, support=before)
    mask = batch.action_mask & batch.has_teacher[:, None]
    found = (values * mask / mask.sum(1, keepdim=True).clamp(min=1) / N).sum()
    assert (found - theirs("topk_logits", "jensen_shannon", student, *fixed)).abs() > 1e-4
