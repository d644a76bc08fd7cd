"""Several processes of one thread that train as one: started here, joined by gloo over a file, ended with the run.

Small models on a CPU gain little from threads within an operation, and much from whole operations side by side. Every
process runs the same recipe; `ranks.py` splits play and gradients among them, and the first one writes the record.

    python -m tropism.training.processes RANK SIZE FOLDER           what each of the others is
    python -m tropism.training.processes busy RANK PARENT FOLDER    one that only works while a rate is measured
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tropism.config import Model, Recipe
from tropism.errors import ConfigError, TropismError
from tropism.load import files_in, from_file
from tropism.record import Lines, Run
from tropism.training import cores
from tropism.training.cores import groups_of, on_cpu, probe, rate
from tropism.training.ranks import Ranks

Say = Callable[[str], None]


def decided(recipe: Recipe) -> int:
    """How many train a recipe here; measured now if it leaves that open and this machine has not been asked before."""
    if recipe.processes != "auto":
        return recipe.processes if on_cpu(recipe.model) else 1
    count, measured = opened(recipe, lambda _: None, None)
    if not measured:
        return count
    with together(recipe, lambda _: None):
        return Ranks().size


@contextlib.contextmanager
def together(recipe: Recipe, say: Say, *, resume: bool = False) -> Iterator[None]:
    """As many processes as the recipe asks for, for as long as this lasts.

    Args:
        say: told what was measured, where the recipe leaves the number open.
        resume: take the number that the run began with, for its results are repeated with that one alone.
    """
    count, measured = recipe.processes, False
    if count == "auto":
        count, measured = opened(recipe, say, recorded(recipe) if resume else None)
    elif count > 1 and not on_cpu(recipe.model):
        say(f"processes: {count} of one thread are for a CPU, and the model is on another device: one is used")
    if count == 1 or dist.is_initialized() or not on_cpu(recipe.model):
        yield
        return
    check(recipe, count)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.pickle").write_bytes(pickled(recipe, measured))
        others = [started(rank, folder, str(rank), str(count)) for rank in range(1, count)]
        try:
            arrived(others, folder)
            join(0, count, folder, recipe, measured, say, threads)
            yield
        except RuntimeError as error:  # gloo: the connection of one that died is closed
            if found := dead(others, folder):
                raise found from error
            raise
        finally:
            for other in others:
                other.terminate()
            for other in others:
                other.wait()
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(threads)


def opened(recipe: Recipe, say: Say, known: int | None) -> tuple[int, bool]:
    """(how many to start, whether they are to be measured first) where nobody says how many.

    Args:
        known: what the run began with, if it is continued.
    """
    count = known or cores.to_try(recipe)
    if count == 1 or dist.is_initialized():
        return 1, False
    faster = None if known else cores.remembered(recipe.model, count)
    if faster is not None:
        say(f"processes: {told(count, torch.get_num_threads(), faster)} (measured before, and kept in {cores.kept()})")
        count = count if faster > 1 else 1
    measured = not known and faster is None
    try:
        pickled(recipe, measured)
    except ConfigError:
        if known:
            raise
        say("processes: one, for the recipe holds a function or class that no other knows (name it file.py:name)")
        return 1, False
    return count, measured


def told(count: int, threads: int, faster: float) -> str:
    """What was measured, in words."""
    words = f"{count} of one thread are {faster:.2f} times as fast as one process of {threads} threads"
    return words + ("" if faster > 1 else ", so one is used")


def pickled(recipe: Recipe, measured: bool) -> bytes:
    """A recipe for another process, which loads the same files first.

    Raises:
        ConfigError: part of it is known by no name that another process could import.
    """
    try:
        found = pickle.dumps((recipe, measured))
        pickle.loads(found)
    except Exception as error:  # whatever somebody's function or class holds
        raise ConfigError(
            f"processes is {recipe.processes}, but the recipe holds what no other process can be given: {error}. "
            "Name it as file.py:name, or use processes: 1."
        ) from error
    if b"__main__" in found:
        raise ConfigError(
            f"processes is {recipe.processes}, but a method or reward of the recipe is defined in the program that is "
            "running, which no other process can import. Name it as file.py:name, or use processes: 1."
        )
    return pickle.dumps((files_in(found), found))


def unpickled(given: bytes) -> tuple[Recipe, bool]:
    """What `pickled` was given."""
    paths, inner = pickle.loads(given)
    for path in paths:
        from_file(Path(path))
    found: tuple[Recipe, bool] = pickle.loads(inner)
    return found


def recorded(recipe: Recipe) -> int | None:
    """The number of processes that a run of this name began with."""
    for stage in recipe.stages:
        if config := Run(Path(recipe.output) / recipe.name / stage.name).config:
            return int(config["versions"].get("processes", 1))
    return None


def check(recipe: Recipe, count: int) -> None:
    for stage in recipe.stages:
        name, groups = groups_of(stage)
        if groups < count:
            raise ConfigError(
                f"stage {stage.name!r} has {name} = {groups}, too few for {count} processes: no group is parted. Use "
                f"processes: {groups}, or more groups."
            )


def started(rank: int, folder: str, *words: str) -> subprocess.Popen[bytes]:
    """Another process; what it says goes to a file, for it is news only if it dies."""
    command = [sys.executable, "-m", "tropism.training.processes", *words, folder]
    with open(Path(folder) / f"{rank}.log", "wb") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)


def dead(others: Sequence[subprocess.Popen[bytes]], folder: str) -> TropismError | None:
    """Which of the others has died, and its last words; None if none has."""
    for rank, other in enumerate(others, 1):
        with contextlib.suppress(subprocess.TimeoutExpired):
            if other.wait(2.0):
                return TropismError(f"process {rank} died: {last(rank, other, folder)}. Continue with --resume.")
    return None


def last(rank: int, other: subprocess.Popen[bytes], folder: str) -> str:
    """The last thing that a process said."""
    lines = (Path(folder) / f"{rank}.log").read_text("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {other.returncode}"


def join(rank: int, count: int, folder: str, recipe: Recipe, measured: bool, say: Say, threads: int) -> bool:
    """Meet the others; whether they are sent home, because threads are faster."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    if not measured:
        return False
    began, work = time.perf_counter(), probe(recipe.model)
    dist.barrier()
    many = torch.tensor([rate(work)])
    dist.all_reduce(many)
    ratio = [0.0]
    if rank == 0:
        with cores.threads(threads):
            ratio = [float(many) / rate(work)]
            cores.remember(recipe.model, count, ratio[0])
    dist.broadcast_object_list(ratio, 0)
    (faster,) = ratio
    say(f"processes: {told(count, threads, faster)} (measured in {time.perf_counter() - began:.1f} s)")
    if faster > 1:
        return False
    dist.destroy_process_group()
    torch.set_num_threads(threads)
    return True


