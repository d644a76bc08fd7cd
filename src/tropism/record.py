"""The run directory of one stage: what was set, what came out, and every turn that was played.

    config.yaml              everything resolved, versions, seeds
    metrics.jsonl            a line a step; wall times under time/
    rollouts/step-N.parquet  one row per turn, see COLUMNS; rollouts/eval-N.parquet for held-out play
    notes.json               small named facts: the best checkpoint, the table before and after
    checkpoints/             written elsewhere
    set-aside/<k>/           what a resume had to redo; never deleted

report.html, made from all of this, lies beside the folders of a run's stages.

Step N is the N-th finished step; what is logged before training has step 0. A file appears whole or not at all, except
for metrics.jsonl, which grows by a line at a time, so its last line may be torn by a kill: it is ignored.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tropism.errors import ConfigError, TropismError

if TYPE_CHECKING:
    import pyarrow as pa

    from tropism.types import Rollout

Kind = Literal["train", "eval"]

PREFIX: dict[Kind, str] = {"train": "step", "eval": "eval"}

COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("int", "Training step that played this turn, 1-based; for eval, the steps finished before it."),
    "episode": ("int", "Number of the rollout within its step; two seats of one game are two."),
    "group": ("int", "Equal for siblings: same task, seat and opening."),
    "sibling": ("int", "Number of the rollout among its siblings."),
    "seat": ("int", "The seat that the policy plays."),
    "level": ("int", "Difficulty of the task."),
    "domain": ("text", "Label of the task that statistics and teachers may be split by."),
    "env": ("text", "Name of the environment."),
    "task_seed": ("int", "Seed of the task; with `sibling` it replays the episode alone."),
    "turn": ("int", "Number of the turn within the episode, from 0."),
    "version": ("int", "Training steps that the sampling weights had seen."),
    "context": ("ids", "Token ids read before the first action token."),
    "action": ("ids", "Token ids as sampled, the stop token included."),
    "behavior_logp": ("floats", "Log-probability of each action token under who sampled it, nats."),
    "proximal_logp": ("floats", "Under the trainer's policy when the batch was made."),
    "reference_logp": ("floats", "Under the frozen reference, same context."),
    "teacher_logp": ("floats", "Under the teacher, in the teacher's own context."),
    "counter_logp": ("floats", "Under the same teacher, reading the opposite hint."),
    "entropy": ("floats", "Entropy of the distribution that each action token was drawn from, nats."),
    "advantage": ("floats", "Credit of each action token."),
    "weight": ("floats", "How much each action token counts in the objective."),
    "value": ("floats", "The critic's value of the state in which each action token was chosen."),
    "prompt": ("text", "What the turn saw: a text, or messages as JSON."),
    "reply": ("text", "The words that the environment heard."),
    "feedback": ("text", "What was said about this reply; the policy never saw it."),
    "hints": ("text", "What a judge would have told the policy before, a line each; the policy never saw it."),
    "stop": ("text", "Why the reply ended: finished or truncated."),
    "reward": ("float", "What this turn earned."),
    "total": ("float", "Reward of the whole rollout."),
    "rewards": ("parts", "Named parts of the rollout's reward, before weights."),
    "success": ("bool", "The rollout reached the recipe's threshold."),
    "failure": ("text", "Why the rollout could not be played or scored; null if it could."),
}
"""Columns of the rollout files: name -> (type, what it is). All may be null, and a list is as long as `action`."""


class Watcher(Protocol):
    """Who is told how a run goes. It only looks: training is the same without it."""

    def say(self, text: str, mark: tuple[int, int] = (0, 0)) -> None:
        """One line: a check that passed, a path, a warning. `mark`: the characters to bring out."""
        ...

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A stage of `steps` steps starts, `done` of them finished by an earlier run."""
        ...

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Rollout]) -> None:
        """A step has finished; held-out play reports itself the same way, with metrics named eval/…"""
        ...

    def end(self, stage: str) -> None: ...


