"""Oracle state: student (.5, .3, .2), teacher (.2, .7, .1), reference (.6, .2, .2)."""

import math
from dataclasses import replace

import pytest
import torch

from taught import P, Q, R, descend, expected_gradient, replies, slopes, state
from toy import gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import reverse_kl
from tropism.methods.g_opd import GOPD
from tropism.methods.opd import OPD

close = torch.testing.assert_close
TABLE = {
    0.0: ([0.182322, -0.405465, 0.0], -0.030479, [0.6, 0.2, 0.2], 0.0),
    0.5: ([-0.366985, 0.220916, -0.346574], -0.186532, [0.401869, 0.434068, 0.164062], -0.148503),
    1.0: ([-0.916291, 0.847298, -0.693147], -0.342585, [0.2, 0.7, 0.1], 0.0),
    1.25: ([-1.190944, 1.160489, -0.866434], -0.420612, [0.127329, 0.802215, 0.070456], 0.176894),
    2.0: ([-2.014903, 2.100061, -1.386294], -0.654692, [0.025974, 0.954545, 0.019481], 0.942608),
}
"""reward_scaling -> advantages, their mean over the student, the fixed point, the advantage there."""
table = pytest.mark.parametrize("scaling", TABLE)


def advantage(scaling, student=P, teacher=Q, reference=R):
    _, batch = state(student.log(), teacher, reference)
    return GOPD(reward_scaling=scaling).credit(batch).advantage[:, 0]


# ------------------------------------------------------------------------------------------------------------ identity


def test_at_1_it_is_opd_and_needs_no_reference():
    weights, batch = toy_batch()
    same = {"reward_scaling": 1.0, "dual_clip": None, "truncate": 2.0}
    close(gradient(GOPD(**same), weights, batch), gradient(OPD(), weights, batch), rtol=0, atol=0)
    for settings in ({"reward_scaling": 1.25}, {"dual_clip": 1.21}, {"truncate": 1.0}):
        other = gradient(GOPD(**(same | settings)), weights, batch)
        assert (other - gradient(OPD(), weights, batch)).abs().max() > 1e-4
    anything = batch.replace(reference_logp=batch.reference_logp * 7)
    close(gradient(GOPD(**same), weights, anything), gradient(OPD(), weights, batch), rtol=0, atol=0)
    assert "reference_logp" not in GOPD(reward_scaling=1.0).needs.measured
    assert "reference_logp" in GOPD().needs.measured


def test_without_the_reference_it_needs_it_fails_loudly():
    _, batch = toy_batch()
    with pytest.raises(TypeError):
        GOPD().credit(batch.replace(reference_logp=None))


@table
def test_a_reference_that_is_the_teacher_is_plain_distillation(scaling):
    close(advantage(scaling, reference=Q), advantage(1.0))


@table
def test_at_the_reference_it_is_distillation_times_its_scaling(scaling):
    """So one step from there tells nothing apart: the methods part once the student has moved."""
    close(advantage(scaling, reference=P), scaling * advantage(1.0))


@table
def test_where_student_teacher_and_reference_are_one_there_is_nothing_to_learn(scaling):
    close(advantage(scaling, P, P, P), torch.zeros(3))


def test_at_0_it_holds_the_student_to_the_reference_whatever_the_teacher_says():
    method = GOPD(reward_scaling=0.0)
    logits = P.log().requires_grad_()
    (exact,) = torch.autograd.grad(reverse_kl(logits.log_softmax(-1), R.log()), logits)
    for teacher in (Q, R, P):
        close(expected_gradient(method, P.log(), teacher), exact)


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("scaling", [1.0, 1.25, 2.0])
def test_a_token_that_the_teacher_likes_more_than_student_and_reference_becomes_likelier(scaling):
    out, batch = replies([[-2.0, -1.0]], [[-1.0, -2.0]], reference=[[-1.5, -1.5]])
    slope = slopes(GOPD(reward_scaling=scaling), out, batch)[0]
    assert slope[0] < 0 < slope[1]


@table
def test_one_step_brings_the_student_closer_to_the_fixed_point(scaling):
    target = torch.tensor(TABLE[scaling][2]).log()
    after = (P.log() - 0.1 * expected_gradient(GOPD(reward_scaling=scaling), P.log(), Q)).log_softmax(-1)
    assert reverse_kl(after, target) < reverse_kl(P.log(), target)


# --------------------------------------------------------------------------------------------------------- closed form


