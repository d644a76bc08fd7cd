"""A teacher at work: whose weights it has, how they follow the student, and what it says of a finished batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.rollout.render import Render
from tropism.signals.contexts import Context, Opening, available, chosen, contexts_of, opposite
from tropism.signals.frozen import Forward, all_of, top_k
from tropism.signals.reread import moved, reread, starts
from tropism.teacher import Teacher
from tropism.types import ABSENT, Batch, Output


@dataclass(frozen=True, kw_only=True)
class Tutor:
    """Measures what a `Teacher` says. Its only state is the copy that follows the student, where there is one.

    Attributes:
        student: the trainer's forward.
        models: domain -> forward of the model that teaches it; "" teaches all.
        copy: module of that copy.
        room: longest sequence that student and teacher can read, in tokens.
        vocabulary: size of both models' output.
        memory: bytes that the top-K of one rollout batch may take.
        proximal: the method reads `proximal_topk_logp`; else the student is only asked where its likeliest tokens are
            compared, or where no teacher spoke.
    """

    teacher: Teacher
    student: Forward
    models: Mapping[str, Forward]
    words: Render
    room: int
    vocabulary: int
    copy: Any = None
    memory: float = 4e9
    proximal: bool = True

    def measure(self, batch: Batch, openings: Sequence[Opening]) -> tuple[Batch, dict[str, tuple[float, float]]]:
        """Every field that a teacher fills, and how it went.

        Args:
            openings: where each row begins.

        Returns:
            metrics: (sum, over how many), so that processes can be added up. Shares of rows that had a teacher, one of
            whose contexts was cut, one of whose was too long even so, whose numbers were not finite; how many tokens it
            read, over all its passes; and the mean of log proximal - log teacher over tokens that had one, with several
            teachers for each domain too, with how many tokens a row of it has and on what share of them trainer and
            sampler differ by a factor beyond two, which `mopd` drops unless told otherwise (0 where they are one). A
            wrong route is a domain whose gap does not fall.
        """
        names = [*self.teacher.reads, *self.teacher.against]
        told = [available(opening, names) for opening in openings]
        read = [chosen(self.teacher, found) for found in told]
        batch, k = self.supported(batch)
        contexts = self.contexts(batch, openings, read)
        out, tokens = self.spoken(batch, openings, contexts, k), tokens_of(batch, contexts)
        finite = all_finite(out)
        there = present(contexts, finite)
        shown, counter, lost = contexts, None, too_long(read if self.teacher.reads else [True] * len(read), contexts)
        if self.teacher.against:
            against = [r and opposite(self.teacher, r, found) for r, found in zip(read, told, strict=True)]
            opposed = self.contexts(batch, openings, against)
            counter = self.spoken(batch, openings, opposed, 0)
            tokens += tokens_of(batch, opposed)
            finite &= all_finite(counter)
            there &= present(opposed, finite)
            lost = [one or other for one, other in zip(lost, too_long(against, opposed), strict=True)]
            shown = [[*found, *other] for found, other in zip(contexts, opposed, strict=True)]
        batch = self.filled(batch, out, counter, there)
        heard = batch.action_mask & there[:, None]
        gap = batch.proximal_logp - batch.teacher_logp
        rows = float(len(batch))
        domains = [opening.rollout.task.domain for opening in openings] if len(self.models) > 1 else []
        each = {}
        for domain in sorted(set(domains)):
            own = heard & torch.tensor([name == domain for name in domains], device=there.device)[:, None]
            each[f"teacher/kl/{domain}"] = (float(gap[own].sum()), float(own.sum()))
            each[f"teacher/length/{domain}"] = (float(own.sum()), float(own.any(1).sum()))
            if batch.behavior_logp is not None:
                far = (batch.proximal_logp - batch.behavior_logp).abs() > math.log(2)
                each[f"teacher/mismatch/{domain}"] = (float((far & own).sum()), float(own.sum()))
        return batch, each | {
            "teacher/share": (float(there.sum()), rows),
            "teacher/cut": (float(sum(any(context.cut for context in found) for found in shown)), rows),
            "teacher/too_long": (float(sum(lost)), rows),
            "teacher/not_finite": (float((~finite).sum()), rows),
            "teacher/tokens": (float(tokens), 1.0),
            "teacher/kl": (float(gap[heard].sum()), float(heard.sum())),
        }

    def supported(self, batch: Batch) -> tuple[Batch, int]:
        """The batch with the tokens that student and teacher are compared on, the student's likeliest, and how many."""
        k = self.vocabulary if self.teacher.top_k == "all" else min(self.teacher.top_k, self.vocabulary)
        if not k:
            return batch, 0
        bytes_needed = 20 * k * batch.tokens.numel()  # ids, and log-probs of student, teacher and the live policy
        if bytes_needed > self.memory:
            raise ConfigError(
                f"teacher.top_k is {self.teacher.top_k}, which takes {bytes_needed / 1e9:.1f} GB for a batch of "
                f"{list(batch.tokens.shape)} tokens, 20 bytes for each of {k} tokens at each place; the limit is "
                f"{self.memory / 1e9:.1f} GB. Use top_k: 100, or fewer groups."
            )
        if self.teacher.support == "teacher" and self.teacher.select == "first":
            return batch, k
        if k == self.vocabulary and not self.proximal:
            return batch.replace(topk_ids=all_of(batch, k), proximal_topk_logp=ABSENT), k
        return top_k(batch, self.student, k, self.vocabulary), k

    def contexts(self, batch: Batch, openings: Sequence[Opening], read: Sequence[Any]) -> list[list[Context]]:
        """Of each row, one context per hint; none where the teacher has nothing to go by, or cannot read that far."""
        start = starts(batch)
        if not self.teacher.reads:
            rows = zip(batch.tokens.tolist(), start.tolist(), batch.length.tolist(), strict=True)
            return [[Context(tuple(ids[:place]))] if length <= self.room else [] for ids, place, length in rows]
        rooms = (self.room - (batch.length - start)).tolist()
        return [
            contexts_of(self.teacher, opening, texts, self.words, room) if texts else []
            for opening, texts, room in zip(openings, read, rooms, strict=True)
        ]

    def spoken(self, batch: Batch, openings: Sequence[Opening], contexts: list[list[Context]], k: int) -> Output:
        """What the teacher says at the places of `batch`; 0 in rows without a context. Of several hints, the one that
        `select` chooses."""
        hints = max([1, *map(len, contexts)])
        said = [self.once(batch, openings, [c[h] if h < len(c) else None for c in contexts], k) for h in range(hints)]
        if hints == 1:
            return said[0]
        count = torch.tensor([len(found) for found in contexts], device=batch.tokens.device)
        return selected(said, batch, count, self.teacher.select)

    def once(self, batch: Batch, openings: Sequence[Opening], contexts: Sequence[Context | None], k: int) -> Output:
        """One context per row, each row read by the model that teaches its domain."""
        rows: dict[str, list[int]] = {}
        for n, (opening, context) in enumerate(zip(openings, contexts, strict=True)):
            if context is not None:
                rows.setdefault(self.label(opening.rollout.task.domain), []).append(n)
        own = k if self.teacher.support != "student" or self.teacher.select != "first" else 0
        out = nothing(batch, k, own)
        for label, some in rows.items():
            index = torch.tensor(some, device=batch.tokens.device)
            part = batch[index] if k and self.teacher.support != "teacher" else batch[index].replace(topk_ids=ABSENT)
            told, shift = reread(part, [found.ids for n in some if (found := contexts[n]) is not None])
            said = self.models[label](told, own)
            for name in ("logp", "entropy", "topk_logp", "topk_ids"):
                if (value := getattr(said, name)) is not None and getattr(out, name) is not None:
                    getattr(out, name)[index] = moved(value, shift, part.action_mask)
        return out

    def label(self, domain: str) -> str:
        """The key of the model that teaches a domain."""
        if isinstance(self.teacher.who, str):
            return ""
        if domain not in self.models:
            raise ConfigError(
                f"a task has the domain {domain!r}, but teacher.who knows {', '.join(self.models)}. Name a teacher for "
                "every domain."
            )
        return domain

    def filled(self, batch: Batch, out: Output, counter: Output | None, there: Tensor) -> Batch:
        """The batch with what was said; where no teacher spoke, the policy stands in its place."""
        batch = batch.replace(
            has_teacher=there,
            teacher_logp=where(there, out.logp, batch.proximal_logp),
            teacher_entropy=where(there, out.entropy, torch.zeros_like(out.entropy)),
            counter_logp=ABSENT if counter is None else where(there, counter.logp, batch.proximal_logp),
        )
        if out.topk_logp is None:
            return batch
        if self.teacher.support == "teacher":
            ids = where(there, out.topk_ids, torch.full_like(out.topk_ids, -1))
            batch = batch.replace(topk_ids=ids, proximal_topk_logp=ABSENT)
            if self.proximal:
                batch = batch.replace(proximal_topk_logp=self.student(batch).topk_logp)
        elif self.teacher.support == "overlap":
            shared = (batch.topk_ids[..., :, None] == out.topk_ids[..., None, :]).any(-1)
            batch = batch.replace(topk_ids=where(there, torch.where(shared, batch.topk_ids, -1), batch.topk_ids))
        return batch.replace(teacher_topk_logp=self.or_student(batch, there, out.topk_logp))

    def or_student(self, batch: Batch, there: Tensor, said: Tensor) -> Tensor:
        """What the teacher said at `batch.topk_ids`, and the student in rows where it said nothing."""
        if batch.proximal_topk_logp is not None:
            return where(there, said, batch.proximal_topk_logp)
        rows = (~there).nonzero()[:, 0]
        own = self.student(batch[rows]).topk_logp if len(rows) else None
        return said if own is None else said.index_copy(0, rows, own)

    def follow(self, student: Any, step: int, moved: bool) -> None:
        """Move the copy after rollout batch `step` (from 0); an EMA only if an update moved the student.

        ema       copy <- (1 - rate) copy + rate student        in float32
        synced    copy <- student        where (step + 1) % every == 0
        """
        if self.copy is None:
            return
        if self.teacher.who == "ema" and moved:
            blend(self.copy, student, self.teacher.rate)
        elif self.teacher.who == "synced" and (step + 1) % self.teacher.every == 0:
            blend(self.copy, student, 1.0)


