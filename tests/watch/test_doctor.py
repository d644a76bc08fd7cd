"""Every start-up check passes on a run that is well, and fails on the fault that it is there for."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

import world
from tropism.api import Lines, doctor, resolved_recipe
from tropism.cli import main
from tropism.errors import CheckFailed
from tropism.methods.grpo import GRPO
from tropism.record import Run
from tropism.rollout.sampler import Local
from tropism.training import examine as bringing
from tropism.training.examine import collated, examine, probe
from tropism.training.model import load_policy
from tropism.training.run import open_job
from tropism.types import Batch, Output, Task, TokenLoss
from tropism.watch import doctor as checks

PLAIN = "prompts are plain text, so this chat model reads them without its template"
LINES = (
    "rewards: ",
    PLAIN,
    "sampler and trainer: ",
    "decoder: ",
    "weights: ",
    "stop token: ",
    "mask: ",
    "micro-batches: ",
)


SHARP = world.MODEL | {"shape": world.MODEL["shape"] | {"initializer_range": 0.3, "num_hidden_layers": 2}}
"""A policy that is surer of what it says than weights are at the start."""


def job_of(make=world.grpo, model=world.MODEL, **changes):
    """A stage as a run opens it."""
    recipe = resolved_recipe(make("unused", **changes) | {"model": model}, (), {})
    policy = load_policy(recipe.model, seed=0)
    return open_job(recipe, recipe.stages[0], recipe.model, policy, Path("unused"), Lines())


@pytest.mark.parametrize(
    "pack, attention, said",
    [
        (True, "", "rows are packed"),
        (False, "", "rows are padded, for model.pack is off"),
        (True, "eager", "rows are padded, for the model takes no packed ones"),
    ],
)
def test_the_last_line_says_how_rows_are_laid_out(pack, attention, said):
    job = job_of(model=world.MODEL | {"pack": pack})
    if attention:
        job.policy.module.set_attn_implementation(attention)
    examine(job)
    assert job.watcher.lines[-1].endswith(said)


def test_a_run_that_is_well_passes_every_check_a_line_each():
    job = job_of()
    before = copy.deepcopy(job.policy.module.state_dict())
    assert examine(job) is True
    assert [line.startswith(start) for line, start in zip(job.watcher.lines, LINES, strict=True)] == [True] * 8
    torch.testing.assert_close(job.policy.module.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in job.policy.module.parameters())


def test_data_that_is_well_passes_the_checks_that_data_can_pass():
    job = job_of(world.sft)
    assert examine(job) is True
    starts = (PLAIN, *LINES[5:])
    assert [line.startswith(start) for line, start in zip(job.watcher.lines, starts, strict=True)] == [True] * 4
    assert "trained in 8 of 8 replies" in job.watcher.lines[1]


def test_a_sampler_of_older_weights_is_found():
    job = job_of()
    policy = job.policy
    policy.sampler = Local(copy.deepcopy(policy.module), policy.words.stop_ids, policy.context, policy.precision)
    with pytest.raises(CheckFailed, match="does not use the weights that are trained"):
        examine(job)


def test_a_sampler_at_another_temperature_is_found():
    job = job_of(model=SHARP)
    sampler = job.policy.sampler
    job.policy.sampler = lambda prompts, params: sampler(prompts, replace(params, temperature=0.5))
    with pytest.raises(CheckFailed, match="at one temperature"):
        examine(job)
    job.policy.sampler = sampler
    assert examine(job) is True


def test_a_sampler_that_differs_a_little_is_another_author():
    """Then importance weights correct for it, and the run goes on."""
    job = job_of(model=SHARP)
    sampler = job.policy.sampler
    job.policy.sampler = lambda prompts, params: sampler(prompts, replace(params, temperature=0.98))
    assert examine(job) is False
    assert "proximal log-probs are measured" in job.watcher.lines[2]


def test_log_probs_that_are_not_numbers_are_found():
    job = job_of()
    batch = collated(probe(job), job)
    for wrong in (float("nan"), float("inf")):
        broken = batch.replace(behavior_logp=torch.full_like(batch.behavior_logp, wrong))
        with pytest.raises(CheckFailed):
            checks.agreement(broken, job.policy.forward, "float32")


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("make", [world.grpo, world.sft])
def test_a_mask_that_is_shifted_by_one_is_found(make, shift, monkeypatch):
    real = bringing.collate

    def shifted(*args, **kwargs):
        batch = real(*args, **kwargs)
        mask = batch.action_mask.roll(shift, 1)
        mask[:, 0] = False  # where the last place of a full row would come round to
        return batch.replace(action_mask=mask)

    job = job_of(make)
    rollouts = probe(job)
    assert checks.mask_is_reply(rollouts, collated(rollouts, job), job.policy.tokenizer.decode)
    monkeypatch.setattr(bringing, "collate", shifted)
    with pytest.raises(CheckFailed, match="the mask covers"):
        checks.mask_is_reply(rollouts, collated(rollouts, job), job.policy.tokenizer.decode)
    with pytest.raises(CheckFailed):
        examine(job)


def test_the_mask_is_shown_with_the_reply_marked():
    job = job_of(world.sft)
    rollouts = probe(job)
    line, (start, end) = checks.mask_is_reply(rollouts, collated(rollouts, job), job.policy.tokenizer.decode)
    assert line[start:end] == rollouts[0].turns[0].reply + "<|end|>" and line[:start].endswith(
        rollouts[0].turns[0].prompt
    )


def without_stop(rollout):
    turns = (replace(turn, action=turn.action[:-1]) for turn in rollout.turns)
    return replace(rollout, turns=tuple(turns))


def test_data_whose_replies_do_not_end_is_found():
    job = job_of(world.sft)
    endless = replace(job.draw, rows=[(without_stop(rollout),) for (rollout,) in job.draw.rows])
    with pytest.raises(CheckFailed, match="never learn to stop"):
        examine(replace(job, draw=endless))


def test_a_stop_token_off_the_mask_is_found():
    job = job_of(world.sft)
    rollouts = probe(job)
    batch = collated(rollouts, job)
    stops = job.policy.words.stop_ids
    unmasked = batch.replace(action_mask=batch.action_mask & (batch.tokens != stops[0]))
    assert "of 8 replies" in checks.stop_is_trained(rollouts, batch, stops, given=True)
    with pytest.raises(CheckFailed, match="do not end with a stop token that is trained"):
        checks.stop_is_trained(rollouts, unmasked, stops, given=False)


@dataclass(frozen=True, kw_only=True)
class MeanOfWhatItSees(GRPO):
    """The commonest fault there is: an average per micro-batch."""

    def weights(self, batch: Batch) -> torch.Tensor:
        return batch.action_mask.float()

    def loss(self, out: Output, batch: Batch, credit: torch.Tensor) -> TokenLoss:
        return TokenLoss(super().loss(out, batch, credit).values / batch.action_mask.sum())


def test_a_loss_that_averages_what_it_sees_is_found():
    job = job_of()
    job = replace(job, stage=replace(job.stage, method=MeanOfWhatItSees()))
    with pytest.raises(CheckFailed, match="cut into micro-batches"):
        examine(job)


def test_a_gradient_that_is_rounding_alone_is_no_fault():
    """As of a teacher that is the student itself."""
    whole, parts = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))

    def compared(whole, parts):
        return checks.splits_agree(lambda tokens: whole if tokens > 1 else parts, 512, 1e-3)

    assert compared(whole * 1e-9, parts * 1e-9).endswith("is rounding and says nothing")
    for pair in ((whole * 1e-6, parts * 1e-6), (whole, 0 * parts), (0 * whole, parts), (0 * whole, parts / 0)):
        with pytest.raises(CheckFailed, match="cut into micro-batches"):
            compared(*pair)


def distilled(method="opd", **teacher):
    def changed(*args, **changes):
        recipe = world.grpo(*args, **changes)
        recipe["stages"][0]["method"] = {method: {"teacher": {"who": "frozen"} | teacher}}
        return recipe

    return job_of(changed)


@pytest.mark.parametrize("method", ["opd", "g_opd", "reopold", "mopd"])
def test_a_teacher_that_says_what_the_student_says_is_a_missing_one(method):
    """Rounding is a gradient, which AdamW would scale up: the run would learn from noise and end well."""
    with pytest.raises(CheckFailed, match=r"the teacher is missing: of \d+ tokens .* set teacher.who"):
        examine(distilled(method))
    assert examine(distilled(method, must_add=-1)) is True
    assert examine(distilled(method), trained=False) is True  # a later stage starts from other weights than these


def test_a_gradient_that_is_rounding_is_not_compared():
    job = distilled(top_k="all", must_add=-1)
    assert examine(job) is True
    assert "is rounding and says nothing" in job.watcher.lines[-1]


def test_a_reward_that_names_a_column_that_is_not_there_is_found():
    with pytest.raises(CheckFailed, match=r"needy asks for the column 'colour'.*has answer"):
        examine(job_of(rewards={f"{world.HERE}:needy": 1.0}))
    with pytest.raises(CheckFailed, match="'level'"):  # in one of the tasks is not enough
        tasks = [Task(columns={"level": 1}), Task(columns={"answer": "b"})]
        checks.gets_columns({"mine": ("level",)}, tasks)


def test_in_bfloat16_proximal_log_probs_are_measured(tmp_path, monkeypatch):
    """The sampler's cache rounds in another order than the trainer's pass, so the two are not one policy."""
    import tropism

    for compute in ("bfloat16", "float32"):
        recipe = world.grpo(tmp_path / compute, train={"steps": 2}, sampling={"max_tokens": 12}, eval={"every": 0})
        path = tropism.train(recipe | {"model": SHARP | {"compute": compute}}, quiet=True).path
        record = Run(path / "rl")
        rows = [row for row in record.rollouts(2).to_pylist() if row["weight"]]
        same = all(row["proximal_logp"] == row["behavior_logp"] for row in rows)
        assert same == record.notes()["sampler"]["exact"] == (compute == "float32")
        weights = [line["sampling/importance_sampling_ratio/mean"] for line in record.metrics()]
        assert weights == [1.0, 1.0] if compute == "float32" else weights == pytest.approx([1, 1], abs=0.05)


def test_the_command_prints_the_checks_of_every_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = world.sft(tmp_path / "runs")
    recipe["stages"] += world.grpo(tmp_path / "runs")["stages"]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["tropism", "doctor", "recipe.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split(": ")[0].removesuffix(":") for line in lines]
    assert not ended.value.code
    online = [start.removesuffix(": ") for start in LINES]
    assert starts == ["demos", PLAIN, *online[5:], "rl", *online]
    assert not (tmp_path / "runs").exists() and lines == doctor(resolved_recipe(recipe, (), {}))
