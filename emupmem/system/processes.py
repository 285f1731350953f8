# SPDX-License-Identifier: Apache-2.0
"""Who uses a device or a file: processes, and the kernel itself; and becoming another program."""

from __future__ import annotations

import itertools
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from emupmem.model import EmupmemError
from emupmem.system import log
from emupmem.system.machine import Machine


def identity(machine: Machine, name: str) -> str:
    """The same word for all names of a file or device, by links or hard links; empty where it is not there."""
    try:
        info = machine.path(name).stat()
    except OSError:
        return ""
    if stat.S_ISBLK(info.st_mode) or stat.S_ISCHR(info.st_mode):
        return f"{stat.S_IFMT(info.st_mode):o} {info.st_rdev}"
    return f"{info.st_dev} {info.st_ino}"


def character_number(machine: Machine, name: str) -> str:
    """`MAJOR:MINOR` of a character device, empty for everything else."""
    try:
        info = machine.path(name).stat()
    except OSError:
        return ""
    return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}" if stat.S_ISCHR(info.st_mode) else ""


def processes_mapping(machine: Machine, name: str) -> list[str]:
    """`NAME (process N)` of the processes that have a file mapped or open for writing, as far as we may look."""
    try:
        info = machine.path(name).stat()
    except OSError:
        return []
    mark = f" {os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x} {info.st_ino} "
    # btrfs and overlays tell another device there than stat does: then the inode with the name counts.
    named = re.compile(rf" {info.st_ino} +{re.escape(machine.real(name))}$", re.MULTILINE)
    one = identity(machine, name)
    pids = sorted((n for n in machine.names("/proc") if n.isdigit()), key=int)
    return [
        f"{machine.peek(f'/proc/{p}/comm')} (process {p})"
        for p in pids
        if mark in (maps := machine.peek(f"/proc/{p}/maps")) or named.search(maps) or _writes(machine, p, one)
    ]


def _writes(machine: Machine, pid: str, one: str) -> bool:
    """Whether a process, not we ourselves, has a file open for writing."""
    if pid == str(os.getpid()):
        return False
    here = f"/proc/{pid}"
    for number in machine.names(f"{here}/fd"):
        try:
            info = Path(machine.root, f"{here}/fd/{number}".lstrip("/")).stat()
        except OSError:
            continue
        if f"{info.st_dev} {info.st_ino}" != one:
            continue
        flags = re.search(r"^flags:\s*([0-7]+)$", machine.peek(f"{here}/fdinfo/{number}"), re.MULTILINE)
        if flags and int(flags[1], 8) & os.O_ACCMODE:
            return True
    return False


def kernel_use(machine: Machine, name: str) -> tuple[str, str] | None:
    """How the kernel itself has a file in use (`as swap space`), and what ends that; None where it has not."""
    one = identity(machine, name)
    for line in machine.peek("/proc/swaps").splitlines()[1:]:
        place = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[0]) if line.split() else ""
        if place and identity(machine, place) == one:
            return "as swap space", f"sudo swapoff {place} first"
    for device in machine.names("/sys/block"):
        behind = machine.peek(f"/sys/block/{device}/loop/backing_file")
        if behind and identity(machine, behind) == one:
            return f"by the loop device /dev/{device}", f"sudo losetup -d /dev/{device} (after umount) first"
    return None


def opened_by(machine: Machine, device: str) -> str:
    """`NAME (process N)` of one that has a character device open or mapped; empty where nobody has."""
    for pid in sorted((n for n in machine.names("/proc") if n.isdigit()), key=int):
        here = f"/proc/{pid}/fd"
        if f" {device}\n" in machine.peek(f"/proc/{pid}/maps") + "\n" or any(
            machine.real(f"{here}/{n}") == device for n in machine.names(here)
        ):
            return f"{machine.peek(f'/proc/{pid}/comm')} (process {pid})"
    return ""


def mounted_elsewhere(machine: Machine, number: str) -> str:
    """Where a device stays mounted in another mount namespace: `on DIR in the mount namespace of NAME (process N)`.

    Not where it is unmounted with ours: a service that systemd keeps in a namespace of its own gets each mount and
    umount from here (mount_namespaces(7): its mount has our peer group as its master, or is of it).
    """
    own = _mount_namespace(machine, "self")
    mine = _peers(machine, "self", number)
    for pid in sorted((n for n in machine.names("/proc") if n.isdigit()), key=int):
        if own and _mount_namespace(machine, pid) == own:
            continue
        for line in machine.peek(f"/proc/{pid}/mountinfo").splitlines():
            words = line.split(" ")
            if len(words) > 4 and words[2] == number and not mine & _groups(words):
                who = machine.peek(f"/proc/{pid}/comm")
                return f"on {words[4]} in the mount namespace of {who} (process {pid})"
    return ""


def _peers(machine: Machine, pid: str, number: str) -> set[str]:
    """The peer groups that a process' mounts of a device share their mounts and umounts with."""
    lines = (line.split(" ") for line in machine.peek(f"/proc/{pid}/mountinfo").splitlines())
    return {g for words in lines if len(words) > 4 and words[2] == number for g in _groups(words, "shared:")}


def _groups(words: Sequence[str], *kinds: str) -> set[str]:
    """The peer groups of a line of mountinfo: fields between the options and `-`."""
    fields = itertools.takewhile(lambda word: word != "-", words[6:])
    return {f.partition(":")[2] for f in fields if f.startswith(kinds or ("shared:", "master:"))}


def _mount_namespace(machine: Machine, pid: str) -> str:
    """Which one a process is in; empty where that is not told, or it is gone."""
    try:
        return machine.link_target(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


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
