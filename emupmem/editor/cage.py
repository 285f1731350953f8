# SPDX-License-Identifier: Apache-2.0
"""A cage for sh, which reads shell scripts that somebody else wrote.

What runs in it cannot change a file, reach another process or the network, gain rights, or outlive the call.
The scripts of another machine (`programs=False`) also see no program and no file but what sh itself is made of;
those of this machine see its files, read-only, and may run programs. There are two ways to build it:

* namespaces: of mounts, processes, network and IPC, as root directly, else inside a user namespace. Another
  machine's scripts get an empty root; this machine's get every mount read-only, a /proc of their own and a
  /dev with nothing in it that holds data.
* Landlock (Linux 5.13), which needs no rights: nothing may be written or created, and for another machine's
  scripts nothing else may be read or executed.

In both a seccomp filter takes away what neither governs: sockets, signals, sessions, owners, modes and times of
files, new namespaces, io_uring. Whether a way works is found out by trying it. Nothing runs outside the cage if
it fails: the caller decides what to do with a `CageError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import selectors
import signal
import subprocess
import time
from functools import lru_cache, partial
from pathlib import Path

from emupmem.editor.cage_libc import (
    LIBC,
    NOBODY,
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    PRIVATE,
    REC,
    become_nobody,
    checked_call,
    die_with_parent,
)
from emupmem.editor.cage_plan import CageError, CagePlan, Way
from emupmem.editor.cage_root import (
    NEW_USER,
    empty_root,
    libraries_of,
    mount_at,
    new_spaces,
    read_only_view,
    second_process,
)
from emupmem.editor.cage_rules import LANDLOCK_RESTRICT_SELF, landlock_abi, landlock_rules, seccomp
from emupmem.record import record

MOST_OUTPUT = 32 << 20
"""Bytes that sh may print, as much as the values of any real file take a thousand times over."""

_MORE_TASKS = 100
_MEMORY = {False: 512 << 20, True: 2 << 30}
_CPU_SECONDS = 20
_OPEN_FILES = 256
_PAUSE = 0.05


WAYS: tuple[Way, ...] = tuple(Way)


@record
class Job:
    """A script for sh. `files` are open memory files, which it finds as /dev/fd/N."""

    sh: str
    script: str
    files: tuple[int, ...]
    path: str
    programs: bool


# --- running ---------------------------------------------------------------------------------------------


def best(sh: str, *, programs: bool) -> Way | None:
    """The way that confines sh here, None where there is none. Raises OSError when there is no sh."""
    Path(sh).stat()
    return next((way for way in WAYS if _works(way, sh, programs, os.geteuid())), None)


def run_in_cage(job: Job, way: Way | None, seconds: float) -> tuple[bytes, bytes, int]:
    """Run sh; its output, its complaints and its status (128 and more: killed).

    Without a way only the rights go: for scripts that can do nothing. What sh leaves behind is killed.
    Raises TimeoutError, CageError, ValueError (too much output), OSError when it cannot be started.
    """
    try:
        process = _started(job, way)
    except subprocess.SubprocessError as exc:
        raise CageError(f"{way.value if way else 'rights'}: {exc}") from exc
    with process:
        try:
            out, err = _output(process, time.monotonic() + seconds)
        finally:
            _kill_group(process)
        status = process.wait()
    return out, err, status if status >= 0 else 128 - status


@lru_cache(maxsize=64)
def _works(way: Way, sh: str, programs: bool, user: int) -> bool:
    number = os.memfd_create("emupmem", os.MFD_CLOEXEC)
    try:
        job = Job(
            sh, f". /dev/fd/{number} >/dev/null && command echo ready", (number,), "/nonexistent", programs
        )
        return run_in_cage(job, way, 10.0)[0] == b"ready\n"
    except (CageError, TimeoutError, ValueError):
        return False
    finally:
        os.close(number)


def _started(job: Job, way: Way | None) -> subprocess.Popen[bytes]:
    closed = way is Way.NAMESPACES and not job.programs  # the texts are files of its own root
    return subprocess.Popen(
        [job.sh, "-c", job.script],
        env={"PATH": job.path, "LC_ALL": "C"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=() if closed else job.files,
        start_new_session=True,
        preexec_fn=partial(_enter, _plan(job, way)),  # noqa: PLW1509 (no thread of ours runs meanwhile)
    )


def _output(process: subprocess.Popen[bytes], end: float) -> tuple[bytes, bytes]:
    """Everything that sh prints until its end. Raises TimeoutError, ValueError."""
    assert process.stdout is not None
    assert process.stderr is not None
    parts: dict[int, list[bytes]] = {process.stdout.fileno(): [], process.stderr.fileno(): []}
    size = 0
    with selectors.DefaultSelector() as selector:
        for number in parts:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(_PAUSE)
            if not ready and _has_ended(process):
                _kill_group(process)  # what it left behind holds the pipes
            if time.monotonic() > end:
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                parts[key.fd].append(data)
                size += len(data)
                if not data:
                    selector.unregister(key.fd)
            if size > MOST_OUTPUT:
                raise ValueError("too much output")
    while not _has_ended(process):  # it may have closed its streams
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.0005)
    out, err = parts.values()
    return b"".join(out), b"".join(err)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without reaping it: so long its group is still ours."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _plan(job: Job, way: Way | None) -> CagePlan:
    needs = () if job.programs or way is None else libraries_of(job.sh)
    limits = (
        (resource.RLIMIT_NPROC, _tasks(os.geteuid() or NOBODY, int(time.monotonic())) + _MORE_TASKS),
        (resource.RLIMIT_AS, _MEMORY[job.programs]),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_NOFILE, max([*job.files, 0]) + _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    )
    return CagePlan(way, job.programs, job.files, needs, limits, seccomp()[0] if way else None)


@lru_cache(maxsize=4)
def _tasks(user: int, when: int) -> int:
    """How many tasks a user has, about: the limit counts them all, and sh must not fail for one who has many.

    It may be asked a hundred times a second, and is looked up afresh when `when` changes.
    """
    found = 0
    with os.scandir("/proc") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it ends meanwhile
                if entry.name.isdecimal() and entry.stat().st_uid == user:
                    found += Path(entry.path, "task").stat().st_nlink - 2
    return found


def _enter(plan: CagePlan) -> None:
    """Build the cage around this process, which then becomes sh. Raises OSError: sh is not started."""
    root = os.geteuid() == 0
    os.umask(0o022)
    die_with_parent()
    _go_first_when_memory_is_short()
    if plan.way is Way.NAMESPACES:
        root = new_spaces(root)
        second_process()
        mount_at(None, "/", None, REC | PRIVATE)
        if plan.programs:
            read_only_view()
        else:
            empty_root(plan)
    rules = landlock_rules(plan) if _wants_landlock(plan) else None
    if root:
        become_nobody()
        if plan.way is Way.NAMESPACES:
            # Its limit of tasks then counts its own alone (Linux 5.14); not a must.
            LIBC.unshare(NEW_USER)
    die_with_parent()  # again: a change of user ends it
    checked_call(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    LIBC.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if rules is not None:
        checked_call(LIBC.syscall(LANDLOCK_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    for name, most in plan.limits:  # the last but one: Python may hold more memory than sh will get
        _limit(name, most)
    if plan.seccomp is not None:
        checked_call(LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(plan.seccomp), 0, 0), "seccomp")


def _wants_landlock(plan: CagePlan) -> bool:
    """Where programs may run it also guards what a read-only mount does not: pipes with names, devices."""
    return plan.way is Way.LANDLOCK or (plan.way is Way.NAMESPACES and plan.programs and landlock_abi() > 0)


def _limit(name: int, most: int) -> None:
    _, hard = resource.getrlimit(name)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(name, (most, most))


def _go_first_when_memory_is_short() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
