"""What training takes in memory, whole, by an adapter, and by one on 4 bits: python bench/lora.py [--rank 16]

For a model of each size, its shape alone (nothing is allocated): bytes of the weights, of the gradients, of AdamW's two
averages, and of what else a method with a reference needs. Numbers are float32, 4 bytes, as this trainer holds them,
but for linear layers in 4 bits, which take half a byte, one byte per 64 weights and four per 256 of these (Dettmers et
al. 2023, arXiv:2305.14314, sec. 3); activations come on top, and are nearly the same for all.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tropism.config import Lora
from tropism.training.lora import add_adapter

SIZES = {
    "0.5 M (preset tiny)": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 262}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "0.6 B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151_936}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "8 B": {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "vocab_size": 151_936}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}


FOUR_BITS = 1 / 2 + (1 + 4 / 256) / 64
"""Bytes of a weight in 4 bits."""


def counted(shape: dict[str, object], lora: Lora | None) -> tuple[int, int, float]:
    """(weights, weights that learn, bytes of the weights) of a model of this shape."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", **{"tie_word_embeddings": True} | shape)
        )
        if lora is not None:
            add_adapter(module, lora, "", 0)
        head = module.get_output_embeddings()
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    weights, learning = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    if lora is None or not lora.quantize:
        return weights, learning, 4 * weights
    plain = [m for m in module.modules() if type(m) is torch.nn.Linear and m is not head and not m.weight.requires_grad]
    held = sum(layer.weight.numel() for layer in plain)
    return weights, learning, 4 * (weights - held) + FOUR_BITS * held


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    print("| model | way | learns | weights | gradients | AdamW | reference | all |\n" + "|---" * 8 + "|")
    for name, shape in SIZES.items():
        adapter = Lora(rank=given.rank)
        ways = {"whole": None, f"rank {given.rank}": adapter, "in 4 bits": replace(adapter, quantize=True)}
        for way, lora in ways.items():
            weights, learning, size = counted(shape, lora)
            parts = [size, 4 * learning, 8 * learning, 0 if lora else size]
            cells = [f"{part / 1e9:.3g} GB" for part in (*parts, sum(parts))]
            print(f"| {name} | {way} | {learning / weights:.1%} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
