import math

import pytest
import torch

from tropism.maths.surrogate import (
    cispo,
    clipped_surrogate,
    importance_weight,
    masked_weight,
    policy_loss,
    sequence_log_ratio,
    token_log_ratio,
    truncated_weight,
)

close = torch.testing.assert_close


def at(ratio, advantage, **options):
    """(objective, gradient to log r, clipped) of one token, limits 0.2."""
    log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, clipped = clipped_surrogate(log_ratio, torch.tensor([[float(advantage)]]), low=0.2, high=0.2, **options)
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    return -loss.item(), -slope.item(), clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "learns"),
    [
        (0.5, 1, 0.5, True),
        (0.5, -1, -0.8, False),
        (0.8001, 1, 0.8001, True),
        (0.8001, -1, -0.8001, True),
        (1.0, 1, 1.0, True),
        (1.0, -1, -1.0, True),
        (1.1999, 1, 1.1999, True),
        (1.1999, -1, -1.1999, True),
        (1.5, 1, 1.2, False),
        (1.5, -1, -1.5, True),
        (4.0, 1, 1.2, False),
        (4.0, -1, -4.0, True),
    ],
)
def test_clipping_binds_only_where_the_policy_already_moved_the_way_it_should(ratio, advantage, objective, learns):
    """arXiv:1707.06347, figure 1. A large ratio with a negative advantage is not limited."""
    value, slope, clipped = at(ratio, advantage)
    assert value == pytest.approx(objective)
    assert slope == pytest.approx(ratio * advantage if learns else 0.0)
    assert clipped is not learns


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "learns"),
    [
        (0.5, -1, -0.8, False),
        (1.5, -1, -1.5, True),
        (2.9999, -1, -2.9999, True),
        (4.0, -1, -3.0, False),
        (4.0, -2, -6.0, False),
        (4.0, 1, 1.2, False),
        (4.0, 0.5, 0.6, False),
        (0.5, 1, 0.5, True),
        (0.5, 0, 0.0, True),
    ],
)
def test_the_dual_clip_limits_a_large_ratio_with_a_negative_advantage(ratio, advantage, objective, learns):
    """Ye et al. 2019, arXiv:1912.09729, eq. 5, c = 3."""
    value, slope, clipped = at(ratio, advantage, dual=3.0)
    assert value == pytest.approx(objective)
    assert slope == pytest.approx(ratio * advantage if learns else 0.0)
    assert clipped is not learns


def test_the_two_bounds_are_separate():
    advantage = torch.tensor([[1.0, -1.0]])
    loss, _ = clipped_surrogate(torch.tensor([[5.0, -5.0]]), advantage, low=0.1, high=0.3)
    close(loss, torch.tensor([[-1.3, 0.9]]))


def test_on_policy_every_loss_has_the_gradient_of_reinforce():
    """First pass over a batch: ratio 1, so PPO, its dual clip, GSPO and CISPO are -A grad log pi."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(3, 4, generator=generator).requires_grad_()
    advantage = torch.randn(3, 1, generator=generator).expand(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    token = token_log_ratio(logp, logp.detach())
    sequence = sequence_log_ratio(logp, logp.detach(), mask)
    for loss, clipped in (
        clipped_surrogate(token, advantage, low=0.2, high=0.2),
        clipped_surrogate(token, advantage, low=0.2, high=0.2, dual=3.0),
        clipped_surrogate(sequence, advantage, low=0.2, high=0.2),
        cispo(logp, token, advantage, low=0.2, high=0.2),
    ):
        assert not clipped.any()
        close(torch.autograd.grad(loss.sum(), logp, retain_graph=True)[0], -advantage)


def test_finite_differences_agree_in_and_out_of_the_clipped_region():
    ratio = torch.tensor([[0.3, 0.9, 1.1, 1.7, 3.5]]).log().requires_grad_()
    for sign in (1.0, -1.0):
        advantage = torch.full_like(ratio, sign).detach()
        for dual in (None, 3.0):
            run = lambda x: clipped_surrogate(x, advantage, low=0.2, high=0.28, dual=dual)[0]  # noqa: B023, E731
            assert torch.autograd.gradcheck(run, (ratio,))


def test_the_sequence_ratio_is_the_geometric_mean():
    """Log ratios 0.1, -0.2, 0.3: s = e^0.0667 = 1.06894, where the product would be 1.22140."""
    logp = torch.tensor([[0.1, -0.2, 0.3, 9.0]])
    found = sequence_log_ratio(logp, torch.zeros(1, 4), torch.tensor([[True, True, True, False]]))
    close(found, torch.tensor([[0.2 / 3, 0.2 / 3, 0.2 / 3, 0.0]]))
    close(found[0, 0].exp(), torch.tensor(1.06894), atol=1e-5, rtol=0)


def test_the_gradient_of_the_sequence_ratio_is_s_grad_log_pi_on_each_token():
    """arXiv:2507.18071, eq. 15: with the mean over tokens outside, (1 / |y|) sum_t s A grad log pi_t."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(2, 4, generator=generator)
    logp = (old + 0.1 * torch.randn(2, 4, generator=generator)).requires_grad_()
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    advantage = torch.tensor([[2.0], [-1.0]])
    ratio = sequence_log_ratio(logp, old, mask).exp()
    (found,) = torch.autograd.grad((ratio * advantage * mask / mask.sum(1, keepdim=True)).sum(), logp)
    scale = torch.stack([(logp - old)[i, : 3 - i].mean().exp() for i in (0, 1)])[:, None]
    close(found, scale.detach() * advantage * mask / mask.sum(1, keepdim=True))
    # The same as differentiating the geometric mean itself, once per sequence.
    direct = sum(advantage[i, 0] * (logp - old)[i, : 3 - i].mean().exp() for i in (0, 1))
    close(found, torch.autograd.grad(direct, logp)[0])


