"""The probe of a taste for length: pad answers with text that says nothing, and see how far their mean score moves."""

import json
import math
import random

import pytest
import torch

import tropism
import world
from tropism.training.model import byte_tokenizer
from tropism.training.scorer import Scorer

WORDS, IDLE, TASTE = byte_tokenizer(), "_", 0.5


def answer(draws):
    """Four letters, of which each `a` is worth something, and up to four idle ones."""
    return "".join(draws.choice("ab") for _ in range(4)) + IDLE * draws.randint(0, 4)


def pairs(count, seed):
    """By people who like an `a`, and half as much that an answer is the longer one: Bradley and Terry's labels."""
    draws, rows = random.Random(seed), []
    while len(rows) < count:
        one, other = answer(draws), answer(draws)
        longer = (len(one) > len(other)) - (len(one) < len(other))
        if one != other:
            won = draws.random() < 1 / (1 + math.exp(other.count("a") - one.count("a") - TASTE * longer))
            rows.append({"prompt": "?", "chosen": one if won else other, "rejected": other if won else one})
    return rows


def ids(answers):
    end = WORDS.convert_tokens_to_ids("<|end|>")
    return [[*WORDS.encode(text), end] for text in answers]


def moved(scorer):
    """By how many deviations of scores an idle letter more, 0.7 deviations of length, changes that of chosen answers.

    The mean over answers to which others were rejected; those as long as any in the data are left out.
    """
    question = WORDS.encode("?")
    rows = [row for row in pairs(1000, 11) if row["chosen"].count(IDLE) < 4]

    def score(answers):
        return torch.tensor(scorer([question + answer for answer in ids(answers)]))

    chosen, rejected = ([row[name] for row in rows] for name in ("chosen", "rejected"))
    plain = score(chosen)
    return float((score(text + IDLE for text in chosen) - plain).mean() / torch.cat([plain, score(rejected)]).std())


@pytest.fixture(scope="module", params=[0, 1, 2])
def models(tmp_path_factory, request):
    """(a reward model of such pairs, one of the same pairs balanced)."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(3000, request.param)))
    train = {"steps": 300, "batch": 32, "learning_rate": 3e-3, "warmup": 10, "decay": "cosine", "threads": 1}
    stages = [
        {
            "name": name,
            "method": "reward_model",
            "data": {"path": str(folder / "pairs.jsonl"), "balance": name == "balanced"},
            "train": train | {"save_every": 0},
        }
        for name in ("biased", "balanced")
    ]
    recipe = {"name": "probe", "output": str(folder), "model": world.MODEL, "seed": request.param, "stages": stages}
    run = tropism.train(recipe, quiet=True)
    return [Scorer(str(run.path / name), device="cpu") for name in ("biased", "balanced")]


def test_padding_pays_with_a_model_of_biased_pairs_and_moves_scores_by_less_than_a_tenth_after_balancing(models):
    biased, balanced = map(moved, models)
    assert biased > 0.1 > abs(balanced) and abs(balanced) < 0.6 * biased
