"""Line charts as SVG text, drawn by hand: no plotting library, no script, light and dark backgrounds alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tropism.view.words import say

Points = Sequence[tuple[float, "float | None"]]
"""(x, y) in order of x; y is None where nothing was measured, which leaves a gap in the line."""

COLOURS = ("#2f7ed8", "#e8731a", "#1fa06d", "#d6459b", "#8a6fe8", "#b08a00", "#17a2b8", "#8c6d5a")
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 26
LEGEND_LINE = 17
DOTS = 60
"""Most points of a series that get a dot with its numbers; a longer line has that many, evenly spread."""


def line_chart(title: str, series: Mapping[str, Points], *, width: int = 440, height: int = 230) -> str:
    """One chart of several lines. Hovering over a dot shows its numbers; the title is read out by screen readers."""
    kept = {name: clean(points) for name, points in series.items()}
    seen = [(x, y) for points in kept.values() for x, y in points if y is not None]
    legend = legend_lines(list(kept), width) if len(kept) > 1 else []
    height += LEGEND_LINE * len(legend)
    top = TOP + LEGEND_LINE * len(legend)
    name = say(title)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{name}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="11" fill="currentColor">',
        f"<title>{name}</title>",
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="600">{name}</text>',
        *legend,
    ]
    if not seen:
        parts.append(f'<text x="{width / 2}" y="{(top + height) / 2}" text-anchor="middle" opacity=".6">no data</text>')
        return "".join([*parts, "</svg>"])
    xticks = ticks([x for x, _ in seen], count=6, whole=all(x == int(x) for x, _ in seen))
    yticks = ticks([y for _, y in seen], count=5)
    xs, ys = [x for x, _ in seen], [y for _, y in seen] + yticks
    plot = Frame(min(xs), max(xs), min(ys), max(ys), width, height, top)
    parts += axes(plot, xticks, yticks)
    for index, (label, points) in enumerate(kept.items()):
        parts += line(plot, label, points, COLOURS[index % len(COLOURS)])
    return "".join([*parts, "</svg>"])


class Frame:
    """Where a point of the data stands on the picture."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, width: int, height: int, top: int) -> None:
        self.left, self.right, self.top, self.bottom = LEFT, width - RIGHT, top, height - BOTTOM
        self.x0, self.y0 = x0, y0
        self.xspan, self.yspan = (x1 - x0) or 0.0, (y1 - y0) or 0.0

    def x(self, value: float) -> float:
        share = (value - self.x0) / self.xspan if self.xspan else 0.5
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        share = (value - self.y0) / self.yspan if self.yspan else 0.5
        return round(self.bottom - share * (self.bottom - self.top), 1)


def clean(points: Points) -> list[tuple[float, float | None]]:
    """NaN and inf are missing values."""
    return [(x, y if y is not None and math.isfinite(y) else None) for x, y in points]


def ticks(values: Sequence[float], *, count: int, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover the values in about `count` steps."""
    low, high = min(values), max(values)
    if low == high:
        return [low] if whole else [low - (abs(low) or 1.0) * 0.5, low, low + (abs(low) or 1.0) * 0.5]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    found = [number * step for number in range(first, last + 1)]
    return [tick for tick in found if low <= tick <= high] if whole else found


def number(value: float) -> str:
    """Short: 0.25, 1.5e-05, 12k, 3.4M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.3g}" if abs(value) < 1000 or value != int(value) else f"{value:.0f}"


def axes(plot: Frame, xticks: Sequence[float], yticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in yticks:
        y = plot.y(tick)
        parts.append(
            f'<path d="M{plot.left} {y}H{plot.right}" stroke="currentColor" opacity="{0.35 if tick == 0 else 0.12}"/>'
            f'<text x="{plot.left - 6}" y="{y + 4}" text-anchor="end" opacity=".7">{number(tick)}</text>'
        )
    for tick in xticks:
        parts.append(
            f'<text x="{plot.x(tick)}" y="{plot.bottom + 17}" text-anchor="middle" opacity=".7">{number(tick)}</text>'
        )
    return parts


def line(plot: Frame, label: str, points: Sequence[tuple[float, float | None]], colour: str) -> list[str]:
    pieces: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{plot.x(x)} {plot.y(y)}")
    path = "".join("M" + "L".join(piece) for piece in pieces if len(piece) > 1)
    parts = []
    if path:
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.7" stroke-linejoin="round"/>')
    seen = [(x, y) for x, y in points if y is not None]
    every = max(1, math.ceil(len(seen) / DOTS))
    shown = seen[::every] + ([seen[-1]] if seen and (len(seen) - 1) % every else [])
    small = len(seen) > 25
    for x, y in shown:
        look = 'r="5" fill-opacity="0"' if small else 'r="2.6"'
        parts.append(
            f'<circle cx="{plot.x(x)}" cy="{plot.y(y)}" {look} fill="{colour}">'
            f"<title>{say(label)} = {y:.6g} at step {x:g}</title></circle>"
        )
    return parts


def legend_lines(names: Sequence[str], width: int) -> list[str]:
    """Coloured names, broken into lines by a generous guess of how wide a letter is."""
    lines, x, y = [""], float(LEFT), 32
    for index, name in enumerate(names):
        need = 26 + 6.4 * len(name)
        if x > LEFT and x + need > width:
            lines, x, y = [*lines, ""], float(LEFT), y + LEGEND_LINE
        colour = COLOURS[index % len(COLOURS)]
        lines[-1] += (
            f'<rect x="{x:.0f}" y="{y - 5}" width="12" height="3" rx="1.5" fill="{colour}"/>'
            f'<text x="{x + 16:.0f}" y="{y}" opacity=".85">{say(name)}</text>'
        )
        x += need
    return lines
