"""Low-rank adapters by peft, inside the very module that samples and learns. Hu et al. 2021, arXiv:2106.09685.

    W x  ->  W x + (alpha / rank) B A x        W frozen; A [rank, in], B [out, rank] learned, B 0 at the start

There is no second model: the reference is the same module with its adapter off, and the sampler, which decodes with the
module itself, cannot miss the adapter.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.config import Lora
from tropism.errors import ConfigError

CONFIG = "adapter_config.json"
MARK = "lora_"
"""In the name of every weight of an adapter, and of no other."""


def add_adapter(module: Any, lora: Lora, base: str, seed: int) -> None:
    """Freeze the module and put an adapter into its linear layers.

    Args:
        base: the path that the module was loaded from; who loads the adapter later needs it.
        seed: of the first matrices.
    """
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    targets: Any = list(lora.targets) or "all-linear"
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets, "task_type": "CAUSAL_LM"}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # GPT-2's transposed layers, which peft then handles
            torch.manual_seed(seed)
            module.add_adapter(peft().LoraConfig(**settings))
    except ValueError as error:
        raise ConfigError(f"model.lora.targets is {', '.join(lora.targets)}: {error}") from error
    module.peft_config["default"].base_model_name_or_path = base  # transformers writes where its base came from


def quantize(module: Any, compute: torch.dtype) -> None:
    """Hold every linear layer but the head in 4 bits, NF4 with constants that are quantised too; what an adapter learns
    is learned beside these. Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, sec. 3.

    Args:
        compute: what a layer computes in.
    """
    try:
        bnb: Any = importlib.import_module("bitsandbytes.nn")
    except ImportError as error:
        raise ConfigError(
            f"model.lora.quantize needs the package bitsandbytes: pip install 'tropism[qlora]' ({error})."
        ) from error
    head = module.get_output_embeddings()
    found = [(n, m) for n, m in module.named_modules() if type(m) is torch.nn.Linear and m is not head]
    if not found:
        raise ConfigError(f"{type(module).__name__} has no linear layers that could be held in 4 bits. Drop quantize.")
    for name, layer in found:
        kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
        held = bnb.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute, **kind)
        held.weight, held.bias = bnb.Params4bit(layer.weight.data, requires_grad=False, **kind), layer.bias
        held.support_avx512bf16_for_cpu = False  # it would round again, once the first reply is sampled
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, held.to(layer.weight.device))
    module.is_loaded_in_4bit = True  # peft asks


def dense(layer: Any) -> Tensor:
    """The weights of a layer as numbers, also where they are held in 4 bits."""
    if getattr(layer.weight, "quant_state", None) is None:
        weight: Tensor = layer.weight
        return weight
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"model.lora needs the package peft: pip install 'tropism[lora]' ({error}).") from error
    return peft


def adapted(module: Any) -> bool:
    return bool(getattr(module, "_hf_peft_config_loaded", False))


@contextmanager
def switched_off(module: Any) -> Iterator[None]:
    """The module as it was before it had an adapter."""
    if not adapted(module):
        yield
        return
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()


@contextmanager
def as_plain(module: Any) -> Iterator[None]:
    """transformers saves nothing but the adapter of a module that has one; here it saves what it is given."""
    had, module._hf_peft_config_loaded = adapted(module), False
    try:
        yield
    finally:
        module._hf_peft_config_loaded = had


def adapter_state(module: Any) -> dict[str, Tensor]:
    """The weights that learn."""
    return {name: value for name, value in module.state_dict().items() if MARK in name}


def moving_state(module: Any) -> dict[str, Tensor]:
    """What differs from the start: the adapter, or of a module without one all weights."""
    return adapter_state(module) if adapted(module) else dict(module.state_dict())


def follower_of(module: Any) -> Any:
    """A copy that can move by itself; frozen weights are shared, so that of an adapter only the adapter is copied."""
    frozen = [p for p in module.parameters() if not p.requires_grad] if adapted(module) else []
    return copy.deepcopy(module, {id(parameter): parameter for parameter in frozen}).requires_grad_(False)


def merged_state(module: Any, adapter: bool = True) -> dict[str, Tensor]:
    """Weights of a plain module that computes the same, or the same without its adapter; of a module without one its
    own."""
    state = {name.replace(".base_layer", ""): value for name, value in module.state_dict().items() if MARK not in name}
    state = {name: value for name, value in state.items() if ".weight." not in name}  # constants of 4-bit weights
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight = dense(layer.get_base_layer())
            state[f"{name}.weight"] = weight + layer.get_delta_weight("default").to(weight) if adapter else weight
        elif hasattr(getattr(layer, "weight", None), "quant_state") and not name.endswith(".base_layer"):
            state[f"{name}.weight"] = dense(layer)
    return state


def on_adapter(module: Any) -> bool:
    """Was the adapter put on what is an adapter's directory itself? peft loads one on a whole model only."""
    return (Path(module.peft_config["default"].base_model_name_or_path) / CONFIG).exists()


def save_adapter(module: Any, path: Path, dtype: torch.dtype, base: Path | None = None) -> None:
    """What `PeftModel.from_pretrained(base, path)` and transformers load.

    Args:
        base: where the model is that the adapter is on, if not where it was loaded from.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    state = {
        f"base_model.model.{name.replace('.default', '')}": value.to(dtype).contiguous()
        for name, value in adapter_state(module).items()
    }
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = module.peft_config["default"]
    told = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    told["inference_mode"] = True
    told |= {} if base is None else {"base_model_name_or_path": str(base.resolve())}
    (path / CONFIG).write_text(json.dumps(told, indent=1, default=str))


def load_adapter(module: Any, state: Mapping[str, Tensor]) -> None:
    """Put an adapter's own weights back."""
    mine = adapter_state(module)
    if mine.keys() != state.keys():
        raise ConfigError("the checkpoint's adapter has other layers than model.lora asks for: it cannot be resumed.")
    for name, value in mine.items():
        value.copy_(state[name])


def below(path: str) -> str:
    """What an adapter's directory is an adapter of."""
    return str(json.loads((Path(path) / CONFIG).read_text())["base_model_name_or_path"])


def base_of(path: str) -> str:
    """The model under all the adapters of a path, which is itself where it has none."""
    while (Path(path) / CONFIG).exists():
        path = below(path)
    return path


def with_adapter_merged(path: str, load: Any) -> Any:
    """What an adapter's directory stands for: its base, loaded by `load(path)`, with the adapter merged in."""
    under = below(path)
    base = with_adapter_merged(under, load) if (Path(under) / CONFIG).exists() else load(under)
    return peft().PeftModel.from_pretrained(base, path).merge_and_unload()
