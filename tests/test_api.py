"""What a person calls: what is left when a run stops early, what is printed, and how often anything is opened."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

import tropism
import world
from tropism import api
from tropism.errors import CheckFailed, ConfigError, GuardStopped
from tropism.training import run as training
from tropism.view.progress import Progress

QUIET_REWARD = {f"{world.HERE}:constant": 1.0}


def stopping(folder):
    """A recipe that its guard stops at step 3, for every rollout earns the same."""
    recipe = world.grpo(folder, train={"patience": 3}, eval={"every": 0}, method="grpo")
    recipe["stages"][0]["rewards"] = QUIET_REWARD
    return recipe


class Ends(api.Lines):
    """Counts the stages that were ended."""

    ended = 0

    def end(self, stage):
        self.ended += 1


def test_watchers_are_told_the_end_of_a_stage_that_a_guard_stops(tmp_path):
    watcher = Ends()
    with pytest.raises(GuardStopped):
        training.run(api.resolved_recipe(stopping(tmp_path), (), {}), watcher)
    assert watcher.ended == 1


def test_a_run_that_a_guard_stops_leaves_a_report_and_says_where(tmp_path, capsys):
    with pytest.raises(GuardStopped):
        tropism.train(stopping(tmp_path))
    report = tmp_path / "run" / "report.html"
    assert f"report  {report}" in capsys.readouterr().err
    assert "3 steps" in report.read_text("utf-8")


def test_a_run_that_fails_keeps_its_own_error_and_one_that_never_began_gets_no_report(tmp_path, capsys):
    recipe = stopping(tmp_path)
    recipe["stages"][0]["rewards"] = {f"{world.HERE}:needy": 1.0}
    with pytest.raises(CheckFailed):
        tropism.train(recipe)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="holds a run already"):
        tropism.train(stopping(tmp_path))
    assert list((tmp_path / "run").iterdir()) == [] and "report" not in capsys.readouterr().err


def test_a_report_needs_the_tokenizer_of_a_run_and_not_its_weights(tmp_path):
    done = tropism.train(world.grpo(tmp_path, train={"steps": 2}, eval={"every": 0}), quiet=True)
    written = done.report.read_text("utf-8")
    for weights in done.path.rglob("model.safetensors"):
        weights.unlink()
    done.report.unlink()
    assert api.report(done.path) == done.report and done.report.read_text("utf-8") == written


def test_after_training_no_model_is_loaded_again(tmp_path, monkeypatch):
    def load_policy(*_):
        raise AssertionError("loaded again")

    monkeypatch.setattr(api, "load_policy", load_policy)
    recipe = world.sft(tmp_path, train={"steps": 1}, eval={"every": 0})
    assert tropism.train(recipe, quiet=True).report.exists()


def test_every_line_of_the_doctor_is_told_at_once_and_the_reply_is_marked(tmp_path):
    recipe = world.sft(tmp_path)
    broken = world.grpo(tmp_path)["stages"][0] | {"rewards": {f"{world.HERE}:needy": 1.0}}
    recipe["stages"] += [broken]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=200)
    with pytest.raises(CheckFailed, match="colour"):
        api.doctor(api.resolved_recipe(recipe, (), {}), Progress(console=console))
    lines = screen.getvalue().splitlines()
    told = {line.split(":")[0]: line for line in lines}
    assert lines[0] == "demos:" and lines[-1] == "rl:" and {"stop token", "micro-batches"} < set(told)
    assert "\x1b[1;32m" in told["mask"]


COUNTED = '''
from pathlib import Path

from world import World


class Counted(World):
    """Notes every time that it is opened."""

    def __init__(self, split, seed):
        super().__init__(split, seed)
        with open(Path(__file__).with_name("opened"), "a") as file:
            file.write(f"{split}\\n")
'''


def test_a_source_is_opened_once_for_each_split(tmp_path):
    (tmp_path / "counted.py").write_text(COUNTED)
    opened, env = tmp_path / "opened", f"{tmp_path / 'counted.py'}:Counted"
    done = tropism.train(world.grpo(tmp_path, env=env, train={"steps": 1}, eval={"every": 1}), quiet=True)
    assert opened.read_text().split() == ["train", "test"]
    opened.unlink()
    api.evaluate(done.model, env, tasks=2, max_tokens=4)
    assert opened.read_text().split() == ["test"]


def test_failures_are_a_key_of_an_evaluation_only_where_there_are_some(tmp_path):
    numbers = api.evaluate("tiny", "tictactoe", tasks=2, max_tokens=4)
    assert "failures" not in numbers and numbers["games"] == 2
    env = tmp_path / "long.py"
    env.write_text(
        "from world import Letters\n\n\nclass Long(Letters):\n"
        "    def __init__(self, task, sibling):\n        super().__init__('abc'[task.seed % 2] * (1 + task.seed % 2))\n"
        "    def score(self, seat):\n        return {'low': float('nan') if self.letter == 'bb' else 1.0}\n"
    )
    numbers = api.evaluate("tiny", f"{env}:Long", tasks=12, max_tokens=4)
    assert 0 < numbers["failures"] < 1 and numbers["games"] == 12


def controls(text):
    return [c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_what_an_untrained_model_says_cannot_move_the_cursor(tmp_path, monkeypatch, capsys):
    from tropism.cli.models import sample
    from tropism.cli.play import play

    assert controls("".join(api.sample("tiny", "say", n=4, max_tokens=64)))
    sample("tiny", "say", n=4, max_tokens=64)
    monkeypatch.setattr("sys.stdin", io.StringIO("5\n\n"))
    play("tiny", env="tictactoe", seed=1)
    out = capsys.readouterr().out
    assert "[4]" in out and "model: " in out and controls(out) == []


def test_quiet_prints_the_paths_of_model_and_report_on_standard_output_and_nothing_else(tmp_path, capsys):
    import yaml

    from tropism.cli.runs import train

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(world.sft(tmp_path, train={"steps": 1}, eval={"every": 0})))
    train(str(tmp_path / "recipe.yaml"), quiet=True)
    out, err = capsys.readouterr()
    run = Path(tmp_path / "run")
    model = run / "demos" / "checkpoints" / "checkpoint-1"
    assert out == f"model   {model}\nreport  {run / 'report.html'}\n" and err == ""
