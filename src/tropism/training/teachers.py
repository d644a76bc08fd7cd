"""Opens what a method's teacher is made of: copies of the student, other models, and the checks that they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tropism.config import Model, Stage
from tropism.errors import ConfigError
from tropism.signals.contexts import PLAYED, Opening
from tropism.signals.frozen import Forward
from tropism.signals.teacher import Tutor
from tropism.teacher import Teacher, teacher_of
from tropism.training.checkpoint import State
from tropism.training.collate import rows_of
from tropism.training.lora import follower_of
from tropism.training.model import PRESETS, Policy, load_policy
from tropism.types import Rollout, Source

SELF = ("live", "frozen", "ema", "synced")
LOOKED_AT = 256
"""Tasks whose columns and domains are looked at before a run starts."""


def open_tutor(stage: Stage, model: Model, policy: Policy, source: Source | None) -> Tutor | None:
    """The teacher of a stage's method, ready to measure.

    Args:
        model: how `policy` was loaded; other models compute on the same device and in the same precision.
        source: where the tasks come from; None offline.
    """
    teacher = teacher_of(stage.method)
    if teacher is None:
        return None
    check(teacher, stage, source)
    temperature = stage.sampling.temperature if stage.env else 1.0
    student = policy.measuring(temperature, stage.train)
    models: dict[str, Forward] = {"": student}
    follower, room = None, policy.context
    if teacher.who in SELF:
        if teacher.who != "live":
            follower = follower_of(policy.module)
            models[""] = policy.measuring(temperature, stage.train, follower)
    else:
        paths = {"": teacher.who} if isinstance(teacher.who, str) else teacher.who
        others = {path: load_other(path, model, policy) for path in dict.fromkeys(paths.values())}
        models = {domain: others[path].measuring(temperature, stage.train) for domain, path in paths.items()}
        room = min(room, *(other.context for other in others.values()))
    return Tutor(
        teacher=teacher,
        student=student,
        models=models,
        words=policy.words,
        room=room,
        vocabulary=int(policy.module.config.vocab_size),
        copy=follower,
        proximal="proximal_topk_logp" in stage.method.needs.measured,
    )


def load_other(path: str, model: Model, policy: Policy) -> Policy:
    """Another model that speaks in the student's tokens: a teacher, or what a reward is measured from."""
    if path in PRESETS:
        raise ConfigError(
            f"{path} is a preset, so its weights would be random and it would know nothing that is worth teaching. "
            "Name a trained model; teacher.who: frozen is the student as it started."
        )
    try:
        other = load_policy(Model(path=path, device=str(policy.device), compute=model.compute))
    except ConfigError as error:
        raise ConfigError(
            f"{path!r} is to score the student's tokens, but cannot be opened: {error} Give the directory or hub id of "
            f"a model. The student itself is {', '.join(SELF)}: as teacher.who, not as one of several."
        ) from error
    mine, theirs = policy.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if mine != theirs:
        odd = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
        raise ConfigError(
            f"{path} has another tokenizer than the student ({len(theirs)} tokens against {len(mine)}; "
            f"{odd!r}, for one, is not the same token), so it cannot score the student's tokens. Use a model of the "
            "same family."
        )
    sizes = [int(p.module.config.vocab_size) for p in (policy, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{path} gives {sizes[1]} numbers for each token and the student {sizes[0]}: one of them is "
            "padded. Resize its embeddings, so that both distributions are over the same tokens."
        )
    return other


def check(teacher: Teacher, stage: Stage, source: Source | None) -> None:
    """Say before the run starts what the teacher would miss in every step of it."""
    if teacher.who == "live" and not teacher.reads:
        raise ConfigError(
            "the teacher is the student itself, and reads no more than the student: the two always agree, and nothing "
            "would be learned. Set teacher.who to the path of a model, or say what it reads."
        )
    if {"sibling", "wrong_sibling"} & {*teacher.reads, *teacher.against}:
        if stage.env is not None and stage.sampling.group_size < 2:
            raise ConfigError("the teacher reads a sibling, but sampling.group_size is 1. Use 2 or more.")
        if stage.success is None:
            raise ConfigError(
                "the teacher reads a sibling that succeeded, but the recipe does not say what a success is. Add "
                "success: {part: NAME, at_least: 1}."
            )
    if "hint" in (*teacher.reads, *teacher.against) and stage.judge is None:
        raise ConfigError(
            f"the teacher reads a hint, but stage {stage.name!r} has no judge to give one. Add judge: {{who: …}}; it "
            "needs an env."
        )
    if source is None:
        return
    tasks = [source.task(number) for number in range(LOOKED_AT)]
    for name in (*teacher.reads, *teacher.against):
        lacking = [] if name in PLAYED else [task for task in tasks if name not in task.columns]
        if lacking and (teacher.need == "all" or len(lacking) == len(tasks)):
            raise ConfigError(
                f"the teacher reads the column {name!r}, but {len(lacking)} of {len(tasks)} tasks of "
                f"{tasks[0].env} lack it; they have {', '.join(lacking[0].columns) or 'none'}."
            )
    if isinstance(teacher.who, Mapping):
        for domain in dict.fromkeys(task.domain for task in tasks):
            if domain not in teacher.who:
                raise ConfigError(
                    f"a task has the domain {domain!r}, but teacher.who knows {', '.join(teacher.who)}. Name a teacher "
                    "for every domain."
                )


def openings(rollouts: Sequence[Rollout], *, apart: bool) -> list[Opening]:
    """Where each row of `collate` begins, for a teacher."""
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for rollout in rollouts:
        if rollout.failure is None:
            groups.setdefault((rollout.group, rollout.task.seat), []).append(rollout)
    found = ((row, rollouts[row.episode]) for row in rows_of(rollouts, apart=apart))
    return [Opening(of, row.spans[0][1], groups[of.group, of.task.seat]) for row, of in found]


def heard(state: State, taught: Mapping[str, float], patience: int, say: Callable[[str], None]) -> None:
    """Say so when a teacher has been silent for `patience` steps: the run is then another method than its name says.

    Args:
        taught: how it fared, and `teacher/used` of a method that may leave out what it said.
    """
    used = min(taught["teacher/share"], taught.get("teacher/used", 1.0))
    state.untaught = 0 if used else state.untaught + 1
    if state.untaught and state.untaught % patience == 0:
        why = {
            "teacher/share": "of no group did it speak of every reply, so the method used none of it",
            "teacher/not_finite": "its numbers are not finite",
            "teacher/too_long": "what it would read leaves no room for the reply, even cut",
        }
        found = next((text for name, text in why.items() if taught[name]), "there was nothing for it to read")
        say(f"step {state.step + 1}: the teacher has been silent for {state.untaught} steps; {found}")
