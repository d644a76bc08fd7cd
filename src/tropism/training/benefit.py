"""Can a self-teacher use what it reads? The same turns answered again, with nothing, the right thing and the wrong one.

A model that cannot read its hint gives a teacher whose numbers are noise, and no loss says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tropism.errors import CheckFailed
from tropism.rollout.play import play
from tropism.signals.contexts import Opening, available, chosen, contexts_of, opposite
from tropism.teacher import teacher_of
from tropism.training.checkpoint import State
from tropism.training.learn import Job, Playing
from tropism.training.scoring import parts_of
from tropism.training.teachers import SELF, openings
from tropism.types import Env, SamplingParams, Task, Turn, seed_of

TASKS = 48
"""Tasks that are looked at, each with all its siblings."""


def check(job: Job, *, trained: bool = True) -> str | None:
    """A line for the doctor, None where there is nothing to check.

    Args:
        trained: the model is the one that the stage will start from; another one's answers say nothing.

    Raises:
        CheckFailed: the right hint adds less than `teacher.must_add` to the share of successes.
    """
    teacher, playing = teacher_of(job.stage.method), job.draw
    if teacher is None or teacher.who not in SELF or not teacher.reads or not isinstance(playing, Playing):
        return None
    if job.stage.success is None or job.stage.success.part not in parts_of(playing.source):
        return "teacher: the environment does not say what a success is, so nobody can say whether its hints help"
    if not trained:
        return "teacher: whether its hints help is asked when the stage starts, of the model that it starts from"
    shares = successes(job, playing)
    if shares is None:
        return "teacher: found nothing to read among the probe rollouts, so its hints are not checked"
    told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != "of")
    gain = shares["right hint"] - shares["no hint"]
    if gain < teacher.must_add:
        raise CheckFailed(
            f"the teacher cannot use what it reads: of {shares['of']:.0f} turns answered again, the share of successes "
            f"is: {told}. The right hint adds {100 * gain:.0f} points, less than {100 * teacher.must_add:.0f}. Teach "
            "the model to read it first (data.told), or set teacher.must_add lower if that is what you want to see."
        )
    return f"teacher: {told} ({shares['of']:.0f} turns answered again)"


def successes(job: Job, playing: Playing) -> dict[str, float] | None:
    """Share of successes when one turn of a rollout is answered again after each prompt, and the rest as usual."""
    teacher = teacher_of(job.stage.method)
    assert teacher is not None
    rollouts = playing.score(playing.play(State(step=-3), TASKS, 0))
    room = job.policy.context - job.stage.sampling.max_tokens
    ways: dict[str, list[Sequence[int]]] = {"no hint": [], "right hint": []}
    if teacher.against:
        ways["wrong hint"] = []
    asked: list[Opening] = []
    seen: set[int] = set()
    for opening in openings(rollouts, apart=True):
        found = available(opening, [*teacher.reads, *teacher.against])
        read = chosen(teacher, found)
        if read is None or id(opening.rollout) in seen:
            continue
        texts: dict[str, Mapping[str, Sequence[str]] | None] = {"right hint": read}
        if teacher.against:
            texts["wrong hint"] = opposite(teacher, read, found)
        made = {
            name: text and contexts_of(teacher, opening, text, job.policy.words, room) for name, text in texts.items()
        }
        if all(made.values()):
            seen.add(id(opening.rollout))
            asked.append(opening)
            ways["no hint"].append(opening.rollout.turns[opening.turn].context)
            for name, contexts in made.items():
                ways[name].append(contexts[0].ids if contexts else ())
    if not asked:
        return None
    return {name: answered(job, playing, asked, contexts) for name, contexts in ways.items()} | {
        "of": float(len(asked))
    }


def answered(job: Job, playing: Playing, asked: Sequence[Opening], contexts: Sequence[Sequence[int]]) -> float:
    """Share of successes with these contexts in the places of the turns' own."""
    sampling, success, policy = job.stage.sampling, job.stage.success, job.policy
    assert success is not None
    params = SamplingParams(
        temperature=sampling.temperature, max_tokens=sampling.max_tokens, seed=seed_of(job.seed, "benefit")
    )
    turns = policy.sampler(contexts, params)
    replies = [policy.words.reply(turn.action) for turn in turns if isinstance(turn, Turn)]
    assert len(replies) == len(turns)  # every context leaves room for a reply
    again = Again(asked, playing.source.open, replies)
    tasks = [(opening.rollout.task, 0, n) for n, opening in enumerate(asked)]
    params = replace(params, seed=seed_of(job.seed, "benefit", "rest"))
    play(tasks, again, policy.sampler, policy.words, params, max_turns=sampling.max_turns)
    parts = [env.score(opening.rollout.task.seat) for env, opening in zip(again.envs, asked, strict=True)]
    return sum(part.get(success.part, 0.0) >= success.at_least for part in parts) / len(parts)


class Again:
    """A source whose episode n stands where rollout n stood after its turn was answered anew."""

    def __init__(self, asked: Sequence[Opening], opened: Callable[[Task, int], Env], replies: Sequence[str]) -> None:
        self.asked, self.opened, self.replies = asked, opened, replies
        self.envs: list[Env] = []

    def task(self, number: int) -> Task:
        return self.asked[number].rollout.task

    def open(self, task: Task, sibling: int) -> Any:
        opening = self.asked[sibling]
        env = self.opened(task, opening.rollout.sibling)
        for reply in [*(turn.reply for turn in opening.rollout.turns[: opening.turn]), self.replies[sibling]]:
            if env.ask() is not None:
                env.tell(reply)
        self.envs.append(env)
        return env
