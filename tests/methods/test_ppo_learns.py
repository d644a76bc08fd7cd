"""PPO on tasks of seconds: a bandit, and rooms in which what pays comes two turns later."""

import math

import pytest
import torch

from critics import silent
from toy import bandit, forward, gradient, on_policy
from tropism.methods.ppo import PPO
from tropism.types import Batch

close = torch.testing.assert_close


def descend(weights, batch, method, *, rate, epochs=4):
    """A few optimizer steps on one batch, after the critic was asked."""
    said = forward(weights, batch)
    batch = batch.replace(value=said.value.detach(), last_value=said.last_value.detach())
    for _ in range(epochs):
        weights = (weights - rate * gradient(method, weights, batch)).detach().requires_grad_()
    return weights


@pytest.mark.parametrize(
    "method",
    [PPO(value_weight=1.0), PPO(value_weight=1.0, per="turn", dual_clip=3.0), PPO(value_weight=1.0, whiten=False)],
    ids=["token", "turn", "raw"],
)
def test_it_learns_a_bandit_with_three_arms_without_siblings(method):
    """To more than 0.95 on the best arm, which starts as the least likely; the critic learns what that is worth."""
    weights = torch.tensor([[0.5, 0.2, -0.5, 0.0], *[[0.0] * 4] * 2]).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = bandit(weights, torch.tensor([0.0, 0.5, 1.0]), groups=32, size=1, generator=generator)
        weights = descend(weights, batch, method, rate=1.0)
    share = weights[0, :3].detach().softmax(-1)
    assert share[2] > 0.95
    close(weights[0, 3].detach(), share @ torch.tensor([0.0, 0.5, 1.0]), atol=0.05, rtol=0)


START, LEFT, RIGHT, WEST, EAST = range(5)
PAYS = {(WEST, LEFT): 0.4, (EAST, RIGHT): 1.0}
"""First say LEFT or RIGHT, then anything; that leads to a room in the west or in the east, where one answer pays. To a
policy that mostly says LEFT, the west is worth more at first."""


def rooms(weights, size, generator):
    """Episodes of two turns on two rows: START said filler | ROOM said. Reward comes at the end alone."""

    def say(read):
        with torch.no_grad():
            return torch.multinomial(weights[read, :5].softmax(-1), 1, generator=generator)[:, 0]

    start = torch.full((size,), START)
    first = say(start)
    filler = say(first)
    room = torch.where(first == LEFT, WEST, EAST)
    second = say(room)
    pays = torch.tensor([PAYS.get(pair, 0.0) for pair in zip(room.tolist(), second.tolist(), strict=True)])
    episode, zero = torch.arange(size).repeat(2), torch.zeros(2 * size, dtype=torch.long)
    one = torch.tensor([[False, True, True]]).expand(size, 3)
    mask = torch.cat([one, one & torch.tensor([True, True, False])])
    batch = Batch(
        tokens=torch.cat([torch.stack([start, first, filler], 1), torch.stack([room, second, start], 1)]),
        length=torch.cat([start + 3, start + 2]),
        action_mask=mask,
        token_reward=torch.cat([torch.zeros(size, 3), pays[:, None] * torch.tensor([0.0, 1.0, 0.0])]),
        turn=torch.where(mask, (torch.arange(2 * size) // size)[:, None], -1),
        reward=pays.repeat(2),
        success=pays.repeat(2) == 1,
        truncated=zero.bool(),
        group=episode,
        episode=episode,
        role=zero,
        domain=zero,
    )
    return on_policy(weights, batch)


def explorer():
    """Says LEFT and RIGHT only, LEFT four times of five."""
    weights = torch.full((5, 6), -40.0)
    weights[:, LEFT], weights[:, RIGHT], weights[:, 5] = math.log(4), 0.0, 0.0
    return weights.requires_grad_()


@pytest.mark.parametrize("per", ["token", "turn"])
def test_it_learns_what_pays_two_turns_later_through_the_critic_alone(per):
    """With trace 0 the first turn hears of the reward only as a difference of values. A critic that says 0 throughout
    leaves it exactly where it was."""
    method = PPO(per=per, trace=0.0, value_weight=1.0, whiten=False, value_clip=math.inf)
    generator, weights = torch.Generator().manual_seed(0), explorer()
    for _ in range(300):
        weights = descend(weights, rooms(weights, 64, generator), method, rate=2.0)
    found = weights.detach()
    assert found[START, :5].softmax(-1)[RIGHT] > 0.95 and found[EAST, :5].softmax(-1)[RIGHT] > 0.95
    close(found[[START, EAST], 5], torch.ones(2), atol=0.1, rtol=0)
    asked = found[[LEFT, RIGHT], 5].abs() > 0.1
    assert asked.any() == (per == "token")  # a turn's second token is no decision of its own

    deaf = explorer()
    batch = silent(rooms(deaf, 64, generator).replace(value=torch.zeros(128, 3), last_value=torch.zeros(128)))
    slope = gradient(method, deaf, batch)
    assert (slope[START, :5] == 0).all() and (slope[WEST, :5] != 0).any()
