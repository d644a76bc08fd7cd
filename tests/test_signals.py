"""bench/signals.py: each arm that it compares is a recipe that resolves; it runs, goes on and counts as it says."""

import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import curves
import signals
from tropism.recipe import resolve
from tropism.teacher import teacher_of

PATHS = {"start": "somewhere/start", "EXPERT": "some/expert", "EXPERT-sums": "some/sums", "EXPERT-game": "some/game"}
CASES = [(name, label) for name, setting in signals.SETTINGS.items() for label in (*setting.arms, *setting.experts)]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(signals.ROOT)


@pytest.mark.parametrize(("name", "label"), CASES)
def test_every_arm_has_a_recipe_with_its_rate_and_the_words_that_the_start_model_knows(name, label):
    setting = signals.SETTINGS[name]
    recipe = resolve(signals.recipe_of(setting, label, 3e-4, 7, PATHS))
    (stage,) = recipe.stages
    assert (recipe.model.path, recipe.seed, stage.train.learning_rate) == (PATHS["start"], 7, 3e-4)
    teacher = teacher_of(stage.method)
    if teacher is not None and teacher.reads:
        assert teacher.closing == "" and all(teacher.words(read) in teacher.say.values() for read in teacher.reads)
    elif teacher is not None:
        who = teacher.who if isinstance(teacher.who, str) else " ".join(teacher.who.values())
        assert who.startswith("some/")


def test_arms_differ_from_the_recipe_in_what_they_say_alone():
    setting = signals.SETTINGS["hints"]
    one, other = (resolve(signals.recipe_of(setting, f"gated {kind}", 1e-4, 0, PATHS)) for kind in ("right", "leaky"))
    assert one.stages[0].env.options["kind"] == "right" and other.stages[0].env.options["kind"] == "leaky"
    assert one.stages[0].train == other.stages[0].train and one.stages[0].method == other.stages[0].method
    late = resolve(signals.recipe_of(signals.SETTINGS["late"], "grpo", 1e-4, 0, PATHS)).stages[0].train
    assert late.steps == 10 * one.stages[0].train.steps


