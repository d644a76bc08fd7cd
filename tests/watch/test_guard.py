"""A run stops itself when too much fails or nothing is taught, and shows the rows that say so."""

import pytest

from tropism.errors import GuardStopped
from tropism.types import LEFT_OUT, Failure, Rollout, Task, Turn
from tropism.watch import guard


def rollout(reward=0.0, failure=None, reply="9"):
    turn = Turn(context=[1], action=[2], logp=[-0.5], reply=reply)
    rewards = {"win": reward}
    return Rollout(task=Task(seed=7), group=0, turns=(turn,), reward=reward, rewards=rewards, failure=failure)


def failed(count, total, where="judge"):
    bad = [rollout(failure=Failure(where, f"reason {n % 4}")) for n in range(count)]
    return bad + [rollout() for _ in range(total - count)]


@pytest.mark.parametrize(("count", "limit"), [(0, 0.0), (1, 0.1), (3, 0.3), (9, 1.0)])
def test_as_many_failures_as_are_allowed_do_not_stop_a_run(count, limit):
    guard.failing(failed(count, 10), limit)


@pytest.mark.parametrize(("count", "limit"), [(1, 0.0), (2, 0.1), (4, 0.3)])
def test_one_more_does_and_the_commonest_reasons_are_told(count, limit):
    with pytest.raises(GuardStopped) as stopped:
        guard.failing(failed(count, 10), limit)
    said = str(stopped.value)
    assert stopped.value.code == 4
    assert f"{count} of 10 rollouts" in said and f"train.failure_limit = {limit}" in said
    assert "1 × judge: reason 0" in said and "reason 3" not in said


def test_a_step_of_which_nothing_is_left_stops_a_run_whatever_the_limit():
    with pytest.raises(GuardStopped, match="3 of 3"):
        guard.failing(failed(3, 3), 1.0)


def test_groups_left_out_for_want_of_contrast_have_not_failed():
    guard.failing(failed(10, 10, where=LEFT_OUT), 0.0)
    guard.failing([], 0.0)


def test_nothing_taught_for_long_enough_stops_a_run_and_shows_why():
    rollouts = [rollout(-1.0, reply=f"move {n}" + "x" * 200) for n in range(6)] + [rollout(1.0), rollout(1.0)]
    guard.stalled(19, 20, rollouts)
    with pytest.raises(GuardStopped) as stopped:
        guard.stalled(20, 20, rollouts)
    said = str(stopped.value)
    assert stopped.value.code == 4
    assert "the last 20 steps taught nothing" in said and "6 × -1, 2 × 1" in said
    assert [f"'move {n}x" in said for n in range(6)] == [True] * 4 + [False] * 2
    assert "task seed 7, reward -1, {'win': -1.0}" in said and "x" * 130 not in said


def test_rollouts_without_a_reply_can_be_shown():
    silent = Rollout(task=Task(), group=0, failure=Failure("play", "broken"))
    with pytest.raises(GuardStopped, match="no reply"):
        guard.stalled(1, 1, [silent])


def test_a_budget_of_nats_is_kept_and_what_is_no_number_has_spent_it():
    guard.spent(5.0, None)
    guard.spent(5.0, 5.0)
    for nats in (5.1, float("nan"), float("inf")):
        with pytest.raises(GuardStopped, match=r"train\.kl_budget = 5\.0"):
            guard.spent(nats, 5.0)
