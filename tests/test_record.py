from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tropism.errors import ConfigError, TropismError
from tropism.record import COLUMNS, Run, saving

CONFIG = {"name": "nim", "seed": 3, "stages": ({"name": "rl", "method": {"grpo": {"clip_high": 0.28}}},)}
ROW = {
    "episode": 0, "group": 0, "sibling": 1, "seat": 0, "turn": 0, "env": "nim", "task_seed": 2**62, "version": 4,
    "context": [1, 2, 3], "action": [4, 5], "behavior_logp": [-0.5, -1.25], "advantage": [0.5, 0.5],
    "prompt": "7 stones", "reply": "[3]", "stop": "finished", "reward": 1.0, "total": 1.0,
    "rewards": {"win": 1.0, "illegal": 0.0}, "success": True,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "nim" / "rl", CONFIG, {"torch": "2.13.0"})


def test_the_settings_come_back_with_the_versions(run: Run) -> None:
    stages = [{"name": "rl", "method": {"grpo": {"clip_high": 0.28}}}]
    assert Run(run.path).config == {"name": "nim", "seed": 3, "stages": stages, "versions": {"torch": "2.13.0"}}


def test_a_directory_in_use_is_refused_with_the_ways_out(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"already holds config.yaml.*--resume.*--fresh.*another name"):
        Run.create(run.path, CONFIG, {})
    (run.path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        Run.create(run.path / "file", CONFIG, {})


def test_a_kill_inside_the_very_first_write_leaves_a_directory_that_a_run_can_start_in(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.partial").write_bytes(b"name: n")
    assert Run.create(tmp_path, CONFIG, {}).config["name"] == "nim"


def test_an_empty_directory_is_a_run_of_which_nothing_is_known(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert (run.config, run.metrics(), run.recorded(), run.recorded("eval"), run.notes()) == ({}, [], [], [], {})
    assert run.rewind(0) == 0
    assert list(tmp_path.iterdir()) == []


def test_metrics_come_back_exactly_and_what_is_not_a_number_as_none(run: Run) -> None:
    run.log(1, {"reward": 0.1 + 0.2, "num_tokens": 2**40, "kl": float("nan"), "loss": float("inf")})
    run.log(2, {"reward": -1e-300})
    assert run.metrics() == [
        {"step": 1, "reward": 0.1 + 0.2, "num_tokens": 2**40, "kl": None, "loss": None},
        {"step": 2, "reward": -1e-300},
    ]


def test_every_line_is_json_by_the_standard(run: Run) -> None:
    run.log(1, {"kl": float("nan"), "loss": float("-inf")})

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=refuse)


def test_a_torn_last_line_is_ignored_and_does_not_swallow_the_next(run: Run) -> None:
    run.log(1, {"reward": 1.0})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')
    assert [line["step"] for line in run.metrics()] == [1]
    run.log(2, {"reward": 2.0})
    assert run.metrics() == [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0}]


def test_rollouts_come_back_with_all_columns_and_null_where_nothing_was_said(run: Run) -> None:
    chat = ({"role": "user", "content": "7 stones, café"},)
    run.save_rollouts(5, [ROW, {**ROW, "prompt": chat, "rewards": None, "failure": "play: too long"}])
    table = run.rollouts(5)
    assert table.column_names == list(COLUMNS)
    first, second = table.to_pylist(maps_as_pydicts="strict")
    assert first == dict.fromkeys(COLUMNS) | ROW | {"step": 5}
    assert json.loads(second["prompt"]) == list(chat)
    assert second["failure"] == "play: too long" and second["rewards"] is None
    assert run.rollouts(5, columns=["reply"]).column_names == ["reply"]
    assert all(table.schema.field(name).metadata[b"about"] for name in COLUMNS)


def test_text_that_is_not_unicode_is_recorded_with_marks(run: Run) -> None:
    run.save_rollouts(1, [{**ROW, "reply": "a\ud800b", "prompt": ({"role": "user", "content": "\udfff"},)}])
    (row,) = run.rollouts(1, columns=["reply", "prompt"]).to_pylist()
    assert row["reply"] == "a?b" and json.loads(row["prompt"]) == [{"role": "user", "content": "?"}]


def test_a_misspelt_column_is_an_error_and_not_a_loss(run: Run) -> None:
    with pytest.raises(ValueError, match="'behaviour_logp' is no column"):
        run.save_rollouts(1, [{**ROW, "behaviour_logp": [0.0, 0.0]}])


def test_a_step_that_was_not_recorded_is_named_with_those_that_were(run: Run) -> None:
    run.save_rollouts(10, [ROW])
    run.save_rollouts(9, [ROW])
    run.save_rollouts(0, [], kind="eval")
    assert (run.recorded(), run.recorded("eval")) == ([9, 10], [0])
    assert run.rollouts(0, "eval").num_rows == 0
    with pytest.raises(ConfigError, match=r"step 7 was not recorded. Recorded train steps: 9, 10"):
        run.rollouts(7)


def test_rewind_sets_aside_what_came_later_and_loses_nothing(run: Run) -> None:
    for step in (0, 1, 2, 3, 4):
        run.log(step, {"reward": step / 10})
        run.save_rollouts(step, [ROW], kind="eval" if step in (0, 4) else "train")
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    before = (run.path / "metrics.jsonl").read_text()
    assert run.rewind(2) == 2
    assert [line["step"] for line in run.metrics()] == [0, 1, 2]
    assert (run.recorded(), run.recorded("eval")) == ([1, 2], [0])
    aside = run.path / "set-aside" / "1"
    assert (run.path / "metrics.jsonl").read_text() + (aside / "metrics.jsonl").read_text() == before + "\n"
    assert [file.name for file in sorted((aside / "rollouts").iterdir())] == ["eval-4.parquet", "step-3.parquet"]
    assert run.rewind(2) == 0
    assert run.rewind(0) == 2
    assert [line["step"] for line in Run(run.path / "set-aside" / "2").metrics()] == [1, 2]
    assert Run(run.path / "set-aside" / "2").recorded() == [1, 2]


def test_a_note_replaces_the_one_of_its_name(run: Run) -> None:
    run.note("best", {"step": 3})
    run.note("domains", {"maths": 0, "größe": 1})
    run.note("best", {"step": 5})
    assert Run(run.path).notes() == {"best": {"step": 5}, "domains": {"maths": 0, "größe": 1}}


def test_every_file_is_readable_by_all_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run = Run.create(tmp_path / "run", CONFIG, {})
        run.log(1, {"reward": 1.0})
        run.note("best", {"step": 1})
        run.save_rollouts(1, [ROW])
        modes = [path.stat().st_mode & 0o777 for path in run.path.rglob("*") if path.is_file()]
        run.rewind(0)
        modes += [path.stat().st_mode & 0o777 for path in run.path.rglob("*") if path.is_file()]
    finally:
        os.umask(before)
    assert modes == [0o644] * (4 + 5)


FILL = """
import resource, signal, sys
from tropism.record import Run
run = Run(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write = {
    "metrics.jsonl": lambda: [run.log(9, {"reward": 1.0}) for _ in range(1000)],
    "step-9.parquet": lambda: run.save_rollouts(9, [{"reply": str(i * 7919)} for i in range(9999)]),
    "notes.json": lambda: run.note("big", {"text": "x" * 9999}),
}[sys.argv[2]]
try:
    write()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("name", ["metrics.jsonl", "step-9.parquet", "notes.json"])
def test_a_full_disk_says_what_to_do_and_leaves_what_was_there(run: Run, name: str) -> None:
    run.log(1, {"reward": 1.0})
    run.save_rollouts(1, [ROW])
    run.note("best", {"step": 1})
    done = subprocess.run([sys.executable, "-c", FILL, run.path, name], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("TropismError ") and name in done.stdout
    assert "checkpoints saved before are intact" in done.stdout and "--resume" in done.stdout
    assert run.metrics()[0] == {"step": 1, "reward": 1.0}
    assert run.recorded() == [1] and run.rollouts(1).num_rows == 1
    assert run.notes() == {"best": {"step": 1}}
    assert not list(run.path.rglob("*.partial"))


def test_a_device_without_space_is_a_full_disk_and_other_errors_stay_themselves(tmp_path: Path) -> None:
    with pytest.raises(TropismError, match="No space left on device"), saving(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"x" * 10000)
    with pytest.raises(FileNotFoundError), saving(tmp_path / "a"):
        (tmp_path / "missing" / "a").write_bytes(b"")


WRITE = """
import sys
from tropism.record import Run
run = Run(sys.argv[1])
run.save_rollouts(1, [{"reply": "old"}])
print("ready", flush=True)
while True:
    run.save_rollouts(1, [{"reply": str(i)} for i in range(2000)])
"""


def test_a_kill_in_the_write_leaves_the_old_file_or_the_new_one(run: Run) -> None:
    for pause in (0.0, 0.003, 0.011):
        worker = subprocess.Popen([sys.executable, "-c", WRITE, run.path], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(pause)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        assert run.rollouts(1, columns=["reply"]).num_rows in (1, 2000)
        assert run.recorded() == [1]


def test_importing_the_record_brings_neither_torch_nor_pyarrow() -> None:
    code = "import sys, tropism.record; print({'torch', 'pyarrow', 'yaml', 'tropism.types'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
