"""Every setting of a run: frozen, keyword-only, checked where it is declared. No I/O, nothing heavy loaded.

`recipe.py` builds these from YAML and the command line; the text under a field is its help.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tropism.errors import ConfigError
from tropism.sections import Data as Data
from tropism.sections import Eval as Eval
from tropism.sections import Judge as Judge
from tropism.sections import Learned as Learned
from tropism.sections import Named as Named
from tropism.sections import Sampled as Sampled
from tropism.sections import Success as Success
from tropism.sections import Told as Told
from tropism.sections import require


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train a low-rank adapter and leave the model's own weights as they are."""

    rank: int = 16
    """Of the update of each weight matrix."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of layers, such as q_proj. Empty: every linear layer but the head."""
    quantize: bool = False
    """Hold the model's own weights in 4 bits (QLoRA); needs bitsandbytes. A checkpoint that is an adapter is later put
    on weights that are not rounded; one that is merged computes what was trained."""
    merge: bool = False
    """Checkpoints are whole models with the adapter merged in; the adapter itself is then in their folder adapter."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank is {self.rank}, but must be at least 1. 16 is usual.")
        require(0 < self.alpha < math.inf, f"lora.alpha is {self.alpha}, but must be positive and finite.")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The policy: what it is made from and how it computes."""

    path: str = "tiny"
    """A preset (tiny, tiny-llama, tiny-mistral, tiny-gemma, tiny-gpt2), a local model directory, a hub id, or a run or
    one of its stages, whose last checkpoint is meant."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of a preset's configuration, such as hidden_size: 256."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward passes. Weights and optimizer are float32 either way."""
    save: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in checkpoints; resume keeps float32 beside them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""
    pack: bool = True
    """Compute what rows of a batch begin with in common once, and no padding, where the model can be run so."""
    compile: bool = False
    """Compile norms and MLPs by torch.compile: some seconds at the start, sooner in bfloat16. Not with an adapter."""
    lora: Lora | None = None
    """An adapter to train instead of the whole model."""

    def __post_init__(self) -> None:
        require(
            not (self.compile and self.lora),
            "model.compile is on and there is an adapter, model.lora, whose layers it cannot read. Drop either.",
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rollouts are drawn."""

    groups: int = 16
    """Tasks per step."""
    group_size: int = 8
    """Rollouts per task."""
    temperature: float = 1.0
    """Every log-probability of the run is of softmax(logits / temperature)."""
    max_tokens: int = 256
    """Longest reply, in tokens."""
    max_turns: int = 64
    """Longest episode, in replies of all seats together."""
    top_p: float = 1.0
    top_k: int = 0
    contrast_on: Literal["reward", "success"] = "reward"
    """What must differ between siblings for a method that needs contrast."""
    max_draws: int = 4
    """How many times the step's tasks may be drawn to fill a batch that needs contrast."""
    ahead: bool = False
    """Play and score the next batch while this one trains: sooner where scoring is slow, and one step off-policy, for
    which the method's truncated weight corrects."""
    reward_workers: int = 0
    """Processes that call the reward functions, for those that compute long in Python; 0: the run's own process."""

    def __post_init__(self) -> None:
        require(
            self.temperature > 0,
            f"sampling.temperature is {self.temperature}, but training needs samples, not the argmax. "
            "Use 1.0; for greedy evaluation set eval.temperature = 0 instead.",
        )
        for name in ("groups", "group_size", "max_tokens", "max_turns", "max_draws"):
            require(getattr(self, name) >= 1, f"sampling.{name} is {getattr(self, name)}, but must be at least 1.")
        require(self.reward_workers >= 0, f"sampling.reward_workers is {self.reward_workers}, but must be at least 0.")
        require(
            self.top_p == 1.0 and self.top_k == 0,
            f"sampling.top_p is {self.top_p} and top_k {self.top_k}, but then tokens are drawn from another "
            "distribution than the one the loss differentiates. Use top_p = 1 and top_k = 0 in training.",
        )


BATCHES = 100
"""Rollout batches of a stage that does not say how many."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How the weights move, and what is kept."""

    steps: int = 0
    """Online: rollout batches; 0: 100. Offline: optimizer steps; 0: as many as `epochs` passes over the rows take."""
    batch: int = 64
    """Offline: rows (pairs count once) per optimizer step."""
    epochs: int = 1
    """Online: passes over each rollout batch. Offline: over the rows, where steps is not given."""
    mini_batches: int = 1
    """Online: optimizer steps per pass."""
    micro_tokens: int = 2048
    """Tokens of one forward pass; see model.pack. Splits the sum only; bounds memory. 0: 512 to 8192, whichever is
    fastest where the run starts; another start may choose another size and differ by rounding, a resume may not."""
    skip: bool = True
    """Pass nothing forward whose weight, or advantage, makes its gradient 0: the same update, sooner."""
    learning_rate: float = 1e-4
    critic_learning_rate: float | None = None
    """Of a value head, on the same schedule; None: learning_rate. At a pretrained model's 1e-6 it would not learn."""
    warmup: int = 0
    """Optimizer steps of linear warm-up from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Shape of the learning rate from warm-up to the end."""
    final: float = 0.0
    """Where decay ends, as a share of learning_rate."""
    weight_decay: float = 0.0
    """On matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    """0 switches clipping off."""
    save_every: int = 25
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept, beside the best."""
    record_every: int = 1
    """Steps between recorded rollouts; metrics are recorded at every step."""
    failure_limit: float = 0.1
    """Share of a step's rollouts that may fail before the run stops."""
    kl_budget: float | None = None
    """Online: stop when the policy is more nats per episode than this away from the model that it started as."""
    patience: int = 20
    """Steps without any signal (no token with credit, or no update) before the run stops and says why."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default. Part of what makes a run repeat bit for bit."""

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "mini_batches", "patience", "record_every", "keep"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}, but must be at least 1.")
        for name in (
            "steps",
            "warmup",
            "save_every",
            "max_grad_norm",
            "weight_decay",
            "threads",
            "final",
            "micro_tokens",
        ):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}, but cannot be negative.")
        require(
            0 < self.learning_rate < math.inf,
            f"train.learning_rate is {self.learning_rate}, but must be positive and finite.",
        )
        require(
            self.critic_learning_rate is None or 0 < self.critic_learning_rate < math.inf,
            f"train.critic_learning_rate is {self.critic_learning_rate}, but must be positive and finite.",
        )
        require(
            self.kl_budget is None or self.kl_budget > 0,
            f"train.kl_budget is {self.kl_budget}, but the policy is 0 nats away before it has learned. Use 10, say.",
        )
        require(self.final <= 1, f"train.final is {self.final}, but is a share of learning_rate: use 0 to 1.")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"train.betas is {list(self.betas)}, but each is how much AdamW remembers: at least 0 and below 1.",
        )
        require(
            0 <= self.failure_limit <= 1,
            f"train.failure_limit is {self.failure_limit}, but it is a share of the rollouts: use 0 to 1.",
        )


