"""Groups whose siblings all earn the same are recorded, left out, and replaced by further tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from tropism.config import Model, Named, Sampling, Stage
from tropism.methods.grpo import GRPO
from tropism.rewards.score import score
from tropism.training.checkpoint import State
from tropism.training.collate import collate
from tropism.training.learn import Playing
from tropism.training.model import load_policy
from tropism.training.numbers import rollout_numbers
from tropism.types import Ask, Needs, Rollout, Task


@dataclass(frozen=True)
class Contrast(GRPO):
    """DAPO's dynamic sampling. Yu et al. 2025, arXiv:2503.14476, eq. 11."""

    needs = Needs(measured=frozenset({"proximal_logp"}), sampling=frozenset({"siblings", "contrast"}))


class Guess:
    """Siblings of an even task all earn the same, whatever they say; those of an odd one never do."""

    def __init__(self, task: Task, sibling: int) -> None:
        self.number, self.sibling, self.heard = task.level, sibling, False

    def ask(self) -> Ask | None:
        return None if self.heard else Ask(0, "?")

    def tell(self, reply: str) -> None:
        self.heard = True

    def score(self, seat: int) -> Mapping[str, float]:
        return {"luck": float(self.heard and self.number % 2 * self.sibling)}

    def feedback(self, seat: int) -> str | None:
        return None


class Tasks:
    def task(self, number: int) -> Task:
        return Task(env="guess", level=number)

    def open(self, task: Task, sibling: int) -> Guess:
        return Guess(task, sibling)


def drawn(max_draws: int) -> tuple[list[Rollout], State, list[str]]:
    """One draw of three groups of two for a method that needs contrast."""
    sampling = Sampling(groups=3, group_size=2, max_tokens=2, max_draws=max_draws)
    stage = Stage(name="refill", method=Contrast(), env=Named(name="guess"), sampling=sampling)
    said: list[str] = []
    scored = partial(score, scorers={}, weights={"luck": 1.0})
    policy = load_policy(Model(shape={"num_hidden_layers": 1}, device="cpu"))
    playing = Playing(stage=stage, source=Tasks(), policy=policy, score=scored, seed=0, say=said.append)
    state = State()
    return playing(state), state, said


def test_groups_that_cannot_teach_are_left_out_and_replaced():
    rollouts, state, said = drawn(max_draws=4)
    kept = [r for r in rollouts if r.failure is None]
    # tasks 0 1 2, then two more for 0 and 2: 3 4, then one for 4: 5
    assert sorted({r.task.level for r in kept}) == [1, 3, 5] and state.cursor == 6 and said == []
    left = [r for r in rollouts if r.failure is not None]
    assert {r.task.level for r in left} == {0, 2, 4} and all("no_contrast" in r.failure.reason for r in left)
    batch = collate(rollouts, codes={})
    assert (
        len(batch) == 6 and Contrast().credit(batch.replace(proximal_logp=batch.behavior_logp)).advantage.any(1).all()
    )
    assert len(batch.group.unique()) == 3 and rollout_numbers(rollouts)["failures"] == 0


def test_refill_ends_when_its_draws_are_spent_and_says_so():
    rollouts, state, (line,) = drawn(max_draws=1)
    assert sorted({r.task.level for r in rollouts if r.failure is None}) == [1] and state.cursor == 3
    assert "1 of 3 groups" in line and "sampling.max_draws = 1" in line
