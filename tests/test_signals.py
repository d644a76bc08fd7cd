"""bench/signals.py: each method it compares has a recipe that resolves; its statistics are what they are called."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import signals
from tropism.recipe import resolve
from tropism.teacher import teacher_of

PATHS = {"start": "somewhere/start", signals.EXPERT: "somewhere/expert"}
CASES = [(name, method) for name, setting in signals.SETTINGS.items() for method in setting.methods]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_method_has_a_recipe_with_its_rate_and_the_words_that_the_start_model_knows(name, method):
    setting = signals.SETTINGS[name]
    recipe = resolve(signals.recipe_of(setting, method, 3e-4, 7, PATHS))
    (stage,) = recipe.stages
    assert (recipe.model.path, recipe.seed, stage.train.learning_rate) == (PATHS["start"], 7, 3e-4)
    teacher = teacher_of(stage.method)
    if teacher is not None and teacher.reads:
        assert teacher.closing == "" and all(teacher.words(read) in teacher.say.values() for read in teacher.reads)
    elif teacher is not None:
        assert teacher.who == PATHS[signals.EXPERT]


def line(method, rate, seed, *success):
    return {"method": method, "rate": rate, "seed": seed, "success": list(success), "held_out": [success[-1]]}


def test_the_rate_is_chosen_on_the_tuning_seeds_alone_and_only_when_all_are_there():
    tuned = [line("grpo", rate, seed, rate * 1e3) for rate in signals.RATES for seed in signals.TUNED_ON]
    other = [line("grpo", signals.RATES[0], seed, 9.0) for seed in signals.SEEDS]
    assert signals.best_rate(tuned + other, "grpo") == max(signals.RATES)
    assert signals.best_rate(tuned[1:] + other, "grpo") is None
    assert signals.best_rate(tuned, "ppo") is None


def test_an_interval_holds_the_mean_and_narrows_to_a_point_where_seeds_agree():
    low, high = signals.interval([0.1, 0.5, 0.9])
    assert 0.1 <= low < 0.5 < high <= 0.9
    assert signals.interval([0.4] * 5) == pytest.approx((0.4, 0.4))


def test_a_level_is_reached_when_the_mean_of_a_window_is():
    assert signals.reaching([0.0] * 4 + [1.0] * 6, 0.8, window=5) == 8
    assert signals.reaching([0.5] * 20, 0.8) is None
