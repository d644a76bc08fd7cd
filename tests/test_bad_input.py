"""What can be wrong with what a person gives: a message that says so, the documented exit code, nothing lost."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest
import yaml

import world
from tropism.cli import main
from tropism.record import Run, latest
from tropism.training.model import load_policy

HERE = world.HERE


@pytest.fixture
def tropism(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder, in this process -> (exit code, what it said); never with a traceback."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tropism", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        _, err = capsys.readouterr()
        assert "Traceback" not in err and not Path("tropism-error.log").exists(), err
        assert err.count("tropism: ") == (0 if not ended.value.code else 1), err
        return ended.value.code or 0, err.partition("tropism: ")[2]

    return run


@pytest.fixture
def train(tropism, tmp_path):
    """Trains by a recipe given as a mapping -> (exit code, message)."""

    def run(recipe, *words):
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        return tropism("train", "recipe.yaml", "--quiet", *words)

    return run


def with_reward(folder, reward, train):
    recipe = world.grpo(folder, train=train, eval={"every": 0})
    recipe["stages"][0]["rewards"] = {f"{HERE}:{reward}": 1.0}
    return recipe


def with_rows(folder, rows, online, **train):
    """A recipe that plays on, or reads, a data set of these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = (world.grpo if online else world.sft)(folder, eval={"every": 0}, train=train)
    stage = recipe["stages"][0]
    if online:
        del stage["success"]
        stage |= {"env": {"dataset": {"path": str(path), "holdout": 0.0}}, "rewards": {f"{HERE}:noisy": 1.0}}
    else:
        stage["data"] = {"path": str(path)}
    return recipe


# -------------------------------------------------------------------------------------------------- recipes and data


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("train.lerning_rate=1", "train.learning_rate"),
        ("sampling.group=4", "sampling.groups"),
        ("method.clip_hihg=0.3", "method.clip_high"),
        ("model.devise=cpu", "model.device"),
        ("sede=1", "seed"),
        ("eval.tasks_=1", "eval.tasks"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(tropism, setting, nearest):
    code, said = tropism("train", "grpo", "env=tictactoe", setting)
    assert code == 2 and nearest in said and not Path("runs").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("eval.best=eval/win", "eval.every is 0"),
        ("train.learning_rate=.inf", "must be positive and finite"),
        ("train.final=1.5", "train.final is 1.5"),
        ("train.betas=[0.9, 1.0]", "train.betas is [0.9, 1.0]"),
        ("train.betas=[-0.1, 0.9]", "at least 0 and below 1"),
        ("rewards.win=.inf", "the weight of the reward win is inf"),
        ("rewards.win=-.inf", "must be finite"),
        ("method.eps=0", "GRPO's eps is 0"),
        ("method={constrained: {at_most: {los: 0.1}}}", "Constrained is about los, but the reward's parts are return"),
        ("eval={every: 5, kl: true, temperature: 0}", "eval.kl is a mean over replies that are sampled"),
        ("model.device=gpu", "model.device is 'gpu'"),
    ],
)
def test_a_number_or_name_that_cannot_work_is_refused(tropism, setting, says):
    code, said = tropism("train", "grpo", "env=tictactoe", setting)
    assert code == 2 and says in said and not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("data.demos=tictactoe", "train.epochs=2", "train.steps=9"), "train.steps is 9 and train.epochs 2"),
        (("data.demos=tictactoe", "train.mini_batches=4"), "train.mini_batches is 4"),
        (("data.demos=tictactoe", "data.split=test"), "data.split is 'test'"),
        (("data=rows.jsonl", "data={path: rows.jsonl, episodes: 5}"), "data.episodes is 5"),
        (("data=rows.jsonl", "data={path: rows.jsonl, balance: true}"), "SFT does not learn from pairs"),
    ],
)
def test_a_setting_that_data_would_ignore_is_refused(tropism, words, says):
    code, said = tropism("train", "sft", *words)
    assert code == 2 and says in said and not Path("runs").exists()


@pytest.mark.parametrize(("best", "says"), [("eval/lwo", "Did you mean eval/low?"), ("eval/success", "no such metric")])
def test_a_best_checkpoint_by_a_metric_that_no_evaluation_gives(train, tmp_path, best, says):
    recipe = world.grpo(tmp_path, eval={"best": best})
    del recipe["stages"][0]["success"]
    code, said = train(recipe)
    assert code == 2 and f"eval.best is {best!r}" in said and says in said


def test_an_unknown_setting_of_a_model_s_shape_names_those_there_are(tropism):
    code, said = tropism("train", "grpo", "env=tictactoe", "model.shape.hiden_size=32")
    assert code == 2 and "hiden_size" in said and "hidden_size" in said and not Path("runs").exists()


