"""What a token deserves, from rewards. No gradient flows through any of these."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tropism.maths.check import same_shape
from tropism.maths.reduce import first_row, sum_by

Scale = Literal["none", "std", "sample_std", "batch_std", "mean"]


def group_relative(
    reward: Tensor, group: Tensor, episode: Tensor, *, scale: Scale = "std", eps: float = 1e-6
) -> Tensor:
    """Reward relative to its siblings.

        A_i = (r_i - m_g) / s_g        m_g: mean reward of the group of i

        scale        s_g                method                   a success worth 1, success rate p
        none         1                  Dr. GRPO                 1 - p
        std          std_g + eps        GRPO, arXiv:2402.03300   sqrt((1 - p) / p)
        sample_std   same, G - 1        TRL (eps = 1e-4)         sqrt((1 - p) / p (G - 1) / G)
        batch_std    std of the batch   Lite PPO, TRL            (1 - p) / std
        mean         m_g                MaxRL                    (1 - p) / p

    std divides by G, so it exists for a group of one; batch_std is the sample value over all episodes. An episode
    counts once however many rows it has.

    Args:
        reward: [N] total of the row's episode.
        group: [N] integer ids; equal ids answered the same task.
        episode: [N] integer ids; equal ids are rows of one episode.

    Returns:
        [N]. Exactly 0 wherever a group says nothing: all rewards equal, or nobody to compare with.
    """
    centred, mean, count = against_siblings(reward, group, episode)
    if scale == "none":
        return centred
    if scale == "mean":
        return torch.where(mean > 0, centred / mean, 0.0)
    once = first_row(episode)
    if scale == "batch_std":
        return centred / (reward[once].std() + eps) if once.sum() > 1 else centred
    degrees = count if scale == "std" else (count - 1).clamp(min=1)
    return centred / ((sum_by(centred.square() * once, group) / degrees).sqrt() + eps)


def leave_one_out(reward: Tensor, group: Tensor, episode: Tensor) -> Tensor:
    """RLOO: reward against the mean of the others. Ahmadian et al. 2024, arXiv:2402.14740, eq. 8.

        A_i = r_i - sum_{j != i} r_j / (G - 1) = (r_i - m_g) G / (G - 1)

    The baseline does not depend on r_i, so the gradient is unbiased. 0 in a group of one.
    """
    centred, _, count = against_siblings(reward, group, episode)
    return centred * count / (count - 1).clamp(min=1)


def against_siblings(reward: Tensor, group: Tensor, episode: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reward minus its group's mean, that mean, episodes in the group), each [N]."""
    same_shape("group statistics", reward=reward, group=group, episode=episode)
    once = first_row(episode)
    distinct, place = group.unique(return_inverse=True)
    # From the lowest reward up: (0.1 + 0.1 + 0.1) / 3 is not 0.1, and dividing the difference by eps would train on it.
    lowest = reward.new_zeros(len(distinct)).scatter_reduce(0, place, reward, "amin", include_self=False)[place]
    count = sum_by(once.to(reward.dtype), group)
    above = sum_by((reward - lowest) * once, group) / count
    return reward - lowest - above, lowest + above, count


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
