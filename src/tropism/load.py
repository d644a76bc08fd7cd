"""Find what a user named: `file.py:name` or `module:name`, and the nearest name when there is none."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from tropism.errors import ConfigError

USERS = "tropism_user"
"""What their modules are parts of."""


def hint(name: str, known: Iterable[str]) -> str:
    """ "Did you mean prompt?", or the whole list where nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"There is: {', '.join(names)}." if names else "There is none."


def load(reference: str) -> Any:
    """What `file.py:name` or `module:name` refers to."""
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"{reference!r} names no code. Write file.py:name or module:name.")
    module = from_file(Path(place).expanduser()) if place.endswith(".py") else _from_module(place)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"{place} has no {name!r}. {hint(name, public)}")
    return getattr(module, name)


def files_in(pickled: bytes) -> list[str]:
    """Every `file.py` that a pickle needs: where they are loaded first, it finds what they define."""
    loaded = [(name, module) for name, module in sys.modules.items() if name.startswith(f"{USERS}.")]
    return [str(module.__file__) for name, module in loaded if name.encode() in pickled]


def from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path} (looked from {Path.cwd()}).")
    path = path.resolve()
    # Under a name of its own in sys.modules, for dataclasses and pickle look there; one file is one module.
    module_name = f"{USERS}.{path.stem}_{zlib.crc32(bytes(path)):x}"
    sys.modules.setdefault(USERS, ModuleType(USERS))
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"module {name} could not be imported: {type(error).__name__}: {error}") from error
