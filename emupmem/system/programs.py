# SPDX-License-Identifier: Apache-2.0
"""Programs that are started: with what environment, how they end, how much they may print."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from emupmem.model import Command, EmupmemError
from emupmem.record import record
from emupmem.system.errors import write_hint
from emupmem.system.plain import read_plain
from emupmem.system.waiting import waiting_for

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
QUIET = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
"""LVM, which GRUB's scripts ask, would complain about the lock that it is given."""

ENVIRONMENT = {**QUIET, "PATH": PATH, "LC_ALL": "C", "LANG": "C"}
"""What every program is started with: nothing of the caller's environment reaches them."""
MOST_OUTPUT = 512 << 20
"""Bytes that a program may print before it is ended: more than any log of a boot."""


_HABITS = ("dmesg(1) may have more information", "(")
"""How lines begin that follow the reason."""


@record
class Completed:
    """How a program ended: exit status (negative: signal), what it printed."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """Its reason, for an error message: the last line of what it said (standard error first).

        What follows a reason as a habit does not count: the usage (mkfs.xfs), where to look for more
        (mount(8) since util-linux 2.39), a remark in brackets (e2fsck).
        """
        for stream in (self.stderr, self.stdout):
            text = stream.decode("utf-8", "replace")
            said = re.split(r"^usage:", text, maxsplit=1, flags=re.IGNORECASE | re.MULTILINE)[0]
            for part in (said, text):
                lines = [line.strip() for line in part.splitlines()]
                reasons = [n for n in lines if n and not n.startswith(_HABITS)]
                if reasons:
                    return reasons[-1]
        return ""

    @property
    def errors(self) -> str:
        """The lines that begin with `Error:` (ndctl: they come before its last words), else its last words."""
        text = (self.stderr + b"\n" + self.stdout).decode("utf-8", "replace")
        found = re.findall(r"^[ \t]*Error: (.+)$", text, re.MULTILINE)
        return (
            "; ".join(dict.fromkeys(f.strip() for f in found)) or self.last_words or f"status {self.status}"
        )


def listen(child: subprocess.Popen[bytes], timeout: float, what: str) -> tuple[bytes, bytes]:
    """What a program prints until it has ended: something that it left running may still have its pipes.

    `what` is told to those who watch. Raises TimeoutExpired, and OverflowError where it prints without end.
    """
    end, size = time.monotonic() + timeout, 0
    parts: dict[object, list[bytes]] = {child.stdout: [], child.stderr: []}
    with selectors.DefaultSelector() as waiting, waiting_for(what) as tick:
        for pipe in parts:
            waiting.register(cast(BinaryIO, pipe), selectors.EVENT_READ)
        while waiting.get_map():
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(child.args, timeout)
            ready = waiting.select(min(left, 1))
            tick()
            if not ready and child.poll() is not None:
                break
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                size += len(data)
                parts[key.fileobj].append(data)
                if not data:
                    waiting.unregister(key.fileobj)
                if size > MOST_OUTPUT:
                    raise OverflowError
    return b"".join(parts[child.stdout]), b"".join(parts[child.stderr])


def end_session(child: subprocess.Popen[bytes]) -> None:
    """Kill a program and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def make_aside(
    run: Callable[[Command], Completed], argv: Sequence[str], given: Mapping[str, bytes], result: str
) -> tuple[Completed, bytes]:
    """Let a program make a file in a folder that is ours alone and gone afterwards: see `Host.made`."""
    try:
        with tempfile.TemporaryDirectory(prefix="emupmem-") as name:
            for file, data in given.items():
                Path(name, file).write_bytes(data)
            done = run(Command(tuple(w.replace("{}", name) for w in argv)))
            made = Path(name, result)
            return done, read_plain(made) if made.exists() else b""
    except OSError as exc:
        raise EmupmemError(f"there is no room to run {argv[0]}: {exc.strerror}", write_hint(exc)) from exc
