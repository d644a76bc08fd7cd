import math
from dataclasses import replace

import pytest
import torch

from small import rollout, turn
from tropism.training.collate import collate, rows_of
from tropism.types import Failure, Stop

P, A = 1, 2
close = torch.testing.assert_close


def test_the_worked_instance_of_the_batch():
    """One episode of two turns whose prompts do not extend each other: the table at the top of types.py."""
    won = rollout(turn([P] * 3, [A] * 2), turn([P] * 4, [A] * 2, reward=1.0), group=7)
    other = rollout(turn([P], [A]), failure=Failure("play", "broke"))
    batch = collate([other, other, other, won], codes={})
    p, a, x = P, A, 0
    assert batch.tokens.tolist() == [[p, p, p, a, a, x], [p, p, p, p, a, a]]
    assert batch.action_mask.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert batch.turn.tolist() == [[-1, -1, -1, 0, 0, -1], [-1, -1, -1, -1, 1, 1]]
    assert batch.token_reward.tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert batch.reward.tolist() == [1, 1] and batch.episode.tolist() == [3, 3]
    assert batch.length.tolist() == [5, 6] and len(batch.group.unique()) == 1


def test_a_context_that_extends_the_last_turn_token_for_token_stands_on_its_row():
    turns = [turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6], reward=0.5), turn([1, 2, 3, 4, 5, 6], [7], reward=0.25)]
    batch = collate([rollout(*turns)], codes={})
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.turn.tolist() == [[-1, -1, 0, 0, -1, 1, 2]]
    assert batch.token_reward.tolist() == [[0, 0, 0, 0, 0, 0.5, 0.25]]


@pytest.mark.parametrize("context", [[1, 2, 3, 9, 5], [1, 2, 3], [1, 2], [9, 2, 3, 4, 5]])
def test_any_other_context_opens_a_new_row(context):
    """Another token anywhere, or fewer tokens than stand there already."""
    batch = collate([rollout(turn([1, 2], [3, 4]), turn(context, [6]))], codes={})
    assert len(batch) == 2 and batch.turn.max(1).values.tolist() == [0, 1]
    assert batch.tokens[1, : len(context) + 1].tolist() == [*context, 6]


def test_a_row_may_go_on_after_another_was_opened():
    batch = collate([rollout(turn([1], [2]), turn([5], [6]), turn([5, 6, 7], [8]))], codes={})
    assert batch.tokens.tolist() == [[1, 2, 0, 0], [5, 6, 7, 8]]
    assert batch.turn.tolist() == [[-1, 0, -1, -1], [-1, 1, -1, 2]]


def test_failures_and_silent_rollouts_are_left_out_and_numbers_are_places_in_the_list():
    failed = rollout(turn([1], [2], reward=9.0), failure=Failure("reward", "raised"))
    batch = collate([failed, rollout(turn([1], [2])), rollout(), failed, rollout(turn([3], [4]))], codes={})
    assert batch.episode.tolist() == [1, 4]
    assert [row.episode for row in rows_of([failed, rollout(turn([1], [2]))])] == [1]
    assert batch.reward.tolist() == [0, 0]


def test_nothing_to_learn_from_is_a_batch_without_rows():
    batch = collate([rollout(turn([1], [2]), failure=Failure("play", "broke"))], codes={})
    assert len(batch) == 0 and batch.tokens.shape == (0, 1) and batch.reward.shape == (0,)


