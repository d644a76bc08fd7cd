"""Rows of the model's own: what is kept of scored replies, by hand and in runs."""

import json
import random
import statistics
from functools import partial

import pytest
import torch

import tropism
import world
from again import same, train_until
from small import rollout, small, turn
from tropism.config import Named, Sampled, Sampling
from tropism.errors import ConfigError
from tropism.record import Run
from tropism.rewards.score import score
from tropism.rollout.play import play
from tropism.training import run as run_module
from tropism.training.fit import sifted
from tropism.training.numbers import eval_numbers
from tropism.training.sampled import kept, preferred, sampled_rows, unsampled, write_rows
from tropism.types import Ask, SamplingParams, Task

ENV = Named(name="reasoning")
REWARDS = (0.2, 0.9, 0.5, 0.9, 0.1)


def group(rewards=REWARDS):
    """Scored replies to one task; those that earned half are successes."""
    made = [
        rollout(turn([1], [n + 2], reward=reward, reply=f"r{n}"), success=reward >= 0.5)
        for n, reward in enumerate(rewards)
    ]
    assert [one.reward for one in made] == list(rewards)
    return made


def replies(rows):
    return [[one.turns[0].reply for one in row] for row in rows]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [["r1"]]),
        ({"top": 3}, [["r1"], ["r3"], ["r2"]]),
        ({"top": 3, "at_least": 0.6}, [["r1"], ["r3"]]),
        ({"at_least": 0.95}, []),
        ({"keep": "success"}, [["r1"], ["r2"], ["r3"]]),
        ({"keep": "labels"}, [["r0"], ["r1"], ["r2"], ["r3"], ["r4"]]),
        ({"keep": "pairs"}, [["r1", "r0"], ["r3", "r2"]]),
    ],
)
def test_what_is_kept_of_one_tasks_replies(settings, wanted):
    assert replies(kept(Sampled(env=ENV, **settings), group(), seed=0)) == wanted


def test_the_control_keeps_as_many_at_random():
    found = [kept(Sampled(env=ENV, keep="random", top=2), group(), seed) for seed in range(200)]
    assert {len(rows) for rows in found} == {2}
    means = [statistics.fmean(row[0].reward for row in rows) for rows in found]
    assert statistics.fmean(means) == pytest.approx(statistics.fmean(REWARDS), abs=0.05)
    assert not kept(Sampled(env=ENV, keep="random", top=2, at_least=0.95), group(), 0)


def test_a_judge_without_doubt_sees_no_pair_where_replies_earn_the_same_or_are_the_same():
    one, other = group((0.5, 0.5))
    assert preferred(one, other, 0.0, random.Random(0)) is None
    assert preferred(one, one, 1.0, random.Random(0)) is None
    chosen, rejected = preferred(*group((0.1, 0.5)), 0.0, random.Random(0))
    assert (chosen.reward, chosen.success, rejected.success) == (0.5, True, False)


@pytest.mark.parametrize(
    ("apart", "noise", "share"), [(0.0, 1.0, 0.5), (1.0, 1.0, 0.731), (1.0, 0.5, 0.881), (1e9, 1e-9, 1.0)]
)
def test_a_noisy_judge_prefers_as_bradley_and_terry_do(apart, noise, share):
    draws, (better, worse) = random.Random(0), group((apart, 0.0))
    won = [preferred(better, worse, noise, draws)[0].turns[0].reply == "r0" for _ in range(4000)]
    assert statistics.fmean(won) == pytest.approx(share, abs=0.025)


def test_kept_rows_are_as_if_read():
    one = unsampled(group()[1])
    assert one.turns[0].logp is None and one.turns[0].entropy is None and one.reward == one.turns[0].reward == 0
    assert one.turns[0].reply == "r1" and list(one.turns[0].action) == [3]


SUMS = {"reasoning": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}


def recipe(folder, method="sft", **sampled):
    """A model that knows the format and guesses, and then learns from what it guessed."""
    made = world.sft(folder, train={"steps": 60, "batch": 16, "save_every": 60})
    made["stages"][0] |= {"data": {"demos": SUMS, "episodes": 200}, "eval": {}, "sampling": {"max_tokens": 8}}
    stage = {"name": "own", "method": method, "success": {"part": "correct"}, "sampling": {"max_tokens": 8}}
    stage["data"] = {"sampled": {"env": SUMS, "tasks": 24, "samples": 4} | sampled}
    stage["train"] = {"steps": 4, "batch": 4, "save_every": 2, "threads": 1, "learning_rate": 3e-3}
    stage["eval"] = {"every": 4, "tasks": 32, "samples": 4, "best": "eval/correct"}
    made["stages"].append(stage)
    return made


