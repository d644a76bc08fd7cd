"""Oracle state: student (.5, .3, .2), teacher (.2, .7, .1)."""

from dataclasses import replace

import pytest
import torch

from taught import P, Q, descend, expected_gradient, replies, slopes, state
from toy import V, bandit, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import forward_kl, jensen_shannon, k1, k2, k3, reverse_kl
from tropism.maths.returns import rewards_to_go
from tropism.methods.opd import OPD
from tropism.teacher import Teacher

close = torch.testing.assert_close
ALL = Teacher(who="frozen", top_k="all")
KINDS = {
    "reverse": (OPD(teacher=ALL), reverse_kl),
    "forward": (OPD(teacher=ALL, divergence="forward"), forward_kl),
    "both": (OPD(teacher=ALL, divergence="jensen_shannon"), jensen_shannon),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def values(method, ids=()):
    out, batch = state(P.log(), Q, ids=ids)
    return method.loss(out, batch, method.credit(batch)).values[:, 0]


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("method", [OPD(), *(method for method, _ in KINDS.values())])
def test_a_teacher_that_is_the_student_teaches_nothing(method):
    out, batch = state(P.log(), P)
    assert (method.credit(batch).advantage == 0).all()
    close(method.loss(out, batch, method.credit(batch)).values, torch.zeros(3, 1))
    close(expected_gradient(method, P.log(), P), torch.zeros(3))
    warm = (P.log() / 0.7).log_softmax(-1)  # the same model at another temperature is another teacher
    assert expected_gradient(method, P.log(), warm.exp()).abs().max() > 1e-2


def test_by_sampled_token_the_expected_gradient_is_that_of_reverse_kl_over_the_vocabulary():
    close(expected_gradient(OPD(), P.log(), Q), expected_gradient(OPD(teacher=ALL), P.log(), Q))
    assert (
        expected_gradient(KINDS["forward"][0], P.log(), Q) - expected_gradient(OPD(), P.log(), Q)
    ).abs().max() > 0.01


def test_swapping_teacher_and_student_flips_the_sign():
    (_, one), (_, other) = state(P.log(), Q), state(Q.log(), P)
    close(OPD().credit(one).advantage, -OPD().credit(other).advantage)


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_likelier_what_the_teacher_finds_likelier():
    out, batch = replies([[-1.0, -1.0, -1.0]], [[-0.5, -1.0, -4.0]])
    slope = slopes(OPD(), out, batch)[0]
    assert slope[0] < 0 == slope[1] < slope[2]


@pytest.mark.parametrize("method", [OPD(), *(method for method, _ in KINDS.values())])
def test_one_step_brings_the_student_closer_to_the_teacher(method):
    before, after = P.log(), (P.log() - 0.1 * expected_gradient(method, P.log(), Q)).log_softmax(-1)
    for divergence in (reverse_kl, forward_kl, jensen_shannon):
        assert divergence(after, Q.log()) < divergence(before, Q.log())


@kinds
def test_one_step_over_a_ragged_batch_brings_it_closer_too(kind):
    weights, batch = toy_batch()
    method, _ = KINDS[kind]
    fresh = on_policy(weights, batch)
    total = lambda table: (method.loss(forward(table, fresh), fresh, None).values * method.weights(fresh)).sum()  # noqa: E731
    moved = weights - 0.1 * gradient(method, weights, fresh)
    assert total(moved) < total(weights)


# --------------------------------------------------------------------------------------------------------- closed form


def test_the_advantages_by_hand():
    """log teacher - log student; their mean over the student is -KL(student || teacher), so most are negative."""
    _, batch = state(P.log(), Q)
    advantage = OPD().credit(batch).advantage[:, 0]
    close(advantage, torch.tensor([-0.916291, 0.847298, -0.693147]), atol=1e-6, rtol=0)
    close((P * advantage).sum(), -reverse_kl(P.log(), Q.log()))
    close((P * advantage).sum(), torch.tensor(-0.342585), atol=1e-6, rtol=0)


def test_the_expected_gradient_by_hand():
    ascent = torch.tensor([-0.286853, 0.356965, -0.070112])
    close(-expected_gradient(OPD(), P.log(), Q), ascent, atol=1e-6, rtol=0)
    close(expected_gradient(KINDS["forward"][0], P.log(), Q), P - Q)
    steps = torch.eye(3) * 1e-6
    finite = [
        reverse_kl((P.log() + d).log_softmax(-1), Q.log()) - reverse_kl((P.log() - d).log_softmax(-1), Q.log())
        for d in steps
    ]
    close(-torch.stack(finite) / 2e-6, ascent, atol=1e-6, rtol=0)


@kinds
def test_the_divergence_over_the_vocabulary_by_hand(kind):
    """0.342585, 0.340536 and 0.082844, whatever token was drawn."""
    method, divergence = KINDS[kind]
    number = {"reverse": 0.342585, "forward": 0.340536, "both": 0.082844}[kind]
    close(values(method), torch.full((3,), number), atol=1e-6, rtol=0)
    close(values(method), divergence(P.log(), Q.log()).expand(3))


@pytest.mark.parametrize(("mix", "number"), [(0.1, 0.030325), (0.5, 0.082844), (0.9, 0.030464)])
def test_the_mixture_by_hand(mix, number):
    """Agarwal et al. 2023, arXiv:2306.13649, eq. 1."""
    close(values(replace(KINDS["both"][0], mix=mix)), torch.full((3,), number), atol=1e-6, rtol=0)


def test_the_mixture_tends_to_the_other_two_but_for_a_factor():
    method = KINDS["both"][0]
    close(values(replace(method, mix=1e-6)) / 1e-6, values(KINDS["forward"][0]), atol=1e-5, rtol=0)
    close(values(replace(method, mix=1 - 1e-6)) / 1e-6, values(KINDS["reverse"][0]), atol=1e-5, rtol=0)


def test_top_k_with_its_tail_is_never_more_than_the_whole_and_is_it_for_all_but_one():
    """Teacher's first token: 0.338919; without the tail it would be 0.3 log(0.3 / 0.7) = -0.254189, no divergence."""
    some = OPD(teacher=Teacher(who="frozen", top_k=2))
    close(values(some, ids=[1]), torch.full((3,), 0.338919), atol=1e-6, rtol=0)
    close(values(some, ids=[1, 0]), torch.full((3,), 0.342585), atol=1e-6, rtol=0)
    close(values(some, ids=[1, 0]), values(OPD(teacher=ALL)))
    close(values(some, ids=[1, -1]), values(some, ids=[1]))
    close(P[1] * (P[1] / Q[1]).log(), torch.tensor(-0.254189), atol=1e-6, rtol=0)


def test_what_each_estimate_of_the_divergence_would_train():
    """As a loss k1 forgets the teacher, k2 is right, k3 trains the other divergence; as a cost only k1 is right."""
    numbers = {
        k1: ([0.0, 0.0, 0.0], [0.286853, -0.356965, 0.070112]),
        k2: ([0.286853, -0.356965, 0.070112], None),
        k3: ([0.3, -0.4, 0.1], [-0.013147, 0.043035, -0.029888]),
    }
    for estimate, (as_loss, as_cost) in numbers.items():
        logits = P.log().requires_grad_()
        logp = logits.log_softmax(-1)
        found = torch.autograd.grad((P * estimate(logp, Q.log())).sum(), logits, retain_graph=True)[0]
        close(found, torch.tensor(as_loss), atol=1e-6, rtol=0)
        if as_cost:
            cost = estimate(logp, Q.log()).detach()
            close(torch.autograd.grad((P * cost * logp).sum(), logits)[0], torch.tensor(as_cost), atol=1e-6, rtol=0)
    close(expected_gradient(OPD(), P.log(), Q), torch.tensor(numbers[k1][1]), atol=1e-6, rtol=0)


def test_every_token_counts_the_same():
    """One token of loss +1 and three of loss -1: -0.5; if replies counted the same it would be 0."""
    out, batch = replies([[-1.0], [-2.0, -2.0, -2.0]], [[-2.0], [-1.0, -1.0, -1.0]])
    loss = OPD().loss(out, batch, OPD().credit(batch))
    close(loss.values[batch.action_mask], torch.tensor([1.0, -1.0, -1.0, -1.0]))
    close((loss.values * OPD().weights(batch)).sum(), torch.tensor(-0.5))


def test_no_token_answers_for_a_later_one():
    """Gaps 1, -2, 3 are the advantages; a discount of 0.5 would give 0.75, -0.5, 3, and of 1 it would be 2, 1, 3."""
    _, batch = replies([[-4.0, -4.0, -4.0]], [[-3.0, -6.0, -1.0]])
    advantage = OPD().credit(batch).advantage
    facts = (advantage, batch.action_mask, batch.episode, torch.zeros(1, 3, dtype=torch.long))
    for discount, numbers in ((0.0, [1.0, -2.0, 3.0]), (0.5, [0.75, -0.5, 3.0]), (1.0, [2.0, 1.0, 3.0])):
        close(rewards_to_go(*facts, discount=discount), torch.tensor([numbers]))
    close(advantage, torch.tensor([[1.0, -2.0, 3.0]]))


def test_the_advantage_carries_no_gradient():
    """At ratio 1 the slope of a token is -A / tokens, with no second term from A itself."""
    out, batch = replies([[-1.0, -2.0]], [[-3.0, -1.5]])
    close(slopes(OPD(), out, batch), torch.tensor([[2.0, -0.5]]) / 2)


@kinds
def test_what_the_teacher_says_off_the_mask_does_not_matter(kind):
    weights, batch = toy_batch()
    off = torch.where(batch.action_mask, 0.0, -1e4)
    lost = batch.replace(
        teacher_logp=batch.teacher_logp + off, teacher_topk_logp=batch.teacher_topk_logp + off[..., None]
    )
    for method in (OPD(), KINDS[kind][0]):
        close(gradient(method, weights, lost), gradient(method, weights, batch), rtol=0, atol=0)


@pytest.mark.parametrize("method", [OPD(), *(method for method, _ in KINDS.values())])
def test_a_row_without_a_teacher_neither_trains_nor_counts(method):
    weights, batch = toy_batch()
    assert (~batch.has_teacher).any()
    close(gradient(method, weights, batch), gradient(method, weights, batch[batch.has_teacher]))
    nobody = batch.replace(has_teacher=batch.has_teacher & False)
    assert (method.weights(nobody) == 0).all() and (gradient(method, weights, nobody) == 0).all()


@kinds
def test_the_direct_loss_asks_nothing_of_the_token_that_was_sampled(kind):
    weights, batch = toy_batch()
    method, _ = KINDS[kind]
    absent = batch.replace(behavior_logp=None, teacher_logp=batch.teacher_logp * 0)
    close(gradient(method, weights, absent), gradient(method, weights, batch), rtol=0, atol=0)
    assert (method.credit(batch).advantage == 0).all()
    assert method.needs.live == {"topk_logp"} and {"topk_ids", "teacher_topk_logp"} <= method.needs.measured
    assert not OPD().needs.live and "topk_ids" not in OPD().needs.measured


@kinds
def test_the_direct_loss_reports_the_divergence(kind):
    out, batch = state(P.log(), Q)
    method, divergence = KINDS[kind]
    reported = method.loss(out, batch, method.credit(batch)).metrics["divergence"]
    close(reported, divergence(P.log(), Q.log()).expand(3, 1))
    weights, batch = toy_batch()
    loss = method.loss(forward(weights, batch), batch, method.credit(batch))
    assert loss.values.requires_grad and not loss.metrics["divergence"].requires_grad


def test_clipping_and_truncation_are_those_of_ppo():
    """Ratio e^0.5 with A = 1 is clipped at 1.2; a sampler that found the token e times less likely gives 2, not e."""
    out, batch = replies([[-1.0]], [[-0.5]], behavior=[[-2.5]])
    batch = batch.replace(proximal_logp=batch.proximal_logp - 0.5)
    loss = OPD().loss(out, batch, OPD().credit(batch))
    close(loss.values.detach(), torch.tensor([[-1.2 * 2.0]]))
    wide = OPD(clip_high=9.0, truncate=9.0).loss(out, batch, OPD().credit(batch))
    close(wide.values.detach(), -torch.tensor([[0.5]]).exp() * torch.tensor([[1.0]]).exp())
    out, below = replies([[-1.0]], [[-1.5]], behavior=[[-0.5]])
    below = below.replace(proximal_logp=below.proximal_logp + 0.5)  # ratio e^-0.5 with A = -1 is clipped at 0.8
    close(OPD().loss(out, below, OPD().credit(below)).values.detach(), torch.tensor([[0.8]]))


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("method", [OPD(), *(method for method, _ in KINDS.values())])
def test_it_becomes_the_teacher(method):
    close(descend(method, P.log(), Q), Q, atol=1e-4, rtol=0)


def test_from_samples_it_becomes_the_teacher_and_the_gap_that_is_logged_falls():
    weights, generator = torch.zeros(3, 3).requires_grad_(), torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(200):
        batch = bandit(weights, torch.zeros(3), groups=1, size=64, generator=generator)
        spoken = Q.log()[batch.tokens[:, 1:]]
        batch = batch.replace(
            teacher_logp=torch.cat([spoken * 0, spoken], 1), has_teacher=torch.ones(64, dtype=torch.bool)
        )
        gaps.append(-OPD().credit(batch).advantage[:, 1].mean())
        weights = (weights - 0.5 * gradient(OPD(), weights, batch)).detach().requires_grad_()
    close(weights[0].softmax(-1).detach(), Q, atol=0.03, rtol=0)
    assert gaps[0] > 0.2 and torch.stack(gaps[-50:]).mean().abs() < 0.02


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("divergence", ["forward", "jensen_shannon"])
def test_what_the_sampled_token_cannot_tell_is_refused(divergence):
    with pytest.raises(ConfigError, match=rf"divergence is {divergence}, but teacher.top_k is 0: .* Set teacher.top_k"):
        OPD(divergence=divergence)
    assert OPD(divergence=divergence, teacher=Teacher(who="frozen", top_k=1)).needs.live


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.5, 2.0])
def test_the_ends_of_the_mixture_are_refused(mix):
    with pytest.raises(ConfigError, match=f"OPD's mix is {mix}, where .* divergence: forward and divergence: reverse"):
        OPD(divergence="jensen_shannon", teacher=ALL, mix=mix)


def test_other_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="clip_low is"):
        OPD(clip_low=-0.1)
    with pytest.raises(ConfigError, match="truncate is 0"):
        OPD(truncate=0.0)


def test_every_path_to_the_loss_has_the_shape_of_the_batch():
    weights, batch = toy_batch()
    for method, _ in KINDS.values():
        assert method.loss(forward(weights, batch), batch, method.credit(batch)).values.shape == batch.tokens.shape
    assert batch.topk_ids.shape[-1] < V
