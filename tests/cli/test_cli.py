"""The command line: what it prints, where, and the exit code that a scheduler sees."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tropism.cli import main
from tropism.config import Recipe
from tropism.methods import METHODS
from tropism.recipe import load

TROPISM = str(Path(sys.executable).parent / "tropism")

QUICK = ["train.steps=2", "train.threads=1", "model.device=cpu"]
DEMOS = ["sft", "data.demos=tictactoe", "data.episodes=20", "train.batch=4", "name=quick", *QUICK]


@pytest.fixture
def tropism(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder, in this process -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TROPISM_DEBUG", raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tropism", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


# ------------------------------------------------------------------------------------------------------------ help


def test_help_takes_less_than_half_a_second():
    def seconds():
        start = time.perf_counter()
        subprocess.run([TROPISM, "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


def test_python_dash_m_is_the_same_command():
    words = [sys.executable, "-m", "tropism", "--help"]
    assert (
        subprocess.run(words, check=True, capture_output=True).stdout
        == subprocess.run([TROPISM, "--help"], check=True, capture_output=True).stdout
    )


def test_help_lists_every_command(tropism):
    code, out, _ = tropism("--help")
    assert code == 0
    for command in ("train", "eval", "sample", "play", "label", "methods", "envs", "diff", "doctor", "view"):
        assert f"  {command} " in out


# --------------------------------------------------------------------------------------------------------- recipes


def test_a_dry_run_prints_a_recipe_that_resolves_to_the_same_run(tropism, tmp_path):
    words = ["grpo", "env=tictactoe", "method.clip_high=0.28", "train.learning_rate=1e-5"]
    code, out, err = tropism("train", *words, "--dry-run")
    assert code == 0 and err == ""
    (tmp_path / "printed.yaml").write_text(out)
    assert load("printed.yaml") == load(words[0], words[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed.yaml"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_resolves(path):
    recipe = load(str(path))
    assert isinstance(recipe, Recipe) and recipe.name == path.stem


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "grpo", "env=tictactoe", "sampling.group_sise=3"], "Did you mean sampling.group_size?"),
        (["train", "grop"], "Did you mean grpo"),
        (["train", "grpo", "env=tictactoe", "sampling.group_size=1"], "nothing would be learned"),
        (["train", "grpo", "env=tictactoe", "--resume", "--fresh"], "Give one of them"),
        (["diff", "grop"], "there is no method 'grop'. Did you mean grpo"),
        (["doctor", "grpo", "num_generations=2"], "Here it is sampling.group_size."),
        (["view", "nowhere"], "nowhere holds no run"),
        (["play", "tiny", "--env", "reasoning"], "no opponent whose place a person could take"),
        (["play", "tiny", "--env", "tictactow"], "Did you mean tictactoe?"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tropism, words, message):
    code, out, err = tropism(*words)
    assert code == 2 and out == ""
    assert err.startswith("tropism: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["train"], ["eval", "tiny"], ["fly"], ["eval", "tiny", "--env", "x", "--games", "0"]]
)
def test_a_wrong_use_is_exit_code_2(tropism, words):
    code, out, err = tropism(*words)
    assert code == 2 and out == "" and "Usage: tropism" in err


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def broken(tmp_path):
    """A run whose record no version of ours can have written: an error that nobody foresaw."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: [unclosed")
    return str(tmp_path / "run")


