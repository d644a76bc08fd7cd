"""The best of n: by hand, by going through all subsets, and against what chance says."""

import itertools
import math
import statistics

import pytest
import torch

from tropism.maths.best_of_n import expected_best, kl_of_best

F64 = torch.float64


def brute(gold, proxy, n):
    """Over all subsets of size n; where several are best, the mean of their gold."""
    values = []
    for some in itertools.combinations(range(len(gold)), n):
        top = max(proxy[k] for k in some)
        values.append(statistics.fmean(gold[k] for k in some if proxy[k] == top))
    return statistics.fmean(values)


@pytest.mark.parametrize(("n", "value"), [(1, 0.6), (2, 0.8), (3, 0.9), (5, 1.0)])
def test_by_hand(n, value):
    """Gold in the order of the proxy: 0, 1, 0, 1, 1."""
    gold = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=F64)
    assert float(expected_best(gold, torch.arange(5.0, dtype=F64), n)) == pytest.approx(value)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_it_is_the_mean_over_all_subsets(n):
    gold, proxy = torch.randn(2, 6, generator=torch.Generator().manual_seed(n), dtype=F64)
    assert float(expected_best(gold, proxy, n)) == pytest.approx(brute(gold.tolist(), proxy.tolist(), n))


def test_equal_answers_share_what_they_are_worth():
    """All equal is the mean, whatever n; two equal ones at the top share the top."""
    gold = torch.tensor([1.0, 2.0, 6.0], dtype=F64)
    assert float(expected_best(gold, torch.zeros(3, dtype=F64), 2)) == pytest.approx(3.0)
    assert float(expected_best(gold, torch.tensor([0.0, 1.0, 1.0], dtype=F64), 3)) == pytest.approx(4.0)


def test_rows_are_apart():
    gold, proxy = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = expected_best(gold, proxy, 3)
    assert found.shape == (4,) and float(found[2]) == pytest.approx(float(expected_best(gold[2], proxy[2], 3)))


@pytest.mark.parametrize("n", [0, 7])
def test_more_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match="Use 1 to 6"):
        expected_best(torch.zeros(6), torch.zeros(6), n)


@pytest.mark.parametrize(
    ("n", "nats"), [(1, 0.0), (2, 0.193), (4, 0.636), (8, 1.204), (16, 1.835), (64, 3.175), (256, 4.549)]
)
def test_nats_of_the_best(n, nats):
    assert kl_of_best(n) == pytest.approx(nats, abs=5e-4)


@pytest.mark.parametrize("n", [2, 8])
def test_nats_are_those_of_the_largest_of_n_uniform_scores(n):
    """Its density is n u^(n - 1), so KL = E log(n u^(n - 1)) under it, here by a sum over fine steps."""
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert float((density * density.log()).mean()) == pytest.approx(kl_of_best(n), abs=1e-4)


def test_a_proxy_with_heavy_tails_is_hacked_and_one_with_light_tails_is_not():
    """Proxy = gold + error. Normal errors: gold keeps half of what the proxy gains. Student's t with two degrees of
    freedom: gold rises, and falls again. Kwa et al. 2024, arXiv:2407.14503."""
    generator = torch.Generator().manual_seed(0)
    gold = torch.randn(400, 256, generator=generator, dtype=F64)
    light = gold + torch.randn(400, 256, generator=generator, dtype=F64)
    normal, chi = torch.randn(3, 400, 256, generator=generator, dtype=F64).split([1, 2])
    heavy = gold + normal[0] / (chi.square().sum(0) / 2).sqrt()
    curve = {
        name: [float(expected_best(gold, proxy, n).mean()) for n in (4, 16, 64, 256)]
        for name, proxy in (("light", light), ("heavy", heavy))
    }
    assert curve["light"] == pytest.approx([0.73, 1.25, 1.66, 2.0], abs=0.12)
    assert curve["heavy"] == pytest.approx([0.55, 0.69, 0.46, 0.24], abs=0.12)
    assert curve["heavy"][0] < curve["heavy"][1] > curve["heavy"][3] + 0.2
    promised = [float(expected_best(light, light, n).mean()) for n in (4, 16, 64, 256)]
    assert promised == pytest.approx([1.45, 2.5, 3.31, 4.0], abs=0.12)
    assert curve["light"] == pytest.approx([value / 2 for value in promised], abs=0.08)


def test_ties_make_the_best_of_n_nearer_than_the_closed_form():
    """Of a fair coin the best of two is heads three times in four."""
    exact = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert exact == pytest.approx(0.130812, abs=1e-6) and exact < kl_of_best(2) == pytest.approx(math.log(2) - 0.5)


def test_where_the_proxy_is_the_verdict_it_is_pass_at_k():
    right = torch.tensor([1.0] * 3 + [0.0] * 7, dtype=F64)
    assert float(expected_best(right, right, 4)) == pytest.approx(1 - math.comb(7, 4) / math.comb(10, 4))
