"""What any method may ask of the loop, by private methods of a few lines: no split of the sum changes a gradient.

Each of them trains on two rollout batches, steps 0 and 7 of 10, with two mini-batches each, as one process and as two
(`torch.distributed`, gloo). The oracle is the objective written down: (values * weights).sum() over a mini-batch, in
one piece, with the credit of the whole rollout batch. Refill of groups without contrast: training/test_refill.py.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toy import V, forward, table, toy_batch
from tropism.maths.divergence import reverse_kl
from tropism.maths.reduce import first_row, sequence_mean, spread, sum_by, token_mean
from tropism.maths.returns import gae
from tropism.maths.surrogate import clipped_surrogate, sequence_log_ratio, token_log_ratio
from tropism.methods import METHODS
from tropism.methods.grpo import GRPO
from tropism.training.ranks import Ranks
from tropism.training.update import update
from tropism.types import FLAT, Batch, Credit, Method, Needs, Output, TokenLoss

# --------------------------------------------------------------------------------------------------------- the demands


@dataclass(frozen=True)
class Critic(GRPO):
    """A value head with its own target. Schulman et al. 2017, arXiv:1707.06347, eq. 9."""

    needs = Needs(measured=frozenset({"proximal_logp", "value", "last_value"}), live=frozenset({"value"}))

    def credit(self, batch: Batch) -> Credit:
        facts = (batch.token_reward, batch.value, batch.action_mask, batch.episode, batch.turn)
        return Credit(*gae(*facts, batch.last_value, batch.truncated, discount=0.9, trace=0.8))

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        policy = super().loss(out, batch, credit)
        return TokenLoss(policy.values + 0.5 * (out.value - credit.target).square(), policy.metrics)


@dataclass(frozen=True)
class Schedule(GRPO):
    """Weights that depend on the step."""

    def weights(self, batch: Batch) -> Tensor:
        done = batch.step / batch.steps
        return (1 - done) * token_mean(batch.action_mask) + done * sequence_mean(batch.action_mask, batch.episode)


@dataclass(frozen=True)
class Remembering(GRPO):
    """A running mean of rewards as the baseline of all groups."""

    def credit(self, batch: Batch) -> Credit:
        return Credit(spread(batch.reward - batch.memory.get("mean", batch.reward.new_zeros(())), batch.action_mask))

    def remember(self, batch: Batch) -> Mapping[str, Tensor]:
        mean = batch.reward[first_row(batch.episode)].mean()
        return {"mean": 0.9 * batch.memory.get("mean", mean) + 0.1 * mean}


@dataclass(frozen=True)
class Routed(GRPO):
    """Failures with a teacher are distilled, the rest is reinforced, over one denominator that normalises weights."""

    def distilled(self, batch: Batch) -> Tensor:
        return (batch.has_teacher & (batch.reward < 0.4))[:, None] & batch.action_mask

    def weights(self, batch: Batch) -> Tensor:
        sure = torch.where(self.distilled(batch), (-batch.teacher_entropy).exp(), 1.0) * batch.action_mask
        return sure / sure.sum()

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        distill = (out.logp - batch.teacher_logp).square()
        return TokenLoss(torch.where(self.distilled(batch), distill, super().loss(out, batch, credit).values))


@dataclass(frozen=True)
class TopK(GRPO):
    """Student and teacher compared on K tokens; a place of K that is unused counts nothing."""

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        return token_mean(batch.action_mask & batch.has_teacher[:, None])

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        used = batch.topk_ids >= 0
        student, teacher = (logp.masked_fill(~used, -30.0) for logp in (out.topk_logp, batch.teacher_topk_logp))
        return TokenLoss(reverse_kl(student, teacher))


@dataclass(frozen=True)
class Quantile(GRPO):
    """Only the least certain two fifths of a mini-batch's tokens count. Wang et al. 2025, arXiv:2506.01939."""

    def weights(self, batch: Batch) -> Tensor:
        limit = batch.proximal_entropy[batch.action_mask].quantile(0.6)
        return token_mean(batch.action_mask & (batch.proximal_entropy >= limit))


@dataclass(frozen=True)
class Sequence(GRPO):
    """A ratio of whole episodes, over their rows. Zheng et al. 2025, arXiv:2507.18071."""

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        ratio = sequence_log_ratio(out.logp, batch.proximal_logp, batch.action_mask, batch.episode)
        return TokenLoss(clipped_surrogate(ratio, credit.advantage, low=0.2, high=0.2)[0])


