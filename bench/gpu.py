"""Near an accelerator's limits? python bench/gpu.py [--size 0.6B] [--compute bfloat16] [--dry-run] [--json]

    limits     bytes a second of copying a large array; operations a second of the fastest product of 4096 x 4096
    decode     64 replies of 128 tokens to prompts of 256: the least time is that of reading weights, keys and values
               once for every token, at that bandwidth
    update     forward and back over 32 rows of 512 tokens: six operations for each weight and token, at that rate
    step       a GRPO step of 16 prompts, 8 replies each of at most 128 tokens, in turns with TRL's trainer

A Qwen3 made from its configuration, with half a billion random weights or more. Needs a CUDA device, and says so
where there is none; `--dry-run` runs all of it on the CPU at a size that says nothing about speed, to see that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import step
from least import size_of

SIZES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "dry": {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512},
}
REPLIES, PROMPT, REPLY = 64, 256, 128


def clocked(work: Any, device: str, repeats: int = 5) -> float:
    """Median seconds after a first run that does not count, until the device has done it."""
    import torch

    def whole() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    whole()
    return statistics.median(peers.timed(whole) for _ in range(repeats))


def limits(device: str, compute: str) -> dict[str, float]:
    """Of this device: bytes a second, and operations a second in this precision."""
    import torch

    kind, size = getattr(torch, compute), 4096 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    rate = 2 * size**3 / clocked(lambda: a @ b, device, 20)
    return {"bytes/s": peers.bandwidth(device), "operations/s": rate}


def decode(policy: Any, device: str, limit: float) -> dict[str, float]:
    """Tokens a second, and the share of the bandwidth that reading what must be read would take."""
    import torch

    from tropism.types import SamplingParams

    draws = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 250, (REPLIES, PROMPT), generator=draws).tolist()
    said: list[int] = []

    def draw() -> None:
        turns = policy.sampler(prompts, SamplingParams(max_tokens=REPLY))
        said.append(sum(len(turn.action) for turn in turns))

    seconds = clocked(draw, device)
    size = size_of(policy)
    read = REPLY * (size.number * size.weights + REPLIES * size.token * (PROMPT + REPLY / 2))
    return {"tokens/s": said[-1] / seconds, "of bandwidth": read / limit / seconds}


def update(policy: Any, device: str, limit: float) -> dict[str, float]:
    """Tokens a second, and the share of the rate of products."""
    import torch

    from tropism.training.collate import collate
    from tropism.types import Rollout, Task, Turn

    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 250, (32, 512), generator=draws).tolist()
    turns = [Turn(context=row[:256], action=row[256:], logp=[0.0] * 256, entropy=[0.0] * 256) for row in rows]
    batch = collate(
        [Rollout(task=Task(), group=0, turns=(turn,), reward=0.0) for turn in turns], codes={}, device=policy.device
    )

    def learn() -> None:
        (policy.forward(batch).logp * batch.action_mask).sum().backward()
        for parameter in policy.module.parameters():
            parameter.grad = None

    seconds, tokens = clocked(learn, device), 32 * 512
    size = size_of(policy)
    work = 6 * (size.layers * tokens + size.head * tokens / 2)  # the head sees only the tokens that were chosen
    return {"tokens/s": tokens / seconds, "of products": work / limit / seconds}


def steps(path: str, device: str, compute: str, turns: int, folder: str) -> dict[str, dict[str, float]]:
    """Median seconds of a step and its parts, ours and TRL's in turns."""
    both = {"path": path, "compute": compute, "folder": folder, "device": device, "reply": REPLY}
    makers = {"tropism": (step.tropism, both), "TRL, tuned": (step.trl, both | {"tuned": True})}
    found = peers.raced(makers, 1, turns)
    return {
        name: {part: statistics.median(turn[part] for turn in each) for part in ("step", "generate", "update")}
        for name, each in found.items()
    }


def measured(size: str, device: str, compute: str, turns: int) -> list[dict[str, Any]]:
    from tropism.config import Model
    from tropism.training.model import load_policy

    limit = limits(device, compute)
    rows: list[dict[str, Any]] = [{"what": "limits"} | {name: f"{rate:.3g}" for name, rate in limit.items()}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / size
        shape = SIZES[size] | {"initializer_range": 0.02}
        policy = load_policy(Model(path="tiny", shape=shape, compute=compute, device=device), 0)
        policy.save(path)
        for name, found in (
            ("decode", decode(policy, device, limit["bytes/s"])),
            ("update", update(policy, device, limit["operations/s"])),
        ):
            rows.append({"what": name} | {key: f"{value:.3g}" for key, value in found.items()})
        del policy
        for name, parts in steps(str(path), device, compute, turns, folder).items():
            rows.append({"what": f"step, {name}"} | {f"{part} ms": round(1e3 * value) for part, value in parts.items()})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="0.6B", choices=[name for name in SIZES if name != "dry"])
    parser.add_argument("--compute", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at a size that says nothing about speed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    import torch

    if not (given.dry_run or torch.cuda.is_available()):
        raise SystemExit(
            "bench/gpu.py: there is no CUDA device here, so nothing was measured. --dry-run runs it on the CPU."
        )
    device, size, turns = ("cpu", "dry", 1) if given.dry_run else ("cuda", given.size, given.turns)
    about = peers.versions("torch", "transformers", "trl")
    about["device"] = "none: a dry run, not measured" if given.dry_run else torch.cuda.get_device_name()
    about |= {"size": size, "compute": given.compute}
    rows = measured(size, device, given.compute, turns)
    columns = dict.fromkeys(name for row in rows for name in row)
    peers.told([{name: row.get(name, "") for name in columns} for row in rows], about, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
