# SPDX-License-Identifier: Apache-2.0
"""Says what boots now and how far it is: a line for each step, on a standard error that no test captures.

Silent until a run of the tests calls `open_`; `python -m tests.vm.image` and the demo have words of their own.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

QUIET = 30.0
"""Seconds after which a boot that has nothing new to say says what it is at."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass
class _Run:
    """One run of the tests: where its lines go, and what its workers count together."""

    stream: int = -1
    count: Path | None = None
    total: int = 0
    began: float = 0.0
    test: str = ""
    expected: int = 0
    booted: int = 0


_run = _Run()


def open_(stream: int, count: Path, total: int, began: float) -> None:
    """Send lines to that descriptor; `count` grows by a byte per boot, `total` is how many there will be.

    `began` is the time.time() of the whole run's beginning.
    """
    _run.stream, _run.count, _run.total, _run.began = stream, count, total, began


def begin(test: str, expected: int) -> None:
    """The boots from here on are those of this test."""
    _run.test, _run.expected, _run.booted = test, expected, 0


def booted() -> int:
    """How often a guest was switched on or restarted since `begin`."""
    return _run.booted


def say(text: str) -> None:
    """One line with the seconds since the run began."""
    if _run.stream >= 0:
        line = f"[vm {time.time() - _run.began:4.0f} s] {text}\n"
        os.write(_run.stream, line.encode("utf-8", "replace"))


def counted() -> str:
    """The boots of the whole run that are over, of all workers: "17 of 45 boots"."""
    done = _run.count.stat().st_size if _run.count and _run.count.exists() else 0
    return f"{done} of {_run.total} boots"


@dataclass
class Boot:
    """The boots of one QEMU process. `what` names the guest; an image that is made is not counted."""

    what: str
    counts: bool = True
    at: str = ""
    since: float = field(default_factory=time.monotonic)
    spoke: float = field(default_factory=time.monotonic)
    process: int = 0
    worked: float = 0.0

    def power_on(self, process: int = 0) -> None:
        """A guest begins at its firmware; `process` is QEMU's, where it is a new one."""
        self.process = process or self.process
        self.worked = 0.0 if process else _worked(self.process)
        self.since = time.monotonic()
        _run.booted += self.counts
        self.step("power on")

    def step(self, at: str) -> None:
        """Say it, unless it was said."""
        if at != self.at:
            self.at, self.spoke = at, time.monotonic()
            say(f"{self._name()}: {at}, {self._taken()}")

    def alive(self, stage: str) -> None:
        """Say what it is at, now and then."""
        if time.monotonic() - self.spoke >= QUIET:
            self.spoke = time.monotonic()
            at = stage if self.at else "going down, or up again"
            say(f"{self._name()}: still {at}, {self._taken()}")

    def over(self, how: str) -> None:
        """A boot is over: with a status, reset, or by a cut."""
        if self.counts and _run.count is not None:
            with _run.count.open("ab") as file:
                file.write(b".")
        self.at = ""
        say(f"{self._name()}: {how}, {self._taken()} · {counted()}")

    def off(self, worked: float) -> None:
        """QEMU has ended: seconds that it worked, which is what its boots cost however busy this machine is."""
        say(f"{self._name()}: off, {worked:.0f} s of work in all")

    def _taken(self) -> str:
        """Seconds since power on, and how many of them QEMU worked."""
        passed, worked = time.monotonic() - self.since, _worked(self.process) - self.worked
        return f"{passed:.0f} s" + (f" ({worked:.0f} s of work)" if worked > 0 else "")

    def _name(self) -> str:
        if not self.counts:
            return self.what
        return f"{_run.test}: {self.what}, boot {_run.booted} of {_run.expected}"


def _worked(process: int) -> float:
    """Processor time of a process in seconds, 0 where there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stage(console: Path, output: str) -> str:
    """What a guest is at, by the last words of its console or of its script."""
    if output.strip():
        return f"in the script: {_short(output)}"
    text = console.read_text(errors="replace") if console.exists() else ""
    if "Linux version" not in text:
        return "in the firmware or the boot loader"
    return f"starting: {_short(text)}"


def _short(text: str) -> str:
    lines = _CONTROL.sub("", text[-2000:]).strip().splitlines()
    return lines[-1].strip()[:70] if lines else ""
