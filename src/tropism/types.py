"""Every noun of the library, in the order in which data meets them: words, rollouts, tensors, methods.

Nothing here imports torch when it runs, so environments and rewards can use these nouns for free.

A worked instance. One episode of a game whose prompts do not extend each other, two turns, so two rows (`p` a prompt
token, `a` an action token, `.` padding; the game was won, worth 1, on the last turn):

    tokens         p p p a a .      action_mask   0 0 0 1 1 0      turn   -1 -1 -1  0  0 -1
                   p p p p a a                    0 0 0 0 1 1             -1 -1 -1 -1  1  1

    token_reward   0 0 0 0 0 0      reward   1    group   7        episode   3
                   0 0 0 0 0 1               1            7                  3

Had the second prompt been the first prompt, the first reply and a new message, token for token, both turns would
stand on one row. Statistics count the episode once either way.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}"""
Prompt = str | tuple[Message, ...]
"""A text is given to the model as it is; messages go through its chat template."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else: seed_of(run_seed, "play", step)."""
    return random.Random(repr(parts)).getrandbits(63)


# ---------------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to do; equal tasks open equal environments."""

    env: str = ""
    """Name of the environment."""
    seed: int = 0
    """Decides everything that is random in it, together with the sibling number."""
    level: int = 0
    """Difficulty, where the environment has levels."""
    domain: str = ""
    """A label that statistics and teachers may be split by."""
    seat: int = 0
    """The seat that the policy plays."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What rewards may read: the answer, the row of a data set."""


@dataclass(frozen=True)
class Ask:
    """Which seat must speak, and what it sees."""

    seat: int
    prompt: Prompt


@runtime_checkable
class Env(Protocol):
    """Text in, text out, used once: `while (ask := env.ask()) is not None: env.tell(reply_to(ask))`."""

    def ask(self) -> Ask | None:
        """Who must speak next, None when all is over. Asking twice changes nothing."""
        ...

    def tell(self, reply: str) -> None:
        """Hear the reply of the seat that was asked. Any text is legal."""
        ...

    def score(self, seat: int) -> Mapping[str, float]:
        """Named rewards of this seat, total so far. Every part is there from the start."""
        ...

    def feedback(self, seat: int) -> str | None:
        """What could be said about that seat's latest reply. A teacher may read it; the student never sees it."""
        ...


class Source(Protocol):
    """Where tasks come from: `(split, seed, options) -> Source`. Task numbers start at 0 and never run out."""

    def task(self, number: int) -> Task: ...

    def open(self, task: Task, sibling: int) -> Env: ...


# ------------------------------------------------------------------------------------------------------------- rollouts


class Stop(StrEnum):
    """Why a reply ended. Truncated is not finished."""

    finished = "finished"
    truncated = "truncated"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One reply: the tokens that were read, the tokens that were chosen, and what came of it."""

    context: Sequence[int]
    """Every token id the model had read when it chose the first action token."""
    action: Sequence[int]
    """Token ids as sampled, the stop token included; never rebuilt from text."""
    logp: Sequence[float] | None = None
    """Log-probability of each action token under whoever sampled it, nats; None where nobody sampled (data)."""
    entropy: Sequence[float] | None = None
    """Entropy of the distribution that each action token was drawn from, nats."""
    topk_ids: Any = None
    topk_logp: Any = None
    """[L, K] the K likeliest token ids at each action token, and their log-probabilities: arrays, or lists."""
    stop: Stop = Stop.finished
    prompt: Prompt = ()
    """The words that `context` was made from."""
    reply: str = ""
    """The words that the environment heard."""
    earned: Mapping[str, float] = field(default_factory=dict)
    """Change of each part of the environment's score that this turn brought."""
    reward: float = 0.0
    """What this turn earned in all: weights times parts, environment and scorers together."""
    feedback: str | None = None
    """What the environment or a judge said about this reply."""
    hints: Sequence[str] = ()
    """What a judge would have told the policy before it; the first is the one to use."""

    def __post_init__(self) -> None:
        for name in ("logp", "entropy", "topk_ids", "topk_logp"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.action):
                raise ValueError(
                    f"Turn has {len(self.action)} action tokens but {len(values)} of {name}. The sampler must return "
                    "one per sampled token (did it drop the stop token?)."
                )


