"""A policy small enough to differentiate by hand, a batch with every awkward shape, and two tasks learned in seconds.

The policy is a table: row v holds the logits of the token that follows v, and the value of having read v last.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tropism.types import Batch, Method, Output

V = 6

EPISODE = (4, 0, 2, 0, 5, 1, 3, 7, 6, 5)
GROUP = (1, 0, 0, 0, 2, 0, 1, 3, 3, 2)
TURNS = (("aa",), ("aaa", "a"), ("a",), ("aa",), ("a",), ("aaaa",), ("aa", "aa"), ("a",), ("aaa",), ("aa", "a"))
FIRST_TURN = (0, 0, 0, 2, 0, 0, 0, 0, 0, 1)
REWARD = {0: 1.0, 1: -0.5, 2: 0.25, 3: 1.0, 4: 0.0, 5: 2.0, 6: 0.5, 7: 0.5}
"""Episodes 0 and 5 have two rows, which do not stand side by side; groups have 3, 2, 1 and 2 episodes; the episode of
group 2 is alone, those of group 3 earned the same."""


def table(seed: int = 0) -> Tensor:
    """[V, V + 1] parameters of a policy, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, V + 1, generator=generator, dtype=torch.float64).requires_grad_()


def forward(weights: Tensor, batch: Batch) -> Output:
    """What the policy says about every token of the batch; 0 off the mask."""
    known = len(weights)
    read = weights[batch.tokens].roll(1, dims=1)
    logp, mask = read[..., :known].log_softmax(-1), batch.action_mask
    topk = None
    if batch.topk_ids is not None:
        topk = logp.gather(-1, batch.topk_ids.clamp(min=0)) * (mask[..., None] & (batch.topk_ids >= 0))
    last = weights[batch.tokens.gather(1, batch.length[:, None] - 1)[:, 0]]
    return Output(
        logp=logp.gather(-1, batch.tokens[..., None])[..., 0] * mask,
        entropy=-(logp.exp() * logp).sum(-1) * mask,
        topk_logp=topk,
        value=read[..., known] * mask if weights.shape[1] > known else None,
        last_value=last[:, known] if weights.shape[1] > known else None,
    )


def toy_batch() -> tuple[Tensor, Batch]:
    """(table, batch): ten rows, eight episodes, four groups; sampler, trainer and policy all differ a little."""
    generator = torch.Generator().manual_seed(1)
    weights = table()
    rows = ["p" * (2 + i % 3) + "pp".join(turns) for i, turns in enumerate(TURNS)]
    longest = max(map(len, rows)) + 1
    mask = torch.tensor([[kind == "a" for kind in row.ljust(longest, ".")] for row in rows])
    real = torch.tensor([[kind != "." for kind in row.ljust(longest, ".")] for row in rows])
    tokens = torch.randint(V, mask.shape, generator=generator) * real
    opens = mask & ~mask.roll(1, dims=1)
    turn = torch.where(mask, opens.cumsum(1) - 1 + torch.tensor(FIRST_TURN)[:, None], -1)
    episode = torch.tensor(EPISODE)
    reward = torch.tensor([REWARD[number] for number in EPISODE], dtype=torch.float64)
    token_reward = torch.zeros(mask.shape, dtype=torch.float64)
    for row, number in enumerate(EPISODE):
        if turn[row].max() == max(turn[r].max() for r in range(len(EPISODE)) if EPISODE[r] == number):
            token_reward[row, mask[row].nonzero()[-1]] = REWARD[number]
    second = torch.tensor([0.4, -1.0, 0.0, 1.5, 0.25, 0.5, -0.5, 0.75], dtype=torch.float64)[episode]
    batch = Batch(
        tokens=tokens,
        length=real.sum(1),
        action_mask=mask,
        token_reward=token_reward,
        turn=turn,
        reward=reward,
        success=reward >= 1,
        truncated=(episode == 1) | (episode == 5),
        group=torch.tensor(GROUP),
        episode=episode,
        role=episode % 2,
        domain=torch.zeros_like(episode),
        steps=10,
        weighted={"first": 1.0, "second": 0.5},
        parts=torch.stack([reward - second / 2, second], 1),
        topk_ids=torch.tensor([0, 3, -1]).expand(*mask.shape, 3),
    )

    def near(spread: float) -> Output:
        with torch.no_grad():
            shift = torch.randn(V, V + 1, generator=generator, dtype=torch.float64)
            return forward(weights + spread * shift, batch)

    proximal, teacher = near(0.3), near(1.0)
    return weights, batch.replace(
        proximal_logp=proximal.logp,
        proximal_entropy=proximal.entropy,
        proximal_topk_logp=proximal.topk_logp,
        behavior_logp=near(0.3).logp,
        reference_logp=near(0.5).logp,
        teacher_logp=teacher.logp,
        teacher_entropy=teacher.entropy,
        teacher_topk_logp=teacher.topk_logp,
        has_teacher=episode != 3,
        value=proximal.value,
        last_value=proximal.last_value,
        counter_logp=near(1.0).logp,
    )


