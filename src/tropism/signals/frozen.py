"""Log-probs of a finished batch under weights that do not move: the policy before its update, a reference."""

from __future__ import annotations

from collections.abc import Callable

from tropism.types import Batch, Needs, Output

Forward = Callable[[Batch], Output]
"""A forward pass without gradient, over any number of rows."""


def measure(batch: Batch, needs: Needs, *, policy: Forward | None, reference: Forward | None) -> Batch:
    """The batch with every field that `needs.measured` asks for.

    Args:
        policy: the trainer's forward; None where sampler and trainer are one, so that `proximal_logp` is
            `behavior_logp` itself and importance weights are exactly 1.
        reference: the frozen start model's forward; only asked where needed.
    """
    if "proximal_logp" in needs.measured and batch.proximal_logp is None:
        if policy is None:
            batch = batch.replace(proximal_logp=batch.behavior_logp)
        else:
            out = policy(batch)
            batch = batch.replace(proximal_logp=out.logp, proximal_entropy=out.entropy)
    if "reference_logp" in needs.measured:
        assert reference is not None
        batch = batch.replace(reference_logp=reference(batch).logp)
    for name in needs.measured:
        if getattr(batch, name) is None:
            raise NotImplementedError(f"nothing here measures {name}")
    return batch
