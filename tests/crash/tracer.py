# SPDX-License-Identifier: Apache-2.0
"""Stops a piece of work at every system call that changes a file: to look, to kill, to let the call fail.

As `strace --inject`, but in this process: the work runs in a fork of the warm interpreter, so that hundreds
of runs take seconds. A seccomp filter lets only the changing calls stop (seccomp(2), SECCOMP_RET_TRACE), in
the work itself and in every program that it starts. Linux on x86-64, as the product.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from emupmem.model import EmupmemError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long

_TRACEME, _CONT, _GETREGS, _SETREGS, _SETOPTIONS = 0, 7, 12, 13, 0x4200
_FORK, _VFORK, _CLONE, _EXEC, _SECCOMP, _EXITKILL = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 7, 1 << 20
_SECCOMP_EVENT = 7
_WALL = 0x40000000
_RDX, _RSI, _RDI, _R10, _RAX, _ORIG_RAX = 12, 13, 14, 7, 10, 15  # places in struct user_regs_struct
_ARGUMENTS = (_RDI, _RSI, _RDX, _R10)

_BY_FD = {
    1: "write",
    18: "pwrite64",
    20: "writev",
    40: "sendfile",
    74: "fsync",
    75: "fdatasync",
    77: "ftruncate",
    91: "fchmod",
    93: "fchown",
    190: "fsetxattr",
    199: "fremovexattr",
    285: "fallocate",
    296: "pwritev",
    306: "syncfs",
    328: "pwritev2",
}
_BY_PATH = {
    76: ("truncate", 0),
    82: ("rename", 0, 1),
    83: ("mkdir", 0),
    84: ("rmdir", 0),
    85: ("creat", 0),
    86: ("link", 0, 1),
    87: ("unlink", 0),
    88: ("symlink", 1),
    90: ("chmod", 0),
    92: ("chown", 0),
    94: ("lchown", 0),
    132: ("utime", 0),
    133: ("mknod", 0),
    188: ("setxattr", 0),
    189: ("lsetxattr", 0),
    197: ("removexattr", 0),
    198: ("lremovexattr", 0),
    235: ("utimes", 0),
}
_BY_PLACE = {  # a descriptor of a folder, and a path from there
    258: ("mkdirat", 0),
    259: ("mknodat", 0),
    260: ("fchownat", 0),
    261: ("futimesat", 0),
    263: ("unlinkat", 0),
    264: ("renameat", 0, 2),
    265: ("linkat", 0, 2),
    266: ("symlinkat", 1),
    268: ("fchmodat", 0),
    280: ("utimensat", 0),
    316: ("renameat2", 0, 2),
    452: ("fchmodat2", 0),
}
_OTHERS = {162: "sync", 275: "splice", 326: "copy_file_range"}
_OPEN, _OPENAT, _OPENAT2 = 2, 257, 437
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

CREATING = ("open", "creat", "mkdir", "mkdirat", "mknod", "mknodat", "symlink", "symlinkat", "link", "linkat")
"""Calls that need a new inode or a new name."""
WRITING = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "fallocate")
SYNCING = ("fsync", "fdatasync", "syncfs")


def available() -> bool:
    """Whether this machine lets us trace."""
    if platform.machine() != "x86_64":
        return False
    try:
        return trace(lambda: None, lambda call: None).status == 0
    except OSError:
        return False


@dataclass(frozen=True)
class Call:
    """A changing system call that is about to happen: its name, the files it names, whose it is.

    `open` stands for every way of opening to write; `creates` says whether it may make the file.
    """

    name: str
    paths: tuple[str, ...]
    pid: int
    own: bool
    creates: bool
    trace: Trace = field(repr=False, compare=False)

    def inside(self, root: Path) -> bool:
        return any(Path(p).is_relative_to(root) for p in self.paths)

    def fail(self, number: int) -> None:
        """Let it fail with this errno, and not happen."""
        self.trace.let_fail(self.pid, number)


@dataclass
class Result:
    """How the work ended: exit status (negative: signal), what it gave back, and what it raised."""

    status: int
    said: str = ""
    error: str = ""
    hint: str = ""
    unexpected: str = ""


class Trace:
    """The processes of one piece of work, all of them traced."""

    def __init__(self, main: int) -> None:
        self.main = main
        self.pids = {main}
        self.status: int | None = None

    def kill(self) -> None:
        """End the work itself at once; the programs that it started go on."""
        os.kill(self.main, signal.SIGKILL)
        code = 0
        while not os.WIFSIGNALED(code):
            _, code = os.waitpid(self.main, _WALL)
        self.ended(self.main, code)

    def ended(self, pid: int, code: int) -> None:
        self.pids.discard(pid)
        if pid == self.main:
            self.status = os.waitstatus_to_exitcode(code)

    def signal(self, number: int) -> None:
        os.kill(self.main, number)

    def let_fail(self, pid: int, number: int) -> None:
        regs = _registers(pid)
        regs[_ORIG_RAX], regs[_RAX] = (1 << 64) - 1, (1 << 64) - number
        _ptrace(_SETREGS, pid, ctypes.addressof(regs))


def trace(work: Callable[[], object], on_call: Callable[[Call], None]) -> Result:
    """Run `work` in a fork, calling `on_call` before each changing call of it and of what it starts."""
    ours, theirs = os.pipe()
    main = os.fork()
    if main == 0:
        _child(work, theirs)
    os.close(theirs)
    state = Trace(main)
    status = _loop(state, on_call)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read()
    return Result(status, **(json.loads(said) if said else {}))


def _child(work: Callable[[], object], pipe: int) -> NoReturn:
    status = 70
    try:
        _ptrace(_TRACEME, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        _filter()
        said, status = _outcome(work)
        os.write(pipe, json.dumps(said).encode())
    finally:
        os._exit(status)


def _outcome(work: Callable[[], object]) -> tuple[dict[str, str], int]:
    try:
        said = work()
    except EmupmemError as exc:
        return {"error": exc.message, "hint": exc.hint}, 1
    except BaseException as exc:
        import traceback

        return {"unexpected": f"{exc!r}\n{traceback.format_exc()}"}, 70
    return {"said": str(said or "")}, 0


def _loop(state: Trace, on_call: Callable[[Call], None]) -> int:
    """Serve the stops of all processes until the last one has ended; the work's own status."""
    met = False
    while state.pids:
        pid, code = os.waitpid(-1, _WALL)
        if os.WIFEXITED(code) or os.WIFSIGNALED(code):
            state.ended(pid, code)
            continue
        number = os.WSTOPSIG(code)
        deliver = 0
        if code >> 16 == _SECCOMP_EVENT:
            call = _call(state, pid)
            if call is not None:
                on_call(call)
        elif pid == state.main and not met:
            met = True
            _ptrace(_SETOPTIONS, pid, _FORK | _VFORK | _CLONE | _EXEC | _SECCOMP | _EXITKILL)
        elif code >> 16 == 0 and (pid in state.pids or number != signal.SIGSTOP):
            deliver = number
        if pid == state.main and state.status is not None:
            continue  # killed by on_call
        state.pids.add(pid)
        _ptrace(_CONT, pid, deliver, may_be_gone=True)
    assert state.status is not None
    return state.status


