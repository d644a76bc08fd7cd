"""What a step's rollouts say about themselves, under the names that TRL's dashboards use."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from tropism.types import LEFT_OUT, Batch, Rollout, Stop

ROUNDED = 9
"""Decimals to which rewards are compared: the same sum of parts, in another order, is not another reward."""


def failed(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [r for r in rollouts if r.failure is not None and r.failure.where != LEFT_OUT]


def rollout_numbers(rollouts: Sequence[Rollout], per_reply: frozenset[str] = frozenset()) -> dict[str, float]:
    """Means over rollouts that were scored; `per_reply` parts are divided by the number of replies instead."""
    bad = {id(r) for r in failed(rollouts)}
    good = [r for r in rollouts if id(r) not in bad]
    numbers = {"failures": len(bad) / max(len(rollouts), 1)}
    if not good:
        return numbers
    turns = [turn for r in good for turn in r.turns]
    lengths = [len(turn.action) for turn in turns]
    groups: dict[tuple[int, int], set[float]] = {}
    for r in good:
        groups.setdefault((r.group, r.task.seat), set()).add(round(r.reward, ROUNDED))
    numbers |= {
        "reward": fmean(r.reward for r in good),
        "reward_std": spread([r.reward for r in good]),
        "frac_reward_zero_std": fmean(len(rewards) == 1 for rewards in groups.values()),
        "success": fmean(r.success for r in good),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(turn.stop is Stop.truncated for turn in turns),
        "turns": len(turns) / len(good),
    }
    for name in sorted({name for r in good for name in r.rewards}):
        values = [r.rewards[name] for r in good if name in r.rewards]
        count = len(turns) if name in per_reply else len(values)
        numbers[f"rewards/{name}/mean"] = sum(values) / count
        numbers[f"rewards/{name}/std"] = spread(values)
    return numbers


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def eval_numbers(
    rollouts: Sequence[Rollout], samples: int, per_reply: frozenset[str] = frozenset()
) -> dict[str, float]:
    """Held-out numbers: every part, then reward, success, distinct replies over all, and with several samples per task
    pass@n, whose names win."""
    numbers = rollout_numbers(rollouts, per_reply)
    means = {name: value for name, value in numbers.items() if name.startswith("rewards/") and name.endswith("/mean")}
    parts = {name[len("rewards/") : -len("/mean")]: value for name, value in means.items()}
    kept = ("reward", "success", "failures", "completions/mean_length", "completions/clipped_ratio")
    found = parts | {name: numbers[name] for name in kept if name in numbers}
    said = [turn.reply for r in rollouts if r.failure is None for turn in r.turns]
    if said:
        found["completions/distinct"] = len(set(said)) / len(said)
    if samples > 1:
        passed: dict[tuple[int, int], bool] = {}
        for r in rollouts:
            passed[r.group, r.task.seat] = passed.get((r.group, r.task.seat), False) or r.success
        found[f"pass@{samples}"] = fmean(passed.values())
    return found


def nats(batch: Batch) -> float:
    """log p - log q of what was said, mean over episodes: an estimate of how far the policy is from its reference."""
    away = (batch.proximal_logp - batch.reference_logp)[batch.action_mask].sum()
    return float(away) / max(1, len(batch.episode.unique()))


def sampler_gap(batch: Batch) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, over what was said: mean and largest |log p - log m|,
    and mean of k3, an estimate of KL(m || p). The weight that corrects for it is 1 on average whatever they are."""
    if batch.behavior_logp is None or batch.proximal_logp is None or not batch.action_mask.any():
        return {}
    apart = (batch.proximal_logp - batch.behavior_logp)[batch.action_mask]
    name = "sampling/sampling_logp_difference"
    found = {f"{name}/mean": apart.abs().mean(), f"{name}/max": apart.abs().max()}
    return {key: float(value) for key, value in (found | {"sampling/kl": (apart.exp() - 1 - apart).mean()}).items()}
