"""A judge of replies: it sees a reply and what came next, and gives a score and hints.

Whoever answers is a `Voter`: a function of one's own, a local model, or a server that speaks OpenAI's protocol. It sees
the reply, the next message and the role of who sent that, and nothing of what was said before: what came next is the
evidence. Wang et al. 2026, OpenClaw-RL, arXiv:2603.10165, section 3.

    score of a turn    what most votes say of it, +1, 0 or -1; 0 in a tie; none where nothing came next
    hints of a turn    what the policy should have been told before: of all votes, the three shortest of those above 10
                       characters, each once

Where every vote failed or made no sense the whole rollout is a `Failure`, never 0; how many of several did is recorded
as the part judge/failed. The paper asks for score and hint in two prompts; here one answer holds both, which halves the
cost.

What is left out: keys of hosted services. The server is one of your own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.request import Request, urlopen

from tropism.types import Failure, Prompt, Rollout, Scored, Turn, seed_of

PART = "judge"
"""Name of the part of the reward, and `Failure.where`."""
FAILED = "judge/failed"
"""Part: share of a rollout's votes that failed, where a turn has several. It earns nothing."""
QUESTION = """An assistant wrote a reply, and something came next. Judge the reply by what came next alone.

The reply:
{reply}

What came next, from the {role}:
{next}

Think briefly. Then write \\boxed{+1} if it shows that the reply was good, \\boxed{-1} if it shows that it was \
bad, and \\boxed{0} if it shows neither. If it says how the reply should have been, add one sentence that would \
have told the assistant so before, as [HINT_START]your sentence[HINT_END]."""
SLOT = re.compile(r"\{(reply|next|role)\}")
SCORE = re.compile(r"\\boxed\{\s*([+-]?1|0)\s*\}")
HINT = re.compile(r"\[HINT_START\](.*?)\[HINT_END\]", re.DOTALL)
HINTS, SHORTEST = 3, 10
Read = TypeVar("Read")
AT_ONCE = 16
"""Requests under way at the same time."""


@dataclass(frozen=True)
class Seen:
    """All that a judge sees of a turn."""

    reply: str
    following: str
    role: str


@dataclass(frozen=True)
class Vote:
    score: int
    hints: tuple[str, ...] = ()


Voter = Callable[[Sequence[Seen], int], "Sequence[Vote | Failure]"]
"""(turns, seed) -> one vote about each, in order."""
Answering = Callable[[Sequence[Prompt], int], "Sequence[str | Failure]"]
"""(prompts, seed) -> what a model says to each, in order."""


@dataclass(frozen=True)
class Panel:
    """Asks a voter `votes` times about every turn. Called, it is a scorer."""

    voter: Voter
    votes: int = 1
    seed: int = 0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored | Failure]:
        return self.read(rollouts)[1]

    def read(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[Scored | Failure]]:
        """The rollouts with hints on their turns, and for each that has not failed what a scorer gives of it."""
        live = [n for n, rollout in enumerate(rollouts) if rollout.failure is None]
        places = [(n, t, seen) for n in live for t, seen in enumerate(seen_of(rollouts[n])) if seen is not None]
        asked = [seen for _, _, seen in places for _ in range(self.votes)]
        seed = seed_of(self.seed, PART, rollouts[0].version if rollouts else 0)
        votes = self.voter(asked, seed) if asked else []
        turns = {n: list(rollouts[n].turns) for n in live}
        scores: dict[int, list[float | None]] = {n: [None] * len(turns[n]) for n in live}
        failures: dict[int, Failure] = {}
        lost: dict[int, list[bool]] = {n: [] for n in live}
        for k, (n, t, _) in enumerate(places):
            own = votes[k * self.votes : (k + 1) * self.votes]
            lost[n] += [isinstance(vote, Failure) for vote in own]
            found = decided(own)
            if isinstance(found, Failure):
                failures.setdefault(n, found)
            else:
                scores[n][t] = float(found.score)
                turns[n][t] = replace(turns[n][t], hints=found.hints)
        hinted = [replace(r, turns=tuple(turns[n])) if n in turns else r for n, r in enumerate(rollouts)]
        parts: dict[int, Scored] = {n: {PART: scores[n] if any_of(scores[n]) else None} for n in live}
        if self.votes > 1:
            parts = {n: {**parts[n], FAILED: sum(lost[n]) / len(lost[n]) if lost[n] else None} for n in live}
        return hinted, [failures.get(n, parts[n]) for n in live]


def any_of(scores: Sequence[float | None]) -> bool:
    return any(score is not None for score in scores)


