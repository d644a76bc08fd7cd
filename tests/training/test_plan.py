"""What a recipe will take, said before it runs."""

import gc
import pathlib
import sys
from dataclasses import replace

import pytest
import torch

from tropism import api
from tropism.cli import plan as command
from tropism.config import Lora, Model
from tropism.errors import ConfigError
from tropism.recipe import resolve
from tropism.training import model, workload
from tropism.training import plan as planning
from tropism.training.model import load_policy

SUMS = {"reasoning": {"config": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}}}
RL = {
    "name": "rl",
    "method": "grpo",
    "env": SUMS,
    "sampling": {"groups": 4, "group_size": 3, "max_tokens": 24},
    "train": {"steps": 7},
}
SFT = {"name": "sft", "method": "sft", "data": {"demos": SUMS, "episodes": 50}, "train": {"steps": 5, "batch": 8}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(planning, "SECONDS", 0.05)


def planned(*stages, hardware="here", **model):
    recipe = resolve({"name": "plan", "model": {"path": "tiny", "device": "cpu"} | model, "stages": list(stages)})
    return list(api.plan(recipe, hardware))


def test_a_step_is_counted_on_its_own_tasks():
    """Prompts once per group; replies as long as the demonstrations; in the update prompts once again."""
    (plan,) = planned(RL)
    work = plan.work
    rows = [(tokens[: int(size)], int(start)) for tokens, size, start in spans(work.batch)]
    prompts = {tuple(tokens[:start]) for tokens, start in rows}
    assert len(rows) == work.rows == 12 and work.share == 1
    assert work.read == sum(map(len, prompts))
    assert work.drawn == sum(len(tokens) - start for tokens, start in rows)
    assert work.longest == max(len(tokens) - start for tokens, start in rows)
    assert work.read + work.drawn >= work.learned > work.drawn and work.measured == 0
    assert "demonstrations" in work.assumed


def spans(batch):
    return zip(batch.tokens.tolist(), batch.length, batch.action_mask.int().argmax(1), strict=True)


def test_what_a_method_measures_is_counted_as_often_as_it_is_read():
    plain, kept, taught, against = (
        planned(RL | {"method": method}, hardware="h100")[0]
        for method in (
            "grpo",
            {"grpo": {"kl": 0.1}},
            {"sdft": {"teacher": {"reads": ["worked"]}}},
            {"gated": {"teacher": {"reads": ["worked"], "against": ["decoy"]}}},
        )
    )
    assert plain.work.measured == 0 and kept.work.measured == kept.work.learned
    assert taught.work.measured == pytest.approx(taught.work.learned + taught.work.drawn, rel=0.01)
    assert against.work.measured == pytest.approx(2 * taught.work.measured, rel=0.01)
    assert kept.memory["teachers and reference"] == kept.memory["weights"]
    assert "teachers and reference" not in plain.memory


def test_a_teacher_of_another_size_counts_as_often_as_it_is_larger(tmp_path):
    """One twice as deep, and one per domain of which the other is the policy's own size; an adapter is its base."""
    tall = {"num_hidden_layers": 8}
    for name, shape in (("same", {}), ("tall", tall)):
        load_policy(Model(path="tiny", shape=shape, device="cpu"), 0).save(tmp_path / name)
    load_policy(Model(path=str(tmp_path / "tall"), lora=Lora(rank=1), device="cpu"), 0).save(tmp_path / "adapter")

    def of(who):
        (plan,) = planned(RL | {"method": {"opd": {"teacher": {"who": who}}}}, hardware="h100")
        return plan.work.measured / plan.work.learned, plan.memory["teachers and reference"] / plan.memory["weights"]

    count = {name: model.weights_of(str(tmp_path / name)) for name in ("same", "tall", "adapter")}
    larger = count["tall"] / count["same"]
    assert larger > 1.5 and count["adapter"] == count["tall"]
    for name, size in (("same", 1.0), ("tall", larger), ("adapter", larger)):
        assert of(str(tmp_path / name)) == pytest.approx((size, size), rel=1e-3)
    taught = RL | {"method": {"opd": {"teacher": {"who": str(tmp_path / "same")}}}}
    (adapter,) = planned(taught, hardware="h100", path=str(tmp_path / "tall"), lora={"rank": 1})
    assert adapter.memory["teachers and reference"] == 4 * count["same"]
    both = {"a": str(tmp_path / "same"), "b": str(tmp_path / "tall")}
    assert of(both) == pytest.approx(((1 + larger) / 2, 1 + larger), rel=1e-3)
    with pytest.raises(ConfigError, match="nowhere' could not be opened"):
        of(str(tmp_path / "nowhere"))


def test_rows_of_data_are_counted_as_they_are():
    (plan,) = planned(SFT)
    assert plan.work.drawn == plan.work.rows == 0 and "drawing" not in plan.seconds
    assert plan.work.learned <= int(plan.work.batch.length.sum())
    assert plan.work.learned > 0.5 * int(plan.work.batch.length.sum())


def test_a_part_of_the_tasks_stands_for_all_of_them():
    few, many = (
        planned(RL | {"sampling": RL["sampling"] | {"groups": groups}}, hardware="h100")[0] for groups in (16, 64)
    )
    assert many.work.share == 0.25 and many.work.rows == 4 * few.work.rows
    for name in ("read", "drawn", "learned"):
        assert getattr(many.work, name) == pytest.approx(4 * getattr(few.work, name), rel=0.05)


def test_memory_is_of_what_is_held_at_once():
    (plan,) = planned(RL)
    weights = sum(p.numel() for p in load_policy(resolve({"name": "x", "stages": [RL]}).model).module.parameters())
    assert plan.memory["weights"] == 4 * weights and plan.memory["gradients and moments"] == 12 * weights
    rest = sum(value for name, value in plan.memory.items() if name not in ("drawing", "learning"))
    assert plan.peak == rest + max(plan.memory["drawing"], plan.memory["learning"])
    assert plan.memory["the process"] > 5e7


def test_counting_what_a_pass_keeps_leaves_nothing_of_it_behind(tmp_path):
    """An operation that saved its own result would hold itself for ever, and all that led to it."""

    def alive():
        gc.collect()
        tensors = [one.untyped_storage() for one in gc.get_objects() if type(one) is torch.Tensor]
        return sum({one.data_ptr(): one.nbytes() for one in tensors}.values())

    recipe = resolve({"name": "plan", "model": {"path": "tiny", "device": "cpu"}, "stages": [RL]})
    policy, stage = load_policy(recipe.model, 0), recipe.stages[0]
    work = workload.counted(recipe, stage, policy, tmp_path)
    before = alive()
    assert planning.kept(stage, policy, work) > 1e6
    assert alive() - before < 1e5


@pytest.mark.skipif(sys.platform != "linux", reason="no other system keeps count")
def test_growth_is_what_work_takes_at_most_and_not_what_was_taken_before():
    kept = [torch.ones(5_000_000)]
    assert planning.growth(lambda: kept.append(torch.ones(10_000_000))) == pytest.approx(4e7, rel=0.1)
    assert planning.growth(lambda: torch.ones(20_000_000).sum()) == pytest.approx(8e7, rel=0.1)
    assert planning.growth(lambda: None) < 2e6


def test_growth_is_nothing_where_the_system_keeps_no_count(monkeypatch):
    done = []
    monkeypatch.setattr(planning, "Path", nowhere)
    assert planning.growth(lambda: done.append(1)) == 0 and done == [1]


def nowhere(name):
    return pathlib.Path("/nowhere" + name)


def test_what_is_kept_for_the_backward_pass_grows_with_the_micro_batch_and_shrinks_where_it_is_computed_again():
    def learning(**settings):
        stage = RL | {"sampling": RL["sampling"] | {"groups": 8, "group_size": 8}}
        micro = settings.pop("micro_tokens", 4096)
        (plan,) = planned(stage | {"train": {"steps": 1, "micro_tokens": micro}}, hardware="h100", **settings)
        return plan.memory["learning"]

    assert learning() > 2 * learning(micro_tokens=64)
    assert learning(gradient_checkpointing=True) < 0.6 * learning()


def test_a_data_sheet_gives_the_time_of_products_and_bandwidth(tmp_path):
    """6 operations a weight and token, 4 where only an adapter learns; weights read once for every token of the longest
    reply."""
    stage = RL | {"sampling": {"groups": 64, "group_size": 8, "max_tokens": 24}}
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    (plan,) = planned(stage, hardware="t4", shape=shape)
    load_policy(Model(path="tiny", shape=shape), 0).save(tmp_path)
    (adapter,) = planned(stage, hardware="t4", path=str(tmp_path), lora={"rank": 1})
    assert adapter.seconds["learning"] == pytest.approx(plan.seconds["learning"] * 4 / 6, rel=0.02)
    weights = plan.memory["weights"] / 4
    assert plan.seconds["learning"] == pytest.approx(6 * weights * plan.work.learned / (8e12 * 0.4), rel=0.01)
    assert plan.seconds["drawing"] >= plan.work.longest * 4 * weights / (320e9 * 0.5)
    assert plan.room == 16e9 and "not measured" in plan.notes[0]
    assert plan.bottleneck == max(plan.seconds, key=plan.seconds.get)


def test_an_unknown_machine_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"--hardware is h300.*here, h200, h100"):
        planned(RL, hardware="h300")


