# SPDX-License-Identifier: Apache-2.0
"""A limit for one input that is measured in work: CPU time in units of a fixed loop on this machine.

A slow or a busy machine has slower units, so the limit says the same there: a quadratic pattern goes far
beyond it, a pause of the scheduler does not count at all. (Counted lines or bytecodes would be the same on
every machine, but a pattern that takes the square of its text does so within one of them.)

What the machine does beside can still make a single measurement too long, never too short: who goes
beyond the limit is measured again, against a unit of that moment, and only work that is too much each time
is too much.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType


class TooMuchWorkError(BaseException):
    """An input took more work than its length allows. No `except Exception` may swallow it."""


TRIES = 3


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


def within(units: float, what: Callable[[], object]) -> None:
    """Run something whose work is the same each time; raises TooMuchWorkError when it never is within the limit."""
    for left in reversed(range(TRIES)):
        try:
            with limited(units):
                what()
            return
        except TooMuchWorkError:
            if not left:
                raise
            unit.cache_clear()


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
