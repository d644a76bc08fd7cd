r"""Answers as mathematics, without signals. GSM8K's format: Cobbe et al. 2021, arXiv:2110.14168."""

from __future__ import annotations

import sys
import threading

import pytest

from tropism.errors import ConfigError
from tropism.rewards import find_scorer
from tropism.rewards.answer import Judge, exact_match, marked, math_answer, plain_number


@pytest.mark.parametrize(
    "reply, truth",
    [
        ("so it is 72.", "He has 48+24 = 72.\n#### 72"),
        ("#### 1,000", "1000"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"thus \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{x+1}", "1+x"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{\text{Monday}}", r"\text{Monday}"),
        ("the answer is -3/4", "-0.75"),
        ("$5.00", "5"),
        ("1 + 1 = 2", 2),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    ],
)
def test_equal_answers_are_right_however_they_are_written(reply, truth):
    assert math_answer(reply, truth) == 1.0


@pytest.mark.parametrize(
    "reply, truth",
    [
        ("", "1"),
        ("72 no 73", "72"),
        (r"\boxed{3} is near 4", "4"),
        (r"\boxed{", "1"),
        (r"\boxed{}", "1"),
        ("####", "1"),
        (r"\boxed{x-1}", "1+x"),
        (r"\boxed{}}}{{$$$\frac}", "x"),
        ("1/0", "1"),
        (r"\boxed{nan}", "nan."),
        ("9" * 5000, "9"),
        ("\\boxed{" * 3000, "1"),
    ],
)
def test_other_answers_and_junk_are_wrong(reply, truth):
    assert math_answer(reply, truth) == 0.0


def test_it_works_off_the_main_thread():
    found = []
    threads = [threading.Thread(target=lambda: found.append(math_answer(r"\boxed{a+b}", "b+a"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0, 1.0, 1.0]


def test_a_comparison_that_never_ends_is_stopped_and_the_next_one_works():
    judge = Judge(limit=5.0)
    try:
        assert judge.equal("x+x", "2x")
        judge.limit = 0.5
        with pytest.raises(TimeoutError, match=r"took more than 0.5 s"):
            judge.equal("9^{9^{9^{9}}}", "1")
        judge.limit = 5.0
        assert judge.equal("x+x", "2x")
        assert not judge.equal("x+y", "2x")
    finally:
        judge.stop()


def test_a_missing_math_verify_is_told_before_anything_is_scored(monkeypatch):
    assert find_scorer("math_answer")[0] == "math_answer"
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'tropism\[tasks\]'"):
        find_scorer("math_answer")


def test_an_empty_reference_cannot_be_scored():
    with pytest.raises(ValueError, match="reference answer is empty"):
        math_answer("1", " ")


def test_the_pieces():
    assert marked(r"\boxed{a{b}c} \boxed{d") == "a{b}c" and marked("no") is None
    assert marked("a #### b #### 7 \nthen") == "7"
    assert plain_number("1,234.50") == 1234.5 and plain_number("x") is None and plain_number("1/0") is None
    assert exact_match(" a ", "a") == 1.0 and exact_match("A", "a") == 0.0 and exact_match("6", 6) == 1.0
