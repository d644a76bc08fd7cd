"""Run as a script, by `answer.Judge`: reads [answer, truth] as JSON, a line each; writes true or false, a line each.

The time limits of math-verify are off, since they need signals; whoever started this process ends it.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        answer, truth = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
        print(json.dumps(bool(verify(truth, answer, timeout_seconds=None))), flush=True)


if __name__ == "__main__":
    main()