def on_policy(weights: Tensor, batch: Batch) -> Batch:
    """The same batch as if sampler, trainer and policy were one."""
    logp = forward(weights, batch).logp.detach()
    return batch.replace(behavior_logp=logp, proximal_logp=logp)


def gradient(method: Method, weights: Tensor, batch: Batch, parts: list[list[int]] | None = None) -> Tensor:
    """Of one optimizer step, its sum split into these micro-batches."""
    credit, share = method.credit(batch), method.weights(batch)
    total = torch.zeros_like(weights)
    for part in parts or [list(range(len(batch)))]:
        loss = method.loss(forward(weights, batch[part]), batch[part], credit[part])
        total += torch.autograd.grad((loss.values * share[part]).sum(), weights, allow_unused=True)[0]
    return total


def bandit(weights: Tensor, reward: Tensor, *, groups: int, size: int, generator: torch.Generator) -> Batch:
    """One draw of a bandit: every row is token 0 and then one arm."""
    with torch.no_grad():
        shares = weights[0, : len(weights)].softmax(-1)
        arms = torch.multinomial(shares, groups * size, replacement=True, generator=generator)
    return pulled(weights, arms, reward, size=size)


def pulled(weights: Tensor, arms: Tensor, reward: Tensor, *, size: int) -> Batch:
    """The batch in which these arms of a bandit were drawn, `size` to a group."""
    rows = len(arms)
    zeros, numbers = torch.zeros(rows, dtype=torch.long), torch.arange(rows)
    tokens, mask = torch.stack([zeros, arms], 1), torch.tensor([[False, True]]).expand(rows, 2)
    batch = Batch(
        tokens=tokens,
        length=zeros + 2,
        action_mask=mask,
        token_reward=reward[arms][:, None] * mask,
        turn=mask.long() - 1,
        reward=reward[arms],
        success=reward[arms] == reward.max(),
        truncated=zeros.bool(),
        group=numbers // size,
        episode=numbers,
        role=zeros,
        domain=zeros,
        weighted={"arm": 1.0},
        parts=reward[arms][:, None],
    )
    return on_policy(weights, batch)


def parted(parts: list[list[float]], weights: list[float], size: int = 4) -> Batch:
    """Episodes of one token, `size` to a group, rewarded for these parts."""
    given, weight = torch.tensor(parts, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    batch = pulled(table(), torch.zeros(len(parts), dtype=torch.long), torch.zeros(V, dtype=torch.float64), size=size)
    weighted = {f"part {k}": number for k, number in enumerate(weights)}
    return batch.replace(parts=given, weighted=weighted, reward=given.nan_to_num() @ weight)


def expected_gradient(method: Method, weights: Tensor, reward: Tensor, *, size: int) -> Tensor:
    """Of one update on one group: exact, over every tuple of `size` arms, weighted by its probability."""
    total = torch.zeros_like(weights)
    for arms in itertools.product(range(len(weights)), repeat=size):
        drawn = torch.tensor(arms)
        chance = weights[0, : len(weights)].detach().softmax(-1)[drawn].prod()
        total += chance * gradient(method, weights, pulled(weights, drawn, reward, size=size))
    return total


def batches_until_learned(method: Method, *, updates: int = 1, most: int = 200) -> int:
    """Batches of 4 x 8 draws until the best of three arms, at first the least likely, is chosen 95 times of 100."""
    weights = torch.tensor([[0.5, 0.2, -0.5], [0.0] * 3, [0.0] * 3], dtype=torch.float64).requires_grad_()
    reward, generator = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    for number in range(1, most + 1):
        batch = bandit(weights, reward, groups=4, size=8, generator=generator)
        for _ in range(updates):
            weights = (weights - gradient(method, weights, batch)).detach().requires_grad_()
        if weights[0].softmax(-1)[2] > 0.95:
            return number
    return most + 1
