"""Two processes train as one, to rounding; bit for bit among themselves; and they end together."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import again
import tropism
import world
from tropism.api import resolved_recipe
from tropism.config import Model
from tropism.errors import ConfigError, TropismError
from tropism.load import load
from tropism.record import Run, latest, saved_in
from tropism.training import cores, processes
from tropism.training.ranks import Ranks

close = torch.testing.assert_close


def trained(folder, make=world.grpo, count=2, **changes):
    return tropism.train(make(folder, **changes) | {"processes": count}, quiet=True).path


def weights(stage: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(latest(stage / "checkpoints") / "model.safetensors")


def kto(folder):
    """Each answer is compared with that to another row's prompt, which another process may hold."""
    folder.mkdir()
    rows = [{"prompt": f"{n} say a: ", "completion": "ab" * (1 + n % 5), "label": n % 3 > 0} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = world.sft(folder)
    evaluated = made["stages"][0]["eval"] | {"env": f"{world.HERE}:World"}
    made["stages"][0] |= {"method": "kto", "data": {"path": str(folder / "rows.jsonl")}, "eval": evaluated}
    return made


def taught(folder):
    """Teacher's numbers are means over tokens, of which the processes hold unequally many."""
    made = world.grpo(folder)
    teacher = {"who": "frozen", "reads": ["answer"], "must_add": -1}
    made["stages"][0]["method"] = {"opd": {"teacher": teacher}}
    return made


def own(folder):
    """A method of the user's, in a file."""
    folder.mkdir()
    (folder / "mine.py").write_text(
        "from dataclasses import dataclass\n\nfrom tropism.methods.grpo import GRPO\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(GRPO):\n    pass\n"
    )
    made = world.grpo(folder)
    made["stages"][0]["method"] = {f"{folder}/mine.py:Mine": {}}
    return made


MAKES = {"own": own, "grpo": world.grpo, "ppo": world.ppo, "sft": world.sft, "kto": kto, "taught": taught}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_two_processes_train_as_one(make, tmp_path):
    """Also with a reward that draws from every generator: the first process alone asks for it."""
    one, two = (trained(tmp_path / str(count), make, count) for count in (1, 2))
    (stage,) = [path.name for path in one.iterdir() if path.is_dir()]
    mine, theirs = Run(two / stage), Run(one / stage)
    for found, expected in zip(mine.metrics(), theirs.metrics(), strict=True):
        plain = {name: value for name, value in expected.items() if "time/" not in name}
        assert {name for name in found if "time/" not in name} == set(plain)
        for name, value in plain.items():
            assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    for step in theirs.recorded():
        columns = ["episode", "turn", "action", "reward", "context"]
        assert mine.rollouts(step, columns=columns).to_pylist() == theirs.rollouts(step, columns=columns).to_pylist()
        for found, expected in zip(*(run.rollouts(step).to_pylist() for run in (mine, theirs)), strict=True):
            for name in ("advantage", "weight", "proximal_logp"):
                assert (found[name] is None) == (expected[name] is None)
                assert found[name] is None or found[name] == pytest.approx(expected[name], abs=2e-3)
    for name, value in weights(one / stage).items():
        close(weights(two / stage)[name], value, atol=2e-4, rtol=0)
    assert mine.config["versions"]["processes"] == "2"


def test_a_run_of_two_processes_is_continued_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "whole")
    cut = trained(tmp_path / "cut")
    checkpoints = saved_in(cut / "rl" / "checkpoints")
    for step in sorted(checkpoints)[1:]:
        subprocess.run(["rm", "-r", checkpoints[step]], check=True)
    (cut / "report.html").unlink()
    tropism.train(world.grpo(tmp_path / "cut") | {"processes": 2}, quiet=True, resume=True)
    again.same(cut, whole, "rl")


def test_another_number_of_processes_is_another_run(tmp_path):
    trained(tmp_path)
    with pytest.raises(ConfigError, match="made by another recipe"):
        tropism.train(world.grpo(tmp_path), quiet=True, resume=True)


