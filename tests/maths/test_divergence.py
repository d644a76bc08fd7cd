import math

import pytest
import torch

from tropism.maths.divergence import (
    among_top_k,
    forward_kl,
    jensen_shannon,
    k1,
    k2,
    k3,
    reverse_kl,
    steered,
    with_tail,
)

close = torch.testing.assert_close

P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
FAR = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)


def expected(estimate, p=P, q=Q):
    return (p * estimate(p.log(), q.log())).sum()


def deviation(estimate):
    values = estimate(P.log(), Q.log())
    return (P * (values - expected(estimate)).square()).sum().sqrt()


def loss_gradient(estimate, q=Q):
    """Expected gradient to the logits of p when the estimate is a loss: the sampled token is fixed."""
    logits = P.log().requires_grad_()
    return torch.autograd.grad((P * estimate(logits.log_softmax(-1), q.log())).sum(), logits)[0]


def exact_gradient(divergence, q=Q):
    logits = P.log().requires_grad_()
    return torch.autograd.grad(divergence(logits.log_softmax(-1), q.log()), logits)[0]


def test_estimates_of_the_divergence_by_exact_enumeration():
    """Schulman 2020: k1 and k3 unbiased, k2 not; k2 and k3 far less noisy."""
    numbers = [expected(k1), expected(k2), expected(k3), deviation(k1), deviation(k2), deviation(k3)]
    close(
        torch.stack(numbers),
        torch.tensor([0.0252672, 0.0248624, 0.0252672, 0.2216, 0.0143, 0.0160]),
        atol=5e-5,
        rtol=0,
    )
    close(expected(k1), reverse_kl(P.log(), Q.log()))
    close(expected(k3), reverse_kl(P.log(), Q.log()))
    close(reverse_kl(P.log(), Q.log()), torch.tensor(0.0252672), atol=1e-7, rtol=0)
    close(forward_kl(P.log(), Q.log()), torch.tensor(0.0258154), atol=1e-7, rtol=0)


def test_with_the_roles_exchanged_k3_would_estimate_something_else():
    """On samples of p, exp(log p - log q) - 1 - (log p - log q) is chi^2 - KL, which hides near the start: .024733
    against .025267 here. Ours is not that."""
    exchanged = (P * k3(Q.log(), P.log())).sum()
    chi = (P.square() / Q).sum() - 1
    close(exchanged, chi - reverse_kl(P.log(), Q.log()))
    close(exchanged, torch.tensor(0.024733, dtype=torch.float64), atol=5e-7, rtol=0)
    assert abs(expected(k3) - exchanged) > 5e-4


def test_as_a_loss_k1_trains_nothing():
    close(loss_gradient(k1), torch.zeros(3))


def test_as_a_loss_k2_follows_the_divergence():
    close(loss_gradient(k2), torch.tensor([0.09894, -0.09388, -0.00505]), atol=1e-5, rtol=0)
    close(loss_gradient(k2), exact_gradient(reverse_kl))


def test_as_a_loss_k3_follows_the_other_divergence():
    close(loss_gradient(k3), torch.tensor([0.1, -0.1, 0.0]))
    close(loss_gradient(k3), exact_gradient(forward_kl))


def test_from_a_distant_pair_too():
    close(loss_gradient(k2, FAR), torch.tensor([0.286853, -0.356965, 0.070112]), atol=1e-6, rtol=0)
    close(loss_gradient(k3, FAR), P - FAR)


def test_k3_is_never_negative_and_zero_only_at_agreement():
    x = torch.linspace(-6, 6, 25)
    assert (k3(x, torch.zeros(25))[x != 0] > 0).all() and k3(torch.zeros(1), torch.zeros(1)) == 0
    close(k3(torch.tensor([-1.0]), torch.tensor([-2.0])), torch.tensor([math.exp(-1)]))


def test_divergences_of_a_distant_pair():
    """Student (.5, .3, .2), teacher (.2, .7, .1); GKD's generalized JSD, arXiv:2306.13649, eq. 1."""
    p, q = P.log(), FAR.log()
    found = [
        reverse_kl(p, q),
        forward_kl(p, q),
        jensen_shannon(p, q),
        jensen_shannon(p, q, mix=0.1),
        jensen_shannon(p, q, mix=0.9),
    ]
    close(torch.stack(found), torch.tensor([0.342585, 0.340536, 0.082844, 0.030325, 0.030464]), atol=1e-6, rtol=0)