def test_a_data_set_without_the_prompt_s_column(train, tmp_path):
    code, said = train(with_rows(tmp_path, [{"question": "1 + 1", "answer": "2"}] * 4, online=True))
    assert code == 2 and "'prompt'" in said and "question" in said


def test_a_data_set_to_learn_from_without_any_of_the_columns(train, tmp_path):
    code, said = train(with_rows(tmp_path, [{"question": "1 + 1", "answer": "2"}], online=False))
    assert code == 2 and "question, answer" in said and "prompt and completion" in said


@pytest.mark.parametrize("online", [True, False])
def test_an_empty_data_set(train, tmp_path, online):
    code, said = train(with_rows(tmp_path, [], online))
    assert code == 2 and "rows.jsonl has no rows" in said and not (tmp_path / "run").exists()


def test_a_group_of_one(train, tmp_path):
    code, said = train(world.grpo(tmp_path, sampling={"group_size": 1}))
    assert code == 2 and "sampling.group_size is 1" in said and "Use group_size >= 2" in said


def test_a_model_without_tokenizer(train, tmp_path):
    load_policy(world_model()).save(tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    recipe = world.sft(tmp_path / "runs", eval={"every": 0}) | {"model": str(tmp_path / "model")}
    code, said = train(recipe)
    assert code == 2 and "tokenizer" in said and not (tmp_path / "runs").exists()


def world_model(**shape):
    from tropism.config import Model

    return Model(path="tiny", device="cpu", shape=world.MODEL["shape"] | shape)


def short(recipe, context):
    model = world.MODEL | {"shape": world.MODEL["shape"] | {"max_position_embeddings": context}}
    return recipe | {"model": model}


def test_no_prompt_fits_the_context(train, tmp_path):
    code, said = train(short(world.grpo(tmp_path), 8))
    assert code == 3 and "the prompt has 9 tokens but the model reads at most 8" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_some_prompts_do_not_fit_the_context(train, tmp_path, many, online):
    """They are left out and counted; too many of them stop the run."""
    rows = [{"prompt": "short " + "x" * (n % 4), "completion": "yes"} for n in range(40)]
    rows += [{"prompt": "long " * 10, "completion": "yes"}] * (20 if many else 2)
    recipe = with_rows(tmp_path, rows, online, steps=2, batch=len(rows))
    if online:
        recipe["stages"][0]["sampling"] = {"groups": len(rows), "group_size": 2, "max_tokens": 2}
    code, said = train(short(recipe, 24))
    record = Run(tmp_path / "run" / recipe["stages"][0]["name"])
    if many:
        assert code == 4 and "the model reads at most 24" in said and "train.failure_limit = 0.1" in said
    elif online:
        assert code == 0
        assert [line["failures"] for line in record.metrics()] == [pytest.approx(2 / 42)] * 2
    else:
        assert code == 0 and [line["failures"] for line in record.metrics()] == [0.0] * 2
        assert len(record.notes()["left_out"]["rows"]) == 2 and "row 40 has" in record.notes()["left_out"]["rows"][0]


# -------------------------------------------------------------------------------------------------------------- rewards


def test_a_reward_of_the_wrong_length(train, tmp_path):
    code, said = train(with_reward(tmp_path, "too_few", {}))
    assert (code == 2 and "too_few returned 11 values for 12 rollouts" not in said) or code == 2
    assert "too_few returned" in said and "one per rollout" in said


def test_a_reward_that_asks_for_a_column_that_is_not_there(train, tmp_path):
    code, said = train(with_reward(tmp_path, "needy", {}))
    assert code == 3 and "needy asks for the column 'colour'" in said and "answer" in said
    assert not (tmp_path / "run").exists(), "the mended recipe can start at once"


def test_a_reward_that_never_gives_a_number(train, tmp_path):
    code, said = train(with_reward(tmp_path, "never", {}))
    assert code == 3 and "never: part never is nan, which is not finite" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reward", "reasons", "share"),
    [
        ("picky", ["ValueError: an answer that this reward has not heard of"], 1 / 3),
        ("not_numbers", ["is nan, which is not finite", "is inf, which is not finite"], 2 / 3),
    ],
)
def test_rollouts_that_cannot_be_scored_are_counted_and_above_the_limit_the_run_stops(
    train, tmp_path, reward, reasons, share
):
    folders = tmp_path / "below", tmp_path / "above"
    code, _ = train(with_reward(folders[0], reward, {"steps": 2, "failure_limit": 0.9}))
    record = Run(folders[0] / "run" / "rl")
    assert code == 0 and [line["failures"] for line in record.metrics()] == [pytest.approx(share)] * 2
    assert any(weight for row in record.rollouts(1).to_pylist() for weight in row["weight"] or ())

    code, said = train(with_reward(folders[1], reward, {"steps": 2, "failure_limit": 0.2}))
    assert code == 4 and f"{int(6 * share)} of 6 rollouts" in said and "train.failure_limit = 0.2" in said
    recorded = {row["failure"] for row in Run(folders[1] / "run" / "rl").rollouts(1).to_pylist()}
    for reason in reasons:
        assert reason in said and any(failure and reason in failure for failure in recorded)


