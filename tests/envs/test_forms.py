"""Rows of other libraries, as they stand in their documentation, and what becomes of them."""

import json

import pytest

from small import small
from tropism.config import Data
from tropism.envs.forms import in_known_form
from tropism.envs.rows import read_rows
from tropism.training.fit import load_rows

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def test_alpaca_is_an_instruction_its_input_and_an_output():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    found = in_known_form(row)
    assert found["prompt"] == [{"role": "user", "content": "Add.\n\n1 and 2"}]
    assert found["completion"] == [{"role": "assistant", "content": "3"}] and found["output"] == "3"
    alone = in_known_form({"instruction": "Add.", "input": "", "output": "3", "system": "Be brief."})
    assert alone["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}]


def test_sharegpt_is_a_conversation():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    found = in_known_form({"id": 7, "conversations": turns})
    assert found["messages"] == [{"role": "system", "content": "s"}, USER, REPLY] and found["id"] == 7


def test_sharegpt_with_two_answers_is_a_pair():
    row = {"conversations": [{"from": "human", "value": "hi"}]}
    row |= {"chosen": {"from": "gpt", "value": "hello"}, "rejected": {"from": "gpt", "value": "no"}}
    found = in_known_form(row)
    assert (found["prompt"], found["chosen"]) == ([USER], [REPLY]) and found["rejected"][0]["content"] == "no"


def test_verl_keeps_its_prompt_and_gives_the_answer_that_rewards_read():
    row = {"data_source": "gsm8k", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"}}
    found = in_known_form(row | {"extra_info": {"index": 3, "split": "train"}})
    assert (found["prompt"], found["answer"], found["index"], found["data_source"]) == ([USER], "4", 3, "gsm8k")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "instruction": "i", "output": "o"},
        {"messages": [USER], "conversations": [{"from": "human", "value": "other"}]},
        {"conversations": [{"from": "somebody", "value": "x"}]},
        {"conversations": "text"},
        {"prompt": "q", "reward_model": "path"},
    ],
)
def test_a_row_in_no_such_form_stays_as_it_is(row):
    assert in_known_form(row) == row


def test_files_are_read_in_whatever_form(tmp_path):
    rows = [
        {"instruction": "Say hello.", "output": "hello"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [set(row) & {"prompt", "messages"} for row in read_rows(str(path))] == [{"prompt"}, {"messages"}]
    replies = [one.turns[0].reply for (one,) in load_rows(Data(path=str(path)), small("tiny").words, 0)]
    assert replies == ["hello", "hello"]