def rate_beside(model: Model, count: int) -> float:
    """Which share of its rate a process of one thread keeps while others, `count` with it, work on the same; at most 1.

    Raises:
        TropismError: one of the others ends.
    """
    others = list[subprocess.Popen[bytes]]()
    with tempfile.TemporaryDirectory() as folder, cores.threads(1):
        (Path(folder) / "model.pickle").write_bytes(pickle.dumps(model))
        try:
            for rank in range(1, count):
                others.append(started(rank, folder, "busy", str(rank), str(os.getpid())))
            work = probe(model)
            arrived(others, folder)
            beside = rate(work)
            alive(others, folder)
            ended(others)
            return min(1.0, beside / rate(work))
        finally:
            ended(others)


def arrived(others: Sequence[subprocess.Popen[bytes]], folder: str) -> None:
    """Wait until each of the others has left word that it is there.

    Raises:
        TropismError: one of them ends.
    """
    while not all((Path(folder) / f"{rank}.ready").exists() for rank in range(1, len(others) + 1)):
        alive(others, folder)
        time.sleep(0.02)


def alive(others: Sequence[subprocess.Popen[bytes]], folder: str) -> None:
    for rank, other in enumerate(others, 1):
        if other.poll() is not None:
            raise TropismError(f"process {rank} died before there was work for it: {last(rank, other, folder)}.")


def ended(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for other in others:
        other.kill()
    for other in others:
        other.wait()


def busy(rank: int, parent: int, folder: str) -> int:
    """Work until killed, or until the process that asked for it is gone."""
    torch.set_num_threads(1)
    work = probe(pickle.loads((Path(folder) / "model.pickle").read_bytes()))
    work()
    if os.getppid() == parent:
        (Path(folder) / f"{rank}.ready").touch()
    while os.getppid() == parent:
        work()
    return 0


def main(rank: int, count: int, folder: str) -> int:
    """One of the others, from its start to its end."""
    from tropism.training.run import run

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the first process's business
    recipe, measured = unpickled((Path(folder) / "recipe.pickle").read_bytes())
    (Path(folder) / f"{rank}.ready").touch()
    if join(rank, count, folder, recipe, measured, lambda _: None, 1):
        return 0
    try:
        run(recipe, Lines())
    except TropismError as error:  # the first process says it
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "busy":
        sys.exit(busy(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