def test_too_many_processes_for_the_groups_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"sampling.groups = 3, too few for 4 processes"):
        trained(tmp_path, count=4)
    with pytest.raises(ConfigError, match="somebody has to train"):
        trained(tmp_path, count=0)


def test_what_another_process_cannot_be_given_is_refused(tmp_path):
    recipe = resolved_recipe(world.grpo(tmp_path) | {"processes": 2}, (), {})
    stage = replace(recipe.stages[0], rewards={lambda completions, **_: [0.0] * len(completions): 1.0})
    with pytest.raises(ConfigError, match=r"Name it as file.py:name"):
        processes.pickled(replace(recipe, stages=(stage,)), False)


@pytest.mark.parametrize("method", ["dapo", "ppo"])
def test_a_process_that_no_group_is_left_for_waits_for_the_others(tmp_path, method):
    """Two of three tasks cannot be scored; the one that can is one group."""
    (tmp_path / "one.py").write_text(
        "def one(completions, answer, **_):\n"
        "    return [len(set(str(c))) if a == 'a' else float('nan') for c, a in zip(completions, answer)]\n"
    )
    ends = []
    for count in (1, 2):
        recipe = world.grpo(tmp_path / str(count), train={"failure_limit": 1.0, "steps": 3})
        (stage,) = recipe["stages"]
        stage |= {"method": {method: {}}, "rewards": {f"{tmp_path}/one.py:one": 1.0}}
        ends.append(weights(tropism.train(recipe | {"processes": count}, quiet=True).path / "rl"))
    for name, value in ends[0].items():
        close(ends[1][name], value, atol=2e-4, rtol=0)


def test_on_another_device_one_process_is_used_and_it_says_so(tmp_path):
    recipe = resolved_recipe(world.grpo(tmp_path) | {"processes": 2}, (), {})
    said, recipe = [], replace(recipe, model=replace(recipe.model, device="cuda"))
    with processes.together(recipe, said.append):
        assert not torch.distributed.is_initialized() and "one is used" in said[0]


@pytest.fixture
def two_threads(tmp_path, monkeypatch):
    """What torch may use; what is measured is kept in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with cores.threads(2):
        yield


def open_world(folder):
    """It says neither how many processes nor how many threads."""
    return world.grpo(folder, train={"threads": 0})


def asked(recipe, **settings):
    """(what is said, number of processes, the number again once it is remembered, what is said then)"""
    sizes, words = [], []
    for _ in range(2):
        said: list[str] = []
        with processes.together(recipe, said.append, **settings):
            sizes.append(Ranks().size)
        assert torch.get_num_threads() == 2 and not torch.distributed.is_initialized()
        words.append(said)
    return words[0], sizes[0], sizes[1], words[1]


def test_unless_told_how_many_it_measures_once_says_so_and_leaves_threads_as_they_were(tmp_path, two_threads):
    recipe = resolved_recipe(open_world(tmp_path), (), {})
    assert recipe.processes == "auto"
    first, size, later, again = asked(recipe)
    assert "processes: 2 of one thread are" in first[0] and "(measured in" in first[0]
    assert ("so one is used" in first[0]) == (size == 1) and later == size
    assert again == [
        first[0].split(" (")[0] + f" (measured before, and kept in {tmp_path}/cache/tropism/processes.json)"
    ]
    assert processes.decided(recipe) == size


@pytest.mark.parametrize(("faster", "size"), [(1.2, 2), (0.9, 1)])
def test_what_was_measured_before_decides(faster, size, tmp_path, two_threads, monkeypatch):
    recipe = resolved_recipe(open_world(tmp_path), (), {})
    cores.remember(recipe.model, 2, faster)
    monkeypatch.setattr(processes, "probe", None)  # nothing is measured
    words, *sizes, _ = asked(recipe)
    assert sizes == [size, size] and f"{faster:.2f} times" in words[0]
    assert processes.decided(recipe) == size


def test_a_run_is_continued_with_as_many_processes_as_it_began_with(tmp_path, two_threads):
    recipe = open_world(tmp_path)
    cores.remember(resolved_recipe(recipe, (), {}).model, 2, 1.5)
    path = tropism.train(recipe, quiet=True).path
    assert Run(path / "rl").config["versions"]["processes"] == "2"
    cores.remember(resolved_recipe(recipe, (), {}).model, 2, 0.5)
    with processes.together(resolved_recipe(recipe, (), {}), lambda _: None, resume=True):
        assert Ranks().size == 2


def test_what_no_other_process_can_be_given_is_run_by_one_unless_more_are_asked_for(tmp_path, two_threads):
    recipe = resolved_recipe(open_world(tmp_path), (), {})
    stage = replace(recipe.stages[0], rewards={lambda completions, **_: [0.0] * len(completions): 1.0})
    words, *sizes, _ = asked(replace(recipe, stages=(stage,)))
    assert processes.decided(replace(recipe, stages=(stage,))) == 1
    assert sizes == [1, 1] and "processes: one, for the recipe holds" in words[0]


FATAL = """
import os, torch
from world import World as Whole

