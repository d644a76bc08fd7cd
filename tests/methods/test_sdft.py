"""SDFT (arXiv:2601.19897) is SDPO's reverse KL after a demonstration; test_sdpo.py tries its loss beside SDPO's."""

import pytest
import torch

from toy import gradient, toy_batch
from tropism.config import Named, Stage
from tropism.errors import ConfigError
from tropism.methods.sdft import SDFT
from tropism.methods.sdpo import SDPO
from tropism.teacher import Teacher
from tropism.training.teachers import check
from tropism.types import Task

close = torch.testing.assert_close


def test_sdft_is_sdpo_with_reverse_kl():
    weights, batch = toy_batch()
    some = SDFT(teacher=Teacher(reads=("demonstration",), top_k=3))
    close(gradient(some, weights, batch), gradient(SDPO(divergence="reverse"), weights, batch), rtol=0, atol=0)
    assert (gradient(some, weights, batch) - gradient(SDPO(), weights, batch)).abs().max() > 1e-3


def test_the_default_teacher_is_a_slow_copy_that_read_the_column_demonstration():
    assert SDFT().teacher == Teacher(who="ema", rate=0.01, reads=("demonstration",), top_k="all")
    assert SDFT().needs.live == {"topk_logp"} and SDFT().needs.sampling == {"rollouts"}


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"SDFT's teacher\.top_k is 0"):
        SDFT(teacher=Teacher(reads=("demonstration",)))


class Shown:
    """Tasks with a demonstration, as far as `columns` says so."""

    def __init__(self, **columns):
        self.columns = columns

    def task(self, number):
        return Task(env="shown", seed=number, columns=self.columns)


def test_a_task_without_the_demonstration_is_an_error_before_the_run_starts():
    stage = Stage(name="rl", method=SDFT(), env=Named(name="dataset"))
    check(SDFT().teacher, stage, Shown(demonstration="2 + 2 = 4", answer="4"))
    with pytest.raises(
        ConfigError, match="the teacher reads the column 'demonstration', but 256 of 256 tasks of shown"
    ):
        check(SDFT().teacher, stage, Shown(answer="4"))
