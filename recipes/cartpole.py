"""CartPole by the method that trains language models here, in plain PyTorch: python recipes/cartpole.py [--seeds 0 1 2]

An episode is a row, a decision is a token, and `ppo` is the file in methods/: its credit, its weights and its loss see
nothing but a batch. Solved is a mean return of 475 in 100 episodes (Gymnasium, CartPole-v1), played by the policy as it
is, by sampling. Exits 1 if a seed does not get there. Needs `pip install gymnasium`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque

import gymnasium
import torch
from torch import Tensor, nn

from tropism.methods.ppo import PPO
from tropism.types import Batch, Output

EPISODES, BATCHES, EPOCHS, MINI = 16, 120, 6, 4
SOLVED, ENOUGH = 475.0, 495.0
METHOD = PPO(discount=0.99, trace=0.95, bootstrap=True, value_clip=float("inf"), value_weight=0.5)


class Net(nn.Module):
    """[..., 4] what is observed -> [..., 3] logits of left and right, and the value in hundreds of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.critic = (
            nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out))
            for out in (2, 1)
        )

    def forward(self, seen: Tensor) -> Tensor:
        return torch.cat([self.policy(seen), 100 * self.critic(seen)], -1)


def play(net: Net, envs: list[gymnasium.Env], seed: int) -> tuple[Tensor, Batch]:
    """([N, T + 1, 4] what was observed, the batch): one episode of every environment."""
    seen = [[torch.tensor(env.reset(seed=seed + n)[0])] for n, env in enumerate(envs)]
    said: list[list[int]] = [[] for _ in envs]
    cut, live = [False] * len(envs), list(range(len(envs)))
    while live:
        with torch.no_grad():
            shares = net.policy(torch.stack([seen[n][-1] for n in live])).softmax(-1)
        for n, action in zip(list(live), torch.multinomial(shares, 1)[:, 0].tolist(), strict=True):
            state, _, done, cut[n], _ = envs[n].step(action)
            seen[n].append(torch.tensor(state))
            said[n].append(action)
            if done or cut[n]:
                live.remove(n)
    length = torch.tensor([len(actions) for actions in said])
    width, row = int(length.max()), torch.arange(len(envs))
    mask = torch.arange(width) < length[:, None]
    states = nn.utils.rnn.pad_sequence([torch.stack(path) for path in seen], batch_first=True)
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(actions) for actions in said], batch_first=True)
    batch = Batch(
        tokens=tokens,
        length=length,
        action_mask=mask,
        token_reward=mask.float(),
        turn=torch.where(mask, torch.arange(width), -1),
        reward=length.float(),
        success=length >= SOLVED,
        truncated=torch.tensor(cut),
        group=row,
        episode=row,
        role=row * 0,
        domain=row * 0,
    )
    with torch.no_grad():
        out = look(net, states, batch)
    own = {"behavior_logp": out.logp, "proximal_logp": out.logp}
    return states, batch.replace(value=out.value, last_value=out.last_value, **own)


def look(net: Net, states: Tensor, batch: Batch) -> Output:
    found = net(states)
    logp, value = found[:, :-1, :2].log_softmax(-1), found[..., 2]
    return Output(
        logp=logp.gather(-1, batch.tokens[..., None])[..., 0] * batch.action_mask,
        entropy=-(logp.exp() * logp).sum(-1),
        value=value[:, :-1] * batch.action_mask,
        last_value=value.gather(1, batch.length[:, None])[:, 0],
    )


def solve(seed: int) -> tuple[float, int]:
    """(mean return of 100 episodes after training, episodes trained on)."""
    torch.manual_seed(seed)
    net, envs = Net(), [gymnasium.make("CartPole-v1") for _ in range(EPISODES)]
    optimizer, lately = torch.optim.Adam(net.parameters(), 1e-3), deque[float](maxlen=100)
    for number in range(BATCHES):
        states, batch = play(net, envs, seed=10_000 * (seed + 1) + EPISODES * number)
        credit = METHOD.credit(batch)
        for _ in range(EPOCHS):
            for rows in torch.randperm(EPISODES).chunk(MINI):
                piece = batch[rows]
                loss = METHOD.loss(look(net, states[rows], piece), piece, credit[rows])
                optimizer.zero_grad()
                (loss.values * METHOD.weights(piece)).sum().backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
        lately.extend(batch.reward.tolist())
        if len(lately) == 100 and statistics.fmean(lately) >= ENOUGH:
            break
    hundred = [play(net, envs, seed=EPISODES * n)[1].reward for n in range(7)]
    return float(torch.cat(hundred)[:100].mean()), EPISODES * (number + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    returns = []
    for seed in parser.parse_args().seeds:
        began = time.perf_counter()
        mean, episodes = solve(seed)
        returns.append(mean)
        print(
            f"seed {seed}: {mean:.1f} in 100 episodes, after {episodes} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    print(f"median {statistics.median(returns):.1f}, worst {min(returns):.1f}; solved is {SOLVED:.0f}")
    return int(min(returns) < SOLVED)


if __name__ == "__main__":
    sys.exit(main())
