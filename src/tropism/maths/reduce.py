"""How much each token counts. Weights are made once per optimizer step; the objective is (values * weights).sum().

    one token of an episode of n tokens        weight           the long answer as a whole
    token_mean                                 1 / tokens       counts by its length
    sequence_mean                              1 / (E n)        counts like a short one
    constant_mean                              1 / (E longest)  counts by its length, whatever else is in the batch

tokens: masked tokens of all rows; E: episodes that have any. An empty mask gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.maths.check import same_shape


def token_mean(mask: Tensor) -> Tensor:
    """Every token counts the same (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8). [N, T] bool -> [N, T]."""
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask: Tensor, episode: Tensor) -> Tensor:
    """Every episode counts the same, however many tokens and rows it has (GRPO, arXiv:2402.03300, eq. 3)."""
    tokens = mask.sum(1)
    return spread(1 / sum_by(tokens, episode).clamp(min=1), mask) / speaking(tokens, episode)


def constant_mean(mask: Tensor, episode: Tensor, *, longest: int) -> Tensor:
    """Sum over an episode, divided by a constant (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, listing 1)."""
    return mask / longest / speaking(mask.sum(1), episode)


def certainty(entropy: Tensor, mask: Tensor, *, caution: float) -> Tensor:
    """Weights with mean 1 over the mask, larger where entropy is lower. SRPO, Li et al. 2026, arXiv:2604.02288.

        w_t = exp(-caution H_t) / mean_s exp(-caution H_s)

    A constant added to all entropies changes nothing; as caution grows, all weight goes to the lowest entropy.

    [N, T] nats, [N, T] bool -> [N, T], 0 off the mask; an empty mask gives zeros.
    """
    same_shape("certainty", entropy=entropy, mask=mask)
    found = torch.zeros_like(entropy)
    found[mask] = (-caution * entropy[mask]).softmax(0) * mask.sum()
    return found


def highest(values: Tensor, mask: Tensor, *, share: float) -> Tensor:
    """The masked tokens whose values are the largest, by the quantile 1 - share over the mask; ties are all kept.

    [N, T], [N, T] bool -> [N, T] bool. Padding must not enter the quantile, or the share depends on it.
    """
    return mask & (values >= values[mask].quantile(1 - share)) if mask.any() else mask


def spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """Give every masked token its row's number: [N], [N, T] -> [N, T], 0 off the mask."""
    same_shape("spread", per_row=per_row, rows_of_mask=mask.sum(1))
    return per_row[:, None] * mask


def sum_by(values: Tensor, ids: Tensor) -> Tensor:
    """Sum over the rows that share an id, told to each of them: [N], [N] -> [N]."""
    distinct, place = ids.unique(return_inverse=True)
    return values.new_zeros(len(distinct)).index_add(0, place, values)[place]


def first_row(episode: Tensor) -> Tensor:
    """[N] bool: one row of each episode, so that a sum over rows counts an episode once."""
    distinct, place = episode.unique(return_inverse=True)
    row = torch.arange(len(episode), device=episode.device)
    return row == row.new_zeros(len(distinct)).scatter_reduce(0, place, row, "amin", include_self=False)[place]


def speaking(tokens: Tensor, episode: Tensor) -> int:
    """Number of episodes with a masked token, at least 1."""
    return max(1, len(episode[tokens > 0].unique()))


def last_action(mask: Tensor) -> Tensor:
    """[N, T] bool: the last masked token of each row, where the loss of a whole answer stands."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def answer_mean(mask: Tensor, counted: Tensor) -> Tensor:
    """Every counted row counts the same, by its last masked token: [N, T] bool, [N] bool -> [N, T]. None give zeros."""
    end = last_action(mask) & counted[:, None]
    return end / end.sum().clamp(min=1)


def chosen_minus_rejected(values: Tensor, chosen: Tensor, group: Tensor) -> Tensor:
    """Chosen minus rejected, told to both rows of a pair: [N], [N] bool, [N] -> [N].

    Raises:
        ValueError: a group is not one chosen and one rejected row.
    """
    ones = torch.ones_like(values)
    if (sum_by(ones, group) != 2).any() or (sum_by(ones * chosen, group) != 1).any():
        raise ValueError("a pair is one chosen and one rejected answer, each of one row; some group is something else.")
    return sum_by(torch.where(chosen, values, -values), group)