@dataclass(frozen=True)
class Failure:
    """Why something could not be played or scored. Never a number: 0 is a score, this is the lack of one."""

    where: str
    """play, or the name of the scorer"""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One seat of one episode."""

    task: Task
    group: int
    """Equal for siblings: same task, seat and opening."""
    sibling: int = 0
    turns: tuple[Turn, ...] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Named parts as scored, before weights."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Part -> its weight in `reward`, where it has one."""
    reward: float = 0.0
    """Sum over parts of weight times part."""
    success: bool = False
    """The recipe's `success` part reached its threshold."""
    failure: Failure | None = None
    version: int = 0
    """Number of training steps the sampling weights had seen."""


LEFT_OUT = "contrast"
"""`Failure.where` of a rollout whose siblings all earned the same: nothing failed, it is only not trained on."""
Scored = Mapping[str, "float | Sequence[float | None] | None"]
"""Parts of one rollout: a float lands on its last turn, a list holds one per turn, None does not apply."""
Scorer = Callable[[Sequence[Rollout]], "Sequence[Scored | Failure]"]
"""A reward: finished rollouts in, named parts or a Failure out, one per rollout."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a sampler must know to answer a list of token prompts."""

    temperature: float = 1.0
    """0 takes the likeliest token; log-probs are then those of temperature 1."""
    max_tokens: int = 256
    seed: int = 0
    top_k: int = 0
    """How many of the likeliest tokens to return at each position; 0 for none. It never changes what is drawn."""
    places: Sequence[int] = ()
    """Number of each prompt, which decides its draws; empty: its place in the list."""


class Sampler(Protocol):
    """`(token prompts, params) -> one Turn per prompt`, in order. A prompt that does not fit gives a Failure."""

    def __call__(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Turn | Failure]: ...


# -------------------------------------------------------------------------------------------------------------- tensors

ABSENT: Any = None
"""What nobody asked for is None. A method may read whatever its `needs` name without asking whether it is there."""

FLAT = ("parts",)  # fields of a batch whose second axis is not one of places


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a method sees: N rows of T tokens. Entry [n, t] is about token t, never the next one.

    A row is a run of turns of one rollout whose contexts extend each other token for token; any other turn opens a new
    row. What is off the mask is 0. Fields that nobody needs are None.
    """

    tokens: Tensor
    """[N, T] token ids, padded on the right with 0; read `length`, never a pad id."""
    length: Tensor
    """[N] how many tokens of the row are real."""
    action_mask: Tensor
    """[N, T] bool: the policy chose this token."""
    token_reward: Tensor
    """[N, T] reward, on the last action token of the turn that earned it; sums to `reward` over an episode."""
    turn: Tensor
    """[N, T] number of the turn within its episode, counting across rows; -1 off the mask."""
    reward: Tensor
    """[N] the rollout's total, repeated on its rows."""
    success: Tensor
    """[N] bool."""
    truncated: Tensor
    """[N] bool: the rollout's last reply ran into the token limit."""
    group: Tensor
    """[N] equal ids are siblings. Group by id, never by reshape."""
    episode: Tensor
    """[N] number of the rollout; rows of one rollout share it."""
    role: Tensor
    """[N] seat."""
    domain: Tensor
    """[N] integer code of the task's domain; the record has its name."""
    step: int = 0
    """Rollout batches trained on before this one."""
    steps: int = 1
    """Rollout batches in all."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method's `remember` returned last; {} at step 0."""
    weighted: Mapping[str, float] = field(default_factory=dict)
    """Part of the reward -> its weight, in the order of `parts`."""
    parts: Tensor = ABSENT
    """[N, P] what each of them gave to the rollout, before its weight; NaN where it does not apply."""
    behavior_logp: Tensor = ABSENT
    """[N, T] log-probs of who sampled. None offline."""
    proximal_logp: Tensor = ABSENT
    """[N, T] of the trainer's own policy when the batch was made; the same tensor when sampler and trainer are one."""
    proximal_entropy: Tensor = ABSENT
    """[N, T] entropy over the full vocabulary."""
    reference_logp: Tensor = ABSENT
    """[N, T] of the frozen start model, same context."""
    teacher_logp: Tensor = ABSENT
    """[N, T] of the teacher, in its own context."""
    counter_logp: Tensor = ABSENT
    """[N, T] of the same teacher reading the opposite hint."""
    teacher_entropy: Tensor = ABSENT
    """[N, T]"""
    has_teacher: Tensor = ABSENT
    """[N] bool: every context the teacher asks for was there, and its numbers are finite."""
    topk_ids: Tensor = ABSENT
    """[N, T, K] token ids on which student and teacher are compared; -1 where a place is unused."""
    proximal_topk_logp: Tensor = ABSENT
    teacher_topk_logp: Tensor = ABSENT
    """[N, T, K] of these ids, both."""
    value: Tensor = ABSENT
    """[N, T] critic's value of the state in which token t was chosen."""
    last_value: Tensor = ABSENT
    """[N] value after the row's last token."""
    mismatch: Tensor = ABSENT
    """[N] log p - log q of another row's answer to this row's prompt; KTO's z is their mean over the batch."""

    def __post_init__(self) -> None:
        rows, places = self.tokens.shape
        for name, value in self.tensors():
            if value.shape[0] != rows or (value.ndim > 1 and name not in FLAT and value.shape[1] != places):
                raise ValueError(f"Batch.{name} is {list(value.shape)} but tokens is {[rows, places]}.")

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of every field that has rows."""
        found = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return [(name, value) for name, value in found if hasattr(value, "shape")]

    def __getitem__(self, rows: Any) -> Batch:
        """The same batch with these rows only; step, steps, memory and weighted belong to the whole. A field that is
        one view for all rows stays one: the ids of a whole vocabulary are never written out."""
        count = len(self.tokens[rows])
        once = {name: v[:1].expand(count, *v.shape[1:]) for name, v in self.tensors() if not v.stride()[0]}
        return self.replace(**{name: v[rows] for name, v in self.tensors() if name not in once}, **once)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def narrow(self, width: int) -> Batch:
        """The same rows, cut to the first `width` places; what is cut must be padding."""
        wide = {name: value for name, value in self.tensors() if value.ndim > 1 and name not in FLAT}
        return self.replace(**{name: value[:, :width] for name, value in wide.items()})

    def replace(self, **fields: Any) -> Batch:
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True)
class Credit:
    """What every token deserves. No gradient."""

    advantage: Tensor
    """[N, T]"""
    target: Tensor = ABSENT
    """[N, T] what the critic should predict, before any whitening; None without a critic."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers worth watching of the whole batch; the record shows them as they are."""

    def __getitem__(self, rows: Any) -> Credit:
        return Credit(self.advantage[rows], None if self.target is None else self.target[rows], self.metrics)

    def narrow(self, width: int) -> Credit:
        return self[:, :width]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What the policy's forward gives, with gradient."""

    logp: Tensor
    """[N, T]"""
    entropy: Tensor
    """[N, T]"""
    topk_logp: Tensor = ABSENT
    """[N, T, K] at `batch.topk_ids`."""
    topk_ids: Tensor = ABSENT
    """[N, T, K] the likeliest tokens, where a measuring pass was asked for them; `topk_logp` is then theirs."""
    value: Tensor = ABSENT
    """[N, T]"""
    last_value: Tensor = ABSENT
    """[N]"""


