"""Recorded rollouts as HTML: what the policy saw, what it said, token by token, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tropism.record import Kind, Run
from tropism.view.words import Decode, news, pieces, say

AUTHORS = {
    "behavior_logp": "sampler",
    "proximal_logp": "trainer",
    "reference_logp": "reference",
    "teacher_logp": "teacher",
}
FAILURES = 12
"""Most reasons of failure that are listed."""
FAINT = 0.08
"""Shade of the smallest credit, as a share of the largest."""


def samples(run: Run, decode: Decode | None) -> str:
    """The best and the worst rollout of the first, the middle and the last recorded step."""
    kind: Kind = "train" if run.recorded("train") else "eval"
    steps = run.recorded(kind)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    shown = [html for step in chosen if (html := step_samples(run, step, kind, decode))]
    if not shown:
        return ""
    key = (
        '<p class="note">Tokens are shaded by their credit: <span class="key" style="--a:1">more of this</span> '
        '<span class="key blame" style="--a:1">less of this</span>. Rest the pointer on a token for its numbers.</p>'
    )
    return f"<h3>Sample rollouts</h3>{key if decode else ''}{''.join(shown)}"


def step_samples(run: Run, step: int, kind: Kind, decode: Decode | None) -> str:
    light = run.rollouts(step, kind, columns=["episode", "total", "failure"]).to_pylist()
    totals = {row["episode"]: row["total"] for row in light if row["failure"] is None and row["total"] is not None}
    if not totals:
        return ""
    best, worst = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
    table = run.rollouts(step, kind)
    cards: list[str] = []
    for episode, label in {worst: "Worst", best: "Best"}.items():
        places = [place for place, row in enumerate(light) if row["episode"] == episode]
        turns = sorted(table.take(places).to_pylist(maps_as_pydicts="strict"), key=lambda turn: turn["turn"] or 0)
        label = label if totals[best] > totals[worst] else "All rewards equal"
        cards.insert(0, rollout_card(turns, label, decode))
    name = f"Step {step}" if kind == "train" else f"Held-out play after step {step}"
    return f'<h4>{name} <small>{len(totals)} rollouts</small></h4><div class="pair">{"".join(cards)}</div>'


def rollout_card(turns: Sequence[Mapping[str, Any]], label: str, decode: Decode | None) -> str:
    first = turns[0]
    facts = [first["env"], f"seed {first['task_seed']}", f"group {first['group']}", f"sibling {first['sibling']}"]
    if first["seat"] is not None:
        facts.append(f"seat {first['seat']}")
    facts += [f"{name} {first[name]}" for name in ("domain", "level") if first[name]]
    parts = "".join(f"<li>{say(name)} <b>{signed(value)}</b></li>" for name, value in (first["rewards"] or {}).items())
    won = {True: '<span class="badge good">success</span>', False: '<span class="badge">no success</span>'}
    scale = max((abs(a) for turn in turns for a in turn["advantage"] or ()), default=0.0)
    body = "".join(
        turn_html(turn, seen, scale, decode, alone=len(turns) == 1)
        for turn, seen in zip(turns, news(turns), strict=True)
    )
    return (
        f'<article class="card"><header><b>{label}</b> <span class="total">reward {signed(first["total"])}</span> '
        f'{won.get(first["success"], "")}</header><p class="facts">{say(" · ".join(f for f in facts if f))}</p>'
        f'<ul class="parts">{parts}</ul>{body}</article>'
    )


def turn_html(
    turn: Mapping[str, Any], seen: Sequence[Mapping[str, str]], scale: float, decode: Decode | None, *, alone: bool
) -> str:
    heard = "".join(
        f'<div class="heard"><small>{say(said["role"] or "prompt")}</small><pre>{say(said["content"])}</pre></div>'
        for said in seen
    )
    number = "" if alone else f"turn {(turn['turn'] or 0) + 1} · "
    earned = f" · earned {signed(turn['reward'])}" if turn["reward"] and not alone else ""
    stop = turn["stop"] or ""
    cut = f' <span class="badge bad">{say(stop)}</span>' if stop not in ("", "finished") else ""
    words = tokens(turn, scale, decode) if decode and turn["action"] else say(turn["reply"] or "")
    told = f'<p class="feedback">{say(turn["feedback"])}</p>' if turn["feedback"] else ""
    ended = f" · {say(stop)}" if stop and not cut else ""
    return (
        f'<section class="turn">{heard}<div class="said"><small>{number}reply{ended}{earned}{cut}</small>'
        f"<pre>{words}</pre></div>{told}</section>"
    )


def tokens(turn: Mapping[str, Any], scale: float, decode: Decode) -> str:
    """The reply, a span per token, shaded by credit; hovering shows the token's log-probability under every author."""
    credit = turn["advantage"]
    shown = []
    for text, places in pieces(turn["action"], decode):
        facts = []
        if credit is not None:
            facts.append(f"advantage {signed(mean(credit, places))}")
        for column, author in AUTHORS.items():
            if turn[column] is not None:
                facts.append(f"{author} log-prob {sum(turn[column][place] for place in places):.3f}")
        for column in ("entropy", "value", "weight"):
            if turn[column] is not None:
                facts.append(f"{column} {mean(turn[column], places):.3g}")
        facts.append("token " + " ".join(str(turn["action"][place]) for place in places))
        share = mean(credit, places) / scale if credit is not None and scale > 0 else 0.0
        shade = f' style="--a:{max(abs(share), FAINT):.2f}"' if share else ""
        look = f' class="{"blame" if share < 0 else "credit"}"' if share else ""
        word = say(text) if text else '<i class="end">end</i>'
        shown.append(f'<span{look}{shade} title="{say(chr(10).join(facts))}">{word}</span>')
    return "".join(shown)


