"""label: a person says which of two replies is better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from tropism.errors import ConfigError, TropismError

AT_ONCE = 64
"""Pairs that a judge is asked about between two writes."""


def label(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or one of its stages.", show_default=False)],
    out: Annotated[str, typer.Option(metavar="FILE", help="For preferences. Default: RUN/preferences.jsonl.")] = "",
    held_out: Annotated[bool, typer.Option("--eval", help="Rollouts of evaluations instead of training.")] = False,
    judge: Annotated[str, typer.Option(metavar="WHO", help="file.py:function, a model, or a server's URL.")] = "",
    judge_model: Annotated[str, typer.Option(metavar="NAME", help="Which of a server's models.")] = "",
    seed: int = 0,
) -> None:
    """Compare pairs of a run's replies in the terminal, or let a judge do it; writes preferences in TRL's columns."""
    from tropism.record import stages_of
    from tropism.view.pairs import Labels, pairs_of

    stage = stages_of(Path(run))[-1]
    pairs = pairs_of(stage, kind="eval" if held_out else "train", seed=seed)
    labels = Labels(pairs, Path(out) if out else Path(run) / "preferences.jsonl")
    if judge:
        judged(labels, judge, judge_model, seed)
    else:
        screen(labels).run()
    left = f", {len(pairs) - labels.done} pairs left" if labels.next else ""
    print(f"{labels.done} of {len(pairs)} pairs seen{left}; preferences in {labels.path}")


def judged(labels: Any, who: str, model: str, seed: int) -> None:
    """Ask a judge about every pair that nothing was said about, in either order; what it fails at stays open."""
    from tropism.config import Judge
    from tropism.signals.compare import verdicts
    from tropism.training.judges import open_comparer
    from tropism.types import Failure

    waiting = [pair for name, pair in labels.pairs.items() if name not in labels.told]
    ask = open_comparer(Judge(who=who, model=model, temperature=0.0))
    failed: list[Failure] = []
    for start in range(0, len(waiting), AT_ONCE):
        some = waiting[start : start + AT_ONCE]
        found = verdicts([(words_of(pair.prompt), pair.left, pair.right) for pair in some], ask, seed + start)
        for pair, verdict in zip(some, found, strict=True):
            if isinstance(verdict, Failure):
                failed.append(verdict)
            else:
                labels.say(pair, verdict)
    if failed:
        print(f"{len(failed)} of {len(waiting)} pairs could not be judged, and stay open: {failed[0].reason}")
    if waiting and len(failed) == len(waiting):
        raise TropismError(f"the judge {who} gave no verdict at all.")


def words_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def screen(labels: Any) -> Any:
    """The textual app over `Labels`."""
    try:
        from textual.app import App, ComposeResult
        from textual.containers import Horizontal, VerticalScroll
        from textual.widgets import Footer, ProgressBar, Static
    except ImportError as error:
        raise ConfigError(f"label needs the package textual: pip install 'tropism[label]' ({error}).") from error
    from tropism.view.words import visible

    class Compare(App[None]):
        TITLE = "tropism label"
        CSS = """
        #prompt { height: auto; max-height: 30%; padding: 1 2; color: $text-muted; }
        VerticalScroll { width: 1fr; border: round $primary; padding: 0 1; }
        ProgressBar { padding: 0 2; }
        """
        BINDINGS: ClassVar[Any] = [
            ("left,1", "say('left')", "left is better"),
            ("right,2", "say('right')", "right is better"),
            ("t", "say('tie')", "neither"),
            ("s", "say('skip')", "skip"),
            ("u", "undo", "undo"),
            ("q", "quit", "quit"),
        ]

        def compose(self) -> ComposeResult:
            yield ProgressBar(total=len(labels.pairs), show_eta=False)
            yield Static(id="prompt", markup=False)
            with Horizontal():
                for side in ("left", "right"):
                    with VerticalScroll() as box:
                        box.border_title = side
                        yield Static(id=side, markup=False)
            yield Footer()

        def on_mount(self) -> None:
            self.show()

        def show(self) -> None:
            """The next pair; when there is none left, the end."""
            self.query_one(ProgressBar).update(progress=labels.done)
            self.pair = labels.next
            if self.pair is None:
                self.exit()
                return
            for name, words in (
                ("prompt", words_of(self.pair.prompt)),
                ("left", self.pair.left),
                ("right", self.pair.right),
            ):
                self.query_one(f"#{name}", Static).update(visible(words))

        def action_say(self, answer: str) -> None:
            if self.pair is not None:
                labels.say(self.pair, answer)
                self.show()

        def action_undo(self) -> None:
            labels.undo()
            self.show()

    return Compare()