@dataclass(frozen=True)
class Pair(GRPO):
    """A loss of pairs: the chosen row stands first in its group. Rafailov et al. 2023, arXiv:2305.18290, eq. 7."""

    def credit(self, batch: Batch) -> Credit:
        return Credit(torch.zeros_like(batch.token_reward))

    def weights(self, batch: Batch) -> Tensor:
        last = batch.action_mask & (batch.action_mask.flip(1).cumsum(1).flip(1) == 1)
        return last * first_row(batch.group)[:, None] / len(batch.group.unique())

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        gain = token_log_ratio(out.logp, batch.reference_logp).sum(1)
        margin = sum_by(torch.where(batch.success, gain, -gain), batch.group)
        return TokenLoss(-torch.nn.functional.logsigmoid(margin)[:, None].expand_as(out.logp))


DEMANDS: dict[str, Method] = {name: method() for name, method in METHODS.items()} | {
    "constrained": METHODS["constrained"](at_least={"second": 1.0}, clip_low=0.1),
    "grpo with kl": GRPO(kl=0.3, average="token"),
    "a critic with its target": Critic(),
    "weights that depend on the step": Schedule(),
    "memory": Remembering(),
    "routing with one denominator": Routed(),
    "top-K of student and teacher": TopK(),
    "a quantile of the batch": Quantile(),
    "a ratio of episodes": Sequence(),
    "a loss of pairs": Pair(),
}
STEPS = (0, 7)
MINI_BATCHES, MICRO_TOKENS = 2, 10

# ---------------------------------------------------------------------------------------------------------- the batches


def joined(*parts: Batch) -> Batch:
    """One batch of these, episodes and groups renumbered, padded to one T."""
    width = max(part.tokens.shape[1] for part in parts)
    columns: dict[str, list[Tensor]] = {}
    for part, batch in enumerate(parts):
        for name, value in batch.tensors():
            missing = width - value.shape[1] if value.ndim > 1 and name not in FLAT else 0
            if missing:
                fill = -1 if name == "turn" else 0
                value = torch.cat([value, torch.full((len(value), missing, *value.shape[2:]), fill).to(value)], 1)
            columns.setdefault(name, []).append(value + 100 * part if name in ("episode", "group") else value)
    return parts[0].replace(**{name: torch.cat(values) for name, values in columns.items()})


def online(step: int) -> Batch:
    """20 rows of 16 episodes in 8 unequal groups, in no order; four episodes have two rows."""
    _, first = toy_batch()
    second = first.narrow(int(first.length.max())).replace(reward=first.reward.flip(0) * 0.7)
    second = second.replace(tokens=(V - 1 - second.tokens), reward=sum_by(second.reward, second.episode))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(step))
    return joined(first, second)[order].replace(step=step, steps=10)


