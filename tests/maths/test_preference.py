"""The losses of preferred answers against tables of numbers, their slopes, their least points and each other."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from tropism.maths import preference

close = torch.testing.assert_close
F64 = torch.float64


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def slope(function, at):
    x = numbers(*at).requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_bradley_and_terrys_loss_and_its_slope_by_hand():
    """-log s(m) and -s(-m) at four margins. Rafailov et al. 2023, arXiv:2305.18290, eq. 2."""
    margins = (-2.0, 0.0, 1.0, 2.0)
    close(preference.sigmoid(numbers(*margins)), numbers(2.12693, 0.69315, 0.31326, 0.12693), atol=5e-6, rtol=0)
    close(slope(preference.sigmoid, margins), numbers(-0.88080, -0.5, -0.26894, -0.11920), atol=5e-6, rtol=0)
    close(preference.sigmoid(numbers(*margins) - 1), numbers(3.04859, 1.31326, 0.69315, 0.31326), atol=5e-6, rtol=0)


def test_it_stays_finite_where_a_sigmoid_would_be_zero():
    close(preference.sigmoid(numbers(-1000.0, 1000.0)), numbers(1000.0, 0.0))


def test_a_ranking_of_two_is_bradley_and_terrys_pair_and_every_order_has_a_share_of_one():
    pairs = torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    close(preference.plackett_luce(pairs), preference.sigmoid(pairs[:, 0] - pairs[:, 1]))
    close(preference.plackett_luce(torch.zeros(4, dtype=F64)), torch.tensor(math.log(24), dtype=F64))
    scores = torch.tensor([1.0, -0.5, 0.3], dtype=F64)
    orders = torch.tensor(list(itertools.permutations(range(3))))
    shares = torch.exp(-preference.plackett_luce(scores[orders]))
    close(shares.sum(), torch.tensor(1.0, dtype=F64))
    assert shares.argmax() == orders.tolist().index([0, 2, 1])
    first = torch.exp(scores) / torch.exp(scores).sum()
    close(shares[orders[:, 0] == 1].sum(), first[1])


@pytest.mark.parametrize(
    ("margin", "plain", "smoothed", "robust"),
    [
        (0.5, 0.474077, 0.524077, 0.411577),
        (-0.5, 0.974077, 0.924077, 1.036577),
        (0.0, math.log(2), math.log(2), math.log(2)),
    ],
)
def test_smoothed_and_robust_losses_by_hand(margin, plain, smoothed, robust):
    """A tenth of the labels taken to be wrong."""
    found = [preference.sigmoid(numbers(margin)), preference.sigmoid(numbers(margin), smoothing=0.1)]
    found.append(preference.robust(numbers(margin), flipped=0.1))
    close(torch.cat(found), numbers(plain, smoothed, robust), atol=5e-7, rtol=0)


def test_without_wrong_labels_all_three_are_one():
    m = torch.linspace(-3, 3, 13, dtype=F64)
    close(preference.sigmoid(m, smoothing=0.0), -logsigmoid(m))
    close(preference.robust(m, flipped=0.0), preference.sigmoid(m))


def test_the_smoothed_loss_is_the_mixture_that_it_stands_for():
    m = torch.linspace(-5, 5, 11, dtype=F64)
    close(preference.sigmoid(m, smoothing=0.2), -0.8 * logsigmoid(m) - 0.2 * logsigmoid(-m))
    mixed = (-0.8 * logsigmoid(m) + 0.2 * logsigmoid(-m)) / 0.6
    close(preference.robust(m, flipped=0.2), mixed)


def test_the_smoothed_loss_is_least_where_the_labels_are_as_often_wrong_as_it_says():
    close(slope(lambda m: preference.sigmoid(m, smoothing=0.1), [math.log(9.0)]), numbers(0.0), atol=1e-12, rtol=0)


def test_the_robust_loss_is_unbiased_where_labels_are_flipped():
    """Its mean over flips is the loss of the clean label. Ray Chowdhury et al. 2024, arXiv:2403.00409, lemma 3.1."""
    m = torch.linspace(-4, 4, 9, dtype=F64)
    mean = 0.7 * preference.robust(m, flipped=0.3) + 0.3 * preference.robust(-m, flipped=0.3)
    close(mean, preference.sigmoid(m))


def test_the_hinge_stops_at_margin_one():
    close(preference.hinge(numbers(-1.0, 0.0, 0.5, 1.0, 3.0)), numbers(2.0, 1.0, 0.5, 0.0, 0.0))
    close(slope(preference.hinge, [-1.0, 0.5, 3.0]), numbers(-1.0, -1.0, 0.0))


def test_the_square_is_least_at_its_target_and_not_beyond():
    """At margin 0 and beta 0.1 it is 25, and least at 5. Azar et al. 2023, arXiv:2310.12036, eq. 17."""
    close(preference.squared(numbers(0.0, 5.0, 8.0), target=5.0), numbers(25.0, 0.0, 9.0))
    close(slope(lambda m: preference.squared(m, target=5.0), [0.0, 5.0, 8.0]), numbers(-10.0, 0.0, 6.0))


def test_prospect_values_by_hand():
    """Half where the policy is its reference; z moves the point of indifference. arXiv:2402.01306, eq. 8."""
    x, z = numbers(0.0, 0.0, 2.0, 2.0), numbers(0.0, 0.0, 0.5, 0.5)
    desirable = torch.tensor([True, False, True, False])
    s = 1 / (1 + math.exp(-0.1 * 1.5))
    close(preference.prospect(x, z, desirable, beta=0.1), numbers(0.5, 0.5, 1 - s, s))


def test_prospect_sends_no_gradient_through_the_drift_and_saturates_both_ways():
    x, z = numbers(3.0, -300.0).requires_grad_(), numbers(1.0, 1.0).requires_grad_()
    preference.prospect(x, z, torch.tensor([True, True]), beta=1.0).sum().backward()
    assert z.grad is None and x.grad[0] < -0.01 and abs(x.grad[1]) < 1e-6


def test_log_odds_by_hand():
    """Mean log-probabilities -0.5 and -0.7: their log-odds differ by .446411. arXiv:2403.07691, eq. 4."""
    good, bad = preference.log_odds(numbers(-0.5, -0.7))
    close(good - bad, torch.tensor(0.446411, dtype=F64), atol=5e-7, rtol=0)
    close(preference.sigmoid(good - bad), torch.tensor(0.494648, dtype=F64), atol=5e-7, rtol=0)
    close(preference.log_odds(numbers(math.log(0.5), math.log(0.2), -50.0)), numbers(0.0, math.log(0.25), -50.0))


def test_log_odds_are_finite_with_finite_slope_where_an_answer_is_certain():
    for dtype in (torch.float32, F64):
        at = torch.tensor([0.0, -1e-30], dtype=dtype).requires_grad_()
        odds = preference.log_odds(at)
        odds.sum().backward()
        assert odds.isfinite().all() and at.grad.isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "squared"])
def test_the_better_the_margin_the_smaller_the_loss_until_it_is_enough(name):
    given = {"squared": {"target": 10.0}}.get(name, {})
    values = getattr(preference, name)(torch.linspace(-5, 5, 21, dtype=F64), **given)
    assert (values.diff() <= 0).all()


def test_what_is_watched_stands_where_it_belongs():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1], [0, 1, 0]]).bool()
    reward, logp = numbers(2.0, 1.0, 0.0, 3.0), numbers(-1.0, -2.0, -3.0, -4.0)
    chosen, group = torch.tensor([True, False, False, True]), torch.tensor([5, 5, 7, 7])
    told = preference.watched(reward.requires_grad_(), logp, chosen, group, mask)
    found = {name: value[where].tolist() for name, (value, where) in told.items()}
    assert found == {
        "rewards/chosen": [2.0, 3.0],
        "rewards/rejected": [1.0, 0.0],
        "logps/chosen": [-1.0, -4.0],
        "logps/rejected": [-2.0, -3.0],
        "rewards/margins": [1.0, 3.0],
        "rewards/accuracies": [1.0, 1.0],
    }
    assert not any(value.requires_grad for value, _ in told.values())


def test_a_tie_is_no_success():
    mask = torch.ones(2, 1).bool()
    told = preference.watched(
        numbers(1.0, 1.0), numbers(0.0, 0.0), mask[:, 0] & numbers(1, 0).bool(), numbers(0, 0), mask
    )
    value, where = told["rewards/accuracies"]
    assert value[where].tolist() == [0.0]
