"""From YAML and the command line to a `Recipe`, and back.

    name: noughts
    model: tiny
    stages:
      - {name: format, method: sft, data: {demos: tictactoe, episodes: 4000}}
      - {name: rl, method: {grpo: {clip_high: 0.28}}, env: {tictactoe: {opponent: random}}, train: {steps: 60}}

A recipe of one stage may write the stage's keys at the top level. Any key can be set on the command line:
`seed=1`, `rl.train.steps=10`, or `train.steps=10` where there is one stage. A key that is not known is an error: a
setting that is accepted and ignored is the costliest bug there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tropism.config import Data, Judge, Learned, Model, Named, Recipe, Stage, Success
from tropism.errors import ConfigError
from tropism.keys import RECIPE, STAGE, either, known, leaves, shown, unknown

SHORT: dict[type, str] = {Model: "path", Data: "path", Success: "part", Judge: "who", Learned: "who"}
"""Where a text may stand for the whole section: `model: tiny`."""


# ------------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:  # YAML would silently take the last
            line = node.start_mark.line + 1
            raise ConfigError(f"key {shown(twice[0])} stands twice in the section that starts on line {line}.")
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    pass


for _yaml in (_Loader, _Dumper):  # YAML 1.1 reads 1e-4 as a text
    _exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+0123456789"))


def parse(text: str, where: str) -> Any:
    """The value of a YAML text."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def assignments(words: Sequence[str]) -> list[tuple[str, Any]]:
    """`["train.steps=10"]` -> `[("train.steps", 10)]`."""
    for word in words:
        if not word.partition("=")[1] or word.startswith("="):
            raise ConfigError(f"{word!r} is not a setting. Write key=value, such as train.steps=10.")
    return [(key, parse(value, key)) for key, _, value in (word.partition("=") for word in words)]


