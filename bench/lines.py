"""How much one must read to know GRPO end to end, from the prompt to the updated weights: python bench/lines.py

Counted are all lines of the files on that path, and beside them lines of code: no blanks, comments and docstrings.
"""

from __future__ import annotations

import ast
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
OUTSIDE = "config, recipe, render, model, optim, record, checkpoint"
PEERS = {"TRL": 5419, "prime-rl": 5427, "verl": 7832, "nanochat (one method)": 442}


def code_lines(source: str) -> int:
    """Lines that hold a token of code: docstrings, comments and blanks do not count."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def main() -> int:
    missing = [name for name in PATH if not (ROOT / name).exists()]
    if missing:
        print(f"not there: {', '.join(missing)}. The path of GRPO has moved: correct PATH in this file.")
        return 1
    total = code = 0
    print(f"{'lines':>7}{'code':>7}")
    for name in PATH:
        source = (ROOT / name).read_text()
        here, of_code = len(source.splitlines()), code_lines(source)
        total, code = total + here, code + of_code
        print(f"{here:7,}{of_code:7,}  {name}")
    print(f"{total:7,}{code:7,}  GRPO, prompt to updated weights, on {len(PATH)} files (goal: {GOAL:,} lines)")
    print(f"\nNot counted, here or there: {OUTSIDE}.")
    print(
        "The same path elsewhere, all lines: " + ", ".join(f"{name} {lines:,}" for name, lines in PEERS.items()) + "."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
