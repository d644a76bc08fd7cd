"""The `tropism` command: every error of ours in one line, every other one in a file, and an honest exit code.

0 done · 1 failed · 2 usage or config · 3 a start-up check failed · 4 stopped by a guard · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from tropism.errors import TropismError

LOG = Path("tropism-error.log")


def main() -> None:
    debug = "--debug" in sys.argv[1:] or os.environ.get("TROPISM_DEBUG", "") not in ("", "0")
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        from tropism.cli.app import app

        app(prog_name="tropism")
    except TropismError as error:
        if debug:
            traceback.print_exc()
        print(f"tropism: {error}", file=sys.stderr)
        sys.exit(error.code)
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        print(
            f"tropism: {type(error).__name__}: {said}" if said else f"tropism: {type(error).__name__}", file=sys.stderr
        )
        print(where_it_broke(debug), file=sys.stderr)
        sys.exit(1)


def where_it_broke(debug: bool) -> str:
    """The traceback, or the path of the file that it was written to."""
    whole = traceback.format_exc()
    if debug:
        return whole
    try:
        LOG.write_text(f"tropism {' '.join(sys.argv[1:])}\n\n{whole}", encoding="utf-8")
    except OSError:  # a full disk may be what broke
        return whole
    return f"This is not an error that tropism knows. The traceback is in {LOG.resolve()}; --debug shows it here."