def test_divergences_over_a_vocabulary_of_four():
    """Two positions, mean over them; published with SDPO (arXiv:2601.20802)."""
    p = torch.tensor(
        [[-1.4350729, -1.9350729, -0.6350728, -2.4350729], [-0.4234670, -2.4234672, -1.6234670, -2.8234673]]
    )
    q = torch.tensor(
        [[-0.9254559, -2.0254560, -1.2254559, -1.7254560], [-1.2512126, -0.6512126, -2.0512125, -2.7512126]]
    )
    found = [forward_kl(p, q).mean(), reverse_kl(p, q).mean(), jensen_shannon(p, q).mean()]
    close(torch.stack(found), torch.tensor([0.3899572, 0.3037020, 0.0804777]), atol=1e-6, rtol=0)


def test_jensen_shannon_is_symmetric_at_one_half_and_tends_to_both_ends():
    p, q = P.log(), FAR.log()
    close(jensen_shannon(p, q), jensen_shannon(q, p))
    close(jensen_shannon(p, q, mix=0.3), jensen_shannon(q, p, mix=0.7))
    close(jensen_shannon(p, q, mix=1e-6) / 1e-6, forward_kl(p, q), atol=1e-5, rtol=0)
    close(jensen_shannon(p, q, mix=1 - 1e-6) / 1e-6, reverse_kl(p, q), atol=1e-5, rtol=0)
    assert jensen_shannon(torch.tensor([0.0, -80.0]), torch.tensor([-80.0, 0.0])) <= math.log(2) + 1e-12


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.5, 2.0])
def test_the_ends_of_jensen_shannon_are_refused(mix):
    with pytest.raises(ValueError, match="Use forward_kl or reverse_kl"):
        jensen_shannon(P.log(), Q.log(), mix=mix)


def test_the_gradient_of_jensen_shannon_is_that_of_reverse_kl_to_the_mixture():
    """g = (1 - mix) p (log p - log m - KL(p || m))"""
    m = 0.7 * P + 0.3 * FAR
    gap = P.log() - m.log()
    exact = 0.7 * P * (gap - (P * gap).sum())
    close(exact_gradient(lambda p, q: jensen_shannon(p, q, mix=0.3), FAR), exact)


def test_crediting_the_log_ratio_is_the_gradient_of_reverse_kl():
    """E_{v~p}[-(log q - log p) grad log p] = grad KL(p || q), summed over the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator).requires_grad_()
    logq = torch.randn(6, generator=generator).log_softmax(-1)
    logp = logits.log_softmax(-1)
    credit = -k1(logp, logq).detach()
    (surrogate,) = torch.autograd.grad((logp.exp().detach() * -credit * logp).sum(), logits, retain_graph=True)
    close(surrogate, torch.autograd.grad(reverse_kl(logp, logq), logits)[0])


def test_the_student_steps_towards_the_teacher_under_every_divergence():
    for divergence in (reverse_kl, forward_kl, jensen_shannon):
        moved = (P.log() - 0.1 * exact_gradient(divergence, FAR)).log_softmax(-1)
        assert divergence(moved, FAR.log()) < divergence(P.log(), FAR.log())
        close(divergence(FAR.log(), FAR.log()), torch.tensor(0.0))


# -------------------------------------------------------------------------------------------------------------- top K


def ids(*shape):
    return torch.arange(shape[-1]).expand(shape)


def test_the_tail_is_the_rest_of_the_mass():
    close(with_tail(torch.tensor([0.45, 0.25, 0.10]).log(), ids(3)).exp(), torch.tensor([0.45, 0.25, 0.10, 0.20]))


def test_top_three_and_a_tail_by_hand():
    p = with_tail(torch.tensor([[0.45, 0.25, 0.10], [0.35, 0.20, 0.15]]).log(), ids(2, 3))
    q = with_tail(torch.tensor([[0.30, 0.35, 0.15], [0.25, 0.25, 0.20]]).log(), ids(2, 3))
    close(reverse_kl(p, q).mean(), torch.tensor(0.0438895), atol=1e-7, rtol=0)
    close(jensen_shannon(p, q), torch.tensor([0.01425393, 0.00736977]), atol=1e-8, rtol=0)


def test_a_tail_never_adds_to_the_divergence():
    """Data processing: 0.338919 with the teacher's best token, 0.342585 with two of three, which is all there is."""
    one = reverse_kl(with_tail(P.log()[1:2], ids(1)), with_tail(FAR.log()[1:2], ids(1)))
    two = reverse_kl(with_tail(P.log()[:2], ids(2)), with_tail(FAR.log()[:2], ids(2)))
    close(torch.stack([one, two]), torch.tensor([0.338919, 0.342585]), atol=1e-6, rtol=0)
    close(two, reverse_kl(P.log(), FAR.log()))


