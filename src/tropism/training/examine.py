"""Brings a run to the doctor: a few probe rollouts, the policy as callables, one line per check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tropism.config import Stage
from tropism.errors import CheckFailed
from tropism.rewards import find_scorer
from tropism.rollout.sampler import Local
from tropism.signals.frozen import measure
from tropism.teacher import apart
from tropism.training import benefit
from tropism.training.checkpoint import State
from tropism.training.collate import collate
from tropism.training.learn import Job, Playing
from tropism.training.model import Policy
from tropism.training.numbers import failed
from tropism.training.packed import micro_batches
from tropism.training.scoring import offered, parts_of
from tropism.training.teachers import openings
from tropism.training.update import inseparable
from tropism.types import Batch, Credit, Rollout, Source
from tropism.watch import doctor

GROUPS = 4
"""Tasks of the probe."""


def examine(job: Job, *, trained: bool = True) -> bool:
    """Run every check; returns whether sampler and trainer count as one policy. Weights and state stay as they were.

    Args:
        trained: the model is the one that the stage will start from.
    """
    temperature = job.stage.sampling.temperature if job.stage.env else 1.0
    if isinstance(job.draw, Playing):
        job.watcher.say(check_rewards(job.stage, job.draw.source))
    rollouts = probe(job)
    if job.policy.words.chat and any(
        turn.prompt and isinstance(turn.prompt, str) for r in rollouts for turn in r.turns
    ):
        job.watcher.say("prompts are plain text, so this chat model reads them without its template")
    batch = collated(rollouts, job)
    frozen = job.policy.measuring(temperature, job.stage.train)
    exact = True
    if isinstance(job.draw, Playing):
        draw = job.draw
        line, exact = doctor.agreement(batch, frozen, job.policy.settings.compute)
        job.watcher.say(line)
        if isinstance(job.policy.sampler, Local):
            job.watcher.say(decoder(job.policy.sampler))

        if job.ahead is not None:
            job.watcher.say("ahead: a step's batch is played and scored while the step before it trains")

        def again() -> Batch:
            return collated(draw.play(State(step=-2), groups(job), 0), job)

        job.watcher.say(doctor.reaches_sampler(batch, again, frozen, lambda: perturbed(job.policy)))
    offline = job.stage.data is not None
    job.watcher.say(doctor.stop_is_trained(rollouts, batch, job.policy.words.stop_ids, offline))
    job.watcher.say(*doctor.mask_is_reply(rollouts, batch, job.policy.tokenizer.decode))
    batch = measure(batch, job.needs, policy=frozen, exact=exact, reference=job.reference, context=job.policy.context)
    if job.tutor is not None:
        batch, _ = job.tutor.measure(batch, openings(rollouts, apart=apart(job.stage.method)))
        if trained and job.tutor.teacher.must_add >= 0:  # what a later stage starts from may have left its teacher
            doctor.something_to_teach(batch, 1e-4 if job.policy.settings.compute == "float32" else 1e-2)
        if helped := benefit.check(job, trained=trained):
            job.watcher.say(helped)
    tolerance = 1e-3 if job.policy.settings.compute == "float32" else 5e-2
    most = job.stage.train.micro_tokens  # and not more: one forward pass of everything may not fit
    split = doctor.splits_agree(lambda tokens: gradient(job, batch, tokens, temperature), most, tolerance)
    job.watcher.say(f"{split}; rows are {laid_out(job.policy)}")
    return exact


def decoder(sampler: Local) -> str:
    """Which one decodes, and why not a faster one."""
    if sampler.misfit is not None:
        return f"decoder: that of transformers, for {sampler.misfit}"
    if sampler.unrecorded is None:
        return "decoder: lean, its steps recorded as CUDA graphs"
    on_gpu = sampler.model.device.type == "cuda"
    return f"decoder: lean, its steps not recorded, for {sampler.unrecorded}" if on_gpu else "decoder: lean"


def laid_out(policy: Policy) -> str:
    """How the policy reads the rows of a batch."""
    if policy.packs():
        return "packed"
    return f"padded, for {'the model takes no packed ones' if policy.settings.pack else 'model.pack is off'}"


def check_rewards(stage: Stage, source: Source) -> str:
    """Does every reward function get the columns that it names?"""
    tasks = [source.task(number) for number in range(GROUPS)]
    parts = parts_of(source)
    found = [find_scorer(given, parts) for given in stage.rewards if given not in (*parts, *offered(stage))]
    needed = {name: columns for name, _, columns in found} | dict.fromkeys(offered(stage), ())
    return doctor.gets_columns(needed, tasks)


def groups(job: Job) -> int:
    return min(GROUPS, job.stage.sampling.groups)


def probe(job: Job) -> list[Rollout]:
    """A few of the first rollouts, scored as in training; the run's own state does not move."""
    playing = job.draw
    if isinstance(playing, Playing):
        rollouts = playing.score(playing.play(State(step=-1), groups(job), 0))
    else:
        rollouts = job.draw(State())[:32]
    bad = failed(rollouts)
    if len(bad) == len(rollouts):
        failure = bad[0].failure
        assert failure is not None
        raise CheckFailed(
            f"none of {len(rollouts)} probe rollouts could be played and scored. The first one says: "
            f"{failure.where}: {failure.reason}"
        )
    return [r for r in rollouts if r.failure is None]


def collated(rollouts: Sequence[Rollout], job: Job) -> Batch:
    method = job.stage.method
    wanted = "parts" in method.needs.measured
    return collate(rollouts, codes={}, device=job.policy.device, apart=apart(method), parts=wanted)


def gradient(job: Job, batch: Batch, tokens: int, temperature: float) -> Tensor:
    """Flattened gradient of the method's objective under random credit, cut at `tokens` per micro-batch."""
    method, moving = job.stage.method, job.optimizer.parameters
    noise = torch.randn(batch.token_reward.shape, generator=torch.Generator().manual_seed(0)).to(batch.tokens.device)
    credit = Credit(noise * batch.action_mask, noise * batch.action_mask)
    weights = method.weights(batch)
    for rows in micro_batches(batch, tokens, inseparable(batch), packed=job.policy.packs()):
        width = int(batch.length[rows].max())
        piece = batch[rows].narrow(width)
        result = method.loss(job.policy.forward(piece, temperature), piece, credit[rows].narrow(width))
        (result.values * weights[rows, :width]).sum().backward()
    found = [p.grad.flatten() for p in moving if p.grad is not None]
    for parameter in moving:  # a critic's too: what is left here would be part of the first update
        parameter.grad = None
    return torch.cat(found) if found else torch.zeros(1)


@contextmanager
def perturbed(policy: Any) -> Iterator[None]:
    """Add noise to every weight matrix that learns, a tenth of its own spread; put the very same numbers back.

    An adapter's second matrix is 0 at the start, and without it the first one changes nothing: it gets a tenth.
    """
    matrices = [p for p in policy.module.parameters() if p.ndim > 1 and p.requires_grad]
    kept = [p.detach().clone() for p in matrices]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in matrices:
            p += torch.randn(p.shape, generator=generator).to(p) * (float(p.std()) or 1.0) * 0.1
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(matrices, kept, strict=True):
                p.copy_(old)
