"""One page about a run, made from its record alone: no network, no script, nothing outside the file.

Left out: what a picture cannot settle. The record itself is beside the page, one row per turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tropism.record import Run, write
from tropism.view.plots import line_chart
from tropism.view.samples import failures, samples
from tropism.view.words import Decode, say

Lines = Sequence[Mapping[str, "float | None"]]

CHARTS: tuple[tuple[str, str], ...] = (
    ("Reward", r"reward|eval/reward"),
    ("Success", r"success|eval/success"),
    ("Held-out play", r"eval/(?!reward$|success$).*"),
    ("Parts of the reward", r"rewards/.*/mean"),
    ("Loss", r"loss"),
    ("Entropy (nats)", r"entropy"),
    ("Gradient norm", r"grad_norm"),
    ("Divergence from the reference (nats)", r"kl"),
    ("Reply length (tokens)", r"completions/mean_length"),
    ("Groups that say nothing (share)", r"frac_reward_zero_std"),
    ("Seconds per step", r"time/.*"),
)
"""Title -> pattern of the metric names that share the chart; what fits none goes under "All other metrics"."""


def write_report(runs: Sequence[Run], path: Path, decode: Decode | None = None) -> Path:
    """Write the page of one run, or of the stages of a run in their order.

    Args:
        decode: token ids -> text; with it replies are shown token by token, shaded by credit.
    """
    config = runs[0].config
    name = str(config.get("name") or runs[0].path.resolve().parent.name)
    stages = [stage(run, decode, alone=len(runs) == 1) for run in runs]
    links = " ".join(f'<a href="#{say(run.path.name)}">{say(run.path.name)}</a>' for run in runs)
    body = [
        f"<header><h1>{say(name)}</h1><nav>{links} <a href='#settings'>settings</a></nav></header>",
        *(before_after(run.notes().get("table")) for run in runs),
        matrix(runs),
        *stages,
        settings(runs),
        f"<footer>Made by tropism from the record in {say(', '.join(str(run.path) for run in runs))}.</footer>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{say(name)} · tropism</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write(path, page.encode())
    return path


def stage(run: Run, decode: Decode | None, *, alone: bool) -> str:
    lines, name = run.metrics(), run.path.name
    steps = max((int(line["step"] or 0) for line in lines), default=0)
    main, rest = charts(lines)
    more = f'<details><summary>All other metrics</summary><div class="charts">{rest}</div></details>' if rest else ""
    curves = f'<div class="charts">{main}</div>{more}' if main or rest else "<p>No step has finished yet.</p>"
    title = "Learning" if alone else f"Stage {say(name)}"
    return (
        f'<section id="{say(name)}"><h2>{title} <small>{steps} step{"s" * (steps != 1)}</small></h2>{curves}'
        f"{samples(run, decode)}{failures(run)}</section>"
    )


def charts(lines: Lines) -> tuple[str, str]:
    """SVG of the charts that everybody reads, and of all the rest."""
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    main = []
    for title, pattern in CHARTS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        names = [name for name in names if name not in found]
        main += [picture(title, group, lines) for group in by_size(found, lines)]
    prefixes = dict.fromkeys(name.split("/")[0] for name in names)
    rest = []
    for prefix in prefixes:
        together = [name for name in names if name.split("/")[0] == prefix]
        rest += [picture(prefix, group, lines) for group in by_size(together, lines)]
    return "".join(main), "".join(rest)


def by_size(names: Sequence[str], lines: Lines) -> list[list[str]]:
    """Shares and rewards within [-1, 1] go on one chart, everything larger on its own; seconds stay together."""
    if all(name.startswith("time/") for name in names):
        return [list(names)] if names else []
    small = [name for name in names if all(abs(line.get(name) or 0.0) <= 1.05 for line in lines)]
    return ([small] if small else []) + [[name] for name in names if name not in small]


def picture(title: str, names: Sequence[str], lines: Lines) -> str:
    series = {name: [(line["step"] or 0.0, line[name]) for line in lines if name in line] for name in names}
    only = names[0] if len(names) == 1 else ""
    shown = title if not only or "/" not in only else f"{title}: {only}"
    return f"<figure>{line_chart(shown, series)}</figure>"


def before_after(table: Mapping[str, Any] | None) -> str:
    """The note `table`: {"columns": […], "rows": [[…], …]}."""
    return titled_table("Before and after", table["columns"], table["rows"]) if table else ""


def matrix(runs: Sequence[Run]) -> str:
    """What each stage did to what others had taught: held-out numbers that several stages measured, before its first
    step and after its last. Not those that are another thing in every stage, such as the reward."""
    found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for run in runs:
        lines = [line for line in run.metrics() if any(name.startswith("eval/") for name in line)]
        if len(lines) > 1:
            found[run.path.name] = lines[0], lines[-1]
    rows = []
    for name in dict.fromkeys(name for _, after in found.values() for name in after if name.startswith("eval/")):
        told = {stage: (a[name], b[name]) for stage, (a, b) in found.items() if name in a and name in b}
        if len(told) > 1 and not re.match(r"eval/(reward|failures|loss|success|entropy|pass@|greedy/|kl/)", name):
            values = [" → ".join(map(cell, told[stage])) if stage in told else None for stage in found]
            rows.append([name.removeprefix("eval/"), *values])
    return titled_table("What each stage did to the others' lessons", ["held out", *found], rows) if rows else ""


def titled_table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [cells("th", columns), *(cells("td", row) for row in rows)]
    return f'<section><h2>{title}</h2><div class="scroll"><table>{"".join(lines)}</table></div></section>'


def cells(tag: str, values: Sequence[Any]) -> str:
    """A row of a table; every column but the first holds numbers."""
    looks = ["", *[" class=n"] * len(values)]
    return f"<tr>{''.join(f'<{tag}{look}>{cell(v)}</{tag}>' for look, v in zip(looks, values, strict=False))}</tr>"


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else say(str(value))


def settings(runs: Sequence[Run]) -> str:
    """config.yaml as a tree; stages of one run share it."""
    configs: list[tuple[str, dict[str, Any]]] = []
    for run in runs:
        config = run.config
        if config and all(config != known for _, known in configs):
            configs.append((run.path.name, config))
    shown = []
    for name, config in configs:
        versions = config.get("versions") or {}
        seeds = dict(walk(config, lambda key: key == "seed" or key.endswith("_seed")))
        facts = f"<div class='facts3'>{facts_table('Seeds', seeds)}{facts_table('Versions', versions)}</div>"
        rest = {key: value for key, value in config.items() if key != "versions"}
        head = f"<h3>{say(name)}</h3>" if len(configs) > 1 else ""
        shown.append(f"{head}{facts}{tree(rest)}")
    nothing = "<p>This record has no config.yaml.</p>"
    return f'<section id="settings"><h2>Settings</h2>{"".join(shown) or nothing}</section>'


def facts_table(title: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{cell(name)}</td><td class=n>{cell(value)}</td></tr>" for name, value in facts.items())
    return f"<table><tr><th colspan=2>{title}</th></tr>{rows}</table>" if rows else ""


def walk(value: Any, wanted: Callable[[str], bool], at: str = "") -> list[tuple[str, Any]]:
    """(path, value) of the leaves whose key is wanted."""
    if isinstance(value, list):
        value = {(item.get("name", n) if isinstance(item, dict) else n): item for n, item in enumerate(value)}
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        here = f"{at}.{key}" if at else str(key)
        found += walk(item, wanted, here) if isinstance(item, dict | list) else [(here, item)] * wanted(str(key))
    return found


def tree(value: Any) -> str:
    """Nested settings; what has settings below it can be folded."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    rows = []
    for key, item in items:
        label = say(str(item.get("name", key)) if isinstance(value, list) and isinstance(item, dict) else str(key))
        if isinstance(item, dict | list) and item:
            inner = tree(item) if any(isinstance(i, dict | list) for i in item) or isinstance(item, dict) else ""
            if inner:
                rows.append(f"<li><details open><summary>{label}</summary>{inner}</details></li>")
                continue
            item = ", ".join(map(str, item))
        empty = item in ("", None) or item in ({}, [])
        rows.append(f"<li>{label} <code>{'–' if empty else say(str(item))}</code></li>")
    return f'<ul class="tree">{"".join(rows)}</ul>'


STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2733;--dim:#667380;--line:#dfe4ea;--card:#f7f9fb;--good:22,150,80;
--bad:214,60,60;--accent:#2f7ed8}
@media(prefers-color-scheme:dark){:root{--paper:#14181d;--ink:#dde3ea;--dim:#8d99a6;--line:#2c343d;--card:#1b2127}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:0 24px 48px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
body>header{display:flex;justify-content:space-between;align-items:baseline;flex-wrap:wrap;gap:8px;
border-bottom:1px solid var(--line);padding:20px 0 12px}
h1{margin:0;font-size:26px}h2{margin:36px 0 12px;font-size:20px}h3{margin:28px 0 6px;font-size:16px}
h4{margin:18px 0 8px;font-size:14px}small{color:var(--dim);font-weight:400;font-size:12.5px}
a{color:var(--accent);text-decoration:none;margin-left:12px}.note,.facts{color:var(--dim);margin:4px 0;font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:14px}
figure{margin:0;border:1px solid var(--line);border-radius:8px;padding:8px;background:var(--card)}
.chart{width:100%;height:auto;display:block}
details>summary{cursor:pointer;color:var(--dim);margin:10px 0 6px}
.tree details>summary{color:var(--ink);margin:0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 18px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;font-size:13px;color:var(--dim)}.n{text-align:right}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr));gap:14px;align-items:start}
.card{border:1px solid var(--line);border-radius:8px;padding:12px 14px;background:var(--card);min-width:0}
.card header{display:flex;gap:10px;align-items:baseline}
.total{font-variant-numeric:tabular-nums}.facts{overflow-wrap:anywhere}
.badge{font-size:12px;padding:1px 8px;border-radius:9px;border:1px solid var(--line);color:var(--dim)}
.badge.good{color:rgb(var(--good));border-color:rgb(var(--good))}
.badge.bad{color:rgb(var(--bad));border-color:rgb(var(--bad))}
.parts{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0 0 6px;padding:0;font-size:13px}
.turn{border-top:1px solid var(--line);padding:8px 0 4px;display:flex;flex-wrap:wrap;gap:2px 28px}
.heard{max-width:100%}.said{flex:1 1 300px;min-width:0;align-self:start}.feedback{flex-basis:100%}
pre{margin:2px 0 6px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:340px;overflow-y:auto;
font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
.heard pre{color:var(--dim)}.said{border-left:3px solid var(--accent);padding-left:10px}
.said span,.key{border-radius:2px}
.credit,.key{background:rgba(var(--good),calc(var(--a)*.42))}
.blame,.key.blame{background:rgba(var(--bad),calc(var(--a)*.42))}
.key{padding:0 6px}.end{font-size:11px;color:var(--dim);padding:0 3px}
.feedback{margin:2px 0 4px;padding-left:13px;font-style:italic;font-size:13px;white-space:pre-wrap}
.facts3{display:flex;flex-wrap:wrap;gap:12px 64px;margin-bottom:14px;align-items:start}
.tree{list-style:none;margin:0;padding-left:18px;font-size:14px}.tree code{color:var(--accent);margin-left:6px}
section>.tree{padding-left:0;columns:2 320px}
code{font:13px ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
footer{margin-top:40px;color:var(--dim);font-size:13px;border-top:1px solid var(--line);padding-top:10px}
"""
