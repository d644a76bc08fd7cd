"""Rewards that need no model. A scorer is a function in any of these shapes, told apart by the names it asks for:

    def mine(prompts, completions, **columns) -> list[float | None]         TRL; sync or async
    def mine(data_source, solution_str, ground_truth, extra_info) -> float  verl; or {"score": float, …}
    def mine(reply, truth) -> float                                         truth: column answer, solution, ground_truth
    def mine(reply, level, answer) -> {"part": float, …}                    any other name is a column
    def mine(rollouts) -> list[{"part": float, …} | Failure]                everything there is
    def mine(rollouts, max_tokens) -> …                                     and the longest that a reply may be

None means "does not apply"; a Failure means "could not be scored"; neither is 0.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tropism.errors import ConfigError
from tropism.load import hint, load
from tropism.rewards.adapt import adapt
from tropism.rewards.answer import MISSING
from tropism.types import Scorer

SCORERS = {
    "exact_match": "tropism.rewards.answer:exact_match",
    "math_answer": "tropism.rewards.answer:math_answer",
    "soft_overlong": "tropism.rewards.length:soft_overlong",
    "unfinished": "tropism.rewards.length:unfinished",
}


def find_scorer(given: str | Callable[..., Any], parts: Iterable[str] = ()) -> tuple[str, Scorer, tuple[str, ...]]:
    """
    Args:
        given: a registered name, `file.py:function`, `module:function`, or a function.
        parts: names of the environment's own parts, which the error message offers too.

    Returns:
        (name, scorer, the columns that it cannot do without).
    """
    function: Any = given
    if isinstance(given, str):
        if given not in SCORERS and ":" not in given:
            raise ConfigError(
                f"there is no reward {given!r}. {hint(given, [*SCORERS, *parts])} Your own: file.py:function."
            )
        if given == "math_answer" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError(MISSING)
        function = load(SCORERS.get(given, given))
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"the reward {given!r} is a {type(function).__name__}, but must be a function.")
    name = getattr(function, "__name__", type(function).__name__.lower())
    scorer, columns = adapt(name, function)
    return name, scorer, columns


def bound(scorer: Any, max_tokens: int) -> Scorer:
    """A scorer that asks for the limit of a reply is told it."""
    asks = "max_tokens" in inspect.signature(scorer).parameters
    return partial(scorer, max_tokens=max_tokens) if asks else scorer
