"""Outside language: the method's own file solves CartPole."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
import cartpole
import gymnasium

from tropism.methods.ppo import PPO


def test_ppo_solves_cartpole_and_an_untrained_policy_does_not():
    assert isinstance(cartpole.METHOD, PPO)
    torch.manual_seed(0)
    envs = [gymnasium.make("CartPole-v1") for _ in range(cartpole.EPISODES)]
    assert cartpole.play(cartpole.Net(), envs, seed=0)[1].reward.mean() < 60
    mean, episodes = cartpole.solve(0)
    assert mean >= cartpole.SOLVED and episodes < 1000


def test_an_episode_is_a_row_with_the_value_after_its_end():
    torch.manual_seed(0)
    net, envs = cartpole.Net(), [gymnasium.make("CartPole-v1", max_episode_steps=9) for _ in range(4)]
    states, batch = cartpole.play(net, envs, seed=0)
    assert (batch.length <= 9).all() and batch.truncated.any()
    values = net(states)[..., 2].detach()
    for n, length in enumerate(batch.length.tolist()):
        torch.testing.assert_close(batch.value[n, :length], values[n, :length])
        torch.testing.assert_close(batch.last_value[n], values[n, length])
        assert (batch.action_mask[n].sum(), batch.token_reward[n].sum()) == (length, length)
