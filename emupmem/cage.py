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
import errno
import os
import re
import resource
import selectors
import signal
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path

NOBODY = 65534
MOST_OUTPUT = 32 << 20
"""Bytes that sh may print, as much as the values of any real file take a thousand times over."""

_MORE_TASKS = 100
_MEMORY = {False: 512 << 20, True: 2 << 30}
_CPU_SECONDS = 20
_OPEN_FILES = 256
_PAUSE = 0.05


class Way(Enum):
    """What confines sh. The first one that works is taken."""

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"


WAYS: tuple[Way, ...] = tuple(Way)


class CageError(Exception):
    """The cage could not be built; sh was not started."""


@dataclass(frozen=True, slots=True)
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


def run(job: Job, way: Way | None, seconds: float) -> tuple[bytes, bytes, int]:
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
        return run(job, way, 10.0)[0] == b"ready\n"
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


# --- the child, from fork to exec --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the child needs to know; nothing is looked up after the fork that can be known before."""

    way: Way | None
    programs: bool
    files: tuple[int, ...]
    needs: tuple[str, ...]
    limits: tuple[tuple[int, int], ...]
    seccomp: ctypes.Array[ctypes.c_char] | None


def _plan(job: Job, way: Way | None) -> _Plan:
    needs = () if job.programs or way is None else _needs(job.sh)
    limits = (
        (resource.RLIMIT_NPROC, _tasks(os.geteuid() or NOBODY, int(time.monotonic())) + _MORE_TASKS),
        (resource.RLIMIT_AS, _MEMORY[job.programs]),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_NOFILE, max([*job.files, 0]) + _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    )
    return _Plan(way, job.programs, job.files, needs, limits, _seccomp()[0] if way else None)


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