def test_a_job_is_run_for_real_leaves_a_line_and_is_not_run_again(tmp_path, monkeypatch):
    raw = yaml.safe_load((signals.ROOT / "recipes" / "signals.yaml").read_text())
    raw["model"] = {"path": "tiny", "shape": {"hidden_size": 16, "num_hidden_layers": 1}}
    for stage in raw["stages"]:
        stage["train"] |= {"steps": 1, "batch": 8}
        stage["sampling"] |= {"groups": 2, "group_size": 2}
    raw["stages"][0]["data"]["episodes"] = 16
    raw["stages"][1]["eval"] = {"every": 1, "tasks": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    setting = signals.Setting(str(tmp_path / "small.yaml"), {"grpo": signals.arm("grpo")}, 0.5)
    monkeypatch.setattr(signals, "SETTINGS", {"small": setting})
    monkeypatch.setattr(signals, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(signals, "RESULTS", tmp_path / "results")
    paths = signals.start("small")
    for _ in range(2):
        signals.run("small", [("grpo", 1e-4, 5)], paths, 1)
    (line,) = signals.results("small")
    assert (line["label"], line["rate"], line["seed"]) == ("grpo", 1e-4, 5)
    assert len(line["success"]) == 1 and len(line["held_out"]) == 2 and line["minutes"] > 0


def line(label, rate, seed, *success):
    return {"label": label, "rate": rate, "seed": seed, "success": list(success), "held_out": [success[-1]]}


def best(lines, label):
    return curves.best_rate(lines, label, signals.RATES, signals.TUNED_ON)


def test_workers_end_with_the_process_that_began_them():
    """A pipe that both write to ends when the last of them does."""
    begin = "import os, sys, time; sys.path.append('bench'); import signals; pool = signals.workers(1); "
    program = begin + "print(pool.submit(os.getpid).result(), os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker, itself = map(int, parent.stdout.readline().split())
        parent.kill()
        assert worker != itself == parent.pid and parent.communicate(timeout=60) == ("", None)


def test_the_rate_is_chosen_on_the_tuning_seeds_alone_and_only_when_all_are_there():
    tuned = [line("grpo", rate, seed, rate * 1e3) for rate in signals.RATES for seed in signals.TUNED_ON]
    other = [line("grpo", signals.RATES[0], seed, 9.0) for seed in signals.SEEDS]
    assert best(tuned + other, "grpo") == max(signals.RATES)
    assert best(tuned[1:] + other, "grpo") is None
    assert best(tuned, "ppo") is None


def test_only_runs_at_the_chosen_rate_are_shown_and_no_tuning_seed():
    lines = [line("grpo", rate, seed, 0.1) for rate in signals.RATES for seed in (*signals.TUNED_ON, 0)]
    found = curves.chosen(lines, {"grpo": signals.RATES[1], "ppo": signals.RATES[0]}, signals.SEEDS)
    assert {label: [(run["rate"], run["seed"]) for run in runs] for label, runs in found.items()} == {
        "grpo": [(signals.RATES[1], 0)]
    }


def test_an_interval_holds_the_mean_and_narrows_to_a_point_where_seeds_agree():
    low, high = curves.interval([0.1, 0.5, 0.9])
    assert 0.1 <= low < 0.5 < high <= 0.9
    assert curves.interval([0.4] * 5) == pytest.approx((0.4, 0.4))


def test_what_runs_took_is_added_up():
    lines = [{"minutes": minutes} for minutes in (1.0, 2.0, 57.0)]
    assert curves.spent(lines) == "3 runs, 1.0 hours of a core; median 2.0 minutes, longest 57.0"


def test_a_level_is_reached_when_the_mean_of_a_window_is():
    assert curves.reaching([0.0] * 4 + [1.0] * 6, 0.8, window=5) == 8
    assert curves.reaching([0.5] * 20, 0.8) is None


def test_a_long_run_is_told_late_at_its_lowest_and_against_the_base():
    """Two seeds of 20 steps: windows of five are 0.5, 0.5, 0.5 and then the last one."""

    def runs(*ends):
        return [{"success": [0.5] * 15 + [end] * 5, "held_out": [0.0, *[end] * 5]} for end in ends]

    told = list(curves.long_table({"grpo": runs(0.8, 0.9), "low": runs(0.6, 0.7)}))
    assert told[2] == "| grpo | 0.850 | 0.850 | 0 | 0 | 4 |"
    assert told[3] == "| low | 0.650 | 0.650 | 1 | 0 | 4 |"


def test_a_curve_is_below_where_that_of_as_many_other_seeds_would_not_be():
    others = [line("grpo", 1e-4, seed, *[0.5 + 0.1 * seed] * 10) for seed in range(5)]
    low = [line("gated", 1e-4, seed, *[0.9] * 5, *[0.4] * 5) for seed in range(5)]
    assert curves.below(low, others) == [10]
    assert curves.below(others, others) == []


def test_seeds_of_the_same_are_outside_the_band_once_in_twenty_times():
    """Eight windows of independent noise: an interval for each alone would be left by one curve in three."""
    chance = random.Random(0)

    def seeds(count):
        return [line("grpo", 1e-4, n, *[chance.gauss(0, 1) for _ in range(40)]) for n in range(count)]

    shares = []
    for _ in range(5):
        edges = curves.band(seeds(200), 5)
        fives = [zip(*(curves.windows(run["success"]) for run in seeds(5)), strict=True) for _ in range(400)]
        means = [[statistics.fmean(window) for window in five] for five in fives]
        out = [any(not low < m < high for m, (low, high) in zip(five, edges, strict=True)) for five in means]
        shares.append(sum(out) / len(out))
    assert 0.03 < statistics.fmean(shares) < 0.07


def test_arms_are_compared_seed_by_seed():
    """Seeds differ by far more than arms do: only their differences say that one is 0.1 ahead on every seed."""

    def lines(label, ahead, seeds):
        told = {"label": label, "held_out": [0.9], "eval/commas": [1, 1], "eval/gaps": [2, 2]}
        return [told | {"seed": n, "success": [0.1 * n + ahead] * 10} for n in seeds]

    base = lines("grpo", 0.0, range(10))
    assert curves.more(lines("mine", 0.1, range(3)), base) == "+0.100 (+0.100 to +0.100)"
    told = list(curves.second_table({"grpo": base[:5], "mine": lines("mine", -0.2, range(5))}, base))
    assert told[2].endswith("| 0 | none |  |") and told[3].endswith("-0.200 (-0.200 to -0.200) |")


def test_a_figure_is_one_picture_with_the_base_in_every_panel():
    from xml.etree import ElementTree

    arms = {f"m{k}": [line(f"m{k}", 1e-4, seed, *[0.1 * k] * 10) for seed in range(2)] for k in range(1, 8)}
    picture = ElementTree.fromstring(curves.figure("success", {"grpo": arms["m1"], **arms}))
    charts = [child for child in picture if child.tag.endswith("svg")]
    assert len(charts) == 2 and picture.get("viewBox").startswith("0 0 1040")
    assert all("grpo" in ElementTree.tostring(chart, encoding="unicode") for chart in charts)
    assert list(curves.panels(["a right", "a leaky", "b right", "b leaky"])) == [": right", ": leaky"]
    assert list(curves.panels(["a", "b sums", "b game"])) == [" (1)"], "a word that nobody shares is no panel"
