"""x W^T + b by oneDNN where that is the faster way: float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

AVAILABLE = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
"""The operator is torch's own, but not part of its public interface; without it, torch's default is used."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in], [out, in], [out] -> [..., out], with gradient: `torch.nn.functional.linear` to rounding."""
    if not suits(x, weight):
        return functional.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    y: Tensor = OneDNN.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def suits(x: Tensor, weight: Tensor) -> bool:
    on_cpu = AVAILABLE and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return on_cpu and x.dtype == weight.dtype == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """No gradient. The weight may be one that `packed` laid out."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def packed(weight: Tensor, rows: int) -> Tensor:
    """The weight as oneDNN likes it best for inputs of so many rows: worth it where it is used more than once."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return found


class Linear(torch.nn.Linear):
    """A linear layer that computes by `linear`. `use` makes one of an ordinary layer, weights and all."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


PLAIN = (torch.nn.Linear, Linear)
"""A matrix and perhaps a bias, and nothing else: no adapter, not in 4 bits."""


def use(module: torch.nn.Module) -> None:
    """Let every plain linear layer inside compute by `linear`; layers of other classes stay as they are."""
    for layer in module.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = Linear


def unseen() -> None:
    """Keep torch.compile out of these layers, whose operator it cannot trace; what is around them it may compile."""
    if not hasattr(Linear.forward, "_torchdynamo_disable"):
        Linear.forward = torch.compiler.disable(Linear.forward)  # type: ignore[method-assign]


class OneDNN(torch.autograd.Function):
    """dx = g W, dW = g^T x, db = sum g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        dx, dw, db = ctx.needs_input_grad
        return (
            product(g.contiguous(), weight.t().contiguous()) if dx else None,
            flat.t() @ x.reshape(-1, x.shape[-1]) if dw else None,
            flat.sum(0) if db else None,
        )
