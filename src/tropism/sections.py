"""What a stage reads, how it is evaluated and who scores it: settings only, checked where they are declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from tropism.errors import ConfigError
from tropism.teacher import Teacher


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Named:
    """An environment or a data set: a registered name or `file.py:Class`, and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Told:
    """Some demonstrations answer the prompt of a teacher, so that the model learns to use what a teacher reads.

    A tiny model that was made from nothing cannot read a hint unless it was taught to; as a teacher it would be noise.
    """

    teacher: Teacher
    """What is read and in which words: those of the teachers that come later; of several things one at a time, unless
    `need` is all."""
    share: float = 0.5
    """Of the demonstrated replies."""
    wrong: float = 0.3
    """Share of these that are told something wrong, and reply as if it were right."""

    def __post_init__(self) -> None:
        for name in ("share", "wrong"):
            require(0 <= getattr(self, name) <= 1, f"told.{name} is {getattr(self, name)}, but is a share: use 0 to 1.")
        require(bool(self.teacher.reads), "told.teacher reads nothing, so nothing would be told. Set teacher.reads.")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Rows that the stage's start model writes, of which the reward keeps some: rejection sampling, and pairs."""

    env: Named
    """Where the tasks come from; the stage's rewards score the replies."""
    tasks: int = 256
    """How many."""
    first: int = 0
    """The first of them, so that two stages may sample from tasks that they do not share."""
    samples: int = 8
    """Replies to each, at sampling.temperature."""
    keep: Literal["best", "success", "random", "pairs", "labels"] = "best"
    """Of each task's replies: the `top` with the highest reward; all successes; as many at random as best would keep,
    which is the control; pairs of neighbours, the one with the higher reward chosen; or all, labelled by success."""
    top: int = 1
    """best, random: how many of each task."""
    at_least: float | None = None
    """best: and only those whose reward reaches this."""
    noise: float = 0.0
    """pairs: the better one wins with probability s(difference / noise); 0: always, and equal ones are no pair."""

    def __post_init__(self) -> None:
        for name in ("tasks", "samples", "top"):
            require(getattr(self, name) >= 1, f"sampled.{name} is {getattr(self, name)}, but must be at least 1.")
        require(self.first >= 0, f"sampled.first is {self.first}, but tasks are counted from 0.")
        require(self.noise >= 0, f"sampled.noise is {self.noise}, but cannot be negative. 0 is a judge without doubt.")
        require(
            self.keep != "pairs" or self.samples >= 2,
            f"sampled.samples is {self.samples}, but a pair takes two replies to one task. Use 2 or more.",
        )
        require(
            self.top < self.samples or self.keep not in ("best", "random") or self.at_least is not None,
            f"sampled.top is {self.top} of {self.samples} samples, so every reply would be kept. Use fewer.",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows to learn from offline: a file or data set, or an environment's own demonstrations."""

    path: str = ""
    """JSONL, Parquet, a Hugging Face data set directory or hub id; or an earlier stage: its sampled rows."""
    split: str = "train"
    demos: Named | None = None
    """An environment whose `demonstrate` writes the replies."""
    episodes: int = 2000
    """How many demonstrated episodes."""
    told: Told | None = None
    """demos: some replies follow from what a teacher may read."""
    sampled: Sampled | None = None
    """The stage's start model writes the replies, and the reward keeps some."""
    balance: bool = False
    """Pairs: those whose chosen answer is the longer one and those whose chosen answer is the shorter one are read
    equally often, the rarer kind several times an epoch, so that length alone tells nothing."""

    def __post_init__(self) -> None:
        require(
            bool(self.path) + (self.demos is not None) + (self.sampled is not None) == 1,
            "data needs one of path, demos (an environment that demonstrates) and sampled (the model's own replies).",
        )
        require(
            self.told is None or self.demos is not None,
            "data.told changes what an environment demonstrates, but data.demos names none. Set it, or drop data.told.",
        )
        require(self.episodes >= 1, f"data.episodes is {self.episodes}, but must be at least 1.")
        require(
            bool(self.path) or self.split == "train",
            f"data.split is {self.split!r}, but tasks come from the train split. Drop data.split, or use data.path.",
        )
        require(
            self.demos is not None or self.episodes == 2000,
            f"data.episodes is {self.episodes}, but is about demos. Drop it: all rows of data.path are read.",
        )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Held-out tasks, played during training, or held-out rows of data. Tasks are never shared with training."""

    every: int = 0
    """Steps between evaluations; there is one before the first step and one after the last. 0: none."""
    tasks: int = 64
    """How many held-out tasks, always the same ones."""
    samples: int = 1
    """Rollouts per task; with n > 1 pass@n is reported too."""
    temperature: float = 1.0
    """0 is greedy."""
    greedy: bool = False
    """Report the likeliest reply too, as eval/greedy/…"""
    kl: bool = False
    """Report how far the policy is from the stage's reference, eval/kl/episode in nats: the model it started as, unless
    the method names another."""
    best: str = ""
    """The metric that chooses the best checkpoint, e.g. eval/success; the higher the better. Empty: eval/reward."""
    env: Named | None = None
    """Where to evaluate. Empty: the stage's own environment."""
    data: Data | None = None
    """Rows to read instead of playing, for a stage that reads data: the method's loss and metrics on them. Those of an
    environment are of tasks that no training sees."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every is {self.every}, but cannot be negative. 0 switches evaluation off.")
        for name in ("tasks", "samples"):
            require(getattr(self, name) >= 1, f"eval.{name} is {getattr(self, name)}, but must be at least 1.")
        require(self.temperature >= 0, f"eval.temperature is {self.temperature}, but cannot be negative. 0 is greedy.")
        require(
            not self.kl or (self.temperature > 0 and self.data is None),
            f"eval.kl is a mean over replies that are sampled, but temperature is {self.temperature}"
            f"{' and eval.data is read' if self.data else ''}. Use temperature 1 and play, or leave it out.",
        )
        require(
            not self.best or self.best.startswith("eval/"),
            f"eval.best is {self.best!r}, but the best checkpoint must be chosen by a held-out metric, never by the "
            "training reward: name one that starts with eval/, such as eval/success.",
        )
        require(
            not self.best or self.every > 0,
            f"eval.best is {self.best!r}, but eval.every is 0, so nothing would measure it. Set eval.every, or drop "
            "eval.best.",
        )
        require(
            self.env is None or self.data is None,
            "eval has env (to play) and data (to read), but an evaluation does one of them. Drop one.",
        )


@dataclass(frozen=True, kw_only=True)
class Success:
    """When a rollout counts as a success: a named part against a threshold, never a shaped sum."""

    part: str
    at_least: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who reads each reply beside what came next, and gives a score (the part `judge`) and hints for a teacher."""

    who: Any
    """`file.py:function`, a model's directory or hub id, or a server that speaks OpenAI's protocol: http://…/v1."""
    model: str = ""
    """Of a server: which of its models."""
    votes: int = 1
    """How often it is asked about each reply; the majority decides."""
    temperature: float = 0.6
    """Of a model's answers."""
    max_tokens: int = 512
    """Longest answer of a model, in tokens."""
    timeout: float = 60.0
    """Seconds after which a silent server has failed."""
    ask: str = ""
    """Other words for the question to a model, with the slots {reply}, {next} and {role}. Empty: the usual ones."""

    def __post_init__(self) -> None:
        require(bool(self.who), "judge.who is empty. Use file.py:function, a model, or http://…/v1.")
        for name in ("votes", "max_tokens", "timeout"):
            require(getattr(self, name) > 0, f"judge.{name} is {getattr(self, name)}, but must be above 0.")
        require(self.temperature >= 0, f"judge.temperature is {self.temperature}, but cannot be negative.")
        require(
            not self.ask or ("{reply}" in self.ask and "{next}" in self.ask),
            f"judge.ask is {self.ask!r:.80}, but must show the judge {{reply}} and {{next}}.",
        )
        require(
            bool(self.model) == self.served,
            f"judge.model is {self.model!r} and judge.who {self.who}: a server is asked for one of its models by name, "
            "and nothing else is. Set both, or only who.",
        )

    @property
    def served(self) -> bool:
        return isinstance(self.who, str) and self.who.startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Reward models that score the policy's replies, as a part `reward_model` of the reward.

    Of several, each is also a part by itself, `reward_model/NAME`, which counts nothing unless `rewards` names it: one
    may be maximised and another watch.
    """

    who: str | tuple[str, ...]
    """Directories, runs or stages that trained one, or the name of an earlier stage of this recipe; several are an
    ensemble."""
    combine: Literal["mean", "min", "penalised"] = "mean"
    """How several become one; penalised: the mean less `penalty` times their variance."""
    penalty: float = 0.5
    """What a disagreement costs. Coste et al. take 0.5 for the best of n and 0.1 for PPO."""
    steps: Literal["", "min", "mean", "product", "last"] = ""
    """Of models that process_reward trained: score every line of a reply by its probability, and make one number of
    these (a long reply can raise the mean, and only lower min and product). Empty: what the last token says, as a
    logit."""
    standardise: bool = True
    """Shift and scale each so that replies of the stage's start model, drawn at every start, have mean 0 and standard
    deviation 1."""

    def __post_init__(self) -> None:
        require(bool(self.models), "reward_models.who is empty. Name a run that trained a reward model, or several.")
        require(
            len(set(self.models)) == len(self.models),
            f"reward_models.who has {', '.join(self.models)}: twice the same says nothing new. Name each once.",
        )
        require(
            "spread" not in self.names or len(self.models) == 1,
            "reward_models.who has a model called spread, and so is how far models disagree. Rename that stage.",
        )
        require(self.penalty >= 0, f"reward_models.penalty is {self.penalty}, which would pay for disagreement.")

    @property
    def models(self) -> tuple[str, ...]:
        return (self.who,) if isinstance(self.who, str) and self.who else tuple(self.who)

    @property
    def names(self) -> tuple[str, ...]:
        """The last word of each path, or as many as tell them apart."""
        paths = [PurePath(who).parts for who in self.models]
        tails = (tuple("/".join(parts[-words:]) for parts in paths) for words in range(1, max(map(len, paths)) + 1))
        return next((names for names in tails if len(set(names)) == len(names)), tuple(self.models))
