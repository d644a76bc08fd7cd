"""Constrained GRPO: its multipliers by hand, and a bandit whose best arm breaks a limit."""

import pytest
import torch

from toy import gradient, parted, pulled, toy_batch
from tropism.errors import ConfigError
from tropism.methods.constrained import Constrained
from tropism.methods.grpo import GRPO

close = torch.testing.assert_close
F64 = torch.float64


@pytest.mark.parametrize("limits", [{}, {"at_least": {"second": -9.0}}, {"at_most": {"second": 9.0}, "damping": 2.0}])
def test_while_no_limit_is_broken_it_is_grpo(limits):
    weights, batch = toy_batch()
    method = Constrained(**limits)
    for _ in range(3):
        batch = batch.replace(memory=method.remember(batch))
    close(gradient(method, weights, batch), gradient(GRPO(), weights, batch))


def test_a_multiplier_grows_by_the_distance_and_never_below_zero():
    """Means .5 and .25 against limits .9 and .1, rate .5: .2 and .075 a step."""
    batch = parted([[0.0, 0.5], [1.0, 0.0]], [1.0, 0.0], size=2)
    method = Constrained(at_least={"part 0": 0.9}, at_most={"part 1": 0.1})
    for steps in (1, 2):
        batch = batch.replace(memory=method.remember(batch))
        assert {k: float(v) for k, v in batch.memory.items()} == pytest.approx(
            {"part 0/at_least": 0.2 * steps, "part 1/at_most": 0.075 * steps}
        )
    kept = batch.replace(parts=torch.tensor([[9.0, 0.0], [9.0, 0.0]], dtype=F64))
    assert [float(v) for v in method.remember(kept).values()] == pytest.approx([0.0, 0.1])


def test_an_episode_counts_once_however_many_rows_it_has():
    _, batch = toy_batch()
    once = batch.parts[[1, 2, 4, 5, 6, 7, 8, 0], 1].mean()
    found = Constrained(at_least={"second": 1.0}).remember(batch)
    close(found["second/at_least"], 0.5 * (1.0 - once))


def test_a_part_may_be_bounded_on_both_sides():
    batch = parted([[0.0], [1.0]], [1.0], size=2)
    found = Constrained(at_least={"part 0": 0.6}, at_most={"part 0": 0.4}).remember(batch)
    assert {k: float(v) for k, v in found.items()} == pytest.approx({"part 0/at_least": 0.05, "part 0/at_most": 0.05})


def test_the_credit_is_that_of_the_weighed_reward():
    batch = parted([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]], [1.0, 0.0])
    for bound, sign in (("at_least", 1.0), ("at_most", -1.0)):
        method = Constrained(scale="none", **{bound: {"part 1": 0.5}})
        found = method.credit(batch.replace(memory={f"part 1/{bound}": torch.tensor(3.0)}))
        weighed = batch.replace(reward=(batch.parts[:, 0] + sign * 3 * (batch.parts[:, 1] - 0.5)) / 4)
        close(found.advantage, GRPO(scale="none").credit(weighed).advantage)
        assert found.metrics == {f"multiplier/part 1/{bound}": 3.0}
        close(method.credit(batch).advantage, GRPO(scale="none").credit(batch).advantage)
        assert method.credit(batch).metrics == {f"multiplier/part 1/{bound}": 0.0}


def test_damping_moves_a_multiplier_for_this_step_alone():
    """Mean .5 against a limit of .9 with damping 2: .8 more; against .1: .8 less, and never below 0."""
    batch = parted([[0.0, 0.5], [1.0, 0.0]], [1.0, 0.0], size=2)
    for limit, start, now in ((0.9, 1.0, 1.8), (0.1, 1.0, 0.2), (0.1, 0.5, 0.0)):
        method = Constrained(at_least={"part 0": limit}, damping=2.0)
        damped = batch.replace(memory={"part 0/at_least": torch.tensor(start)})
        assert method.credit(damped).metrics == {"multiplier/part 0/at_least": pytest.approx(now)}
        plain = Constrained(at_least={"part 0": limit})
        assert method.remember(damped) == plain.remember(damped)
        same = batch.replace(memory={"part 0/at_least": torch.tensor(now)})
        close(method.credit(damped).advantage, plain.credit(same).advantage)


def test_a_part_that_does_not_apply_to_an_episode_is_no_zero():
    batch = parted([[0.0, 0.5], [1.0, float("nan")]], [1.0, 0.0], size=2)
    method = Constrained(at_least={"part 1": 0.6}, scale="none")
    found = method.remember(batch)
    assert float(found["part 1/at_least"]) == pytest.approx(0.05)
    credit = method.credit(batch.replace(memory={"part 1/at_least": torch.tensor(2.0)})).advantage.sum(1)
    kept = torch.tensor([2 * (0.5 - 0.6) / 3, 1 / 3], dtype=F64)  # the second stands at its limit
    close(credit, kept - kept.mean())
    nowhere = batch.replace(parts=batch.parts * float("nan"), memory=found)
    close(method.remember(nowhere)["part 1/at_least"], found["part 1/at_least"])


def test_a_limit_on_a_part_that_nobody_gives_is_refused():
    with pytest.raises(ConfigError, match="Constrained is about brevty, but the parts are part 0"):
        Constrained(at_least={"brevty": 1.0}).credit(parted([[0.0], [1.0]], [1.0], size=2))


def test_a_batch_in_which_nothing_could_be_scored_forgets_nothing():
    _, batch = toy_batch()
    method, memory = Constrained(at_least={"second": 1.0}), {"second/at_least": torch.tensor(0.7)}
    assert method.remember(batch[:0].replace(weighted={}, parts=None, memory=memory)) == memory


def test_it_learns_the_best_arm_that_keeps_the_limit_and_grpo_the_one_that_breaks_it():
    """Arms worth 0, .5 and 1 that cost 0, 0 and 1; at most a cost of .1 on average."""
    reward, cost = (torch.tensor(values, dtype=F64) for values in ([0.0, 0.5, 1.0], [0.0, 0.0, 1.0]))
    ends = {}
    for method in (GRPO(scale="none"), Constrained(scale="none", at_most={"cost": 0.1}, rate=0.2)):
        weights, generator = torch.zeros(3, 3, dtype=F64).requires_grad_(), torch.Generator().manual_seed(0)
        memory = {}
        for _ in range(400):
            arms = torch.multinomial(weights[0].detach().softmax(-1), 32, replacement=True, generator=generator)
            batch = pulled(weights, arms, reward, size=8)
            batch = batch.replace(memory=memory, weighted={"cost": 0.0}, parts=cost[arms][:, None])
            weights = (weights - 0.5 * gradient(method, weights, batch)).detach().requires_grad_()
            memory = method.remember(batch) if isinstance(method, Constrained) else {}
        ends[type(method).__name__] = weights[0].softmax(-1).tolist()
    assert ends["GRPO"][2] > 0.9
    assert ends["Constrained"][1] > 0.8 and ends["Constrained"][2] < 0.2


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"eps": 0.0}, {"damping": -1.0}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match="Constrained"):
        Constrained(**settings)
