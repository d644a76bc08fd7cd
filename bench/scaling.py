"""How the cost of a token grows with groups, length and parameters: python bench/scaling.py [--json]

A step of GRPO (`bench/step.py`'s, nothing left out) in one thread, in milliseconds for a thousand new tokens; one thing
grows at a time. The exponent of each series is the slope of log cost over log size: 0 is a cost that does not grow, and
the parameters' would be 1 if products were all there is.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import step

SERIES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "groups": tuple(("0.5M", groups, 48) for groups in (8, 16, 32, 64)),
    "length": tuple(("0.5M", 16, length) for length in (32, 64, 128, 256)),
    "parameters": tuple((size, 16, 48) for size in ("0.5M", "1M", "4M")),
}
"""What grows -> (size, groups, most tokens of a reply)."""


def cost(size: str, groups: int, length: int, turns: int, folder: Path) -> float:
    """Milliseconds for a thousand tokens."""
    settings = {
        "path": step.model(size, folder),
        "compute": "float32",
        "folder": str(folder / f"{size}-{groups}-{length}"),
    }
    more = {"whole": True, "groups": groups, "reply": length}
    found = peers.raced({"tropism": (step.tropism, settings | more)}, 1, turns)["tropism"]
    return statistics.median(1e6 * turn["step"] / turn["tokens"] for turn in found)


def slope(points: list[tuple[float, float]]) -> float:
    """Of a straight line through the logarithms, by least squares."""
    xs, ys = ([math.log(point[k]) for point in points] for k in (0, 1))
    return statistics.linear_regression(xs, ys).slope


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    sizes, known = {"0.5M": 0.43, "1M": 0.93, "4M": 4.0}, dict[tuple[str, int, int], float]()
    with tempfile.TemporaryDirectory() as folder:
        for name, cases in SERIES.items():
            points = []
            for size, groups, length in cases:
                case = (size, groups, length)
                found = known[case] = known.get(case) or cost(*case, given.turns, Path(folder))
                grown = {"groups": groups, "length": length, "parameters": sizes[size]}[name]
                points.append((float(grown), found))
                rows.append({"grows": name, "size": size, "groups": groups, "length": length, "ms": round(found)})
                rows[-1]["exponent"] = ""
            rows[-1]["exponent"] = f"{slope(points):.2f}"
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