def _enter(plan: _Plan) -> None:
    """Build the cage around this process, which then becomes sh. Raises OSError: sh is not started."""
    root = os.geteuid() == 0
    os.umask(0o022)
    _die_with_parent()
    _go_first_when_memory_is_short()
    if plan.way is Way.NAMESPACES:
        root = _new_spaces(root)
        _second_process()
        _mount(None, "/", None, _REC | _PRIVATE)
        if plan.programs:
            _read_only_view()
        else:
            _empty_root(plan)
    rules = _landlock_rules(plan) if _wants_landlock(plan) else None
    if root:
        _become_nobody()
        if (
            plan.way is Way.NAMESPACES
        ):  # its limit of tasks then counts its own alone (Linux 5.14); not a must
            _LIBC.unshare(_NEW_USER)
    _die_with_parent()  # again: a change of user ends it
    _checked(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if rules is not None:
        _checked(_LIBC.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    for name, most in plan.limits:  # the last but one: Python may hold more memory than sh will get
        _limit(name, most)
    if plan.seccomp is not None:
        _checked(_LIBC.prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(plan.seccomp), 0, 0), "seccomp")


def _wants_landlock(plan: _Plan) -> bool:
    """Where programs may run it also guards what a read-only mount does not: pipes with names, devices."""
    return plan.way is Way.LANDLOCK or (plan.way is Way.NAMESPACES and plan.programs and _landlock_abi() > 0)


def _limit(name: int, most: int) -> None:
    _, hard = resource.getrlimit(name)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(name, (most, most))


def _go_first_when_memory_is_short() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


# --- calls of the kernel -----------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_LIBC.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_LIBC.prctl.argtypes = [ctypes.c_int, *([ctypes.c_ulong] * 4)]

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _die_with_parent() -> None:
    _checked(_LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent death signal")


# --- namespaces ----------------------------------------------------------------------------------------------

_NEW_USER = 0x10000000
_SPACES = (
    0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
)  # mounts, names, IPC, processes, network

_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_REMOUNT, _BIND, _REC, _PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442
_STATVFS_TO_MOUNT = {1024: 0x400, 2048: 0x800, 4096: 0x200000}  # noatime, nodiratime, relatime

_HARMLESS = ("null", "zero", "full", "random", "urandom")
_EMPTY = "/proc"  # any folder that is there everywhere: what it holds is not needed in an empty root
_OUT_OF_REACH = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EINVAL}


def _new_spaces(root: bool) -> bool:
    """Leave the namespaces of this machine; whether we are still root of it, to become nobody later."""
    if root and _LIBC.unshare(_SPACES) == 0:
        return True
    if root:  # of a container that may not mount
        _become_nobody()
        _checked(_LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")  # else /proc/self is not ours
    user, group = os.geteuid(), os.getegid()
    _checked(_LIBC.unshare(_SPACES | _NEW_USER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return False


def _second_process() -> None:
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


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if w is None else os.fsencode(w) for w in (source, target, kind, data)]
    _checked(_LIBC.mount(words[0], words[1], words[2], flags, words[3]), f"mount {target}")


def _empty_root(plan: _Plan) -> None:
    """A root with nothing in it but sh, its libraries, /dev/null and the texts."""
    texts = {f"/dev/fd/{number}": os.pread(number, os.fstat(number).st_size, 0) for number in plan.files}
    _mount("tmpfs", _EMPTY, "tmpfs", _NOSUID | _NODEV, "mode=755")
    bound = (*plan.needs, "/dev/null")
    for name in bound:
        _put(f"{_EMPTY}{name}", b"")
        _mount(name, f"{_EMPTY}{name}", None, _BIND)
    for name, text in texts.items():
        _put(f"{_EMPTY}{name}", text)
    os.chdir(_EMPTY)
    _checked(_LIBC.syscall(_numbers()["pivot_root"], b".", b"."), "pivot_root")
    _checked(_LIBC.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")
    _freeze(["/", *bound])


def _put(name: str, data: bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)


def _read_only_view() -> None:
    """This machine's files, none of which can be changed, with a /proc and a /dev of our own."""
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in _HARMLESS}
    _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC | _RDONLY)
    points = list(_mount_points())
    _mount("tmpfs", "/dev", "tmpfs", _NOSUID | _NOEXEC, "mode=755")
    for name, number in devices.items():
        _put(f"/dev/{name}", b"")
        _mount(f"/proc/self/fd/{number}", f"/dev/{name}", None, _BIND)
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
    wanted = struct.pack("QQQQ", _RDONLY | _NOSUID, 0, 0, 0)
    result = _LIBC.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, wanted, ctypes.c_size_t(len(wanted))
    )
    if result == 0:
        return
    if ctypes.get_errno() != errno.ENOSYS:
        _checked(-1, "mount_setattr")
    for point in points:
        _freeze_one(point)


def _freeze_one(point: str) -> None:
    try:
        now = os.statvfs(point).f_flag
        kept = now & (_NODEV | _NOEXEC) | sum(to for of, to in _STATVFS_TO_MOUNT.items() if now & of)
        _mount(None, point, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | kept)
    except OSError as exc:
        if exc.errno not in _OUT_OF_REACH:  # hidden by another mount, or closed to everybody here
            raise


# --- what sh is made of ----------------------------------------------------------------------------------------

_LIBRARY = re.compile(rb"(?:^|=>)\s*(/\S+) \(0x", re.M)


@lru_cache(maxsize=8)
def _needs(sh: str) -> tuple[str, ...]:
    """The files that sh cannot start without, sh first: asked of its own loader, as ldd does."""
    loader = _loader(Path(sh).read_bytes())
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


def _loader(program: bytes) -> str:
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


# --- Landlock ----------------------------------------------------------------------------------------------------

# Numbers and rights: include/uapi/linux/landlock.h; the numbers are the same on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE = 1 << 14
_SINCE = ((1, (1 << 13) - 1), (2, 1 << 13), (3, _TRUNCATE), (5, 1 << 15))  # files; moves; sizes; ioctl
_NET = 0b11  # bind and connect TCP
_SCOPED = 0b11  # abstract sockets and signals


def _landlock_abi() -> int:
    return int(_LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _landlock_rules(plan: _Plan) -> int:
    """A ruleset: nothing may be written but /dev/null; what may be read and run hangs on whose text it is."""
    abi = _checked(_landlock_abi(), "landlock")
    handled = sum(bits for since, bits in _SINCE if abi >= since)
    asked = struct.pack("QQQ", handled, _NET, _SCOPED)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = _checked(
        _LIBC.syscall(_LANDLOCK_CREATE_RULESET, asked, ctypes.c_size_t(len(asked)), 0),
        "landlock_create_ruleset",
    )
    _allow(rules, "/dev/null", (_READ_FILE | _WRITE_FILE | _TRUNCATE) & handled)
    if plan.programs:
        _allow(rules, "/", _EXECUTE | _READ_FILE | _READ_DIR)
    for at, name in enumerate(plan.needs):
        _allow(rules, name, _READ_FILE | (_EXECUTE if at < 2 else 0))
    return rules


def _allow(rules: int, name: str, rights: int) -> None:
    place = os.open(name, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, place)
    _checked(_LIBC.syscall(_LANDLOCK_ADD_RULE, rules, 1, rule, 0), "landlock_add_rule")
    os.close(place)


# --- seccomp -------------------------------------------------------------------------------------------------------

# Name, number on x86_64, number on aarch64 (-1: it is not there). Source: arch/x86/entry/syscalls/syscall_64.tbl,
# include/uapi/asm-generic/unistd.h.
_CALLS = """
kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
pidfd_send_signal 424 424  pidfd_open 434 434  pidfd_getfd 438 438  setsid 112 157  setpgid 109 154
socket 41 198  ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  process_madvise 440 440
kcmp 312 272  chmod 90 -1  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  chown 92 -1  lchown 94 -1
fchown 93 55  fchownat 260 54  utime 132 -1  utimes 235 -1  futimesat 261 -1  utimensat 280 88
setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  setxattrat 463 463  removexattr 197 14
lremovexattr 198 15  fremovexattr 199 16  removexattrat 466 466  file_setattr 469 469
truncate 76 45  ftruncate 77 46  mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51
unshare 272 97  setns 308 268  open_tree 428 428  open_tree_attr 467 467  move_mount 429 429  fsopen 430 430
fsconfig 431 431  fsmount 432 432  fspick 433 433  mount_setattr 442 442  io_uring_setup 425 425  bpf 321 280
perf_event_open 298 241  userfaultfd 323 282  add_key 248 217  request_key 249 218  keyctl 250 219
shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193  semctl 66 191  semtimedop 220 192
msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187  mq_open 240 180  mq_unlink 241 181
setpriority 141 140  ioprio_set 251 30  sched_setaffinity 203 122  sched_setscheduler 144 119
sched_setparam 142 118  sched_setattr 314 274  migrate_pages 256 238  move_pages 279 239
open_by_handle_at 304 265
"""
_ASKED = """
clone 56 220  clone3 435 435  open 2 -1  openat 257 56  openat2 437 437  ioctl 16 29  fcntl 72 25
prlimit64 302 261
"""
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # include/uapi/linux/audit.h

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # linux/filter.h
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH = 0, 4
_ARGUMENT = (16, 24, 32)  # the lower half of the first three arguments
_NEWEST = 469  # what came later is not there: nobody has looked at it (nor at the numbers of x32)
_CLONE_SPACES = 0x7E020000
# What is typed into a terminal (TIOCSTI, TIOCLINUX), who gets a signal of a file (FIOSETOWN, SIOCSPGRP; F_SETOWN,
# F_SETOWN_EX), what chattr sets in three shapes.
_IOCTLS = (0x5412, 0x541C, 0x8901, 0x8902, 0x40086602, 0x40046602, 0x401C5820)
_FCNTLS = (8, 15)


def _table(text: str) -> dict[str, int]:
    column = list(_MACHINES).index(os.uname().machine)
    words = text.split()
    pairs = zip(words[::3], zip(words[1::3], words[2::3], strict=True), strict=True)
    return {name: int(numbers[column]) for name, numbers in pairs if numbers[column] != "-1"}


@lru_cache(maxsize=1)
def _numbers() -> dict[str, int]:
    return _table(_CALLS + _ASKED)


@lru_cache(maxsize=1)
def _seccomp() -> tuple[ctypes.Array[ctypes.c_char], ...]:
    """The filter as the kernel takes it: its head, and the program that the head points at."""
    program = _seccomp_program()
    text = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(text))
    return ctypes.create_string_buffer(head, len(head)), text


def _seccomp_program() -> bytes:
    """Its steps, eight bytes each. Raises CageError on an architecture that it is not written for."""
    machine = os.uname().machine
    if machine not in _MACHINES or struct.calcsize("P") != 8:
        raise CageError(f"no seccomp filter for {machine}")
    denied = _FAIL | errno.EPERM
    steps = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _MACHINES[machine]), (_RETURN, 0, 0, denied)]
    steps += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _NEWEST + 1), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
    for number in _table(_CALLS).values():
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denied)]
    for block in _asked():
        steps += block
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