def test_two_stages_may_sample_from_tasks_that_they_do_not_share(tmp_path):
    runs = [tropism.train(recipe(tmp_path / str(k), first=k), quiet=True).path for k in (0, 12)]
    asked = []
    for run in runs:
        rows = [json.loads(line)["prompt"] for line in (run / "own" / "rows.jsonl").open()]
        asked.append(list(dict.fromkeys(str(prompt) for prompt in rows)))
    assert set(asked[0][12:]) & set(asked[1][:12]) and not set(asked[0][:12]) & set(asked[1])


class Letters:
    """Say three letters, the earlier in the alphabet the better."""

    def __init__(self, task, sibling):
        self.draws, self.reply = random.Random(f"{task.seed}/{sibling}"), None

    def ask(self):
        return Ask(0, "say: ") if self.reply is None else None

    def tell(self, reply):
        self.reply = reply

    def score(self, seat):
        return {"early": sum(letter < "i" for letter in self.reply or "") / 3}

    def feedback(self, seat):
        return None

    def demonstrate(self):
        return "".join(self.draws.choices("abcdefghijklmnopqrstuvwxyz", k=3))


@pytest.mark.parametrize(("keep", "learns"), [("best", True), ("random", False)])
def test_the_best_of_its_own_replies_make_a_model_better_and_as_many_at_random_do_not(keep, learns, tmp_path):
    here = f"{__file__}:Letters"
    made = recipe(tmp_path, env=here, keep=keep, tasks=128, samples=8)
    made["stages"][0]["data"]["demos"] = here
    made["stages"][1]["train"] |= {"steps": 30, "batch": 32, "save_every": 30, "learning_rate": 5e-3}
    made["stages"][1] |= {"success": None, "eval": {"every": 30, "tasks": 200, "best": "eval/early"}}
    run = tropism.train(made, quiet=True).path
    before, after = [line["eval/early"] for line in Run(run / "own").metrics() if "eval/early" in line]
    assert after - before > 0.2 if learns else abs(after - before) < 0.15
    rows = [json.loads(line) for line in (run / "own" / "rows.jsonl").open()]
    assert len(rows) == 128 and all(row.keys() == {"prompt", "completion", "label"} for row in rows)


def test_own_pairs_teach_dpo_and_can_be_read_again(tmp_path):
    run = tropism.train(recipe(tmp_path, "dpo", keep="pairs"), quiet=True).path
    lines = [line for line in Run(run / "own").metrics() if "loss" in line]
    assert all("rewards/margins" in line for line in lines)
    rows = [json.loads(line) for line in (run / "own" / "rows.jsonl").open()]
    assert rows and all(row["chosen"] != row["rejected"] for row in rows)
    again = recipe(tmp_path / "again", "dpo")
    again["stages"][1] |= {"data": {"path": str(run / "own" / "rows.jsonl")}, "success": None, "eval": {}}
    other = [line for line in Run(tropism.train(again, quiet=True).path / "own").metrics() if "loss" in line]
    for name in ("loss", "logps/chosen", "logps/rejected"):
        assert other[0][name] == pytest.approx(lines[0][name], abs=1e-4)


def test_pairs_that_are_held_out_are_its_own_replies_to_tasks_that_training_does_not_see(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run_module, "sifted", lambda rows, *rest: seen.append(rows) or sifted(rows, *rest))
    made = recipe(tmp_path, "dpo", keep="pairs")
    own = made["stages"][1]
    own["eval"] = {"every": 4, "tasks": 8, "data": own["data"], "best": "eval/rewards/accuracies"}
    lines = Run(tropism.train(made, quiet=True).path / "own").metrics()
    assert [line["step"] for line in lines if "eval/rewards/margins" in line] == [0, 4]
    train, held_out = ({one.task.columns["question"] for row in rows for one in row} for rows in seen[1:])
    assert train and held_out and not train & held_out


def test_rows_of_an_earlier_stage_are_named_by_it(tmp_path):
    made = recipe(tmp_path, "dpo", keep="pairs")
    own = made["stages"][1]
    again = own | {"name": "again", "start": "demos", "data": {"path": "own"}, "success": None}
    made["stages"].append(again | {"eval": {"every": 4, "tasks": 8, "data": {"path": "own"}}})
    run = tropism.train(made, quiet=True).path
    first, second = ([line for line in Run(run / stage).metrics() if "loss" in line] for stage in ("own", "again"))
    assert (
        first[0]["loss"] == pytest.approx(second[0]["loss"])
        and "eval/rewards/margins" in Run(run / "again").metrics()[0]
    )
    made["stages"][2]["data"] = {"path": "demos"}
    with pytest.raises(ConfigError, match="a stage that has sampled no rows"):
        tropism.train(made | {"name": "other"}, quiet=True)


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    tropism.train(recipe(tmp_path / "whole", "kto", keep="labels"), quiet=True)
    train_until(recipe(tmp_path / "dead", "kto", keep="labels"), 3, monkeypatch, stage="own")
    tropism.train(recipe(tmp_path / "dead", "kto", keep="labels"), resume=True, quiet=True)
    same(tmp_path / "dead" / "run", tmp_path / "whole" / "run", "own")


