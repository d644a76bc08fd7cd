"""Every method there is resumes bit for bit: its schedule, its memory, its critic and the copy that teaches it."""

from __future__ import annotations

import json

import pytest
import torch

import tropism
import world
from again import same, train_until
from tropism.methods import METHODS
from tropism.record import Run, latest
from tropism.teacher import teacher_of

READS = {"reads": ["answer"], "must_add": -1, "closing": ""}
TEACHER = {
    "sdpo": {"reads": ["sibling", "answer"], "must_add": -1},
    "srpo": {"reads": ["sibling"], "must_add": -1},
    "rlcsd": READS | {"against": ["other"]},
    "gated": READS | {"against": ["other"]},
    "openclaw": {"who": "ema", "must_add": -1},
    "follow_up": {"who": "synced", "every": 2, "must_add": -1},
    "rlsd": READS | {"who": "synced", "every": 2},
}
"""What the teacher of a method reads here; of any other method, the answer, as an average that follows the policy."""
SETTINGS = {"constrained": {"at_least": {"low": 0.9}}}


def read(name, folder):
    """The same from data: pairs, or answers with labels; 15 rows, so that a batch reaches into the next epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{n}: ", "chosen": "abc"[n % 3], "rejected": f"no {n}", "margin": 0.1 * n} for n in range(15)]
    if "labels" in METHODS[name]().needs.data:
        rows = [{"prompt": f"{n}: ", "completion": "abc"[n % 3], "label": n % 2 > 0} for n in range(15)]
    if "steps" in METHODS[name]().needs.data:
        rows = [
            {"prompt": f"{n}: ", "completions": ["ab", "cd"[: 1 + n % 2]], "labels": [True, n % 2 > 0]}
            for n in range(15)
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = world.sft(folder)
    (stage,) = made["stages"]
    stage |= {"name": "rl", "method": name, "data": {"path": str(folder / "rows.jsonl")}}
    stage["eval"] |= {"env": f"{world.HERE}:World"}
    stage["train"] |= {"steps": 4, "batch": 6, "save_every": 2}
    return made


def recipe(name, folder):
    method = METHODS[name]()
    if method.needs.data:
        return read(name, folder)
    taught = teacher_of(method) is not None
    options = {"teacher": TEACHER.get(name, READS | {"who": "ema"})} if taught else SETTINGS.get(name, {})
    made = world.grpo(
        folder,
        success={"part": "low", "at_least": 0.5},
        sampling={"groups": 3, "group_size": 4, "max_tokens": 4},
        train={"steps": 4, "save_every": 2, "mini_batches": 1},
        eval={"every": 4, "tasks": 3, "best": "eval/low"},
    )
    stage = made["stages"][0]
    stage["method"] = {name: options}
    if name in ("openclaw", "follow_up"):
        stage |= {"env": {"user": {"turns": 2}}, "rewards": {"pleased": 1}, "success": {"part": "pleased"}}
        stage["eval"]["best"] = "eval/pleased"
    if name == "openclaw":
        stage |= {"judge": "tropism.envs.user:judge", "rewards": {"judge": 1}}
    return made


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sft"])
def test_a_method_that_is_killed_ends_as_if_it_had_not_been(name, tmp_path, monkeypatch):
    tropism.train(recipe(name, tmp_path / "whole"), quiet=True)
    train_until(recipe(name, tmp_path / "dead"), 3, monkeypatch)
    tropism.train(recipe(name, tmp_path / "dead"), resume=True, quiet=True)
    same(tmp_path / "dead" / "run", tmp_path / "whole" / "run", "rl")
    record = Run(tmp_path / "whole" / "run" / "rl")
    losses = [line["loss"] for line in record.metrics() if "loss" in line]
    assert len(losses) == 4 and (len(set(losses)) > 1 or name in ("reinforce", "rloo"))
    ends = [latest(Run(tmp_path / way / "run" / "rl").checkpoints_dir) for way in ("whole", "dead")]
    teacher = teacher_of(METHODS[name]())
    shares = [line["teacher/share"] for line in record.metrics() if "teacher/share" in line]
    assert bool(shares) == (teacher is not None) and (not shares or max(shares) > 0)
    if (ends[0] / "state" / "teacher.pt").exists():
        one, other = (torch.load(end / "state" / "teacher.pt") for end in ends)
        assert all(torch.equal(one[key], other[key]) for key in one)
