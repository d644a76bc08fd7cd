"""Held-out play: the same tasks and the same draws every time, so that two evaluations differ by the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tropism.config import Eval, Sampling
from tropism.signals.frozen import Forward
from tropism.training.collate import collate
from tropism.training.model import Policy
from tropism.training.numbers import eval_numbers, nats
from tropism.training.ranks import Ranks
from tropism.types import Rollout, SamplingParams, Source, seed_of


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Plays `settings.tasks` tasks of a held-out source, `settings.samples` times each."""

    settings: Eval
    sampling: Sampling
    source: Source
    policy: Policy
    score: Callable[[Sequence[Rollout]], list[Rollout]]
    seed: int
    per_reply: frozenset[str] = frozenset()
    forwards: tuple[Forward, Forward] | None = None
    """Of the policy and of its reference, to say how far apart they are."""
    ranks: Ranks = field(default_factory=Ranks)

    def __call__(self, version: int) -> tuple[dict[str, float], list[Rollout]]:
        """(metrics named eval/…, the rollouts); with `greedy`, eval/greedy/… as well."""
        samples = self.settings.samples
        rollouts = self.play(self.settings.temperature, samples, version)
        numbers = eval_numbers(rollouts, samples, self.per_reply)
        if self.forwards is not None:
            batch = collate(rollouts, codes={}, device=self.policy.device)
            if len(batch):  # else nothing could be scored
                own, other = (forward(batch).logp for forward in self.forwards)
                numbers["kl/episode"] = nats(batch.replace(proximal_logp=own, reference_logp=other))
        if self.settings.greedy and self.settings.temperature > 0:
            greedy = eval_numbers(self.play(0.0, 1, version), 1, self.per_reply)
            numbers |= {f"greedy/{name}": value for name, value in greedy.items()}
        return {f"eval/{name}": value for name, value in numbers.items()}, rollouts

    def play(self, temperature: float, samples: int, version: int) -> list[Rollout]:
        tasks = [(self.source.task(n), n, k) for n in range(self.settings.tasks) for k in range(samples)]
        params = SamplingParams(
            temperature=temperature, max_tokens=self.sampling.max_tokens, seed=seed_of(self.seed, "eval")
        )
        rollouts = self.ranks.play(
            tasks,
            self.source,
            self.policy.sampler,
            self.policy.words,
            params,
            max_turns=self.sampling.max_turns,
            version=version,
        )
        return self.ranks.agree(self.score, rollouts)
