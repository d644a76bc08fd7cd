"""Whole runs, through the door that a person uses."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from small import FAMILIES
from tropism import GRPO, SFT, train
from tropism.record import Run

MODEL = {"path": "tiny-llama", "shape": FAMILIES["tiny-llama"] | {"hidden_size": 64}, "device": "cpu"}

GAME = '''
from tropism import Ask


class Letters:
    """Say as many a as you can: every letter that is one earns its share."""

    def __init__(self, task, sibling):
        self.share, self.heard = 0.0, False

    def ask(self):
        return None if self.heard else Ask(0, "say:")

    def tell(self, reply):
        self.heard, self.share = True, reply.count("a") / max(len(reply), 1)

    def score(self, seat):
        return {"share": self.share}

    def feedback(self, seat):
        return None
'''

REWARDS = """
import asyncio


def letters(prompts, completions, letter, **columns):
    assert prompts[0].endswith(":") and len(prompts) == len(letter)
    return [text.count(wanted) / max(len(text), 1) for text, wanted in zip(completions, letter)]


async def later(prompts, completions, letter, **columns):
    await asyncio.sleep(0)
    return letters(prompts, completions, letter, **columns)
"""


def curve(result, name):
    return [line[name] for line in result_metrics(result) if name in line]


def result_metrics(result):
    (stage,) = [path for path in result.path.iterdir() if path.is_dir()]
    return Run(stage).metrics()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_learns_a_game_of_ones_own(seed, tmp_path):
    """One byte of 262 is asked for: about 0.004 of a random reply, and at the end nearly all of it."""
    (tmp_path / "game.py").write_text(GAME)
    result = train(
        GRPO(),
        env=f"{tmp_path}/game.py:Letters",
        model=MODEL,
        name="letters",
        output=str(tmp_path),
        seed=seed,
        sampling={"groups": 4, "group_size": 32, "max_tokens": 8},
        train={"steps": 40, "learning_rate": 1e-2, "patience": 40},
        quiet=True,
    )
    rewards = curve(result, "reward")
    assert sum(rewards[:3]) / 3 < 0.05
    assert sum(rewards[-3:]) / 3 > 0.5, rewards
    names = set(result_metrics(result)[-1])
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std", "frac_reward_zero_std"} <= names
    assert {"completions/mean_length", "completions/clipped_ratio", "rewards/share/mean"} <= names
    assert {"clip_ratio/region_mean", "sampling/importance_sampling_ratio/mean", "rewards/share/std"} <= names
    assert {"skipped", "updates", "failures", "time/step", "time/draw", "time/update"} <= names


@pytest.mark.parametrize("function", ["letters", "later"])
def test_ten_lines_of_python_learn_from_a_function_of_ones_own(function, tmp_path):
    """TRL's signature, called at once or awaited; a column of the data reaches it."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{n}:", "letter": "b"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        GRPO(average="token"),
        env={"dataset": {"path": str(tmp_path / "rows.jsonl")}},
        rewards={f"{tmp_path}/rewards.py:{function}": 1.0},
        model=MODEL,
        name="function",
        output=str(tmp_path),
        sampling={"groups": 4, "group_size": 32, "max_tokens": 6},
        train={"steps": 30, "learning_rate": 1e-2, "patience": 30},
        eval={"every": 30, "tasks": 8},
        quiet=True,
    )
    rewards = curve(result, "reward")
    assert sum(rewards[:3]) / 3 < 0.05 and sum(rewards[-3:]) / 3 > 0.4, rewards
    before, after = curve(result, "eval/reward")
    assert after > before + 0.3
    assert result.report.is_file() and (result.model / "config.json").is_file() and result.best == result.model


def test_sft_memorises_four_conversations(tmp_path):
    """And the checkpoint says them in plain transformers: the mask, the shift and the stop token are all right."""
    pairs = {"capital of France?": "Paris", "2 + 2": "4", "é →": "漢", "": "silence"}
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        SFT(),
        data=str(tmp_path / "rows.jsonl"),
        model=MODEL,
        name="memory",
        output=str(tmp_path),
        train={"steps": 120, "batch": 4, "learning_rate": 5e-3, "warmup": 5, "decay": "cosine"},
        quiet=True,
    )
    losses = curve(result, "loss")
    assert abs(losses[0] - math.log(262)) < 1.0 and losses[-1] < 0.02, losses
    module, tokenizer = AutoModelForCausalLM.from_pretrained(result.model), AutoTokenizer.from_pretrained(result.model)
    for question, answer in pairs.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            said = module.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
        assert tokenizer.decode(said) == f"{answer}<|end|>"
