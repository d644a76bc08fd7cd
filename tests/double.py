"""A fixture that rooms import into their conftest.py: mathematics is checked in float64."""

import pytest
import torch


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
