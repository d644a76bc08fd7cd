"""The loop: draw, measure, credit, update, remember, record. Online it plays; offline `fit.py` reads rows instead."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tropism.config import Stage
from tropism.errors import ConfigError, GuardStopped
from tropism.record import Run, Watcher
from tropism.signals.frozen import Forward, measure
from tropism.signals.teacher import Tutor
from tropism.teacher import apart, likeliest
from tropism.training import checkpoint
from tropism.training.checkpoint import State
from tropism.training.collate import collate
from tropism.training.model import Policy
from tropism.training.numbers import ROUNDED, nats, rollout_numbers, sampler_gap
from tropism.training.optim import AdamW, scheduled
from tropism.training.ranks import Ranks
from tropism.training.rows import record_rows
from tropism.training.teachers import heard, openings
from tropism.training.update import update
from tropism.types import LEFT_OUT, Batch, Failure, Needs, Rollout, Sampler, SamplingParams, Source, seed_of
from tropism.watch import guard

if TYPE_CHECKING:
    from tropism.training.ahead import Ahead


class Draw(Protocol):
    """Where a step's rollouts come from. It moves `state.cursor`, and holds nothing that resume would need."""

    def __call__(self, state: State) -> list[Rollout]: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage, ready to run."""

    stage: Stage
    policy: Policy
    optimizer: AdamW
    draw: Draw
    run: Run
    watcher: Watcher
    seed: int
    evaluation: Callable[[int], tuple[dict[str, float], list[Rollout]]] | None = None
    """Steps done -> held-out metrics, and what was played for them."""
    reference: Forward | None = None
    tutor: Tutor | None = None
    ahead: Ahead | None = None
    """Plays the next batch while this one trains."""
    exact: bool = True
    """Sampler and trainer agree, so that proximal log-probs need no pass of their own."""
    per_reply: frozenset[str] = frozenset()
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def needs(self) -> Needs:
        """Of the method, and what a budget takes."""
        needs = self.stage.method.needs
        asked: Needs = needs
        if self.stage.train.kl_budget is not None:
            asked = replace(needs, measured=needs.measured | {"reference_logp", "proximal_logp"})
        return asked


def learn(job: Job, state: State) -> None:
    """Train to the last step, from wherever `state` stands."""
    train = job.stage.train
    if state.step == 0:
        evaluate(job, state)
    while state.step < train.steps:
        with clocked() as times:
            metrics, rollouts = one_step(job, state, times)
        job.run.log(state.step, metrics | {f"time/{name}": seconds for name, seconds in times.items()})
        job.watcher.step(state.step, metrics | {"time/step": times["step"]}, rollouts)
        last = state.step == train.steps
        if job.stage.eval.every and (state.step % job.stage.eval.every == 0 or last):
            evaluate(job, state)
        if last or (train.save_every and state.step % train.save_every == 0):
            save(job, state)
        try:
            guard.stalled(state.quiet, train.patience, rollouts)
            guard.spent(metrics.get("kl/episode", 0.0), train.kl_budget)
        except GuardStopped:
            save(job, state)
            raise


def one_step(job: Job, state: State, times: dict[str, float]) -> tuple[dict[str, float], list[Rollout]]:
    """Draw, measure, credit, update and remember; `state` then stands after the step."""
    method, train, policy = job.stage.method, job.stage.train, job.policy
    temperature = job.stage.sampling.temperature if job.stage.env else 1.0
    with timed(times, "draw"):
        rollouts = drawn(job, state)
    if job.ahead is not None and state.step + 1 < train.steps:
        job.ahead.begin(state)
    batch = collate(
        rollouts,
        codes=state.domains,
        step=state.step,
        steps=train.steps,
        memory=state.memory,
        device=policy.device,
        apart=apart(method),
        parts="parts" in method.needs.measured,
    )
    numbers = rollout_numbers(rollouts, job.per_reply)
    if job.stage.success is None:
        numbers.pop("success", None)
    if not job.stage.env:  # data earns nothing
        numbers = {"failures": numbers["failures"]}
    ranks = job.ranks
    dealt = ranks.deal(batch)
    with timed(times, "measure"):
        own, taught = measured(job, state, rollouts, batch, dealt)
        numbers |= taught
        batch = ranks.whole(batch, own, dealt)
        numbers |= sampler_gap(batch)
        if batch.reference_logp is not None and job.stage.env:
            numbers["kl/episode"] = nats(batch)
        credit = method.credit(batch)
    if job.tutor is not None:
        heard(state, taught | credit.metrics, train.patience, job.watcher.say)
    with timed(times, "update"):
        per_step = (train.epochs * train.mini_batches) if job.stage.env else 1
        metrics, weights = update(
            own,
            credit[dealt[ranks.rank]].narrow(own.tokens.shape[1]) if ranks.size > 1 else credit,
            method,
            lambda rows: policy.forward(rows, temperature),
            job.optimizer,
            lambda k: scheduled(train, state.step * per_step + k, train.steps * per_step),
            epochs=train.epochs if job.stage.env else 1,
            mini_batches=train.mini_batches if job.stage.env else 1,
            micro_tokens=train.micro_tokens,
            packed=policy.packs(),
            skip=train.skip,
            seed=seed_of(job.seed, "update", state.step),
            ranks=ranks,
            among=batch.group,
        )
    if hasattr(method, "remember"):
        state.memory = method.remember(batch)
    if job.tutor is not None:
        job.tutor.follow(policy.module, state.step, moved=bool(metrics["updates"]))
    direct = not method.needs.sampling or "topk_logp" in method.needs.live  # such a loss has no credit to give
    signal = bool(credit.advantage.any()) or direct
    state.quiet = 0 if signal and metrics["updates"] else state.quiet + 1
    state.updates += int(metrics["updates"])
    state.tokens += int(batch.length.sum())
    if job.ahead is not None:
        with timed(times, "draw"):
            job.ahead.end(state)
    state.step += 1
    if job.stage.env and (state.step % train.record_every == 0 or state.step in (1, train.steps)):
        with timed(times, "record"):
            weights = ranks.rows(weights, dealt, batch.tokens.shape[1])
            job.run.save_rollouts(
                state.step, record_rows(rollouts, batch, credit.advantage, weights, apart=apart(method))
            )
    return numbers | metrics | credit.metrics | {"num_tokens": float(state.tokens)}, rollouts


def measured(
    job: Job, state: State, rollouts: Sequence[Rollout], batch: Batch, dealt: Sequence[Tensor]
) -> tuple[Batch, dict[str, float]]:
    """(this process's rows with all that the method asks of them, how its teacher fared)"""
    method, train, ranks, mine = job.stage.method, job.stage.train, job.ranks, dealt[job.ranks.rank]
    own = measure(
        ranks.share(batch, dealt),
        job.needs,
        policy=job.policy.measuring(job.stage.sampling.temperature if job.stage.env else 1.0, train),
        exact=job.exact,
        reference=job.reference,
        before=batch[(mine - 1) % len(batch)] if "mismatch" in job.needs.measured else None,
        context=job.policy.context,
    )
    if job.tutor is None:
        return own, {}
    begun = openings(rollouts, apart=apart(method))
    own, sums = job.tutor.measure(own, [begun[n] for n in mine.tolist()])
    return own, ranks.means(sums)


def drawn(job: Job, state: State) -> list[Rollout]:
    """A step's rollouts. If too many failed, they are recorded and the run stops where it could draw them again; those
    that were played ahead are drawn again at once."""
    cursor, waiting = state.waiting or (state.cursor, None)
    rollouts, state.waiting = job.draw(state) if waiting is None else waiting, None
    try:
        guard.failing(rollouts, job.stage.train.failure_limit)
    except GuardStopped:
        if waiting is not None:  # the checkpoint of this step, if there is one, holds the same
            state.cursor = cursor
            return drawn(job, state)
        job.run.save_rollouts(state.step + 1, record_rows(rollouts))
        state.cursor = cursor
        if state.step:
            save(job, state)
        raise
    return rollouts


@dataclass(frozen=True, kw_only=True)
class Playing:
    """Online: draw tasks, play them, score them; draw again for groups without contrast if the method needs it."""

    stage: Stage
    source: Source
    policy: Policy
    score: Callable[[Sequence[Rollout]], list[Rollout]]
    seed: int
    say: Callable[[str], None]
    """Told when `max_draws` is spent before the batch is full."""
    sampler: Sampler | None = None
    """None: the policy's own."""
    behind: int = 0
    """How many steps ago the sampler's weights were the policy's."""
    ranks: Ranks = field(default_factory=Ranks)

    def __call__(self, state: State) -> list[Rollout]:
        sampling, contrast = self.stage.sampling, "contrast" in self.stage.method.needs.sampling
        kept: list[Rollout] = []
        missing = sampling.groups
        for draw in range(sampling.max_draws if contrast else 1):
            rollouts = self.ranks.agree(self.score, self.play(state, missing, draw))
            if contrast:
                rollouts, full = without_contrast(rollouts, sampling.contrast_on)
                missing -= full
            kept += rollouts
            if not contrast or missing <= 0:
                return kept
        self.say(
            f"step {state.step + 1}: siblings differ in {sampling.groups - missing} of {sampling.groups} groups, and "
            f"sampling.max_draws = {sampling.max_draws} is spent"
        )
        return kept

    def play(self, state: State, groups: int, draw: int) -> list[Rollout]:
        sampling = self.stage.sampling
        numbers = range(state.cursor, state.cursor + groups)
        state.cursor += groups
        tasks = [(self.source.task(n), n, sibling) for n in numbers for sibling in range(sampling.group_size)]
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=seed_of(self.seed, "play", state.step, draw),
            top_k=likeliest(self.stage.method),
        )
        return self.ranks.play(
            tasks,
            self.source,
            self.sampler or self.policy.sampler,
            self.policy.words,
            params,
            max_turns=sampling.max_turns,
            version=state.step - self.behind,
        )


