"""`from tropism import train, GRPO`: what the package offers, to people and to type checkers."""

import ast
from pathlib import Path

import pytest

import tropism

HERE = Path(tropism.__file__)


def test_type_checkers_are_told_of_every_public_name():
    (guarded,) = (node for node in ast.parse(HERE.read_text()).body if isinstance(node, ast.If))
    told = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(tropism.__all__)


def test_every_public_name_is_there():
    for name in tropism.__all__:
        assert getattr(tropism, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        tropism.trian  # noqa: B018
    with pytest.raises(ImportError):
        from tropism import trian  # noqa: F401
