"""Teachers whose worth is known, on a task small enough to know everything: python bench/planted.py [--json]

    right      knows the answer: two nats and a half more for the right key than for the others
    noisy      one nat and a half, among noise of 0.7 at every token
    useless    that noise, and nothing else
    inverted   two nats and a half less for the right key
    leaky      half of right; it gives the answer away at once instead of working it out
    styled     right, and two nats for one word wherever words do not matter

Eight questions, answers of 16 tokens of 6 kinds. Four places are keys, each with one right token for the question, and
an answer with all of them right succeeds. One place is a leak: its word lets one answer in five succeed, whatever the
keys. The other eleven do not matter; how far they have moved from the start (total variation) is style drift. The
policy is linear in 256 random features of question and place, so what is learned at one place disturbs the others.

Prints a line for each method and teacher, mean over seeds: success at the end, the lowest of the seeds, success along
the way, trust and slope (of methods that have them), style drift, and how many of the 24 windows of five steps have a
mean below where 95 % of fives of GRPO's thirty seeds have their whole curve. `untaught` is gated without a teacher;
`salient` is gated with half of the credit by saliency.
Learning rates are chosen on another seed, one per method: the best success along the way, over all teachers. A method
without a teacher is run once for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from tropism.methods import METHODS
from tropism.teacher import teacher_of
from tropism.types import Batch, Method, Output

sys.path.append(str(Path(__file__).parent))
import curves

QUESTIONS, SIBLINGS, PLACES, WORDS, FEATURES = 8, 8, 16, 6, 256
LEAK, LEAKED, LUCK = 4, 0, 0.2
TEACHERS = ("right", "noisy", "useless", "inverted", "leaky", "styled")
COMPARED: dict[str, Method] = {
    name: METHODS[name]() for name in ("grpo", "gated", "rlsd", "rlcsd", "sdpo", "srpo", "opd")
}
COMPARED |= {"salient": METHODS["gated"](saliency=0.5), "untaught": METHODS["gated"](teacher=None)}
RATES, STEPS, SEEDS, TUNED_ON = (4.0, 8.0, 16.0, 32.0, 64.0), 120, range(5), (100,)
BASE_SEEDS = range(30)
"""Of GRPO, so that it is known where five of its own seeds lie."""


class World:
    """The task, the policy's features and what a hint does to the teacher; all of it decided by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        shape = (QUESTIONS, PLACES)
        self.phi = self.normal(*shape, FEATURES) / FEATURES**0.5
        self.keys = torch.stack([torch.randperm(PLACES - 1, generator=self.random)[:4] for _ in range(QUESTIONS)])
        self.keys += self.keys >= LEAK
        self.is_key = torch.zeros(shape, dtype=torch.bool).scatter(1, self.keys, True)
        self.right = torch.randint(WORDS, shape, generator=self.random)
        self.wrong = (self.right + torch.randint(1, WORDS, shape, generator=self.random)) % WORDS
        self.free = ~self.is_key
        self.free[:, LEAK] = False
        self.start = 0.3 * self.normal(*shape, WORDS)
        self.start += 1.3 * self.marked(self.right, self.is_key)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def marked(self, words: Tensor, where: Tensor) -> Tensor:
        """[Q, P, V]: 1 at these words in these places."""
        return torch.nn.functional.one_hot(words, WORDS) * where[..., None].to(torch.get_default_dtype())

    def logp(self, weights: Tensor) -> Tensor:
        """[Q, P, V] of the policy with these weights."""
        return (self.start + self.phi @ weights).log_softmax(-1)

    def hints(self, teacher: str) -> tuple[Tensor, Tensor]:
        """What the right hint and the wrong one add to a teacher's logits [Q, P, V]; noise is new at every visit."""
        nats = {"right": 2.5, "noisy": 1.5, "useless": 0.0, "inverted": -2.5, "leaky": 1.25, "styled": 2.5}[teacher]
        hints = [nats * self.marked(words, self.is_key) for words in (self.right, self.wrong)]
        if teacher in ("noisy", "useless"):
            hints = [hint + 0.7 * self.normal(*hint.shape) for hint in hints]
        if teacher == "leaky":
            hints[0][:, LEAK, LEAKED] += 3
        if teacher == "styled":
            hints = [hint + 2 * self.marked(torch.ones_like(self.right), self.free) for hint in hints]
        return hints[0], hints[1]

    def play(self, weights: Tensor) -> Batch:
        """Eight answers to each question."""
        question = torch.arange(QUESTIONS).repeat_interleave(SIBLINGS)
        logp = self.logp(weights)
        said = torch.multinomial(logp[question].exp().flatten(0, 1), 1, generator=self.random).reshape(-1, PLACES)
        good = (said == self.right[question]) | ~self.is_key[question]
        luck = torch.rand(len(said), generator=self.random) < LUCK
        success = good.all(1) | ((said[:, LEAK] == LEAKED) & luck)
        mask = torch.ones(len(said), PLACES + 1, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
        reward = success.to(logp.dtype)
        batch = Batch(
            tokens=torch.cat([question[:, None], said], 1),
            length=question * 0 + PLACES + 1,
            action_mask=mask,
            token_reward=torch.nn.functional.pad(reward[:, None], (PLACES, 0)),
            turn=mask.long() - 1,
            reward=reward,
            success=success,
            truncated=~mask[:, 1],
            group=question,
            episode=torch.arange(len(said)),
            role=question * 0,
            domain=question * 0,
            topk_ids=torch.arange(WORDS).expand(*mask.shape, WORDS),
        )
        own = self.spoken(logp, batch)
        return batch.replace(
            behavior_logp=own.logp,
            proximal_logp=own.logp,
            proximal_entropy=own.entropy,
            proximal_topk_logp=own.topk_logp,
        )

    def spoken(self, logp: Tensor, batch: Batch) -> Output:
        """What a distribution [Q, P, V] says of a batch."""
        padded = torch.nn.functional.pad(logp[batch.group], (0, 0, 1, 0))
        chosen = padded.gather(-1, batch.tokens.clamp(max=WORDS - 1)[..., None])[..., 0]
        return Output(logp=chosen, entropy=-(padded.exp() * padded).sum(-1), topk_logp=padded)

    def taught(self, batch: Batch, teacher: str, weights: Tensor, reference: Tensor) -> Batch:
        """The batch with what a teacher of these weights says of it after either hint."""
        base = self.logp(weights)
        right, wrong = (self.spoken((base + hint).log_softmax(-1), batch) for hint in self.hints(teacher))
        return batch.replace(
            teacher_logp=right.logp,
            counter_logp=wrong.logp,
            teacher_entropy=right.entropy * batch.action_mask,
            teacher_topk_logp=right.topk_logp,
            has_teacher=torch.ones_like(batch.success),
            reference_logp=self.spoken(self.logp(reference), batch).logp,
        )

    def chance(self, weights: Tensor) -> float:
        """Exact probability of success, mean over questions."""
        p = self.logp(weights).exp()
        keys = p.gather(-1, self.right[..., None])[..., 0].where(self.is_key, 1.0).prod(1)
        leak = LUCK * p[:, LEAK, LEAKED]
        return float((keys + leak - keys * leak).mean())

    def drift(self, weights: Tensor) -> float:
        """Total variation between the policy and its start, mean over the places that do not matter."""
        change = self.logp(weights).exp() - self.start.softmax(-1)
        return float(change.abs().sum(-1)[self.free].mean() / 2)


@dataclass(frozen=True)
class Run:
    """What came of one run."""

    curve: list[float]
    """Success after each step."""
    trust: float | None
    """Mean over the second half."""
    most_trust: float | None
    slope: float | None
    """At the end."""
    drift: float

    @property
    def success(self) -> float:
        """At the end."""
        return self.curve[-1]

    @property
    def area(self) -> float:
        """Mean over all steps."""
        return sum(self.curve) / len(self.curve)


def train(method: Method, teacher: str, *, seed: int, rate: float, steps: int = STEPS) -> Run:
    """Plain gradient ascent, one update per batch of 64 answers."""
    world, weights = World(seed), torch.zeros(FEATURES, WORDS)
    memory: Any = {}
    settings = teacher_of(method)
    who, copy, curve, told = settings.who if settings else "live", weights, [], []
    for step in range(steps):
        batch = world.play(weights).replace(step=step, steps=steps, memory=memory)
        source = {"live": weights, "frozen": torch.zeros_like(weights)}.get(str(who), copy)
        batch = world.taught(batch, teacher, source, torch.zeros_like(weights))
        credit = method.credit(batch)
        told.append(credit.metrics)
        weights = weights.requires_grad_()
        loss = method.loss(world.spoken(world.logp(weights), batch), batch, credit)
        (slope,) = torch.autograd.grad((loss.values * method.weights(batch)).sum() * PLACES, weights)
        weights = (weights - rate * slope).detach()
        if hasattr(method, "remember"):
            memory = method.remember(batch)
        if settings and who == "ema":
            copy = (1 - settings.rate) * copy + settings.rate * weights
        elif settings and who == "synced" and (step + 1) % settings.every == 0:
            copy = weights
        curve.append(world.chance(weights))
    trust = [metrics["gate/trust"] for metrics in told if "gate/trust" in metrics]
    return Run(
        curve=curve,
        trust=sum(trust[steps // 2 :]) / (steps - steps // 2) if trust else None,
        most_trust=max(trust) if trust else None,
        slope=told[-1].get("gate/slope"),
        drift=world.drift(weights),
    )


def best_rate(method: Method) -> float:
    """The rate with the highest area under the learning curve, mean over teachers."""
    teachers = TEACHERS if teacher_of(method) else TEACHERS[:1]
    areas = {
        rate: sum(train(method, teacher, seed=seed, rate=rate).area for teacher in teachers for seed in TUNED_ON)
        for rate in RATES
    }
    return max(areas, key=lambda rate: areas[rate])


def lines(progress: TextIO) -> list[dict[str, Any]]:
    """One for each method and teacher, told as soon as it is known."""
    print("".join(f"{column:>11}" for column in COLUMNS), file=progress)
    found: list[dict[str, Any]] = []
    base: list[curves.Line] = []
    for name, method in COMPARED.items():
        rate = best_rate(method)
        for teacher in TEACHERS if teacher_of(method) else ("any",):
            reads = teacher if teacher != "any" else "right"
            runs = [train(method, reads, seed=seed, rate=rate) for seed in (SEEDS if base else BASE_SEEDS)]
            told = [{"success": run.curve} for run in runs]
            base = base or told
            runs, told = runs[: len(SEEDS)], told[: len(SEEDS)]
            line: dict[str, Any] = {"method": name, "teacher": teacher, "rate": rate}
            line |= {"below": len(curves.below(told, base))}
            line |= {"lowest": min(run.success for run in runs), "collapsed": sum(run.success < 0.5 for run in runs)}
            for key in ("success", "area", "trust", "most_trust", "slope", "drift"):
                values = [value for run in runs if (value := getattr(run, key)) is not None]
                line[key] = sum(values) / len(values) if values else None
            found.append(line)
            print(said(line), file=progress, flush=True)
    return found


COLUMNS = ("method", "teacher", "rate", "success", "lowest", "area", "trust", "most_trust", "slope", "drift", "below")


def said(line: dict[str, Any]) -> str:
    cells = [line[column] for column in COLUMNS]
    return "".join(
        f"{'' if cell is None else cell if isinstance(cell, str | int) else f'{cell:.2f}':>11}" for cell in cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the table to stderr, a JSON list to stdout")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if wanted.json:
        print(json.dumps(lines(sys.stderr), indent=1))
    else:
        lines(sys.stdout)


if __name__ == "__main__":
    main()
