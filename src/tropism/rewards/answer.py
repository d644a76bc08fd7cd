"""Is the answer right? As text, or as mathematics.

math-verify decides what plain comparison cannot, in a process of its own: its time limit is a signal, which works in
the main thread only, and where it does not work every answer is wrong without a word, or the run hangs.
"""

from __future__ import annotations

import atexit
import json
import re
import select
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from tropism.errors import ConfigError

NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?")
BRACE = re.compile(r"\\boxed\s*\{|[{}]")
PLAIN = re.compile(r"[-+]?[0-9]{1,60}(?:\.[0-9]{1,60})?(?:/[0-9]{1,60})?")
MISSING = "math_answer needs math-verify, for answers that are not numbers: pip install 'tropism[tasks]'."
LONGEST = 2000
"""Characters of an answer; what is longer is wrong, for no reference is."""


def exact_match(reply: str, truth: object) -> float:
    """1 if the reply is the reference, up to space around it."""
    return float(reply.strip() == str(truth).strip())


def math_answer(reply: str, truth: object) -> float:
    r"""1 if the reply's answer equals the reference as mathematics.

    The answer is what stands in the last \boxed{}, else after the last ####, else the last number. The reference may be
    written the same way (GSM8K's solutions end in "#### 72"), or is the whole text.

    Raises:
        TimeoutError: the comparison took too long or crashed. Not a 0: it could not be scored.
        ValueError: the reference is empty.
    """
    wanted = marked(str(truth)) or str(truth).strip()
    if not wanted:
        raise ValueError("the reference answer is empty")
    answer = marked(reply)
    if answer is None:
        numbers = NUMBER.findall(reply)
        answer = numbers[-1] if numbers else ""
    if not answer or len(answer) > LONGEST:
        return 0.0
    if answer == wanted:
        return 1.0
    left, right = plain_number(answer), plain_number(wanted)
    if left is not None and right is not None:
        return float(left == right)
    return float(JUDGE.equal(answer, wanted))


def marked(text: str) -> str | None:
    r"""What stands in the last closed \boxed{}, else after the last ####; None if there is neither."""
    opened: list[tuple[bool, int]] = []
    found = None
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace[0] != "{", brace.end()))
        elif opened:
            boxed, start = opened.pop()
            found = text[start : brace.start()].strip() if boxed else found
    if found is not None:
        return found
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip()
    return None


def plain_number(text: str) -> Fraction | None:
    r""" "1,234", "$5", "0.50", "1/2" as a number; None if it is anything else."""
    text = text.strip().strip("$").rstrip(".").replace(",", "").replace(" ", "")
    if not PLAIN.fullmatch(text):
        return None
    top, _, bottom = text.partition("/")
    return None if bottom and not int(bottom) else Fraction(top) / Fraction(bottom or 1)


class Judge:
    """math-verify in a process of its own, started when first needed and again after it was stopped."""

    def __init__(self, limit: float = 5.0, start: float = 60.0) -> None:
        self.limit, self.start = limit, start
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def equal(self, answer: str, truth: str) -> bool:
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            process.stdin.write(json.dumps([answer, truth]) + "\n")
            process.stdin.flush()
            said = self._line(process, self.limit)
        if said is None:
            raise TimeoutError(
                f"comparing {answer!r:.60} with {truth!r:.60} took more than {self.limit:g} s, or crashed"
            )
        return bool(json.loads(said))

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("math_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            if self._line(self.process, self.start) != "ready":
                raise ConfigError(MISSING)
        return self.process

    def _line(self, process: subprocess.Popen[str], limit: float) -> str | None:
        """The worker's next line; None, and no worker, if it takes too long or died."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], limit)
        line = process.stdout.readline().strip() if ready else ""
        if not line:
            self.stop()
        return line or None


JUDGE = Judge()
atexit.register(JUDGE.stop)
