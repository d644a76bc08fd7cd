"""methods, envs, diff: what there is, and how it differs."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import sys
from typing import Annotated, Any

import typer

COLORS = {"+": "green", "-": "red"}


def methods(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="One of them: its card and its settings.")] = "",
) -> None:
    """List the methods with what they need and their papers; or tell all of one."""
    from tropism.methods import METHODS, find

    if name:
        method = find(name)
        print(inspect.getdoc(method))
        for field, default, text in settings(method):
            print(f"\n{field} = {default}\n    {text}")
        return
    for name, method in METHODS.items():
        needs = method().needs
        asked = ", ".join(sorted(needs.measured | needs.live | needs.sampling | needs.data)) or "nothing"
        print(f"{name:<12} {first_sentence(method)} ({paper(method)}); needs {asked}")


def settings(method: type) -> list[tuple[str, Any, str]]:
    """(name, default, the text under it) of every field."""
    body = ast.parse(inspect.getsource(method)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {
        field.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
        for field, text in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
    return [(f.name, f.default, texts.get(f.name, "")) for f in dataclasses.fields(method)]


def paper(method: type) -> str:
    found = re.search(r"arXiv:[\d.]+\d|doi:[\w./-]+\w", method.__doc__ or "")
    return found[0] if found else "no paper"


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
