"""A machine with Metal, as far as devices and dtypes go: for tests on machines without."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Metal(TorchDispatchMode):
    """Raises where an operation gives float64 on mps, as Metal does. Enter it inside of torch's FakeTensorMode."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "mps" and leaf.dtype == torch.float64:
                raise TypeError(f"{function}: Metal has no float64")
        return found
