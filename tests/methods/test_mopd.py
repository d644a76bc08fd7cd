import math
from dataclasses import replace

import pytest
import torch

from taught import P, Q, descend, expected_gradient, replies, slopes, state
from toy import bandit, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import reverse_kl
from tropism.maths.reduce import sequence_mean, spread
from tropism.methods.mopd import MOPD
from tropism.methods.opd import OPD
from tropism.teacher import Teacher

close = torch.testing.assert_close
TEACHER, TRAIN, RATIO = [-0.2, -1.0, -3.0, -0.5], [-0.5, -0.7, -1.0, -0.5], [1.0, 2.0, 0.4, 1.5]


def golden(ratio=RATIO):
    behavior = [logp - math.log(r) for logp, r in zip(TRAIN, ratio, strict=True)]
    return replies([TRAIN], [TEACHER], behavior=[behavior])


# ------------------------------------------------------------------------------------------------------------ identity


def test_used_once_by_one_engine_it_is_opd_with_replies_counted_alike():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    credit = OPD().credit(fresh)
    loss = OPD().loss(forward(weights, fresh), fresh, credit).values
    alike = sequence_mean(spread(fresh.has_teacher, fresh.action_mask), fresh.episode)
    (expected,) = torch.autograd.grad((loss * alike).sum(), weights)
    close(gradient(MOPD(), weights, fresh), expected)
    assert (gradient(OPD(), weights, fresh) - expected).abs().max() > 1e-3
    assert (gradient(MOPD(), weights, batch) - expected).abs().max() > 1e-3


def test_where_sampler_and_trainer_are_one_all_weights_are_exactly_one():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    metrics = MOPD().loss(forward(weights, fresh), fresh, MOPD().credit(fresh)).metrics
    assert (metrics["sampling/importance_sampling_ratio/mean"] == 1).all() and (metrics["sampling/dropped"] == 0).all()


def test_a_teacher_that_is_the_student_teaches_nothing():
    weights, batch = toy_batch()
    same = batch.replace(teacher_logp=batch.proximal_logp)
    assert (MOPD().credit(same).advantage == 0).all() and (gradient(MOPD(), weights, same) == 0).all()


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_likelier_what_the_teacher_finds_likelier():
    out, batch = replies([[-1.0, -1.0, -1.0]], [[-0.5, -1.0, -2.0]])
    slope = slopes(MOPD(), out, batch)[0]
    assert slope[0] < 0 == slope[1] < slope[2]


def test_one_step_brings_the_student_closer_to_the_teacher():
    after = (P.log() - 0.1 * expected_gradient(MOPD(), P.log(), Q)).log_softmax(-1)
    assert reverse_kl(after, Q.log()) < reverse_kl(P.log(), Q.log())


# --------------------------------------------------------------------------------------------------------- closed form


