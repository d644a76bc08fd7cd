"""What a phase of a step cannot do without: operations of its products, and bytes from memory or to it.

Counted while the loop runs, from the passes that are made and from what autograd keeps, not from a formula of a method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Least:
    operations: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Size:
    """Weights of a model in its layers, in its head, in all, and those that are trained; bytes of a number in its
    products, and of a token's keys and values."""

    layers: int
    head: int
    weights: int
    trained: int
    number: int
    token: int


def size_of(policy: Any, module: Any = None) -> Size:
    """Of the policy, or of other weights that are computed with as it does."""
    from tropism.training.plan import cached

    module = module or policy.module
    head = module.get_output_embeddings().weight
    ends = {end.data_ptr(): end.numel() for end in (module.get_input_embeddings().weight, head)}
    weights = sum(p.numel() for p in module.parameters())
    return Size(
        layers=weights - sum(ends.values()),
        head=head.numel(),
        weights=weights,
        trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
        number=2 if policy.settings.compute == "bfloat16" else 4,
        token=cached(policy),
    )


def to_draw(batch: Any, policy: Any) -> Least:
    """What the policy read and chose: two operations for a weight and token, and the head only where one was chosen;
    what rows begin with in common is read once. The weights once for a token of each of as many sequences as there are
    episodes, or as the sampler takes at once, and the keys and values before each token that was chosen."""
    from tropism.training.packed import pack

    size, chosen = size_of(policy), batch.action_mask.sum(0).tolist()
    drawn, before = sum(chosen), sum(place * count for place, count in enumerate(chosen))
    read = int((~batch.action_mask.flatten()[pack(batch.tokens, batch.length).owner]).sum())
    at_once = min(policy.sampler.rows, len(batch.episode.unique()))
    return Least(
        operations=2.0 * (size.layers * (drawn + read) + size.head * drawn),
        bytes=size.number * size.weights * drawn / at_once + size.token * before,
    )


def moved(parameters: Sequence[Any], times: int) -> float:
    """Bytes that AdamW moves: it reads a weight, its gradient and two moments, and writes all but the gradient."""
    return 4.0 * 7 * times * sum(parameter.numel() for parameter in parameters)


@contextlib.contextmanager
def counted(least: Least) -> Iterator[None]:
    """Adds every pass that a policy makes meanwhile.

    A pass forward is two operations for a weight and token, and reads the weights. One that is learned from takes two
    more, and two where the weight is trained; reads the weights again, writes their gradients, and writes and reads
    what is kept for the way back. The head sees only tokens that were chosen; what rows begin with in common counts
    once, unless the policy is told to pass every row whole (`model.pack` is off); padding never counts.
    """
    import torch

    from tropism.training.model import Policy
    from tropism.training.packed import pack

    passed, seen = Policy.forward, set[int]()

    def forward(policy: Any, batch: Any, *args: Any, **settings: Any) -> Any:
        module = settings.get("module") or policy.module
        size, learns = size_of(policy, module), torch.is_grad_enabled()
        packs = policy.settings.pack
        tokens = len(pack(batch.tokens, batch.length).owner) if packs else int(batch.length.sum())
        products = size.layers * tokens + size.head * int(batch.action_mask.sum())
        least.operations += (4 + 2 * size.trained / size.weights if learns else 2) * products
        least.bytes += size.number * (2 * size.weights + size.trained if learns else size.weights)
        seen.clear()
        seen.update(p.untyped_storage().data_ptr() for p in module.parameters())
        return passed(policy, batch, *args, **settings)

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            least.bytes += 2 * storage.nbytes()
        return tensor.detach()  # an operation's own result would hold the operation that holds it

    Policy.forward = forward  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
    finally:
        Policy.forward = passed  # type: ignore[method-assign]
