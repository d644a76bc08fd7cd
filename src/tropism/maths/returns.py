"""What comes after a token: returns along the action tokens of an episode, across its rows. No gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.maths.check import same_shape
from tropism.maths.reduce import sum_by


def gae(
    token_reward: Tensor,
    value: Tensor,
    action_mask: Tensor,
    episode: Tensor,
    turn: Tensor,
    last_value: Tensor,
    truncated: Tensor,
    *,
    discount: float,
    trace: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation. Schulman et al. 2015, arXiv:1506.02438, eq. 16.

        d_t = r_t + discount V_{t+1} - V_t        A_t = d_t + discount trace A_{t+1}

    t counts action tokens along (episode, turn), across rows; what the policy did not write is skipped. After the last
    one V is 0 where the episode finished and last_value where it was truncated.

    Args:
        token_reward, value: [N, T].
        action_mask: [N, T] bool.
        episode, last_value, truncated: [N]; last_value is read on the row of the episode's last action token.
        turn: [N, T] number of the turn within its episode.

    Returns:
        (advantage [N, T], target A_t + V_t [N, T]), both 0 off the mask.
    """
    same_shape("gae", token_reward=token_reward, value=value, action_mask=action_mask, turn=turn)
    chain = chains(action_mask, episode, turn)
    reward, values = token_reward.flatten()[chain], value.flatten()[chain]
    end = chain[:, -1] // action_mask.shape[1]
    following = torch.where(truncated[end], last_value[end], 0.0)
    found, carry = torch.zeros_like(reward), torch.zeros_like(following)
    for t in reversed(range(chain.shape[1])):
        carry = reward[:, t] + discount * following - values[:, t] + discount * trace * carry
        found[:, t], following = carry, values[:, t]
    advantage = torch.zeros_like(value).flatten()
    advantage[chain[chain >= 0]] = found[chain >= 0]
    advantage = advantage.reshape(value.shape)
    return advantage, advantage + value * action_mask


def rewards_to_go(
    token_reward: Tensor, action_mask: Tensor, episode: Tensor, turn: Tensor, *, discount: float
) -> Tensor:
    """G_t = r_t + discount G_{t+1}, along the action tokens of an episode, across rows: [N, T], 0 off the mask."""
    nothing, zero = torch.zeros_like(token_reward), token_reward.new_zeros(len(episode))
    ongoing = torch.zeros_like(episode, dtype=torch.bool)
    found, _ = gae(token_reward, nothing, action_mask, episode, turn, zero, ongoing, discount=discount, trace=1.0)
    return found


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Mean 0 and standard deviation 1 over the mask, as PPO does with the advantages of a batch.

        (x_t - mean) / (std + eps)        std: the sample value

    [N, T], [N, T] bool -> [N, T], 0 off the mask, and exactly 0 where all are equal or there is only one.
    """
    same_shape("whiten", values=values, mask=mask)
    found, chosen = torch.zeros_like(values), values[mask]
    if len(chosen) > 1:
        chosen = chosen - chosen.min()  # equal numbers are exact zeros then, of which no division makes a signal
        found[mask] = (chosen - chosen.mean()) / (chosen.std() + eps)
    return found


def turn_starts(turn: Tensor) -> Tensor:
    """[N, T] bool: the first action token of each turn, where the policy decides if a turn is one action.

    `turn` [N, T] is -1 off the mask and counts up along a row; no turn stands on two rows.
    """
    before = turn.cummax(1).values.roll(1, 1)
    before[:, 0] = -1
    return turn > before


def turn_sum(values: Tensor, turn: Tensor) -> Tensor:
    """Sum over the action tokens of a turn, told to each of them: [N, T], [N, T] -> [N, T], 0 off the mask."""
    same_shape("turn_sum", values=values, turn=turn)
    unit = turn_starts(turn).flatten().cumsum(0) * (turn >= 0).flatten()
    return sum_by(values.flatten(), unit).reshape(turn.shape).masked_fill(turn < 0, 0)


def chains(action_mask: Tensor, episode: Tensor, turn: Tensor) -> Tensor:
    """[E, L] flat indices of each episode's action tokens in the order they were chosen; -1 fills from the left."""
    flat = action_mask.flatten().nonzero().flatten()
    flat = flat[turn.flatten()[flat].argsort(stable=True)]
    flat = flat[episode[flat // action_mask.shape[1]].argsort(stable=True)]
    _, place, length = episode[flat // action_mask.shape[1]].unique(return_inverse=True, return_counts=True)
    chain = flat.new_full((len(length), max(length.tolist(), default=1)), -1)
    chain[place, torch.arange(len(flat), device=flat.device) - length.cumsum(0)[place]] = flat  # counts from the right
    return chain
