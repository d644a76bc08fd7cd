"""A recipe from its first stage to its last: open, check, train, or take up where a killed run left off."""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from tropism import recipe as recipes
from tropism.config import Data, Model, Named, Recipe, Stage
from tropism.envs import open_source
from tropism.envs.rows import read_rows
from tropism.errors import ConfigError, TropismError
from tropism.record import Run, Unwritten, Watcher, latest, saved_in
from tropism.signals.frozen import MEASURED, TAUGHT, Forward
from tropism.signals.judge import Panel
from tropism.signals.reward_model import Ensemble
from tropism.teacher import teacher_of
from tropism.training import checkpoint
from tropism.training.ahead import Ahead
from tropism.training.checkpoint import State
from tropism.training.evaluate import Evaluation
from tropism.training.examine import check_rewards, examine
from tropism.training.fit import Reading, load_rows, sifted, usable
from tropism.training.held_out import HeldOut
from tropism.training.judges import open_judge, open_reward_models, open_scorer, rule_of
from tropism.training.learn import Draw, Job, Playing, learn
from tropism.training.model import Policy, load_policy
from tropism.training.optim import AdamW
from tropism.training.ranks import Ranks
from tropism.training.rates import sized
from tropism.training.remembered import Remembered
from tropism.training.sampled import ROWS, located, sampled_rows, write_rows
from tropism.training.scoring import per_reply, scoring
from tropism.training.seeds import seed_generators
from tropism.training.teachers import load_other, open_tutor
from tropism.types import Rollout, seed_of


@dataclass(frozen=True)
class Result:
    """Where everything is."""

    path: Path
    """The run directory."""
    model: Path
    """The last stage's last checkpoint."""
    best: Path | None
    """Its best one by a held-out metric, if it was evaluated."""
    runs: tuple[Run, ...]
    """One record per stage."""


def run(recipe: Recipe, watcher: Watcher, *, resume: bool = False, fresh: bool = False) -> Result:
    """Every stage in turn; each starts from the model that the one before left.

    Args:
        resume: continue a run of this name; the recipe must be the same.
        fresh: move a run of this name out of the way first.

    Raises:
        ConfigError, CheckFailed, GuardStopped: see errors.py.
    """
    path, ranks = Path(recipe.output) / recipe.name, Ranks()
    resumable = ranks.agree(prepare, path, recipe, watcher, resume, fresh)
    model, runs, trained = recipe.model, [], 0
    ends: dict[str, Model] = {}
    threads = torch.get_num_threads()
    try:
        for stage in recipe.stages:
            if ranks.size == 1:  # what an earlier stage set is not this one's
                torch.set_num_threads(stage.train.threads or threads)
            record, model = resumable.get(stage.name), ends.get(stage.start, model)
            trained += run_stage(recipe, stage, model, path / stage.name, record, watcher)
            runs.append(Run(path / stage.name))
            last = ranks.agree(latest, runs[-1].checkpoints_dir)
            assert last is not None
            model = ends[stage.name] = replace(recipe.model, path=str(last), shape={})
    finally:
        if ranks.size == 1:
            torch.set_num_threads(threads)
    # Killed after the last checkpoint, a run still lacks its table and report, which the caller makes from this result.
    if trained == 0 and "table" in runs[-1].notes() and (path / "report.html").exists():
        raise ConfigError(
            f"{path} is finished, so there is nothing to resume. Its model is {model.path}. To train on, start another "
            "run from it: model.path=… name=…"
        )
    best = runs[-1].notes().get("best", {}).get("step")
    found = saved_in(runs[-1].checkpoints_dir)
    return Result(path, Path(model.path), found.get(best), tuple(runs))


def prepare(path: Path, recipe: Recipe, watcher: Watcher, resume: bool, fresh: bool) -> dict[str, Run]:
    """Make room for the run, or find what there is of it; say what cannot work before anything has trained."""
    if fresh:
        set_aside(path)
    if path.exists() and not resume:
        raise ConfigError(
            f"{path} holds a run already. Continue it with --resume, move it out of the way with --fresh, or choose "
            "another name (name=…)."
        )
    names = [stage.name for stage in recipe.stages]
    for number, stage in enumerate(recipe.stages[1:], 1):
        foresee(stage, recipe.seed, names[:number])
    return begun(path, recipe, watcher) if resume else {}


