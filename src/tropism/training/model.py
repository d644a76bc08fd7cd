"""The policy: a causal language model of transformers, its tokenizer, its precision, and its forward pass.

Dropout is off throughout: the sampler and the loss must speak about one distribution.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.config import Model, Train
from tropism.errors import ConfigError
from tropism.maths.linear import PLAIN, use
from tropism.maths.logp import everything, placed, predicting
from tropism.maths.speak import said
from tropism.record import last_checkpoint, stages_of
from tropism.rollout.render import Render
from tropism.rollout.sampler import Local
from tropism.signals.frozen import Forward
from tropism.training import compiled
from tropism.training import lora as adapters
from tropism.training.packed import inputs, micro_batches, spread, used, worth
from tropism.training.packed import use as read_packed
from tropism.types import Batch, Output

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 1024}
WIDE = {"initializer_range": 0.1}  # the usual 0.02 is meant for widths in the thousands; at 128 learning starts late
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("qwen3", SIZES | GROUPED | WIDE),
    "tiny-llama": ("llama", SIZES | GROUPED | WIDE),
    "tiny-mistral": ("mistral", SIZES | GROUPED | WIDE | {"sliding_window": None}),
    "tiny-gemma": ("gemma", SIZES | GROUPED | WIDE),
    "tiny-gpt2": ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 1024} | WIDE),
}
"""Preset -> (model type, configuration). About half a million parameters each, over bytes."""

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Policy:
    """The model that learns.

    Attributes:
        module: the transformers model, weights in float32.
        words: renders prompts for it.
        sampler: decodes with `module` itself.
        context: longest sequence it can read, in tokens.
        critic: a value head, where a method learns from one: on the policy's own states, or a model of its own.
    """

    critic: Any = None

    def __init__(self, module: Any, tokenizer: Any, settings: Model, seed: int = 0) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.device = device_of(settings.device)
        self.module: Any = module.to(self.device).float().eval()
        if settings.lora is not None and settings.lora.quantize:
            adapters.quantize(self.module, getattr(torch, settings.compute))
        if settings.lora is not None:
            adapters.add_adapter(self.module, settings.lora, settings.path, seed)
            self.module.eval()
        use(self.module)
        if settings.gradient_checkpointing:
            recompute(self.module)
        self.context = int(getattr(module.config, "max_position_embeddings", 1 << 30))
        self.words = Render(tokenizer, stop_ids(module, tokenizer))
        self.sampler = Local(self.module, self.words.stop_ids, self.context, self.precision)
        read_packed(self.module, self.precision)
        if settings.compile:
            compiled.use(self.module, self.precision)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast of every forward pass, of sampler and trainer alike."""
        if self.settings.compute == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def forward(self, batch: Batch, temperature: float = 1.0, *, top_k: int = 0, module: Any = None) -> Output:
        """Log-probs, entropies and (at `batch.topk_ids`) top-K log-probs of the tokens the policy chose; with a critic,
        the values of the states they were chosen in.

        Rows are padded on the right, so causal attention alone keeps padding out of every real token; the head runs
        only where the next token is an action.

        Args:
            top_k: how many of the likeliest tokens to return; their log-probs too, where the batch names no tokens.
            module: other weights of the same architecture.
        """
        mask, module = batch.action_mask, module or self.module
        critic = self.critic if module is self.module else None
        at = predicting(mask)
        tokens = batch.tokens.flatten()[at + 1]
        ids = None if batch.topk_ids is None else batch.topk_ids.flatten(0, 1)
        if ids is not None:
            ids = ids[:1].expand(len(at), -1) if everything(ids, ids.shape[1]) else ids[at + 1]
        with self.precision():
            alone = isinstance(critic, OwnCritic)
            hidden, states, head = self.states(module, batch, at, critic is not None and not alone)
            told = said(states, tokens, temperature, **head, ids=ids, top_k=top_k)
        found = {name: placed(value, mask) for name, value in vars(told).items() if value is not None}
        if critic is not None:
            value = critic(batch.tokens) if alone else critic(hidden.float()).view(batch.tokens.shape)
            found["value"] = placed(value.flatten()[at], mask)
            found["last_value"] = value.gather(1, batch.length[:, None] - 1)[:, 0]
        return Output(**found)

    def states(self, module: Any, batch: Batch, at: Tensor, hidden: bool) -> tuple[Any, Tensor, dict[str, Any]]:
        """(last hidden state [N T, H] if asked for; what speaks at these flat places, [M, H] or [M, V]; the head that
        makes logits of it, or nothing where these are the logits)."""
        packed = worth(batch) if self.packs(module) else None
        given: dict[str, Any] = {"input_ids": batch.tokens} if packed is None else inputs(packed)
        at = at if packed is None else packed.place[at]
        if self.parted:
            last = module.base_model(**given, use_cache=False).last_hidden_state.flatten(0, 1)
            head, states = module.get_output_embeddings(), last.index_select(0, at)
            plain = type(head) in PLAIN
            parts = {"weight": head.weight, "bias": head.bias} if plain else {}
            return spread(last, packed) if hidden else None, states if plain else head(states), parts
        width = given["input_ids"].shape[1]
        columns, index = (at % width).unique(return_inverse=True)
        out = module(**given, use_cache=False, logits_to_keep=columns, output_hidden_states=hidden)
        last = spread(out.hidden_states[-1].flatten(0, 1), packed) if hidden else None
        return last, out.logits[at // width, index], {}

    def packs(self, module: Any = None) -> bool:
        """Whether what rows begin with in common is computed once, by the policy or by other weights."""
        return self.settings.pack and used(module or self.module)

    @cached_property
    def parted(self) -> bool:
        """The model is its backbone and then its head, nothing more: some scale or cap the logits afterwards."""
        with torch.no_grad():
            probe = torch.arange(4, device=self.device)[None]
            whole = self.module(input_ids=probe, use_cache=False).logits
            last = self.module.base_model(input_ids=probe, use_cache=False).last_hidden_state
            return torch.equal(whole, self.module.get_output_embeddings()(last))

    def measuring(self, temperature: float, train: Train, module: Any = None, *, start: bool = False) -> Forward:
        """The same without gradient, over any number of rows: padded [N, T] as the batch.

        Args:
            start: with the adapter off, which is the model as it started.
        """

        @torch.no_grad()
        def measure(batch: Batch, top_k: int = 0) -> Output:
            whole: dict[str, Tensor] = {}
            if len(batch) == 0:  # a process that no group is left for
                blank = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
                values = {"value": blank, "last_value": blank[:, 0]} if self.critic is not None and not module else {}
                return Output(logp=blank, entropy=blank, **values)
            for part in micro_batches(batch, train.micro_tokens, packed=self.packs(module)):
                width = int(batch.length[part].max())
                with adapters.switched_off(self.module) if start else contextlib.nullcontext():
                    said = self.forward(batch[part].narrow(width), temperature, top_k=top_k, module=module)
                for name, value in vars(said).items():
                    if value is not None:
                        shape = (len(batch), *batch.tokens.shape[1 : value.ndim], *value.shape[2:])
                        into = whole.setdefault(name, value.new_zeros(shape))
                        into[(part, slice(width)) if value.ndim > 1 else part] = value
            return Output(**whole)

        return measure

    def add_critic(self, bias: bool = True) -> None:
        """A value head on the last hidden state, 0 everywhere at the start. A reward model's has no bias: in a pair it
        would cancel, and a sequence classifier of transformers has none."""
        self.critic = torch.nn.Linear(self.module.config.hidden_size, 1, bias=bias, device=self.device)
        for parameter in self.critic.parameters():
            torch.nn.init.zeros_(parameter)

    def add_own_critic(self, classifier: Any) -> None:
        """A model of its own, which starts as a reward model: the value of a state is the score of what was said."""
        self.critic = OwnCritic(classifier.base_model, classifier.score).to(self.device)

    def save(self, path: Path) -> None:
        """A directory that `from_pretrained` loads, in the dtype of `model.save`, readable by everybody.

        An adapter on a model that is itself an adapter's directory needs that model whole: it is written once, into the
        folder adapters-base beside.
        """
        dtype, lora, base = getattr(torch, self.settings.save), self.settings.lora, path.parent / "adapters-base"
        self.tokenizer.save_pretrained(path)
        if lora is not None:
            if (chained := adapters.on_adapter(self.module)) and not base.exists():
                partial = path.parent / ".partial-adapters-base"
                self.save_whole(partial, torch.float32, adapter=False)
                os.replace(partial, base)
            into = path / "adapter" if lora.merge else path
            adapters.save_adapter(self.module, into, dtype, base if chained else None)
        if lora is not None and not lora.merge:
            readable(path)
            return
        self.save_whole(path, dtype)

    def save_whole(self, path: Path, dtype: torch.dtype, adapter: bool = True) -> None:
        """The weights as those of a plain model, with what an adapter has learned or without it."""
        cast: dict[int, Tensor] = {}  # tied weights stay one tensor
        whole = adapters.merged_state(self.module, adapter).items()
        state = {name: cast.setdefault(value.data_ptr(), value.to(dtype)) for name, value in whole}
        with adapters.as_plain(self.module):
            self.module.save_pretrained(path, state_dict=state)
        config = copy.deepcopy(self.module.config)
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(path)
        readable(path)


def readable(path: Path) -> None:
    """By everybody, whatever transformers thinks of it."""
    for file in path.iterdir():
        file.chmod(0o755 if file.is_dir() else 0o644)


class OwnCritic(torch.nn.Module):
    """[N, T] ids -> [N, T] values, by weights that are not the policy's."""

    def __init__(self, backbone: Any, head: torch.nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone.eval(), head

    def forward(self, tokens: Tensor) -> Tensor:
        values: Tensor = self.head(self.backbone(input_ids=tokens, use_cache=False).last_hidden_state.float())[..., 0]
        return values


def recompute(module: Any) -> None:
    """Keep a layer's input instead of its activations, and run it again in the backward pass.

    transformers' own switch works only in training mode, which would turn dropout on and the sampler's cache off.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    def recomputing(kind: Any) -> Any:
        """A class and no closure on the layer: a copy of the module must run its own layers."""

        def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
            once = partial(kind.forward, layer)
            if not torch.is_grad_enabled():
                return once(*args, **kwargs)
            return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # nothing draws

        return type(kind.__name__, (kind,), {"forward": forward})

    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model.gradient_checkpointing is on, but {type(module).__name__} has no layers that can be recomputed. "
            "Switch it off, and lower train.micro_tokens if memory is short."
        )
    for layer in layers:
        layer.__class__ = recomputing(type(layer))


def load_policy(settings: Model, seed: int = 0) -> Policy:
    """Make a preset from its configuration (weights drawn from `seed`), or load a directory or hub id."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if settings.path in PRESETS and settings.lora is not None:
        raise ConfigError(
            f"model.path is the preset {settings.path}, whose weights are random, and an adapter on them learns "
            "little. Train a model first, in a run without model.lora, and name that run as model.path."
        )
    if settings.path in PRESETS:
        return Policy(*preset(settings.path, settings.shape, seed), settings)
    if settings.shape:
        raise ConfigError(
            f"model.shape changes a preset, but model.path is {settings.path!r}, whose shape is given by its weights. "
            f"Drop model.shape, or start from a preset: {', '.join(PRESETS)}."
        )
    settings = replace(settings, path=trained(settings.path))
    return Policy(*pretrained(settings.path), settings, seed)


def preset(name: str, shape: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) of a preset with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = PRESETS[name]
    tokenizer = byte_tokenizer()
    known = AutoConfig.for_model(kind).to_dict()
    unknown = [key for key in shape if key not in known]
    if unknown:
        raise ConfigError(f"model.shape.{unknown[0]} is not a setting of {kind}. It has: {', '.join(sorted(known))}.")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, **({"vocab_size": len(tokenizer)} | special | sizes | dict(shape)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config)
    module.generation_config.eos_token_id = tokenizer.eos_token_id
    return module, tokenizer


def byte_tokenizer() -> Any:
    """Byte-level BPE without merges: a token per byte, so every text round-trips; a mark per role, one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{role}|>" for role in ROLES]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pretrained(path: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a local directory, hub id, run or stage; both are needed, and said so."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(path)
    if (os.sep in path or path.startswith(".")) and not local.is_dir() and path.count("/") != 1:
        raise ConfigError(f"model.path is {path!r}, but there is no such directory. Presets: {', '.join(PRESETS)}.")
    try:
        load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        module = adapters.with_adapter_merged(path, load) if (local / adapters.CONFIG).exists() else load(path)
    except Exception as error:  # somebody else's files raise anything
        raise ConfigError(f"model.path {path!r} could not be loaded: {first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes from no files
            raise ValueError("its vocabulary is empty.")
    except Exception as error:
        raise ConfigError(
            f"{path} has a model but no tokenizer that can be loaded, so no prompt can be given to it: "
            f"{first_line(error)} Copy tokenizer.json and tokenizer_config.json into the directory."
        ) from error
    return module, tokenizer


def weights_of(path: str) -> int:
    """How many weights a model has that `load_policy` would load; none is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = adapters.base_of(trained(path))
    try:
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(found)).num_parameters())
    except Exception as error:  # somebody else's files raise anything
        raise ConfigError(f"{path!r} could not be opened: {first_line(error)}") from error


def trained(path: str) -> str:
    """A run or one of its stages stands for its last checkpoint; any other path for itself."""
    local = Path(path)
    if not local.is_dir() or (local / "config.json").exists() or (local / adapters.CONFIG).exists():
        return path
    runs = stages_of(local) if any((*local.glob("config.yaml"), *local.glob("*/config.yaml"))) else []
    end = last_checkpoint(runs)
    if end is None:
        raise ConfigError(
            f"{path} holds neither a model (config.json) nor a run with a checkpoint. Name a directory that does."
        )
    return str(end)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop_ids(module: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: the tokenizer's first, then those of the generation config."""
    found = [tokenizer.eos_token_id]
    given = getattr(module.generation_config, "eos_token_id", None)
    found += given if isinstance(given, list) else [given]
    return list(dict.fromkeys(n for n in found if n is not None))


def device_of(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises whatever its backend does
            raise ConfigError(
                f"model.device is {name!r}, which cannot be used here: {first_line(error)} Use auto, or cpu."
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
