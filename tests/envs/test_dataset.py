from __future__ import annotations

import json

import datasets
import pytest

from tropism.envs import open_source
from tropism.envs.check import check_env
from tropism.envs.rows import read_rows
from tropism.errors import ConfigError

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(200)]


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(path, split="train", seed=0, **options):
    return open_source("dataset", {"path": path, **options}, split=split, seed=seed)


def prompts(source, numbers):
    return [source.open(source.task(n), 0).ask().prompt for n in numbers]


def test_every_row_is_seen_once_before_any_is_seen_again(path):
    source = opened(path)
    size = len(source.rows)
    epochs = [prompts(source, range(e * size, (e + 1) * size)) for e in range(3)]
    assert all(len(set(epoch)) == size for epoch in epochs) and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompts(opened(path, seed=1), range(size)) != epochs[0]
    assert prompts(opened(path), range(size)) == epochs[0]


def test_the_splits_share_no_prompt_even_when_rows_repeat(tmp_path):
    path = write(tmp_path / "twice.jsonl", [*ROWS, *ROWS])
    train, test = opened(path), opened(path, "test")
    assert len(train.rows) + len(test.rows) == 400 and 10 <= len(test.rows) <= 80
    assert not set(prompts(train, range(400))) & set(prompts(test, range(400)))


def test_test_rows_are_the_same_for_runs_of_different_seeds(path):
    assert prompts(opened(path, "test", 0), range(9)) == prompts(opened(path, "test", 5), range(9))


def test_what_a_test_file_asks_is_left_out_of_training(path, tmp_path):
    test_path = write(tmp_path / "test.jsonl", ROWS[:7])
    assert len(opened(path, test_path=test_path).rows) == 193
    assert len(opened(path, "test", test_path=test_path).rows) == 7


def test_a_directory_with_both_splits_may_be_its_own_test_path(tmp_path):
    made, both = datasets.Dataset.from_list(ROWS), str(tmp_path / "both")
    datasets.DatasetDict(train=made.select(range(40)), test=made.select(range(30, 50))).save_to_disk(both)
    assert {task_answer(opened(both, test_path=both), n) for n in range(30)} == {str(n + 1) for n in range(30)}
    assert len(opened(both, "test", test_path=both).rows) == 20


def task_answer(source, number):
    return source.task(number).columns["answer"]


def test_all_columns_reach_the_rewards_and_the_environment_is_honest(path):
    source = opened(path)
    task = source.task(3)
    assert eval(task.columns["prompt"][:-1]) == int(task.columns["answer"])
    assert source.open(task, 0).score(0) == {}
    assert check_env(source) == []


def test_a_column_may_say_what_domain_a_row_is_of(tmp_path):
    """By which teachers are routed."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}?", "kind": "{"ab"[n % 2]}"}}\n' for n in range(8)))
    given = {"path": str(tmp_path / "rows.jsonl"), "holdout": 0.0}
    source = open_source("dataset", given | {"domain": "kind"}, split="train", seed=0)
    for task in map(source.task, range(8)):
        assert task.domain == task.columns["kind"]
    assert open_source("dataset", given, split="train", seed=0).task(0).domain == ""
    with pytest.raises(ConfigError, match=r"dataset\.domain"):
        open_source("dataset", given | {"domain": "sort"}, split="train", seed=0)


def test_prompts_are_text_or_messages_and_templates_and_system_messages_apply(tmp_path):
    talk = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "m.jsonl", [{"prompt": talk, "q": "2+2", "n": 3}])
    say = {"role": "system", "content": "Be brief."}
    assert prompts(opened(path, holdout=0), [0]) == [tuple(talk)]
    assert prompts(opened(path, holdout=0, system="Be brief."), [0]) == [(say, *talk)]
    assert prompts(opened(path, holdout=0, prompt="q"), [0]) == ["2+2"]
    asked = {"role": "user", "content": "2+2"}
    assert prompts(opened(path, holdout=0, prompt="q", system="Be brief."), [0]) == [(say, asked)]
    template = r"{n}: {q}? Put it in \boxed{}."
    assert prompts(opened(path, holdout=0, template=template), [0]) == [r"3: 2+2? Put it in \boxed{}."]


def test_jsonl_parquet_and_hugging_face_directories_hold_the_same_rows(tmp_path, path):
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=made, test=made.select(range(3))).save_to_disk(str(tmp_path / "both"))
    (tmp_path / "copied").mkdir()
    made.to_parquet(str(tmp_path / "copied" / "train-00000.parquet"))
    for name in ("rows.parquet", "saved", "both", "copied"):
        assert read_rows(str(tmp_path / name)) == ROWS, name
    assert read_rows(str(tmp_path / "both"), "test") == ROWS[:3]
    with pytest.raises(ConfigError, match="Did you mean train"):
        read_rows(str(tmp_path / "both"), "trian")


def test_a_hub_id_without_network_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        read_rows("nobody-here/no-such-data")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"prompt": "promt"}, "Did you mean prompt?"),
        ({"template": "{question}"}, "has only: answer, prompt"),
        ({"holdout": 1.0}, "share of the prompts"),
        ({"test_path": "/none/at/all.jsonl"}, "there is no file"),
        ({"colum": 1}, "no option 'colum'"),
    ],
)
def test_impossible_options_are_refused_with_the_way_out(path, options, says):
    with pytest.raises(ConfigError) as error:
        opened(path, **options)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "has no rows"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 of"),
        ("[1]\n", "line 1 of .* is a list"),
        ('{"prompt": ""}\n', "row 0 .* is empty"),
        ('{"prompt": 3}\n', "must be a text or a list of messages"),
        ('{"prompt": [{"role": "user"}]}\n', "a message is"),
        ('{"prompt": "a"}\n{"other": "b"}\n', "row 1 of .* has only: other"),
    ],
)
def test_files_that_cannot_be_prompts_are_refused(tmp_path, text, says):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        opened(str(file), holdout=0)


def test_a_split_without_rows_is_refused(path):
    with pytest.raises(ConfigError, match="leaves no rows for the test split: holdout is 0"):
        opened(path, "test", holdout=0)
    with pytest.raises(ConfigError, match="there is no file or directory"):
        opened("/no/such/file.jsonl")
    with pytest.raises(ConfigError, match="needs the option 'path'"):
        open_source("dataset", {}, split="train", seed=0)