def run_stage(recipe: Recipe, stage: Stage, model: Model, path: Path, record: Run | None, watcher: Watcher) -> int:
    """One stage; returns how many steps it trained now."""
    ranks = Ranks()
    start = ranks.agree(latest, record.checkpoints_dir) if record else None
    length = record.notes().get("length", {}).get("steps") if record else None  # of rows it is known once they are read
    if start is not None and start.name == f"checkpoint-{length or stage.train.steps}":
        return 0
    policy = load_policy(model, recipe.seed)
    job = open_job(recipe, stage, model, policy, path, watcher)
    stage = job.stage
    exact = examine(job)
    if ranks.first:
        begin_record(recipe, stage, job, path, record, exact)
    exact = ranks.agree(lambda: bool(job.run.notes()["sampler"]["exact"]))
    job = replace(job, exact=exact and job.ahead is None)  # a resumed run keeps the answer it began with
    seed_generators(job.seed)
    state = checkpoint.restore(start, policy, job.optimizer, job.tutor) if start else State()
    if record is not None:
        if differs := recipes.differences(record.config["versions"], versions(policy.device)):
            watcher.say(f"resumed on other ground, so not bit for bit: {'; '.join(differs)}")
        # step 0 is what was measured before training
        redo = ranks.agree(record.rewind, state.step if start else -1)
        watcher.say(f"resumed {stage.name} at step {state.step}" + (f", {redo} steps set aside" if redo else ""))
    watcher.begin(stage.name, stage.train.steps, state.step)
    done, moved = state.step, state.updates
    try:
        learn(job, state)
    finally:
        watcher.end(stage.name)
    if state.updates == moved:
        raise TropismError(
            f"stage {stage.name} took {state.step - done} steps, but no update moved the weights (all were skipped): "
            "nothing was learned. The metrics `skipped` and `failures` in metrics.jsonl say when."
        )
    return state.step - done


def begin_record(recipe: Recipe, stage: Stage, job: Job, path: Path, record: Run | None, exact: bool) -> None:
    """What the record of a stage says before its first step."""
    if record is None:
        Run.create(path, recipes.dump(recipe) | {"stage": stage.name}, versions(job.policy.device))
        if isinstance(job.draw, Reading) and job.draw.left_out:
            job.run.note("left_out", {"rows": list(job.draw.left_out)})
    if isinstance(job.draw, Reading) and stage.data and stage.data.sampled and not (path / ROWS).exists():
        apart = write_rows(job.draw.rows, path / ROWS)
        if apart:
            job.watcher.say(f"{ROWS}: {apart} pairs are not in it, for their answers follow different conversations")
    job.run.note("length", {"steps": stage.train.steps})
    job.run.note("micro_tokens", {"tokens": stage.train.micro_tokens})
    if "sampler" not in job.run.notes():
        job.run.note("sampler", {"exact": exact})


def open_job(recipe: Recipe, stage: Stage, model: Model, policy: Policy, path: Path, watcher: Watcher) -> Job:
    """Everything a stage needs, opened and checked against each other."""
    seed = seed_of(recipe.seed, stage.name)
    stage = sized(recipe, stage, policy, path, watcher)
    needs = stage.method.needs
    if missing := sorted((needs.live - {"value", "last_value", "topk_logp"}) | (needs.measured - MEASURED)):
        raise ConfigError(f"{type(stage.method).__name__} needs {', '.join(missing)}, which nothing here provides.")
    if needs.measured & TAUGHT and teacher_of(stage.method) is None:
        missing = sorted(needs.measured & TAUGHT)
        raise ConfigError(
            f"{type(stage.method).__name__} needs {', '.join(missing)}, but has no teacher. Give it a field "
            "`teacher: Teacher`."
        )
    if stage.critic and "value" not in needs.live:
        raise ConfigError(
            f"stage {stage.name!r} names a critic, {stage.critic}, but {type(stage.method).__name__} has none. Use "
            "ppo, or drop critic."
        )
    if stage.critic:
        policy.add_own_critic(open_scorer(recipe, stage.critic, policy, path.parent).module)
    elif needs.live & {"value", "last_value"}:
        policy.add_critic(bias=not needs.data)
    reference = open_reference(recipe, stage, model, policy)
    panel = open_judge(stage.judge, model, policy, seed)
    ensemble = open_reward_models(recipe, stage, policy, path.parent)
    draw = open_draw(recipe, stage, policy, panel, ensemble, path.parent, seed, watcher)
    if not stage.train.steps and isinstance(draw, Reading):
        stage = replace(stage, train=replace(stage.train, steps=draw.steps(stage.train.epochs), epochs=1))
    return Job(
        stage=stage,
        policy=policy,
        optimizer=AdamW(policy.module, stage.train, policy.critic),
        draw=draw,
        run=Run(path) if Ranks().first else Unwritten(path),
        watcher=watcher,
        seed=seed,
        evaluation=open_evaluation(recipe, stage, policy, panel, ensemble, path.parent, reference, watcher.say),
        reference=reference and remembering(reference(stage.sampling.temperature if stage.env else 1.0), draw, policy),
        tutor=open_tutor(stage, model, policy, draw.source if isinstance(draw, Playing) else None),
        ahead=Ahead(draw) if stage.sampling.ahead and isinstance(draw, Playing) else None,
        per_reply=per_reply(stage.env),
    )