def kept_by(data: Data | None) -> str:
    """What is kept of sampled rows."""
    return data.sampled.keep if data is not None and data.sampled is not None else ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One method on one source of data. It starts from the model that the stage before it left."""

    name: str
    method: Any
    """A method object: `GRPO(clip_high=0.28)`; in YAML `{grpo: {clip_high: 0.28}}`."""
    critic: str = ""
    """A reward model (as in reward_models.who) that the method's critic starts as, with weights of its own. Empty: a
    value head on the policy."""
    start: str = ""
    """An earlier stage, whose model this one starts from. Empty: the stage before, or the recipe's model."""
    env: Named | None = None
    """Online: where tasks come from."""
    data: Data | None = None
    """Offline: what to learn from."""
    rewards: Mapping[Any, float] = field(default_factory=dict)
    """Part or scorer -> weight. Scorers are registered names or `file.py:function`; empty: the environment's own."""
    success: Success | None = None
    judge: Judge | None = None
    """Online: who scores each turn by what came next."""
    reward_models: Learned | None = None
    """Online: who scores each reply as a whole."""
    sampling: Sampling = field(default_factory=Sampling)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)

    @property
    def scored(self) -> Named | None:
        """Where replies are scored: what is played, or what rows are sampled from."""
        return self.data.sampled.env if self.data and self.data.sampled else self.env

    @property
    def played(self) -> Named | None:
        """The same, else where replies are scored at evaluations."""
        return self.scored or self.eval.env

    def check_rows(self, data: Data | None) -> None:
        """Can the method learn from such rows?"""
        wanted, held = self.method.needs.data, {kept_by(data)} & {"pairs", "labels"}
        if "steps" in wanted and held == {"labels"}:  # a whole answer is a single step
            held = wanted
        if (wanted and (data is None or not (data.path or wanted <= held))) or (held and not wanted >= held):
            raise ConfigError(
                f"{type(self.method).__name__} learns from {' and '.join(wanted) or 'single answers'}, which only data "
                f"can hold, but stage {self.name!r} has {' and '.join(held) or 'none'}. Use data: {{path: …}}, or "
                f"data: {{sampled: {{keep: {' or '.join(wanted).replace('steps', 'labels') or 'best'}, …}}}}."
            )

    def __post_init__(self) -> None:
        require(
            (self.env is None) != (self.data is None),
            f"stage {self.name!r} needs env (to play) or data (to read), and not both.",
        )
        needs = self.method.needs
        if self.env is not None and "siblings" in needs.sampling and self.sampling.group_size < 2:
            method = type(self.method).__name__
            raise ConfigError(
                f"{method} compares a rollout with its siblings, but sampling.group_size is "
                f"{self.sampling.group_size}: every advantage would be 0 and nothing would be learned. Use "
                "group_size >= 2 (8 is a good start)."
            )
        wanted, kept = self.method.needs.data, kept_by(self.data)
        self.check_rows(self.data)
        if self.eval.data is not None:
            self.check_rows(self.eval.data)
        require(
            self.eval.data is None or not self.eval.data.balance,
            "eval.data.balance would hide what held-out rows say about length (accuracy/longer, accuracy/shorter). "
            "Drop it there.",
        )
        require(
            self.data is None or not self.data.balance or "pairs" in wanted,
            f"data.balance is about pairs, but {type(self.method).__name__} does not learn from pairs. Drop it.",
        )
        require(
            not {kept, kept_by(self.eval.data)} & {"success", "labels"} or self.success is not None,
            f"stage {self.name!r} samples rows and keeps success or labels, but does not say what a success is. Add "
            "success: {part: NAME, at_least: 1}.",
        )
        require(
            self.train.kl_budget is None or self.env is not None,
            f"stage {self.name!r} has train.kl_budget, but reads data: how far the policy goes is not sampled there.",
        )
        if self.data is not None and self.method.needs.sampling:
            raise ConfigError(
                f"{type(self.method).__name__} learns from its own rollouts, but stage {self.name!r} has data and no "
                "env. Use env: {dataset: {path: …}} to sample replies to the prompts of a data set."
            )
        require(
            self.data is None or self.train.mini_batches == 1,
            f"train.mini_batches is {self.train.mini_batches}, but is about rollout batches, and stage {self.name!r} "
            "reads data, train.batch rows per optimizer step. Leave it at 1.",
        )
        require(
            self.data is None or not self.train.steps or self.train.epochs == 1,
            f"train.steps is {self.train.steps} and train.epochs {self.train.epochs}, but stage {self.name!r} reads "
            "data, and each of them says how long. Drop one.",
        )
        if self.env is not None and not self.train.steps:
            object.__setattr__(self, "train", replace(self.train, steps=BATCHES))
        require(
            "mismatch" not in needs.measured or self.train.batch > 1,
            f"train.batch is {self.train.batch}, but {type(self.method).__name__} compares each answer with that to "
            "another row's prompt. Use 2 or more; 32 is a good start.",
        )
        require(
            self.judge is None or self.scored is not None,
            f"stage {self.name!r} has a judge, but reads data, where nothing is scored. Drop judge, or play in an env.",
        )
        require(
            self.eval.data is None or self.data is not None,
            f"stage {self.name!r} plays, but eval.data has rows to read. Use eval.env, or leave it out.",
        )
        require(
            self.reward_models is None or self.played is not None,
            f"stage {self.name!r} has reward_models, but reads data, where nothing is scored. To train one, use "
            "method: reward_model; to watch the policy's replies, set eval.env.",
        )
        for name, weight in self.rewards.items():
            require(math.isfinite(weight), f"the weight of the reward {name} is {weight}, but must be finite.")
        if self.env is not None and self.train.mini_batches > self.sampling.groups:
            raise ConfigError(
                f"train.mini_batches is {self.train.mini_batches} but sampling.groups is {self.sampling.groups}: some "
                "optimizer steps would have nothing to learn from. Use fewer mini-batches, or more groups."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: one model through one or more stages."""

    name: str
    stages: tuple[Stage, ...]
    model: Model = field(default_factory=Model)
    seed: int = 0
    output: str = "runs"
    """Folder of all runs; this one is written to output/name."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    processes: int | Literal["auto"] = "auto"
    """That train together on a CPU, one thread each; auto: one per thread where that was measured to be faster."""

    def __post_init__(self) -> None:
        require(bool(self.stages), f"recipe {self.name!r} has no stages, so there is nothing to do.")
        require(
            self.processes == "auto" or self.processes > 0,
            f"processes is {self.processes}, but somebody has to train. Use 1, more, or auto.",
        )
        require(
            self.processes in (1, "auto") or not any(stage.sampling.ahead for stage in self.stages),
            f"processes is {self.processes} and a stage has sampling.ahead, but what is played ahead is played by one "
            "process, beside the one that trains. Use processes: 1, or drop sampling.ahead.",
        )
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"recipe {self.name!r} has two stages of one name: {', '.join(names)}.")
        for number, stage in enumerate(self.stages):
            require(
                not stage.start or stage.start in names[:number],
                f"stage {stage.name!r} starts from {stage.start!r}, but the stages before it are: "
                f"{', '.join(names[:number]) or 'none'}. Name one of them, or leave start out.",
            )
