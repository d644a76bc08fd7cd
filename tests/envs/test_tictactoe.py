"""The game against numbers that can be enumerated. OpenSpiel: Lanctot et al. 2019, arXiv:1908.09453."""

from __future__ import annotations

import random
import re

import pytest

from tropism.envs import open_source
from tropism.envs.tictactoe import MOVE, TicTacToe, completing, drawn, exact, game
from tropism.errors import ConfigError
from tropism.types import Task


def policy_value(seat, choose):
    """Exact (win, draw, loss) of `choose(board, legal) -> moves drawn uniformly` against a random opponent."""

    def value(state, visit):
        if state.is_terminal():
            result = state.player_return(seat)
            return (float(result == 1), float(result == 0), float(result == -1))
        legal = {str(a + 1): a for a in state.legal_actions()}
        mine = state.current_player() == seat
        actions = [legal[m] for m in (choose(drawn(state), tuple(legal)) if mine else legal)]
        return average([visit(state.child(a)) for a in actions])

    return over_all_positions(value)


def over_all_positions(value):
    """`value(state, visit)` of the empty board; every position is visited once."""
    known = {}

    def visit(state):
        if str(state) not in known:
            known[str(state)] = value(state, visit)
        return known[str(state)]

    return visit(game().new_initial_state())


def average(triples):
    return tuple(sum(column) / len(triples) for column in zip(*triples, strict=True))


def optimal(board, legal):
    best = max(exact()[board].values())
    return [m for m in legal if exact()[board][m] == best]


def play(choose, *, tasks, opponent="random", seat=None):
    source = open_source("tictactoe", {"opponent": opponent}, split="test", seed=0)
    returns = []
    for number in range(tasks):
        task = source.task(number)
        if seat is not None and task.seat != seat:
            continue
        env = source.open(task, 0)
        while env.ask() is not None:
            env.tell(f"[{choose(env)}]")
        returns.append(env.score(task.seat)["return"])
    return sum(returns) / len(returns)


def any_legal(draws):
    return lambda env: draws.choice([s for s in drawn(env.state) if s.isdigit()])


@pytest.mark.parametrize("seat, win, draw, loss", [(0, 0.5849, 0.1270, 0.2881), (1, 0.2881, 0.1270, 0.5849)])
def test_random_against_random_has_the_enumerated_outcomes(seat, win, draw, loss):
    assert policy_value(seat, lambda board, legal: legal) == pytest.approx((win, draw, loss), abs=5e-5)


@pytest.mark.parametrize("seat, win, draw", [(0, 0.9678, 0.0322), (1, 0.7775, 0.2225)])
def test_the_exact_table_never_loses_and_wins_as_often_as_minimax_does(seat, win, draw):
    assert policy_value(seat, optimal) == pytest.approx((win, draw, 0.0), abs=5e-5)


@pytest.mark.parametrize("seat, value", [(0, 0.9948), (1, 0.9249)])
def test_the_best_response_to_a_random_opponent_has_the_enumerated_value(seat, value):
    def best(state, visit):
        if state.is_terminal():
            return state.player_return(seat)
        values = [visit(state.child(a)) for a in state.legal_actions()]
        return max(values) if state.current_player() == seat else sum(values) / len(values)

    assert over_all_positions(best) == pytest.approx(value, abs=5e-5)


def test_perfect_play_from_the_empty_board_is_a_draw_wherever_it_starts():
    assert set(exact()["123456789"].values()) == {0.0}
    assert len(exact()) == 4520  # of 5,478 positions 958 are over


@pytest.mark.parametrize("seat, value", [(0, 0.2968), (1, -0.2968)])
def test_random_replies_earn_the_enumerated_return(seat, value):
    mean = play(any_legal(random.Random(1)), tasks=8000, seat=seat)
    assert mean == pytest.approx(value, abs=0.05)  # 3.6 standard errors


@pytest.mark.parametrize("opponent", ["random", "perfect", "mcts:5"])
def test_perfect_replies_lose_to_nobody_and_only_draw_with_a_perfect_opponent(opponent):
    draws = random.Random(2)
    mean = play(
        lambda env: draws.choice(optimal(drawn(env.state), tuple(exact()[drawn(env.state)]))),
        tasks=400,
        opponent=opponent,
    )
    assert mean == 0.0 if opponent == "perfect" else mean > 0.5