def test_the_command_says_time_memory_bottleneck_and_whether_it_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: plan\nmodel: {{path: tiny, device: cpu}}\nstages: [{SFT}, {RL}]".replace("'", ""))
    command.plan(str(path))
    said = capsys.readouterr().out
    assert "sft: 5 steps" in said and "rl: 7 steps" in said
    assert said.count("a step") == said.count("at its peak") == 2 and said.count(": fits") == 2
    assert " takes " in said and [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "seconds, said", [(3, "3 s"), (119, "119 s"), (121, "2.0 min"), (9000, "2.5 h"), (2e6, "23.1 days")]
)
def test_a_time_is_said_in_a_unit_that_fits_it(seconds, said):
    assert command.spell(seconds) == said


def test_what_does_not_fit_is_said_with_what_to_do():
    (plan,) = planned(RL, hardware="t4")
    said = list(command.lines(replace(plan, room=1e6)))
    assert any("does not fit: lower train.micro_tokens" in line for line in said)


def test_several_processes_share_the_groups_and_hold_everything_each(monkeypatch):
    """Four groups and three processes: one has two. Each keeps four fifths of its rate on one thread."""
    asked = []

    def timed(stage, policy, work):
        asked.append((work, torch.get_num_threads()))
        return {"drawing": 4.0, "learning": 8.0, "moving": 1.0}, (), 0.0

    monkeypatch.setattr(planning, "timed", timed)
    monkeypatch.setattr(api.processes, "rate_beside", lambda model, count: 0.8)
    monkeypatch.setattr(api.processes.cores, "to_try", lambda recipe: 3)
    monkeypatch.setattr(api.processes.cores, "remembered", lambda model, count: 1.4)
    made = {"name": "plan", "model": {"path": "tiny", "device": "cpu"}, "stages": [RL, RL | {"name": "again"}]}
    threads = torch.get_num_threads()
    one, three, auto = (list(api.plan(resolve(made | {"processes": n}))) for n in (1, 3, "auto"))
    assert torch.get_num_threads() == threads
    (alone, _), (part, single) = asked[0], asked[2]
    assert single == 1 and (len(part.batch), part.rows, part.share) == (6, 6, 1) and alone.rows == 12
    for name in ("read", "drawn", "learned"):
        assert getattr(part, name) == pytest.approx(getattr(alone, name) / 2, abs=1)
    for plan in (*three, *auto):
        assert plan.seconds == pytest.approx({"drawing": 5.0, "learning": 10.0, "moving": 1.25})
        assert plan.memory["weights"] == 3 * one[0].memory["weights"]
        assert plan.memory["gradients and moments"] == pytest.approx(4 * one[0].memory["gradients and moments"])
        assert plan.memory["learning"] < 3 * one[0].memory["learning"]
        assert plan.memory["the process"] == pytest.approx(3 * one[0].memory["the process"], rel=0.2)
        assert plan.notes == ("3 processes of one thread, each at 80% of its rate alone",)
        assert plan.work.learned == one[0].work.learned
    with pytest.raises(ConfigError, match=r"sampling.groups = 4, too few for 5"):
        list(api.plan(resolve(made | {"processes": 5})))


