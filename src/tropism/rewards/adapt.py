"""Reward functions of other libraries as scorers: chosen by the names of their parameters, never by trial.

What is left out: verifiers' `@reward` methods, which read a trace of another library's making.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tropism.errors import ConfigError, TropismError
from tropism.load import hint
from tropism.types import Failure, Prompt, Rollout, Scored, Scorer

TRUTH = ("answer", "solution", "ground_truth")
EXTRAS = ("completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL hands to a reward function beside prompts, completions and columns."""


def adapt(name: str, function: Callable[..., Any]) -> tuple[Scorer, tuple[str, ...]]:
    """(scorer, columns that it cannot do without), from the signature."""
    parameters = inspect.signature(function).parameters
    names = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [n for n in names if parameters[n].default is inspect.Parameter.empty]
    everything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if "completions" in names:
        columns = tuple(n for n in needed if n not in ("prompts", "completions", *EXTRAS))
        return _trl(name, function, None if everything else frozenset(names), columns), columns
    if "solution_str" in names:
        return PerReply(name, lambda rollout: function(**_verl(rollout, names, everything))), ()
    if names[:1] == ["reply"]:
        columns = tuple(n for n in needed if n not in ("reply", "truth"))
        return PerReply(name, lambda r: function(reply_of(r), **_columns(name, r, names[1:], columns))), columns
    if needed in (["rollouts"], ["rollouts", "max_tokens"]):
        scorer: Scorer = function
        return scorer, ()
    raise ConfigError(
        f"the reward {name}({', '.join(parameters)}) has a signature that we do not know. Use (prompts, completions, "
        "**columns), (reply, truth), (rollouts), or verl's (data_source, solution_str, ground_truth, extra_info)."
    )


def reply_of(rollout: Rollout) -> str:
    """The last thing that the policy said."""
    return rollout.turns[-1].reply


def truth_of(columns: Mapping[str, Any]) -> Any:
    """The reference answer, under any of its usual names."""
    for column in TRUTH:
        if column in columns:
            return columns[column]
    nested = columns.get("reward_model")
    if isinstance(nested, Mapping) and "ground_truth" in nested:  # verl's data sets
        return nested["ground_truth"]
    raise ConfigError(
        f"a reward compares with the truth, but the task has no column {', '.join(TRUTH)}: it has "
        f"{', '.join(map(str, columns)) or 'none'}. Rename the column, or name it as a parameter of your own reward."
    )


def _trl(name: str, function: Callable[..., Any], accepted: frozenset[str] | None, needed: Sequence[str]) -> Scorer:
    def scorer(rollouts: Sequence[Rollout]) -> list[Scored | Failure]:
        # dict.fromkeys and not a set: columns keep their order, so that a call repeats exactly.
        columns = dict.fromkeys(c for r in rollouts for c in r.task.columns if c not in ("prompt", "completion"))
        given: dict[str, Any] = {c: [r.task.columns.get(c) for r in rollouts] for c in columns}
        _require(name, needed, columns)
        given |= {
            "prompts": [_prompt(r.turns[0].prompt) for r in rollouts],
            "completions": [_completion(r) for r in rollouts],
            "completion_ids": [list(r.turns[-1].action) for r in rollouts],
            "trainer_state": SimpleNamespace(global_step=max(r.version for r in rollouts)),
            "log_extra": _ignore,
            "log_metric": _ignore,
        }
        if accepted is not None:
            given = {k: v for k, v in given.items() if k in accepted}
        values = finished(function(**given))
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple):
            raise ConfigError(
                f"the reward {name} returned a {type(values).__name__}, but must return a list with one number (or "
                f"None) for each of {len(rollouts)} completions."
            )
        return [{name: value} for value in values]

    return scorer


@dataclass(frozen=True)
class PerReply:
    """A scorer that looks at one rollout at a time: which others are with it makes no difference."""

    name: str
    function: Callable[[Rollout], Any]

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored | Failure]:
        return [self.one(rollout) for rollout in rollouts]

    def one(self, rollout: Rollout) -> Scored | Failure:
        name = self.name
        try:
            value = finished(self.function(rollout))
        except TropismError:
            raise
        except Exception as error:
            return Failure(name, f"{type(error).__name__}: {error}")
        if isinstance(value, Failure):
            return value
        if isinstance(value, Mapping):
            return {name if part == "score" else str(part): number for part, number in value.items()}
        return {name: value}


def _columns(name: str, rollout: Rollout, names: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
    columns = rollout.task.columns
    _require(name, needed, columns)
    given = {n: columns[n] for n in names if n in columns}
    return given | {"truth": truth_of(columns)} if "truth" in names else given


def _require(name: str, needed: Sequence[str], columns: Iterable[str]) -> None:
    """A parameter that no column supplies would fail on every reply."""
    for column in needed:
        if column not in columns:
            raise ConfigError(f"the reward {name} asks for {column!r}, which is no column. {hint(column, columns)}")


def _verl(rollout: Rollout, names: Sequence[str], everything: bool) -> dict[str, Any]:
    columns = rollout.task.columns
    given = {
        "data_source": columns.get("data_source", rollout.task.domain),
        "solution_str": reply_of(rollout),
        "ground_truth": truth_of(columns),
        "extra_info": columns.get("extra_info", {}),
    }
    return given if everything else {k: v for k, v in given.items() if k in names}


def _prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _completion(rollout: Rollout) -> Any:
    reply = reply_of(rollout)
    return reply if isinstance(rollout.turns[0].prompt, str) else [{"role": "assistant", "content": reply}]


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def finished(value: Any) -> Any:
    """The result of a sync or async function."""
    if not inspect.isawaitable(value):
        return value
    # A thread of its own has no running loop, whoever calls us (a notebook has one).
    box: dict[str, Any] = {}

    async def wait(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    def run() -> None:
        try:
            box["value"] = asyncio.run(wait(value))
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["value"]
