"""methods, envs, diff: what there is, and how it differs."""

from __future__ import annotations

import difflib
import inspect
import sys
from typing import Annotated, Any

import typer

COLORS = {"+": "green", "-": "red"}


def methods() -> None:
    """List the methods, a line each."""
    from tropism.methods import METHODS

    for name, method in METHODS.items():
        print(f"{name:<12} {first_sentence(method)}")


def envs() -> None:
    """List the environments and their options."""
    from tropism.envs import ENVS, find_class, options_of

    for name in ENVS:
        cls = find_class(name)
        print(f"{name:<12} {first_sentence(sys.modules[cls.__module__])}")
        for option, default in options_of(cls).items():
            print(f"{'':<12} {option}: {'required' if default is inspect.Parameter.empty else default}")


def diff(
    method: Annotated[str, typer.Argument(metavar="METHOD", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="OTHER", show_default=False)] = "grpo",
) -> None:
    """Explain a method by how its file differs from grpo's, or from another one's."""
    from tropism.methods import find

    old, new = (inspect.getsource(sys.modules[find(name).__module__]).splitlines() for name in (other, method))
    lines = difflib.unified_diff(old, new, f"methods/{other}.py", f"methods/{method}.py", n=0, lineterm="")
    for line in lines:
        typer.secho(line, fg=COLORS.get(line[0]))


def first_sentence(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0].split(". ")[0].rstrip(".")
