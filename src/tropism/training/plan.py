"""What a stage will take before it runs: tokens counted on its own tasks, rates measured for seconds or taken from a
machine's data sheet, memory from the sizes of what is held at once.

Replies are as long as the environment's own demonstrations, or as long as they may be where it has none. Nothing is
left out of the update. So time is rather more than the run will take; the words say which of both was counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tropism.config import Recipe, Stage, Train
from tropism.errors import ConfigError
from tropism.maths.speak import MOST
from tropism.signals.reread import starts
from tropism.teacher import teacher_of
from tropism.training import cores, processes
from tropism.training.model import Policy
from tropism.training.rates import heat_of, learning, pieces, quickest, rate, settled
from tropism.training.teachers import SELF
from tropism.training.workload import Work, counted, lasting, parted, referred, teachers
from tropism.types import Batch, SamplingParams, Turn

SECONDS = 3.0
"""How long each kind of work is measured, at least once."""
NOTED = 0.08
"""By which share another size of micro-batches must be faster to be named."""
AT_WORK = 5
"""Arrays over the vocabulary that a chunk of the head holds at once."""


@dataclass(frozen=True)
class Hardware:
    """A data sheet: memory, dense matrix products in bfloat16 and in float32 (tf32 where there is any), bandwidth."""

    gigabytes: float
    half: float
    """Tera operations a second."""
    single: float
    bandwidth: float
    """Gigabytes a second."""


HARDWARE = {
    "h200": Hardware(141, 989, 495, 4800),
    "h100": Hardware(80, 989, 495, 3350),
    "a100": Hardware(80, 312, 156, 2039),
    "l40s": Hardware(48, 362, 183, 864),
    "l4": Hardware(24, 121, 60, 300),
    "rtx4090": Hardware(24, 165, 83, 1008),
    "t4": Hardware(16, 65, 8, 320),
}
LAUNCHES, LAUNCH = 20, 5e-6
"""Operations that a layer starts one after another, and seconds that an accelerator takes to start one."""
MOVED = 28
"""Bytes of an optimizer step for a weight: it, its gradient and both moments read; it and both moments written."""
CONTEXT = 5e8
"""Bytes that a process takes of an accelerator before it has a model."""
REACHED = {"draw": 0.5, "learn": 0.4}
"""Which share of bandwidth decoding is assumed to reach on a data sheet's machine, and an update of its products."""


@dataclass(frozen=True)
class Plan:
    """Of one stage: seconds of a step by part, bytes by what holds them."""

    stage: str
    steps: int
    work: Work
    seconds: dict[str, float]
    memory: dict[str, float]
    room: float
    """Bytes that there are."""
    notes: tuple[str, ...] = ()
    processes: int = 1

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak(self) -> float:
        """What is held all the time, and the larger of drawing and learning."""
        held = sum(value for name, value in self.memory.items() if name not in ("drawing", "learning"))
        return held + max(self.memory["drawing"], self.memory["learning"])

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def planned(
    recipe: Recipe,
    stage: Stage,
    policy: Policy,
    folder: Path,
    hardware: str,
    process: float = 0.0,
    beside: float = 1.0,
) -> Plan:
    """The plan of one stage for a policy of its shape, which is spent: its weights are no longer what they were.

    Of several processes of one thread, each has a part of the groups, holds everything and makes every optimizer step;
    the time in which they exchange gradients is left out.

    Args:
        hardware: `here`, which is measured, or one of `HARDWARE`.
        process: bytes that a process holds without the model, where they were measured before.
        beside: which share of its rate a process keeps beside the others.
    """
    if hardware != "here" and hardware not in HARDWARE:
        raise ConfigError(f"--hardware is {hardware}, which is not known. Known are: here, {', '.join(HARDWARE)}.")
    if not stage.train.micro_tokens:
        tokens = quickest(recipe, stage, policy, folder)[0] if hardware == "here" else Train.micro_tokens
        stage = replace(stage, train=replace(stage.train, micro_tokens=tokens))
    work, steps = counted(recipe, stage, policy, folder), lasting(recipe, stage, folder)
    if hardware == "here":
        count = processes.decided(recipe)
        mine = work if count == 1 else parted(work, stage, count)
        memory = held(stage, policy, mine)
        if count > 1:  # gradients are exchanged as one array
            memory["gradients and moments"] *= 4 / 3
        memory["the process"] = process or unladen(policy, memory["weights"])
        with cores.threads(1 if count > 1 else torch.get_num_threads()):
            seconds, notes, grown = timed(stage, policy, mine)
        memory["learning"] = max(memory["learning"], grown)
        if count > 1:
            notes += (f"{count} processes of one thread, each at {beside:.0%} of its rate alone",)
        seconds = {name: value / beside for name, value in seconds.items()}
        memory = {name: count * size for name, size in memory.items()}
        return Plan(stage.name, steps, work, seconds, memory, available(policy.device), notes, count)
    memory, machine = held(stage, policy, work), HARDWARE[hardware]
    return Plan(
        stage.name,
        steps,
        work,
        by_sheet(stage, policy, work, machine),
        memory | {"the process": CONTEXT},
        machine.gigabytes * 1e9,
        notes=(
            f"from the data sheet of {hardware}, at {REACHED['draw']:.0%} of its bandwidth in drawing and "
            f"{REACHED['learn']:.0%} of its products in learning: not measured",
        ),
    )


