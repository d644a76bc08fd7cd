"""train, doctor, view: commands about a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tropism.errors import ConfigError

Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", show_default=False)]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE_OR_METHOD", show_default=False)]


def train(
    recipe: RecipeName,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe with every setting, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; an earlier run of this name is moved aside.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress: only the paths of model and report.")] = False,
) -> None:
    """Train a model by a recipe file, or by a method: tropism train grpo env=tictactoe train.steps=20"""
    from tropism.recipe import load, text

    if resume and fresh:
        raise ConfigError("--resume continues a run and --fresh starts it over. Give one of them.")
    resolved = load(recipe, settings or [])
    if dry_run:
        print(text(resolved), end="")
        return
    from tropism import api

    try:
        result = api.train(resolved, resume=resume, fresh=fresh, quiet=quiet)
    except KeyboardInterrupt:
        print("tropism: interrupted. Continue with --resume.", file=sys.stderr)
        raise
    if quiet:
        print(result)


def doctor(recipe: RecipeName, settings: Settings = None) -> None:
    """Make the checks that every run starts with, and train nothing."""
    from tropism.recipe import load

    resolved = load(recipe, settings or [])
    from rich.console import Console

    from tropism import api
    from tropism.view.progress import Progress

    api.doctor(resolved, Progress(console=Console(highlight=False)))  # standard output: these lines are the result


def view(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder under runs/.", show_default=False)],
) -> None:
    """Write a run's report.html again, from its record, and print its path."""
    from tropism import api

    print(api.report(run))
