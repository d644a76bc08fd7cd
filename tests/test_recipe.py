"""Recipes: what may be written, what it becomes, and what is said about what may not."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from tropism.api import resolved_recipe
from tropism.config import Data, Eval, Model, Named, Recipe, Sampling, Stage, Success, Train
from tropism.errors import ConfigError
from tropism.keys import PEERS, known
from tropism.methods import GRPO, METHODS, SFT
from tropism.recipe import differences, dump, load, resolve, text

TWO = """
name: noughts
model: {path: tiny, shape: {hidden_size: 64}}
report_to: trackio
stages:
  - name: format
    method: sft
    data: {demos: {tictactoe: {opponent: random}}, episodes: 4000}
    train: {learning_rate: 2e-3}
  - name: rl
    method: {grpo: {clip_high: 0.28}}
    env: {tictactoe: {opponent: mcts:10}}
    rewards: {return: 1, "judge.py:polite": 0.5}
    success: {part: win, at_least: 1}
    eval: {every: 5, env: tictactoe}
"""


@dataclass(frozen=True)
class Near:
    """A reward with a setting."""

    target: int

    def __call__(self, reply):
        return -abs(len(reply) - self.target)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "noughts.yaml").write_text(TWO)
    return tmp_path


def said(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        (load if isinstance(args[0], str) else resolve)(*args, **kwargs)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- what it means


def test_a_file_becomes_the_recipe_it_describes(here):
    assert load("recipes/noughts.yaml") == Recipe(
        name="noughts",
        model=Model(path="tiny", shape={"hidden_size": 64}),
        report_to=("trackio",),
        stages=(
            Stage(
                name="format",
                method=SFT(),
                data=Data(demos=Named(name="tictactoe", options={"opponent": "random"}), episodes=4000),
                train=Train(learning_rate=2e-3),
            ),
            Stage(
                name="rl",
                method=GRPO(clip_high=0.28),
                env=Named(name="tictactoe", options={"opponent": "mcts:10"}),
                rewards={"return": 1.0, "judge.py:polite": 0.5},
                success=Success(part="win", at_least=1.0),
                eval=Eval(every=5, env=Named(name="tictactoe")),
            ),
        ),
    )


def test_short_forms_mean_the_same_as_long_ones():
    short = {"name": "a", "model": "tiny", "method": "sft", "data": "rows.jsonl", "report_to": "none", "success": "win"}
    long = {
        "name": "a",
        "model": {"path": "tiny"},
        "stages": [{"name": "sft", "method": {"sft": {}}, "data": {"path": "rows.jsonl"}, "success": {"part": "win"}}],
        "report_to": [],
    }
    assert resolve(short) == resolve(long)


def test_objects_may_stand_where_settings_do():
    recipe = resolve({"method": GRPO(kl=0.1), "env": Named(name="tictactoe"), "sampling": Sampling(groups=2)})
    assert recipe == resolve({"method": {"grpo": {"kl": 0.1}}, "env": "tictactoe", "sampling": {"groups": 2}})
    assert recipe.name == "grpo-tictactoe" and recipe.stages[0].name == "grpo"


def test_overrides_reach_into_objects_and_leave_the_callers_alone():
    raw = {"method": GRPO(kl=0.1), "env": "tictactoe", "sampling": Sampling(groups=2), "train": {"steps": 3}}
    stage = resolve(raw, ["method.clip_high=0.3", "sampling.group_size=4", "train.batch=5"]).stages[0]
    assert stage.method == GRPO(kl=0.1, clip_high=0.3) and stage.sampling == Sampling(groups=2, group_size=4)
    assert stage.train == Train(steps=3, batch=5) and raw["train"] == {"steps": 3}


def test_a_reward_may_be_a_dataclass_that_can_be_called():
    raw = {"method": GRPO(), "env": "tictactoe", "rewards": {Near(3): 1.0}}
    assert dump(resolve(raw))["stages"][0]["rewards"] == {f"{__name__}:Near": 1.0}


def test_somebodys_own_method_is_named_by_its_file_and_comes_back_from_the_record():
    mixed = Path(__file__).parents[1] / "recipes" / "mixed.py"
    raw = {"method": {f"{mixed}:Mixed": {"share": 0.5}}, "env": "tictactoe"}
    recipe = resolve(raw, ["method.truncate=3"])
    method = recipe.stages[0].method
    assert (type(method).__name__, method.share, method.truncate) == ("Mixed", 0.5, 3.0)
    assert resolve(dump(recipe)) == recipe
    given = resolved_recipe(replace(method, share=0.7), (), {"env": "tictactoe"})  # as tropism.train takes it
    assert (given.name, given.stages[0].name, given.stages[0].method.share) == ("mixed", "mixed", 0.7)
    for name, reason in (("nowhere.py:Mixed", "there is no file"), (f"{mixed}:Missing", "has no 'Missing'")):
        with pytest.raises(ConfigError, match=reason):
            resolve({"method": name, "env": "tictactoe"})
    with pytest.raises(ConfigError, match="is no method, for it lacks needs, credit, weights, loss"):
        resolve({"method": f"{mixed}:group_relative", "env": "tictactoe"})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_recipe_by_name(method):
    needs = METHODS[method]().needs
    source = "env=tictactoe" if needs.sampling else "data.path=rows.jsonl" if needs.data else "data.demos=tictactoe"
    recipe = load(method, [source])
    assert recipe.name.startswith(f"{method}-") and recipe.stages[0].method == METHODS[method]()


def test_kto_is_refused_with_one_row_a_step():
    """It compares each answer with that to another row's prompt."""
    with pytest.raises(ConfigError, match=r"train\.batch is 1, but KTO compares each answer"):
        resolve({"method": "kto", "data": "rows.jsonl", "train": {"batch": 1}})


