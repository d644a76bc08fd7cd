"""Plant one fault at a time in maths/ and methods/ and see whether the tests of that file notice.

    python bench/mutate.py                  all files
    python bench/mutate.py surrogate grpo   files whose name contains one of these

Faults: sign, dropped term or factor, min and max, comparison, clamp bound, detach removed, mask removed, index +- 1,
constant times 2. A fault that no test notices is a missing test, or changes nothing that can be observed; then
equivalent.txt says why. Exits 1 if a survivor has no reason there, or a reason no longer has a survivor.

The tests of maths/x.py are tests/maths/test_x.py (of __init__.py: test_registry.py), test_x_*.py and test_shared.py
beside it. A process that has imported torch is forked for every mutant; on one core all of them take minutes.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

import hypothesis
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tropism"
ROOMS = ("maths", "methods")
EXPLAINED = ROOT / "bench" / "equivalent.txt"

SWAPS = {"minimum": "maximum", "min": "max", "amin": "amax", "any": "all", "argmin": "argmax"}
SWAPS |= {b: a for a, b in SWAPS.items()}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
REMOVED = ("detach", "clamp", "masked_fill", "where", "abs", "reshape")


@dataclass(frozen=True)
class Mutant:
    file: str
    """maths/reduce.py"""
    where: str
    """Function, or the class or module that the line stands in."""
    change: str
    """source before -> source after"""
    line: int
    code: CodeType

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.file, self.where, self.change)


# --------------------------------------------------------------------------------------------------------------- faults


def faults(node: ast.AST, indexing: bool) -> Iterator[ast.expr]:
    """Every wrong expression that could stand in the place of this one."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            yield from (ast.BinOp(left, ast.Sub(), right), left, right)
        case ast.BinOp(left, ast.Sub(), right):
            yield from (ast.BinOp(left, ast.Add(), right), left, ast.UnaryOp(ast.USub(), right))
        case ast.BinOp(left, ast.Mult() | ast.BitAnd() | ast.BitOr(), right):
            yield from (left, right)
            if not isinstance(node.op, ast.Mult):
                yield ast.BinOp(left, ast.BitOr() if isinstance(node.op, ast.BitAnd) else ast.BitAnd(), right)
        case ast.BinOp(left, ast.Div() | ast.FloorDiv(), _):
            yield left
        case ast.BoolOp(operation, values):
            yield ast.BoolOp(ast.Or() if isinstance(operation, ast.And) else ast.And(), values)
            yield from values
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.Compare(left, [operation], [right]):
            yield from (ast.Compare(left, [other()], [right]) for other in COMPARISONS.get(type(operation), ()))
        case ast.Compare(left, [a, b], [middle, right]):
            first, second = ast.Compare(left, [a], [middle]), ast.Compare(middle, [b], [right])
            yield from (first, second)
            yield from (ast.BoolOp(ast.And(), [wrong, second]) for wrong in faults(first, False))
            yield from (ast.BoolOp(ast.And(), [first, wrong]) for wrong in faults(second, False))
        case ast.IfExp(_, chosen, other):
            yield from (chosen, other)
        case ast.Call():
            yield from broken_calls(node)
        case ast.Attribute(value, name, context) if name in SWAPS:
            yield ast.Attribute(value, SWAPS[name], context)
        case ast.Name(name, ast.Load()) if name in SWAPS:
            yield ast.Name(SWAPS[name], ast.Load())
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield from map(ast.Constant, (value + 1, value - 1) if indexing else (2 * value if value else 1,))
        case ast.Constant(str() as value) if value in SWAPS:
            yield ast.Constant(SWAPS[value])


def broken_calls(call: ast.Call) -> Iterator[ast.expr]:
    """detach and masks removed, each bound of a clamp dropped or turned around, either side of a where."""
    if not isinstance(call.func, ast.Attribute):
        return
    owner, name = call.func.value, call.func.attr
    if isinstance(owner, ast.Name) and owner.id == "torch":
        if name in ("where", "maximum", "minimum", "logaddexp"):
            yield from call.args[-2:]
        return
    if name in REMOVED:
        yield owner
    if name == "clamp":
        for i, word in enumerate(("min", "max")[: len(call.args)]):
            kept = [ast.keyword(other, call.args[1 - i]) for other in ("min", "max") if other != word]
            yield ast.Call(call.func, [], kept if len(call.args) == 2 else [])
        for given in call.keywords:
            turned = [ast.keyword(SWAPS[str(given.arg)], given.value)]
            yield ast.Call(call.func, call.args, turned)


def places(
    tree: ast.AST, where: str = "", indexing: bool = False
) -> Iterator[tuple[ast.AST, str, int | None, str, bool]]:
    """(parent, field, place in the field or None, function, is an index) of every expression that runs."""
    for name, content in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list") or isinstance(tree, ast.JoinedStr | ast.Raise):
            continue
        for i, child in enumerate(content) if isinstance(content, list) else ((None, content),):
            if not isinstance(child, ast.AST) or is_docstring(child):
                continue
            inside = where
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{where}.{child.name}" if where else child.name
            index = (isinstance(tree, ast.Subscript) and name == "slice") or (
                indexing and isinstance(tree, ast.Tuple | ast.Slice | ast.UnaryOp)
            )
            if isinstance(child, ast.expr):
                yield tree, name, i, where, index
            yield from places(child, inside, index)


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def mutants(path: Path) -> list[Mutant]:
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    file, found = str(path.relative_to(PACKAGE)), []
    for parent, field, place, where, indexing in list(places(tree)):
        content = getattr(parent, field)
        original = content if place is None else content[place]
        shown = statement_part(original, parents)
        before = ast.unparse(shown)
        for wrong in faults(original, indexing):
            put(parent, field, place, wrong)
            after = ast.unparse(wrong if shown is original else shown)
            code = compile(ast.fix_missing_locations(ast.Module(tree.body, [])), str(path), "exec", dont_inherit=True)
            found.append(Mutant(file, where or "(module)", f"{before} -> {after}", original.lineno, code))
            put(parent, field, place, original)
    return found


