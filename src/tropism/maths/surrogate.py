"""What is minimised for a token, given what it deserves. Ratios are pi / proximal, pi carrying the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.maths.check import same_shape
from tropism.maths.reduce import spread, sum_by


def token_log_ratio(logp: Tensor, proximal_logp: Tensor) -> Tensor:
    """log r_t = log pi(y_t) - log proximal(y_t). [N, T]"""
    same_shape("token_log_ratio", logp=logp, proximal_logp=proximal_logp)
    return logp - proximal_logp


def sequence_log_ratio(logp: Tensor, proximal_logp: Tensor, mask: Tensor, episode: Tensor | None = None) -> Tensor:
    """GSPO's ratio: the geometric mean over the episode, on each of its tokens. Zheng et al. 2025, arXiv:2507.18071.

        log s_t = sg[log s] + log pi_t - sg[log pi_t]        log s = mean_t(log pi_t - log proximal_t)

    The value is the same on all tokens of an episode; the gradient of s_t is s grad log pi_t (eq. 15). With the product
    instead of the mean, a drift of 10 % per token would weigh an answer of 100 tokens 13,781 times.

    Args:
        logp, proximal_logp: [N, T].
        mask: [N, T] bool.
        episode: [N] ids; None takes every row for an episode.

    Returns:
        [N, T], 0 off the mask.
    """
    ratio = token_log_ratio(logp, proximal_logp).detach() * mask
    episode = torch.arange(len(mask), device=mask.device) if episode is None else episode
    mean = sum_by(ratio.sum(1), episode) / sum_by(mask.sum(1), episode).clamp(min=1)
    return spread(mean, mask) + (logp - logp.detach()) * mask


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, *, low: float, high: float, dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate. Schulman et al. 2017, arXiv:1707.06347, eq. 7.

        L_t = -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)        r_t = exp(log_ratio_t)

    At r_t = 1 the gradient is the policy gradient, -A_t grad log pi_t. It vanishes where clipping binds: r_t > 1 + high
    with A_t > 0, or r_t < 1 - low with A_t < 0. A large r_t with A_t < 0 is not limited, unless by `dual`: then
    L_t <= -dual A_t there (Ye et al. 2019, arXiv:1912.09729, eq. 5).

    Args:
        log_ratio: [N, T] nats; carries the gradient.
        advantage: [N, T] no gradient.

    Returns:
        (loss [N, T], clipped [N, T] bool: where the gradient is zero).
    """
    same_shape("clipped_surrogate", log_ratio=log_ratio, advantage=advantage)
    ratio = log_ratio.exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    gain, clipped = torch.minimum(free, bounded), bounded < free
    if dual is not None:
        floor = torch.where(advantage < 0, dual * advantage, -torch.inf)
        gain, clipped = torch.maximum(gain, floor), clipped | (gain < floor)
    return -gain, clipped


def policy_loss(
    logp: Tensor,
    proximal_logp: Tensor,
    behavior_logp: Tensor,
    advantage: Tensor,
    *,
    low: float,
    high: float,
    dual: float | None = None,
    limit: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of PPO, corrected for a sampler that is not the trainer: what most methods minimise.

        L_t = min(proximal / behavior, limit) clipped_surrogate(log pi - log proximal, A_t)

    Args:
        logp, proximal_logp, behavior_logp, advantage: [N, T]; only logp carries gradient.
        limit: largest importance weight; see `truncated_weight`.

    Returns:
        (loss [N, T], metrics name -> [N, T]).
    """
    log_ratio = token_log_ratio(logp, proximal_logp)
    loss, clipped = clipped_surrogate(log_ratio, advantage, low=low, high=high, dual=dual)
    weight = truncated_weight(proximal_logp, behavior_logp, limit=limit)
    return loss * weight, policy_metrics(log_ratio, clipped, weight)


def policy_metrics(log_ratio: Tensor, clipped: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What is worth watching of any loss with a ratio, under the names that dashboards know."""
    return {
        "clip_ratio/region_mean": clipped.to(weight.dtype),
        "ratio": log_ratio.detach().exp(),
        "sampling/importance_sampling_ratio/mean": weight,
    }


def cispo(logp: Tensor, log_ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """CISPO: clip the weight, never the token. MiniMax 2025, arXiv:2506.13585, eq. 4.

        L_t = -sg[clip(r_t, 1 - low, 1 + high)] A_t log pi_t

    Every token keeps a gradient; low = 1 leaves the lower side open. TRL's cap is absolute: its epsilon_high = 5 is
    high = 4 here.

    Returns:
        (loss [N, T], clipped [N, T] bool: where the weight is not the ratio).
    """
    same_shape("cispo", logp=logp, log_ratio=log_ratio, advantage=advantage)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - low, 1 + high)
    return -weight * advantage * logp, weight != ratio


def truncated_weight(proximal_logp: Tensor, behavior_logp: Tensor, *, limit: float) -> Tensor:
    """min(proximal / behavior, limit): corrects for a sampler that is not the trainer. Yao et al. 2025 (TIS). [N, T]

    No gradient. Exactly 1 where both are the same numbers. Truncation is a bias towards less: it bounds the variance.
    """
    same_shape("truncated_weight", proximal_logp=proximal_logp, behavior_logp=behavior_logp)
    return (proximal_logp - behavior_logp).detach().exp().clamp(max=limit)


def masked_weight(proximal_logp: Tensor, behavior_logp: Tensor, *, low: float, high: float) -> Tensor:
    """proximal / behavior where it is within [low, high], else 0: such a token is dropped. IcePop, 2025. [N, T]

    No gradient. Truncation would keep a token of ratio 3 at weight 2; where the two disagree that much (a mixture of
    experts that routed differently), its log-probabilities say more about the disagreement than about the token.
    arXiv:2603.19220, eq. 3.
    """
    same_shape("masked_weight", proximal_logp=proximal_logp, behavior_logp=behavior_logp)
    ratio = (proximal_logp - behavior_logp).detach().exp()
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def importance_weight(logp: Tensor, proximal_logp: Tensor, behavior_logp: Tensor, *, limit: float) -> Tensor:
    """min(pi / proximal, limit) min(proximal / behavior, limit): for a loss without a ratio of its own. [N, T]

    No gradient. The first corrects for a policy that has moved since the batch was made, the second for a sampler that
    is not the trainer; both are exactly 1 in the first optimizer step of a batch that the trainer sampled itself.
    """
    stale = truncated_weight(logp, proximal_logp, limit=limit)
    return stale * truncated_weight(proximal_logp, behavior_logp, limit=limit)
