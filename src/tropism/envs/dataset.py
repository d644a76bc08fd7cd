"""A data set of prompts: one question, one reply, and rewards that read the row's other columns."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Mapping
from typing import Any, Literal

from tropism.envs.rows import Row, read_rows, require_column
from tropism.errors import ConfigError
from tropism.types import Ask, Prompt, Task, seed_of

SLOT = re.compile(r"\{(\w+)\}")


class Dataset:
    """A source: every row once per epoch, in an order that the seed and the epoch decide."""

    def __init__(
        self,
        part: Literal["train", "test"],
        seed: int,
        /,
        *,
        path: str,
        split: str = "train",
        prompt: str = "prompt",
        template: str = "",
        system: str = "",
        holdout: float = 0.1,
        test_path: str = "",
        domain: str = "",
    ) -> None:
        """
        Args:
            path: JSONL, Parquet, a Hugging Face directory or hub id.
            split: of the data set at `path`.
            prompt: the column with the prompt: a text, used as it is, or a list of messages.
            template: a text with {column} slots that makes the prompt instead.
            system: a system message before the prompt, which then is a user message (a row's own system message stays).
            holdout: share of prompts that are kept for testing.
            test_path: whose split `test` is tested on instead; it may be `path` itself. What is asked there is left out
                of training.
            domain: a column whose text labels each row, for statistics and teachers by domain.
        """
        if not 0 <= holdout < 1:
            raise ConfigError(f"dataset.holdout is {holdout}, but it is a share of the prompts: use 0 to 1, without 1.")
        self.part, self.prompt, self.template, self.system = part, prompt, template, system
        self.domain = domain
        self.seed = seed if part == "train" else 0  # runs of different seeds are compared on the same test rows
        rows = self._read(path, split)
        if test_path:
            test = self._read(test_path, "test")
            asked = {_key(self._prompt_of(row)) for row in test}
            rows = test if part == "test" else [row for row in rows if _key(self._prompt_of(row)) not in asked]
        else:
            rows = [row for row in rows if (_share(self._prompt_of(row)) < holdout) == (part == "test")]
        if not rows:
            raise ConfigError(
                f"{path} leaves no rows for the {part} split: holdout is {holdout}. Use a larger data set, another "
                "holdout, or name a file of test rows in test_path."
            )
        self.rows = rows
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def task(self, number: int) -> Task:
        epoch, place = divmod(number, len(self.rows))
        index = self.order(epoch)[place]
        domain = str(self.rows[index][self.domain]) if self.domain else ""
        return Task(env="dataset", seed=index, domain=domain, columns=self.rows[index])

    def open(self, task: Task, sibling: int) -> Prompted:
        return Prompted(self._prompt_of(task.columns))

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(seed_of(self.seed, self.part, epoch)).shuffle(order)
        return order

    def _read(self, path: str, split: str) -> list[Row]:
        rows = read_rows(path, split)
        for column in SLOT.findall(self.template) if self.template else [self.prompt]:
            require_column(rows, column, path, "dataset.template" if self.template else "dataset.prompt")
        if self.domain:
            require_column(rows, self.domain, path, "dataset.domain")
        for number, row in enumerate(rows):
            problem = _problem(row[self.prompt]) if not self.template else None
            if problem:
                raise ConfigError(f"row {number} of {path}, column {self.prompt!r}: {problem}")
        return rows

    def _prompt_of(self, row: Mapping[str, Any]) -> Prompt:
        value = SLOT.sub(lambda slot: str(row[slot[1]]), self.template) if self.template else row[self.prompt]
        if isinstance(value, str):
            return (*_message("system", self.system), *_message("user", value)) if self.system else value
        messages = tuple({"role": m["role"], "content": m["content"]} for m in value)
        return messages if messages[0]["role"] == "system" else (*_message("system", self.system), *messages)


class Prompted:
    """One prompt, one reply. Its score is empty: rewards say what a reply is worth."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.heard = False

    def ask(self) -> Ask | None:
        return None if self.heard else Ask(0, self.prompt)

    def tell(self, reply: str) -> None:
        self.heard = True

    def score(self, seat: int) -> Mapping[str, float]:
        return {}

    def feedback(self, seat: int) -> str | None:
        return None


def _message(role: str, content: str) -> tuple[dict[str, str], ...]:
    return ({"role": role, "content": content},) if content else ()


def _problem(value: Any) -> str | None:
    """Why this value cannot be a prompt."""
    if isinstance(value, str):
        return None if value else "the prompt is empty."
    if not isinstance(value, list | tuple) or not value:
        return f"the prompt is {value!r:.80}, but must be a text or a list of messages."
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return f"a message is {message!r:.120}, but must be {{'role': text, 'content': text}}."
    return None


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, ensure_ascii=False)


def _share(prompt: Prompt) -> float:
    """A number in [0, 1) that depends on the prompt alone, so that equal prompts are in one split."""
    return int.from_bytes(hashlib.sha256(_key(prompt).encode()).digest()[:8], "big") / 2.0**64
