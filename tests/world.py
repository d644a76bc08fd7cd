"""A world of two questions per episode, in three domains, and a reward that is random: what resume must survive."""

from __future__ import annotations

import math
import os
import random
import resource
from types import MappingProxyType

import numpy
import torch

from tropism.types import Ask, Task, seed_of

HERE = __file__
MODEL = {
    "path": "tiny",
    "device": "cpu",
    "shape": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
}


class World:
    """A source of tasks: say the letter of your domain, twice."""

    def __init__(self, split, seed):
        self.split, self.seed = split, seed

    def task(self, number):
        letter = "abc"[number % 3]
        columns = {"answer": letter, "other": "bca"[number % 3]}
        return Task(env="world", seed=seed_of(self.seed, self.split, number), domain=letter, columns=columns)

    def open(self, task, sibling):
        return Letters(task.domain)


class Letters:
    """One episode; `low` counts the letters of the first half of the alphabet, which a random policy does say."""

    weights = MappingProxyType({"low": 1.0})

    def __init__(self, letter):
        self.letter, self.heard = letter, []

    def ask(self):
        return Ask(0, f"{len(self.heard)} say {self.letter}: ") if len(self.heard) < 2 else None

    def tell(self, reply):
        self.heard.append(reply)

    def score(self, seat):
        text = "".join(self.heard)
        return {"low": sum(character < "m" for character in text) / 8, "right": float(self.letter in text)}

    def feedback(self, seat):
        return None

    def demonstrate(self):
        return self.letter


def noisy(prompts, completions, **columns):
    """Draws from every generator that a user's reward may draw from."""
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in completions]  # noqa: NPY002


def needy(completions, colour):
    """Asks for a column that no task has."""
    return [float(len(colour)) for _ in completions]


def grpo(folder, **changes):
    """A recipe that trains by GRPO in this world."""
    stage = {
        "method": {"grpo": {"kl": 0.1}},
        "env": f"{HERE}:World",
        "rewards": {"low": 1.0, f"{HERE}:noisy": 0.5},
        "success": {"part": "right"},
        "sampling": {"groups": 3, "group_size": 2, "max_tokens": 4},
        "train": {
            "steps": 7,
            "mini_batches": 2,
            "save_every": 3,
            "threads": 1,
            "learning_rate": 1e-2,
            "warmup": 2,
            "decay": "cosine",
        },
        "eval": {"every": 2, "tasks": 3, "best": "eval/low"},
    }
    return recipe(folder, "rl", stage, changes)


def ppo(folder, **changes):
    """The same by PPO, a turn being one action, with a critic that learns faster than the policy."""
    made = grpo(folder, **changes)
    made["stages"][0]["method"] = {"ppo": {"per": "turn", "kl": 0.1}}
    made["stages"][0]["train"]["critic_learning_rate"] = 5e-2
    return made


def sft(folder, **changes):
    """A recipe that learns this world's demonstrations."""
    stage = {
        "method": "sft",
        "data": {"demos": f"{HERE}:World", "episodes": 10},
        "sampling": {"max_tokens": 4},
        "train": {"steps": 7, "batch": 4, "save_every": 3, "threads": 1, "learning_rate": 1e-2, "decay": "linear"},
        "eval": {"every": 2, "tasks": 3, "best": "eval/low"},
    }
    return recipe(folder, "demos", stage, changes)


def recipe(folder, name, stage, changes):
    """`changes`: section -> settings that replace the stage's own, or a value."""
    for section, value in changes.items():
        stage[section] = stage.get(section, {}) | value if isinstance(value, dict) else value
    if not stage["eval"]["every"]:
        stage["eval"].pop("best", None)
    return {"name": "run", "output": str(folder), "seed": 3, "model": MODEL, "stages": [{"name": name, **stage}]}


# Rewards that go wrong, each in its own way.


def constant(completions):
    return [0.25 for _ in completions]


def too_few(completions):
    return [0.0 for _ in completions[1:]]


def not_numbers(reply, answer):
    """NaN, then infinite; a number where the answer is c."""
    return {"a": math.nan, "b": math.inf, "c": 1.0}[answer]


def never(reply):
    return math.nan


def picky(reply, answer):
    if answer == "a":
        raise ValueError("an answer that this reward has not heard of")
    return random.random()


def enormous(completions):
    return [1e38 * random.choice([-1, 1]) for _ in completions]


def interrupting(completions, trainer_state):
    """Ctrl-C, once four steps are done."""
    if trainer_state.global_step >= 4 and "WORLD_WELL" not in os.environ:
        raise KeyboardInterrupt
    return [random.random() for _ in completions]


def breaking(completions, trainer_state):
    """Breaks down after four steps."""
    if trainer_state.global_step >= 4 and "WORLD_WELL" not in os.environ:
        raise ConnectionError("the judge does not answer")
    return [random.random() for _ in completions]


def filling(completions, trainer_state):
    """Leaves room for files of WORLD_ROOM bytes only, once four steps are done."""
    if trainer_state.global_step >= 4 and "WORLD_ROOM" in os.environ:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["WORLD_ROOM"]), hard))
    return [random.random() for _ in completions]
