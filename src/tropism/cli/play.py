"""play: a person against a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from tropism.cli.models import Model, Options
from tropism.errors import ConfigError
from tropism.view.words import visible


def play(
    model: Model,
    env: Annotated[str, typer.Option(metavar="NAME", help="A game, or file.py:Class.", show_default=False)],
    option: Options = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    seed: int = 0,
) -> None:
    """Play against a model. Who begins changes with every game; an empty line ends."""
    from tropism.envs import find_class, options_of
    from tropism.recipe import assignments
    from tropism.types import Task, seed_of

    game = find_class(env)
    if "opponent" not in options_of(game):
        raise ConfigError(f"{env} has no opponent whose place a person could take. Use tictactoe, or play by eval.")
    options = dict(assignments(option or []))
    from tropism import api

    chat = api.Chat(model, temperature=temperature, seed=seed)
    number = 0
    try:
        while True:
            seat = 1 - number % 2  # the person begins the first game
            print(f"\nGame {number + 1}: you are {'second' if seat == 0 else 'first'}.")
            task = Task(env=env, seed=seed_of(seed, "play", number), seat=seat)
            table = game(task, 0, **{**options, "opponent": person})
            while (ask := table.ask()) is not None:
                reply = chat.reply(ask.prompt)
                print(f"\nmodel: {visible(reply)}")
                table.tell(reply)
            print(f"\n{table}\n\n{visible(verdict(table.score(1 - seat), table.feedback(seat)))}")
            number += 1
    except (Leave, EOFError):
        print("\nGoodbye.")


class Leave(Exception):
    """The person has had enough."""


def person(board: str, moves: Sequence[str]) -> str:
    """Ask until the answer is a legal move."""
    print(f"\n{board}\n")
    while True:
        move = input(f"your move ({' '.join(moves)}): ").strip()
        if not move:
            raise Leave
        if move in moves:
            return move
        print(f"{move!r} is not one of {' '.join(moves)}.")


def verdict(score: Mapping[str, float], remark: str | None) -> str:
    """Who won, and what could be said about the model's last reply."""
    result = next((word for part, word in WORDS.items() if score.get(part)), f"score: {score}")
    return result + (f"  (the model: {remark})" if remark else "")


WORDS = {"win": "You win.", "loss": "You lose.", "draw": "A draw."}
