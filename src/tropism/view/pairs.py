"""Pairs of a run's rollouts for a person to judge, and what the person said: nothing here draws a screen.

What is said goes to a file at once, a line for each pair; beside it stand the preferences in TRL's columns, which are
made anew from it. So a session that ends in any way goes on where it was, and whatever was said last can be taken back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tropism.errors import ConfigError
from tropism.record import Kind, Run, write

Answer = Literal["left", "right", "tie", "skip"]


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt; which of them is on the left was drawn."""

    name: str
    """Which rollouts: step, group and the two siblings."""
    prompt: Any
    left: str
    right: str

    def line(self, answer: Answer) -> dict[str, Any] | None:
        """A row of preferences in TRL's columns; None where nothing is preferred."""
        if answer not in ("left", "right"):
            return None
        chosen, rejected = (self.left, self.right) if answer == "left" else (self.right, self.left)
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected}
        said = [[{"role": "assistant", "content": reply}] for reply in (chosen, rejected)]
        return {"prompt": self.prompt, "chosen": said[0], "rejected": said[1]}


def pairs_of(run: Run, *, kind: Kind = "train", seed: int = 0) -> list[Pair]:
    """Of each task of every recorded step the two replies whose rewards are farthest apart; the same for one seed.

    Raises:
        ConfigError: no two siblings of one turn say different things.
    """
    found: list[Pair] = []
    names = ("group", "sibling", "turn", "prompt", "reply", "total", "failure", "seat")
    for step in run.recorded(kind):
        groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in run.rollouts(step, kind, names).to_pylist():
            if row["failure"] is None and row["reply"]:
                groups.setdefault((row["group"], row["seat"]), []).append(row)
        for (group, seat), rows in groups.items():
            several = {row["sibling"] for row in rows if row["turn"]}
            single = [row for row in rows if row["sibling"] not in several]  # of one turn, so the reply is all there is
            pair = most_different(single)
            if pair is not None:
                sides = list(pair)
                random.Random(f"{seed}/{step}/{group}/{seat}").shuffle(sides)
                name = f"{kind}/{step}/{group}/{seat}/{sides[0]['sibling']}-{sides[1]['sibling']}"
                found.append(Pair(name, prompt_of(sides[0]["prompt"]), sides[0]["reply"], sides[1]["reply"]))
    if not found:
        raise ConfigError(
            f"{run.path} has no two replies of one turn to the same prompt that differ: there is nothing to compare. "
            "Record more (train.record_every), or sample more replies to each task (sampling.group_size)."
        )
    return found


def most_different(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The pair whose rewards are farthest apart; of equal ones the first that differ in words."""
    pairs = [(a, b) for n, a in enumerate(rows) for b in rows[n + 1 :] if a["reply"] != b["reply"]]
    return max(pairs, key=lambda pair: abs((pair[0]["total"] or 0.0) - (pair[1]["total"] or 0.0)), default=None)


def prompt_of(text: str) -> Any:
    """As it was asked: messages are recorded as JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, list) else text


class Labels:
    """What a person has said so far."""

    def __init__(self, pairs: Sequence[Pair], path: Path) -> None:
        """
        Args:
            path: of the preferences, *.jsonl; what was said stands beside it in *.labels.jsonl.
        """
        self.pairs, self.path, self.log = {pair.name: pair for pair in pairs}, path, path.with_suffix(".labels.jsonl")
        self.told: dict[str, dict[str, Any]] = {}
        if self.log.exists():
            for line in self.log.read_text("utf-8").splitlines():
                told = json.loads(line)
                self.told[told["pair"]] = told

    @property
    def said(self) -> dict[str, Answer]:
        """Pair -> answer, in the order in which they were given."""
        return {name: told["answer"] for name, told in self.told.items()}

    @property
    def next(self) -> Pair | None:
        """The first pair that nothing was said about."""
        return next((pair for name, pair in self.pairs.items() if name not in self.told), None)

    @property
    def done(self) -> int:
        return sum(name in self.told for name in self.pairs)

    def say(self, pair: Pair, answer: Answer) -> None:
        self.told[pair.name] = {"pair": pair.name, "answer": answer, "row": pair.line(answer)}
        self._write()

    def undo(self) -> Pair | None:
        """Take back what was said last of these pairs."""
        last = next((name for name in reversed(self.told) if name in self.pairs), None)
        if last is None:
            return None
        del self.told[last]
        self._write()
        return self.pairs[last]

    def _write(self) -> None:
        rows = [told["row"] for told in self.told.values() if told["row"]]
        for path, lines in ((self.log, list(self.told.values())), (self.path, rows)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write(path, text.encode())