def test_the_sequence_ratio_spans_the_rows_of_an_episode():
    logp = torch.tensor([[0.1, 0.2], [0.7, 0.0], [0.6, 5.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    found = sequence_log_ratio(logp, torch.zeros(3, 2), mask, torch.tensor([4, 1, 4]))
    close(found, torch.tensor([[0.3, 0.3], [0.35, 0.35], [0.3, 0.0]]))
    rows = sequence_log_ratio(logp, torch.zeros(3, 2), mask)
    close(rows, torch.tensor([[0.15, 0.15], [0.35, 0.35], [0.6, 0.0]]))


def test_the_sequence_ratio_has_no_gradient_off_the_mask():
    logp = torch.zeros(1, 3, requires_grad=True)
    found = sequence_log_ratio(logp, torch.ones(1, 3), torch.tensor([[False, True, True]]))
    assert torch.autograd.grad(found.sum(), logp)[0].tolist() == [[0, 1, 1]]


def test_a_row_without_action_tokens_has_no_sequence_ratio_and_no_nan():
    found = sequence_log_ratio(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([[False, False], [True, False]]))
    assert found.tolist() == [[0, 0], [1, 0]]


def test_cispo_clips_the_weight_and_never_the_token():
    """arXiv:2506.13585, eq. 4: loss -sg[clip(r)] A log pi; the gradient survives clipping on both sides."""
    logp = torch.tensor([[-1.0, -2.0, -3.0, -1.0]], requires_grad=True)
    old = logp.detach() - torch.tensor([[0.5, 1.0, 1.1, 4.0]]).log()
    advantage = torch.tensor([[1.0, -2.0, 3.0, 1.0]])
    loss, clipped = cispo(logp, token_log_ratio(logp, old), advantage, low=0.3, high=0.2)
    weight = torch.tensor([[0.7, 1.0, 1.1, 1.2]])
    close(loss, -weight * advantage * logp)
    close(torch.autograd.grad(loss.sum(), logp)[0], -weight * advantage)
    assert clipped.tolist() == [[True, False, False, True]]
    open_below, _ = cispo(logp, token_log_ratio(logp, old), advantage, low=1.0, high=4.0)
    close(open_below, -torch.tensor([[0.5, 1.0, 1.1, 4.0]]) * advantage * logp)


def test_truncated_importance_weights_trade_bias_for_variance():
    """Sampler (.5, .3, .2), policy (.2, .3, .5), rewards (1, 0, .5): the exact value is 0.45."""
    sampler, policy = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    for limit, value, mass in (
        (1.0, 0.30, 0.7),
        (1.5, 0.35, 0.8),
        (2.0, 0.40, 0.9),
        (2.5, 0.45, 1.0),
        (9.0, 0.45, 1.0),
    ):
        weight = truncated_weight(policy.log(), sampler.log(), limit=limit)
        close((sampler * weight * torch.tensor([[1.0, 0.0, 0.5]])).sum(), torch.tensor(value))
        close((sampler * weight).sum(), torch.tensor(mass))


def test_what_dropping_costs_where_truncation_only_shortens():
    """The same three actions: bounds .5 and 2 drop both that pay, and what is left earns nothing."""
    sampler, policy = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    weight = masked_weight(policy.log(), sampler.log(), low=0.5, high=2.0)
    close((sampler * weight * torch.tensor([[1.0, 0.0, 0.5]])).sum(), torch.tensor(0.0))
    close(weight, torch.tensor([[0.0, 1.0, 0.0]]))


def test_where_sampler_and_trainer_are_one_the_weight_is_exactly_one_and_has_no_gradient():
    logp = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_()
    weight = truncated_weight(logp, logp, limit=2.0)
    assert (weight == 1).all() and not weight.requires_grad


def test_an_uncorrected_sampler_moves_the_optimum_of_a_policy_with_shared_parameters():
    """Logits theta (0, 1, 2), rewards (0, 1, 0), sampler shifted by (.5, -.3, 0); baseline the weighted mean reward.

    The expected gradient is zero at theta = 0 with exact weights or limit 2, at 0.25 without any, at 0.0558 with
    limit 1. (With one parameter per action all of them would find the same optimum.)
    """
    steps, pays = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 0.0])

    def drift(theta, limit):
        policy = (theta * steps).log_softmax(-1)
        sampler = (theta * steps + torch.tensor([0.5, -0.3, 0.0])).log_softmax(-1)
        weight = torch.ones(3) if limit is None else truncated_weight(policy[None], sampler[None], limit=limit)[0]
        share = sampler.exp() * weight
        baseline = (share * pays).sum() / share.sum()
        return (share * (pays - baseline) * (steps - (policy.exp() * steps).sum())).sum().item()

    for limit, root in ((1e9, 0.0), (2.0, 0.0), (None, 0.25), (1.0, 0.0558)):
        assert drift(root - 0.01, limit) > 0 > drift(root + 0.01, limit)


def test_the_surrogates_refuse_to_broadcast():
    square, flat = torch.zeros(4, 4), torch.zeros(4)
    for attempt in (
        lambda: token_log_ratio(square, flat),
        lambda: clipped_surrogate(square, flat, low=0.2, high=0.2),
        lambda: cispo(square, square, flat, low=0.2, high=0.2),
        lambda: truncated_weight(square, flat, limit=2.0),
    ):
        with pytest.raises(ValueError, match=r"is \[4\] but .* is \[4, 4\]"):
            attempt()


def test_the_importance_weight_bounds_each_of_its_two_ratios():
    """pi / proximal is 1.5 and 3, proximal / behavior 4 and 0.5: min(1.5, 2) min(4, 2) = 3, min(3, 2) 0.5 = 1."""
    proximal = torch.zeros(1, 2)
    logp, behavior = torch.tensor([[1.5, 3.0]]).log().requires_grad_(), -torch.tensor([[4.0, 0.5]]).log()
    found = importance_weight(logp, proximal, behavior, limit=2.0)
    close(found, torch.tensor([[3.0, 1.0]]))
    assert not found.requires_grad


def test_a_masked_weight_drops_what_is_outside_its_bounds_and_keeps_the_bounds():
    sampler = torch.tensor([[1.0, 0.5, 2.0, 0.49, 2.01, 3.0]]).log()
    weight = masked_weight(torch.zeros(1, 6, requires_grad=True), -sampler, low=0.5, high=2.0)
    close(weight, torch.tensor([[1.0, 0.5, 2.0, 0.0, 0.0, 0.0]]))
    assert not weight.requires_grad and truncated_weight(torch.zeros(1, 6), -sampler, limit=2.0)[0, 5] == 2
    close(masked_weight(torch.full((1, 6), 0.3), 0.3 - sampler, low=0.5, high=2.0), weight)
    far = masked_weight(torch.zeros(1, 1), torch.full((1, 1), -1e4), low=0.5, high=2.0)
    assert far.item() == 0  # and not 0 times infinity
    with pytest.raises(ValueError, match="masked_weight"):
        masked_weight(torch.zeros(4, 4), torch.zeros(4), low=0.5, high=2.0)


def test_the_policy_loss_is_the_clipped_surrogate_times_the_weight_of_the_sampler():
    """Ratios 1.5 and 0.5 to the proximal policy, itself 1.5 and 4 times the sampler; the second weight is cut to 2."""
    proximal = torch.tensor([[math.log(0.3), math.log(0.4)]])
    behavior = torch.tensor([[math.log(0.2), math.log(0.1)]])
    logp = (proximal + torch.tensor([[math.log(1.5), math.log(0.5)]])).requires_grad_()
    advantage = torch.tensor([[-2.0, 2.0]])
    loss, metrics = policy_loss(logp, proximal, behavior, advantage, low=0.2, high=0.2)
    close(loss.detach(), torch.tensor([[3.0 * 1.5, -1.0 * 2]]))
    close(metrics["ratio"], torch.tensor([[1.5, 0.5]]))
    close(metrics["sampling/importance_sampling_ratio/mean"], torch.tensor([[1.5, 2.0]]))
    close(metrics["clip_ratio/region_mean"], torch.tensor([[0.0, 0.0]]))
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    close(slope, loss.detach())
    wide, _ = policy_loss(logp, proximal, behavior, advantage, low=0.2, high=0.2, limit=9.0)
    close(wide.detach(), torch.tensor([[4.5, -4.0]]))
    bounded, told = policy_loss(logp, proximal, behavior, advantage, low=0.2, high=0.2, dual=1.25)
    close(bounded.detach(), torch.tensor([[2.5 * 1.5, -2.0]]))
    close(told["clip_ratio/region_mean"], torch.tensor([[1.0, 0.0]]))
