"""How much one must read: python bench/lines.py

First GRPO end to end, from the prompt to the updated weights: all lines of the files on that path, and beside them
lines of code: no blanks, comments and docstrings. Then every other method: lines of code that grpo.py does not have.
"""

from __future__ import annotations

import ast
import difflib
import io
import sys
import tokenize
from pathlib import Path

GOAL = 1000
ROOT = Path(__file__).parents[1] / "src" / "tropism"
PATH = [
    "types.py",
    "rollout/play.py",
    "rollout/sampler.py",
    "training/collate.py",
    "training/learn.py",
    "training/update.py",
    "methods/grpo.py",
    "maths/logp.py",
    "maths/advantage.py",
    "maths/surrogate.py",
    "maths/reduce.py",
]
OUTSIDE = "config, recipe, render, model, optim, record, checkpoint, decoders (stream, lean), head in chunks (speak)"
PEERS = {"TRL": 5419, "prime-rl": 5427, "verl": 7832, "nanochat (one method)": 442}


def code_lines(source: str) -> list[int]:
    """Numbers of the lines that hold a token of code: docstrings, comments and blanks do not count."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return sorted(lines - docs)


def added(source: str, base: str) -> int:
    """Lines of code in `source` that a diff against `base` shows as new."""
    old, new = ([text.splitlines()[number - 1] for number in code_lines(text)] for text in (base, source))
    return sum(line.startswith("+ ") for line in difflib.ndiff(old, new))


def main() -> int:
    missing = [name for name in PATH if not (ROOT / name).exists()]
    if missing:
        print(f"not there: {', '.join(missing)}. The path of GRPO has moved: correct PATH in this file.")
        return 1
    total = code = 0
    print(f"{'lines':>7}{'code':>7}")
    for name in PATH:
        source = (ROOT / name).read_text()
        here, of_code = len(source.splitlines()), len(code_lines(source))
        total, code = total + here, code + of_code
        print(f"{here:7,}{of_code:7,}  {name}")
    print(f"{total:7,}{code:7,}  GRPO, prompt to updated weights, on {len(PATH)} files (goal: {GOAL:,} lines)")
    print(f"\nNot counted, here or there: {OUTSIDE}.")
    files = {path.stem: path.read_text() for path in sorted((ROOT / "methods").glob("*.py"))}
    print("\nLines of code that a method adds to grpo.py:")
    for name, source in files.items():
        if name not in ("__init__", "checked", "grpo"):
            print(f"{added(source, files['grpo']):7,}  {name}")
    print(
        "The same path elsewhere, all lines: " + ", ".join(f"{name} {lines:,}" for name, lines in PEERS.items()) + "."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
