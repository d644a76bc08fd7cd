"""Decoding, against transformers and the machine's limit: python bench/decode.py [--sizes 1M,4M] [--json]

    lean            the decoder of models of Llama's shape (rollout/lean.py)
    transformers    our loop over the module's own forward pass, as for any other model (rollout/stream.py)
    generate        transformers' `generate`, sampling, of the module as transformers loads it
    continuous      transformers' continuous batching, its manager kept warm; on a CPU it is slow: --continuous
    vllm            vLLM, in an environment of its own: --vllm PYTHON, as bench/decode_vllm.py says

The same weights, prompts and number of tokens; `batch` replies, 8 to a prompt. `of peak` is the share of the fastest
product of two matrices of 1024 x 1024 in that precision, counting two operations for each weight and token; `of
bandwidth` the share of the rate of copying an array that no cache holds, counting the weights once for a token of each
sequence, and for each token the keys and values before it. One thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
from least import size_of

WAYS = ("lean", "transformers", "generate")


def made(size: str, compute: str) -> Any:
    """The policy that is decoded."""
    from tropism.config import Model
    from tropism.training.model import load_policy

    shape = peers.SHAPES[size] | {"initializer_range": 0.02}
    return load_policy(Model(path="tiny", shape=shape, compute=compute, device="cpu"), 0)


def stock(policy: Any) -> Any:
    """The policy's weights in a module as transformers loads it: nothing of ours computes in it."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def decoder(way: str, size: str, compute: str, batch: int) -> peers.Turn:
    import torch
    from transformers import GenerationConfig

    from tropism.rollout.sampler import Local
    from tropism.types import SamplingParams

    policy = made(size, compute)
    texts = [text for text in peers.prompts(batch // peers.GROUP) for _ in range(peers.GROUP)]
    prompts = [policy.words.context(text) for text in texts]
    sampler = Local(policy.module, policy.words.stop_ids, policy.context, policy.precision, lean=way == "lean")
    params = SamplingParams(max_tokens=peers.REPLY)
    ids = torch.tensor(prompts)
    plain = stock(policy) if way in ("generate", "continuous") else None

    def continuous() -> int:
        ends = {"eos_token_id": policy.words.stop_ids[0], "pad_token_id": 0}
        asked = GenerationConfig(max_new_tokens=peers.REPLY, do_sample=True, top_k=0, **ends)
        out = plain.generate_batch(prompts, asked, progress_bar=False, persistent_manager=True)
        return sum(len(each.generated_tokens) for each in out.values())

    def sampled() -> int:
        if way == "continuous":
            return continuous()
        if way != "generate":
            return sum(len(turn.action) for turn in sampler(prompts, params))
        with policy.precision(), torch.inference_mode():
            out = plain.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=peers.REPLY, top_k=0
            )
        replies = out[:, ids.shape[1] :]
        ended = (replies == policy.words.stop_ids[0]).cumsum(1).cumsum(1) > 1
        return int((~ended).sum())

    def turn() -> dict[str, float]:
        tokens: list[int] = []
        seconds = peers.timed(lambda: tokens.append(sampled()))
        return {"tokens/s": tokens[0] / seconds}

    return turn


def by_vllm(python: str, size: str, compute: str, batch: int, folder: str) -> list[str]:
    """The command of vLLM's peer, for the same weights and prompts."""
    policy = made(size, "float32")
    policy.save(where := Path(folder))
    prompts = [policy.words.context(text) for text in peers.prompts(batch // peers.GROUP)]
    (where / "prompts.json").write_text(json.dumps(prompts))
    program = str(Path(__file__).with_name("decode_vllm.py"))
    return [python, program, folder, compute, str(peers.GROUP), str(peers.REPLY)]


def compared(
    size: str, compute: str, batch: int, turns: int, ways: Sequence[str] = WAYS, vllm: str = ""
) -> list[dict[str, Any]]:
    settings = {"size": size, "compute": compute, "batch": batch}
    makers = {way: (decoder, {"way": way} | settings) for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        outside = {"vllm": by_vllm(vllm, size, compute, batch, folder)} if vllm else {}
        found = peers.raced(makers, 1, turns, outside)
    (limit, backend), bandwidth = peers.peak(compute), peers.bandwidth()
    each = size_of(made(size, compute))
    read = each.number * each.weights / batch + each.token * (peers.PROMPT + peers.REPLY / 2)  # bytes for a token
    base = peers.quartiles([turn["tokens/s"] for turn in found["generate"]])[0]
    rows = []
    for way, turned in found.items():
        middle, low, high = peers.quartiles([turn["tokens/s"] for turn in turned])
        rows.append(
            settings
            | {"way": way, "tokens/s": round(middle), "quartiles": f"{low:.0f} to {high:.0f}"}
            | {"over generate": round(middle / base, 2), "of peak": f"{2 * each.weights * middle / limit:.0%}"}
            | {"of bandwidth": f"{read * middle / bandwidth:.0%}"}
            | {"peak GFLOP/s": f"{limit / 1e9:.0f} ({backend})", "GB/s": f"{bandwidth / 1e9:.1f}"}
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="1M,4M")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--batches", default="64,128")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--continuous", action="store_true", help="continuous batching too, which takes minutes")
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="of an environment that has vLLM")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    peers.settled(1)
    rows: list[dict[str, Any]] = []
    ways = (*WAYS, "continuous") if given.continuous else WAYS
    for size in given.sizes.split(","):
        for compute in given.compute.split(","):
            for batch in map(int, given.batches.split(",")):
                rows += compared(size, compute, batch, given.turns, ways, given.vllm)
    peers.told(rows, peers.versions("torch", "transformers"), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
