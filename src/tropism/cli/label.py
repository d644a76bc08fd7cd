"""label: a person says which of two replies is better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from tropism.errors import ConfigError


def label(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or one of its stages.", show_default=False)],
    out: Annotated[str, typer.Option(metavar="FILE", help="For preferences. Default: RUN/preferences.jsonl.")] = "",
    held_out: Annotated[bool, typer.Option("--eval", help="Rollouts of evaluations instead of training.")] = False,
    seed: int = 0,
) -> None:
    """Compare pairs of a run's replies in the terminal; writes preferences in TRL's columns."""
    from tropism.record import stages_of
    from tropism.view.pairs import Labels, pairs_of

    stage = stages_of(Path(run))[-1]
    pairs = pairs_of(stage, kind="eval" if held_out else "train", seed=seed)
    labels = Labels(pairs, Path(out) if out else Path(run) / "preferences.jsonl")
    screen(labels).run()
    left = f", {len(pairs) - labels.done} pairs left" if labels.next else ""
    print(f"{labels.done} of {len(pairs)} pairs seen{left}; preferences in {labels.path}")


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
            asked = self.pair.prompt
            text = asked if isinstance(asked, str) else "\n".join(f"{m['role']}: {m['content']}" for m in asked)
            for name, words in (("prompt", text), ("left", self.pair.left), ("right", self.pair.right)):
                self.query_one(f"#{name}", Static).update(visible(words))

        def action_say(self, answer: str) -> None:
            if self.pair is not None:
                labels.say(self.pair, answer)
                self.show()

        def action_undo(self) -> None:
            labels.undo()
            self.show()

    return Compare()