def seen_of(rollout: Rollout) -> list[Seen | None]:
    """What a judge sees of each turn; None where nothing came next."""
    following = [turn.prompt for turn in rollout.turns[1:]]
    return [seen(turn, prompt) for turn, prompt in zip(rollout.turns, [*following, ()], strict=False)]


def seen(turn: Turn, following: Prompt) -> Seen | None:
    """The last message of the next prompt; of a plain text, what it adds to what was said, else all of it."""
    if isinstance(following, str):
        past = turn.prompt + turn.reply if isinstance(turn.prompt, str) else ""
        text, role = following.removeprefix(past), "user"
    else:
        text, role = (following[-1]["content"], following[-1]["role"]) if following else ("", "")
    return Seen(turn.reply, text, role) if text.strip() else None


def decided(votes: Sequence[Vote | Failure]) -> Vote | Failure:
    """What the valid votes say together."""
    valid = [vote for vote in votes if isinstance(vote, Vote)]
    if not valid:
        reasons = Counter(vote.reason for vote in votes if isinstance(vote, Failure))
        (reason, _), *_ = reasons.most_common(1)
        return Failure(PART, f"no valid vote of {len(votes)}: {reason}")
    (score, most), *others = Counter(vote.score for vote in valid).most_common()
    tie = bool(others) and others[0][1] == most
    hints = {text for vote in valid for hint in vote.hints if len(text := hint.strip()) > SHORTEST}
    return Vote(0 if tie else score, tuple(sorted(hints, key=lambda text: (len(text), text))[:HINTS]))


# -------------------------------------------------------------------------------------------------------------- voters


def by_function(function: Callable[[str, str, str], Any]) -> Voter:
    """A rule: (reply, next message, its role) -> a score, or (a score, hints)."""

    def vote(one: Seen) -> Vote | Failure:
        try:
            answer = function(one.reply, one.following, one.role)
            score, hints = answer if isinstance(answer, tuple | list) else (answer, ())
            hints = (hints,) if isinstance(hints, str) else tuple(str(text) for text in hints)
            return Vote(int(score), hints) if score in (-1, 0, 1) else Failure(PART, f"{score!r:.80} is no score")
        except Exception as error:  # somebody else's code
            return Failure(PART, f"{type(error).__name__}: {error}")

    return lambda turns, seed: [vote(one) for one in turns]


def by_model(answering: Answering, question: str = "") -> Voter:
    """A model that is asked `question`, where {reply}, {next} and {role} are filled in."""

    def asked(one: Seen) -> str:
        words = {"reply": one.reply, "next": one.following, "role": one.role}
        return SLOT.sub(lambda slot: words[slot[1]], question or QUESTION)

    def vote(turns: Sequence[Seen], seed: int) -> list[Vote | Failure]:
        return read_answers(answering, [asked(one) for one in turns], vote_in, seed)

    return vote


def read_answers(
    answering: Answering, questions: Sequence[str], read: Callable[[str | Failure, str], Read], seed: int
) -> list[Read]:
    """What `read` makes of each answer and its question."""
    answers = answering([({"role": "user", "content": text},) for text in questions], seed)
    return [read(answer, text) for answer, text in zip(answers, questions, strict=True)]


def vote_in(answer: str | Failure, asked: str) -> Vote | Failure:
    """What a model's answer says; its last box counts, for it may have thought aloud before."""
    if isinstance(answer, Failure):
        return answer
    answer = answer.rpartition(asked)[2]  # some servers repeat the question, which itself holds boxes and a hint
    boxes = SCORE.findall(answer)
    if not boxes:
        return Failure(PART, f"the answer has no \\boxed{{+1}}, \\boxed{{0}} or \\boxed{{-1}}: {answer!r:.120}")
    return Vote(int(boxes[-1]), tuple(HINT.findall(answer)))


def over_http(url: str, model: str, *, temperature: float, max_tokens: int, timeout: float) -> Answering:
    """A server that speaks OpenAI's protocol: POST url/chat/completions, several requests at once.

    Args:
        url: up to and with /v1.
        timeout: seconds without a word from the server.
    """
    settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}

    def one(prompt: Prompt, seed: int) -> str | Failure:
        body = json.dumps({"messages": prompt, "seed": seed & 0x7FFFFFFF, **settings}).encode()
        request = Request(f"{url.rstrip('/')}/chat/completions", body, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=timeout) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"])
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            return Failure(PART, f"{url} gave {type(error).__name__}: {error}")

    def all_of(prompts: Sequence[Prompt], seed: int) -> list[str | Failure]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(one, prompts, range(seed, seed + len(prompts))))

    return all_of
