from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tropism.errors import ConfigError
from tropism.view.trackers import Name, Tracker

RUN = """
import math, sys
from pathlib import Path
from tropism.view.trackers import Tracker
tracker = Tracker(sys.argv[1], "nim", {"seed": 1, "stages": [{"name": "play"}]}, Path(sys.argv[2]))
tracker.say("a line")
for stage, done in (("format", 0), ("play", 0), ("play", 2)):
    tracker.begin(stage, 4, done)
    for step in range(done + 1, 5):
        tracker.step(step, {"reward": step / 8 + done, "rewards/win/mean": 1.0, "kl": math.nan}, [])
    tracker.step(4, {"eval/return": 0.75}, [])
    tracker.end(stage)
"""
TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
runs = set(SQLiteStorage.get_runs("games"))
print(json.dumps({run: SQLiteStorage.get_logs("games", run) for run in runs}))
"""


def python(code: str, *args: str, **env: str) -> str:
    """Run in a process of its own: the trackers keep global state and read their variables when imported."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensorboard_gets_every_number_once_also_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    python(RUN, "tensorboard", str(tmp_path))
    read = EventAccumulator(str(tmp_path / "tensorboard" / "play")).Reload()
    assert set(read.Tags()["scalars"]) == {"reward", "rewards/win/mean", "kl", "eval/return"}
    assert [(e.step, e.value) for e in read.Scalars("reward")] == [(1, 0.125), (2, 0.25), (3, 2.375), (4, 2.5)]
    assert [(e.step, e.value) for e in read.Scalars("eval/return")] == [(4, 0.75)]
    assert all(math.isnan(e.value) for e in read.Scalars("kl"))
    assert "seed" in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_trackio_gets_every_number_without_a_network(tmp_path: Path) -> None:
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "games", "HF_HUB_OFFLINE": "1"}
    python(RUN, "trackio", str(tmp_path), **env)
    logs = json.loads(python(TRACKIO, **env).splitlines()[-1])
    assert set(logs) == {"nim-format", "nim-play", "nim-play-from-2"}
    rewards = {run: [(e["step"], e["reward"]) for e in lines if "reward" in e] for run, lines in logs.items()}
    assert rewards["nim-play"] == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5)]
    assert rewards["nim-play-from-2"] == [(3, 2.375), (4, 2.5)]
    assert [e["step"] for e in logs["nim-format"] if e.get("eval/return") == 0.75] == [4]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_to_itself_when_offline(tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    python(RUN, "wandb", str(tmp_path), **env)
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 3


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_how_to_get_it(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ConfigError, match=rf"names {name}.*pip install tropism\[track\]"):
        Tracker(name, "nim", {})


def test_importing_the_trackers_brings_none_of_them() -> None:
    code = "import sys, tropism.view.trackers; print({'torch', 'wandb', 'trackio', 'tensorboard'} & set(sys.modules))"
    assert python(code) == "set()\n"