def open_reference(recipe: Recipe, stage: Stage, model: Model, policy: Policy) -> Callable[[float], Forward] | None:
    """Temperature -> forward pass of the model that the stage starts as, or of the one that its method names."""
    if not ({"reference_logp"} & stage.method.needs.measured or stage.train.kl_budget is not None or stage.eval.kl):
        return None
    base = getattr(stage.method, "reference", "")
    if not base and model.lora is not None:
        return partial(policy.measuring, train=stage.train, start=True)
    other = load_other(base, model, policy) if base else load_policy(model, recipe.seed)
    return partial(other.measuring, train=stage.train)


def remembering(frozen: Forward, draw: Draw, policy: Policy) -> Forward:
    """Rows of data come again in every epoch, and a frozen model says the same of them."""
    return Remembered(frozen, draw.rows, draw.batch, policy.device) if isinstance(draw, Reading) else frozen


def open_draw(
    recipe: Recipe,
    stage: Stage,
    policy: Policy,
    panel: Panel | None,
    ensemble: Ensemble | None,
    folder: Path,
    seed: int,
    watcher: Watcher,
) -> Draw:
    if stage.data is not None:
        rows = open_rows(recipe, stage, stage.data, policy, panel, ensemble, folder, watcher.say)
        kept, left_out = sifted(rows, stage.train.failure_limit, watcher.say)
        return Reading(kept, stage.train.batch, seed, left_out, balance=stage.data.balance)
    assert stage.env is not None
    source = open_source(stage.env.name, stage.env.options, split="train", seed=recipe.seed)
    score = scoring(stage, stage.env, source, panel, ensemble)
    return Playing(stage=stage, source=source, policy=policy, score=score, seed=seed, say=watcher.say)


def open_rows(
    recipe: Recipe,
    stage: Stage,
    data: Data,
    policy: Policy,
    panel: Panel | None,
    ensemble: Ensemble | None,
    folder: Path,
    say: Callable[[str], None],
    split: Literal["train", "test"] = "train",
) -> list[tuple[Rollout, ...]]:
    """What there is to read, or what the policy writes now; what cannot be used is a failure that says why."""
    if data.sampled is None:
        found, asked = located(data, recipe, folder), stage.method.needs.data
        return load_rows(found, policy.words, recipe.seed, policy.context, asked, split)
    env, seed = data.sampled.env, seed_of(recipe.seed, stage.name, *(["test"] if split == "test" else []))
    source = open_source(env.name, env.options, split=split, seed=recipe.seed)
    score = scoring(stage, env, source, panel, ensemble)
    seed_generators(seed)  # rewards may draw, and a resume must keep the same rows
    own = sampled_rows(data.sampled, stage.sampling, source, policy, score, seed, say)
    return [usable(row, policy.context, stage.method.needs.data) for row in own]