class Lines:
    """A watcher that keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str, mark: tuple[int, int] = (0, 0)) -> None:
        self.lines.append(text)

    def begin(self, stage: str, steps: int, done: int) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Rollout]) -> None: ...

    def end(self, stage: str) -> None: ...


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns a full disk, within the block that writes `path`, into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise TropismError(
            f"{path} could not be written: {os.strerror(error.errno)}. The checkpoints saved before are intact: free "
            "some space and continue with --resume."
        ) from error


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, readable by all."""
    partial = path.with_name(f".{path.name}.partial")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.chmod(0o644)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def schema() -> pa.Schema:
    """COLUMNS for pyarrow; the sentence of each travels with the file as metadata `about`."""
    import pyarrow as pa

    types = {
        "int": pa.int64(),
        "bool": pa.bool_(),
        "text": pa.string(),
        "float": pa.float64(),
        "ids": pa.list_(pa.int32()),
        "floats": pa.list_(pa.float32()),
        "parts": pa.map_(pa.string(), pa.float64()),
    }
    return pa.schema([pa.field(name, types[kind], metadata={"about": text}) for name, (kind, text) in COLUMNS.items()])


class Run:
    """One run directory. Nothing is read before it is asked for, and reading needs only what is there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], versions: Mapping[str, str]) -> Run:
        """Start a new run directory; `versions` are kept as a key of config.yaml."""
        import yaml

        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ConfigError(f"{run.path} is a file, so no run can be written there. Choose another name.")
        held = sorted(entry.name for entry in run.path.iterdir()) if run.path.exists() else []
        held = [name for name in held if not name.endswith(".partial")]  # a kill inside the very first write
        if held:
            raise ConfigError(
                f"{run.path} already holds {', '.join(held[:3])}{', …' if len(held) > 3 else ''}; two runs in one "
                "directory cannot be told apart. Continue that run with --resume, start it over with --fresh, or "
                "choose another name."
            )
        plain = json.loads(json.dumps({**config, "versions": dict(versions)}, default=str))
        write(run.path / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())
        return run

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> dict[str, Any]:
        import yaml

        path = self.path / "config.yaml"
        return yaml.safe_load(path.read_text("utf-8")) or {} if path.exists() else {}

    # ------------------------------------------------------------------------------------------------------- metrics

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line. NaN and inf are written as null: they are not JSON."""
        line = json.dumps({"step": step, **{name: number(value) for name, value in metrics.items()}})
        path = self.path / "metrics.jsonl"
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # torn by a kill: the fragment must not swallow this line
                        file.write(b"\n")
                file.write(line.encode() + b"\n")
            path.chmod(0o644)

    def metrics(self) -> list[dict[str, float | None]]:
        """Every line, in the order of writing: {"step": …, name: value or None}. A torn line is ignored."""
        return [entry for _, entry in self._lines() if entry is not None]

    def _lines(self) -> list[tuple[bytes, dict[str, float | None] | None]]:
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        return [(line, parsed(line)) for line in lines if line]

    # ------------------------------------------------------------------------------------------------------ rollouts

    def save_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]], kind: Kind = "train") -> None:
        """One row per turn, named as in COLUMNS; what a row leaves out is null. Prompts may be text or messages."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name in {name for row in rows for name in row} - COLUMNS.keys():
            raise ValueError(f"{name!r} is no column of a rollout file. The columns are {', '.join(COLUMNS)}.")
        table = pa.Table.from_pylist([row_of(step, row) for row in rows], schema=schema())
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write(self._rollouts(step, kind), sink.getvalue().to_pybytes())

    def rollouts(self, step: int, kind: Kind = "train", columns: Sequence[str] | None = None) -> pa.Table:
        import pyarrow.parquet as pq

        path = self._rollouts(step, kind)
        if not path.exists():
            recorded = ", ".join(map(str, self.recorded(kind))) or "none"
            raise ConfigError(f"{path} is not there: step {step} was not recorded. Recorded {kind} steps: {recorded}.")
        return pq.ParquetFile(path).read(columns=None if columns is None else list(columns))

    def recorded(self, kind: Kind = "train") -> list[int]:
        """Steps whose rollouts are on disk, in order."""
        names = (path.stem.removeprefix(f"{PREFIX[kind]}-") for path in (self.path / "rollouts").glob("*.parquet"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _rollouts(self, step: int, kind: Kind) -> Path:
        return self.path / "rollouts" / f"{PREFIX[kind]}-{step}.parquet"

    # -------------------------------------------------------------------------------------------------------- resume

    def rewind(self, step: int) -> int:
        """Set aside what was recorded after `step`, so that it can be redone; how many steps that were.

        Notes stay. Killed half-way, it can be called again: every file is in one place or the other.
        """
        kept: list[bytes] = []
        gone: list[bytes] = []
        steps: set[int] = set()
        for line, entry in self._lines():
            late = entry is None or int(entry["step"] or 0) > step
            (gone if late else kept).append(line)
            if late and entry is not None:
                steps.add(int(entry["step"] or 0))
        files = [(n, self._rollouts(n, kind)) for kind in PREFIX for n in self.recorded(kind) if n > step]
        if not gone and not files:
            return 0
        aside = self.path / "set-aside"
        taken = [int(path.name) for path in aside.glob("*") if path.name.isdecimal()]
        folder = aside / str(max(taken, default=0) + 1)
        if gone:
            write(folder / "metrics.jsonl", b"".join(line + b"\n" for line in gone))
            write(self.path / "metrics.jsonl", b"".join(line + b"\n" for line in kept))
        for _, path in files:
            (folder / "rollouts").mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / "rollouts" / path.name)
        return len(steps | {n for n, _ in files})

    # --------------------------------------------------------------------------------------------------------- notes

    def note(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a small named fact, replacing the one of that name."""
        text = json.dumps({**self.notes(), name: value}, indent=1, ensure_ascii=False)
        write(self.path / "notes.json", text.encode())

    def notes(self) -> dict[str, Any]:
        path = self.path / "notes.json"
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


