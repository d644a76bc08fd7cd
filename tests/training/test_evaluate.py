import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from small import small
from tropism.config import Eval, Sampling, Train
from tropism.envs import open_source
from tropism.rewards.score import score
from tropism.training.evaluate import Evaluation
from tropism.types import Failure

SAMPLING = Sampling(max_tokens=4)


def vowels(rollouts):
    return [{"vowels": float(sum(letter in "aeiou" for letter in r.turns[-1].reply))} for r in rollouts]


def evaluation(policy, tmp_path, seed=0, **settings):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt number {n}"}) + "\n" for n in range(60)))
    source = open_source("dataset", {"path": str(path), "holdout": 0.3}, split="test", seed=seed)
    scoring = partial(score, scorers={"vowels": vowels}, weights={"vowels": 1.0}, success=("vowels", 1.0))
    found = Evaluation(
        settings=Eval(every=1, **settings), sampling=SAMPLING, source=source, policy=policy, score=scoring, seed=seed
    )
    return found, open_source("dataset", {"path": str(path), "holdout": 0.3}, split="train", seed=seed)


def test_two_evaluations_of_the_same_weights_are_equal_and_of_others_differ(tmp_path):
    policy = small()
    evaluate, _ = evaluation(policy, tmp_path, tasks=12)
    first, again = evaluate(0), evaluate(3)
    assert first[0] == again[0]
    assert first[1] == [replace(r, version=0) for r in again[1]]
    with torch.no_grad():
        policy.module.get_input_embeddings().weight.mul_(5)
    assert evaluate(4)[0] != first[0]


def test_held_out_tasks_are_never_trained_on_and_stay_the_same(tmp_path):
    evaluate, train = evaluation(small(), tmp_path, tasks=10)
    held_out = {r.turns[0].prompt for r in evaluate(0)[1]}
    assert held_out == {r.turns[0].prompt for r in evaluate(1)[1]}
    assert len(held_out) == 10
    assert not held_out & {train.task(n).columns["prompt"] for n in range(200)}


@pytest.mark.parametrize("env", ["tictactoe", "reasoning"])
def test_made_tasks_of_the_two_splits_differ_in_their_seeds(env):
    options = {"dataset": "chain_sum"} if env == "reasoning" else {}
    train, test = (open_source(env, options, split=split, seed=0) for split in ("train", "test"))
    seeds = [{(task.task(n).seed, str(task.task(n).columns)) for n in range(300)} for task in (train, test)]
    assert not seeds[0] & seeds[1]


def test_every_task_is_played_as_often_as_asked_and_any_success_passes(tmp_path):
    evaluate, _ = evaluation(small(), tmp_path, tasks=9, samples=4)
    numbers, rollouts = evaluate(2)
    assert sorted((r.group, r.sibling) for r in rollouts) == [(n, k) for n in range(9) for k in range(4)]
    assert all(r.version == 2 for r in rollouts)
    passed = [any(r.success for r in rollouts if r.group == n) for n in range(9)]
    assert numbers["eval/pass@4"] == pytest.approx(sum(passed) / 9)
    assert numbers["eval/success"] == pytest.approx(sum(r.success for r in rollouts) / 36)
    assert 0 < numbers["eval/success"] < numbers["eval/pass@4"]
    assert numbers["eval/vowels"] == numbers["eval/reward"] and numbers["eval/failures"] == 0


def test_the_likeliest_reply_is_reported_beside_the_drawn_ones(tmp_path):
    policy = small()
    both, _ = evaluation(policy, tmp_path, tasks=9, samples=2, greedy=True)
    only, _ = evaluation(policy, tmp_path, tasks=9, temperature=0.0)
    drawn, _ = evaluation(policy, tmp_path, tasks=9, samples=2)
    numbers = both(0)[0]
    greedy = {name.replace("greedy/", ""): value for name, value in numbers.items() if "/greedy/" in name}
    assert greedy == only(0)[0] and "eval/pass@2" not in greedy
    assert {name: value for name, value in numbers.items() if "/greedy/" not in name} == drawn(0)[0]


def test_the_run_seed_decides_the_draws(tmp_path):
    policy = small()
    one, two = (evaluation(policy, tmp_path, tasks=6, seed=seed)[0](0)[1] for seed in (0, 1))
    assert [r.turns[0].prompt for r in one] == [r.turns[0].prompt for r in two]
    assert [r.turns[0].action for r in one] != [r.turns[0].action for r in two]


def test_the_distance_from_the_start_is_that_of_the_two_models(tmp_path):
    """Mean of log p - log q over what the policy said, by transformers' own forward pass; 0 from itself."""
    policy, start = small(seed=1), small(seed=0)
    evaluate, _ = evaluation(policy, tmp_path, tasks=8, kl=True)
    measuring = [model.measuring(1.0, Train()) for model in (policy, start)]
    numbers, rollouts = replace(evaluate, forwards=tuple(measuring))(0)
    total = 0.0
    for rollout in rollouts:
        (turn,) = rollout.turns
        ids = torch.tensor([[*turn.context, *turn.action]])
        with torch.no_grad():
            own, other = (model.module(ids).logits.log_softmax(-1)[0, :-1] for model in (policy, start))
        places = torch.arange(len(turn.context) - 1, ids.shape[1] - 1)
        total += float((own - other)[places, ids[0, 1:][places]].sum())
    assert numbers["eval/kl/episode"] == pytest.approx(total / len(rollouts), abs=1e-4) and abs(total) > 1e-2
    assert replace(evaluate, forwards=(measuring[0], measuring[0]))(0)[0]["eval/kl/episode"] == 0


def test_where_nothing_could_be_scored_no_distance_is_told(tmp_path):
    policy = small()
    evaluate, _ = evaluation(policy, tmp_path, tasks=2, kl=True)
    broken = replace(evaluate, score=lambda rollouts: [replace(r, failure=Failure("score", "down")) for r in rollouts])
    numbers, _ = replace(broken, forwards=(policy.measuring(1.0, Train()),) * 2)(0)
    assert numbers == {"eval/failures": 1.0}
