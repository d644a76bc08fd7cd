"""Tic-tac-toe against an opponent that lives inside the environment. OpenSpiel is the board.

Small enough to solve (5,478 positions), so an agent is measured against exact play and not only against its opponent:
against a uniformly random one the best reachable mean return is 0.9948 as X and 0.9249 as O, random play has 0.2968
as X and its negative as O. Lanctot et al. 2019, OpenSpiel, arXiv:1908.09453.

Every question is the board alone, without history: a turn is a row of its own, and contexts stay short.
"""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from tropism.errors import ConfigError
from tropism.types import Ask, Task

MOVE = re.compile(r"\[([^\[\]\s]*)\]")
LINES = ("123", "456", "789", "147", "258", "369", "159", "357")
RULES = (
    "Tic-tac-toe: three in a row, column or diagonal wins. The board is shown by rows, then by columns, then by "
    "diagonals; a number is a free square. Think as long as you like, then end your reply with the number of one free "
    "square in brackets, such as [5]. Any other move loses at once.\n"
)


@functools.cache
def game() -> Any:
    import pyspiel

    return pyspiel.load_game("tic_tac_toe")


@functools.cache
def exact() -> dict[str, dict[str, float]]:
    """Board -> free square -> value of moving there, to the mover, when both sides play perfectly from then on."""
    table: dict[str, dict[str, float]] = {}

    def visit(state: Any) -> float:
        mover = state.current_player()
        if state.is_terminal():
            return float(state.player_return(0))
        board = drawn(state)
        if board not in table:
            sign = 1.0 if mover == 0 else -1.0
            table[board] = {str(a + 1): sign * visit(state.child(a)) for a in state.legal_actions()}
        best = max(table[board].values())
        return best if mover == 0 else -best

    visit(game().new_initial_state())
    return table


def drawn(state: Any) -> str:
    """The nine squares in reading order: X, O, or the number of a free square."""
    squares = str(state).replace("\n", "").upper()
    return "".join(str(i + 1) if s == "." else s for i, s in enumerate(squares))


def along(board: str) -> str:
    """The board three times: by rows, by columns, by diagonals. What is in line stands side by side."""
    lines = ["".join(board[int(i) - 1] for i in line) for line in LINES]
    return "\n".join(" ".join(lines[i:j]) for i, j in ((0, 3), (3, 6), (6, 8)))


def completing(board: str, mark: str) -> str:
    """Free squares, in order, where this mark would make three in a line."""
    rows = ("".join(board[int(i) - 1] for i in line) for line in LINES)
    found = {row.replace(mark, "") for row in rows if row.count(mark) == 2}
    return "".join(sorted(square for square in found if square.isdigit()))


Person = Callable[[str, Sequence[str]], str]
"""(the board in three lines, the free squares) -> one of them"""