def test_a_method_of_pairs_is_refused_without_data(tmp_path):
    for words in (["env=tictactoe"], ["data.demos=tictactoe"]):
        with pytest.raises(ConfigError, match=r"DPO learns from pairs, which only data can hold.*data: \{path"):
            load("dpo", words)


def test_a_dumped_recipe_resolves_to_itself_through_yaml_too(here):
    recipe = load("recipes/noughts.yaml", ["rl.train.learning_rate=1e-5", "rl.train.betas=[0.9, 0.99]"])
    assert resolve(dump(recipe)) == recipe
    assert resolve(yaml.safe_load(yaml.safe_dump(dump(recipe)))) == recipe
    (here / "again.yaml").write_text(text(recipe))
    assert load("again.yaml") == recipe


def test_a_text_that_looks_like_a_number_survives_the_way_through_yaml(here):
    recipe = load("grpo", ["env=tictactoe", "env.opponent='1e-4'"])
    assert recipe.stages[0].env.options == {"opponent": "1e-4"}
    (here / "again.yaml").write_text(text(recipe))
    assert load("again.yaml") == recipe


def test_a_function_as_reward_is_dumped_by_its_file_and_name():
    recipe = resolve({"method": "grpo", "env": "tictactoe", "rewards": {said: 1.0}})
    assert dump(recipe)["stages"][0]["rewards"] == {f"{__file__}:said": 1.0}


def test_an_empty_section_means_its_defaults():
    assert resolve({"method": "grpo", "env": {"tictactoe": None}, "train": None}).stages[0].train == Train(steps=100)


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_set_any_key(here):
    words = ["seed=1", "model.path=tiny-gpt2", "model.shape.hidden_size=32", "rl.sampling.group_size=16"]
    words += [
        "rl.method.clip_high=3e-1",
        "rl.env.opponent=perfect",
        "rl.rewards.judge.py:polite=2",
        "rl.success.part=draw",
    ]
    words += ["format.data.demos.opponent=perfect", "rl.eval.env.rules=true", "report_to=[tensorboard, wandb]"]
    recipe = load("recipes/noughts.yaml", words)
    first, rl = recipe.stages
    assert recipe.seed == 1 and recipe.model == Model(path="tiny-gpt2", shape={"hidden_size": 32})
    assert (
        rl.sampling.group_size == 16 and rl.method == GRPO(clip_high=0.3) and rl.env.options == {"opponent": "perfect"}
    )
    assert rl.rewards == {"return": 1.0, "judge.py:polite": 2.0} and rl.success == Success(part="draw", at_least=1.0)
    assert first.data.demos.options == {"opponent": "perfect"} and rl.eval.env.options == {"rules": True}
    assert recipe.report_to == ("tensorboard", "wandb")