def without_contrast(rollouts: Sequence[Rollout], on: str) -> tuple[list[Rollout], int]:
    """Mark the rollouts of groups that are equal throughout; returns them all, and how many groups differ."""
    seen: dict[tuple[int, int], set[Any]] = {}
    for r in rollouts:
        values = seen.setdefault((r.group, r.task.seat), set())
        if r.failure is None:
            values.add(round(getattr(r, on), ROUNDED))
    reason = Failure(LEFT_OUT, f"no_contrast: all siblings have the same {on}")
    equal = {key for key, values in seen.items() if len(values) < 2}
    marked = [
        replace(r, failure=reason) if (r.group, r.task.seat) in equal and r.failure is None else r for r in rollouts
    ]
    return marked, len({group for group, _ in seen} - {group for group, _ in equal})


def evaluate(job: Job, state: State) -> None:
    """Play the held-out tasks; keep the best checkpoint by a held-out metric."""
    if job.evaluation is None:
        return
    times: dict[str, float] = {}
    with timed(times, "eval"):
        metrics, rollouts = job.evaluation(state.step)
    if job.stage.success is None:  # nobody said what a success is, so none was counted
        counts = ("success", f"pass@{job.stage.eval.samples}")
        hidden = {f"eval/{way}{name}" for way in ("", "greedy/") for name in counts}
        metrics = {name: value for name, value in metrics.items() if name not in hidden}
    job.run.log(state.step, metrics | {"time/eval": times["eval"]})
    if rollouts:
        job.run.save_rollouts(state.step, record_rows(rollouts), kind="eval")
    job.watcher.step(state.step, metrics, rollouts)
    name = job.stage.eval.best or "eval/reward"
    if (
        state.best is None
        and name not in metrics
        and metrics.keys() & {"eval/reward", "eval/loss"}
        and job.stage.eval.best
    ):
        near = difflib.get_close_matches(name, metrics, 1) or list(metrics)
        raise ConfigError(f"eval.best is {name!r}, but there is no such metric. Did you mean {' or '.join(near)}?")
    value = metrics.get(name)
    if value is not None and not math.isnan(value) and (state.best is None or value > state.best):
        state.best, state.best_step = value, state.step
        job.run.note("best", {"metric": name, "value": value, "step": state.step})
        if state.step:
            save(job, state)


def save(job: Job, state: State) -> None:
    if job.ranks.first:
        checkpoint.save(job.run.checkpoints_dir, job.policy, job.optimizer, state, job.tutor)
        checkpoint.prune(job.run.checkpoints_dir, job.stage.train.keep, state.best_step)
    job.ranks.wait()


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    times: dict[str, float] = {}
    with timed(times, "step"):
        yield times
