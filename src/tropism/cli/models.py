"""eval, sample: commands about a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, a preset or a hub id.", show_default=False)
]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the environment.")
]


def evaluate(
    model: Model,
    env: Annotated[str, typer.Option(metavar="NAME", help="An environment, or file.py:Class.", show_default=False)],
    option: Options = None,
    tasks: Annotated[int, typer.Option("--games", "--tasks", min=1)] = 1000,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 256,
    seed: int = 0,
    device: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Play held-out tasks and report the mean of every part of the score."""
    from tropism import api
    from tropism.recipe import assignments

    found = api.evaluate(
        model,
        env,
        dict(assignments(option or [])),
        tasks=tasks,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        device=device,
    )
    if as_json:
        print(json.dumps(dict(found)))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def sample(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    n: Annotated[int, typer.Option("-n", min=1, help="How many replies.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 256,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Print what a model replies to a prompt."""
    from tropism import api
    from tropism.view.words import visible

    replies = api.sample(model, prompt, n=n, temperature=temperature, max_tokens=max_tokens, seed=seed, device=device)
    for number, reply in enumerate(map(visible, replies), 1):
        print(f"[{number}] {reply}" if n > 1 else reply)
