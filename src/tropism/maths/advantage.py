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
