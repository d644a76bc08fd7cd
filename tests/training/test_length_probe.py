"""The probe of a taste for length: pad answers with text that says nothing, and see how far their mean score moves."""

import json
import math
import random

import pytest
import torch

import tropism
import world
from tropism.signals.reward_model import scale_of, scaled
from tropism.training.model import byte_tokenizer
from tropism.training.scorer import Scorer

WORDS, IDLE = byte_tokenizer(), "_"


def answer(draws):
    """Four letters, of which each `a` is worth something, and up to four idle ones."""
    return "".join(draws.choice("ab") for _ in range(4)) + IDLE * draws.randint(0, 4)


def pairs(count, seed):
    """By people who like an `a`, and as much that an answer is the longer one: labels of Bradley and Terry's model."""
    draws, rows = random.Random(seed), []
    while len(rows) < count:
        one, other = answer(draws), answer(draws)
        longer = (len(one) > len(other)) - (len(one) < len(other))
        if one != other:
            won = draws.random() < 1 / (1 + math.exp(other.count("a") - one.count("a") - longer))
            rows.append({"prompt": "?", "chosen": one if won else other, "rejected": other if won else one})
    return rows


def ids(answers):
    end = WORDS.convert_tokens_to_ids("<|end|>")
    return [[*WORDS.encode(text), end] for text in answers]


def moved(scorer, without_length=False):
    """By how many deviations an idle letter more, 0.7 deviations of length, changes the mean score of chosen answers.

    On scales as a stage has them. Answers that were as long as any in the data are left out.
    """
    draws, question = random.Random(5), WORDS.encode("?")
    known = ids(answer(draws) for _ in range(800))
    chosen = [row["chosen"] for row in pairs(1000, 11) if row["chosen"].count(IDLE) < 4]

    def score(answers):
        return scorer([question + answer for answer in answers])

    scale = scale_of(score(known), [len(one) for one in known] if without_length else ())
    plain, padded = ids(chosen), ids(text + IDLE for text in chosen)
    before, after = (torch.tensor(scaled(score(some), scale, [len(one) for one in some])) for some in (plain, padded))
    return float((after - before).mean())


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


def test_padding_pays_a_model_of_biased_pairs_less_after_balancing_and_next_to_nothing_without_length(models):
    biased, balanced = models
    assert moved(biased) > 0.3 and moved(balanced) < 0.5 * moved(biased)
    assert abs(moved(biased, without_length=True)) < 0.5 * moved(biased)
    assert abs(moved(balanced, without_length=True)) < 0.1