def failures(run: Run) -> str:
    """Why rollouts could not be played or scored: each reason, how often, and one that shows it."""
    clean = {line["step"] for line in run.metrics() if line.get("failures") == 0}
    counts: Counter[str] = Counter()
    example: dict[str, Mapping[str, Any]] = {}
    for step, row in failed(run, [step for step in run.recorded() if step not in clean]):
        counts[row["failure"]] += 1
        example.setdefault(row["failure"], {**row, "step": step})
    if not counts:
        return ""
    rows = []
    for reason, count in counts.most_common(FAILURES):
        row = example[reason]
        where = f"step {row['step']}, {row['env'] or 'env'} seed {row['task_seed']}, sibling {row['sibling']}"
        rows.append(
            f'<tr><td class="n">{count}</td><td>{say(reason)}</td><td>{say(where)}'
            f"<details><summary>what it was</summary><pre>{say(row['prompt'] or '')}</pre>"
            f"<pre>{say(row['reply'] or '(no reply)')}</pre></details></td></tr>"
        )
    rest = f"<p>{len(counts) - FAILURES} more reasons are in the record.</p>" if len(counts) > FAILURES else ""
    return (
        f"<h3>Failures <small>rollouts left out of training: {sum(counts.values())}</small></h3>"
        f'<div class="scroll"><table><tr><th class="n">times</th><th>reason</th><th>for example</th></tr>'
        f"{''.join(rows)}</table></div>{rest}"
    )


def failed(run: Run, steps: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(step, last recorded turn) of every failed rollout."""
    columns = ["episode", "failure", "env", "task_seed", "sibling", "prompt", "reply"]
    for step in steps:
        found = run.rollouts(step, columns=["failure"])["failure"]
        if found.null_count < len(found):
            rows = {row["episode"]: row for row in run.rollouts(step, columns=columns).to_pylist() if row["failure"]}
            yield from ((step, row) for row in rows.values())


def signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


def mean(values: Sequence[float], places: range) -> float:
    return sum(values[place] for place in places) / len(places)