def open_evaluation(
    recipe: Recipe,
    stage: Stage,
    policy: Policy,
    panel: Panel | None,
    ensemble: Ensemble | None,
    folder: Path,
    reference: Callable[[float], Forward] | None,
    say: Callable[[str], None],
) -> Evaluation | HeldOut | None:
    """Held-out rows of `eval.data`, or held-out play: on `eval.env`, else on the stage's environment, else on what its
    demonstrations come from."""
    if not stage.eval.every:
        return None
    if stage.eval.data is not None:

        def held_out(line: str) -> None:
            say(f"held out: {line}")

        rows = open_rows(recipe, stage, stage.eval.data, policy, panel, ensemble, folder, held_out, "test")
        held, _ = sifted(rows[: stage.eval.tasks], 1.0, held_out)
        frozen = reference and Remembered(reference(1.0), held, max(1, len(held)), policy.device)
        return HeldOut(rows=held, method=stage.method, policy=policy, train=stage.train, reference=frozen)
    env = evaluated(stage)
    if env is None:
        raise ConfigError(
            f"stage {stage.name!r} asks for an evaluation every {stage.eval.every} steps, but has nothing to evaluate "
            "on. Name an environment to play, eval.env, or rows to read, eval.data: {path: …}."
        )
    source, at = open_source(env.name, env.options, split="test", seed=recipe.seed), stage.eval.temperature
    return Evaluation(
        settings=stage.eval,
        sampling=stage.sampling,
        source=source,
        policy=policy,
        score=scoring(stage, env, source, panel, ensemble),
        seed=recipe.seed,
        per_reply=per_reply(env),
        forwards=(policy.measuring(at, stage.train), reference(at)) if stage.eval.kl and reference else None,
    )


def evaluated(stage: Stage) -> Named | None:
    return stage.eval.env or stage.scored or (stage.data.demos if stage.data else None)


def foresee(stage: Stage, seed: int, earlier: Sequence[str]) -> None:
    """Raise what opening this stage would raise, as far as it can be known without its model."""
    for env in {named.name: named for named in (stage.scored, evaluated(stage)) if named}.values():
        source = open_source(env.name, env.options, split="train", seed=seed)
        scoring(stage, env, source)
        check_rewards(stage, source)
    if stage.judge is not None:
        rule_of(stage.judge)
    if stage.data is not None and stage.data.path and stage.data.path not in earlier:
        read_rows(stage.data.path, stage.data.split)


FREE = re.compile(r"[^.]+\.train\.(failure_limit|kl_budget|patience|keep|save_every|record_every)|report_to|output")
"""Keys that may differ on resume: they say when to stop, what to keep and whom to tell, and move no weight. Those of
`eval` are not among them: they change which checkpoint is the best."""


def begun(path: Path, recipe: Recipe, watcher: Watcher) -> dict[str, Run]:
    """Stage -> its record, for the stages that had started."""
    records = {stage.name: Run(path / stage.name) for stage in recipe.stages}
    found = {name: record for name, record in records.items() if record.config}
    if not found:
        watcher.say(f"nothing to resume at {path}: starting")
    if freed := dict.fromkeys(line for record in found.values() for line in unchanged(record, recipe)):
        watcher.say(f"resumed with {'; '.join(freed)}")
    return found


def unchanged(record: Run, recipe: Recipe) -> list[str]:
    """The changes that a resume survives; any other one is refused, key by key."""
    old = {k: v for k, v in record.config.items() if k not in ("stage", "versions")}
    changed = recipes.differences(old, recipes.dump(recipe))
    freed = [line for line in changed if FREE.fullmatch(line.split(": ")[0])]
    if fixed := [line for line in changed if line not in freed]:
        lines = "\n  ".join(fixed)
        raise ConfigError(
            f"{record.path} was made by another recipe, so continuing it would be neither run:\n  {lines}\n"
            "Undo the change, or start a run of another name."
        )
    return freed


DISTRIBUTIONS = (
    *("tropism", "torch", "transformers", "tokenizers", "numpy", "datasets"),
    *("reasoning-gym", "open_spiel", "math-verify"),  # what an environment or a reward may rest on
)


def versions(device: torch.device) -> dict[str, str]:
    """What a run depends on, for its record; what is not installed is left out."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        found
        | {"python": platform.python_version(), "threads": str(torch.get_num_threads()), "device": where}
        | ({"processes": str(Ranks().size)} if Ranks().size > 1 else {})
    )


def set_aside(path: Path) -> None:
    """Move an old run to path.1, path.2, …; nothing is deleted."""
    if path.exists():
        number = 1
        while (target := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        shutil.move(path, target)
