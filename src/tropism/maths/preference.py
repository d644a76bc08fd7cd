"""Losses of answers that somebody preferred, from one number per answer. Any shape, element by element;
`plackett_luce` along the last axis.

    m = beta ((log p_c - log q_c) - (log p_r - log q_r))      p the policy, q the reference, sums over an answer

    loss               at m = 0    slope there    least where
    sigmoid            log 2       -1/2           m -> inf; with smoothing e at m = log((1 - e) / e)
    robust             log 2       -1/2 / (1-2e)  nowhere: linear in m on both sides
    hinge              1           -1             m >= 1
    squared            t^2         -2 t           m = t

`sigmoid` of a difference of scores is Bradley and Terry's likelihood, so it is the loss of a reward model too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tropism.maths.check import same_shape
from tropism.maths.reduce import chosen_minus_rejected, last_action


def sigmoid(margin: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(m) - e log s(-m), e = smoothing: labels are wrong so often.

    Rafailov et al. 2023 (DPO), arXiv:2305.18290, eq. 7; with smoothing Mitchell 2023 (cDPO), which is DPO plus e m.
    """
    return softplus(-margin) + smoothing * margin


def robust(margin: Tensor, *, flipped: float = 0.0) -> Tensor:
    """(-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e): unbiased where a share e of the labels is flipped.

    Ray Chowdhury et al. 2024, arXiv:2403.00409, eq. 12. e < 1/2.
    """
    return softplus(-margin) - flipped / (1 - 2 * flipped) * margin


def plackett_luce(score: Tensor) -> Tensor:
    """-log of the probability that answers are ranked as they stand, best first: sum over i of

        log(sum over j >= i of e^r_j) - r_i

    which for two answers is Bradley and Terry's, `sigmoid` of their difference. Plackett 1975, Applied Statistics 24.
    For whoever has whole rankings; the methods here learn from pairs.

    Args:
        score: [..., K].

    Returns:
        [...], at least 0; log K! where all scores are equal.
    """
    below = torch.logcumsumexp(score.flip(-1), -1).flip(-1)
    return (below - score).sum(-1)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - m). Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425, eq. 2, with the reference as in DPO."""
    return (1 - margin).clamp(min=0)


def squared(margin: Tensor, *, target: float) -> Tensor:
    """(m - t)^2; t = 1 / (2 beta) and m without beta is IPO. Azar et al. 2023, arXiv:2310.12036, eq. 17."""
    return (margin - target) ** 2


def prospect(log_ratio: Tensor, drift: Tensor, desirable: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta (x - z)) for desirable answers, 1 - s(beta (z - x)) for the others, x = log p - log q.

    Ethayarajh et al. 2024 (KTO), arXiv:2402.01306, eq. 8; 1/2 where the policy is its reference.

    Args:
        drift: z, how far the policy is from its reference on answers to other prompts; at least 0, without gradient.
        desirable: bool.
    """
    same_shape("prospect", log_ratio=log_ratio, drift=drift, desirable=desirable)
    gain = beta * (log_ratio - drift.detach())
    return torch.sigmoid(torch.where(desirable, -gain, gain))


def log_odds(mean_logp: Tensor) -> Tensor:
    """log p - log(1 - p), p = exp(mean_logp) the geometric mean of an answer's token probabilities.

    Hong et al. 2024 (ORPO), arXiv:2403.07691, eq. 4. At p = 1, where it is infinite, it is held at -log(eps).
    """
    eps = torch.finfo(mean_logp.dtype).eps
    return mean_logp - torch.log(-torch.expm1(mean_logp.clamp(max=-eps)))


def watched(
    reward: Tensor, logp: Tensor, chosen: Tensor, group: Tensor, mask: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """What to watch of pairs, each with where it applies: a row's number stands on its last action token.

    The two log-probabilities are told apart, for both may fall while their difference grows (likelihood displacement).

    Args:
        reward: [N] implicit reward, or score, of each answer.
        logp: [N] its log-probability.
        chosen, group: [N]; mask: [N, T].
    """
    apart, end = chosen_minus_rejected(reward, chosen, group), last_action(mask)
    of = {"chosen": end & chosen[:, None], "rejected": end & ~chosen[:, None]}
    found = {f"rewards/{name}": (reward, where) for name, where in of.items()}
    found |= {f"logps/{name}": (logp, where) for name, where in of.items()}
    found["rewards/margins"] = apart, of["chosen"]
    found["rewards/accuracies"] = (apart > 0).to(reward.dtype), of["chosen"]
    return {name: (value.detach()[:, None].expand(mask.shape), where) for name, (value, where) in found.items()}
