"""Stops a run that learns nothing, or whose rollouts cannot be scored, and shows the rows that say why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tropism.errors import GuardStopped
from tropism.types import LEFT_OUT, Rollout


def failing(rollouts: Sequence[Rollout], limit: float) -> None:
    """Stop if more than `limit` of the rollouts could not be played or scored."""
    bad = Counter(
        f"{r.failure.where}: {r.failure.reason}" for r in rollouts if r.failure and r.failure.where != LEFT_OUT
    )
    count = sum(bad.values())
    if count > limit * len(rollouts) or (rollouts and count == len(rollouts)):
        reasons = "\n".join(f"  {times} × {reason}" for reason, times in bad.most_common(3))
        raise GuardStopped(
            f"{count} of {len(rollouts)} rollouts of this step could not be played or scored, more than "
            f"train.failure_limit = {limit} allows:\n{reasons}\n"
            "Mend the cause and continue with --resume, or raise train.failure_limit."
        )


def spent(nats: float, budget: float | None) -> None:
    """Stop a policy that has gone too far from where it started."""
    if budget is not None and not nats <= budget:  # NaN has gone too far as well
        raise GuardStopped(
            f"the policy is {nats:.2f} nats per episode away from the model it started as, more than train.kl_budget = "
            f"{budget} allows. Its checkpoint of this step is saved. Raise the budget and continue with --resume, or "
            "be content: farther away, what a reward pays for and what it was meant to pay for tend to part."
        )


def stalled(quiet: int, patience: int, rollouts: Sequence[Rollout]) -> None:
    """Stop after `patience` steps in which no token had credit or no update moved the weights."""
    if quiet < patience:
        return
    rows = "\n".join(
        f"  task seed {r.task.seed}, reward {r.reward:g}, {dict(r.rewards)}: {shown(r)}" for r in rollouts[:4]
    )
    rewards = Counter(r.reward for r in rollouts)
    raise GuardStopped(
        f"the last {quiet} steps taught nothing: every token had zero credit, or no update could be made. Rewards of "
        f"the last step: {', '.join(f'{times} × {reward:g}' for reward, times in rewards.most_common(4))}. Its first "
        f"rollouts:\n{rows}\nIf all siblings earn the same there is nothing to compare: make the tasks easier or "
        "harder, teach the format first (a stage with method sft), or check the reward."
    )


def shown(rollout: Rollout) -> str:
    return repr(rollout.turns[-1].reply[:120]) if rollout.turns else "no reply"
