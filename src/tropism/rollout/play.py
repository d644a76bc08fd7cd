"""Episodes in lock step: ask all that are alive, one generate, tell all.

A broken environment or a prompt that does not fit is data: its rollouts carry a `Failure` and are never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from tropism.errors import TropismError
from tropism.types import Env, Failure, Prompt, Rollout, Sampler, SamplingParams, Source, Stop, Task, Turn, seed_of


class Words(Protocol):
    """What `play` asks of a renderer: words to tokens and back."""

    def context(self, prompt: Prompt, before: Turn | None = None) -> list[int]: ...

    def reply(self, action: Sequence[int]) -> str: ...


@dataclass
class Seat:
    """One side of an episode while it is played."""

    turns: list[Turn] = field(default_factory=list)
    score: dict[str, float] = field(default_factory=dict)
    """The part of the environment's score that its turns have been given."""


class Episode:
    """One environment, the turns of each seat, and what each turn earned."""

    def __init__(self, task: Task, group: int, sibling: int, source: Source) -> None:
        self.task, self.group, self.sibling = task, group, sibling
        self.seats: dict[int, Seat] = {}
        self.failure: Failure | None = None
        self.env: Env | None = None
        self.asked: tuple[int, Prompt] | None = None
        with self.guarded():
            self.env = source.open(task, sibling)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An exception of somebody else's environment is this episode's failure, not the run's."""
        try:
            yield
        except TropismError:
            raise
        except Exception as error:
            self.failure = Failure("play", f"the environment raised {type(error).__name__}: {error}")

    def ask(self, words: Words) -> list[int] | None:
        """The token prompt to answer next; None when the episode is over."""
        with self.guarded():
            ask = None if self.failure or self.env is None else self.env.ask()
            if ask is not None:
                turns = self.seats.setdefault(ask.seat, Seat()).turns
                self.asked = (ask.seat, ask.prompt)
                return words.context(ask.prompt, turns[-1] if turns else None)
        return None

    def tell(self, turn: Turn | Failure, words: Words) -> None:
        if isinstance(turn, Failure):
            self.failure = turn
            return
        assert self.asked is not None and self.env is not None
        number, prompt = self.asked
        turn, turns = replace(turn, prompt=prompt, reply=words.reply(turn.action)), self.seats[number].turns
        turns.append(turn)  # first, so that the record shows the reply that broke the environment
        with self.guarded():
            self.env.tell(turn.reply)
            turns[-1] = replace(turn, feedback=self.env.feedback(number))
            self.settle()

    def settle(self) -> None:
        """Give each seat's change of score to its latest turn, or to its first one if it has not spoken yet."""
        assert self.env is not None
        for number, seat in self.seats.items():
            if seat.turns:
                now = dict(self.env.score(number))
                change = {name: value - seat.score.get(name, 0.0) for name, value in now.items()}
                seat.score, last = now, seat.turns[-1]
                seat.turns[-1] = replace(last, earned=added(last.earned, change))

    def rollouts(self, version: int, cut: bool) -> list[Rollout]:
        """One rollout per seat that spoke, or that failed."""
        made = []
        for number, seat in self.seats.items() or [(self.task.seat, Seat())]:
            turns = seat.turns
            if cut and turns:
                turns = [*turns[:-1], replace(turns[-1], stop=Stop.truncated)]
            if turns or self.failure:
                task = replace(self.task, seat=number)
                made.append(
                    Rollout(
                        task=task,
                        group=self.group,
                        sibling=self.sibling,
                        turns=tuple(turns),
                        failure=self.failure,
                        version=version,
                    )
                )
        return made


def added(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sum of named numbers; a name that sums to 0 is left out."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return {name: value for name, value in total.items() if value != 0}


def play(
    tasks: Sequence[tuple[Task, int, int]],
    source: Source,
    sampler: Sampler,
    words: Words,
    params: SamplingParams,
    *,
    max_turns: int,
    version: int = 0,
    places: Sequence[int] | None = None,
) -> list[Rollout]:
    """Play every (task, group, sibling) to its end, or to `max_turns` replies.

    Args:
        places: number of each among all that are played in this step, where others are played elsewhere.

    Returns:
        One rollout per seat that spoke or failed, in the order of `tasks`; not scored yet.
    """
    episodes = [Episode(task, group, sibling, source) for task, group, sibling in tasks]
    number = {id(episode): n for episode, n in zip(episodes, places or range(len(episodes)), strict=True)}
    live, asked = episodes, 0
    while live and asked < max_turns:
        prompts = [(episode, episode.ask(words)) for episode in live]
        waiting = [(episode, prompt) for episode, prompt in prompts if prompt is not None]
        live = [episode for episode, _ in waiting]
        if live:
            seeded = replace(params, seed=seed_of(params.seed, asked), places=[number[id(e)] for e in live])
            for episode, turn in zip(live, sampler([prompt for _, prompt in waiting], seeded), strict=True):
                episode.tell(turn, words)
        asked += 1
    unfinished = {id(episode) for episode in live if episode.ask(words) is not None}
    return [rollout for e in episodes for rollout in e.rollouts(version, id(e) in unfinished)]