class World(Whole):
    def open(self, task, sibling):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            os._exit(3)
        return super().open(task, sibling)
"""


def test_if_one_dies_the_run_ends_and_says_so(tmp_path):
    import yaml

    (tmp_path / "fatal.py").write_text(FATAL)
    recipe = world.grpo(tmp_path / "runs") | {"processes": 2}
    recipe["stages"][0]["env"] = f"{tmp_path}/fatal.py:World"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(world.__file__).parent), *filter(None, sys.path)])}
    words = [sys.executable, "-m", "tropism", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=env, cwd=tmp_path)
    assert done.returncode == 1 and "process 1 died" in done.stderr, done.stderr


def test_one_that_cannot_begin_is_not_waited_for(tmp_path):
    """Its recipe's method is in a file that is gone."""
    recipe = resolved_recipe(own(tmp_path / "own") | {"processes": 2}, (), {})
    (tmp_path / "own" / "mine.py").unlink()
    refused = pytest.raises(TropismError, match=r"process 1 died before .*there is no file .*mine.py")
    with refused, processes.together(recipe, lambda _: None):
        pass


def test_another_is_given_the_files_that_it_needs_and_no_others(tmp_path):
    (tmp_path / "other.py").write_text("class Other: pass\n")
    load(f"{tmp_path}/other.py:Other")
    recipe = resolved_recipe(own(tmp_path / "own") | {"processes": 2}, (), {})
    assert pickle.loads(processes.pickled(recipe, False))[0] == [f"{tmp_path}/own/mine.py"]
    assert processes.unpickled(processes.pickled(recipe, True)) == (recipe, True)


def test_the_rate_that_a_process_keeps_beside_another_is_measured_and_the_other_ends(monkeypatch):
    begun, start, threads = [], processes.started, torch.get_num_threads()
    monkeypatch.setattr(processes, "started", lambda *words: begun.append(start(*words)) or begun[-1])
    assert 0.2 < processes.rate_beside(Model(**world.MODEL), 2) <= 1
    assert torch.get_num_threads() == threads and [other.poll() is None for other in begun] == [False]


def test_a_process_that_was_to_work_beside_another_and_cannot_says_why(monkeypatch):
    monkeypatch.setattr(processes, "probe", lambda model: lambda: None)
    threads = torch.get_num_threads()
    with pytest.raises(TropismError, match=r"process 1 died before .*nowhere"):
        processes.rate_beside(Model(path="./nowhere", device="cpu"), 2)
    assert torch.get_num_threads() == threads


def test_a_process_that_only_works_ends_once_nobody_asks_for_it(tmp_path):
    """Its parent is gone before it has begun: it is nobody's child that it knows."""
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(Model(**world.MODEL)))
    other = processes.started(1, str(tmp_path), "busy", "1", str(os.getpid() + 1))
    assert other.wait(60) == 0 and not (tmp_path / "1.ready").exists()
