"""What a person calls: train, evaluate, sample, doctor, plan, and a model to talk with."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tropism import recipe as recipes
from tropism.config import Eval, Model, Named, Recipe, Sampling
from tropism.errors import ConfigError
from tropism.record import Lines, Run, Watcher, last_checkpoint, stages_of
from tropism.training import processes
from tropism.training import run as training
from tropism.training.evaluate import Evaluation
from tropism.training.examine import examine
from tropism.training.model import load_policy
from tropism.training.plan import Plan, planned
from tropism.training.scoring import parts_of, per_reply
from tropism.types import Failure, Prompt, SamplingParams, seed_of
from tropism.view.progress import Progress
from tropism.view.progress import table as print_table
from tropism.view.report import write_report
from tropism.view.trackers import Tracker


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    path: Path
    """The run directory."""
    model: Path
    """The last checkpoint; `from_pretrained` loads it."""
    report: Path
    """report.html"""
    best: Path | None
    """The checkpoint with the best held-out metric, if there was an evaluation."""
    table: tuple[tuple[str, ...], list[tuple[Any, ...]]]
    """Column names and rows of held-out numbers before and after."""

    def __str__(self) -> str:
        named = {"model": self.model, "best": self.best, "report": self.report}
        return "\n".join(f"{name:<8}{path}" for name, path in named.items() if path)


def train(
    recipe: Any = None, *overrides: str, resume: bool = False, fresh: bool = False, quiet: bool = False, **fields: Any
) -> Result:
    """Train by a recipe: a `Recipe`, a mapping, a file or method name, or a method object and the recipe's fields.

        train("recipes/tictactoe.yaml", "seed=1")
        train(GRPO(clip_high=0.28), env="tictactoe", model="tiny", name="noughts", train={"steps": 50})

    Args:
        overrides: `key=value`, as on the command line.
        resume: continue the run of this name.
        fresh: move an earlier run of this name out of the way.
        quiet: no progress, no table.

    Raises:
        TropismError: ConfigError, CheckFailed or GuardStopped; the message says what to do.
    """
    resolved = resolved_recipe(recipe, overrides, fields)
    with contextlib.ExitStack() as stack:
        progress: Watcher = Lines() if quiet else stack.enter_context(Progress())
        watchers = [progress]
        watchers += [
            Tracker(name, resolved.name, recipes.dump(resolved), Path(resolved.output) / resolved.name)
            for name in resolved.report_to
        ]
        together = Together(watchers)
        try:
            with processes.together(resolved, progress.say, resume=resume):
                done = training.run(resolved, together, resume=resume, fresh=fresh)
        except Exception:
            if together.began:
                with contextlib.suppress(Exception):  # what stopped the run is the news, not that its report fails too
                    progress.say(f"report  {report(Path(resolved.output) / resolved.name)}")
            raise
    table = before_and_after(done.runs)
    done.runs[-1].note("table", {"columns": list(table[0]), "rows": [list(row) for row in table[1]]})
    result = Result(done.path, done.model, report(done.path), done.best, table)
    if not quiet:
        if table[1]:
            print_table(*table)
        progress.say(str(result))
    return result


def resolved_recipe(recipe: Any, overrides: tuple[str, ...], fields: Mapping[str, Any]) -> Recipe:
    if hasattr(recipe, "credit") and hasattr(recipe, "needs"):  # a method, ours or somebody's own
        name = recipes.folder_name(recipe)
        return recipes.resolve({"name": name, "method": recipe} | dict(fields), overrides)
    if isinstance(recipe, Recipe):
        return recipes.resolve(recipes.dump(recipe), overrides) if overrides else recipe
    if isinstance(recipe, str | Path):
        return recipes.load(str(recipe), overrides)
    return recipes.resolve(dict(recipe or {}) | dict(fields), overrides)


def before_and_after(runs: tuple[Run, ...]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Held-out numbers of the last evaluated stage: at its first and its last evaluation."""
    for run in reversed(runs):
        lines = [line for line in run.metrics() if any(name.startswith("eval/") for name in line)]
        if len(lines) > 1:
            names = [n for n in lines[-1] if n.startswith("eval/") and lines[0].get(n) is not None]
            names = [n for n in names if "completions/" not in n and not n.endswith("failures")]
            head = ("held out", f"before {run.path.name}", "after")
            return head, [(n.removeprefix("eval/"), lines[0][n], lines[-1][n]) for n in names]
    return ("held out", "before", "after"), []


def report(path: str | Path) -> Path:
    """Write report.html of a run, or of one stage, from its record; in words once a checkpoint holds the tokenizer."""
    from transformers import AutoTokenizer

    runs = stages_of(Path(path))
    model = last_checkpoint(runs)
    words: Any = AutoTokenizer.from_pretrained(model) if model else None
    decode = partial(words.decode, skip_special_tokens=True) if words else None
    return write_report(runs, Path(path) / "report.html", decode)


