# SPDX-License-Identifier: Apache-2.0
"""Runs in the namespaces of a scenario: makes its root, then serves as its process 1.

`enter` is executed by this host's Python, in namespaces of its own, and ends in the tree's Python with this
same file as its program: `serve`. Only the standard library is used, of Python 3.11. Nothing here is imported
by a test; `tests.scenario.machine` starts it and talks to it over standard input and output, a pickle after
its length in eight bytes. When the input ends, process 1 ends, and the kernel ends all the rest.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PIVOT_ROOT = 155  # x86-64
PR_CAPBSET_DROP = 24
# Of root's rights those over files, users and processes. Without the others nothing in there reaches past its
# namespaces: no modules, raw I/O, kexec, clock, kernel log, devices, mounts, and nothing of kernels to come.
CHOWN_TO_NET_BIND, IPC_LOCK, IPC_OWNER, SYS_CHROOT, SYS_NICE, SYS_RESOURCE = range(11), 14, 15, 18, 23, 24
LEASE, SETFCAP = 28, 31
KEPT = {*CHOWN_TO_NET_BIND, IPC_LOCK, IPC_OWNER, SYS_CHROOT, SYS_NICE, SYS_RESOURCE, LEASE, SETFCAP}

DEVICES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
"""Minor numbers of memory devices (major 1): the only ones there are, and no disks."""

READ_ONLY = ("sys", "irq", "bus", "acpi", "fs", "scsi", "driver")
CLOSED = ("sysrq-trigger", "kcore", "kmsg", "mtrr")
"""Folders and files of /proc through which root reaches this host."""

BASE = "/sys"
"""A folder of the host that is always there: the scenario's memory is mounted over it, seen by us alone."""

_libc = ctypes.CDLL(None, use_errno=True)


# The root --------------------------------------------------------------------------------------------