def test_a_reward_that_breaks_down_loses_nothing(train, tmp_path, monkeypatch):
    recipe = with_reward(tmp_path, "breaking", {"save_every": 0})
    code, said = train(recipe)
    record = Run(tmp_path / "run" / "rl")
    assert code == 4 and "ConnectionError: the judge does not answer" in said and "--resume" in said
    assert latest(record.checkpoints_dir).name == "checkpoint-4" and record.recorded() == [1, 2, 3, 4, 5]
    monkeypatch.setenv("WORLD_WELL", "1")
    assert train(recipe, "--resume")[0] == 0
    assert [line["step"] for line in record.metrics()] == [1, 2, 3, 4, 5, 6, 7]
    assert [path.name for path in record.path.glob("set-aside/1/rollouts/*")] == ["step-5.parquet"]


def test_rewards_that_are_all_equal_stop_the_run_and_are_shown(train, tmp_path):
    recipe = with_reward(tmp_path, "constant", {"patience": 3})
    recipe["stages"][0]["method"] = "grpo"
    code, said = train(recipe)
    record = Run(tmp_path / "run" / "rl")
    assert code == 4 and "the last 3 steps taught nothing" in said and "6 × 0.25" in said
    assert said.count("\n  task seed") == 4 and "reward 0.25, {'low':" in said
    assert latest(record.checkpoints_dir).name == "checkpoint-3"


def test_a_run_of_which_every_update_was_skipped_has_failed(train, tmp_path):
    recipe = with_reward(tmp_path, "enormous", {"steps": 3, "mini_batches": 1})
    recipe["stages"][0]["method"] = {"grpo": {"scale": "none"}}
    code, said = train(recipe)
    lines = Run(tmp_path / "run" / "rl").metrics()
    assert [line["skipped"] for line in lines] == [1, 1, 1] and [line["updates"] for line in lines] == [0, 0, 0]
    assert code == 1 and "no update moved the weights" in said


# ----------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(("room", "fits"), [(40_000, "tokenizer.json"), (100_000, "model.safetensors")])
def test_a_full_disk_in_the_middle_of_a_checkpoint(train, tmp_path, monkeypatch, room, fits):
    """Files of more than `room` bytes cannot be written once step 4 is done: the weights, or only the optimizer."""
    recipe = with_reward(tmp_path, "filling", {})
    saved = tmp_path / "run" / "rl" / "checkpoints"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setenv("WORLD_ROOM", str(room))
    try:
        code, said = train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sizes = {path.name: path.stat().st_size for path in (saved / "checkpoint-3").rglob("*")}
    assert sizes[fits] < room < sizes["model.safetensors" if fits == "tokenizer.json" else "trainer.pt"]
    assert code == 1 and "checkpoint-6 could not be written: File too large" in said and "free some space" in said
    assert [path.name for path in saved.iterdir()] == ["checkpoint-3"]
    monkeypatch.delenv("WORLD_ROOM")
    assert train(recipe, "--resume")[0] == 0
    assert [line["step"] for line in Run(saved.parent).metrics()] == [1, 2, 3, 4, 5, 6, 7]


def test_ctrl_c(train, tmp_path, monkeypatch):
    recipe = with_reward(tmp_path, "interrupting", {})
    code, said = train(recipe)
    assert code == 130 and said == "interrupted. Continue with --resume.\n"
    monkeypatch.setenv("WORLD_WELL", "1")
    assert train(recipe, "--resume")[0] == 0


def test_a_run_that_is_there_is_not_touched(train, tmp_path):
    recipe = world.sft(tmp_path, eval={"every": 0}, train={"steps": 1})
    assert train(recipe)[0] == 0
    old = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    code, said = train(recipe)
    assert code == 2 and "--resume" in said and "--fresh" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == old
    assert train(recipe, "--fresh")[0] == 0
    assert (tmp_path / "run.1" / "demos" / "metrics.jsonl").exists()


def test_what_is_wrong_with_a_later_stage_is_said_before_the_first_one_trains(train, tmp_path):
    recipe = world.sft(tmp_path)
    recipe["stages"] += with_reward(tmp_path, "needy", {})["stages"]
    code, said = train(recipe)
    assert code == 3 and "colour" in said and not (tmp_path / "run").exists()


def test_a_resume_with_another_recipe_says_which_keys_differ(train, tmp_path):
    recipe = with_reward(tmp_path, "interrupting", {})
    assert train(recipe)[0] == 130
    code, said = train(recipe, "--resume", "train.learning_rate=0.5")
    assert code == 2 and "train.learning_rate: 0.01 -> 0.5" in said
