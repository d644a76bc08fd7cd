"""Every key that a recipe can hold, and what is said about one that it cannot."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from tropism.config import Named, Recipe, Stage
from tropism.errors import ConfigError

RECIPE = tuple(f.name for f in dataclasses.fields(Recipe))
STAGE = tuple(f.name for f in dataclasses.fields(Stage) if f.name != "name")

PEERS = {
    # TRL
    "num_generations": "sampling.group_size",
    "per_device_train_batch_size": "sampling.groups times sampling.group_size (train.batch offline)",
    "per_device_eval_batch_size": "not needed: train.micro_tokens bounds memory",
    "gradient_accumulation_steps": "not needed: train.micro_tokens splits a step without changing it",
    "generation_batch_size": "sampling.groups times sampling.group_size",
    "steps_per_generation": "train.mini_batches",
    "num_iterations": "train.epochs",
    "max_completion_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "max_prompt_length": "not needed: a prompt that does not fit the model is a recorded failure, never cut",
    "max_length": "not needed: the model's own context is the limit",
    "epsilon": "method.clip_low and method.clip_high",
    "epsilon_high": "method.clip_high",
    "delta": "method.dual_clip",
    "cliprange": "method.clip_low and method.clip_high",
    "cliprange_value": "method.value_clip",
    "vf_coef": "method.value_weight",
    "gamma": "method.discount",
    "lam": "method.trace",
    "beta": "method.kl",
    "loss_type": "method (grpo, dapo, dr_grpo, cispo are methods of their own)",
    "scale_rewards": "method.scale",
    "vllm_importance_sampling_cap": "method.truncate",
    "reward_funcs": "rewards ({file.py:function: weight})",
    "reward_weights": "rewards ({file.py:function: weight})",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup, in optimizer steps",
    "lr_scheduler_type": "train.decay",
    "lr": "train.learning_rate",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "save_total_limit": "train.keep",
    "logging_steps": "not needed: metrics are recorded at every step",
    "eval_steps": "eval.every",
    "eval_strategy": "eval.every",
    "metric_for_best_model": "eval.best",
    "output_dir": "output",
    "run_name": "name",
    "resume_from_checkpoint": "tropism train RECIPE --resume",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.compute",
    "dtype": "model.compute",
    "bf16": "model.compute: bfloat16",
    "fp16": "model.compute: bfloat16 (float16 is not supported)",
    "dataset_name": "data.path",
    "dataset_train_split": "data.split",
    # verl
    "rollout.n": "sampling.group_size",
    "rollout.temperature": "sampling.temperature",
    "rollout.top_p": "sampling.top_p",
    "adv_estimator": "method",
    "critic.optim.lr": "train.critic_learning_rate",
    "norm_adv_by_std_in_grpo": "method.scale",
    "loss_agg_mode": "method.average",
    "clip_ratio": "method.clip_low and method.clip_high",
    "clip_ratio_low": "method.clip_low",
    "clip_ratio_high": "method.clip_high",
    "clip_ratio_c": "method.dual_clip",
    "kl_loss_coef": "method.kl",
    "kl_coef": "method.kl",
    "use_kl_loss": "method.kl, above 0",
    "train_batch_size": "sampling.groups",
    "train_files": "data.path",
    "max_response_length": "sampling.max_tokens",
    "ppo_mini_batch_size": "train.mini_batches, a number of parts",
    "ppo_micro_batch_size": "train.micro_tokens",
    "ppo_micro_batch_size_per_gpu": "train.micro_tokens",
    "ppo_max_token_len_per_gpu": "train.micro_tokens",
    "ppo_epochs": "train.epochs",
    "grad_clip": "train.max_grad_norm",
    "lr_warmup_steps": "train.warmup",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "total_training_steps": "train.steps",
    "total_epochs": "train.steps",
    "save_freq": "train.save_every",
    "test_freq": "eval.every",
    "logger": "report_to",
    "experiment_name": "name",
    "default_local_dir": "output",
    "custom_reward_function": "rewards ({file.py:function: weight})",
}
"""Keys of TRL and verl -> ours. Where verl's last word alone would be unclear, the last two."""


def known(cls: type) -> list[str]:
    """Dotted keys of a section and of the sections within it."""
    found: list[str] = []
    for name, hint in get_type_hints(cls).items():
        within = [h for h in (hint, *get_args(hint)) if isinstance(h, type) and dataclasses.is_dataclass(h)]
        found.append(name)
        found += [f"{name}.{key}" for inner in within if inner not in (Named, Stage) for key in known(inner)]
    return found


def unknown(here: str, value: Any, candidates: Sequence[str]) -> ConfigError:
    """The answer to a dotted key that does not exist: our name for it, or the nearest one there is."""
    for leaf, _ in leaves(value, here):
        parts = leaf.split(".")
        answers = [PEERS[tail] for i in range(len(parts)) if (tail := ".".join(parts[i:])) in PEERS]
        if answers:
            return ConfigError(f"there is no key {leaf}. Here it is {answers[0]}.")
    section, _, last = here.rpartition(".")
    by_leaf: dict[str, list[str]] = {}
    for key in candidates:
        by_leaf.setdefault(key.rpartition(".")[2], []).append(key)
    near = by_leaf.get(last, []) or difflib.get_close_matches(here, candidates, 1, 0.75)
    near = near or [key for leaf in difflib.get_close_matches(last, by_leaf, 1) for key in by_leaf[leaf]]
    if near:
        return ConfigError(f"there is no key {here}. Did you mean {either(near[:4])}?")
    inside = [key for key in candidates if key.rpartition(".")[0] == section]
    return ConfigError(f"there is no key {here}. There is: {', '.join(dict.fromkeys(inside or candidates))}.")


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested settings; stages go by their names."""
    if where == "stages" and isinstance(value, list):
        for stage in value:
            yield from leaves(stage, stage["name"])
    elif isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def either(names: Sequence[str]) -> str:
    """`a, b or c`"""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def shown(value: Any) -> str:
    """A value inside a sentence: text in quotes."""
    return repr(value) if isinstance(value, str) else str(value)
