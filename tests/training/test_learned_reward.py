"""A reward model as a stage's reward: trained on pairs, then asked about replies, alone or with others."""

import json

import pytest

import tropism
import world
from again import same, train_until
from tropism.config import Learned
from tropism.errors import ConfigError, GuardStopped
from tropism.record import Run, latest

PAIRS = [
    {"prompt": f"{n % 2} say {'abc'[n % 3]}: ", "chosen": "aab"[: 1 + n % 3], "rejected": "zyx"} for n in range(12)
]


def recipe(folder, learned="rm", **stage):
    """Demonstrations, a reward model that likes early letters, and a policy that is paid by it alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    made = world.sft(folder, train={"steps": 2})
    scorer = {"name": "rm", "method": "reward_model", "start": "demos", "data": {"path": str(folder / "pairs.jsonl")}}
    scorer["train"] = {"steps": 8, "batch": 6, "learning_rate": 1e-2, "save_every": 4, "threads": 1}
    other = scorer | {"name": "rm2", "data": {"path": str(folder / "pairs.jsonl")}}
    other["train"] = scorer["train"] | {"learning_rate": 3e-3}
    rl = world.grpo(folder, train={"steps": 4, "save_every": 2})["stages"][0]
    rl |= {"start": "demos", "rewards": {"reward_model": 1.0}, "reward_models": learned, "method": "grpo"}
    rl["eval"] = {"every": 4, "tasks": 3, "best": "eval/reward"}
    made["stages"] += [scorer, other, rl | stage]
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    return tropism.train(recipe(folder, {"who": ["rm", "rm2"], "combine": "penalised"}), quiet=True).path


def test_the_policy_is_paid_by_the_models_of_earlier_stages_and_their_spread_is_recorded_only(run):
    lines = [line for line in Run(run / "rl").metrics() if "loss" in line]
    assert len(lines) == 4 and all(line["rewards/reward_model/spread/mean"] > 0 for line in lines)
    assert lines[0]["reward"] == pytest.approx(lines[0]["rewards/reward_model/mean"])
    assert any("eval/reward" in line for line in Run(run / "rl").metrics())


def test_one_model_may_be_maximised_while_another_watches(tmp_path):
    made = recipe(tmp_path, {"who": ["rm", "rm2"]}, rewards={"reward_model/rm": 2.0})
    made["stages"][-1]["eval"]["best"] = "eval/reward_model/rm2"
    lines = Run(tropism.train(made, quiet=True).path / "rl").metrics()
    for line in lines:
        if "loss" in line:
            own = {name: line[f"rewards/reward_model{name}/mean"] for name in ("", "/rm", "/rm2")}
            assert line["reward"] == pytest.approx(2 * own["/rm"]) and own["/rm"] != own["/rm2"]
            assert own[""] == pytest.approx((own["/rm"] + own["/rm2"]) / 2)
    assert Run(tmp_path / "run" / "rl").notes()["best"]["metric"] == "eval/reward_model/rm2"


def test_a_stage_that_reads_data_is_watched_at_its_evaluations(tmp_path):
    made = recipe(tmp_path)
    offline = made["stages"][0] | {"name": "again", "start": "demos", "reward_models": "rm"}
    offline["eval"] = {"every": 2, "tasks": 3, "env": f"{world.HERE}:World", "best": "eval/reward_model", "kl": True}
    made["stages"][-1] = offline
    lines = Run(tropism.train(made, quiet=True).path / "again").metrics()
    found = [line for line in lines if "eval/reward_model" in line]
    assert len(found) == 2 and found[0]["eval/kl/episode"] == 0 < abs(found[1]["eval/kl/episode"])
    assert "eval/low" in found[0]


def test_models_are_called_by_as_much_of_their_paths_as_tells_them_apart():
    assert Learned(who=("runs/a/rm", "runs/b/rm")).names == ("a/rm", "b/rm")
    assert Learned(who=("runs/a/rm", "rm2")).names == ("rm", "rm2") and Learned(who="runs/a/rm").names == ("rm",)
    with pytest.raises(ConfigError, match="twice the same"):
        Learned(who=("rm", "rm"))
    with pytest.raises(ConfigError, match="so is how far models disagree"):
        Learned(who=("rm", "spread"))


def test_a_single_model_has_no_part_of_its_own(tmp_path):
    made = recipe(tmp_path, rewards={"reward_model/rm": 1.0})
    with pytest.raises(ConfigError, match="there is no reward 'reward_model/rm'"):
        tropism.train(made, quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_start_models_replies_have_mean_zero_and_deviation_one(tmp_path):
    run = tropism.train(recipe(tmp_path, sampling={"groups": 40, "group_size": 2, "max_tokens": 4}), quiet=True).path
    first = Run(run / "rl").metrics()[1]
    assert abs(first["rewards/reward_model/mean"]) < 0.4 and 0.4 < first["rewards/reward_model/std"] < 1.6
    plain = recipe(tmp_path / "plain", {"who": "rm", "standardise": False})
    raw = Run(tropism.train(plain, quiet=True).path / "rl").metrics()[1]
    assert raw["rewards/reward_model/mean"] > 1


def test_a_killed_run_ends_as_if_it_had_not_been(run, tmp_path, monkeypatch):
    made = recipe(tmp_path, {"who": ["rm", "rm2"], "combine": "penalised"})
    train_until(made, 3, monkeypatch, stage="rl")
    tropism.train(made, resume=True, quiet=True)
    same(tmp_path / "run", run, "rl")


def test_a_run_elsewhere_may_be_named(run, tmp_path):
    made = recipe(tmp_path, str(run / "rm"))
    made["stages"] = [stage for stage in made["stages"] if stage["name"] in ("demos", "rl")]
    assert tropism.train(made, quiet=True).model.is_dir()


@pytest.mark.parametrize(
    ("learned", "says"),
    [
        ("demos", "holds no reward model"),
        ({"who": []}, "reward_models.who is empty"),
        ({"who": "rm", "penalty": -1.0}, "pay for disagreement"),
        ({"who": "./nothing"}, "could not be loaded"),
    ],
)
def test_what_is_no_reward_model_is_refused(learned, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        tropism.train(recipe(tmp_path, learned), quiet=True)


def test_rows_of_data_are_not_scored(tmp_path):
    made = recipe(tmp_path)
    made["stages"][1]["reward_models"] = "rm2"
    with pytest.raises(ConfigError, match="reads data, where nothing is scored"):
        tropism.train(made, quiet=True)


# ----------------------------------------------------------------------------------------------- a critic, and a budget


def by_ppo(folder, **stage):
    return recipe(folder, method={"ppo": {"kl": 0.05}}, critic="rm", **stage)


def test_a_critic_that_starts_as_the_reward_model_says_its_scores_and_has_weights_of_its_own(run, tmp_path):
    from small import rollout, turn
    from tropism.config import Model
    from tropism.training.collate import collate
    from tropism.training.model import load_policy
    from tropism.training.scorer import Scorer

    policy, scorer = load_policy(Model(path=str(run / "demos"), device="cpu")), Scorer(str(run / "rm"))
    policy.add_own_critic(Scorer(str(run / "rm")).module)
    out = policy.forward(collate([rollout(turn([5, 6], [7, 8])), rollout(turn([9], [10]))], codes={}))
    assert out.last_value.tolist() == pytest.approx(scorer([[5, 6, 7, 8], [9, 10]]), abs=1e-5)
    shared = {p.data_ptr() for p in policy.module.parameters()} & {p.data_ptr() for p in policy.critic.parameters()}
    assert not shared and out.value.requires_grad


def test_ppo_with_its_own_critic_ends_a_killed_run_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = tropism.train(by_ppo(tmp_path / "whole"), quiet=True).path
    train_until(by_ppo(tmp_path / "dead"), 3, monkeypatch, stage="rl")
    tropism.train(by_ppo(tmp_path / "dead"), resume=True, quiet=True)
    same(tmp_path / "dead" / "run", whole, "rl")
    lines = [line for line in Run(whole / "rl").metrics() if "loss" in line]
    assert lines[0]["value/loss"] != lines[-1]["value/loss"] and all("kl/episode" in line for line in lines)


def test_a_critic_of_a_method_without_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="names a critic, rm, but GRPO has none"):
        tropism.train(recipe(tmp_path, critic="rm"), quiet=True)


def test_a_budget_stops_the_run_with_a_checkpoint_and_says_how_far_it_went(tmp_path):
    made = recipe(tmp_path, train={"steps": 40, "learning_rate": 3e-2, "kl_budget": 0.5, "save_every": 100})
    with pytest.raises(GuardStopped, match=r"nats per episode away .* train.kl_budget = 0.5 allows"):
        tropism.train(made, quiet=True)
    lines = [line for line in Run(tmp_path / "run" / "rl").metrics() if "loss" in line]
    assert lines[-1]["kl/episode"] > 0.5 and all(line["kl/episode"] <= 0.5 for line in lines[:-1]) and len(lines) < 40
    assert abs(lines[0]["kl/episode"]) < 1e-5
    assert latest(Run(tmp_path / "run" / "rl").checkpoints_dir).name == f"checkpoint-{len(lines)}"