class TicTacToe:
    """The policy plays `task.seat`: 0 is X and moves first, 1 is O."""

    seats: ClassVar[int] = 2
    weights: ClassVar[Mapping[str, float]] = {"return": 1.0}
    per_reply: ClassVar[frozenset[str]] = frozenset({"illegal"})

    def __init__(
        self,
        task: Task,
        sibling: int = 0,
        *,
        opponent: str | Person = "random",
        rules: bool = False,
        block: float = 0.0,
    ) -> None:
        """
        Args:
            opponent: random; perfect (uniform over the best moves); mcts:N (N simulations a move, 100 is strong); in
                Python also a function of the board and the free squares.
            rules: say the rules and the format of a reply above the board.
            block: share of demonstrated moves that block where they must; the others are any legal move.
        """
        self.person = opponent if callable(opponent) else None
        self.opponent, self.simulations = ("person", 0) if callable(opponent) else _opponent(str(opponent))
        self.task, self.sibling, self.rules, self.block = task, sibling, rules, block
        self.seat = task.seat
        self.state = game().new_initial_state()
        self.outcome: str | None = None
        self.said: list[str] = []
        self.remark: str | None = None
        if self.seat == 1:
            self._oppose()

    def __str__(self) -> str:
        board = drawn(self.state)
        return f"{board[:3]}\n{board[3:6]}\n{board[6:]}"

    def ask(self) -> Ask | None:
        if self.outcome is not None:
            return None
        text = f"you {'XO'[self.seat]}\n{along(drawn(self.state))}"
        return Ask(self.seat, ({"role": "user", "content": RULES + text if self.rules else text},))

    def tell(self, reply: str) -> None:
        if self.outcome is not None:
            return
        self.said.append(reply)
        values = exact()[drawn(self.state)]
        moves = MOVE.findall(reply)
        if not moves or moves[-1] not in values:
            wrote = (
                f"[{moves[-1][:20]}] is not a free square" if moves else "there was no move such as [5] in the reply"
            )
            self.remark, self.outcome = f"{wrote}; free: {' '.join(values)}", "illegal"
            return
        self.remark = _remark(drawn(self.state), "XO"[self.seat], moves[-1])
        self.state.apply_action(int(moves[-1]) - 1)
        if not self.state.is_terminal():
            self._oppose()
        if self.state.is_terminal():
            self.outcome = {1.0: "win", 0.0: "draw", -1.0: "loss"}[self.state.player_return(self.seat)]

    def score(self, seat: int) -> Mapping[str, float]:
        outcome = self.outcome or ""
        mirrored = {"win": "loss", "loss": "win", "illegal": "win"}
        if seat != self.seat:
            outcome = mirrored.get(outcome, outcome)
        lost = outcome in ("loss", "illegal")
        return {
            "return": float(outcome == "win") - float(lost),
            "win": float(outcome == "win"),
            "draw": float(outcome == "draw"),
            "loss": float(lost),
            "illegal": float(outcome == "illegal"),
        }

    def feedback(self, seat: int) -> str | None:
        return self.remark if seat == self.seat else None

    def demonstrate(self) -> str:
        """A true rationale (w wins at once, b blocks), then a block or any legal move: teaches where to look."""
        board, mine, theirs = drawn(self.state), "XO"[self.seat], "XO"[1 - self.seat]
        free = [square for square in board if square.isdigit()]
        win, block = completing(board, mine), completing(board, theirs)
        seen = " ".join(square + ("w" if square in win else "b" if square in block else "-") for square in free)
        draws = random.Random(f"demo/{self.task.seed}/{self.sibling}/{len(self.said)}")
        return f"{seen} [{draws.choice(list(block) if block and draws.random() < self.block else free)}]"

    def advise(self, wrong: bool) -> tuple[Mapping[str, str], str]:
        """What could be said of a blunder here, or of a good move as if it were one; a game of a sibling that had come
        as far and then moved so; and the reply that heeds them."""
        board, mine, theirs = drawn(self.state), "XO"[self.seat], "XO"[1 - self.seat]
        seen = self.demonstrate().rpartition(" ")[0]
        draws = random.Random(f"advice/{self.task.seed}/{self.sibling}/{len(self.said)}")
        free = [square for square in board if square.isdigit()]
        said, square = "", draws.choice(free)
        if wrong:
            said = draws.choice((WON, LOST)).format(draws.choice(free), square)
        elif better := completing(board, mine) or completing(board, theirs):
            blunders = [move for move in free if move not in better]
            said, square = _remark(board, mine, draws.choice(blunders)) or "" if blunders else "", better[0]
        reply = f"{seen} [{square}]"
        return {"sibling": self._continued(reply)} | ({"feedback": said} if said else {}), reply

    def _continued(self, reply: str) -> str:
        """All replies of a game that goes on with this one and ends by chance."""
        other = copy.copy(self)
        other.state, other.said = self.state.clone(), list(self.said)
        while other.ask() is not None:
            other.tell(reply)
            reply = other.demonstrate() if other.ask() is not None else ""
        return "\n".join(other.said)

    def _oppose(self) -> None:
        """A move drawn from task and board: siblings meet one opponent, who answers a position in one way, so that what
        differs among them is their own doing. Over tasks it is the opponent that was asked for."""
        draws = random.Random(f"{self.task.seed}/{drawn(self.state)}")
        values = exact()[drawn(self.state)]
        if self.person is not None:
            self.state.apply_action(int(self.person(str(self), list(values))) - 1)
            return
        if self.opponent == "mcts":
            import pyspiel

            seed = draws.getrandbits(31)
            rollouts = pyspiel.RandomRolloutEvaluator(1, seed)
            # solve=False: with it the bot is stronger than textbook UCT at the same number of simulations.
            bot = pyspiel.MCTSBot(game(), rollouts, 1.4, self.simulations, 64, False, seed, False)
            self.state.apply_action(bot.step(self.state))
            return
        best = max(values.values())
        moves = [m for m in values if self.opponent == "random" or values[m] == best]
        self.state.apply_action(int(draws.choice(moves)) - 1)


WON = "[{1}] won at once; you played [{0}]"
LOST = "[{1}] had to be blocked: the opponent wins there; you played [{0}]"


def _remark(board: str, mine: str, move: str) -> str | None:
    """What was wrong with a legal move, None if nothing was."""
    wins, blocks = completing(board, mine), completing(board, "O" if mine == "X" else "X")
    if wins:
        return None if move in wins else WON.format(move, wins[0])
    if blocks and move not in blocks:
        return LOST.format(move, blocks[0])
    values = exact()[board]
    best = max(values.values())
    if values[move] == best:
        return None
    kept = " ".join(f"[{m}]" for m in values if values[m] == best)
    had, left = ("a loss", "a draw", "a win")[int(best) + 1], ("a loss", "a draw", "a win")[int(values[move]) + 1]
    return f"[{move}] turns {had} into {left} against perfect play; {kept} kept it"


def _opponent(name: str) -> tuple[str, int]:
    kind, _, count = name.partition(":")
    if kind in ("random", "perfect") and not count:
        return kind, 0
    if kind == "mcts" and count.isascii() and count.isdigit() and 0 < int(count) <= 1_000_000:
        return kind, int(count)
    raise ConfigError(f"tictactoe has no opponent {name!r}. Use random, perfect, or mcts:N with N simulations a move.")
