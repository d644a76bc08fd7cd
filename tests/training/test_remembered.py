"""A reference's log-probs of data: computed once, the same whoever asks first, and for what is new as ever."""

import json

import pytest
import torch

import tropism
import world
from again import train_until
from small import rollout, small, turn
from tropism.config import Train
from tropism.record import Run
from tropism.training.collate import collate
from tropism.training.remembered import Remembered


def row(n):
    return (rollout(turn([1, 2, n], [4] * (1 + n % 3)), group=n), rollout(turn([1, 2, n], [5, n]), group=n))


def batch(*numbers):
    return collate([one for n in numbers for one in row(n)], codes={})


class Counted:
    def __init__(self, policy):
        self.forward, self.rows = policy.measuring(1.0, Train()), 0

    def __call__(self, rows, top_k=0):
        self.rows += len(rows)
        return self.forward(rows, top_k)


def test_every_row_is_computed_once_and_says_what_it_says():
    policy = small()
    counted = Counted(policy)
    frozen = Remembered(counted, [row(n) for n in range(10)], 4, torch.device("cpu"))
    for numbers in ((0, 5, 9), (9, 1), (0, 5, 9), (2, 3, 4, 6, 7, 8)):
        found, expected = frozen(batch(*numbers)), policy.measuring(1.0, Train())(batch(*numbers))
        torch.testing.assert_close(found.logp, expected.logp, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-6, rtol=0)
    assert counted.rows == 20


def test_it_does_not_matter_who_asks_first():
    one, other = (Remembered(Counted(small()), [row(n) for n in range(10)], 4, torch.device("cpu")) for _ in range(2))
    one(batch(8, 0, 3)), other(batch(3)), other(batch(9, 8, 0))
    assert torch.equal(one(batch(3, 8)).logp, other(batch(3, 8)).logp)


def test_what_the_data_do_not_hold_is_computed_and_not_kept():
    counted = Counted(small())
    frozen = Remembered(counted, [row(0)], 4, torch.device("cpu"))
    for _ in range(2):
        frozen(batch(0, 1))
    assert counted.rows == 8 and not frozen.known
    assert frozen(batch(0), top_k=2).topk_ids is not None


@pytest.fixture
def recipe(tmp_path):
    def make(name):
        rows = [{"prompt": f"{n} ", "chosen": "a" * (1 + n % 4), "rejected": "bc" * (1 + n % 3)} for n in range(6)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
        made = world.sft(tmp_path / name, train={"batch": 4, "steps": 6, "save_every": 2}, eval={"every": 0})
        made["stages"][0] |= {"method": "dpo", "data": {"path": str(tmp_path / "rows.jsonl")}}
        return made

    return make


def test_a_run_of_many_epochs_reads_its_reference_once_and_resumes_bit_for_bit(recipe, tmp_path, monkeypatch):
    calls, real = [], Remembered.read
    monkeypatch.setattr(Remembered, "read", lambda self, rows: calls.append(len(rows)) or real(self, rows))
    whole = tropism.train(recipe("whole"), quiet=True).path
    assert sum(calls) == 12, "both answers of six pairs, in four epochs"
    train_until(recipe("cut"), 3, monkeypatch)
    tropism.train(recipe("cut"), resume=True, quiet=True)
    ends = [Run(path / "demos") for path in (whole, tmp_path / "cut" / "run")]
    lines = [[{k: v for k, v in line.items() if "time/" not in k} for line in end.metrics()] for end in ends]
    assert lines[0] == lines[1]
