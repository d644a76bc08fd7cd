"""Checks at the start of a run, one line each. A failed check stops the run before it can learn the wrong thing.

Sampler and forward pass come as callables: the doctor knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from tropism.errors import CheckFailed
from tropism.types import Batch, Output, Rollout, Stop, Task, Turn

EXACT = 1e-3
"""Largest difference of log-probs, in nats, at which sampler and trainer count as one."""
BROKEN = 0.1
"""Mean difference, in nats, above which they are not the same model at all."""

Forward = Callable[[Batch], Output]


def gets_columns(needed: Mapping[str, Sequence[str]], tasks: Sequence[Task]) -> str:
    """Every reward gets every column that it cannot do without.

    Args:
        needed: reward -> columns.
    """
    for name, columns in needed.items():
        for task in tasks:
            for column in columns:
                if column not in task.columns:
                    raise CheckFailed(
                        f"the reward {name} asks for the column {column!r}, but a task of {task.env} has "
                        f"{', '.join(task.columns) or 'none'}: every rollout would fail. Rename the parameter, or add "
                        "the column to the data."
                    )
    asked = [f"{name} gets {', '.join(columns) or 'no column and needs none'}" for name, columns in needed.items()]
    return f"rewards: {'; '.join(asked) or 'the score of the environment'}"


def agreement(batch: Batch, forward: Forward, precision: str) -> tuple[str, bool]:
    """Sampler and trainer log-probs of the same tokens. Decides whether `proximal_logp` must be measured."""
    most, mean = gap(batch, forward)
    if not mean <= BROKEN:
        raise CheckFailed(
            f"sampler and trainer disagree about the sampler's own tokens by {mean:.3g} nats on average (at most "
            f"{most:.3g}), so every importance weight would be wrong. Are they the same weights, at one temperature?"
        )
    exact = most <= EXACT
    then = "one policy" if exact else f"more than {EXACT:g}: proximal log-probs are measured"
    line = f"sampler and trainer: log-probs differ by {most:.1e} at most, {mean:.1e} on average ({precision}); {then}"
    return line, exact


def gap(batch: Batch, forward: Forward) -> tuple[float, float]:
    """(largest, mean) |behavior_logp - logp| over action tokens."""
    assert batch.behavior_logp is not None
    with torch.no_grad():
        difference = (forward(batch).logp - batch.behavior_logp).abs()[batch.action_mask]
    return float(difference.max()), float(difference.mean())


def reaches_sampler(
    batch: Batch, sample: Callable[[], Batch], forward: Forward, perturbed: Callable[[], AbstractContextManager[None]]
) -> str:
    """Move the weights, sample, compare: the sampler must speak with the moved weights, not with older ones.

    Args:
        batch: sampled before the move.
        sample: draws a batch with whatever weights the sampler uses now.
        perturbed: moves the policy's weights a little, and exactly back at the end.
    """
    with perturbed():
        moved, _ = gap(batch, forward)
        stale, _ = gap(sample(), forward)
    after, _ = gap(batch, forward)
    if not (moved > 10 * EXACT and stale < moved / 2):
        raise CheckFailed(
            f"after the weights moved (the trainer's log-probs by up to {moved:.2g} nats) the sampler differs from the "
            f"trainer by up to {stale:.2g}: it does not use the weights that are trained."
        )
    return f"weights: moved by up to {moved:.1e} nats, the sampler followed to {stale:.1e}; back to {after:.1e}"


def stop_is_trained(rollouts: Sequence[Rollout], batch: Batch, stop_ids: Sequence[int], given: bool) -> str:
    """The token that ends a reply stands on the mask, so the model learns to end.

    Args:
        given: the replies come from data, so all of them must end; a policy's own may still run into the limit.
    """
    turns = [turn for rollout in rollouts for turn in rollout.turns if turn.action]
    if given:  # but for the steps within an answer
        turns = [turn for turn in turns if turn.stop is Stop.finished]
    ended = sum(turn.action[-1] in stop_ids for turn in turns)
    masked = int((torch.isin(batch.tokens, torch.tensor(list(stop_ids)).to(batch.tokens)) & batch.action_mask).sum())
    if masked < ended or (given and ended < len(turns)):
        raise CheckFailed(
            f"{len(turns) - min(ended, masked)} of {len(turns)} replies do not end with a stop token that is trained "
            f"(ids {list(stop_ids)}): the model would never learn to stop."
        )
    if not ended:
        return f"stop token: none of {len(turns)} probe replies ended by itself; max_tokens may be too small"
    return f"stop token: trained in {ended} of {len(turns)} replies"


def mask_is_reply(
    rollouts: Sequence[Rollout], batch: Batch, decode: Callable[[Sequence[int]], str]
) -> tuple[str, tuple[int, int]]:
    """The mask covers what the policy said and nothing else; returns one row in words and where the reply stands."""
    said: list[int] = []
    for rollout in rollouts:
        for turn in rollout.turns if rollout.failure is None else ():
            said += turn.action
    masked = batch.tokens[batch.action_mask].tolist()
    if masked != said:
        raise CheckFailed(
            f"the mask covers {len(masked)} tokens, but the policy said {len(said)}: something that it did not say "
            "would be trained, or something that it did say would not."
        )
    first: Turn = next(turn for rollout in rollouts for turn in rollout.turns if turn.action)
    before, reply = (oneline(decode(ids)) for ids in (first.context[-60:], first.action[:60]))
    head = "mask: "
    return head + before + reply, (len(head + before), len(head + before + reply))


def something_to_teach(batch: Batch, tolerance: float) -> None:
    """Somewhere the teacher says something else than the policy, where it says anything.

    Args:
        tolerance: nats for a token that are rounding.
    """
    heard = batch.action_mask & batch.has_teacher[:, None]
    apart = (batch.teacher_logp - batch.proximal_logp)[heard].abs()
    if len(apart) and float(apart.max()) < tolerance:
        raise CheckFailed(
            f"the teacher is missing: of {len(apart)} tokens it gives none another log-probability than the policy "
            f"does (the largest difference is {float(apart.max()):.1e}), so nothing but rounding would be learned. It "
            "has the policy's weights and reads no more than the policy: set teacher.who to the path of another model, "
            "or teacher.reads to what it may see; teacher.must_add: -1 starts all the same."
        )


def splits_agree(gradient: Callable[[int], Tensor], tokens: int, tolerance: float) -> str:
    """Micro-batches of any size give the gradient of the whole.

    Args:
        gradient: micro-batch size in tokens -> flattened gradient.
        tokens: largest micro-batch; it is compared with the smallest, one episode at a time.
        tolerance: share of its norm; a norm below its square is rounding, as where a teacher is the student itself.
    """
    whole, parts = gradient(tokens), gradient(1)
    if whole.norm() < tolerance**2 and parts.norm() < tolerance**2:
        return f"micro-batches: the gradient of this batch, {float(whole.norm()):.1e}, is rounding and says nothing"
    error = float((whole - parts).norm() / whole.norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise CheckFailed(
            f"the gradient of this batch changes by a share of {error:.2g} when it is cut into micro-batches, so the "
            "result would depend on train.micro_tokens. Some loss or weight divides by what it sees."
        )
    return f"micro-batches: one by one or all at once, the gradient differs by a share of {error:.1e}"


def oneline(text: str) -> str:
    return text.replace("\n", "⏎")