@torch.no_grad()
def blend(copy: Any, student: Any, share: float) -> None:
    for mine, theirs in zip(copy.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs, share) if share < 1 else mine.copy_(theirs)


# --------------------------------------------------------------------------------------------------------------- places


def tokens_of(batch: Batch, contexts: Sequence[Sequence[Context]]) -> int:
    """How many tokens are read: every context, and after each the row from its first action on."""
    rests = (batch.length - starts(batch)).tolist()
    return sum(len(context.ids) + rest for found, rest in zip(contexts, rests, strict=True) for context in found)


def nothing(batch: Batch, k: int, own: int) -> Output:
    """What is said where nobody speaks, of k tokens; `own` of them the teacher's."""
    zeros = torch.zeros_like(batch.token_reward)
    ids = batch.tokens.new_full((*batch.tokens.shape, own), -1) if own else ABSENT
    logp = zeros.new_zeros(*batch.tokens.shape, k) if k else ABSENT
    return Output(logp=zeros, entropy=zeros.clone(), topk_ids=ids, topk_logp=logp)


def too_long(read: Sequence[Any], contexts: Sequence[Sequence[Context]]) -> list[bool]:
    """Rows for which there was something to read, and no room."""
    return [bool(texts) and not found for texts, found in zip(read, contexts, strict=True)]