_Step = tuple[int, int, int, int]


def _asked() -> Iterator[list[_Step]]:
    """The calls that hang on what they ask for; those that ask in memory are not there, and programs know why."""
    known = _table(_ASKED)
    for name in ("clone3", "openat2"):
        yield [(_EQUAL, 0, 1, known[name]), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
    yield _unless(known["clone"], 0, [(_ANY_BIT, 0, 1, _CLONE_SPACES)])
    yield _unless(known["ioctl"], 1, *([(_EQUAL, 0, 1, number)] for number in _IOCTLS))
    yield _unless(known["fcntl"], 1, *([(_EQUAL, 0, 1, number)] for number in _FCNTLS))
    yield _unless(known["prlimit64"], 0, [(_EQUAL, 1, 0, 0)])  # of oneself
    # Before its third version Landlock does not guard the size of a file that is opened to be read.
    emptied = [(_AND, 0, 0, os.O_TRUNC | os.O_ACCMODE), (_EQUAL, 0, 1, os.O_TRUNC)]
    yield _unless(known["openat"], 2, emptied)
    if "open" in known:
        yield _unless(known["open"], 1, emptied)


def _unless(number: int, argument: int, *refused: Sequence[_Step]) -> list[_Step]:
    """Refuse a call where one of the tests of an argument goes on to the next step, else let it through."""
    steps: list[_Step] = [(_LOAD, 0, 0, _ARGUMENT[argument])]
    for test in refused:
        steps += [*test, (_RETURN, 0, 0, _FAIL | errno.EPERM)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(steps), number), *steps]
