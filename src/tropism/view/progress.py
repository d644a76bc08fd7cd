"""How a run goes, while it goes: a live display on a terminal, a line now and then anywhere else.

It writes to standard error, so that standard output stays for results. Text of the model is never read as markup, and
its control characters never reach the terminal.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tropism.view.words import news, visible

if TYPE_CHECKING:
    from tropism.types import Rollout

NUMBERS = {"reward": "reward", "success": "success", "rewards/illegal/mean": "illegal", "learning_rate": "lr"}
"""Metrics that are always worth a glance: name -> label. Held-out ones are all shown."""
SHARES = {"success", "illegal"}
SAMPLE_SECONDS = 4.0
WINDOW = 10
"""Steps over which tokens per second are taken."""
LONGEST = 900
"""Characters of one message in the sample; the record holds the whole of it."""


class Progress:
    """A Watcher for people. Use it with `with`, so that the terminal is given back whatever happens."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None, every: float = 10.0) -> None:
        """`every`: seconds between lines where there is no terminal, or NO_COLOR or `quiet` ask for lines."""
        self.console = console or Console(stderr=True, highlight=False)
        usable = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live: Live | None = None
        self.plain = quiet or not usable or bool(os.environ.get("NO_COLOR"))
        self.every = every
        self.stage, self.steps, self.done, self.now = "", 0, 0, 0
        self.metrics: dict[str, float] = {}
        self.sample: RenderableType | None = None
        self.started = self.sampled = self.printed = 0.0
        self.tokens: deque[tuple[float, float]] = deque(maxlen=WINDOW + 1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------- the Watcher

    def say(self, text: str, mark: tuple[int, int] = (0, 0)) -> None:
        line = Text(visible(text))
        line.stylize("bold green", *mark)
        self.console.print(line, soft_wrap=True)

    def begin(self, stage: str, steps: int, done: int) -> None:
        self.close()
        self.stage, self.steps, self.done, self.now = stage, steps, done, done
        self.metrics, self.sample = {}, None
        self.started, self.sampled, self.printed = time.monotonic(), 0.0, 0.0
        self.tokens.clear()
        if self.plain:
            self.say(f"{stage}: {steps} steps" + (f", {done} of them done before" if done else ""))
        else:
            self.live = Live(self, console=self.console, refresh_per_second=4)
            self.live.start()

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Sequence[Rollout]) -> None:
        now = time.monotonic()
        self.now = max(self.now, step)
        self.metrics = {**self.metrics, **metrics}  # a new dict: the display's thread may be reading the old one
        if "num_tokens" in metrics:
            self.tokens.append((now, metrics["num_tokens"]))
        if self.plain:
            if now - self.printed >= self.every or self.now == self.steps:
                self.printed = now
                self.say(self.line())
        elif rollouts and (now - self.sampled >= SAMPLE_SECONDS or self.now == self.steps):
            self.sampled, self.sample = now, sample(step, rollouts)

    def end(self, stage: str) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------- drawing

    def close(self) -> None:
        """Leave the last picture on the terminal and give the terminal back."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def times(self) -> str:
        spent = time.monotonic() - self.started
        played, left = self.now - self.done, self.steps - self.now
        if played <= 0:
            return clock(spent)
        return f"{clock(spent)} · {clock(spent / played * left)} left" if left > 0 else clock(spent)

    def numbers(self) -> list[tuple[str, str]]:
        """(label, value) of what is worth a glance now."""
        found = [(label, self.metrics[name]) for name, label in NUMBERS.items() if name in self.metrics]
        if "reward" not in self.metrics and "loss" in self.metrics:
            found.insert(0, ("loss", self.metrics["loss"]))
        if self.metrics.get("failures"):
            found.append(("failures", self.metrics["failures"]))
        if len(self.tokens) > 1 and self.tokens[-1][0] > self.tokens[0][0]:
            (start, few), (stop, many) = self.tokens[0], self.tokens[-1]
            found.append(("tokens/s", (many - few) / (stop - start)))
        return [(label, f"{value:.1%}" if label in SHARES else short(value)) for label, value in found]

    def held_out(self) -> list[tuple[str, str]]:
        return [(name, short(value)) for name, value in self.metrics.items() if name.startswith("eval/")]

    def line(self) -> str:
        facts = [f"{label} {value}" for label, value in (*self.numbers(), *self.held_out())]
        return "  ".join([f"{self.stage} {self.now}/{self.steps}", self.times(), *facts])

    def __rich__(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self.steps, 1), completed=self.now, width=36)
        head.add_row(Text(self.stage, "bold"), bar, Text(f"{self.now}/{self.steps}"), Text(self.times(), "dim"))
        rows: list[RenderableType] = [head]
        for facts in (self.numbers(), self.held_out()):
            if facts:
                rows.append(Text("   ").join(Text.assemble((f"{label} ", "dim"), value) for label, value in facts))
        if self.sample is not None:
            rows.append(self.sample)
        return Group(*rows)


def sample(step: int, rollouts: Sequence[Rollout]) -> RenderableType:
    """The latest rollout that could be scored, or the latest failure, turn by turn."""
    rollout = next((r for r in reversed(rollouts) if r.failure is None and r.turns), rollouts[-1])
    rows = [{"prompt": recorded(turn.prompt), "reply": turn.reply} for turn in rollout.turns]
    turns = []
    for turn, seen in zip(rollout.turns, news(rows), strict=True):
        said = [Text(clip(message["content"]), "dim") for message in seen]
        turns.append(Text("\n").join([*said, Text(clip(turn.reply), "cyan")]))
    parts = "".join(f" · {name} {value:+.3g}" for name, value in rollout.rewards.items())
    title = f"{rollout.task.env or 'rollout'}, step {step} · reward {rollout.reward:+.3g}{parts}"
    if rollout.failure is not None:
        title = f"{rollout.task.env or 'rollout'}, step {step} · failed in {rollout.failure.where}"
        turns.append(Text(clip(rollout.failure.reason), "red"))
    return Panel(Columns(turns, padding=(0, 3)), title=Text(visible(title)), title_align="left", border_style="dim")


def recorded(prompt: Any) -> str:
    """A prompt as the record keeps it."""
    return prompt if isinstance(prompt, str) else json.dumps(list(prompt))


def clip(text: str) -> str:
    text = visible(text).strip("\n")
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def short(value: float) -> str:
    return f"{value / 1000:.1f}k" if abs(value) >= 10_000 else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console | None = None) -> None:
    """Print a table, such as before and after. Every column but the first holds numbers."""
    shown = Table(header_style="bold")
    for place, column in enumerate(columns):
        shown.add_column(Text(visible(column)), justify="right" if place else "left")
    for row in rows:
        shown.add_row(*(Text(visible(cell(value))) for value in row))
    (console or Console(highlight=False)).print(shown)


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