def test_a_short_form_in_the_file_can_be_reached_into(here):
    (here / "a.yaml").write_text("method: sft\nmodel: tiny\ndata: rows.jsonl\nsuccess: win\n")
    recipe = load("a.yaml", ["model.device=cpu", "data.split=test", "success.at_least=2"])
    assert recipe.model == Model(path="tiny", device="cpu") and recipe.name == "a"
    assert recipe.stages[0].data == Data(path="rows.jsonl", split="test")
    assert recipe.stages[0].success == Success(part="win", at_least=2.0)


def test_a_single_stage_needs_no_prefix_and_takes_it(here):
    plain = load("grpo", ["env=tictactoe", "train.steps=7", "method.clip_high=0.28"])
    assert plain == load("grpo", ["env=tictactoe", "grpo.train.steps=7", "method.grpo.clip_high=0.28"])
    assert plain.stages[0].train.steps == 7


def test_a_later_override_wins():
    assert load("grpo", ["env=tictactoe", "train.steps=7", "train.steps=8"]).stages[0].train.steps == 8


def test_an_ambiguous_override_lists_what_it_could_mean(here):
    assert said("recipes/noughts.yaml", ["train.steps=7"]) == (
        "train.steps could be meant for any of 2 stages. Write format.train.steps or rl.train.steps."
    )


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.group_sise=3"], "there is no key sampling.group_sise. Did you mean sampling.group_size?"),
        (["sampling.learning_rate=3"], "there is no key sampling.learning_rate. Did you mean train.learning_rate?"),
        (["group_size=3"], "there is no key group_size. Did you mean sampling.group_size?"),
        (["trian.steps=3"], "there is no key trian. Did you mean train?"),
        (["method.clip_hihg=3"], "there is no key method.clip_hihg. Did you mean method.clip_high?"),
        (["clip_high=3"], "there is no key clip_high. Did you mean method.clip_high?"),
        (["model.pth=x"], "there is no key model.pth. Did you mean model.path?"),
        (["num_generations=3"], "there is no key num_generations. Here it is sampling.group_size."),
        (["train.beta=3"], "there is no key train.beta. Here it is method.kl."),
        (
            ["actor_rollout_ref.rollout.n=3"],
            "there is no key actor_rollout_ref.rollout.n. Here it is sampling.group_size.",
        ),
        (["train.steps=abc"], "train.steps is 'abc', but must be a whole number."),
        (["train.steps=2.5"], "train.steps is 2.5, but must be a whole number."),
        (["train.steps=true"], "train.steps is True, but must be a whole number."),
        (["train.steps="], "train.steps is None, but must be a whole number."),
        (["train.learning_rate=fast"], "train.learning_rate is 'fast', but must be a number."),
        (["train.learning_rate=.nan"], "train.learning_rate is nan, but must be a number."),
        (["train.decay=cosin"], "train.decay is 'cosin', but must be none, linear or cosine."),
        (["train.betas=[0.9]"], "train.betas is [0.9], but must be longer."),
        (["train=3"], "train is 3, but must be a table of settings."),
        (["model.gradient_checkpointing=maybe"], "but must be true or false."),
        (["method.dual_clip=x"], "method.dual_clip is 'x', but must be a number or nothing."),
        (["name=3"], "name is 3, but must be text."),
        (["name=../up"], "name is '../up', but names a folder."),
        (["env=[a, b]"], "env is ['a', 'b'], but must be one name, alone or with its options"),
        (["rewards.win=x"], "rewards.win is 'x', but must be a valid number"),
        (["sampling.temperature=0"], "sampling.temperature is 0.0, but training needs samples"),
        (["method=gprpo"], "there is no method 'gprpo'. Did you mean grpo?"),
        (["method={grpo: {}, sft: {}}"], "method is {'grpo': {}, 'sft': {}}, but must be one name"),
        (["nonsense"], "'nonsense' is not a setting. Write key=value"),
        (["stages.0.train.steps=3"], "Write the name of a stage first"),
        (["train.steps=[1"], "train.steps: while parsing"),
        (["data.demos.opponent=x"], "cannot be set, for there is no demos"),
    ],
)
def test_a_setting_that_cannot_work_says_what_is_and_what_to_do(words, message):
    assert message in said("grpo", ["env=tictactoe", *words])


