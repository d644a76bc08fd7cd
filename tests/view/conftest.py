"""A record as a real run would leave it: words taught by examples, then tic-tac-toe by reward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tropism.record import Run

CONFIG = {
    "name": "tictactoe",
    "seed": 7,
    "model": {"path": "tiny", "shape": {"hidden_size": 128}, "device": "auto", "compute": "float32"},
    "stages": [
        {"name": "format", "method": {"sft": {}}, "data": {"demos": {"name": "tictactoe", "options": {}}},
         "train": {"steps": 120, "batch": 64, "learning_rate": 1e-3, "betas": [0.9, 0.95]}},
        {"name": "play", "method": {"grpo": {"clip_low": 0.2, "clip_high": 0.28, "scale": "std"}},
         "env": {"name": "tictactoe", "options": {"opponent": "random", "task_seed": 11}},
         "rewards": {"win": 1.0, "illegal": -0.5}, "sampling": {"groups": 16, "group_size": 8, "temperature": 1.0},
         "eval": {"every": 10, "best": "eval/return"}},
    ],
}  # fmt: skip
VERSIONS = {"python": "3.11.7", "tropism": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def decode(ids: Sequence[int]) -> str:
    """Bytes; 256 ends a reply."""
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def game(rng: random.Random, skill: float, episode: int) -> list[dict[str, object]]:
    """One seat of one game, a row per move; the moves are not clever, the shape of the record is what matters."""
    board, rows, total = ["."] * 9, [], rng.choice([1.0, 0.0, -1.0]) if rng.random() > skill else 1.0
    for turn in range(rng.randint(3, 4)):
        free = [place for place, mark in enumerate(board) if mark == "."]
        move = rng.choice(free)
        picture = "\n".join("".join(board[row : row + 3]) for row in (0, 3, 6))
        reply = f"free {' '.join(str(place + 1) for place in free)} | win - | block - | move {move + 1}"
        action = [*reply.encode(), 256]
        last = turn >= 2
        rows.append({
            "episode": episode, "group": episode // 8, "sibling": episode % 8, "seat": episode % 2, "turn": turn,
            "level": 0, "domain": "", "env": "tictactoe", "task_seed": 1000 + episode // 8, "version": 0,
            "context": list(picture.encode()), "action": action, "stop": "finished", "prompt": picture + "\n",
            "reply": reply, "feedback": "a corner was better" if rng.random() < 0.3 else None,
            "behavior_logp": [-rng.expovariate(3) for _ in action],
            "proximal_logp": [-rng.expovariate(3) for _ in action],
            "entropy": [rng.random() for _ in action], "weight": [1 / 900] * len(action),
            "advantage": [total - 0.3 + rng.gauss(0, 0.2)] * len(action),
            "reward": total if last else 0.0, "total": total, "rewards": {"win": total, "illegal": 0.0},
            "success": total == 1.0, "failure": None,
        })  # fmt: skip
        board[move] = "x"
        board[rng.choice([place for place, mark in enumerate(board) if mark == "."])] = "o"
        if last:
            break
    return rows


def teach(run: Run, rng: random.Random) -> None:
    for step in range(1, 121):
        loss = 0.35 + 3.2 * math.exp(-step / 18) + rng.gauss(0, 0.02)
        run.log(step, {
            "loss": loss, "grad_norm": 0.4 + rng.random(), "learning_rate": 1e-3 * (1 - step / 120),
            "entropy": loss * 0.9, "num_tokens": 8000 * step, "time/update": 0.2 + rng.random() / 50,
        })  # fmt: skip


def reinforce(run: Run, rng: random.Random, steps: int) -> None:
    run.log(0, {"eval/return": -0.13, "eval/win": 0.36, "eval/illegal": 0.09, "eval/length": 41.2})
    for step in range(1, steps + 1):
        skill = step / steps
        reward = -0.14 + 0.9 * (1 - math.exp(-3 * skill)) + rng.gauss(0, 0.05)
        metrics = {
            "reward": reward, "reward_std": 0.8 - 0.5 * skill, "rewards/win/mean": reward + 0.05,
            "rewards/illegal/mean": 0.09 * math.exp(-5 * skill), "success": 0.4 + 0.5 * skill,
            "loss": rng.gauss(0, 0.01), "entropy": 0.6 - 0.4 * skill, "grad_norm": 0.3 + rng.random() / 5,
            "kl": math.nan if step % 9 else 0.02, "clip_ratio/region_mean": 0.02 * rng.random(), "learning_rate": 2e-4,
            "frac_reward_zero_std": 0.1 + 0.3 * skill, "completions/mean_length": 40 + rng.gauss(0, 1),
            "completions/clipped_ratio": 0.0, "failures": float(step == 3), "num_tokens": 52000 * step,
            "sampling/sampling_logp_difference/mean": 1e-7, "time/play": 1.1 - 0.3 * skill,
            "time/measure": 0.2, "time/update": 0.7, "time/score": 0.01,
        }  # fmt: skip
        if step % 10 == 0:
            metrics |= {"eval/return": reward - 0.02, "eval/win": 0.4 + 0.5 * skill, "eval/illegal": 0.09 * (1 - skill)}
        run.log(step, metrics)
        rows = [row for episode in range(16) for row in game(rng, skill, episode)]
        if step == 3:
            rows.append({**rows[-1], "episode": 16, "failure": "win: the reward function raised KeyError: 'x'"})
        run.save_rollouts(step, rows)


@pytest.fixture(scope="session", name="decode")
def decode_fixture() -> Callable[[Sequence[int]], str]:
    return decode


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return make(tmp_path_factory.mktemp("runs") / "tictactoe", steps=20)


def make(folder: Path, steps: int) -> list[Run]:
    rng = random.Random(0)
    runs = [Run.create(folder / name, CONFIG, VERSIONS) for name in ("format", "play")]
    teach(runs[0], rng)
    reinforce(runs[1], rng, steps)
    rows = [["start", -0.13, 0.36, 0.15, 0.49, 0.09], ["end", 0.77, 0.86, 0.05, 0.09, 0.004]]
    runs[1].note("table", {"columns": ["", "return", "win", "draw", "loss", "illegal"], "rows": rows})
    return runs