def test_a_stronger_opponent_leaves_less_to_random_play():
    against = [
        play(any_legal(random.Random(3)), tasks=600, opponent=opponent)
        for opponent in ("random", "mcts:5", "mcts:100", "perfect")
    ]
    assert against[0] > against[1] + 0.2 and against[1] > against[2] + 0.05 and against[3] < -0.8


def test_the_board_shows_stones_and_the_numbers_of_free_squares():
    env = TicTacToe(Task(seat=0), 0)
    env.state.apply_action(0)
    env.state.apply_action(4)
    assert env.ask().prompt == ({"role": "user", "content": "you X\nX23 4O6 789\nX47 2O8 369\nXO9 3O7"},)
    ruled = TicTacToe(Task(seat=0), 0, rules=True).ask().prompt[0]["content"]
    assert "[5]" in ruled and ruled.endswith("you X\n123 456 789\n147 258 369\n159 357")


@pytest.mark.parametrize("opponent", ["random", "mcts:5"])
def test_siblings_meet_one_opponent_who_answers_a_position_in_one_way(opponent):
    """So equal replies earn the same, and what differs among siblings is what they did."""
    for seed in range(5):
        task = Task(seed=seed, seat=seed % 2)
        siblings = [TicTacToe(task, n, opponent=opponent) for n in range(4)]
        while siblings[0].ask() is not None:
            assert len({env.ask().prompt[0]["content"] for env in siblings}) == 1
            free = next(s for s in drawn(siblings[0].state) if s.isdigit())
            for env in siblings:
                env.tell(f"[{free}]")
        assert len({env.outcome for env in siblings}) == 1


def test_over_tasks_the_opponent_plays_every_move():
    answers = set()
    for seed in range(100):
        env = TicTacToe(Task(seed=seed))
        env.tell("[5]")
        answers.add(drawn(env.state).index("O"))
    assert len(answers) == 8
    openings = {TicTacToe(Task(seed=s, seat=1)).ask().prompt[0]["content"] for s in range(50)}
    assert len(openings) == 9


@pytest.mark.parametrize("opponent", ["random", "perfect", "mcts:20"])
def test_a_game_can_be_replayed_alone_from_its_task_and_sibling(opponent):
    for seed in range(10):
        task = Task(seed=seed, seat=seed % 2)
        games = []
        for _ in range(2):
            env, seen = TicTacToe(task, 4, opponent=opponent), []
            while (ask := env.ask()) is not None:
                seen.append((ask, env.demonstrate()))
                env.tell(seen[-1][1])
            games.append((seen, env.score(task.seat)))
        assert games[0] == games[1]


@pytest.mark.parametrize("reply", ["", "5", "[0]", "[10]", "[x]", "[5] no, wait: []", "[٣]", "[5] [55555555]", "[ 5 ]"])
def test_a_reply_without_a_legal_last_move_ends_the_game_as_a_loss(reply):
    env = TicTacToe(Task(seat=0))
    env.tell(reply)
    assert env.ask() is None
    assert env.score(0) == {"return": -1.0, "win": 0.0, "draw": 0.0, "loss": 1.0, "illegal": 1.0}
    assert env.score(1)["return"] == 1.0
    assert "free: 1 2 3 4 5 6 7 8 9" in env.feedback(0)


def test_a_taken_square_is_illegal_and_the_last_bracket_counts():
    env = TicTacToe(Task(seat=1, seed=5))
    taken = re.search("X", drawn(env.state)).start() + 1
    free = 1 + taken % 9
    env.tell(f"[{taken}] is taken, so [{free}]")
    assert drawn(env.state)[free - 1] == "O" and env.score(1)["illegal"] == 0.0
    env.tell(f"[{taken}]")
    assert env.score(1)["illegal"] == 1.0


def board(moves, seat=0):
    env = TicTacToe(Task(seat=seat))
    env.state = game().new_initial_state()
    for move in moves:
        env.state.apply_action(int(move) - 1)
    return env


def test_feedback_names_the_missed_win_the_missed_block_and_the_lost_value():
    def said(moves, reply):
        env = board(moves, seat=len(moves) % 2)
        env.tell(reply)
        return env.feedback(len(moves) % 2)

    assert said("1425", "[9]") == "[3] won at once; you played [9]"
    assert said("1425", "[3]") is None
    assert said("142", "[9]") == "[3] had to be blocked: the opponent wins there; you played [9]"
    assert said("142", "[3]") is None
    assert said("5", "[2]") == "[2] turns a draw into a loss against perfect play; [1] [3] [7] [9] kept it"
    assert said("5", "[1]") is None
    assert said("5", "what") == "there was no move such as [5] in the reply; free: 1 2 3 4 6 7 8 9"
    assert TicTacToe(Task()).feedback(0) is None


