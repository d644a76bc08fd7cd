"""Refuse to broadcast: [N] times [N, T] is silent when N = T, and wrong."""

from __future__ import annotations

from torch import Tensor


def same_shape(where: str, **tensors: Tensor) -> None:
    """Raise unless all these tensors have the shape of the first."""
    (first, expected), *others = ((name, list(tensor.shape)) for name, tensor in tensors.items())
    for name, shape in others:
        if shape != expected:
            a, b = sorted([(first, expected), (name, shape)], key=lambda pair: len(pair[1]))
            raise ValueError(
                f"{where}: `{a[0]}` is {a[1]} but `{b[0]}` is {b[1]}; they must match. "
                "Use spread() to give every token its row's value."
            )