def pairs(step: int) -> Batch:
    """12 pairs of rows, the chosen one first."""
    rows = joined(online(step), online(step + 1))[:24].replace(behavior_logp=None, proximal_logp=None, step=step)
    number = torch.arange(24)
    return rows.replace(episode=number, group=number // 2, success=number % 2 == 0)


def in_pairs(method: Method) -> bool:
    return isinstance(method, Pair) or bool(method.needs.data)


def batch_of(method: Method, step: int) -> Batch:
    """With every row's number in `mismatch`, so that a micro-batch tells where it comes from."""
    batch = pairs(step) if in_pairs(method) else online(step)
    return batch.replace(mismatch=torch.arange(len(batch), dtype=torch.float64))


def dealt(batch: Batch, rank: int, size: int) -> Batch:
    """This rank's groups, numbered from 0 as by a rank that knows of no other, and no wider than they must be."""
    groups = batch.group.unique()
    rows = batch[torch.isin(batch.group, groups[rank::size])]
    rows = rows.replace(**{name: getattr(rows, name).unique(return_inverse=True)[1] for name in ("episode", "group")})
    return rows.narrow(int(rows.length.max()))


class Descent:
    """An optimizer that writes down the gradient of every step, then takes it."""

    def __init__(self, weights: Tensor) -> None:
        self.parameters = [weights]
        self.seen: list[Tensor] = []

    def step(self, rate: float) -> dict[str, float]:
        (weights,) = self.parameters
        self.seen.append(weights.grad.clone())
        with torch.no_grad():
            weights -= rate * weights.grad
        weights.grad = None
        return {"learning_rate": rate}


def trained(method: Method, rank: int = 0, size: int = 1) -> dict:
    """What the loop does with a method: gradients of all optimizer steps, the rows of their micro-batches, metrics."""
    weights, ranks, memory = table(), Ranks(), {}
    optimizer, parts, told = Descent(weights), [], []

    def seen(piece: Batch) -> Output:
        parts.append((len(optimizer.seen), piece.mismatch.long().tolist()))
        return forward(weights, piece)

    for step in STEPS:
        batch = dealt(batch_of(method, step), rank, size).replace(memory=memory)
        whole, mine = ranks.gather(batch)
        credit = method.credit(whole)[mine].narrow(batch.tokens.shape[1])
        settings = {"mini_batches": MINI_BATCHES, "micro_tokens": MICRO_TOKENS, "seed": step, "ranks": ranks}
        metrics, _ = update(batch, credit, method, seen, optimizer, lambda k: 0.3 / (k + 1), **settings)
        told.append(metrics)
        if hasattr(method, "remember"):
            memory = method.remember(whole)
    return {"gradients": optimizer.seen, "parts": parts, "metrics": told, "memory": memory}


def expected(method: Method, mini_batches: list[list[int]]) -> tuple[list[Tensor], dict]:
    """The same optimizer steps, each in one piece and one process, and the memory at the end."""
    weights, memory, gradients = table(), {}, []
    for n, step in enumerate(STEPS):
        batch = batch_of(method, step).replace(memory=memory)
        credit = method.credit(batch)
        for k, rows in enumerate(mini_batches[n * MINI_BATCHES : (n + 1) * MINI_BATCHES]):
            mini = batch[sorted(rows)]
            loss = method.loss(forward(weights, mini), mini, credit[sorted(rows)])
            (found,) = torch.autograd.grad((loss.values * method.weights(mini)).sum(), weights)
            gradients.append(found)
            with torch.no_grad():
                weights -= 0.3 / (k + 1) * found
        if hasattr(method, "remember"):
            memory = method.remember(batch)
    return gradients, memory


# ------------------------------------------------------------------------------------------------------------ the proof


def main(rank: int, folder: str) -> None:
    """One of two processes: train with every method, and leave what came of it in the folder."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: trained(method, rank, 2) for name, method in DEMANDS.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def mini_batches(*ranks: dict) -> list[list[int]]:
    """Rows of every optimizer step, over all ranks."""
    count = len(ranks[0]["gradients"])
    return [[n for rank in ranks for at, rows in rank["parts"] if at == step for n in rows] for step in range(count)]


every = pytest.mark.parametrize("name", DEMANDS)
close = torch.testing.assert_close


@every
def test_the_gradient_of_every_step_is_that_of_its_mini_batch_in_one_piece(name):
    found = trained(DEMANDS[name])
    gradients, memory = expected(DEMANDS[name], mini_batches(found))
    assert len(gradients) == 4 and min(g.abs().max() for g in gradients) > 1e-5
    close(found["gradients"], gradients, rtol=0, atol=1e-10)
    close(found["memory"], memory)


@every
def test_two_processes_make_the_gradient_of_one(name, two_ranks):
    ranks = [rank[name] for rank in two_ranks]
    gradients, memory = expected(DEMANDS[name], mini_batches(*ranks))
    for rank in ranks:
        close(rank["gradients"], gradients, rtol=0, atol=1e-10)
        close(rank["memory"], memory, rtol=0, atol=1e-12)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


@every
@pytest.mark.parametrize("size", [1, 2])
def test_mini_batches_are_the_batch_and_no_split_parts_what_belongs_together(name, size, two_ranks):
    method = DEMANDS[name]
    ranks = [rank[name] for rank in two_ranks] if size == 2 else [trained(method)]
    for n, step in enumerate(STEPS):
        batch = batch_of(method, step)
        whole = sorted(row for k in range(2) for row in mini_batches(*ranks)[2 * n + k])
        assert whole == list(range(len(batch)))
        apart = torch.arange(len(batch)) if method.needs.by_row else batch.episode
        together = batch.group if in_pairs(method) else apart
        for rank in ranks:
            pieces = [rows for at, rows in rank["parts"] if at // 2 == n]
            assert all(sum(at == 2 * n + k for at, _ in rank["parts"]) >= 3 for k in range(2))
            units = [set(together[rows].tolist()) for rows in pieces]
            assert sum(map(len, units)) == len(set.union(*units))
            assert all(rows == sorted(rows) for rows in pieces)
        groups = [{batch.group[row].item() for at, rows in r["parts"] if at // 2 == n for row in rows} for r in ranks]
        assert sum(map(len, groups)) == len(batch.group.unique())


def test_two_batches_differ_and_so_do_the_demands():
    """Otherwise the tests above would compare one thing with itself."""
    seen = [trained(method)["gradients"] for method in DEMANDS.values()]
    for n, one in enumerate(seen):
        assert not torch.allclose(one[0], one[2])
        assert all(not torch.allclose(one[1], other[1], rtol=1e-4) for other in seen[:n])


def test_a_private_method_is_short():
    for cls in (Critic, Schedule, Remembering, Routed, TopK, Quantile, Sequence, Pair):
        code = [line for line in inspect.getsource(cls).splitlines() if line.strip() and '"""' not in line]
        assert len(code) <= 15, cls
    assert {f.name for f in fields(Batch)} >= {"memory", "step", "mismatch"}


if __name__ == "__main__":
    main(int(sys.argv[1]), str(Path(sys.argv[2])))
