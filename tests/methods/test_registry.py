import dataclasses
import inspect
import sys
from pathlib import Path

import pytest

from tropism.errors import ConfigError
from tropism.methods import METHODS, find
from tropism.methods.grpo import GRPO

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from lines import added


def test_a_method_is_found_by_name():
    assert find("grpo") is GRPO
    assert all(find(name) is method for name, method in METHODS.items())


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        find("grop")
    assert str(error.value) == "there is no method 'grop'. Did you mean grpo?"
    with pytest.raises(ConfigError, match="Did you mean sft"):
        find("STF")


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ConfigError, match="Did you mean " + " or ".join(METHODS)):
        find("xyz")


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_method_is_a_frozen_dataclass_with_a_complete_card(method):
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    rows = [line.strip().split("  ")[0] for line in method.__doc__.splitlines()]
    assert [row for row in rows if row in ("Credit", "Loss", "Needs", "Reduces to")] == [
        "Credit",
        "Loss",
        "Needs",
        "Reduces to",
    ]


LONGER = {"ppo": 60, "openclaw": 60, "gated": 60}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_grpo_and_at_most_forty_lines_of_code(name):
    """Three may have sixty: a critic, two versions of a paper, a calibrated gate."""
    source, base = (inspect.getsource(sys.modules[find(method).__module__]) for method in (name, "grpo"))
    assert added(source, base) <= LONGER.get(name, 40)