def load(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a method's name and its overrides: `load("grpo", ["env=tictactoe"])`."""
    path = Path(path_or_name)
    if path.is_file():
        raw = _table(parse(path.read_text(encoding="utf-8"), str(path)), str(path))
        return resolve({"name": path.stem, **raw}, overrides)
    from tropism.methods import METHODS

    if path_or_name in METHODS or ".py:" in path_or_name:
        return resolve({"method": path_or_name}, overrides)
    recipes = {str(found): str(found) for found in sorted(Path("recipes").glob("*.yaml"))}
    names = recipes | {Path(found).stem: found for found in recipes} | {name: name for name in METHODS}
    near = difflib.get_close_matches(path_or_name, names, 3) or list(names)
    nearest = either(list(dict.fromkeys(names[name] for name in near)))
    raise ConfigError(f"there is no recipe file and no method {path_or_name!r}. Did you mean {nearest}?")


def resolve(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that plain settings describe. Objects of `config` and methods may stand where settings do."""
    recipe, stages = _lift(raw)
    for key, value in assignments(overrides):
        _override(recipe, stages, key, value)
    if not stages:
        raise ConfigError("the recipe has no stages, so there is nothing to do. Write method: and env: or data:.")
    keys = [key for key in known(Recipe) if key != "stages"]
    for stage in stages:
        stage.setdefault("name", _stage_name(stage))
        prefix = f"{stage['name']}." if len(stages) > 1 else ""
        keys += [prefix + key for key in known(Stage)]
        if "method" in stage:
            keys += [f"{prefix}method.{key}" for key in known(_method_class(stage["method"]))]
    built = [_build(Stage, stage, f"{stage['name']}." if len(stages) > 1 else "", keys) for stage in stages]
    last = built[-1]
    source = last.env or last.data.demos or Named(name=last.data.path)
    recipe.setdefault("name", re.sub(r"[^\w-]+", "-", f"{last.name}-{Path(source.name).stem}"))
    for what, name in [("name", recipe["name"]), *(("the name of a stage", stage.name) for stage in built)]:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", str(name)):
            raise ConfigError(f"{what} is {name!r}, but names a folder. Use letters, digits, - and _.")
    for stage in built:
        if stage.name in (*RECIPE, *STAGE) or "." in stage.name:
            raise ConfigError(f"a stage cannot be called {stage.name}: {stage.name}.train.steps=1 would be unclear.")
    whole: Recipe = _build(Recipe, {**recipe, "stages": tuple(built)}, "", keys)
    return whole


def _lift(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipe's own keys, and its stages, of which a single one may have lain at the top level."""
    recipe = {key: value for key, value in raw.items() if key in RECIPE and key != "stages"}
    rest = {key: value for key, value in raw.items() if key not in RECIPE}
    if "stages" not in raw:
        return recipe, [rest]
    for key, value in rest.items():
        if key in STAGE:
            raise ConfigError(f"{key} stands beside stages, so no stage would use it. Move it into a stage.")
        raise unknown(str(key), value, [*known(Recipe), *known(Stage)])
    stages = raw["stages"]
    if isinstance(stages, str | Mapping) or not isinstance(stages, Sequence):
        raise ConfigError(f"stages is {shown(stages)}, but must be a list of stages.")
    return recipe, [_table(plain(stage) if isinstance(stage, Stage) else stage, "a stage") for stage in stages]


# ----------------------------------------------------------------------------------------------------------- overrides


def _override(recipe: dict[str, Any], stages: list[dict[str, Any]], key: str, value: Any) -> None:
    head, *rest = key.split(".")
    named = {_stage_name(stage): stage for stage in stages}
    if head == "stages":
        raise ConfigError(f"{key} cannot be set as a whole. Write the name of a stage first: {next(iter(named))}.….")
    if head in RECIPE and not (head == "name" and rest):
        _assign(recipe, [head, *rest], value)
    elif head in named and rest:
        _assign(named[head], rest, value)
    elif head in named:
        raise ConfigError(f"{head} is a stage. Set one of its keys, such as {head}.train.steps=10.")
    elif len(stages) == 1:
        _assign(stages[0], [head, *rest], value)
    elif head in STAGE:
        choices = either([f"{name}.{key}" for name in named])
        raise ConfigError(f"{key} could be meant for any of {len(stages)} stages. Write {choices}.")
    else:
        raise unknown(key, value, [*known(Recipe), *(f"{name}.{inner}" for name in named for inner in known(Stage))])


def _assign(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    """Sets `parts` below `tree`. What it meets on the way becomes a fresh, plain dict: the caller's stays as it was."""
    key, *rest = parts
    if not rest:
        tree[key] = value
        return
    node = tree.get(key)
    if key == "method" and not isinstance(node, str | Mapping | None):
        node = {method_name(node): plain(node)}
    elif dataclasses.is_dataclass(node):
        node = plain(node)
    if key in ("method", "env", "demos"):  # one name and its options: reach into the options
        if not node:
            raise ConfigError(f"{'.'.join(parts)} cannot be set, for there is no {key}. Write {key}=NAME before it.")
        name, options = (node, {}) if isinstance(node, str) else next(iter(_table(node, key).items()))
        tree[key] = {name: _table(options or {}, f"{key}.{name}")}
        _assign(tree[key], [name, *(rest[1:] if rest[0] == name and rest[1:] else rest)], value)
        return
    if key == "rewards":  # the name of a scorer may hold dots: file.py:function
        rest = [".".join(rest)]
    if isinstance(node, str) and key in ("model", "data", "success", "judge"):
        node = {{"success": "part", "judge": "who"}.get(key, "path"): node}
    tree[key] = _table(node or {}, key)
    _assign(tree[key], rest, value)


def _stage_name(stage: Mapping[str, Any]) -> str:
    if "name" in stage:
        return str(stage["name"])
    method = stage.get("method")
    if not method:
        raise ConfigError("a stage has no method. Write method: grpo, or another one that `tropism methods` lists.")
    return folder_name(method)


# ------------------------------------------------------------------------------------------------------------ building


def _build(cls: type, raw: Any, where: str, keys: Sequence[str]) -> Any:
    """An instance of the dataclass `cls`. `where` is the dotted path of what is inside: `rl.train.`, or empty."""
    if isinstance(raw, cls):
        return raw
    if cls in SHORT and isinstance(raw, str):
        raw = {SHORT[cls]: raw}
    raw = _table(raw, where.rstrip(".") or "a recipe")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in raw:
        if key not in fields:
            raise unknown(f"{where}{key}", raw[key], keys)
    for key, f in fields.items():  # a teacher's settings change those that its method is known with
        if key in raw and isinstance(raw[key], Mapping) and dataclasses.is_dataclass(f.default):
            raw[key] = plain(f.default) | dict(raw[key])
    hints = get_type_hints(cls)
    values = {key: _value(hints[key], where + key, value, keys) for key, value in raw.items()}
    values = {key: value for key, value in values.items() if value is not dataclasses.MISSING}
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing, and there is no default for it.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where.rstrip('.') or cls.__name__}: {error}") from None
    except ConfigError as error:  # a section names itself, train.steps is 0; with several stages that is not enough
        stage, dot, section = where.rstrip(".").rpartition(".")
        raise ConfigError(f"{stage}{dot}{error}" if str(error).startswith(f"{section}.") else str(error)) from None


def _value(hint: Any, here: str, value: Any, keys: Sequence[str]) -> Any:
    """`value` as the field at `here` wants it; MISSING where it should keep its default."""
    key = here.rpartition(".")[2]
    if key == "method":
        return _method(value, here, keys)
    if key == "stages":
        return value
    if key == "report_to" and isinstance(value, str):
        value = [] if value == "none" else [value]
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    if value is None and (dataclasses.is_dataclass(hint) or get_origin(hint) is Mapping):  # `train:` and nothing below
        return dataclasses.MISSING
    for choice in choices:
        if choice is Named:
            return value if isinstance(value, Named) else _named(value, here)
        if isinstance(choice, type) and dataclasses.is_dataclass(choice) and not {type(value)} & {*choices}:
            return _build(choice, value, f"{here}.", keys)
    odd = (isinstance(value, bool) and bool not in choices) or value != value  # True is no number, and NaN is none
    try:
        if odd and hint is not Any:
            raise TypeError
        return _adapter(hint).validate_python(value)
    except TypeError:
        raise ConfigError(f"{here} is {shown(value)}, but must be {_expected(hint)}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise ConfigError(f"{here} is {shown(value)}, but must be longer.") from None
        inside = [str(part) for part in first["loc"] if isinstance(part, int) or isinstance(value, Mapping)]
        at = ".".join([here, *(part for part in inside if part != "[key]")])
        must = first["msg"].removeprefix("Input should be ") if inside else _expected(hint) or first["msg"]
        raise ConfigError(f"{at} is {shown(first['input'])}, but must be {must}.") from None


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _named(value: Any, here: str) -> Named:
    if isinstance(value, str):
        return Named(name=value)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(
            f"{here} is {shown(value)}, but must be one name, alone or with its options: {{NAME: {{…}}}}."
        )
    name, options = next(iter(value.items()))
    return Named(name=str(name), options=_table(options or {}, f"{here}.{name}"))


def _method(value: Any, here: str, keys: Sequence[str]) -> Any:
    options = _named(value, here).options if isinstance(value, str | Mapping) else value
    return _build(_method_class(value), options, f"{here}.", keys)


def _method_class(method: Any) -> type:
    from tropism.methods import find

    return find(method_name(method)) if isinstance(method, str | Mapping) else type(method)


def _table(value: Any, here: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{here} is {shown(value)}, but must be a table of settings.")
    return dict(value)


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return either([str(choice) for choice in get_args(hint)])
    if get_origin(hint) in (Union, types.UnionType):
        return either([_expected(choice) for choice in get_args(hint)])
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    return named.get(hint) or str(hint)


# ------------------------------------------------------------------------------------------------------------- writing


def dump(recipe: Recipe) -> dict[str, Any]:
    """Everything the run is made from, as plain values: `resolve(dump(recipe)) == recipe`."""
    whole: dict[str, Any] = plain(recipe)
    return whole


def text(recipe: Recipe) -> str:
    """`dump` as YAML that `load` reads."""
    return yaml.dump(dump(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts for everything that a recipe can hold."""
    if isinstance(value, Named):
        return {value.name: plain(value.options)}
    if isinstance(value, Mapping):
        return {_address(key) if callable(key) else key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return _address(value) if callable(value) else value
    fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Data):
        fields = {key: inner for key, inner in fields.items() if inner not in ("", None)}
    if isinstance(value, Stage):
        fields["method"] = {method_name(value.method): fields["method"]}
    return fields


def method_name(method: Any) -> str:
    if isinstance(method, str | Mapping):
        return method if isinstance(method, str) else str(next(iter(method), ""))
    from tropism.methods import METHODS

    return next((name for name, cls in METHODS.items() if cls is type(method)), _address(type(method)))


def folder_name(method: Any) -> str:
    """What a run or a stage of this method is called where nobody says: of somebody's own, the class alone."""
    return re.split(r"[:.]", method_name(method))[-1].lower()


def _address(thing: Any) -> str:
    """`file.py:function` of a user's own function or class."""
    place = None
    with contextlib.suppress(TypeError, OSError):  # typed in, without a file
        place = inspect.getsourcefile(thing) if hasattr(thing, "__qualname__") else None
    return f"{place or thing.__module__}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`rl.train.steps: 10 -> 20` for every setting that differs between two dumped recipes."""
    before, after = ({key: shown(value) for key, value in leaves(tree)} for tree in (old, new))
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]