@pytest.mark.parametrize(
    ("method", "sampled", "says"),
    [
        ("sft", {"keep": "pairs"}, "SFT learns from single answers, .* has pairs"),
        ("dpo", {}, "DPO learns from pairs, .*keep: pairs"),
        ("kto", {"keep": "pairs"}, "KTO learns from labels, .* has pairs"),
        ("sft", {"at_least": 50.0}, "nothing is kept"),
        ("sft", {"top": 4}, "every reply would be kept"),
        ("dpo", {"keep": "pairs", "samples": 1}, "a pair takes two replies"),
        ("sft", {"noise": -1.0}, "cannot be negative"),
        ("kto", {"keep": "labels"}, "does not say what a success is"),
        ("sft", {"keep": "success"}, "does not say what a success is"),
    ],
)
def test_what_cannot_be_kept_is_said(method, sampled, says, tmp_path):
    made = recipe(tmp_path, method, **sampled)
    if "success" in says:
        made["stages"][1]["success"] = None
    with pytest.raises(ConfigError, match=says):
        tropism.train(made, quiet=True)


def test_a_run_that_died_before_its_rows_were_written_writes_the_same_ones_on_resume(tmp_path, monkeypatch):
    """Also where rewards draw from the generators of the process."""
    made = [recipe(tmp_path / way) for way in ("whole", "dead")]
    for one in made:
        one["stages"][1] |= {"rewards": {f"{world.HERE}:noisy": 1.0}, "success": None}
    whole = tropism.train(made[0], quiet=True).path
    random.seed(5)
    train_until(made[1], 3, monkeypatch, stage="own")
    rows = tmp_path / "dead" / "run" / "own" / "rows.jsonl"
    rows.unlink()
    random.seed(6)
    tropism.train(made[1], resume=True, quiet=True)
    assert rows.read_bytes() == (whole / "own" / "rows.jsonl").read_bytes()


class Duel:
    """A question to each seat; seat 0 wins."""

    weights = {"won": 1.0}  # noqa: RUF012

    def __init__(self):
        self.heard = []

    def task(self, number):
        return Task(seed=number)

    def open(self, task, sibling):
        return Duel()

    def ask(self):
        return Ask(len(self.heard), f"seat {len(self.heard)}: ") if len(self.heard) < 2 else None

    def tell(self, reply):
        self.heard.append(reply)

    def score(self, seat):
        return {"won": float(len(self.heard) > 1 and seat == 0)}

    def feedback(self, seat):
        return None


def test_seats_of_one_game_are_not_mixed():
    """Neither in pairs, nor in what is best, nor in what a task has passed."""
    policy, said = small(), []
    policy.sampler.stops = torch.arange(policy.module.config.vocab_size)  # every reply is one token
    scored = partial(score, scorers={}, weights={"won": 1.0}, success=("won", 1.0), parts=("won",))
    given = (Sampling(max_tokens=1), Duel(), policy, scored, 0, said.append)
    pairs = sampled_rows(Sampled(env=ENV, tasks=3, samples=2, keep="pairs", noise=1.0), *given)
    assert pairs and all(chosen.task.seat == rejected.task.seat for chosen, rejected in pairs)
    assert said[0].startswith("of 12 replies to 3 tasks, 0 were truncated")
    best = sampled_rows(Sampled(env=ENV, tasks=3, samples=2), *given)
    assert sorted(row[0].task.seat for row in best) == [0, 0, 0, 1, 1, 1]
    tasks = [(Task(), n, k) for n in range(3) for k in range(2)]
    played = play(tasks, Duel(), policy.sampler, policy.words, SamplingParams(max_tokens=1), max_turns=4)
    assert eval_numbers(scored(played), 2)["pass@2"] == 0.5


def test_a_pair_whose_answers_follow_different_conversations_is_not_written_as_one(tmp_path):
    def answer(before, reply):
        return rollout(
            turn([1], [2], prompt="Q1: ", reply=before), turn([1], [3], prompt=f"Q1: {before} Q2: ", reply=reply)
        )

    rows = [(answer("yes", "good"), answer("no", "bad")), (answer("yes", "good"), answer("yes", "bad"))]
    assert write_rows(rows, tmp_path / "rows.jsonl") == 1
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": "Q1: yes Q2: ", "chosen": "good", "rejected": "bad"}
