"""Held-out rows: the same loss as in training, however it is split, and nothing learned."""

import json
import math
from dataclasses import replace

import pytest
import torch

import tropism
import world
from small import FAMILIES, small
from tropism.config import Data, Train
from tropism.errors import ConfigError
from tropism.methods.dpo import DPO
from tropism.methods.reward_model import RewardModel
from tropism.methods.sft import SFT
from tropism.record import Run
from tropism.training import run
from tropism.training.fit import load_rows, sifted
from tropism.training.held_out import HeldOut, of_pairs

ROWS = [{"prompt": f"{n}: ", "chosen": "a" * (1 + n % 3), "rejected": "b" * (1 + n % 2)} for n in range(9)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "x", "chosen": "c", "rejected": "c"}]))
    return str(file)


def held(path, method, policy, micro=16384, reference=None):
    rows = load_rows(Data(path=path), policy.words, 0, asked=method.needs.data)
    if not method.needs.data:
        pytest.fail("pairs are what is held out here")
    train = Train(micro_tokens=micro)
    forward = reference and reference.measuring(1.0, train)
    rows, _ = sifted(rows, 0.2, lambda _: None)
    return HeldOut(rows=rows, method=method, policy=policy, train=train, reference=forward)(0)[0]


def test_a_policy_that_is_its_reference_has_dpos_log_two(path):
    policy = small("tiny")
    numbers = held(path, DPO(), policy, reference=small("tiny"))
    assert numbers["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert numbers["eval/logps/chosen"] < 0


def test_no_split_changes_a_number_and_no_weight_moves(path):
    policy, reference = small("tiny"), small("tiny", seed=1)
    before = [parameter.clone() for parameter in policy.module.parameters()]
    whole, split = (held(path, DPO(), policy, micro, reference) for micro in (10_000, 40))
    assert whole.keys() == split.keys()
    assert all(whole[name] == pytest.approx(split[name], abs=1e-6) for name in whole)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.module.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in policy.module.parameters())


def test_pairs_of_one_task_are_pairs_all_the_same(path):
    """Rows that a model has sampled may have a task in common."""
    policy = small("tiny")
    rows, _ = sifted(load_rows(Data(path=path), policy.words, 0, asked=DPO().needs.data), 0.2, lambda _: None)
    same = [tuple(replace(one, group=0) for one in row) for row in rows]
    given = {
        "method": DPO(),
        "policy": policy,
        "train": Train(),
        "reference": small("tiny", seed=1).measuring(1.0, Train()),
    }
    assert HeldOut(rows=same, **given)(0) == HeldOut(rows=rows, **given)(0)


def test_accuracy_is_told_by_who_is_longer_and_calibration_by_how_sure_it_was():
    margin = torch.tensor([2.0, -1.0, 1.0, 3.0, -2.0])
    numbers = of_pairs(margin, torch.tensor([5, 5, 0, -1, -1]))
    assert numbers["accuracy/longer"] == 0.5 and numbers["accuracy/equal"] == 1 and numbers["accuracy/shorter"] == 0.5
    sure = torch.sigmoid(margin.abs())
    by_bin = {8: [(0, 1), (4, 0)], 7: [(1, 0), (2, 1)], 9: [(3, 1)]}
    wanted = sum(abs(sum(hit - float(sure[n]) for n, hit in some)) for some in by_bin.values()) / 5
    assert numbers["calibration"] == pytest.approx(wanted)
    assert "accuracy/longer" not in of_pairs(margin[:1], torch.tensor([0]))
    tie = of_pairs(torch.tensor([0.0, 2.0]), torch.tensor([1, 1]))
    assert tie["accuracy/longer"] == 0.5 and tie["calibration"] == pytest.approx(0.309601, abs=1e-6), (
        "a tie is not right"
    )


def test_lengths_belong_to_their_own_pairs(path):
    """A scorer that likes length is right exactly where the chosen answer is the longer one."""
    policy = small("tiny")
    policy.add_critic(bias=False)
    plain = policy.forward

    def by_length(batch, *args, **kwargs):
        out = plain(batch, *args, **kwargs)
        return type(out)(logp=out.logp, entropy=out.entropy, last_value=batch.action_mask.sum(1).float())

    policy.forward = by_length
    for micro in (10_000, 40):
        numbers = held(path, RewardModel(), policy, micro)
        assert numbers["eval/accuracy/longer"] == 1 and numbers["eval/accuracy/shorter"] == 0


def recipe(folder, path, **stage):
    train = {"steps": 4, "batch": 4, "learning_rate": 3e-3, "save_every": 2}
    stage = {"name": "s", "method": "reward_model", "data": {"path": path}, "train": train} | stage
    stage |= {"eval": {"every": 2, "tasks": 9, "best": "eval/rewards/accuracies"} | stage.get("eval", {})}
    model = {"path": "tiny", "device": "cpu", "shape": FAMILIES["tiny"]}
    return {"name": "run", "output": str(folder), "model": model, "stages": [stage]}


def test_a_run_evaluates_on_rows_and_keeps_its_best_by_them(path, tmp_path):
    run = tropism.train(recipe(tmp_path / "r", path, eval={"data": {"path": path}}), quiet=True)
    assert Run(run.path / "s").notes()["left_out"]["rows"] == [
        "row 9 has the same answer twice, from which nothing can be learned. Drop it."
    ]
    lines = [line for line in Run(run.path / "s").metrics() if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4] and run.best is not None
    assert {"eval/rewards/accuracies", "eval/rewards/margins", "eval/calibration"} <= lines[0].keys()
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2)) and lines[-1]["eval/loss"] < lines[0]["eval/loss"]


def test_sft_has_a_held_out_loss_too(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}", "completion": "abc"}) + "\n" for n in range(8)))
    run = tropism.train(
        recipe(tmp_path / "r", str(file), method=SFT(), eval={"data": {"path": str(file)}, "best": ""}), quiet=True
    )
    losses = [line["eval/loss"] for line in Run(run.path / "s").metrics() if "eval/loss" in line]
    assert losses[0] > losses[1] > losses[2]


def test_demonstrations_that_are_held_out_are_of_tasks_that_training_does_not_see(path, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "sifted", lambda rows, *rest: seen.append(rows) or sifted(rows, *rest))
    data = {"data": {"demos": f"{world.HERE}:World", "episodes": 30}}
    made = recipe(tmp_path, path, method="sft", eval=data | {"best": ""}, **data)
    lines = Run(tropism.train(made, quiet=True).path / "s").metrics()
    train, held_out = ({one.task.seed for row in rows for one in row} for rows in seen)
    assert len(train) == 30 and len(held_out) == 9 and not train & held_out
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eval": {"data": {"path": "rows"}, "env": "tictactoe"}}, "eval has env .* and data"),
        ({"eval": {}}, "has nothing to evaluate on"),
        (
            {"method": "grpo", "data": None, "env": "tictactoe", "eval": {"data": {"path": "rows"}}},
            "plays, but eval.data",
        ),
        ({"eval": {"data": {"path": "HERE"}, "best": "eval/accuracy"}}, "eval.best is 'eval/accuracy'"),
        ({"eval": {"data": {"path": "HERE", "balance": True}}}, "eval.data.balance would hide"),
        ({"eval": {"data": {"demos": "tictactoe"}}}, "RewardModel learns from pairs, .* has none"),
    ],
)
def test_what_cannot_be_evaluated_is_said(change, says, path, tmp_path):
    text = json.dumps(recipe(tmp_path / "r", path, **change)).replace("HERE", path)
    with pytest.raises(ConfigError, match=says):
        tropism.train(json.loads(text), quiet=True)