def test_with_several_stages_an_error_names_the_stage(here):
    path = "recipes/noughts.yaml"
    assert said(path, ["rl.sampling.temperature=0"]).startswith("rl.sampling.temperature is 0.0, but training needs")
    assert said(path, ["rl.train.steps=x"]) == "rl.train.steps is 'x', but must be a whole number."
    assert said(path, ["rl.train.stps=1"]) == "there is no key rl.train.stps. Did you mean rl.train.steps?"
    assert said(path, ["learning_rate=1"]).endswith(
        "Did you mean format.train.learning_rate or rl.train.learning_rate?"
    )
    assert said(path, ["epsilon=1"]) == "there is no key epsilon. Here it is method.clip_low and method.clip_high."
    assert said(path, ["rl=1"]) == "rl is a stage. Set one of its keys, such as rl.train.steps=10."


def test_what_is_not_a_recipe_is_refused(here):
    assert "there is nothing to do" in said({"name": "a", "stages": []})
    assert "a stage has no method" in said({"name": "a", "env": "tictactoe"})
    assert "must be a list of stages" in said({"name": "a", "stages": {"rl": {}}})
    assert "train stands beside stages" in said({"stages": [{"method": "sft", "data": "a"}], "train": {"steps": 3}})
    assert "two stages of one name" in said({"stages": [{"method": "sft", "data": "a"}] * 2})
    assert "cannot be called train" in said({"stages": [{"name": "train", "method": "sft", "data": "a"}]})
    (here / "list.yaml").write_text("- a\n- b\n")
    assert "list.yaml is ['a', 'b'], but must be a table of settings." in said("list.yaml")
    (here / "twice.yaml").write_text("method: sft\ntrain: {steps: 1}\ndata: a\ntrain: {batch: 2}\n")
    assert said("twice.yaml") == "twice.yaml: key 'train' stands twice in the section that starts on line 1."


def test_a_missing_file_or_method_names_the_nearest(here):
    assert said("grop").startswith("there is no recipe file and no method 'grop'. Did you mean grpo")
    assert said("noughts") == "there is no recipe file and no method 'noughts'. Did you mean recipes/noughts.yaml?"
    assert said("recipes/nougts.yaml").endswith("Did you mean recipes/noughts.yaml?")


def test_the_answers_to_peers_keys_name_keys_that_exist():
    ours = {*known(Recipe), *known(Stage), *(f"method.{key}" for method in METHODS.values() for key in known(method))}
    named = [
        key for answer in PEERS.values() for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", answer.replace("file.py", ""))
    ]
    assert len(named) > 40 and set(named) <= ours
    assert not set(PEERS) & ours


# --------------------------------------------------------------------------------------------------------- differences


def test_differences_name_the_keys_with_both_values(here):
    old = dump(load("recipes/noughts.yaml"))
    new = dump(load("recipes/noughts.yaml", ["rl.train.steps=7", "seed=2", "rl.env.rules=true"]))
    assert differences(old, old) == []
    assert sorted(differences(old, new)) == [
        "rl.env.tictactoe.rules: not set -> True",
        "rl.train.steps: 100 -> 7",
        "seed: 0 -> 2",
    ]