@dataclass(frozen=True)
class TokenLoss:
    """The loss of each token, never averaged, and numbers worth watching."""

    values: Tensor
    """[N, T], with gradient."""
    metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    """name -> [N, T], or that and where it applies, [N, T] bool; the record shows means, else of action tokens."""


# -------------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What must be measured, kept alive or sampled for a method. Nothing is measured that no one needs."""

    measured: frozenset[str] = frozenset()
    """Names of Batch fields, such as `reference_logp`."""
    live: frozenset[str] = frozenset()
    """Names of Output fields beyond logp and entropy, such as `value`."""
    sampling: frozenset[str] = frozenset()
    """`rollouts`: its own; `siblings`: groups of two or more; `contrast`: such as differ in reward. None: data do."""
    data: frozenset[str] = frozenset()
    """What rows must say: `pairs`, two answers in order; `labels`, is it desirable; `steps`, which are right."""
    parts: frozenset[str] = frozenset()
    """Parts of the reward that the method knows by name."""
    by_advantage: bool = False
    """The loss has no gradient where the advantage is 0, so that episodes without any need no forward pass."""
    by_row: bool = False
    """The loss of a row does not look at other rows of its episode, so that each may be left out by itself."""


class Method(Protocol):
    """Three questions about every token the policy chose. A frozen dataclass: the object is its config."""

    @property
    def needs(self) -> Needs: ...

    def credit(self, batch: Batch) -> Credit:
        """What does it deserve? Asked once, of the whole rollout batch."""
        ...

    def weights(self, batch: Batch) -> Tensor:
        """How much does it count? [N, T], asked once per optimizer step, of the whole mini-batch."""
        ...

    def loss(self, out: Output, batch: Batch, credit: Credit) -> TokenLoss:
        """What do we minimise for it? Asked per micro-batch; the objective is (values * weights).sum()."""
        ...
