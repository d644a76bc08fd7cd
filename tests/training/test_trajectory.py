"""A stored trajectory: losses and gradient norms of some steps on rollouts that are given, however they are computed.

PYTHONPATH=tests python tests/training/test_trajectory.py      stores it anew: only where other numbers are meant
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from small import rollout, small, turn
from tropism.config import Train
from tropism.methods import METHODS
from tropism.signals.frozen import measure
from tropism.training.collate import collate
from tropism.training.optim import AdamW
from tropism.training.update import update

STORED = Path(__file__).with_suffix(".json")
STEPS = 5
NAMES = ("grpo", "dr_grpo", "gspo", "sft")
WAYS = {
    "as it comes": {},
    "padded": {"pack": False},
    "nothing left out": {"skip": False},
    "small micro-batches": {"micro_tokens": 40},
    "recomputed": {"gradient_checkpointing": True},
}


def batch(step: int, offline: bool):
    """Four groups of three; in one of them all earn the same."""
    draw = torch.Generator().manual_seed(step)

    def some(count):
        return torch.randint(1, 250, (count,), generator=draw).tolist()

    made = []
    for group in range(4):
        prompt = some(5 + group)
        for sibling in range(3):
            reward = float(torch.rand((), generator=draw)) if group else 0.5
            made.append(rollout(turn(prompt, some(2 + 3 * sibling), reward=reward, sampled=not offline), group=group))
    return collate(made, codes={})


def trajectory(name: str, *, pack=True, gradient_checkpointing=False, **settings) -> list[list[float]]:
    """[step] -> (loss, gradient norm)."""
    policy = small("tiny", pack=pack, gradient_checkpointing=gradient_checkpointing)
    method, train = METHODS[name](), Train(learning_rate=1e-3)
    optimizer, offline = AdamW(policy.module, train, None), not method.needs.sampling
    found = []
    for step in range(STEPS):
        frozen, rows = policy.measuring(1.0, train), batch(step, offline)
        if not offline:
            rows = rows.replace(behavior_logp=frozen(rows).logp)
        rows = measure(rows, method.needs, policy=frozen, exact=True)
        metrics, _ = update(
            rows,
            method.credit(rows),
            method,
            policy.forward,
            optimizer,
            lambda _: train.learning_rate,
            **({} if offline else {"epochs": 2, "mini_batches": 2}),
            **{"skip": True} | settings,
            packed=policy.packs(),
            seed=step,
        )
        found.append([metrics["loss"], metrics["grad_norm"]])
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_no_way_of_computing_leaves_the_stored_trajectory(name, way):
    """Far within what one token more or less would change, and beyond what rounding adds up to in some steps."""
    stored = torch.tensor(json.loads(STORED.read_text())[name])
    torch.testing.assert_close(torch.tensor(trajectory(name, **WAYS[way])), stored, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("setting", "value"), [("tropism.maths.linear.AVAILABLE", False), ("tropism.maths.speak.MOST", 1 << 12)]
)
def test_neither_do_torchs_own_products_nor_a_head_in_small_chunks(name, setting, value, monkeypatch):
    """So what was computed before either was there is what is computed now."""
    monkeypatch.setattr(setting, value)
    stored = torch.tensor(json.loads(STORED.read_text())[name])
    torch.testing.assert_close(torch.tensor(trajectory(name)), stored, rtol=1e-3, atol=1e-5)


def test_a_forgotten_token_leaves_it():
    """The tolerance is not so wide that nothing could leave."""
    stored = torch.tensor(json.loads(STORED.read_text())["grpo"])
    real = METHODS["grpo"].weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            METHODS["grpo"], "weights", lambda self, rows: real(self, rows) * (torch.arange(len(rows)) > 3)[:, None]
        )
        assert not torch.allclose(torch.tensor(trajectory("grpo")), stored, rtol=1e-2, atol=1e-4)


if __name__ == "__main__":
    STORED.write_text(json.dumps({name: trajectory(name) for name in NAMES}, indent=1) + "\n")
