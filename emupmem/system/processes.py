# SPDX-License-Identifier: Apache-2.0
"""Which processes use a device or a file; and becoming another program."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from emupmem.model import EmupmemError
from emupmem.system import log
from emupmem.system.machine import Machine


def processes_mapping(machine: Machine, name: str) -> list[str]:
    """`NAME (process N)` of the processes that have a file mapped, as far as we may look."""
    try:
        info = machine.path(name).stat()
    except OSError:
        return []
    mark = f" {os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x} {info.st_ino} "
    pids = sorted((n for n in machine.names("/proc") if n.isdigit()), key=int)
    return [
        f"{machine.peek(f'/proc/{p}/comm')} (process {p})"
        for p in pids
        if mark in machine.peek(f"/proc/{p}/maps")
    ]


def exec_program(machine: Machine, argv: list[str]) -> NoReturn:
    """Become another program: its signals, its exit status, its terminal. Raises EmupmemError."""
    log.becomes(machine, argv)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(argv[0], argv)  # noqa: S606 (no shell on purpose)
    except OSError as exc:
        raise EmupmemError(f"{argv[0]} cannot be started: {exc.strerror}") from exc


def processes_using(machine: Machine, number: str) -> list[str]:
    """`NAME (PID)` of the processes that have something of a mounted device open, mapped or as their folder."""
    major, _, minor = number.partition(":")
    device = os.makedev(int(major), int(minor))
    mapped = f" {int(major):02x}:{int(minor):02x} "
    found = []
    for pid in sorted((n for n in machine.names("/proc") if n.isdigit()), key=int):
        here = f"/proc/{pid}"
        held = [f"{here}/cwd", f"{here}/root", *(f"{here}/fd/{n}" for n in machine.names(f"{here}/fd"))]
        if any(_on_device(Path(p), device) for p in held) or mapped in machine.peek(f"{here}/maps"):
            found.append(f"{machine.peek(f'{here}/comm')} (process {pid})")
    return found


def _on_device(path: Path, device: int) -> bool:
    try:
        return path.stat().st_dev == device
    except OSError:
        return False