def test_an_unforeseen_error_is_exit_code_1_and_its_traceback_is_in_a_file(tropism, tmp_path, broken):
    code, _, err = tropism("view", broken)
    assert code == 1 and err.startswith("tropism: ") and "Traceback" not in err
    log = tmp_path / "tropism-error.log"
    assert str(log) in err
    assert "Traceback (most recent call last)" in log.read_text() and f"tropism view {broken}" in log.read_text()


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback_and_writes_no_file(tropism, tmp_path, broken, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("TROPISM_DEBUG", "1")
    code, _, err = tropism("view", broken, *(["--debug"] if how == "flag" else []))
    assert code == 1 and "Traceback (most recent call last)" in err
    assert not (tmp_path / "tropism-error.log").exists()


# ------------------------------------------------------------------------------------------------------------ show


def test_methods_has_a_line_for_every_method(tropism):
    code, out, _ = tropism("methods")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(METHODS)
    assert "Group Relative Policy Optimization" in out
    own = [line.split()[0] for line in out.splitlines() if "(no paper)" in line]
    assert own == ["gated", "sft"] and "REINFORCE (doi:10.1007/BF00992696)" in out


def test_envs_lists_environments_with_their_options(tropism):
    code, out, _ = tropism("envs")
    assert code == 0 and "tictactoe" in out and "opponent: random" in out and "path: required" in out


def test_diff_explains_a_method_by_what_it_changes_in_another(tropism):
    _, out, _ = tropism("diff", "sft")
    assert out.startswith("--- methods/grpo.py\n+++ methods/sft.py\n")
    assert "-class GRPO:" in out and "+class SFT:" in out and "\n     def" not in out
    _, back, _ = tropism("diff", "grpo", "sft")
    assert "+class GRPO:" in back and "-class SFT:" in back
    assert tropism("diff", "grpo")[:2] == (0, "")


# -------------------------------------------------------------------------------------------------- runs and models


def test_train_writes_a_run_that_view_shows_and_sample_speaks(tropism, tmp_path):
    code, _, err = tropism("train", *DEMOS)
    assert code == 0, err
    assert (tmp_path / "runs" / "quick" / "sft" / "metrics.jsonl").exists()
    report = tmp_path / "runs" / "quick" / "report.html"
    written = report.read_text()
    report.unlink()
    code, out, _ = tropism("view", "runs/quick")
    assert code == 0 and out.strip() == "runs/quick/report.html" and report.read_text() == written
    model = next((tmp_path / "runs" / "quick" / "sft" / "checkpoints").glob("checkpoint-*"))
    code, out, _ = tropism("sample", str(model), "you X", "--max-tokens", "8", "-n", "2", "--seed", "3")
    assert code == 0 and out.startswith("[1]") and "[2]" in out
    assert out == tropism("sample", str(model), "you X", "--max-tokens", "8", "-n", "2", "--seed", "3")[1]


def test_a_run_is_neither_overwritten_nor_resumed_into_nothing(tropism):
    assert tropism("train", *DEMOS)[0] == 0
    code, _, err = tropism("train", *DEMOS)
    assert code == 2 and "--resume" in err and "--fresh" in err
    code, _, err = tropism("train", *DEMOS, "--resume")
    assert code != 0 and "nothing to resume" in err
    code, _, err = tropism("train", *DEMOS, "train.learning_rate=3e-4", "--resume")
    assert code == 2 and "train.learning_rate" in err
    assert tropism("train", *DEMOS, "--fresh")[0] == 0


def test_eval_prints_one_json_object_and_nothing_else(tropism):
    words = ["eval", "tiny", "--env", "tictactoe", "--games", "20", "--max-tokens", "8", "--json", "--seed", "7"]
    code, out, err = tropism(*words)
    assert code == 0, err
    found = json.loads(out)
    assert {"return", "win", "draw", "loss", "illegal", "games", "seed"} <= set(found)
    assert found["games"] == 20 and found["seed"] == 7
    assert abs(found["win"] + found["draw"] + found["loss"] - 1) < 1e-9
    assert found["return"] == pytest.approx(found["win"] - found["loss"])
    assert json.loads(tropism(*words)[1]) == found


def test_eval_passes_options_to_the_environment(tropism):
    words = ["eval", "tiny", "--env", "tictactoe", "--games", "2", "--max-tokens", "4"]
    code, _, err = tropism(*words, "--option", "opponent=nobody")
    assert code == 2 and "no opponent 'nobody'" in err
    code, out, _ = tropism(*words, "--option", "opponent=perfect")
    assert code == 0 and out.splitlines()[0].split()[0] == "return"


def test_doctor_prints_its_checks_and_trains_nothing(tropism, tmp_path):
    code, out, err = tropism("doctor", "grpo", "env=tictactoe", "sampling.groups=2", "sampling.max_tokens=8", *QUICK)
    assert code == 0, err
    assert len(out.splitlines()) >= 2 and not (tmp_path / "runs").exists()


def test_an_interrupted_run_is_exit_code_130_and_says_how_to_go_on(tmp_path):
    words = [TROPISM, "train", *DEMOS, "train.steps=100000"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE, preexec_fn=heard)
    metrics = tmp_path / "runs" / "quick" / "sft" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and b"--resume" in err and b"Traceback" not in err