def test_one_reply_by_hand():
    """Eqs. 2 to 4 of arXiv:2603.19220. The third token, of ratio 0.4, is dropped and still counts in the length."""
    out, batch = golden()
    loss = MOPD().loss(out, batch, MOPD().credit(batch))
    close(MOPD().credit(batch).advantage, torch.tensor([[0.3, -0.3, -2.0, 0.0]]))
    close(loss.metrics["sampling/importance_sampling_ratio/mean"], torch.tensor([[1.0, 2.0, 0.0, 1.5]]))
    close(loss.metrics["sampling/dropped"], torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    close((loss.values * MOPD().weights(batch)).sum(), torch.tensor(-0.0675))
    close(slopes(MOPD(), out, batch), torch.tensor([[-0.075, 0.15, 0.0, 0.0]]))


def test_dropping_is_not_truncating():
    """Clamped to [0.5, 2] the third token would weigh 0.5 and have the slope 0.25."""
    out, batch = golden()
    assert slopes(MOPD(), out, batch)[0, 2] == 0
    close(slopes(MOPD(ratio_low=0.3), out, batch)[0, 2], torch.tensor(0.4 * 2 / 4))


@pytest.mark.parametrize(
    ("ratio", "weight"), [(0.5, 0.5), (2.0, 2.0), (0.49, 0.0), (2.01, 0.0), (3.0, 0.0), (1.0, 1.0)]
)
def test_the_bounds_themselves_are_kept(ratio, weight):
    out, batch = golden([ratio] * 4)
    found = MOPD().loss(out, batch, MOPD().credit(batch)).metrics["sampling/importance_sampling_ratio/mean"]
    close(found, torch.full((1, 4), weight))


def test_every_reply_counts_the_same():
    """One token of loss +1 and three of -1: 0. With every token counting the same it would be -0.5."""
    _, batch = replies([[-1.0], [-1.0, -1.0, -1.0]], [[-2.0], [0.0, 0.0, 0.0]])
    loss = -MOPD().credit(batch).advantage
    close(loss[batch.action_mask], torch.tensor([1.0, -1.0, -1.0, -1.0]))
    close((loss * MOPD().weights(batch)).sum(), torch.tensor(0.0))
    close((loss * OPD().weights(batch)).sum(), torch.tensor(-0.5))


def test_gradient_flows_through_the_policy_alone():
    """Neither advantage nor weight has one, and a policy that has moved is not weighed again: there is no ratio."""
    out, batch = golden()
    moved = replace(out, logp=(out.logp.detach() + 0.7).requires_grad_())
    close(slopes(MOPD(), moved, batch), slopes(MOPD(), out, batch))


def test_what_the_policy_did_not_write_has_no_weight():
    _, batch = toy_batch()
    assert (MOPD().weights(batch)[~batch.action_mask] == 0).all()


def test_a_row_without_a_teacher_neither_trains_nor_counts():
    weights, batch = toy_batch()
    close(gradient(MOPD(), weights, batch), gradient(MOPD(), weights, batch[batch.has_teacher]))
    nobody = batch.replace(has_teacher=batch.has_teacher & False)
    assert (MOPD().weights(nobody) == 0).all() and (gradient(MOPD(), weights, nobody) == 0).all()


def test_another_teacher_for_one_domain_changes_only_its_samples():
    _, batch = toy_batch()
    domain = batch.episode % 2
    other = batch.replace(domain=domain, teacher_logp=torch.where((domain == 1)[:, None], -7.0, batch.teacher_logp))
    changed = (MOPD().credit(batch).advantage != MOPD().credit(other).advantage) & batch.action_mask
    assert (changed == (batch.action_mask & (domain == 1)[:, None])).all()


# -------------------------------------------------------------------------------------------------------------- learns


def test_it_becomes_the_teacher():
    close(descend(MOPD(), P.log(), Q), Q, atol=1e-4, rtol=0)


def test_from_samples_of_two_domains_it_becomes_the_teacher_of_each():
    """Each domain is a state of its own; the mean of -A over fresh samples estimates its divergence, and falls."""
    weights, generator = torch.zeros(2, 3, 3), torch.Generator().manual_seed(0)
    teachers, gaps = torch.stack([Q, P]), []
    for _ in range(200):
        for domain in range(2):
            table = weights[domain].clone().requires_grad_()
            batch = bandit(table, torch.zeros(3), groups=1, size=64, generator=generator)
            said = teachers[domain].log()[batch.tokens[:, 1:]]
            batch = batch.replace(teacher_logp=torch.cat([said * 0, said], 1), has_teacher=batch.success | True)
            gaps.append(-MOPD().credit(batch).advantage[:, 1].mean())
            weights[domain] -= 0.5 * gradient(MOPD(), table, batch)
    close(weights[:, 0].softmax(-1), teachers, atol=0.03, rtol=0)
    assert gaps[0] > 0.2 and torch.stack(gaps[-50:]).mean().abs() < 0.02


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("low", "high"), [(1.2, 2.0), (0.5, 0.9), (-0.1, 2.0), (1.0, 2.0), (0.5, 1.0)])
def test_bounds_that_drop_tokens_on_which_both_agree_are_refused(low, high):
    with pytest.raises(ConfigError, match=rf"ratio_low is {low} and ratio_high {high}, .* use 0\.5 and 2"):
        MOPD(ratio_low=low, ratio_high=high)
    MOPD(ratio_low=0.0, ratio_high=math.inf)


def test_a_teacher_per_domain_is_a_setting():
    method = MOPD(teacher=Teacher(who={"math": "a", "chat": "b"}))
    assert method.teacher.who == {"math": "a", "chat": "b"}
    assert method.needs.measured == {"proximal_logp", "teacher_logp", "has_teacher"}
    _, batch = state(P.log(), Q)
    close(method.credit(batch).advantage[:, 0], Q.log() - P.log())
