"""Rows that the start model writes itself: rejection sampling (best-of-n, expert iteration) and preference pairs.

Dong et al. 2023, RAFT, arXiv:2304.06767; Touvron et al. 2023, Llama 2, arXiv:2307.09288, section 3.2.3.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tropism.config import Data, Recipe, Sampled, Sampling
from tropism.errors import ConfigError
from tropism.record import write
from tropism.training.model import Policy
from tropism.training.ranks import Ranks
from tropism.types import Rollout, SamplingParams, Source, Stop, seed_of

ROWS = "rows.jsonl"
"""Where a stage's folder has the rows that were kept."""
AT_ONCE = 512
"""Replies that are sampled at the same time."""


def sampled_rows(
    sampled: Sampled,
    sampling: Sampling,
    source: Source,
    policy: Policy,
    score: Callable[[Sequence[Rollout]], list[Rollout]],
    seed: int,
    say: Callable[[str], None],
) -> list[tuple[Rollout, ...]]:
    """What is kept, and a line about it. The same for the same start model and seed, so a resume need not save it.

    Raises:
        ConfigError: nothing is kept.
    """
    ranks = Ranks()
    groups: list[list[Rollout]] = []
    total = 0
    per_call = max(1, AT_ONCE // sampled.samples)
    tasks_of = range(sampled.first, sampled.first + sampled.tasks)
    for numbers in (tasks_of[k : k + per_call] for k in range(0, sampled.tasks, per_call)):
        tasks = [(source.task(n), n, sibling) for n in numbers for sibling in range(sampled.samples)]
        params = SamplingParams(
            temperature=sampling.temperature, max_tokens=sampling.max_tokens, seed=seed_of(seed, "sampled", numbers[0])
        )
        played = ranks.play(tasks, source, policy.sampler, policy.words, params, max_turns=sampling.max_turns)
        found = ranks.agree(score, played)
        by_task: dict[tuple[int, int], list[Rollout]] = {}
        for one in found:
            by_task.setdefault((one.group, one.task.seat), [])
            cut = any(turn.stop is Stop.truncated for turn in one.turns)  # nobody should learn not to stop
            if one.failure is None and one.turns and not cut:
                by_task[one.group, one.task.seat].append(one)
        groups += by_task.values()
        total += len(found)
    rows = [row for number, group in enumerate(groups) for row in kept(sampled, group, seed_of(seed, "kept", number))]
    usable = sum(map(len, groups))
    said = f"of {total} replies to {sampled.tasks} tasks, {total - usable} were truncated or failed"
    if not rows:
        raise ConfigError(
            f"{said}, and nothing is kept by keep: {sampled.keep}. Teach the format first, sample more, ask for less."
        )
    say(f"{said}; kept {len(rows)} {'pairs' if sampled.keep == 'pairs' else 'replies'}")
    label = sampled.keep == "labels"
    return [tuple(unsampled(one, float(one.success) if label else 0.0) for one in row) for row in rows]


def kept(sampled: Sampled, group: Sequence[Rollout], seed: int) -> list[tuple[Rollout, ...]]:
    """Of the scored replies of one seat to one task."""
    draws = random.Random(seed)
    if sampled.keep == "pairs":
        pairs = zip(group[::2], group[1::2], strict=False)
        return [pair for one, other in pairs if (pair := preferred(one, other, sampled.noise, draws))]
    if sampled.keep in ("success", "labels"):
        return [(one,) for one in group if one.success or sampled.keep == "labels"]
    best = sorted(group, key=lambda one: -one.reward)[: sampled.top]
    enough = [one for one in best if sampled.at_least is None or one.reward >= sampled.at_least]
    return [(one,) for one in (enough if sampled.keep == "best" else draws.sample(list(group), len(enough)))]


def preferred(one: Rollout, other: Rollout, noise: float, draws: random.Random) -> tuple[Rollout, Rollout] | None:
    """(chosen, rejected); None where nobody can say, or where both are the same."""
    apart = one.reward - other.reward
    if one.turns[-1].reply == other.turns[-1].reply or (apart == 0 and not noise):
        return None
    chance = 1 / (1 + math.exp(-max(-700.0, min(700.0, apart / noise)))) if noise else float(apart > 0)
    chosen, rejected = (one, other) if draws.random() < chance else (other, one)
    return replace(chosen, success=True), replace(rejected, success=False)


def unsampled(rollout: Rollout, label: float = 0.0) -> Rollout:
    """As if it had been read: nobody sampled it, and it earned nothing but its label."""
    turns = tuple(
        replace(turn, logp=None, entropy=None, topk_ids=None, topk_logp=None, reward=label) for turn in rollout.turns
    )
    return replace(rollout, turns=turns, reward=label * len(turns))


def write_rows(rows: Sequence[tuple[Rollout, ...]], path: Path) -> int:
    """In TRL's columns, for other stages, tools and eyes: the last turn of each, after its prompt.

    Returns:
        how many pairs are left out, since their last turns answer different prompts.
    """
    told = [row for row in rows if len({repr(one.turns[-1].prompt) for one in row}) == 1]
    write(path, "".join(json.dumps(line_of(row), ensure_ascii=False) + "\n" for row in told).encode())
    return len(rows) - len(told)


def line_of(row: tuple[Rollout, ...]) -> dict[str, Any]:
    turns = [one.turns[-1] for one in row]
    prompt: Any = turns[0].prompt
    if isinstance(prompt, str):
        said: list[Any] = [turn.reply for turn in turns]
    else:
        said, prompt = [[{"role": "assistant", "content": turn.reply}] for turn in turns], list(prompt)
    if len(row) == 2:
        return {"prompt": prompt, "chosen": said[0], "rejected": said[1]}
    return {"prompt": prompt, "completion": said[0], "label": row[0].success}


def located(data: Data, recipe: Recipe, folder: Path) -> Data:
    """With the path of the rows that an earlier stage has sampled, where it names one; `folder` is the run's."""
    if data.path not in [stage.name for stage in recipe.stages]:
        return data
    rows = folder / data.path / ROWS
    if not rows.exists():
        raise ConfigError(
            f"data.path is {data.path}, a stage that has sampled no rows: there is no {rows}. Name a stage with data: "
            "{sampled: …}, or a file."
        )
    return replace(data, path=str(rows))