# ----------------------------------------------------------------------------------------------------------------- time


def timed(stage: Stage, policy: Policy, work: Work) -> tuple[dict[str, float], tuple[str, ...], float]:
    """(seconds of a step by part, from rates measured now; a note if micro-batches of another size learn faster; by how
    many bytes the process grew meanwhile, beyond the gradients)"""
    heat = heat_of(stage)

    def measuring(piece: Batch) -> None:
        with torch.no_grad():
            policy.forward(piece, heat)

    given = stage.train.micro_tokens
    forth, sizes = learning(policy, heat), (given, given // 2, 2 * given)
    found, saying = dict[int, float](), 0.0

    def step() -> None:  # as the run makes it: what drawing leaves of the heap is what learning has
        nonlocal saying
        saying = speaking(stage, policy, work) if stage.env else 0.0
        found[given] = rate(forth, pieces(policy, work, given), SECONDS)

    grown = growth(step) - sum(4 * p.numel() for p in policy.module.parameters() if p.requires_grad)
    found |= {size: rate(forth, pieces(policy, work, size), SECONDS) for size in sizes[1:] if size}
    best, measure = max(found, key=lambda size: found[size]), rate(measuring, pieces(policy, work, given), SECONDS)
    seconds = {"learning": work.learned / found[given], "moving": moving(stage, policy)}
    if work.measured:
        seconds["measuring"] = work.measured / measure
    if stage.env:
        seconds["drawing"] = work.read / measure + work.drawn / saying
    gain = found[best] / found[given] - 1
    note = (
        f"train.micro_tokens: {best} would learn {gain:.0%} faster than {given}, in {best / given:g} times the memory"
    )
    return seconds, (note,) if gain > NOTED else (), grown


def moving(stage: Stage, policy: Policy) -> float:
    """Seconds of the optimizer's steps: what moments, weights and gradients are read and written."""
    optimizer = torch.optim.AdamW([p for p in policy.module.parameters() if p.requires_grad], lr=0.0)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    began = time.perf_counter()
    optimizer.step()
    settled(policy.device)
    once = time.perf_counter() - began
    optimizer.zero_grad(set_to_none=True)
    return once * moves(stage)


def moves(stage: Stage) -> int:
    """Optimizer steps of a step."""
    return stage.train.epochs * stage.train.mini_batches if stage.env else 1


def speaking(stage: Stage, policy: Policy, work: Work) -> float:
    """Tokens a second of drawing as many sequences as a step has, once their prompts are read."""
    rows = zip(work.batch.tokens.tolist(), starts(work.batch).tolist(), strict=True)
    asked = [row[:start] for row, start in rows]
    prompts = [asked[n % len(asked)] for n in range(work.rows)]

    def draw(length: int) -> tuple[float, int]:
        began = time.perf_counter()
        params = SamplingParams(temperature=stage.sampling.temperature, max_tokens=length, seed=length)
        turns = policy.sampler(prompts, params)
        return time.perf_counter() - began, sum(len(turn.action) for turn in turns if isinstance(turn, Turn))

    draw(1)
    reading, _ = draw(1)
    length = 8
    while True:
        seconds, tokens = draw(length)
        if seconds >= SECONDS or length >= work.longest:
            return max(tokens - work.rows, 1) / max(seconds - reading, 1e-9)
        length = min(work.longest, 4 * length)


def by_sheet(stage: Stage, policy: Policy, work: Work, machine: Hardware) -> dict[str, float]:
    """Seconds of a step where nothing but products, bandwidth and starting operations counts. For a weight and token
    that is learned 4 operations, and 2 more where the weight is trained; 2 for one that is measured. In drawing the
    weights are read once for every token of the longest reply. A small model is bound by the starts."""
    weights: int = sum(p.numel() for p in policy.module.parameters())
    half = policy.settings.compute == "bfloat16"
    products = (machine.half if half else machine.single) * 1e12 * REACHED["learn"]
    layer = float(policy.module.config.num_hidden_layers * LAUNCHES * LAUNCH)

    def passing(tokens: int, operations: float) -> float:
        parts = -(-tokens // stage.train.micro_tokens)
        return max(operations * weights * tokens / products, parts * layer * operations / 2)

    trained: int = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    moved = moves(stage) * MOVED * trained
    found = {
        "learning": passing(work.learned, 4 + 2 * trained / weights),
        "moving": moved / (machine.bandwidth * 1e9),
    }
    if work.measured:
        found["measuring"] = passing(work.measured, 2)
    if stage.env:
        sides = -(-work.rows // policy.sampler.rows)
        seen = weights * (2 if half else 4) + cache(policy, work) / 2
        each = max(seen / (machine.bandwidth * 1e9 * REACHED["draw"]), layer)
        saying = max(work.longest * sides * each, 2 * weights * work.drawn / products)
        found["drawing"] = passing(work.read, 2) + saying
    return found


# --------------------------------------------------------------------------------------------------------------- memory


def held(stage: Stage, policy: Policy, work: Work) -> dict[str, float]:
    """Bytes by what holds them. Weights are float32, the optimizer's moments too."""
    every = [p for part in (policy.module, policy.critic) if part is not None for p in part.parameters()]
    whole = sum(p.numel() * p.element_size() for p in every)
    moved = sum(4 * p.numel() for p in every if p.requires_grad)
    found: dict[str, float] = {"weights": whole, "gradients and moments": 3 * moved}
    lora, others, teacher = policy.settings.lora is not None, 0.0, teacher_of(stage.method)
    copy = sum(p.numel() * p.element_size() for p in policy.module.parameters() if p.requires_grad or not lora)
    if referred(stage) and not lora:
        others += copy
    if teacher is not None and teacher.who in SELF[1:]:
        others += copy
    elif teacher is not None and teacher.who != "live":
        others += sum(4 * weights for weights in teachers(stage, policy))
    if others:
        found["teachers and reference"] = others
    found["learning"] = kept(stage, policy, work)
    found["drawing"] = 0.0
    if stage.env:
        size = 2 if policy.settings.compute == "bfloat16" else 4
        copied = sum(p.numel() for p in every) * size if policy.sampler.misfit is None else 0
        side = min(work.rows, policy.sampler.rows)
        found["drawing"] = copied + cache(policy, work) + AT_WORK * 4 * side * policy.module.config.vocab_size
    return found


def cache(policy: Policy, work: Work) -> float:
    """Bytes of keys and values when every sequence is as long as it gets."""
    places = int(work.batch.length.max()) + work.longest // 2
    return float(cached(policy) * places * min(work.rows, policy.sampler.rows))


def cached(policy: Policy) -> int:
    """Bytes of the keys and values of one token."""
    config, size = policy.module.config, 2 if policy.settings.compute == "bfloat16" else 4
    heads: int = config.num_attention_heads
    width: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    return size * 2 * int(config.num_hidden_layers) * groups * width


def kept(stage: Stage, policy: Policy, work: Work) -> float:
    """Bytes of what the largest micro-batch leaves for its backward pass, and of the head's chunk at work."""
    heat = heat_of(stage)
    piece = max(pieces(policy, work, stage.train.micro_tokens), key=lambda piece: int(piece.length.sum()))
    own = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation's own result would hold the operation that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = policy.forward(piece, heat)
    del out
    chunk = min(MOST, 4 * int(piece.action_mask.sum()) * policy.module.config.vocab_size)
    return float(sum(seen.values()) + AT_WORK * chunk)


def resident() -> float:
    """Bytes that this process holds now, where the system says so."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def growth(work: Callable[[], None]) -> float:
    """Bytes by which this process outgrows what it holds, while it works: what is kept for the backward pass, what an
    operation needs meanwhile, what the heap cannot use again. 0 where the system keeps no count, as Linux does."""
    trimmed()
    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
    except OSError:
        before = float("inf")
    work()
    return max(0.0, highest() - before)


def highest() -> float:
    """The most bytes that this process has held, where the system says so."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def trimmed() -> None:
    """Give the system back what was freed, where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def unladen(policy: Policy, weights: float) -> float:
    """Bytes that this process holds beside its model, with all that training loads."""
    import pyarrow.parquet  # noqa: F401  the record is written with it

    trimmed()
    one = torch.nn.Parameter(torch.ones(1))
    one.grad = torch.ones(1)
    torch.optim.AdamW([one]).step()
    return max(0.0, resident() - (weights if policy.device.type == "cpu" else 0.0))


def available(device: torch.device) -> float:
    """Bytes of memory that this machine, or its accelerator, has."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return float(total)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
