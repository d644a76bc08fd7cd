from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tropism.view.plots import line_chart, number, ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: str) -> tuple[list[str], list[tuple[float, float]]]:
    """The coloured lines and the dots of a chart, which must be well-formed XML."""
    root = ElementTree.fromstring(chart)
    lines = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.attrib["stroke"].startswith("#")]
    return lines, [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter(f"{SVG}circle")]


def test_a_rising_line_rises_on_the_picture_and_stays_inside_the_frame() -> None:
    (path,), dots = drawn(line_chart("reward", {"reward": [(step, step / 10) for step in range(10)]}))
    places = [tuple(map(float, pair.split())) for pair in path.removeprefix("M").split("L")]
    assert places == dots and len(places) == 10
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(places))
    assert all(0 < x < 440 and 0 < y < 230 for x, y in places)


def test_a_missing_value_is_a_gap_and_never_a_zero() -> None:
    points = [(1, 1.0), (2, 1.2), (3, None), (4, math.nan), (5, 1.1), (6, math.inf), (7, 1.0), (8, 1.2)]
    (path,), dots = drawn(line_chart("kl", {"kl": points}))
    assert path.count("M") == 2 and len(dots) == 5
    assert "nan" not in path and "inf" not in path


@pytest.mark.parametrize(
    "points", [[(3, 0.5)], [(3, 0.0)], [(1, 0.5), (2, 0.5), (3, 0.5)], [(1, -7e20), (2, 3e20)], [(0, 1e-12), (1, 0)]]
)
def test_one_point_and_constants_and_extremes_are_drawn_inside_the_frame(points: list[tuple[float, float]]) -> None:
    lines, dots = drawn(line_chart("loss", {"loss": points}))
    assert len(dots) == len(points) and len(lines) == (len(points) > 1)
    assert all(40 < x < 440 and 20 < y < 220 for x, y in dots)


def test_nothing_to_draw_says_so() -> None:
    for series in ({}, {"kl": []}, {"kl": [(1, None)]}):
        chart = line_chart("kl", series)
        assert "no data" in chart and drawn(chart) == ([], [])


def test_names_are_escaped_and_every_line_has_one() -> None:
    chart = line_chart("<b>", {"a<script>": [(1, 1)], 'b"&': [(1, 2)]})
    text = "".join(ElementTree.fromstring(chart).itertext())
    assert "<b>" in text and "a<script>" in text and 'b"&' in text
    assert "<script>" not in chart and "<b>" not in chart


def test_the_last_point_of_a_long_line_has_its_numbers() -> None:
    chart = line_chart("reward", {"reward": [(step, math.sin(step)) for step in range(1, 201)]})
    assert f"reward = {math.sin(200):.6g} at step 200" in chart
    assert len(re.findall("<circle", chart)) <= 62


@pytest.mark.parametrize(
    ("values", "count", "whole", "expected"),
    [
        ([0.0, 1.0], 5, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([-0.14, 0.71], 5, False, [-0.2, 0.0, 0.2, 0.4, 0.6, 0.8]),
        ([1, 3], 6, True, [1, 2, 3]),
        ([0, 200], 6, True, [0, 50, 100, 150, 200]),
        ([5], 6, True, [5]),
    ],
)
def test_ticks_are_round_and_cover_the_values(
    values: list[float], count: int, whole: bool, expected: list[float]
) -> None:
    assert ticks(values, count=count, whole=whole) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (1.5e-5, "1.5e-05"), (1234, "1234"), (12345, "12.3k"), (3.4e6, "3.4M"), (0, "0"), (-2e9, "-2G")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