def test_token_rewards_sum_to_the_reward_of_the_episode_and_stand_on_last_action_tokens():
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(20):
        turns, context = [], [1]
        for _ in range(int(torch.randint(1, 5, (), generator=generator))):
            reward = float(torch.randn((), generator=generator))
            action = torch.randint(2, 9, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator)
            turns.append(turn(context, action.tolist(), reward=reward))
            extends = bool(torch.rand((), generator=generator) < 0.5)
            context = [*context, *turns[-1].action, 0] if extends else [9, *context]
        made.append(rollout(*turns))
    batch = collate(made, codes={})
    for number, one in enumerate(made):
        rows = batch.episode == number
        assert batch.token_reward[rows].sum() == pytest.approx(one.reward, abs=1e-6)
        assert (batch.reward[rows] - one.reward).abs().max() < 1e-6
        assert batch.turn[rows].max() == len(one.turns) - 1
    last = batch.action_mask & (batch.turn != torch.nn.functional.pad(batch.turn[:, 1:], (0, 1), value=-1))
    assert (batch.token_reward[~last] == 0).all() and last.sum() == sum(len(one.turns) for one in made)


def test_siblings_are_those_of_one_group_and_one_seat():
    """Two seats of one game must not be compared with each other."""
    one = [rollout(turn([1], [2]), group=g, seat=s) for g, s in ((5, 0), (5, 1), (8, 0), (5, 0), (5, 1))]
    group = collate(one, codes={}).group.tolist()
    assert group[0] == group[3] and group[1] == group[4] and len(set(group)) == 3


def test_numbers_of_the_sampler_stand_on_their_tokens():
    turns = [turn([1], [2, 3], logp=[-1.0, -2.0], entropy=[0.5, 0.25]), turn([1, 2, 3, 4], [5], logp=[-3.0])]
    batch = collate([rollout(*turns)], codes={})
    assert batch.behavior_logp.tolist() == [[0, -1, -2, 0, -3]]
    assert batch.proximal_entropy is not None
    torch.testing.assert_close(batch.proximal_entropy, torch.tensor([[0.0, 0.5, 0.25, 0.0, 0.1]]))


def test_data_has_no_sampler():
    batch = collate([rollout(turn([1], [2], sampled=False)), rollout(turn([1], [2]))], codes={})
    assert batch.behavior_logp is None and batch.proximal_entropy is None
    without = collate([rollout(turn([1], [2])), rollout(turn([1], [2], entropy=None))], codes={})
    assert without.behavior_logp is not None and without.proximal_entropy is None


def test_truncated_is_what_the_last_reply_was():
    cut = turn([1], [2], stop=Stop.truncated)
    batch = collate([rollout(cut, turn([3], [4])), rollout(turn([3], [4]), cut)], codes={})
    assert batch.truncated.tolist() == [False, False, True, True]


def test_domains_get_codes_that_belong_to_the_run():
    codes = {"old": 0}
    batch = collate([rollout(turn([1], [2]), domain=d) for d in ("new", "old", "new")], codes=codes)
    assert batch.domain.tolist() == [1, 0, 1] and codes == {"old": 0, "new": 1}


def test_success_seat_step_and_memory_are_passed_on():
    memory = {"mean": torch.tensor(2.0)}
    batch = collate([rollout(turn([1], [2]), seat=3, success=True)], codes={}, step=4, steps=9, memory=memory)
    assert batch.role.tolist() == [3] and batch.success.tolist() == [True]
    assert (batch.step, batch.steps, batch.memory) == (4, 9, memory)
    assert collate([rollout(turn([1], [2]))], codes={}).memory == {}


def test_what_each_part_of_the_reward_gave_stands_in_the_order_of_its_weights_and_what_does_not_apply_is_no_number():
    one = replace(rollout(turn([P], [A])), rewards={"b": 2.0, "seen": 9.0, "a": 3.0}, weights={"a": 1.0, "b": 0.5})
    other = replace(rollout(turn([P], [A]), turn([9], [A])), rewards={"a": 4.0}, weights={"a": 1.0})
    batch = collate([one, other], codes={}, parts=True)
    assert batch.weighted == {"a": 1.0, "b": 0.5}
    close(batch.parts, torch.tensor([[3.0, 2.0], [4.0, math.nan], [4.0, math.nan]]), equal_nan=True)
    close(batch[[2, 0]].narrow(1).parts, batch.parts[[2, 0]], equal_nan=True)
    assert collate([one], codes={}).parts is None and collate([], codes={}, parts=True).parts is None
