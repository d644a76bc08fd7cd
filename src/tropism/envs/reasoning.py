"""reasoning-gym's procedural data sets as one-turn tasks: compact prompts, levels, and grading without its holes.

What is done differently from its own use, and why:

- Item i of a data set is drawn from Random(seed + i), so data sets of neighbouring seeds share almost all their items.
  Here the text of the question decides, by hash, whether it may be trained on; the splits cannot share a question.
- Its default grader pays for substrings ("-6" for "6" gives 0.5), and some graders pay for anything (`nan` in
  complex_arithmetic, any text in game_of_life_halting) or raise on junk. Here an answer is right if it equals the
  reference; only where many answers are right is the data set's grader asked, guarded, and only full marks count.
- Four fifths of a question are fixed English. `compact` leaves what varies: `4+7-2=`.

Stojanovski et al. 2025, Reasoning Gym, arXiv:2505.24760.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from tropism.errors import ConfigError
from tropism.load import hint
from tropism.types import Ask, Task, seed_of

SUFFIX = "\nGive the final answer as [answer]."


def _tight(match: re.Match[str]) -> str:
    return match[1].replace(" ", "") + "="


COMPACT: dict[str, tuple[str, Callable[[re.Match[str]], str]]] = {
    "chain_sum": (r"problem: (.+?) ?=$", _tight),
    "products": (r"multiplication: (.+?)\. Give", _tight),
    "basic_arithmetic": (r"([-(\d][-+*/() \d]*)(?:\.|\?| =|$)", _tight),
    "gcd": (r"numbers: ([\d, ]+?)\.", lambda m: f"gcd {m[1].replace(' ', '')}="),
    "lcm": (r"numbers: ([\d, ]+)$", lambda m: f"lcm {m[1].replace(' ', '')}="),
    "spell_backward": (r": (\S+)$", lambda m: f"{m[1]}<"),
}
"""Data set -> what varies in its question, and how to write it."""

MANY_RIGHT = {
    *("boxnet", "countdown", "graph_color", "intermediate_integration", "jugs", "knight_swap", "n_queens"),
    *("palindrome_generation", "propositional_logic", "puzzle24", "quantum_lock", "rubiks_cube", "rush_hour"),
    *("shortest_path", "simple_integration", "sokoban", "tower_of_hanoi", "word_ladder"),
}
"""Data sets whose reference is one right answer of many, or missing: their own grader must decide."""

HANGING = {"number_sequence": 2, "countdown": 2, "caesar_cipher": 2, "sokoban": 0}
"""Data set -> the level from which its generator retries without end, or asserts."""

LISTED = {"acre", "gsm_symbolic", "list_functions", "word_ladder"}
"""Data sets that are as long as they say, 500 items; others make item i when asked for it, whatever i."""

SIZE = 2**31
"""Items of any other data set; item i takes seed i, and numpy takes seeds below 2**32."""

TRIES = 1000
"""Items looked at for one of the right split; also the distance between the items of neighbouring tasks."""


class Reasoning:
    """A source: task n is an item of a reasoning-gym data set, the same for the same (split, seed, options)."""

    def __init__(
        self,
        split: Literal["train", "test"],
        seed: int,
        /,
        *,
        dataset: str = "chain_sum",
        level: int = 0,
        config: Mapping[str, Any] | None = None,
        compact: bool = True,
        worked: float = 0.0,
        holdout: float = 0.1,
    ) -> None:
        """
        Args:
            dataset: name of the reasoning-gym data set.
            level: of its curriculum, where it has one; 0 is the easiest.
            config: overrides of the data set's own settings, such as {min_terms: 3, max_terms: 3}.
            compact: leave the fixed English out where we know how.
            worked: share of demonstrations that show the work; the others answer at once.
            holdout: share of all questions that are kept for testing.
        """
        if not 0 < holdout < 1:
            raise ConfigError(f"reasoning.holdout is {holdout}, but each split needs questions: use 0.1, say.")
        if not 0 <= worked <= 1:
            raise ConfigError(f"reasoning.worked is {worked}, but it is a share of the demonstrations: use 0 to 1.")
        if worked and dataset != "chain_sum":
            raise ConfigError(
                f"reasoning.worked is {worked}, but we cannot show the work of {dataset}, only of chain_sum. Use 0."
            )
        self.split, self.name, self.level, self.holdout, self.worked = split, dataset, level, holdout, worked
        self.compact = compact and dataset in COMPACT
        self.data = _open(dataset, level, config or {})
        self.size = len(self.data)
        self.start = seed_of(seed, split) % self.size
        self.item = functools.lru_cache(maxsize=4096)(self._item)
        self.task(0)

    def task(self, number: int) -> Task:
        for k in range(TRIES):
            index = (self.start + number * (1 if self.name in LISTED else TRIES) + k) % self.size
            item = self.item(index)
            if (_share(_short(self.name, item["question"])) < self.holdout) == (self.split == "test"):
                columns = {"question": item["question"], "answer": str(item["answer"])}
                if work := _work(self.name, item):
                    columns |= {"worked": f"{work} [{item['answer']}]", "decoy": _decoy(item)}
                return Task(env="reasoning", seed=index, level=self.level, domain=self.name, columns=columns)
        raise ConfigError(
            f"{self.name} at level {self.level} has no question for the {self.split} split among {TRIES} items: it has "
            f"too few different questions for holdout {self.holdout}. Use another level, or a holdout nearer to 0.5."
        )

    def open(self, task: Task, sibling: int) -> Question:
        item = self.item(task.seed)
        prompt = _short(self.name, item["question"]) if self.compact else item["question"] + SUFFIX
        right = functools.partial(self._right, item)
        draws = random.Random(f"demo/{task.seed}/{sibling}")
        answer = None if item["answer"] is None else str(item["answer"])
        work = _work(self.name, item)
        return Question(prompt, answer, right, work, draws.random() < self.worked, _decoy(item) if work else "")

    def _item(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self.data[index]
        return item

    def _right(self, item: dict[str, Any], answer: str) -> bool:
        if self.name not in MANY_RIGHT:
            return item["answer"] is not None and answer == str(item["answer"]).strip()
        if not answer or not _finite(answer):
            return False
        try:  # the graders parse, index and evaluate what the policy wrote; some raise on junk
            return bool(self.data.score_answer(answer, item) == 1.0)
        except Exception:
            return False


class Question:
    """One question, one reply."""

    weights: ClassVar[Mapping[str, float]] = {"correct": 1.0}

    def __init__(
        self, prompt: str, answer: str | None, right: Callable[[str], bool], work: str, show: bool, decoy: str = ""
    ) -> None:
        self.prompt, self.answer, self.right, self.work, self.show = prompt, answer, right, work, show
        self.decoy = decoy
        self.correct: bool | None = None

    def ask(self) -> Ask | None:
        return Ask(0, ({"role": "user", "content": self.prompt},)) if self.correct is None else None

    def tell(self, reply: str) -> None:
        if self.correct is None:
            answer = answer_of(reply)
            self.correct = self.right(answer) or ("," in answer and self.right(f"[{answer}]"))

    def score(self, seat: int) -> Mapping[str, float]:
        return {"correct": float(bool(self.correct))}

    def feedback(self, seat: int) -> str | None:
        if self.correct is not False:
            return None
        if self.answer is None:
            return "that is not right"
        return f"it is {self.work} [{self.answer}]" if self.work else f"it is [{self.answer}]"

    def demonstrate(self) -> str:
        if self.answer is None:
            raise ConfigError("this data set has no reference answers, so there is nothing to demonstrate.")
        return f"{self.work} [{self.answer}]" if self.show else f"[{self.answer}]"

    def advise(self, wrong: bool) -> tuple[Mapping[str, str], str]:
        """The worked sum, or one with a mistake in it, by every name that a teacher may read it by; and the reply that
        follows from it."""
        if not self.work:
            return {}, self.demonstrate()
        reply = self.decoy if wrong else f"{self.work} [{self.answer}]"
        return {"worked": reply, "sibling": reply, "feedback": f"it is {reply}", "hint": reply}, reply


def answer_of(reply: str) -> str:
    """What stands in the last closed brackets, outermost ones first; without brackets the reply itself."""
    opened: list[int] = []
    found = None
    for place, letter in enumerate(reply):
        if letter == "[":
            opened.append(place)
        elif letter == "]" and opened:
            found = reply[opened.pop() + 1 : place]
    return (reply if found is None else found).strip()


def _short(dataset: str, question: str) -> str:
    """The question without its fixed English, where we know how."""
    if dataset not in COMPACT:
        return question
    pattern, write = COMPACT[dataset]
    match = re.search(pattern, question)
    if match is None:
        raise ConfigError(f"{dataset} asks {question!r}, which has no compact form that we know. Use compact: false.")
    return write(match)


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def _finite(answer: str) -> bool:
    try:
        return math.isfinite(float(answer))
    except (ValueError, OverflowError):
        return True  # not a number at all: for the grader to judge


def _work(dataset: str, item: dict[str, Any]) -> str:
    """4+7-2 -> "4+7=11 11-2=9"; empty where we cannot show it."""
    if dataset != "chain_sum":
        return ""
    return " ".join(_steps(item)[0])


def _steps(item: dict[str, Any], slip: tuple[int, int] = (-1, 0)) -> tuple[list[str], int]:
    """(a chain sum step by step, its end); `slip` = (step, by how much it is wrong)."""
    parts = item["metadata"]["expression"].split()
    total, steps = int(parts[0]), []
    for number, (sign, term) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        after = total + int(term) * (1 if sign == "+" else -1) + slip[1] * (number == slip[0])
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return steps, total


def _decoy(item: dict[str, Any]) -> str:
    """The worked sum with one slip in it, and the wrong answer that it leads to."""
    draws = random.Random(f"decoy/{item['question']}")
    slip = draws.randrange(len(_steps(item)[0])), draws.choice((-2, -1, 1, 2))
    steps, total = _steps(item, slip)
    return f"{' '.join(steps)} [{total}]"


def _open(name: str, level: int, config: Mapping[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum
    except ImportError as error:
        raise ConfigError(f"reasoning needs the package reasoning-gym: pip install reasoning-gym ({error}).") from error
    if name not in DATASETS:
        raise ConfigError(f"reasoning-gym has no data set {name!r}. {hint(name, DATASETS)}")
    if level < 0:
        raise ConfigError(f"reasoning.level is {level}, but levels start at 0.")
    if level >= HANGING.get(name, level + 1):
        can = f"only levels below {HANGING[name]} can" if HANGING[name] else "none can"
        raise ConfigError(f"{name} at level {level} has items whose generation never ends or fails; {can} be used.")
    fields = {f.name for f in dataclasses.fields(DATASETS[name][1])}
    for key in config:
        if key not in fields:
            raise ConfigError(f"{name} has no setting {key!r}. {hint(key, fields)}")
    settings: dict[str, Any] = {}
    if has_curriculum(name):
        curriculum = create_curriculum(name)
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration()
        settings = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init}
    elif level > 0:
        raise ConfigError(f"{name} has no levels, but level is {level}. Use level 0 and its settings in config.")
    try:
        size = {} if name in LISTED else {"size": SIZE}
        return reasoning_gym.create_dataset(name, **{**settings, **config, **size, "seed": 0})
    except Exception as error:
        raise ConfigError(f"{name} refuses its settings: {type(error).__name__}: {error}") from error
