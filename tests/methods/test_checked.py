"""Every setting that many methods share, at the last value that works and at the first that cannot."""

import inspect
from types import SimpleNamespace

import pytest

from tropism.errors import ConfigError
from tropism.methods import METHODS
from tropism.methods.checked import checked
from tropism.teacher import Teacher
from tropism.types import Needs

TOPK = Needs(measured=frozenset({"teacher_topk_logp"}))


def method(needs=None, **settings):
    """Something with these settings, and needs that are no setting."""
    kind = type("Made", (SimpleNamespace,), {"needs": needs or Needs()})
    return kind(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        *(({name: -1e-9}, f"Made's {name} is -1e-09, but cannot be negative")
          for name in ("clip_low", "clip_high", "kl", "clip_weight", "decay", "caution", "distill", "center")),
        *(({name: value}, f"Made's {name} is {value}") for name in ("discount", "trace") for value in (-0.01, 1.01)),
        ({"mix": 0.0}, "Made's mix is 0.0"),
        ({"mix": 1.0}, "Made's mix is 1.0"),
        ({"label_smoothing": -1e-9}, "Made's label_smoothing is -1e-09"),
        ({"label_smoothing": 0.5}, "Made's label_smoothing is 0.5"),
        ({"eps": 0.0}, "Made's eps is 0.0"),
        ({"truncate": 0.0}, "Made's truncate is 0.0"),
        ({"dual_clip": 1.2, "clip_high": 0.2}, "Made's dual_clip is 1.2.*1 \\+ clip_high = 1.2"),
        ({"longest": 0}, "Made's longest is 0"),
        ({"needs": TOPK, "teacher": Teacher(top_k=0)}, "Made's teacher.top_k is 0"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_by_name(settings, says):
    with pytest.raises(ConfigError, match=says):
        checked(method(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict.fromkeys(("clip_low", "clip_high", "kl", "clip_weight", "decay", "caution", "distill", "center"), 0.0),
        {"discount": 0.0, "trace": 1.0},
        {"discount": 1.0, "trace": 0.0},
        {"label_smoothing": 0.0},
        {"label_smoothing": 0.49},
        {"mix": 0.01},
        {"mix": 0.99},
        {"eps": 1e-12, "truncate": 1e-3, "longest": 1},
        {"dual_clip": 1.21, "clip_high": 0.2},
        {"dual_clip": None},
        {"needs": TOPK, "teacher": Teacher(top_k=1)},
        {"teacher": Teacher(top_k=0)},
    ],
)
def test_a_value_that_works_is_accepted(settings):
    checked(method(**settings))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_has_such_a_setting_asks(name):
    """Of its own first setting that is among those above, the refusal names class and setting."""
    cls = METHODS[name]
    shared = ("clip_low", "kl", "truncate", "decay", "caution", "label_smoothing", "center")
    for setting in (key for key in shared if key in inspect.signature(cls).parameters):
        with pytest.raises(ConfigError, match=f"{cls.__name__}'s {setting} is"):
            cls(**{setting: -1})