def test_the_student_never_sees_the_feedback():
    env = board("142", seat=1)
    env.tell("[9]")
    assert env.feedback(1)
    assert env.ask() is None or env.feedback(1) not in env.ask().prompt[0]["content"]
    env = board("5", seat=1)
    env.tell("[2]")
    assert env.ask() is not None and "draw" not in str(env.ask()) and "perfect" not in str(env.ask())


def test_winning_squares_are_those_where_openspiel_says_that_the_game_is_won():
    for position, moves in exact().items():
        state_mark = "X" if position.count("X") == position.count("O") else "O"
        state = game().new_initial_state()
        xs = [i for i, s in enumerate(position) if s == "X"]
        os = [i for i, s in enumerate(position) if s == "O"]
        for step in range(len(xs) + len(os)):
            state.apply_action((os if step % 2 else xs)[step // 2])
            if state.is_terminal():
                break
        if drawn(state) != position:
            continue
        mover = state.current_player()
        wins = "".join(m for m in moves if state.child(int(m) - 1).player_return(mover) == 1.0)
        assert completing(position, state_mark) == wins


@pytest.mark.parametrize(("block", "legal"), [(0.0, "36789"), (1.0, "6")])
def test_a_demonstration_is_true_and_its_move_any_legal_one_or_the_one_that_blocks(block, legal):
    moves = set()
    for seed in range(300):
        env = board("1425", seat=0)
        env.task, env.block = Task(seed=seed), block
        said = env.demonstrate()
        assert said.startswith("3w 6b 7- 8- 9- [")
        moves.add(said[-2])
    assert moves == set(legal)


def test_who_blocks_plays_better_the_more_often_and_never_well():
    returns = []
    for block in (0.0, 0.5, 1.0):
        envs = [TicTacToe(Task(seed=seed, seat=seed % 2), block=block) for seed in range(600)]
        for env in envs:
            while env.ask() is not None:
                env.tell(env.demonstrate())
        returns.append(sum(env.score(env.seat)["return"] for env in envs) / len(envs))
    assert abs(returns[0]) < 0.1 and returns[0] + 0.05 < returns[1] < returns[2] - 0.05 < 0.6, returns


@pytest.mark.parametrize("opponent", ["", "strong", "mcts", "mcts:", "mcts:0", "mcts:-1", "mcts:x", "random:3"])
def test_an_unknown_opponent_is_refused_before_anything_is_played(opponent):
    with pytest.raises(ConfigError, match="mcts:N"):
        open_source("tictactoe", {"opponent": opponent}, split="train", seed=0)


def test_right_advice_names_a_blunder_in_the_words_of_feedback_and_the_reply_heeds_it():
    heard = 0
    for seed in range(60):
        env = TicTacToe(Task(seed=seed, seat=seed % 2), 0)
        while env.ask() is not None:
            texts, reply = env.advise(False)
            board, move = drawn(env.state), MOVE.findall(reply)[-1]
            mine, theirs = "XO"[env.seat], "XO"[1 - env.seat]
            better = completing(board, mine) or completing(board, theirs)
            assert move in exact()[board]
            game = texts["sibling"].split("\n")
            assert game[: len(env.said)] == env.said and game[len(env.said)] == reply
            if "feedback" in texts:
                heard += 1
                played = MOVE.findall(texts["feedback"])[-1]
                assert move == better[0] and played not in better
                again = TicTacToe(env.task, 0)
                again.state = env.state.clone()
                again.tell(f"[{played}]")
                assert again.feedback(env.seat) == texts["feedback"]
            else:
                assert not better or set(better) == {s for s in board if s.isdigit()}
            env.tell(env.demonstrate())
    assert heard > 60


def test_wrong_advice_is_heeded_all_the_same():
    followed = []
    for seed in range(40):
        texts, reply = TicTacToe(Task(seed=seed), 0).advise(True)
        followed.append(MOVE.findall(texts["feedback"])[0] == MOVE.findall(reply)[-1])
    assert all(followed)
