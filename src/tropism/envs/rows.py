"""Rows of a data set as dictionaries: JSONL, Parquet, a Hugging Face directory, or a hub id."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tropism.envs.forms import in_known_form
from tropism.errors import ConfigError
from tropism.load import hint

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(path: str, split: str = "train") -> list[Row]:
    """All rows.

    Args:
        path: a .jsonl or .parquet file, a directory (written by `save_to_disk`, or a copy of a hub data set), or a hub
            id `owner/name`, `owner/name:config`. With HF_HUB_OFFLINE=1 only the local cache is read.
        split: of a directory or hub data set; a file is one split.
    """
    place = Path(path).expanduser()
    if place.is_file():
        rows = _parquet(place) if place.suffix == ".parquet" else _jsonl(place)
    elif place.is_dir():
        rows = _directory(place, split)
    elif place.suffix in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(f"there is no file or directory {path} (looked from {Path.cwd()}).")
    else:
        rows = _hub(path, split)
    if not rows:
        raise ConfigError(f"{path} has no rows, so there is nothing to learn from.")
    return [in_known_form(row) for row in rows]


def require_column(rows: list[Row], column: str, path: str, what: str) -> None:
    """Refuse a column that is not in every row."""
    for number, row in enumerate(rows):
        if column not in row:
            known = sorted(map(str, row))
            raise ConfigError(
                f"{what} is column {column!r}, but row {number} of {path} has only: {', '.join(known)}. "
                f"{hint(column, known)}"
            )


def _jsonl(path: Path) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(
                        f"line {number} of {path} is a {type(row).__name__}, but every line is an object."
                    )
                rows.append(row)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {number} of {path} is not JSON: {error}. Every line must be an object.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}. Known files: {', '.join(SUFFIXES)}.") from error
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:
        raise ConfigError(f"{path} could not be read as Parquet: {error}") from error
    return rows


def _directory(path: Path, split: str) -> list[Row]:
    import datasets

    written = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if not written:
        return _hub(str(path), split)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ConfigError(f"{path} could not be read as a data set: {type(error).__name__}: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(f"{path} has no split {split!r}. {hint(split, map(str, found))}")
        found = found[split]
    return list(found)


def _hub(name: str, split: str) -> list[Row]:
    import datasets

    name, _, config = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        return list(datasets.load_dataset(name, config or None, split=split))
    except Exception as error:
        offline = (
            " HF_HUB_OFFLINE is set, so only the local cache was read." if os.environ.get("HF_HUB_OFFLINE") else ""
        )
        raise ConfigError(
            f"{name} is neither a file nor a directory here, and could not be loaded as a data set (split {split!r}): "
            f"{type(error).__name__}: {error}.{offline}"
        ) from error
