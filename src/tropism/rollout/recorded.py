"""A decoding step that starts at once: its operations are recorded as a CUDA graph and done again from there.

A step is hundreds of operations of microseconds each, and starting them one by one takes an accelerator's host longer
than they take it. A recording reads and writes the same memory every time, so its inputs are copied to where it reads
them; and it holds for one shape only, so it is made after a few steps of that shape and not before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[[], Tensor]
Recorder = Callable[[Work], Work]
"""Does the work and returns what does it again; what that returns may be overwritten by its next call."""
UNRECORDED = 2
"""Steps of a shape that are done as they are before it is recorded: sequences that soon leave are not worth it."""


class Recorded:
    """work(*given), for other values of the same shapes. Done twice with the same values it must leave the same."""

    def __init__(self, work: Callable[..., Tensor], record: Recorder, *given: Tensor) -> None:
        self.given = [value.clone() for value in given]
        self.work: Work = lambda: work(*self.given)
        self.record, self.done = record, 0
        self.again: Work | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        """
        Raises:
            RuntimeError: this work cannot be recorded, or there is no memory for it.
        """
        for mine, value in zip(self.given, given, strict=True):
            mine.copy_(value)
        self.done += 1
        if self.done <= UNRECORDED:
            return self.work()
        self.again = self.again or self.record(self.work)
        return self.again().clone()


def cuda_graph(work: Work) -> Work:
    """A `Recorder`. Whatever happens, operations go on in the stream that they were in."""
    here, beside, recorded = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            work()  # libraries set themselves up for a stream at its first work, which cannot be recorded
        with torch.cuda.graph(recorded, stream=beside, capture_error_mode="thread_local"):  # others may train meanwhile
            found = work()
    finally:
        torch.cuda.set_stream(here)
        here.wait_stream(beside)

    def again() -> Tensor:
        recorded.replay()
        return found

    return again
