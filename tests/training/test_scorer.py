"""A trained reward model: transformers loads it and gives equal scores; padding and company change none of them."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tropism
from small import FAMILIES, small
from tropism.errors import ConfigError
from tropism.record import Run, last_checkpoint, stages_of
from tropism.training.scorer import SCORER, Scorer, save_scorer

PAIRS = [{"prompt": f"{n} and {n}: ", "chosen": str(2 * n), "rejected": f"{3 * n}, I think"} for n in range(1, 13)]
ANSWERS = [[5, 6, 7, 8], [9], [10, 11], [12] * 9]


def recipe(folder, **train):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    stage = {
        "name": "rm",
        "method": "reward_model",
        "data": {"path": str(folder / "pairs.jsonl")},
        "train": {"steps": 30, "batch": 4, "learning_rate": 3e-3, "save_every": 10} | train,
    }
    model = {"path": "tiny", "device": "cpu", "shape": FAMILIES["tiny"]}
    return {"name": "run", "output": str(folder), "model": model, "stages": [stage]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tropism.train(recipe(tmp_path_factory.mktemp("rm")), quiet=True).path


def test_it_learns_whom_to_prefer_and_says_how_well(trained):
    lines = [line for line in Run(trained / "rm").metrics() if "rewards/accuracies" in line]
    assert len(lines) == 30 and lines[-1]["rewards/accuracies"] == 1.0 and lines[-1]["rewards/margins"] > 1
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and lines[-1]["loss"] < 0.2


def test_transformers_gives_every_answer_the_same_score(trained):
    scorer = Scorer(str(trained))
    path = last_checkpoint(stages_of(trained)) / SCORER
    module, words = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for text in ("1 and 1: 2", "a much longer answer than that"):
        ids = words(text)["input_ids"]
        with torch.no_grad():
            theirs = module(torch.tensor([[*ids, *[words.pad_token_id] * 3]])).logits[0, 0]
        assert scorer([ids])[0] == pytest.approx(float(theirs), abs=1e-6)


def test_neither_padding_nor_company_nor_the_size_of_a_pass_changes_a_score(trained):
    scorer = Scorer(str(trained))
    alone = [scorer([answer])[0] for answer in ANSWERS]
    assert len(set(alone)) == 4
    for tokens in (1, 10, 10_000):
        assert scorer(ANSWERS, tokens) == pytest.approx(alone, abs=1e-5)
        assert scorer(ANSWERS[::-1], tokens) == pytest.approx(alone[::-1], abs=1e-5)
    assert scorer([]) == []


def test_a_run_a_stage_a_checkpoint_and_the_folder_are_one_reward_model(trained):
    last = last_checkpoint(stages_of(trained))
    scores = [Scorer(str(path))(ANSWERS) for path in (trained, trained / "rm", last, last / SCORER)]
    assert all(one == scores[0] for one in scores)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_every_family_is_saved_with_its_scores(family, tmp_path):
    policy = small(family)
    policy.add_critic(bias=False)
    with torch.no_grad():
        policy.critic.weight.copy_(torch.randn(policy.critic.weight.shape))
    save_scorer(policy, tmp_path)
    ids = torch.tensor([ANSWERS[0]])
    with torch.no_grad():
        hidden = policy.module.base_model(input_ids=ids).last_hidden_state[0, -1]
        own = float(policy.critic(hidden))
    assert Scorer(str(tmp_path))([ANSWERS[0]])[0] == pytest.approx(own, abs=1e-5)


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    small("tiny").save(tmp_path)
    with pytest.raises(ConfigError, match=r"has no score.weight, so its scores would be random"):
        Scorer(str(tmp_path))


def test_a_run_without_a_reward_model_is_refused(whole):
    with pytest.raises(ConfigError, match="holds no reward model"):
        Scorer(str(whole["sft"]))


def test_saving_one_draws_nothing_from_the_global_generator(tmp_path):
    """Whose state the checkpoint holds, and from which a reward may draw next."""
    policy = small("tiny")
    policy.add_critic(bias=False)
    before = torch.get_rng_state()
    save_scorer(policy, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tokenizer_that_pads_with_its_end_is_refused(tmp_path):
    policy = small("tiny")
    policy.add_critic(bias=False)
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    with pytest.raises(ConfigError, match="one token too early"):
        save_scorer(policy, tmp_path)
