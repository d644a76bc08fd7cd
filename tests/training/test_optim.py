import math

import pytest
import torch

from tropism.config import Train
from tropism.errors import ConfigError
from tropism.training.optim import AdamW, scheduled


def made(**settings):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    return module, AdamW(module, Train(**{"learning_rate": 0.1, "max_grad_norm": 0.0} | settings))


def pushed(module, value):
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_warm_up_rises_in_a_line_to_the_learning_rate():
    train = Train(learning_rate=2.0, warmup=4)
    assert [scheduled(train, k, 100) for k in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("decay", "expected"), [("none", [2, 2, 2, 2]), ("linear", [2, 1.55, 1.1, 0.65]), ("cosine", [2, None, 1.1, None])]
)
def test_the_learning_rate_falls_from_warm_up_to_its_final_share(decay, expected):
    """At a quarter of the way a cosine has fallen by (1 - cos(pi/4)) / 2."""
    train = Train(learning_rate=2.0, warmup=2, decay=decay, final=0.1)
    found = [scheduled(train, 2 + 25 * k, 102) for k in range(4)]
    quarter = 0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2
    expected = [quarter if e is None and k == 1 else 2.2 - quarter if e is None else e for k, e in enumerate(expected)]
    assert found == pytest.approx(expected)
    assert scheduled(train, 102, 102) == pytest.approx({"none": 2.0}.get(decay, 0.2))


def test_without_warm_up_the_first_step_has_the_full_rate_and_no_step_divides_by_zero():
    assert scheduled(Train(learning_rate=2.0, decay="linear"), 0, 10) == 2.0
    assert scheduled(Train(learning_rate=2.0, warmup=3, decay="cosine"), 3, 3) == 2.0
    assert scheduled(Train(learning_rate=2.0, warmup=3, decay="linear"), 4, 4) == 0.0


def test_one_step_is_the_one_of_the_paper():
    """Adam's first step moves every weight by the rate, whatever the gradient's size; decay takes rate * decay * w off
    matrices and nothing off norms and biases (Loshchilov and Hutter 2019, algorithm 2)."""
    module, optimizer = made(weight_decay=0.5)
    pushed(module, 3.0)
    optimizer.step(0.01)
    for name, parameter in module.named_parameters():
        left = 1.0 - 0.01 * 0.5 if name == "0.weight" else 1.0
        assert torch.allclose(parameter, torch.full_like(parameter, left - 0.01), atol=1e-6), name


def test_the_gradient_is_forgotten_after_a_step():
    module, optimizer = made()
    pushed(module, 1.0)
    optimizer.step(0.1)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("limit", [0.5, 100.0, 0.0])
def test_a_gradient_longer_than_the_limit_is_shortened_to_it(limit):
    """Its direction stays. Read off Adam's first moment, which is a tenth of the gradient at betas (0.9, …)."""
    module, optimizer = made(max_grad_norm=limit)
    pushed(module, 2.0)
    norm = 2.0 * math.sqrt(sum(p.numel() for p in module.parameters()))
    assert optimizer.step(0.1)["grad_norm"] == pytest.approx(norm)
    seen = torch.cat([optimizer.inner.state[p]["exp_avg"].flatten() for p in module.parameters()]) * 10
    assert float(seen.norm()) == pytest.approx(min(norm, limit or norm), rel=1e-4)
    assert torch.allclose(seen, seen[0].expand_as(seen))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(bad):
    module, optimizer = made(max_grad_norm=1.0, weight_decay=0.1)
    pushed(module, 1.0)
    next(module.parameters()).grad[0, 0] = bad
    assert optimizer.step(0.1) == {"skipped": 1.0, "not_finite": 1.0}
    assert all((parameter == 1).all() and parameter.grad is None for parameter in module.parameters())
    assert not optimizer.inner.state
    pushed(module, 1.0)
    assert optimizer.step(0.1)["learning_rate"] == 0.1
    assert all(parameter.isfinite().all() and (parameter != 1).all() for parameter in module.parameters())


def test_a_critic_has_its_own_rate_on_the_same_schedule_and_no_weight_decay():
    """Adam's first step is the rate, whatever the gradient."""
    for settings, expected in (({}, 0.01), ({"critic_learning_rate": 0.3}, 0.03)):
        module, critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        before = [parameter.clone() for parameter in (module.weight, *critic.parameters())]
        optimizer = AdamW(module, Train(learning_rate=0.1, max_grad_norm=0.0, **settings), critic)
        pushed(module, 3.0)
        pushed(critic, 3.0)
        assert optimizer.step(0.01)["learning_rate"] == 0.01  # a tenth of the peak, as in a warm-up
        moved = [float((was - now).mean()) for was, now in zip(before, (module.weight, *critic.parameters()))]
        assert moved == pytest.approx([0.01, expected, expected], rel=1e-4)
    module, critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    optimizer = AdamW(module, Train(learning_rate=0.1, weight_decay=0.5), critic)
    assert [group["weight_decay"] for group in optimizer.inner.param_groups] == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_critic_that_cannot_learn_is_refused(rate):
    with pytest.raises(ConfigError, match=r"train\.critic_learning_rate is .*positive and finite"):
        Train(critic_learning_rate=rate)


def test_a_critic_s_gradient_counts_in_the_norm():
    module, critic = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    optimizer = AdamW(module, Train(), critic)
    pushed(module, 3.0)
    pushed(critic, 4.0)
    assert optimizer.step(0.1)["grad_norm"] == pytest.approx(5.0)


def test_weights_that_are_frozen_stay():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    optimizer = AdamW(module, Train())
    assert len(optimizer.parameters) == 1
