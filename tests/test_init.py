"""`from tropism import train, GRPO`: what the package offers, to people and to type checkers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tropism

HERE = Path(tropism.__file__)


def test_type_checkers_are_told_of_every_public_name():
    branches = (node for node in ast.parse(HERE.read_text()).body if isinstance(node, ast.If))
    (guarded,) = (node for node in branches if ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(tropism.__all__)


def test_every_public_name_is_there():
    for name in tropism.__all__:
        assert getattr(tropism, name).__name__ == name


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, tropism.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_briefly_unless_somebody_says_otherwise(given, found):
    """It must stand before torch is loaded, and `import tropism` loads none."""
    told = "import os, sys, tropism; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", told], env=env | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(found), "False"]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        tropism.trian  # noqa: B018
    with pytest.raises(ImportError):
        from tropism import trian  # noqa: F401