def test_a_faster_size_of_micro_batches_is_named(monkeypatch):
    monkeypatch.setattr(planning, "rate", lambda work, pieces, seconds: 100.0 + 50 * (len(pieces) > 2))
    stage = RL | {"sampling": RL["sampling"] | {"groups": 8, "group_size": 8}}
    (plan,) = planned(stage | {"train": {"steps": 1, "micro_tokens": 256}})
    assert plan.notes == ("train.micro_tokens: 128 would learn 50% faster than 256, in 0.5 times the memory",)
    (plan,) = planned(stage | {"train": {"steps": 1, "micro_tokens": 2048}})
    assert plan.notes == ()


def test_rows_that_an_earlier_stage_has_yet_to_write_are_counted_as_it_would_write_them():
    sampling = {"max_tokens": 24}
    pairs = {"sampled": {"env": SUMS, "tasks": 40, "samples": 2, "keep": "pairs", "noise": 1.0}}
    first = {"name": "scorer", "method": "reward_model", "data": pairs, "success": {"part": "correct"}}
    stages = [
        stage | {"sampling": sampling, "train": {"steps": 2, "batch": 8}}
        for stage in (first, {"name": "dpo", "method": "dpo", "data": {"path": "scorer"}})
    ]
    written, read = planned(*stages, hardware="h100")
    assert written.work.learned == read.work.learned > 0 and written.work.share == read.work.share
    assert read.work.measured == read.work.learned


def test_an_environment_that_knows_no_answer_is_planned_at_the_longest_reply(monkeypatch):
    def unknown(*_):
        raise ConfigError("no reference answers")

    monkeypatch.setattr(workload, "demonstration", unknown)
    (plan,) = planned(RL, hardware="h100")
    assert plan.work.longest == 24 and "as they may be, in one turn: 24 tokens" in plan.work.assumed