def _ptrace(request: int, pid: int, data: int, may_be_gone: bool = False) -> None:
    if _LIBC.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        if not (may_be_gone and number == errno.ESRCH):  # killed meanwhile
            raise OSError(number, f"ptrace {request}: {os.strerror(number)}")


def _registers(pid: int) -> Any:
    regs = (ctypes.c_uint64 * 27)()
    _ptrace(_GETREGS, pid, ctypes.addressof(regs))
    return regs


def _call(state: Trace, pid: int) -> Call | None:
    """What the stopped process is about to do."""
    try:
        regs = _registers(pid)
        number, args = regs[_ORIG_RAX], [regs[n] for n in _ARGUMENTS]
        name, paths, creates = _named(pid, number, args)
    except OSError:  # killed meanwhile
        return None
    return Call(name, tuple(p for p in paths if p), pid, pid == state.main, creates, state)


def _named(pid: int, number: int, args: list[int]) -> tuple[str, list[str], bool]:
    if number in _BY_FD:
        return _BY_FD[number], [_behind(pid, args[0])], False
    if number in _BY_PATH:
        name, *places = _BY_PATH[number]
        return str(name), [_path(pid, None, args[int(n)]) for n in places], name in CREATING
    if number in _BY_PLACE:
        name, *places = _BY_PLACE[number]
        return str(name), [_path(pid, args[int(n)], args[int(n) + 1]) for n in places], name in CREATING
    if number == _OPEN:
        return "open", [_path(pid, None, args[0])], bool(args[1] & os.O_CREAT)
    if number in (_OPENAT, _OPENAT2):
        flags = args[2] if number == _OPENAT else 0
        return "open", [_path(pid, args[0], args[1])], bool(flags & os.O_CREAT)
    name = _OTHERS[number]
    return name, [_behind(pid, args[2])] if number != 162 else [], False


def _behind(pid: int, descriptor: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/fd/{descriptor & 0xFFFFFFFF}").readlink())
    except OSError:
        return ""


def _path(pid: int, folder: int | None, address: int) -> str:
    text = _text(pid, address)
    if text.startswith("/"):
        return os.path.normpath(text)
    at_cwd = folder is None or folder & 0xFFFFFFFF == 0xFFFFFF9C  # AT_FDCWD
    base = str(Path(f"/proc/{pid}/cwd").readlink()) if at_cwd else _behind(pid, folder or 0)
    return os.path.normpath(f"{base}/{text}")


def _text(pid: int, address: int) -> str:
    """A text in the memory of another process."""
    data = b""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        while b"\0" not in data and len(data) < 4096:
            memory.seek(address + len(data))
            data += memory.read(4096 - (address + len(data)) % 4096)
    return os.fsdecode(data.partition(b"\0")[0])


def _filter() -> None:
    """From here on the changing calls of this process and of all that it starts wait for the tracer."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06  # linux/bpf_common.h
    allow, stop = 0x7FFF0000, 0x7FF00000
    plain = [*_BY_FD, *_BY_PATH, *_BY_PLACE, *_OTHERS, _OPENAT2]
    n = len(plain)
    program = [(load, 0, 0, 0), (equal, n + 2, 0, _OPENAT), (equal, n + 3, 0, _OPEN)]
    program += [(equal, n + 5 - k, 0, number) for k, number in enumerate(plain)]
    program += [(give, 0, 0, allow)]
    program += [(load, 0, 0, 16 + 8 * 2), (any_bit, 3, 2, _WRITING)]  # the flags of openat
    program += [(load, 0, 0, 16 + 8 * 1), (any_bit, 1, 0, _WRITING)]  # and of open
    program += [(give, 0, 0, allow), (give, 0, 0, stop)]
    code = b"".join(struct.pack("HBBI", *one) for one in program)
    room = ctypes.create_string_buffer(code)
    head = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(room))
    for words in ((38, 1, 0), (22, 2, head)):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        if _LIBC.prctl(words[0], words[1], words[2], 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
