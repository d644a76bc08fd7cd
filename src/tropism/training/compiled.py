"""Norms and MLPs by torch.compile: what is neither product nor attention, in fewer passes over memory.

Products stay those of `maths/linear.py`, which torch.compile cannot trace. The lean decoder reads the weights itself;
updates and measurements run what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from tropism.errors import ConfigError
from tropism.maths import linear

PARTS = ("RMSNorm", "MLP")
"""How the names of the classes end."""
VARIANTS = 64
"""Of shapes, precisions and with or without gradient, that one piece of code may be compiled for."""


def use(module: Any, precision: Callable[[], AbstractContextManager[Any]]) -> None:
    """Compile a model's norms and MLPs for inputs of any shape, and prove it on one.

    Raises:
        ConfigError: there is nothing to compile, no compiler, or the result is another.
    """
    import torch._dynamo  # takes a second

    parts = [part for part in module.modules() if type(part).__name__.endswith(PARTS)]
    if not parts:
        raise ConfigError(
            f"model.compile is on, but {type(module).__name__} has no part whose class is called …RMSNorm or …MLP. "
            "Switch it off."
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    linear.unseen()
    before = said(module, precision)
    for part in parts:
        kind: Any = type(part)
        part.__class__ = of_kind(kind)
    try:
        after = said(module, precision)
    except Exception as error:  # whatever a compiler says
        raise ConfigError(
            f"model.compile is on, but torch.compile failed: {str(error).strip().splitlines()[0]}. It needs a C++ "
            "compiler (g++). Install one, or switch it off."
        ) from error
    apart = float((after - before).abs().max()) / max(1.0, float(before.abs().max()))
    if not apart <= (1e-4 if before.dtype == torch.float32 else 5e-2):
        raise ConfigError(
            f"model.compile is on, but the compiled model's logits differ by {apart:.2g} of the largest. Switch it off."
        )


@torch.no_grad()
def said(module: Any, precision: Callable[[], AbstractContextManager[Any]]) -> Any:
    tokens = torch.arange(12, device=module.device).view(2, 6) % module.config.vocab_size
    with precision():
        return module(input_ids=tokens, use_cache=False).logits


@cache
def of_kind(kind: Any) -> Any:
    """A class and no closure on the part: a copy of the module must run its own parts."""
    return type(kind.__name__, (kind,), {"forward": torch.compile(kind.forward, dynamic=True)})