class Unwritten(Run):
    """A run whose record another process writes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def save_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]], kind: Kind = "train") -> None: ...

    def note(self, name: str, value: Mapping[str, Any]) -> None: ...


def number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def parsed(line: bytes) -> dict[str, float | None] | None:
    """A line of metrics.jsonl, None if it is torn."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None


def row_of(step: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as pyarrow wants it; lone surrogates, which are text in Python but not in UTF-8, become question marks."""
    filled: dict[str, Any] = {"step": step, **row}
    if not isinstance(filled.get("prompt"), str | None):
        filled["prompt"] = json.dumps(list(filled["prompt"]), ensure_ascii=False)
    if filled.get("rewards") is not None:
        filled["rewards"] = list(filled["rewards"].items())
    for name in ("prompt", "reply", "feedback", "hints", "failure"):
        if filled.get(name) is not None:
            filled[name] = filled[name].encode("utf-8", "replace").decode()
    return filled


def stages_of(run: Path) -> list[Run]:
    """The records of a run, in the order of its recipe's stages; of a stage, its own."""
    if (run / "config.yaml").exists():
        return [Run(run)]
    found = {config.parent.name: Run(config.parent) for config in sorted(run.glob("*/config.yaml"))}
    if not found:
        raise ConfigError(f"{run} holds no run: there is no config.yaml in it or in a folder of it.")
    names = [stage["name"] for stage in next(iter(found.values())).config.get("stages", [])]
    return [found[name] for name in dict.fromkeys([*names, *found]) if name in found]


# --------------------------------------------------------------------------------------------------------- checkpoints


CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE = Path("state") / "trainer.pt"
"""Where a checkpoint keeps what only training needs; a directory without it is none."""


def latest(path: Path) -> Path | None:
    """The newest whole checkpoint in a directory of checkpoints."""
    found = saved_in(path)
    return found[max(found)] if found else None


def saved_in(path: Path) -> dict[int, Path]:
    """Step -> checkpoint."""
    if not path.is_dir():
        return {}
    named = ((CHECKPOINT.fullmatch(entry.name), entry) for entry in path.iterdir())
    return {int(match[1]): entry for match, entry in named if match and (entry / STATE).exists()}


def last_checkpoint(runs: Sequence[Run]) -> Path | None:
    """Of the last stage that has one."""
    ends = [end for run in runs if (end := latest(run.checkpoints_dir)) is not None]
    return ends[-1] if ends else None
