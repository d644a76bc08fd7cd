"""Learning curves of several seeds: what bench/signals.py prints of its runs."""

from __future__ import annotations

import random
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tropism.view.plots import line_chart

Line = dict[str, Any]
"""One run: label, rate, seed, success of every step, success held out."""
Arms = Mapping[str, Sequence[Line]]
"""Label -> its runs."""
WINDOW = 5
"""Steps that are averaged where a curve is drawn or compared."""


def along(line: Line) -> float:
    """Mean success along the way, which is the area under the learning curve."""
    return statistics.fmean(line["success"])


def best_rate(lines: Sequence[Line], label: str, rates: Sequence[float], seeds: Sequence[int]) -> float | None:
    """The learning rate with the best mean success along the way on these seeds; None before all were tried."""
    tuned = [line for line in lines if line["label"] == label and line["seed"] in seeds]
    tried = {rate: [along(line) for line in tuned if line["rate"] == rate] for rate in rates}
    if any(len(values) < len(seeds) for values in tried.values()):
        return None
    return max(tried, key=lambda rate: statistics.fmean(tried[rate]))


def chosen(lines: Sequence[Line], rates: Mapping[str, float], seeds: Sequence[int]) -> Arms:
    """The runs at the chosen rate, of labels that have any."""
    found = {
        label: [line for line in lines if (line["label"], line["rate"]) == (label, rate) and line["seed"] in seeds]
        for label, rate in rates.items()
    }
    return {label: runs for label, runs in found.items() if runs}


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """The middle 95 % of the means of bootstrap samples."""
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(draws))
    return means[draws // 40], means[-draws // 40]


def with_interval(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{statistics.fmean(values):.3f} ({low:.3f} to {high:.3f})"


def reaching(success: Sequence[float], level: float, window: int = WINDOW) -> int | None:
    """Steps until the mean of `window` steps reaches the level."""
    for end in range(window, len(success) + 1):
        if statistics.fmean(success[end - window : end]) >= level:
            return end
    return None


def windows(success: Sequence[float]) -> list[float]:
    """Means of windows that do not overlap; a rest at the end is left out."""
    return [statistics.fmean(success[k : k + WINDOW]) for k in range(0, len(success) - WINDOW + 1, WINDOW)]


def band(runs: Sequence[Line], size: int, draws: int = 2000) -> list[tuple[float, float]]:
    """Around the mean curve of these runs, window by window: where 95 % of bootstrap samples of `size` of them have
    their whole mean curve. So other `size` seeds of the same lie outside anywhere at all once in twenty times."""
    curves, chance = [windows(line["success"]) for line in runs], random.Random(0)
    middle = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    spread = [statistics.pstdev(values) for values in zip(*curves, strict=True)]

    def farthest(sample: Sequence[Sequence[float]]) -> float:
        means = map(statistics.fmean, zip(*sample, strict=True))
        return max(abs(mean - m) / s if s else 0.0 for mean, m, s in zip(means, middle, spread, strict=True))

    width = sorted(farthest(chance.choices(curves, k=size)) for _ in range(draws))[-(draws // 20)]
    return [(m - width * s, m + width * s) for m, s in zip(middle, spread, strict=True)]


def below(runs: Sequence[Line], others: Sequence[Line]) -> list[int]:
    """Steps at which the mean curve lies below where that of as many of the others would, window by window."""
    mine = [statistics.fmean(values) for values in zip(*(windows(line["success"]) for line in runs), strict=True)]
    theirs = band(others, len(runs))
    return [WINDOW * (k + 1) for k, (mean, (low, _)) in enumerate(zip(mine, theirs, strict=True)) if mean < low - 1e-9]


def table(arms: Arms, level: float) -> Iterator[str]:
    """A row per arm: the rate that was chosen, and over seeds the success along the way, at the end, the worst."""
    yield "| method | learning rate | along the way (95 %) | held out (95 %) | worst seed | steps to reach | tokens |"
    yield "|---|---|---|---|---|---|---|"
    for label, runs in arms.items():
        ends = [line["held_out"][-1] for line in runs]
        means = " | ".join(with_interval(values) for values in ([along(line) for line in runs], ends))
        steps = statistics.median_high([reaching(line["success"], level) or 10**6 for line in runs])
        lengths = statistics.fmean(line["completions/mean_length"][1] for line in runs)
        reached = steps if steps < 10**6 else "never"
        yield f"| {label} | {runs[0]['rate']:g} | {means} | {min(ends):.3f} | {reached} | {lengths:.0f} |"


def second_table(arms: Arms, base: Sequence[Line], name: str = "grpo") -> Iterator[str]:
    """A row per arm: trust in its teacher, how its style moved (and in the seed that moved most), where its curve lies
    below those of the base, and by how much it succeeds more along the way, seed by seed."""
    columns = "mean trust | most trust | slope | commas | collapsed"
    yield f"| method, teacher | {columns} | steps below {name} | over {name} (95 %) |"
    yield "|---|---|---|---|---|---|---|---|"
    for label, runs in arms.items():
        trust = [line["gate/trust"] for line in runs if "gate/trust" in line]
        slopes = [line["gate/slope"][-1] for line in runs if "gate/slope" in line]
        told = (
            [f"{statistics.fmean(map(statistics.fmean, trust)):.2f}", f"{max(map(max, trust)):.2f}"]
            if trust
            else ["", ""]
        )
        told.append(f"{statistics.fmean(slopes):.2f}" if slopes else "")
        first, last = ([share_of_commas(line, k) for line in runs] for k in (0, 1))
        _, farthest = max(zip(first, last, strict=True), key=lambda ends: abs(ends[1] - ends[0]))
        told.append(f"{statistics.fmean(first):.2f} to {statistics.fmean(last):.2f} ({farthest:.2f})")
        told.append(str(sum(line["held_out"][-1] < 0.5 for line in runs)))
        told.append(", ".join(map(str, below(runs, base))) or "none")
        told.append(more(runs, base) if label != name else "")
        yield f"| {label} | {' | '.join(told)} |"


def more(runs: Sequence[Line], base: Sequence[Line]) -> str:
    """By how much mean success along the way differs, over seeds that both have."""
    other = {line["seed"]: along(line) for line in base}
    apart = [along(line) - other[line["seed"]] for line in runs if line["seed"] in other]
    low, high = interval(apart)
    return f"{statistics.fmean(apart):+.3f} ({low:+.3f} to {high:+.3f})"


def long_table(arms: Arms, base: str = "grpo") -> Iterator[str]:
    """A row per arm of long runs: how it stands late, its lowest window once it has learned, and where it and the base
    lie below each other's band."""
    yield f"| method | held out, last five | lowest window after 15 steps | below {base} | {base} below it | windows |"
    yield "|---|---|---|---|---|---|"
    for label, runs in arms.items():
        means = [statistics.fmean(values) for values in zip(*(windows(line["success"]) for line in runs), strict=True)]
        late = statistics.fmean(value for line in runs for value in line["held_out"][-5:])
        lost, won = (len(below(*pair)) for pair in ((runs, arms[base]), (arms[base], runs)))
        yield f"| {label} | {late:.3f} | {min(means[15 // WINDOW :]):.3f} | {lost} | {won} | {len(means)} |"


def spent(lines: Sequence[Line]) -> str:
    """What all runs took, those that rates were tried on too."""
    minutes = [line["minutes"] for line in lines]
    middle, most = statistics.median(minutes), max(minutes)
    return (
        f"{len(lines)} runs, {sum(minutes) / 60:.1f} hours of a core; median {middle:.1f} minutes, longest {most:.1f}"
    )


def share_of_commas(line: Line, which: int) -> float:
    """Of the gaps between steps, before (0) or after (1) the run; where no gap was written, none is a comma."""
    return float(line["eval/commas"][which] / (line["eval/gaps"][which] or 1.0))


def figure(title: str, arms: Arms, base: str = "grpo") -> str:
    """Mean success over steps: panels of a few arms each, two side by side, the base in every one of them."""
    series = {}
    for label, runs in arms.items():
        means = [statistics.fmean(values) for values in zip(*(windows(line["success"]) for line in runs), strict=True)]
        series[label] = [(WINDOW * (k + 1), mean) for k, mean in enumerate(means)]
    charts = []
    for name, labels in panels([label for label in series if label != base]).items():
        shown = {label: series[label] for label in ([base] if base in series else []) + labels}
        charts.append(line_chart(f"{title}{name}", shown, width=520, height=300))
    return side_by_side(charts or [line_chart(title, series)])


def panels(labels: Sequence[str]) -> dict[str, list[str]]:
    """Arms whose second word is that of others too by that word, the rest five at a time."""
    kinds = Counter(label.partition(" ")[2] for label in labels)
    found: dict[str, list[str]] = {}
    rest = 0
    for label in labels:
        kind = label.partition(" ")[2]
        shared = kind and kinds[kind] > 1
        found.setdefault(f": {kind}" if shared else f" ({rest // 5 + 1})", []).append(label)
        rest += not shared
    return found


def side_by_side(charts: Sequence[str]) -> str:
    """One SVG of several, two in a row."""
    sizes = [tuple(map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', chart).groups())) for chart in charts]  # type: ignore[union-attr]
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    placed = [
        chart.replace(
            "<svg ", f'<svg x="{width * (n % 2)}" y="{height * (n // 2)}" width="{width}" height="{height}" ', 1
        )
        for n, chart in enumerate(charts)
    ]
    rows = (len(charts) + 1) // 2
    size = f'viewBox="0 0 {width * min(2, len(charts))} {height * rows}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(placed)}</svg>'
