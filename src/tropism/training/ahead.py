"""One step ahead: the next batch is played and scored while this one trains, by a copy of the weights.

Rollouts are then one step older than the policy that learns from them. Log-probs of the policy before its update are
measured, and the truncated weight proximal / behavior of every loss corrects for the difference: Noukhovitch et al.
2024, arXiv:2410.18252; Yao et al. 2025 (TIS). Resume stays exact, because the batch that waits is in the checkpoint.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from tropism.rollout.sampler import Local
from tropism.training.checkpoint import State
from tropism.training.learn import Playing
from tropism.training.lora import follower_of
from tropism.types import Rollout


class Ahead:
    """Plays a step's batch in a thread, from `begin` to `end`.

    Args:
        draw: how the run plays.
    """

    def __init__(self, draw: Playing) -> None:
        policy = draw.policy
        self.module, self.copy = policy.module, follower_of(policy.module)
        sampler = Local(self.copy, policy.words.stop_ids, policy.context, policy.precision)
        self.draw = replace(draw, sampler=sampler, behind=1)
        self.threads = ThreadPoolExecutor(1, "ahead", torch.set_num_threads, (torch.get_num_threads(),))
        self.next: tuple[State, Future[list[Rollout]]] | None = None

    @torch.no_grad()
    def begin(self, state: State) -> None:
        """Start on the batch of the step after `state`'s, with the weights as they are now."""
        for mine, theirs in zip(self.copy.parameters(), self.module.parameters(), strict=True):
            if mine is not theirs:
                mine.copy_(theirs)
        after = State(step=state.step + 1, cursor=state.cursor)
        self.next = (after, self.threads.submit(self.draw, after))

    def end(self, state: State) -> None:
        """Wait for the batch, if one was begun; it is then `state.waiting`, and the cursor stands behind it."""
        if self.next is not None:
            (after, drawn), self.next = self.next, None
            state.waiting, state.cursor = (state.cursor, drawn.result()), after.cursor
