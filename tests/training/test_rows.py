import json

import torch

from small import rollout, turn
from tropism.training.collate import collate
from tropism.training.rows import record_rows
from tropism.types import Failure, Stop


def test_every_number_stands_beside_the_token_it_is_about():
    """Two turns on one row, a third on its own, a failure before them: tensors are found by episode and turn."""
    turns = [turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6], reward=1.0), turn([9], [7, 8])]
    failed = rollout(turn([1], [2]), failure=Failure("win", "raised"))
    made = [failed, rollout(*turns, group=4, sibling=2, success=True), rollout(turn([5], [5]), seat=1)]
    batch = collate(made, codes={})
    advantage = torch.where(batch.action_mask, batch.tokens.float(), 0.0)
    rows = record_rows(made, batch.replace(proximal_logp=-advantage), advantage, 10 * advantage)
    found = {(row["episode"], row["turn"]): row for row in rows}
    assert list(found) == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert "advantage" not in found[0, 0] and found[0, 0]["failure"] == "win: raised"
    for row in rows[1:]:
        assert row["advantage"] == row["action"] and row["failure"] is None
        assert row["weight"] == [10 * token for token in row["action"]]
        assert row["proximal_logp"] == [-token for token in row["action"]]
        assert "teacher_logp" not in row
    assert [found[1, n]["reward"] for n in range(3)] == [0.0, 1.0, 0.0]
    assert {found[1, n]["total"] for n in range(3)} == {1.0}
    first, last = found[1, 0], found[2, 0]
    assert (first["group"], first["sibling"], first["success"], first["seat"]) == (4, 2, True, 0) and last["seat"] == 1


def test_words_and_the_samplers_numbers_are_kept():
    said = turn([1], [2, 3], prompt="q", reply="r", feedback="f", stop=Stop.truncated, logp=[-1.0, -2.0])
    (row,) = record_rows([rollout(said)])
    assert (row["prompt"], row["reply"], row["feedback"], row["stop"]) == ("q", "r", "f", "truncated")
    assert row["behavior_logp"] == [-1.0, -2.0] and row["context"] == [1] and "advantage" not in row
    json.dumps(row)


def test_what_never_spoke_leaves_a_row_that_says_why():
    (row,) = record_rows([rollout(failure=Failure("play", "the environment raised"))])
    assert row["turn"] == -1 and row["failure"] == "play: the environment raised"
