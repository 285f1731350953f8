"""A limit for one input that is measured in work: CPU time in units of a fixed loop on this machine.

A slow or a busy machine has slower units, so the limit says the same there: a quadratic pattern goes far
beyond it, a pause of the scheduler does not count at all.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType


class TooMuchWorkError(BaseException):
    """An input took more work than its length allows. No `except Exception` may swallow it."""


@cache
def unit() -> float:
    """CPU seconds of the fixed loop, about a hundredth of a second."""

    def once() -> float:
        began, value = time.process_time(), 1
        for i in range(100_000):
            value = (value * 31 + i) & 0xFFFFFFFF
        return time.process_time() - began

    return max(min(once() for _ in range(5)), 0.001)


def spent(began: float) -> float:
    """Units since a value of time.process_time()."""
    return (time.process_time() - began) / unit()


@contextmanager
def limited(units: float) -> Iterator[None]:
    """Raise TooMuchWorkError in the middle of what takes more than that (in C code: once it looks up)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooMuchWorkError(f"more than {units:g} units of work")

    former = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, units * unit())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
