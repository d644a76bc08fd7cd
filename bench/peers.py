"""What the benches of speed share: models, prompts, processes that stay warm and take turns, and how a table is made.

Peers run in processes of their own, each with its threads fixed, and take turns step by step, so that what disturbs the
machine disturbs all of them. The first turns of each are left out. Figures are medians with quartiles.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "0.5M": {},
    "1M": {"hidden_size": 192, "intermediate_size": 576, "num_attention_heads": 6, "num_key_value_heads": 3},
    "4M": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
    },
    "20M": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 5},
}
"""Name -> what is changed in the preset `tiny`, a Qwen3 over bytes; random weights."""
ROLLOUTS, GROUP, PROMPT, REPLY = 128, 8, 16, 48
"""Replies of a step, siblings, bytes of a prompt, most tokens of a reply; random weights end few of them earlier."""

Turn = Callable[[], dict[str, float]]
"""One step; seconds by name."""


def prompts(count: int, length: int = PROMPT) -> list[str]:
    draws = random.Random(0)
    return ["".join(draws.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count)]


def worth(text: str) -> float:
    """A reward that costs nothing and differs between replies."""
    return len(set(text)) / max(len(text), 1)


def settled(threads: int) -> None:
    """Fix the threads of this process, before torch is loaded."""
    os.environ.update({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "0"})
    import torch

    torch.set_num_threads(threads)


def serve(
    connection: Connection,
    threads: int,
    make: Callable[..., Turn],
    settings: Mapping[str, Any],
    place: Mapping[str, str],
) -> None:
    """A peer's process: a turn whenever it is asked for one.

    Args:
        place: the variables by which torchrun tells a process of its place among several; empty for one.
    """
    settled(threads)
    os.environ.update(place)
    if place:
        import torch.distributed

        torch.distributed.init_process_group("gloo")
    turn = make(**settings)
    connection.send({})
    while connection.recv():
        connection.send(turn())


class Peer:
    """A peer in processes of its own: one, or several that train together. A step ends with the last of them."""

    def __init__(self, make: Callable[..., Turn], threads: int = 1, processes: int = 1, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(processes):
            place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, threads, make, settings, place), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        for connection in self.connections:
            connection.recv()

    def turn(self) -> dict[str, float]:
        for connection in self.connections:
            connection.send(True)
        told: list[dict[str, float]] = [connection.recv() for connection in self.connections]
        return {name: (sum if name == "tokens" else max)(one[name] for one in told) for name in told[0]}

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Outside(Peer):
    """A peer in an environment of its own: a program that prints JSON once it is ready, and for each line it reads."""

    def __init__(self, command: Sequence[str], threads: int = 1) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.program = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env, text=True)
        self.told()

    def told(self) -> dict[str, float]:
        """Its next line of JSON; a library may print others."""
        assert self.program.stdout is not None
        for line in self.program.stdout:
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise SystemExit(f"{self.program.args} has ended. Run it by hand to see why.")

    def turn(self) -> dict[str, float]:
        assert self.program.stdin is not None
        self.program.stdin.write("\n")
        self.program.stdin.flush()
        return self.told()

    def end(self) -> None:
        self.program.terminate()
        self.program.wait()


def taking_turns(peers: Mapping[str, Peer], turns: int, warm: int = 2) -> dict[str, list[dict[str, float]]]:
    """Peer -> its turns, in an order that changes every round; the first `warm` of each are left out."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    for n in range(turns + warm):
        names = list(peers)
        for name in names if n % 2 else reversed(names):
            told = peers[name].turn()
            if n >= warm:
                found[name].append(told)
    return found


def raced(
    makers: Mapping[str, tuple[Callable[..., Turn], Mapping[str, Any]]],
    threads: int,
    turns: int,
    outside: Mapping[str, Sequence[str]] | None = None,
    processes: int = 1,
    parted: Mapping[str, int] | None = None,
) -> Any:
    """Peer -> its turns: started from (what makes it, its settings), or from a command, and ended afterwards.

    Args:
        parted: peers that are so many processes, among which their threads are shared.
    """
    os.environ.pop("GOMP_SPINCOUNT", None)  # what `import tropism` has set here is not the others' way to wait
    running: dict[str, Peer] = {}
    for name, (make, settings) in makers.items():
        parts = (parted or {}).get(name, 1)
        running[name] = Peer(make, threads // parts, processes * parts, **settings)
    running |= {name: Outside(command, threads) for name, command in (outside or {}).items()}
    try:
        return taking_turns(running, turns)
    finally:
        for peer in running.values():
            peer.end()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower, upper quartile)"""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return middle, low, high


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fastest(work: Callable[[], Any], repeats: int = 12) -> float:
    """Seconds, the best of some after a warm-up: for a limit of the machine, which nothing can be faster than."""
    work()
    return min(timed(work) for _ in range(repeats))


def peak(dtype: str) -> tuple[float, str]:
    """(operations per second, backend) of the fastest product of two matrices of 1024 x 1024, with the threads set."""
    import torch

    from tropism.maths import linear

    kind = getattr(torch, dtype)
    a, b = (torch.randn(1024, 1024).to(kind) for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {"torch.mm": lambda: a @ b, "linear": lambda: torch.nn.functional.linear(a, b)}
    if linear.AVAILABLE:
        ways["oneDNN"] = lambda: linear.product(a, b)
    with torch.inference_mode():
        rates = {name: 2 * 1024**3 / fastest(way) for name, way in ways.items()}
    name = max(rates, key=lambda way: rates[way])
    return rates[name], name


def bandwidth(device: str = "cpu") -> float:
    """Bytes a second that are read and written in copying an array that no cache holds, the best of some."""
    import torch

    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    into = torch.empty_like(source)

    def copied() -> None:
        into.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * 4 * source.numel() / fastest(copied)


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "cpu": cpu()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    except OSError:
        names = {platform.processor()}
    return f"{', '.join(sorted(names))}, {os.cpu_count()} cores"


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|---" * len(rows[0]) + "|"
    for row in rows:
        yield "| " + " | ".join(str(value) for value in row.values()) + " |"


def told(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], as_json: bool) -> None:
    """Print the rows for a person or for a machine."""
    if as_json:
        print(json.dumps({"about": about, "rows": rows}, indent=1))
        return
    print("\n".join(table(rows)))
    print("; ".join(f"{name} {value}" for name, value in about.items()))
