"""Every global generator from one seed."""

from __future__ import annotations

import random

import numpy
import torch


def seed_generators(seed: int) -> None:
    """Of Python, NumPy and torch, whatever ran before in this process."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
