"""Who may import whom, how long a file may be, and what must not be loaded before it is used.

errors, types, teacher            nothing
sections, config, load, keys, recipe  what stands before them in this line (and recipe the methods, by name)
maths                             torch alone
methods, classic                  maths, types (methods the settings of a teacher, and load to find somebody's own)
envs, rewards                     types and the standard library; graders inside functions; never torch
rollout                           envs, maths, types
signals                           maths, types, teacher, rollout.render
record -> view                    no torch
watch                             types, record, maths
training                          all of these: the loop asks watch, and watch knows nothing of the loop
api                               anything but the command line; cli anything; nothing imports cli
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tropism.methods import METHODS

SOURCE = Path(__file__).parent.parent / "src" / "tropism"

EVERYTHING = {"config", "envs", "errors", "keys", "load", "maths", "methods", "recipe", "record", "rewards", "rollout"}
EVERYTHING |= {"sections", "signals", "teacher", "training", "types", "view", "watch", "api", "__version__"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "teacher": {"errors"},
    "sections": {"errors", "teacher"},
    "config": {"errors", "sections"},
    "load": {"errors"},
    "keys": {"config", "errors"},
    "recipe": {"config", "errors", "keys", "methods"},
    "record": {"errors", "types"},
    "maths": {"errors"},
    "methods": {"maths", "types", "errors", "teacher", "load"},
    "classic": {"maths", "types", "errors"},
    "envs": {"types", "errors", "load"},
    "rewards": {"types", "errors", "load"},
    "rollout": {"envs", "types", "errors", "maths"},
    "signals": {"maths", "types", "errors", "teacher", "rollout.render"},
    "watch": {"types", "errors", "record", "maths"},
    "view": {"record", "errors", "types"},
    "training": EVERYTHING - {"view", "api"},
    "api": EVERYTHING - {"api"},
    "__init__": EVERYTHING,
    "__main__": {"cli"},
    "cli": EVERYTHING,
}
"""Room -> rooms and modules of ours that it may import, be it at the top, in a function or for types only."""

AT_THE_TOP: dict[str, set[str]] = {
    "maths": {"torch"},
    "methods": {"torch"},
    "classic": {"torch"},
    "rollout": {"torch"},
    "signals": {"torch"},
    "watch": {"torch"},
    "training": {"torch", "transformers", "tokenizers", "safetensors", "numpy"},
    "recipe": {"yaml", "pydantic"},
    "cli": {"typer", "rich"},
    "view": {"rich"},
}
"""Room -> packages of others that may be imported as soon as the module is. All the rest waits inside functions."""

NEVER: dict[str, set[str]] = {
    room: {"torch", "transformers", "tokenizers", "safetensors"}
    for room in ("errors", "config", "teacher", "load", "keys", "recipe", "record", "envs", "rewards", "view")
}
"""Not even inside a function."""


def modules(root: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """(room, path within the package, syntax tree) of every file."""
    for path in sorted(root.rglob("*.py")):
        within = path.relative_to(root)
        yield within.parts[0].removesuffix(".py"), within, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, bool, bool]]:
    """(dotted name, when the module is loaded?, for types only?) of every import."""

    def visit(node: ast.AST, top: bool, typing: bool) -> Iterator[tuple[str, bool, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, top, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((f"{base}.{alias.name}", top, typing) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False, True)
            for child in node.orelse:
                yield from visit(child, top, typing)
        else:
            inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, typing)

    return visit(tree, True, False)


def wrong_imports(root: Path) -> list[str]:
    found = []
    for room, path, tree in modules(root):
        allowed = MAY_IMPORT.get(room)
        if allowed is None:
            found.append(f"{path}: there is no room {room}; decide what it may import")
            continue
        for name, top, typing in imports(tree):
            package, _, inner = name.partition(".")
            if name.startswith("."):
                found.append(f"{path}: relative import of {name}")
            elif package == "tropism":
                own = path.parent.name == room and inner.split(".")[0] == room
                if not own and not any(inner == other or inner.startswith(f"{other}.") for other in allowed):
                    found.append(f"{path}: {room} must not import {name}")
            elif package in sys.stdlib_module_names or typing:
                continue
            elif package in NEVER.get(room, ()):
                found.append(f"{path}: {room} must never load {package}")
            elif top and package not in AT_THE_TOP.get(room, ()):
                found.append(f"{path}: {package} must be imported inside the function that needs it")
    return found


def methods_by_name(root: Path) -> list[str]:
    """Places outside methods/ that know one method from another, and methods that know each other."""
    found = []
    for room, path, tree in modules(root):
        for name, _, _ in imports(tree):
            one = name.startswith("tropism.methods.") and name.split(".")[2] not in ("METHODS", "find", "checked")
            if one and path.parts not in (("__init__.py",), ("methods", "__init__.py")):
                found.append(f"{path}: imports {name}")
        for node in ast.walk(tree) if room != "methods" else ():
            compared: list[ast.expr | ast.pattern] = []
            if isinstance(node, ast.Compare):
                compared = [node.left, *node.comparators]
            elif isinstance(node, ast.match_case):
                compared = [node.pattern]
            texts = {leaf.value for part in compared for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)}
            if named := {text for text in texts if isinstance(text, str) and text.lower() in METHODS}:
                found.append(f"{path}:{node.lineno if isinstance(node, ast.Compare) else '?'} branches on {named}")
    return found


def too_long(root: Path) -> list[str]:
    found = []
    for _, path, tree in modules(root):
        lines = len((root / path).read_text(encoding="utf-8").splitlines())
        if lines > 400:
            found.append(f"{path} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 80:
                    found.append(f"{path}: {node.name} has {length} lines")
    return found


def loaded_by(*names: str) -> set[str]:
    """Packages of others that a fresh interpreter has loaded after importing these modules."""
    code = f"import sys; old = set(sys.modules); import {', '.join(names)}; print(*(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()} - {*sys.stdlib_module_names, "tropism"}


# ------------------------------------------------------------------------------------------------------------ the house


def test_every_import_points_the_right_way():
    assert wrong_imports(SOURCE) == []


def test_no_code_outside_methods_knows_one_method_from_another():
    assert methods_by_name(SOURCE) == []


def test_no_file_is_over_400_lines_and_no_function_over_80():
    assert too_long(SOURCE) == []


def test_environments_and_rewards_load_neither_torch_nor_tokenizers():
    names = [
        str(path.with_suffix("")).replace("/", ".") for room, path, _ in modules(SOURCE) if room in ("envs", "rewards")
    ]
    names = [f"tropism.{name.removesuffix('.__init__')}" for name in names]
    assert len(names) > 5
    assert loaded_by(*names) & {"torch", "transformers", "tokenizers", "numpy"} == set()


def test_the_package_and_the_settings_load_nothing_of_others():
    assert loaded_by("tropism", "tropism.types", "tropism.config", "tropism.record", "tropism.cli") == set()


def test_the_command_line_loads_no_torch():
    assert loaded_by("tropism.cli.app") & {"torch", "transformers", "pydantic", "yaml"} == set()


# ----------------------------------------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("maths/logp.py", "import transformers", "transformers must be imported inside"),
        ("maths/logp.py", "from tropism.types import Batch", "maths must not import tropism.types.Batch"),
        ("envs/tictactoe.py", "import torch", "envs must never load torch"),
        ("envs/tictactoe.py", "def f():\n    import torch", "envs must never load torch"),
        ("envs/tictactoe.py", "import pyspiel", "pyspiel must be imported inside"),
        ("envs/tictactoe.py", "from tropism import rollout", "envs must not import tropism.rollout"),
        ("signals/frozen.py", "from tropism.rollout.play import play", "signals must not import tropism.rollout.play"),
        (
            "training/learn.py",
            "def f():\n    from tropism.cli import main",
            "training must not import tropism.cli.main",
        ),
        ("training/learn.py", "try:\n    import vllm\nexcept ImportError:\n    pass", "vllm must be imported inside"),
        ("training/learn.py", "from .update import update", "relative import"),
        ("view/report.py", "from tropism.training import run", "view must not import tropism.training.run"),
        ("types.py", "import torch", "torch must be imported inside"),
        ("utils/things.py", "import os", "there is no room utils"),
    ],
)
def test_a_planted_import_is_found(tmp_path, path, line, complaint):
    planted = tmp_path / path
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(f"{line}\n")
    (found,) = wrong_imports(tmp_path)
    assert found.startswith(path) and complaint in found


def test_a_room_may_import_itself_and_what_stands_below(tmp_path):
    (tmp_path / "rollout").mkdir()
    good = ["import torch", "from tropism.rollout.render import Render", "from tropism.maths import logp"]
    good += ["import tropism.types", "def f():", "    import transformers"]
    (tmp_path / "rollout" / "good.py").write_text("\n".join(good))
    assert wrong_imports(tmp_path) == []


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (methods_by_name, 'def f(method):\n    return 1 if method == "grpo" else 0\n'),
        (methods_by_name, 'def f(method):\n    return method in ("GRPO", "PPO")\n'),
        (methods_by_name, 'def f(method):\n    match method:\n        case "grpo":\n            return 1\n'),
        (methods_by_name, "from tropism.methods.grpo import GRPO\n"),
        (too_long, "x = 1\n" * 401),
        (too_long, "def f():\n" + "    x = 1\n" * 80),
    ],
)
def test_a_planted_fault_is_found(tmp_path, check, code):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "bad.py").write_text(code)
    assert len(check(tmp_path)) == 1


def test_what_is_loaded_is_seen():
    assert "torch" in loaded_by("tropism.methods")
