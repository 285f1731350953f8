# SPDX-License-Identifier: Apache-2.0
"""The one lock of every change, locks on devices, and signals held back while a change is under way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from emupmem.model import UNCHANGED, Busy, EmupmemError
from emupmem.system import log
from emupmem.system.backups import BACKUPS
from emupmem.system.errors import sudo_hint, write_hint
from emupmem.system.files import make_synced_folder
from emupmem.system.machine import Machine
from emupmem.system.waiting import waiting_for

Result = TypeVar("Result")


@contextlib.contextmanager
def hold_device(machine: Machine, name: str) -> Iterator[None]:
    """Hold a block device alone: Busy while it is mounted or another driver has claimed it."""
    try:
        descriptor = os.open(machine.path(name), os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(f"{name} is in use", f"see what uses it: lsblk {name}, cat /proc/swaps") from exc
        raise EmupmemError(f"{name} cannot be opened: {exc.strerror}", sudo_hint(exc)) from exc
    try:
        yield
    finally:
        os.close(descriptor)


def lock_until_exit(machine: Machine, name: str, shared: bool, write: bool = True) -> None:
    """Lock a file or a device until this process ends, and what it becomes by `become`.

    Raises EmupmemError where another has the lock, and where it may not be opened (to `write`).
    """
    try:
        # Inherited on purpose: it is the lock.
        descriptor = os.open(machine.path(name), os.O_RDWR if write else os.O_RDONLY)
        os.set_inheritable(descriptor, True)
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise EmupmemError(
            f"{name} is in use by another virtual machine",
            "two would write over each other; --shared-backend on both allows it",
        ) from exc
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be opened: {exc.strerror}", sudo_hint(exc)) from exc


@contextlib.contextmanager
def change_lock(machine: Machine) -> Iterator[None]:
    """Hold the one lock of all that changes this machine; Busy when another holds it.

    Meanwhile the umask is the usual one, so that rights do not hang on who calls.
    """
    umask = os.umask(0o022)
    try:
        with _locked_alone(machine):
            yield
    finally:
        os.umask(umask)


@contextlib.contextmanager
def _locked_alone(machine: Machine) -> Iterator[None]:
    folder = machine.path(BACKUPS)
    try:
        make_synced_folder(folder, 0o700)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise EmupmemError(
            f"{BACKUPS} cannot be written: {exc.strerror}", write_hint(exc), state=UNCHANGED
        ) from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise _locked(os.read(descriptor, 20).decode("ascii", "replace").strip()) from exc
        with contextlib.suppress(OSError):  # a full disk must not stop a rollback; the number is a courtesy
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        machine.held = descriptor
        log.file(machine, "locked", f"{BACKUPS}/lock")
        yield
    finally:
        if machine.held is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # whatever a program left running
        machine.held = None
        os.close(descriptor)


class Interrupts:
    """Signals that ask us to stop, held back until a safe moment: `check()` raises then."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.caught = 0

    def check(self) -> None:
        """Raises EmupmemError if a signal came."""
        if self.caught:
            name, self.caught = signal.Signals(self.caught).name, 0
            raise EmupmemError(f"stopped by {name}", state=UNCHANGED)


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Hold back SIGINT, SIGTERM and SIGHUP while a change is under way."""
    state = Interrupts()

    def note(number: int, frame: FrameType | None) -> None:
        state.caught = number

    before = {number: signal.signal(number, note) for number in Interrupts.SIGNALS}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for(ready: Callable[[], bool], seconds: float, what: str = "the device") -> bool:
    """Ask until it is so or the time is over; `what` is for those who watch."""
    end = time.monotonic() + seconds
    with waiting_for(what) as tick:
        while not ready():
            if time.monotonic() >= end:
                return False
            tick()
            time.sleep(0.1)
    return True


def wait_for_lock(machine: Machine, work: Callable[[], Result], seconds: float) -> Result:
    """Do it under the lock, and again for a while where that or a device is held. Raises what `work` raises."""
    end = time.monotonic() + seconds
    while True:
        try:
            with change_lock(machine):
                return work()
        except Busy:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


def _locked(who: str) -> Busy:
    """The error of who finds the lock taken by process `who`, or by what that one started."""
    if who.isdigit() and not _is_running(int(who)):
        return Busy(
            f"a program started by a killed emupmem (PID {who}) is still running",
            f"wait until it has finished; fuser {BACKUPS}/lock names it",
        )
    return Busy(
        f"another emupmem is at work{f' (process {who})' if who.isdigit() else ''}",
        "wait until it has finished",
    )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