@dataclass
class Together:
    """Several watchers as one."""

    watchers: list[Watcher]
    began: bool = False
    """A stage has started, so there is something to report."""

    def say(self, text: str, mark: tuple[int, int] = (0, 0)) -> None:
        for watcher in self.watchers:
            watcher.say(text, mark)

    def begin(self, stage: str, steps: int, done: int) -> None:
        self.began = True
        for watcher in self.watchers:
            watcher.begin(stage, steps, done)

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Any) -> None:
        for watcher in self.watchers:
            watcher.step(step, metrics, rollouts)

    def end(self, stage: str) -> None:
        for watcher in self.watchers:
            watcher.end(stage)


def evaluate(
    model: str | Path,
    env: str,
    options: Mapping[str, Any] | None = None,
    *,
    tasks: int = 1000,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens: int = 256,
    device: str = "auto",
) -> dict[str, float | int]:
    """Play held-out tasks: the mean of every part of the score, how many games, and the seed.

    Parts that an environment counts per reply, such as `illegal`, are divided by the number of replies.
    """
    from tropism.envs import open_source
    from tropism.rewards.score import score

    policy = load_policy(Model(path=str(model), device=device), seed)
    named = Named(name=env, options=options or {})
    source = open_source(env, named.options, split="test", seed=seed)
    parts = parts_of(source)
    play = Evaluation(
        settings=Eval(tasks=tasks, temperature=temperature),
        sampling=Sampling(max_tokens=max_tokens),
        source=source,
        policy=policy,
        score=lambda rollouts: score(rollouts, {}, dict.fromkeys(parts, 1.0), parts=parts),
        seed=seed,
        per_reply=per_reply(named),
    )
    numbers, _ = play(0)
    found = {name: numbers[f"eval/{name}"] for name in parts if f"eval/{name}" in numbers}
    if not found:
        raise ConfigError(
            f"none of {tasks} games could be played and scored with {model}: the environment {env} has no score of its "
            "own, or every game failed (a prompt longer than the model's context?)."
        )
    failures = {"failures": numbers["eval/failures"]} if numbers["eval/failures"] else {}
    return found | failures | {"games": tasks, "seed": seed}


class Chat:
    """A model to talk with."""

    def __init__(
        self,
        model: str | Path,
        *,
        temperature: float = 1.0,
        max_tokens: int = 256,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.policy = load_policy(Model(path=str(model), device=device), seed)
        self.params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
        self.asked = 0

    def reply(self, prompt: Prompt) -> str:
        return self.replies(prompt, 1)[0]

    def replies(self, prompt: Prompt, n: int) -> list[str]:
        """n different replies to a text (plain models) or messages."""
        self.asked += 1
        context = self.policy.words.context(prompt)
        params = replace(self.params, seed=seed_of(self.params.seed, self.asked))
        turns = self.policy.sampler([context] * n, params)
        failed = [turn for turn in turns if isinstance(turn, Failure)]
        if failed:
            raise ConfigError(failed[0].reason)
        return [self.policy.words.reply(turn.action) for turn in turns if not isinstance(turn, Failure)]


def sample(
    model: str | Path,
    prompt: str,
    *,
    n: int = 1,
    temperature: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
    device: str = "auto",
) -> list[str]:
    """n replies to a prompt: as a user's message for a chat model, as it is for a plain one."""
    chat = Chat(model, temperature=temperature, max_tokens=max_tokens, seed=seed, device=device)
    asked: Prompt = ({"role": "user", "content": prompt},) if chat.policy.words.chat else prompt
    return chat.replies(asked, n)


def doctor(recipe: Recipe, watcher: Watcher | None = None) -> list[str]:
    """The checks that every run starts with, on the recipe's start model, stage by stage; trains nothing. Whether a
    teacher has something to say, and can use what it reads, is asked of the first stage's alone: later ones start from
    what was trained.

    Args:
        watcher: is told each line as soon as its check has passed.

    Raises:
        CheckFailed: the first check that does not hold.
    """
    lines = Lines()
    told = Together([lines, watcher] if watcher else [lines])
    with tempfile.TemporaryDirectory() as folder:
        for number, stage in enumerate(recipe.stages):
            told.say(f"{stage.name}:")
            policy = load_policy(recipe.model, recipe.seed)
            examine(training.open_job(recipe, stage, recipe.model, policy, Path(folder), told), trained=not number)
    return lines.lines


def plan(recipe: Recipe, hardware: str = "here") -> Iterator[Plan]:
    """What each stage will take, for a model of the recipe's start model's shape; trains nothing.

    Args:
        hardware: `here`, where rates are measured for seconds, or a machine with a known data sheet, such as h100.
    """
    process, count = 0.0, processes.decided(recipe) if hardware == "here" else 1
    recipe = replace(recipe, processes=count)
    processes.check(recipe, count)
    beside = processes.rate_beside(recipe.model, count) if count > 1 else 1.0
    for stage in recipe.stages:
        policy = load_policy(recipe.model, recipe.seed)
        if stage.method.needs.live & {"value", "last_value"}:
            policy.add_critic()
        found = planned(recipe, stage, policy, Path(recipe.output) / recipe.name, hardware, process, beside)
        process = found.memory["the process"] / found.processes
        yield found
