"""A person in the opponent's place: the board is shown, moves are asked for, and the game is the ordinary one."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from tropism.cli.play import Leave, person, verdict
from tropism.envs.tictactoe import TicTacToe
from tropism.types import Task

TROPISM = str(Path(sys.executable).parent / "tropism")


def typed(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_the_person_opens_the_game_where_the_model_is_second(monkeypatch, capsys):
    typed(monkeypatch, "5")
    table = TicTacToe(Task(seat=1), opponent=person)
    assert str(table) == "123\n4X6\n789"
    assert "123\n456\n789" in capsys.readouterr().out


def test_a_person_can_win(monkeypatch):
    typed(monkeypatch, "1", "2", "3")
    table = TicTacToe(Task(seat=1), opponent=person)
    for reply in ("[4]", "[5]"):
        table.tell(reply)
    assert table.ask() is None and str(table) == "XXX\nOO6\n789"
    assert verdict(table.score(0), None) == "You win."


def test_the_model_sees_what_it_sees_in_training(monkeypatch):
    typed(monkeypatch, "5")
    against_person = TicTacToe(Task(seat=1), opponent=person)
    content = against_person.ask().prompt[0]["content"]
    seeds = (TicTacToe(Task(seat=1, seed=seed)) for seed in range(100))
    assert content in [table.ask().prompt[0]["content"] for table in seeds]


def test_a_move_is_asked_for_until_it_is_legal_and_an_empty_line_leaves(monkeypatch, capsys):
    typed(monkeypatch, "ten", "4", " 7 ", "")
    assert person("XO3", ["3", "7"]) == "7"
    assert capsys.readouterr().out.count("is not one of 3 7.") == 2
    with pytest.raises(Leave):
        person("XO3", ["3"])


@pytest.mark.parametrize(
    ("score", "remark", "said"),
    [
        ({"return": 1.0, "win": 1.0, "draw": 0.0, "loss": 0.0}, None, "You win."),
        ({"return": -1.0, "win": 0.0, "draw": 0.0, "loss": 1.0}, None, "You lose."),
        ({"return": 0.0, "win": 0.0, "draw": 1.0, "loss": 0.0}, None, "A draw."),
        ({"win": 1.0}, "[5] is not a free square", "You win.  (the model: [5] is not a free square)"),
    ],
)
def test_the_verdict_is_the_persons(score, remark, said):
    assert verdict(score, remark) == said


def test_a_game_can_be_played_through_stdin(tmp_path):
    words = [TROPISM, "play", "tiny", "--env", "tictactoe", "--seed", "1"]
    done = subprocess.run(words, cwd=tmp_path, input="5\n\n", capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Game 1: you are first." in done.stdout and "model: " in done.stdout
    assert "You win." in done.stdout  # a model that was never trained does not find a legal move
    assert "Game 2: you are second." in done.stdout and done.stdout.rstrip().endswith("Goodbye.")
