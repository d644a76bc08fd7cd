"""Rows of other libraries as rows with TRL's columns; a row that is in none of these forms stays as it is.

    alpaca      instruction, input, output                       -> prompt, completion
    sharegpt    conversations: [{from, value}, …]                -> messages; with chosen and rejected -> a pair
    verl        prompt, reward_model: {ground_truth}, extra_info -> prompt, answer, and what extra_info holds

What a column of the row itself says is never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES |= {"tool": "tool", "observation": "tool", "function_call": "assistant"}


def in_known_form(row: Row) -> Row:
    """With the columns that this library reads, in front of all that the row has."""
    for form in (alpaca, sharegpt, verl):
        found = form(row)
        if found is not None:
            return {**found, **{name: value for name, value in row.items() if name not in found}}
    return row


def alpaca(row: Row) -> Row | None:
    """Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca."""
    if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str) or "prompt" in row:
        return None
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    prompt = [*system, {"role": "user", "content": asked}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["output"]}]}


def sharegpt(row: Row) -> Row | None:
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or "messages" in row:
        return None
    said = [message(turn) for turn in turns]
    if any(one is None for one in said):
        return None
    both = [message(row[name]) if isinstance(row.get(name), Mapping) else None for name in ("chosen", "rejected")]
    if all(both):
        return {"prompt": said, "chosen": [both[0]], "rejected": [both[1]]}
    return {"messages": said}


def message(turn: Any) -> dict[str, str] | None:
    """{from, value} as {role, content}; None for anything else."""
    if not isinstance(turn, Mapping) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
        return None
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def verl(row: Row) -> Row | None:
    """https://verl.readthedocs.io/en/latest/preparation/prepare_data.html"""
    told = row.get("reward_model")
    if not isinstance(told, Mapping) or "ground_truth" not in told or "prompt" not in row:
        return None
    extra = row.get("extra_info")
    return {
        "answer": told["ground_truth"],
        **(dict(extra) if isinstance(extra, Mapping) else {}),
        "prompt": row["prompt"],
    }