def test_an_unused_place_changes_nothing_whatever_it_holds():
    places = torch.tensor([1, -1, 2])
    short_p, short_q = with_tail(P.log()[1:], ids(2)), with_tail(FAR.log()[1:], ids(2))
    for filling in (0.0, -7.0, 3.0):
        p = with_tail(torch.stack([P.log()[1], torch.tensor(filling), P.log()[2]]), places)
        q = with_tail(torch.stack([FAR.log()[1], torch.tensor(-filling), FAR.log()[2]]), places)
        assert p.isfinite().all()
        close(p[3], torch.tensor(0.5).log())
        for divergence in (reverse_kl, forward_kl, jensen_shannon):
            close(divergence(p, q), divergence(short_p, short_q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_vocabulary_leaves_no_tail_and_no_nan(dtype):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    logq = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype).log_softmax(-1)
    p, q = with_tail(logits.log_softmax(-1), ids(5, 7)), with_tail(logq, ids(5, 7))
    found = reverse_kl(p, q)
    close(found, reverse_kl(logits.log_softmax(-1), logq), atol=1e-5, rtol=1e-5)
    assert (p[:, -1].exp() < 1e-6).all()
    assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()
    assert with_tail(logq, None) is logq


def test_places_off_the_mask_hold_zeros_and_stay_finite():
    logp = torch.zeros(2, 3, requires_grad=True)
    found = reverse_kl(with_tail(logp, ids(2, 3)), with_tail(torch.zeros(2, 3), ids(2, 3)))
    assert found.tolist() == [0, 0]
    assert torch.autograd.grad(found.sum(), logp)[0].isfinite().all()


def test_the_gradient_reaches_through_the_tail():
    logits = torch.tensor([0.3, -0.2, 0.1, 0.5], requires_grad=True)
    q = with_tail(torch.tensor([0.4, 0.1]).log(), ids(2))
    run = lambda x: reverse_kl(with_tail(x.log_softmax(-1)[:2], ids(2)), q)  # noqa: E731
    assert torch.autograd.gradcheck(run, (logits,))


def test_divergences_refuse_to_broadcast():
    for divergence in (k1, k2, k3, reverse_kl, forward_kl, jensen_shannon, with_tail):
        with pytest.raises(ValueError, match="they must match"):
            divergence(torch.zeros(4, 4), torch.zeros(4, dtype=torch.long))


def test_among_the_likeliest_tokens_probabilities_sum_to_one():
    logp = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    close(among_top_k(logp[:2], ids(2)), torch.tensor([4 / 7, 3 / 7]))
    close(among_top_k(logp, ids(4)), logp.exp())
    gappy = among_top_k(torch.stack([logp[0], torch.tensor(9.0), logp[1]]), torch.tensor([0, -1, 1]))
    close(gappy, torch.tensor([4 / 7, 0.0, 3 / 7]))
    assert (among_top_k(logp[:2], torch.tensor([-1, -1])) == 0).all()
    with pytest.raises(ValueError, match="they must match"):
        among_top_k(torch.zeros(4, 4), torch.zeros(4, dtype=torch.long))


def test_the_teachers_two_likeliest_tokens_and_their_tail_by_hand():
    """Reverse KL of (.4, .3, .2, .1) to (.1, .6, .25, .05) on tokens 1 and 2: OpenClaw-RL, arXiv:2603.10165 v1."""
    p, q, two = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.tensor([0.1, 0.6, 0.25, 0.05]).log(), [1, 2]
    close(reverse_kl(p, q), torch.tensor(0.371260), atol=1e-6, rtol=0)
    coarse = reverse_kl(with_tail(p[two], ids(2)), with_tail(q[two], ids(2)))
    close(coarse, torch.tensor(0.349414), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("nats", "by"), [(0.2, 0.2), (0.05, -0.2), (0.1, 0.0), (0.11, 0.1), (1e9, 0.2), (-5.0, -0.2)])
def test_the_weight_follows_its_target_by_a_bounded_step(nats, by):
    """Target 0.1, horizon 10, two episodes of three rows. Ziegler et al. 2019, arXiv:1909.08593, section 2.2."""
    away = torch.tensor([[nats, 0.0], [nats / 2, nats / 4], [0.0, nats / 4]], dtype=torch.float64)
    found = steered(0.5, away, torch.tensor([3, 8, 8]), target=0.1, horizon=10)
    assert float(found) == pytest.approx(0.5 * (1 + by * 2 / 10))


def test_a_batch_without_episodes_leaves_the_weight_as_it_was():
    none = torch.zeros(0, 3, dtype=torch.float64)
    assert float(steered(0.1, none, torch.zeros(0, dtype=torch.long), target=2.0, horizon=10)) == 0.1