def present(contexts: list[list[Context]], finite: Tensor) -> Tensor:
    return torch.tensor([bool(found) for found in contexts], device=finite.device) & finite


def all_finite(out: Output) -> Tensor:
    """[N] rows in which every number is finite."""
    fields = [value for value in (out.logp, out.entropy, out.topk_logp) if value is not None]
    return torch.stack([value.flatten(1).isfinite().all(1) for value in fields]).all(0)


def where(rows: Tensor, there: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (there.ndim - 1)), there, otherwise)


def selected(said: Sequence[Output], batch: Batch, count: Tensor, by: str) -> Output:
    """Of what was said under each hint, that of the hint with most tokens in common with the student's likeliest.

        O_ht = |top-K of the student at t, and top-K of the teacher under hint h at t|        h* = argmax_h sum_t O_ht

    By token the argmax is taken at each t. Ties go to the earlier hint. OpenClaw-RL, arXiv:2603.10165 v2.

    Args:
        count: [N] how many hints each row has.
    """
    ids = batch.topk_ids[..., :, None]
    shared = torch.stack([(ids == out.topk_ids[..., None, :]).any(-1).sum(-1) for out in said])
    shared = shared * batch.action_mask
    if by == "sequence":
        shared = shared.sum(-1, keepdim=True).expand_as(shared)
    shared = torch.where(torch.arange(len(said), device=count.device)[:, None, None] < count[:, None], shared, -1)
    best = shared.argmax(0)

    def pick(name: str) -> Tensor:
        values = torch.stack([getattr(out, name) for out in said])
        index = best.reshape(1, *best.shape, *[1] * (values.ndim - 3)).expand(1, *values.shape[1:])
        return values.gather(0, index)[0]

    return Output(**{name: pick(name) for name in ("logp", "entropy", "topk_ids", "topk_logp")})
