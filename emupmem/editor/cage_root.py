# SPDX-License-Identifier: Apache-2.0
"""What sh sees of the file system: an empty root, or the machine's own with nothing that can be written."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from emupmem.editor.cage_libc import (
    AT_FDCWD,
    AT_RECURSIVE,
    BIND,
    LIBC,
    NODEV,
    NOEXEC,
    NOSUID,
    PR_SET_DUMPABLE,
    RDONLY,
    REMOUNT,
    become_nobody,
    checked_call,
)
from emupmem.editor.cage_plan import CagePlan
from emupmem.editor.cage_rules import syscall_numbers

NEW_USER = 0x10000000
_SPACES = (
    0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
)  # mounts, names, IPC, processes, network
_DETACH = 2
_MOUNT_SETATTR = 442
_STATVFS_TO_MOUNT = {1024: 0x400, 2048: 0x800, 4096: 0x200000}  # noatime, nodiratime, relatime

_HARMLESS = ("null", "zero", "full", "random", "urandom")
_EMPTY = "/proc"  # any folder that is there everywhere: what it holds is not needed in an empty root
_OUT_OF_REACH = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EINVAL}


def new_spaces(root: bool) -> bool:
    """Leave the namespaces of this machine; whether we are still root of it, to become nobody later."""
    if root and LIBC.unshare(_SPACES) == 0:
        return True
    if root:  # of a container that may not mount
        become_nobody()
        checked_call(LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")  # else /proc/self is not ours
    user, group = os.geteuid(), os.getegid()
    checked_call(LIBC.unshare(_SPACES | NEW_USER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return False


def second_process() -> None:
    """Go on as the first process of the new namespace: all others in it die with it. Ours waits for it."""
    child = os.fork()
    if child == 0:
        return
    status = 1
    try:
        os.closerange(0, 1 << 16)  # subprocess must see the end of its pipe when sh starts
        _, how = os.waitpid(child, 0)
        status = os.WEXITSTATUS(how) if os.WIFEXITED(how) else 128 + os.WTERMSIG(how)
    finally:
        os._exit(status)


def mount_at(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if w is None else os.fsencode(w) for w in (source, target, kind, data)]
    checked_call(LIBC.mount(words[0], words[1], words[2], flags, words[3]), f"mount {target}")


def empty_root(plan: CagePlan) -> None:
    """A root with nothing in it but sh, its libraries, /dev/null and the texts."""
    texts = {f"/dev/fd/{number}": os.pread(number, os.fstat(number).st_size, 0) for number in plan.files}
    mount_at("tmpfs", _EMPTY, "tmpfs", NOSUID | NODEV, "mode=755")
    bound = (*plan.needs, "/dev/null")
    for name in bound:
        _put_file(f"{_EMPTY}{name}", b"")
        mount_at(name, f"{_EMPTY}{name}", None, BIND)
    for name, text in texts.items():
        _put_file(f"{_EMPTY}{name}", text)
    os.chdir(_EMPTY)
    checked_call(LIBC.syscall(syscall_numbers()["pivot_root"], b".", b"."), "pivot_root")
    checked_call(LIBC.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")
    _freeze(["/", *bound])


def _put_file(name: str, data: bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)


def read_only_view() -> None:
    """This machine's files, none of which can be changed, with a /proc and a /dev of our own."""
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in _HARMLESS}
    mount_at("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC | RDONLY)
    points = list(_mount_points())
    mount_at("tmpfs", "/dev", "tmpfs", NOSUID | NOEXEC, "mode=755")
    for name, number in devices.items():
        _put_file(f"/dev/{name}", b"")
        mount_at(f"/proc/self/fd/{number}", f"/dev/{name}", None, BIND)
        os.close(number)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        Path(f"/dev/{name}").symlink_to(f"/proc/self/fd{target}")
    _freeze([*points, "/dev", *(f"/dev/{name}" for name in devices)])


def _mount_points() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        name = os.fsdecode(line.split()[4])
        yield re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), name)


def _freeze(points: Iterable[str]) -> None:
    """Make every mount read-only; before Linux 5.12 one by one."""
    wanted = struct.pack("QQQQ", RDONLY | NOSUID, 0, 0, 0)
    result = LIBC.syscall(_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, wanted, ctypes.c_size_t(len(wanted)))
    if result == 0:
        return
    if ctypes.get_errno() != errno.ENOSYS:
        checked_call(-1, "mount_setattr")
    for point in points:
        _freeze_one(point)


def _freeze_one(point: str) -> None:
    try:
        now = os.statvfs(point).f_flag
        kept = now & (NODEV | NOEXEC) | sum(to for of, to in _STATVFS_TO_MOUNT.items() if now & of)
        mount_at(None, point, None, REMOUNT | BIND | RDONLY | NOSUID | kept)
    except OSError as exc:
        if exc.errno not in _OUT_OF_REACH:  # hidden by another mount, or closed to everybody here
            raise


# --- what sh is made of ----------------------------------------------------------------------------------------

_LIBRARY = re.compile(rb"(?:^|=>)\s*(/\S+) \(0x", re.M)


@lru_cache(maxsize=8)
def libraries_of(sh: str) -> tuple[str, ...]:
    """The files that sh cannot start without, sh first: asked of its own loader, as ldd does."""
    loader = _dynamic_loader(Path(sh).read_bytes())
    if not loader:
        return (sh,)
    said = subprocess.run(
        [loader, "--list", str(Path(sh).resolve())],
        env={},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
        check=False,
    ).stdout
    found = [os.fsdecode(name) for name in _LIBRARY.findall(said)]
    cache = ["/etc/ld.so.cache"] if Path("/etc/ld.so.cache").exists() else []
    return tuple(dict.fromkeys([sh, loader, *found, *cache]))


def _dynamic_loader(program: bytes) -> str:
    """The interpreter that an ELF program of 64 bits, lowest byte first, names; '' for one without libraries."""
    if program[:6] != b"\x7fELF\x02\x01":
        return ""
    (table,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    for at in range(table, table + size * count, size):
        (kind,) = struct.unpack_from("<I", program, at)
        if kind == 3:  # PT_INTERP
            (offset,) = struct.unpack_from("<Q", program, at + 8)
            return os.fsdecode(program[offset : program.index(b"\0", offset)])
    return ""
