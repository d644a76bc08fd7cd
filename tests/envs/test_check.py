"""An honest environment passes; each kind of dishonesty is named."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import ClassVar

import pytest

from tropism.envs import ENVS, open_source
from tropism.envs.check import check_env
from tropism.envs.reasoning import Reasoning
from tropism.envs.tictactoe import TicTacToe
from tropism.errors import ConfigError
from tropism.types import Ask, Env


class Honest:
    """Nothing but ask, tell, score and feedback: guess a number within three replies."""

    def __init__(self, task, sibling, *, high=9):
        self.number = random.Random(task.seed).randint(1, high)
        self.replies = []

    def ask(self):
        over = len(self.replies) == 3 or str(self.number) in self.replies
        return None if over else Ask(0, f"guess {len(self.replies)}")

    def tell(self, reply):
        self.replies.append(reply.strip("[]"))

    def score(self, seat):
        return {"right": float(str(self.number) in self.replies)}

    def feedback(self, seat):
        return f"it was {self.number}" if self.replies else None


def test_honest_environments_pass():
    assert check_env(Honest) == []
    assert isinstance(Honest(open_source("reasoning", {}, split="train", seed=0).task(0), 0), Env)


@pytest.mark.parametrize("opponent", ["random", "perfect", "mcts:10"])
@pytest.mark.parametrize("rules", [False, True])
def test_tictactoe_passes(opponent, rules):
    assert check_env(TicTacToe, tasks=40, options={"opponent": opponent, "rules": rules}) == []


@pytest.mark.parametrize("dataset", ["chain_sum", "products", "gcd", "spell_backward", "count_bits", "syllogism"])
def test_reasoning_passes(dataset):
    assert check_env(Reasoning, options={"dataset": dataset}) == []
    assert check_env("reasoning", options={"dataset": dataset, "compact": False}) == []


COUNT = itertools.count()


class AskMoves(Honest):
    def ask(self):
        return Ask(0, f"question {next(COUNT)}")


class OpeningDiffers(Honest):
    def __init__(self, task, sibling):
        super().__init__(task, sibling)
        self.opening = sibling

    def ask(self):
        return super().ask() and Ask(0, f"guess {self.opening} {len(self.replies)}")


class Raises(Honest):
    def tell(self, reply):
        self.replies.append(int(reply))


class LatePart(Honest):
    def score(self, seat):
        return {"right": 0.0, **({"tries": 1.0} if self.replies else {})}


class NotANumber(Honest):
    def score(self, seat):
        return {"right": float("nan")}


class Unseeded(Honest):
    def feedback(self, seat):
        return f"{next(COUNT)}" if self.replies else None


class Endlessly(Honest):
    def ask(self):
        return Ask(0, "again?")


class Over(Honest):
    def ask(self):
        return None


class ListPrompt(Honest):
    def ask(self):
        return super().ask() and Ask(0, [{"role": "user", "content": "guess"}])


class OddRole(Honest):
    def ask(self):
        return super().ask() and Ask(0, ({"role": "human", "content": "guess"},))


class NotAsk(Honest):
    def ask(self):
        return "guess"


class NumberFeedback(Honest):
    def feedback(self, seat):
        return 1.0


class UnknownWeight(Honest):
    weights: ClassVar = {"wrong": 1.0}


class NoSibling(Honest):
    def __init__(self, task):
        super().__init__(task, 0)


@pytest.mark.parametrize(
    "cls, says",
    [
        (AskMoves, "asking twice changed the question"),
        (OpeningDiffers, "siblings were asked different first questions"),
        (Raises, "Any reply is legal"),
        (LatePart, "Every part must be there from the start"),
        (NotANumber, "must be a finite number"),
        (Unseeded, "the same task, sibling and replies gave another episode"),
        (Endlessly, "still asks after 64 replies"),
        (Over, "over before the first question"),
        (ListPrompt, "tuple of messages"),
        (OddRole, "'human'"),
        (NotAsk, "must give tropism.types.Ask"),
        (NumberFeedback, "must give a text or None"),
        (UnknownWeight, "`weights` names ['wrong']"),
        (NoSibling, "open("),
    ],
)
def test_what_is_broken_is_named(cls, says):
    problems = check_env(cls)
    assert problems and says in problems[0]
    assert all(len(problem) < 500 for problem in problems)


def test_a_class_in_a_file_is_found_and_its_options_are_checked(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from tropism.types import Ask\n"
        "class Mine:\n"
        "    seats = 2\n"
        "    weights = {'a': 0.5}\n"
        "    def __init__(self, task, sibling, *, needed, high=3):\n"
        "        self.seat, self.said = task.seat, None\n"
        "    def ask(self): return Ask(self.seat, 'say') if self.said is None else None\n"
        "    def tell(self, reply): self.said = reply\n"
        "    def score(self, seat): return {'a': 0.0, 'b': 1.0}\n"
        "    def feedback(self, seat): return None\n"
        "broken = 3\n"
    )
    name = f"{file}:Mine"
    train, test = (open_source(name, {"needed": 1}, split=split, seed=0) for split in ("train", "test"))
    assert [train.task(n).seat for n in range(4)] == [0, 1, 0, 1]
    assert not {train.task(n).seed for n in range(1000)} & {test.task(n).seed for n in range(1000)}
    assert check_env(name, options={"needed": 1}) == []
    for options, says in [({}, "needs the option 'needed'"), ({"needed": 1, "hihg": 2}, "Did you mean high?")]:
        with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
            open_source(name, options, split="train", seed=0)
    with pytest.raises(ConfigError, match="is a int, but an environment is a class"):
        open_source(f"{file}:broken", {}, split="train", seed=0)
    with pytest.raises(ConfigError, match="Did you mean Mine"):
        open_source(f"{file}:Mind", {}, split="train", seed=0)


def test_errors_of_loading_say_what_is_missing(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    for name, says in [
        (f"{tmp_path / 'none.py'}:A", "there is no file"),
        (f"{tmp_path / 'bad.py'}:A", "No module named 'nothing_of_this_name'"),
        ("no_such_module_here:A", "could not be imported"),
        ("tictac", "Did you mean tictactoe"),
    ]:
        with pytest.raises(ConfigError, match=says):
            open_source(name, {}, split="train", seed=0)


def test_every_registered_name_is_a_class_here():
    for reference in ENVS.values():
        module, _, name = reference.partition(":")
        assert (Path(__file__).parents[2] / "src" / Path(*module.split("."))).with_suffix(".py").is_file() and name
