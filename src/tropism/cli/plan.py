"""plan: what a recipe will take, before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from tropism.cli.runs import RecipeName, Settings

if TYPE_CHECKING:
    from tropism.training.plan import Plan

ADVICE = (
    "lower train.micro_tokens or sampling.groups, set model.gradient_checkpointing, or train an adapter (model.lora)"
)


def plan(
    recipe: RecipeName,
    settings: Settings = None,
    hardware: Annotated[
        str, typer.Option(metavar="NAME", help="here, which is measured, or a data sheet: h100, say.")
    ] = "here",
) -> None:
    """Say what time and memory a recipe will take, what the bottleneck is and whether it fits; trains nothing."""
    from tropism import api
    from tropism.recipe import load

    for found in api.plan(load(recipe, settings or []), hardware):
        print("\n".join(lines(found)), flush=True)


def lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.stage}: {plan.steps} steps; {plan.work.assumed}"
    tokens = {"drawing": plan.work.drawn, "learning": plan.work.learned, "measuring": plan.work.measured}
    for name, seconds in sorted(plan.seconds.items(), key=lambda item: -item[1]):
        count = f"{tokens[name]:>9,} tokens at {tokens[name] / seconds:>9,.0f} a second" if name in tokens else ""
        yield f"  {name:<12}{seconds:>9.3f} s  {count}".rstrip()
    share = plan.seconds[plan.bottleneck] / plan.step
    yield f"  a step{plan.step:>15.3f} s  {plan.bottleneck} takes {share:.0%} of it"
    yield f"  the stage   {spell(plan.steps * plan.step):>9}    without evaluations and checkpoints"
    for name, size in sorted(plan.memory.items(), key=lambda item: -item[1]):
        if size:
            yield f"  {name:<24}{size / 1e9:>7.2f} GB"
    verdict = "fits" if plan.peak <= plan.room else f"does not fit: {ADVICE}"
    yield f"  at its peak{plan.peak / 1e9:>20.2f} GB of {plan.room / 1e9:.0f}, drawing or learning: {verdict}"
    yield from (f"  {note}" for note in plan.notes)


def spell(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for name, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
