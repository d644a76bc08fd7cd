import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from small import rollout, turn
from tropism.training.numbers import eval_numbers, rollout_numbers, sampler_gap
from tropism.types import LEFT_OUT, Failure, Stop

BROKEN = Failure("play", "broke")


def scored(reward, group, rewards=None, **fields):
    return rollout(turn([1], [2, 3], reward=reward), group=group, rewards=rewards or {}, **fields)


def test_the_numbers_of_a_step_by_hand():
    """Under the names of TRL's GRPO trainer."""
    long = rollout(
        turn([1], [2] * 4), turn([1], [2] * 6, reward=2.0, stop=Stop.truncated), group=1, rewards={"win": 2.0}
    )
    two = [scored(1.0, 0, {"win": 1.0}, success=True), scored(1.0, 0, {"win": 1.0})]
    found = rollout_numbers([*two, long, scored(0.0, 2, {"win": 0.0}), scored(1.0, 1, {"win": 1.0})])
    assert found == pytest.approx(
        {
            "failures": 0.0,
            "reward": 1.0,
            "reward_std": 0.5**0.5,
            "frac_reward_zero_std": 2 / 3,
            "success": 0.2,
            "completions/mean_length": 18 / 6,
            "completions/min_length": 2,
            "completions/max_length": 6,
            "completions/clipped_ratio": 1 / 6,
            "turns": 6 / 5,
            "rewards/win/mean": 1.0,
            "rewards/win/std": 0.5**0.5,
        }
    )


def test_a_single_rollout_has_no_spread():
    found = rollout_numbers([scored(1.0, 0, {"win": 1.0})])
    assert found["reward_std"] == 0 and found["rewards/win/std"] == 0


def test_failures_are_counted_and_are_in_no_mean():
    failed = scored(100.0, 0, {"win": 100.0}, failure=BROKEN)
    found = rollout_numbers([scored(1.0, 0, {"win": 1.0}), failed])
    assert found["failures"] == 0.5 and found["reward"] == 1.0 and found["rewards/win/mean"] == 1.0
    assert rollout_numbers([failed]) == {"failures": 1.0}
    assert rollout_numbers([]) == {"failures": 0.0}


def test_what_was_left_out_for_lack_of_contrast_did_not_fail():
    left = scored(1.0, 0, failure=Failure(LEFT_OUT, "no_contrast"))
    assert rollout_numbers([left, scored(0.0, 1)])["failures"] == 0.0
    assert rollout_numbers([left, scored(0.0, 1)])["reward"] == 0.5


def test_a_part_per_reply_is_divided_by_replies_and_others_by_the_rollouts_that_have_them():
    game = rollout(turn([1], [2]), turn([1], [2]), turn([1], [2]), rewards={"illegal": 1.0, "win": -1.0})
    other = scored(0.0, 1, {"illegal": 0.0})
    found = rollout_numbers([game, other], frozenset({"illegal"}))
    assert found["rewards/illegal/mean"] == 0.25 and found["rewards/win/mean"] == -1.0
    assert rollout_numbers([game, other])["rewards/illegal/mean"] == 0.5


def test_two_seats_of_one_group_are_two_comparisons():
    seats = [scored(reward, 0, seat=seat) for seat, reward in ((0, 1.0), (0, 1.0), (1, 1.0), (1, -1.0))]
    assert rollout_numbers(seats)["frac_reward_zero_std"] == 0.5


def test_pass_at_n_counts_tasks_with_any_success_and_a_failure_is_none():
    """Group 0 succeeds once, group 1 never, group 2 only failed."""
    made = [scored(1.0, 0, success=True), scored(0.0, 0), scored(0.0, 1), scored(0.0, 1)]
    made += [scored(0.0, 2, failure=BROKEN) for _ in range(2)]
    found = eval_numbers(made, 2)
    assert found["pass@2"] == pytest.approx(1 / 3) and found["success"] == 0.25
    assert found["failures"] == pytest.approx(1 / 3)
    assert "pass@1" not in eval_numbers(made[::2], 1)


def test_held_out_parts_stand_under_their_own_names():
    found = eval_numbers([scored(1.0, 0, {"win": 1.0, "illegal": 0.5})], 1)
    assert found["win"] == 1.0 and found["illegal"] == 0.5 and found["reward"] == 1.0
    usual = {"reward", "success", "failures", "completions/mean_length", "completions/clipped_ratio"}
    assert set(found) == usual | {"completions/distinct", "win", "illegal"}


def test_replies_that_are_said_again_are_not_distinct():
    made = [rollout(replace(turn([1], [2]), reply=said), group=n) for n, said in enumerate(["a", "b", "a", "a"])]
    assert eval_numbers([*made, scored(0.0, 9, failure=BROKEN)], 1)["completions/distinct"] == 0.5


def test_a_part_never_takes_the_name_of_a_number_that_every_evaluation_has():
    parts = {"reward": 9.0, "success": 9.0, "failures": 9.0, "pass@2": 9.0, "a/b": 4.0}
    found = eval_numbers([scored(1.0, 0, parts, success=True), scored(0.0, 0, parts)], 2)
    assert (found["reward"], found["success"], found["failures"], found["pass@2"]) == (0.5, 0.5, 0.0, 1.0)
    assert found["a/b"] == 4.0 and "a" not in found


def test_a_sampler_s_log_probs_are_told_apart_though_their_weight_is_one_on_average():
    """Sampler m = (.5, .3, .2), trainer p = (.2, .3, .5), every token as often as m draws it: E p/m = 1, and E k3 is
    KL(m || p)."""
    m, p = (torch.tensor(row, dtype=torch.float64) for row in ((0.5, 0.3, 0.2), (0.2, 0.3, 0.5)))
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    batch = SimpleNamespace(
        behavior_logp=m.log()[drawn][None], proximal_logp=p.log()[drawn][None], action_mask=torch.ones(1, 10) > 0
    )
    found = sampler_gap(batch)
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(0.641404, abs=1e-6)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(2.5))
    assert found["sampling/kl"] == pytest.approx(float((m * (m / p).log()).sum())) == pytest.approx(0.274887, abs=1e-6)
    assert sampler_gap(SimpleNamespace(behavior_logp=None, proximal_logp=None)) == {}
