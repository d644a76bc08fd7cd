"""Reward functions called in processes of their own, so that one that computes long in Python holds up nobody else.

A function of one reply is called in all processes at once, each with a part of the rollouts. One that sees them all
(TRL's shape, and `rollouts`) is called once, in one of them, beside the other functions. What it draws at random is
decided by the rollouts it is given, so a resumed run draws the same; what it keeps from call to call, each process
keeps for itself.

    python -m tropism.training.workers        what each process is: reads jobs, pickled, and writes results
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any, BinaryIO

import torch

from tropism.errors import ConfigError, TropismError
from tropism.rewards import bound, find_scorer
from tropism.rewards.adapt import PerReply
from tropism.rewards.score import ask
from tropism.training.seeds import seed_generators
from tropism.types import Failure, Rollout, Scored, Scorer, seed_of

Results = list[Scored | Failure]

PARTS = 4
"""Parts for each process, so that one with the slow replies is not waited for."""


class Workers:
    """Processes that score; they start with the first rollouts, and end with this object or this process.

    Args:
        count: how many.
        given: reward functions as a recipe names them, none of them twice.
        max_tokens: the longest that a reply may be.

    Raises:
        ConfigError: a function cannot be sent to another process.
    """

    def __init__(self, count: int, given: Sequence[Any], max_tokens: int) -> None:
        self.count, self.max_tokens = count, max_tokens
        self.given = {find_scorer(one)[0]: one for one in given}
        for name, one in self.given.items():
            if reason := unsent(one):
                raise ConfigError(
                    f"sampling.reward_workers is {count}, but no other process can be given the reward {name}: "
                    f"{reason}. Name it as file.py:name, or use reward_workers: 0."
                )
        self.free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(count):
            self.free.put(Worker())
        self.threads = ThreadPoolExecutor(count, "reward")

    def begin(self, rollouts: Sequence[Rollout]) -> dict[str, Scorer]:
        """Start scoring those that have no failure; name -> a scorer that waits for the results of these."""
        live = [r for r in rollouts if r.failure is None]
        return {name: partial(waited, self.parts(name, live)) for name in self.given}

    def parts(self, name: str, live: Sequence[Rollout]) -> list[Future[Results]]:
        """In order."""
        apart = isinstance(find_scorer(self.given[name])[1], PerReply)
        size = -(-len(live) // (PARTS * self.count)) if apart else len(live)
        starts = range(0, len(live), size) if live else ()
        return [self.threads.submit(self.scored, name, live[at : at + size]) for at in starts]

    def scored(self, name: str, rollouts: Sequence[Rollout]) -> Results:
        """By the next free process. One that dies is started again; of what it had, each rollout is tried alone."""
        worker = self.free.get()
        try:
            return worker.ask((self.given[name], self.max_tokens, rollouts))
        except EOFError:
            if len(rollouts) == 1:
                return [Failure(name, "the process that scored it died")]
        finally:
            self.free.put(worker)
        return [result for rollout in rollouts for result in self.scored(name, [rollout])]


def waited(parts: Sequence[Future[Results]], rollouts: Sequence[Rollout]) -> Results:
    return [result for part in parts for result in part.result()]


def unsent(given: Any) -> str:
    """Why another process cannot be given a function; empty if it can."""
    if isinstance(given, str):
        return ""
    try:
        sent = pickle.dumps(given)
    except Exception as error:  # whatever it holds
        return str(error)
    return "it is defined in the program that is running" if b"__main__" in sent else ""


class Worker:
    """One process, started when it is first asked and again after it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, job: tuple[Any, int, Sequence[Rollout]]) -> Results:
        """The results of a job.

        Raises:
            EOFError: the process died of it.
            ConfigError: it cannot be sent, or cannot be read there.
            TropismError: what the reward raised.
        """
        sent = written(job)
        try:
            if self.process is None:
                self.process = started()
                weakref.finalize(self, stop, self.process)
                self.send(pickle.dumps(sys.path))
            self.send(sent)
            assert self.process.stdout is not None
            found: Results | TropismError = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.end()
            raise EOFError from error
        if isinstance(found, TropismError):
            raise found
        return found

    def send(self, what: bytes) -> None:
        """Whole, or not at all: what cannot be read there must not leave half of itself in the pipe."""
        assert self.process is not None and self.process.stdin is not None
        pickle.dump(what, self.process.stdin)
        self.process.stdin.flush()

    def end(self) -> None:
        if self.process is not None:
            stop(self.process)
            self.process = None


def written(job: tuple[Any, int, Sequence[Rollout]]) -> bytes:
    try:
        return pickle.dumps(job)
    except Exception as error:  # whatever a task holds
        columns = (column for rollout in job[2] for column in rollout.task.columns.items())
        name = next((name for name, value in columns if unsent([value])), None)
        what = "a rollout" if name is None else f"the column {name!r} of a task"
        raise ConfigError(
            f"sampling.reward_workers sends rollouts to other processes, but {what} cannot be sent: {error}. Give tasks"
            " columns of plain values, or use reward_workers: 0."
        ) from error


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def started() -> subprocess.Popen[bytes]:
    command, env = [sys.executable, "-m", __name__], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


# ---------------------------------------------------------------------------------------------------------- the process


def serve(jobs: BinaryIO, results: BinaryIO) -> None:
    """Until there are no more jobs."""
    sys.path[:] = pickle.loads(pickle.load(jobs))
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        try:
            found: Results | TropismError = result_of(*read(job))
        except TropismError as error:
            found = error
        pickle.dump(found, results)
        results.flush()


def read(job: bytes) -> tuple[Any, int, Sequence[Rollout]]:
    try:
        found: tuple[Any, int, Sequence[Rollout]] = pickle.loads(job)
    except Exception as error:  # of an import
        raise ConfigError(
            f"sampling.reward_workers: another process cannot load a reward or a task ({type(error).__name__}: "
            f"{error}). Name the reward as file.py:name, or use reward_workers: 0."
        ) from error
    return found


def result_of(given: Any, max_tokens: int, rollouts: Sequence[Rollout]) -> Results:
    first = rollouts[0]
    seed = seed_of("reward", first.version, first.task.env, first.task.seed, first.task.seat, first.sibling)
    seed_generators(seed)
    name, scorer, _ = known(given)
    return ask(name, bound(scorer, max_tokens), rollouts)


known = cache(find_scorer)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; it ends with its jobs
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a reward prints is no result
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, results)


if __name__ == "__main__":
    main()