def put(parent: ast.AST, field: str, place: int | None, node: Any) -> None:
    if place is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[place] = node


def statement_part(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.AST:
    """The smallest expression that can be recognised: `sum(1)`, not `1`."""
    while isinstance(node, ast.Constant | ast.Name | ast.Attribute | ast.UnaryOp | ast.Tuple | ast.Slice | ast.keyword):
        if not isinstance(parents[node], ast.expr | ast.keyword):
            return parents[node] if isinstance(parents[node], ast.AnnAssign | ast.Assign) else node
        node = parents[node]
    return node


# -------------------------------------------------------------------------------------------------------------- running


class Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module in its mutated form."""

    def __init__(self, mutant: Mutant) -> None:
        name = "tropism." + mutant.file.removesuffix(".py").replace("/", ".")
        self.name, self.package = name.removesuffix(".__init__"), name.endswith(".__init__")
        self.path, self.code = PACKAGE / mutant.file, mutant.code

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        folder = [str(self.path.parent)] if self.package else None
        return importlib.util.spec_from_file_location(name, self.path, loader=self, submodule_search_locations=folder)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


def tests_of(file: str) -> list[str]:
    room, stem = Path(file).parent, Path(file).stem
    others = {f"test_{path.stem}" for path in (PACKAGE / room).glob("*.py") if path.stem != stem}
    name = "registry" if stem == "__init__" else stem
    own = [path for path in sorted((ROOT / "tests" / room).glob(f"test_{name}*.py")) if path.stem not in others]
    return [str(path) for path in (*own, ROOT / "tests" / room / "test_shared.py") if path.exists()]


def fork(file: str, mutant: Mutant | None, limit: float) -> int:
    """Start the tests of this file in a copy of this process; its exit code is pytest's."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    with contextlib.suppress(BaseException):
        signal.setitimer(signal.ITIMER_REAL, limit)  # the alarm ends the process: an endless loop is noticed too
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        if mutant is not None:
            sys.meta_path.insert(0, Planted(mutant))
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", *tests_of(file)])
    os._exit(int(code))


def survivors(found: list[Mutant], limits: dict[str, float], jobs: int) -> list[Mutant]:
    running: dict[int, Mutant] = {}
    alive, waiting = [], list(reversed(found))
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[fork(mutant.file, mutant, limits[mutant.file])] = mutant
        pid, status = os.wait()
        mutant = running.pop(pid)
        if os.waitstatus_to_exitcode(status) == 0:
            alive.append(mutant)
            print(f"  survives  {mutant.file}:{mutant.line}  {mutant.where}  {mutant.change}", flush=True)
    return alive


def explanations() -> dict[tuple[str, str, str], str]:
    """`file :: function :: before -> after` at the start of a line, then the reason, indented."""
    found: dict[tuple[str, str, str], str] = {}
    pending: list[tuple[str, str, str]] = []
    reasoned = False
    for line in EXPLAINED.read_text().splitlines() if EXPLAINED.exists() else ():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(" "):
            reasoned = True
            found |= {key: found.get(key, "") + line for key in pending}
        else:
            file, where, change = line.split(" :: ", 2)
            pending = [] if reasoned else pending
            reasoned = False
            pending.append((file, where, change))
    return found


def main(chosen: list[str]) -> int:
    begun = time.monotonic()
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    hypothesis.settings.register_profile("mutate", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutate")
    files = sorted(path for room in ROOMS for path in (PACKAGE / room).glob("*.py"))
    files = [path for path in files if path.read_text() and (not chosen or any(part in str(path) for part in chosen))]
    found, limits = [], {}
    for path in files:
        file, started = str(path.relative_to(PACKAGE)), time.monotonic()
        if not tests_of(file):
            print(f"{file} has no tests: tests/{file.replace('/', '/test_')} is not there.")
            return 1
        _, status = os.waitpid(fork(file, None, 300), 0)
        if os.waitstatus_to_exitcode(status) != 0:
            print(f"the tests of {file} fail without any fault planted: run pytest {' '.join(tests_of(file))}")
            return 1
        limits[file] = 10 + 5 * (time.monotonic() - started)
        planted = mutants(path)
        found += planted
        print(f"{len(planted):5} faults in {file}", flush=True)
    alive = {mutant.key for mutant in survivors(found, limits, os.cpu_count() or 1)}
    reasons = {key: why for key, why in explanations().items() if key[0] in limits}
    unexplained, stale = alive - reasons.keys(), reasons.keys() - alive
    for title, keys in (("survived, and equivalent.txt gives no reason", unexplained), ("explained, but gone", stale)):
        for key in sorted(keys):
            print(f"{title}:\n{' :: '.join(key)}")
    print(
        f"{len(found)} faults, {len(found) - len(alive)} noticed, {len(alive & reasons.keys())} equivalent, "
        f"{len(unexplained)} unexplained, {len(stale)} stale; {time.monotonic() - begun:.0f} s"
    )
    return 1 if unexplained or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
