"""How long a stage lasts that reads rows: so many passes over them, where nobody says how many steps."""

import json

import pytest

import tropism
import world
from again import train_until
from tropism import api
from tropism.errors import ConfigError
from tropism.recipe import resolve
from tropism.record import Run


@pytest.fixture
def recipe(tmp_path):
    lines = [{"prompt": f"{n} ", "completion": "a" * (1 + n % 4)} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(name, **train):
        made = world.sft(tmp_path / name, eval={"every": 0})
        made["stages"][0] |= {
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "train": {"batch": 4, "save_every": 1, "learning_rate": 1e-3} | train,
        }
        return made

    return make


@pytest.mark.parametrize(("train", "steps"), [({}, 3), ({"epochs": 2}, 5), ({"batch": 64}, 1), ({"steps": 4}, 4)])
def test_a_stage_lasts_so_many_epochs_and_the_plan_knows(recipe, train, steps):
    made = recipe("run", **train)
    assert next(api.plan(resolve(made), "h100")).steps == steps
    done = tropism.train(made, quiet=True)
    assert done.model.name == f"checkpoint-{steps}"
    assert [line["step"] for line in Run(done.path / "demos").metrics()] == list(range(1, steps + 1))


def test_its_schedule_knows_the_end(recipe):
    done = tropism.train(recipe("run", epochs=2, decay="linear"), quiet=True)
    rates = [line["learning_rate"] for line in Run(done.path / "demos").metrics()]
    assert rates == pytest.approx([1e-3 * (1 - k / 5) for k in range(5)])


def test_it_resumes_bit_for_bit_and_knows_when_it_is_finished(recipe, tmp_path, monkeypatch):
    whole = tropism.train(recipe("whole", epochs=2), quiet=True)
    train_until(recipe("cut", epochs=2), 3, monkeypatch)
    cut = tropism.train(recipe("cut", epochs=2), resume=True, quiet=True)
    losses = [[line["loss"] for line in Run(one.path / "demos").metrics()] for one in (whole, cut)]
    assert losses[0] == losses[1] and cut.model.name == "checkpoint-5"
    (cut.path / "report.html").touch()
    Run(cut.path / "demos").note("table", {})
    with pytest.raises(ConfigError, match="is finished"):
        tropism.train(recipe("cut", epochs=2), resume=True, quiet=True)


def test_what_a_stage_will_sample_counts_as_what_it_may_keep(tmp_path):
    world_of = {"env": {"tictactoe": {}}, "tasks": 6, "samples": 4}
    for keep, count in (("best", 6), ("pairs", 12), ("labels", 24)):
        method = {"best": "sft", "pairs": "dpo", "labels": "kto"}[keep]
        stage = {
            "name": "rows",
            "method": method,
            "data": {"sampled": world_of | {"keep": keep}},
            "train": {"batch": 4},
        }
        made = {"name": "run", "model": "tiny", "stages": [stage | {"success": {"part": "return"}}]}
        later = {
            "name": "more",
            "success": {"part": "return"},
            "method": method,
            "data": {"path": "rows"},
            "train": {"batch": 4, "epochs": 3},
        }
        made["stages"] += [later | {"start": "rows"}]
        first, second = api.plan(resolve(made), "h100")
        assert (first.steps, second.steps) == (-(-count // 4), -(-3 * count // 4))