def enter(spec: Mapping[str, Any]) -> None:
    """Mount the scenario's root and become its process 1."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    os.chdir(spec["tree"])
    project = os.open(spec["project"], os.O_PATH)
    mount("scenario", BASE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=2g")
    for name in ("upper", "work", "root", "proc"):
        os.mkdir(f"{BASE}/{name}")
    root = f"{BASE}/root"
    # xino: one device number for all files, as on a real root file system.
    options = f"lowerdir=.,upperdir={BASE}/upper,workdir={BASE}/work,xino=on"
    mount("scenario", root, "overlay", MS_NODEV, options)
    _kernel_folders(root)
    _proc_files(root, spec["proc"])
    _disks(root, spec["disks"], spec["hostname"])
    if spec["esp"]:  # a mount point, as bootctl and kernel-install expect
        os.makedirs(root + spec["esp"], exist_ok=True)
        mount("esp", root + spec["esp"], "tmpfs", MS_NOSUID | MS_NODEV, "mode=700,size=256m")
    place = root + spec["project_place"]
    os.makedirs(place, exist_ok=True)
    mount(f"/proc/self/fd/{project}", place, "", MS_BIND)
    mount("none", place, "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.close(project)
    _libc.sethostname(spec["hostname"].encode(), len(spec["hostname"]))
    _change_root(root)
    _drop_capabilities()
    os.chdir("/")
    python = "/usr/bin/python3"
    os.execve(python, [python, "-I", "-c", spec["program"], "serve"], spec["environment"])


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError with the target's name."""
    words = [w.encode() or None for w in (source, target, kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"{kind or 'mount'} {target}")


def _kernel_folders(root: str) -> None:
    for name, mode in (("sys", "755"), ("run", "755"), ("tmp", "1777")):
        os.makedirs(f"{root}/{name}", exist_ok=True)
        mount("tmpfs", f"{root}/{name}", "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode}")
    mount("tmpfs", f"{root}/dev", "tmpfs", MS_NOSUID, "mode=755")
    for name, minor in DEVICES.items():
        os.mknod(f"{root}/dev/{name}", stat.S_IFCHR, os.makedev(1, minor))
        os.chmod(f"{root}/dev/{name}", 0o666)
    os.mkdir(f"{root}/dev/shm")
    os.chmod(f"{root}/dev/shm", 0o1777)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{root}/dev/{name}")


def _bind(source: str, target: str) -> None:
    if not os.path.exists(target):
        with open(target, "wb"):
            pass
    mount(source, target, "", MS_BIND)


def _proc_files(root: str, files: Mapping[str, bytes]) -> None:
    """The real /proc of these namespaces, what it says of the machine replaced, what changes the host closed."""
    proc = f"{root}/proc"
    os.makedirs(proc, exist_ok=True)
    mount("proc", proc, "proc", MS_NOSUID | MS_NODEV)
    for name in READ_ONLY:
        if os.path.isdir(f"{proc}/{name}"):
            mount(f"{proc}/{name}", f"{proc}/{name}", "", MS_BIND)
            mount("none", f"{proc}/{name}", "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for name in CLOSED:
        if os.path.exists(f"{proc}/{name}"):
            mount(f"{root}/dev/null", f"{proc}/{name}", "", MS_BIND)
    for number, (name, data) in enumerate(sorted(files.items())):
        with open(f"{BASE}/proc/{number}", "wb") as file:
            file.write(data)
        os.chmod(f"{BASE}/proc/{number}", 0o444)
        mount(f"{BASE}/proc/{number}", f"{root}{name}", "", MS_BIND)


def _disks(root: str, disks: Sequence[tuple[str, str, int]], name: str) -> None:
    """File systems of their own, each in a file in memory behind a loop device that goes with its mount."""
    for number, (place, kind, size) in enumerate(disks):
        disk = f"{BASE}/disk{number}-{name}"
        with open(disk, "wb") as file:
            file.truncate(size)
        _made(root, disk, kind)
        os.makedirs(root + place, exist_ok=True)
        subprocess.run(["mount", "-t", kind, "-o", "loop", disk, root + place], check=True)


def _made(root: str, disk: str, kind: str) -> None:
    """Make a file system with the tree's own program."""
    inside = f"{root}/mkfs-disk"
    _bind(disk, inside)
    subprocess.run(["chroot", root, f"mkfs.{kind}", "/mkfs-disk"], check=True, stdout=subprocess.DEVNULL)
    _libc.umount2(inside.encode(), 0)
    os.unlink(inside)


def _change_root(root: str) -> None:
    """Let the root be all there is: the host's own is unmounted here, not only hidden."""
    os.chdir(root)
    if _libc.syscall(PIVOT_ROOT, b".", b".") or _libc.umount2(b".", MNT_DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "pivot_root")


def _drop_capabilities() -> None:
    for number in range(64):
        if number not in KEPT:
            _libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)  # EINVAL past the kernel's last one


# Process 1 -------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until there are no more."""
    source, sink = os.fdopen(0, "rb", closefd=False), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    threading.Thread(target=_end_with_input, daemon=True).start()
    send(sink, ("ready",))
    while (request := receive(source)) is not None:
        name, *arguments = request
        try:
            send(sink, (SERVICES[name](*arguments),))
        except Exception as exc:  # the other side raises it
            send(sink, exc)


def _end_with_input() -> None:
    """End, and with us all that runs here, when nobody is left to ask: also in the midst of a request."""
    watch = select.poll()
    watch.register(0, 0)  # the end of a pipe is reported without being asked for
    watch.poll()
    os._exit(0)


def send(sink: IO[bytes], value: object) -> None:
    """Write one value."""
    data = pickle.dumps(value, 4)
    sink.write(len(data).to_bytes(8, "little") + data)
    sink.flush()


def receive(source: IO[bytes]) -> Any:
    """Read one value, None where there are no more."""
    head = source.read(8)
    data = source.read(int.from_bytes(head, "little")) if len(head) == 8 else b""
    return pickle.loads(data) if data else None


def run(
    argv: Sequence[str], environment: Mapping[str, str], given: bytes, timeout: float
) -> tuple[int | None, bytes, bytes]:
    """Run a program to its end, in a session of its own; its status is None where it was too slow."""
    child = subprocess.Popen(
        argv,
        env=environment,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(given, timeout)
        status: int | None = child.returncode
    except subprocess.TimeoutExpired:
        os.kill(-1, signal.SIGKILL)  # all but process 1, which we are
        out, err = child.communicate()
        status = None
    _bury(0 if status is None else os.WNOHANG)
    return status, out, err


def _bury(how: int) -> None:
    """Forget the dead whose parents died before them; wait for those that are still dying where `how` is 0."""
    try:
        while os.waitpid(-1, how)[0]:
            pass
    except ChildProcessError:
        pass


def processes() -> list[str]:
    """The programs that run here, but for process 1. One that is dying has no words any more and is left out."""
    found = []
    for pid in sorted(int(n) for n in os.listdir("/proc") if n.isdigit()):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue
        if pid != 1 and words:
            found.append(words)
    return found


def read(name: str) -> bytes | None:
    """Content of a file, None where there is none."""
    try:
        with open(name, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def write(files: Mapping[str, tuple[bytes, int]]) -> None:
    """Write files, (content, mode) by name, with the folders above them; a mode that says link makes one."""
    for name, (data, mode) in files.items():
        os.makedirs(os.path.dirname(name), exist_ok=True)
        if stat.S_ISLNK(mode):
            if os.path.lexists(name):
                os.unlink(name)
            os.symlink(os.fsdecode(data), name)
            continue
        with open(name, "wb") as file:
            file.write(data)
        if mode:
            os.chmod(name, mode)


def remove(names: Sequence[str]) -> None:
    """Remove files and links; FileNotFoundError where one is missing."""
    for name in names:
        os.unlink(name)


def snapshot(tops: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """(kind, mode, owner, group, bytes or target, extended attributes) of all that is below `tops`."""
    found: dict[str, tuple[Any, ...]] = {}
    for top in tops:
        if not os.path.lexists(top):
            continue
        found[top] = node(top)
        for folder, folders, files in os.walk(top):
            for name in sorted([*folders, *files]):
                path = f"{folder}/{name}"
                found[path] = node(path)
    return found


def node(path: str) -> tuple[Any, ...]:
    """One file, folder or link, as in `snapshot`."""
    info = os.lstat(path)
    mode = info.st_mode
    kinds = (("link", stat.S_ISLNK), ("folder", stat.S_ISDIR), ("file", stat.S_ISREG))
    kind = next((word for word, test in kinds if test(mode)), "special")
    data = b""
    if kind == "link":
        data = os.fsencode(os.readlink(path))
    elif kind == "file":
        data = read(path) or b""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    extended = tuple((n, os.getxattr(path, n, follow_symlinks=False)) for n in names)
    return kind, stat.S_IMODE(mode), info.st_uid, info.st_gid, data, extended


SERVICES: Mapping[str, Callable[..., Any]] = {
    f.__name__: f for f in (run, processes, read, write, remove, snapshot)
}


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        enter(receive(os.fdopen(0, "rb", closefd=False)))