@table
def test_the_advantages_by_hand(scaling):
    """Eq. 13 of arXiv:2602.12125, in the sign for ascent: eq. 14 prints the negative. Their mean is the objective."""
    numbers, mean, _, _ = TABLE[scaling]
    found = advantage(scaling)
    close(found, torch.tensor(numbers), atol=1e-6, rtol=0)
    close((P * found).sum(), torch.tensor(mean), atol=1e-6, rtol=0)
    objective = (P * scaling * (Q.log() - R.log())).sum() - reverse_kl(P.log(), R.log())
    close((P * found).sum(), objective)


def test_the_expected_gradient_by_hand():
    ascent = torch.tensor([-0.385166, 0.474330, -0.089164])
    close(-expected_gradient(GOPD(), P.log(), Q), ascent, atol=1e-6, rtol=0)


def test_the_advantage_is_affine_in_the_scaling():
    close(advantage(2.0) - advantage(1.0), advantage(1.0) - advantage(0.0))
    close(advantage(0.3), advantage(1.0) - 0.7 * (Q.log() - R.log()))


@table
def test_at_the_fixed_point_the_advantage_is_the_same_for_all_tokens_and_not_zero(scaling):
    """It is log Z = log sum_v teacher^s reference^(1 - s): above 0 past the teacher, below 0 on the way to it."""
    _, _, fixed, level = TABLE[scaling]
    target = Q**scaling * R ** (1 - scaling)
    close(target / target.sum(), torch.tensor(fixed), atol=1e-6, rtol=0)
    close(advantage(scaling, target / target.sum()), torch.full((3,), level), atol=1e-6, rtol=0)
    close(expected_gradient(GOPD(reward_scaling=scaling), (target / target.sum()).log(), Q), torch.zeros(3))


def test_locally_the_optimum_is_not_that_of_whole_replies():
    """Two tokens are drawn; without a discount the first does not see that the second has more to gain after one of
    them, so the two optima differ where reward_scaling is not 1. The paper's eq. 12 is about whole replies."""
    generator = torch.Generator().manual_seed(0)
    teacher, reference = torch.randn(2, 4, 3, generator=generator).log_softmax(-1)  # row 0: first token; 1 + v: after v
    for scaling, differ in ((1.0, False), (1.5, True)):
        mixed = scaling * teacher + (1 - scaling) * reference
        gain = mixed[1:].logsumexp(-1)
        whole, local = (mixed[0] + gain).softmax(-1), mixed[0].softmax(-1)
        found = descend(GOPD(reward_scaling=scaling), torch.zeros(3), teacher[0].exp(), reference[0].exp(), steps=600)
        close(found, local, atol=1e-4, rtol=0)
        assert ((whole - local).abs().max() > 1e-2) == differ


def test_the_loss_by_hand():
    """Ratio 4: A = +1 is clipped at 1.2; A = -1 counts 3 times, not 4. A sampler 10 times less sure weighs 5."""
    out, batch = replies([[-1.0, -1.0]], [[0.0, -2.0]], behavior=[[-1.0 - math.log(10), -1.0]])
    credit = GOPD(reward_scaling=1.0).credit(batch)
    ahead = replace(out, logp=out.logp + math.log(4.0))
    loss = GOPD(reward_scaling=1.0).loss(ahead, batch, credit).values.detach()
    close(loss, torch.tensor([[-1.2 * 5, 3.0]]))


def test_what_one_sample_is_worth_does_not_depend_on_the_others():
    _, batch = toy_batch()
    one = (batch.episode == 4)[:, None]
    moved = batch.replace(teacher_logp=torch.where(one, -9.0, batch.teacher_logp))
    before, after = GOPD().credit(batch).advantage, GOPD().credit(moved).advantage
    assert (before == after)[~one.expand_as(before)].all() and (before != after)[batch.action_mask & one].all()


def test_a_row_without_a_teacher_neither_trains_nor_counts():
    """There the policy stands in for the teacher, and would be pushed away from the reference."""
    weights, batch = toy_batch()
    stood_in = torch.where(batch.has_teacher[:, None], batch.teacher_logp, batch.proximal_logp)
    batch = on_policy(weights, batch).replace(teacher_logp=stood_in)
    close(gradient(GOPD(), weights, batch), gradient(GOPD(), weights, batch[batch.has_teacher]))
    assert (GOPD().weights(batch)[~batch.has_teacher] == 0).all()


# -------------------------------------------------------------------------------------------------------------- learns


@table
def test_it_learns_the_fixed_point(scaling):
    found = descend(GOPD(reward_scaling=scaling), P.log(), Q, steps=2000)
    close(found, torch.tensor(TABLE[scaling][2]), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_scaling": -0.5}, r"reward_scaling is -0\.5, which rewards what the teacher avoids"),
        ({"dual_clip": 1.0}, r"dual_clip is 1\.0"),
        ({"clip_high": -1.0}, "clip_high is"),
        ({"truncate": 0.0}, "truncate is"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GOPD(**settings)
