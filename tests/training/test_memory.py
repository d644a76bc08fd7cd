import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from tropism.training.memory import keep_freed_memory
{asked}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 22)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_large_tensors_are_no_new_pages_once_freed_memory_is_kept():
    faults = []
    for asked in ("", "assert keep_freed_memory()"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(asked=asked)], capture_output=True, text=True, check=True
        )
        faults.append(int(done.stdout))
    assert faults[1] * 10 < faults[0]


def test_elsewhere_nothing_is_asked(monkeypatch):
    from tropism.training import memory

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False
