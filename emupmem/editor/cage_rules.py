# SPDX-License-Identifier: Apache-2.0
"""What the kernel refuses to sh: files by Landlock, system calls by seccomp."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache

from emupmem.editor.cage_libc import LIBC, checked_call
from emupmem.editor.cage_plan import CageError, CagePlan

# Numbers and rights: include/uapi/linux/landlock.h; the numbers are the same on every architecture.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8

LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # linux/filter.h
ALLOW, FAIL = 0x7FFF0000, 0x00050000
NUMBER, ARCH = 0, 4

_TRUNCATE = 1 << 14
_SINCE = ((1, (1 << 13) - 1), (2, 1 << 13), (3, _TRUNCATE), (5, 1 << 15))  # files; moves; sizes; ioctl
_NET = 0b11  # bind and connect TCP
_SCOPED = 0b11  # abstract sockets and signals


def landlock_abi() -> int:
    return int(LIBC.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def landlock_rules(plan: CagePlan) -> int:
    """A ruleset: nothing may be written but /dev/null; what may be read and run hangs on whose text it is."""
    abi = checked_call(landlock_abi(), "landlock")
    handled = sum(bits for since, bits in _SINCE if abi >= since)
    asked = struct.pack("QQQ", handled, _NET, _SCOPED)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = checked_call(
        LIBC.syscall(LANDLOCK_CREATE_RULESET, asked, ctypes.c_size_t(len(asked)), 0),
        "landlock_create_ruleset",
    )
    _allow(rules, "/dev/null", (READ_FILE | WRITE_FILE | _TRUNCATE) & handled)
    if plan.programs:
        _allow(rules, "/", EXECUTE | READ_FILE | READ_DIR)
    for at, name in enumerate(plan.needs):
        _allow(rules, name, READ_FILE | (EXECUTE if at < 2 else 0))
    return rules


def _allow(rules: int, name: str, rights: int) -> None:
    place = os.open(name, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, place)
    checked_call(LIBC.syscall(LANDLOCK_ADD_RULE, rules, 1, rule, 0), "landlock_add_rule")
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
def syscall_numbers() -> dict[str, int]:
    return _table(_CALLS + _ASKED)


@lru_cache(maxsize=1)
def seccomp() -> tuple[ctypes.Array[ctypes.c_char], ...]:
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
    denied = FAIL | errno.EPERM
    steps = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, _MACHINES[machine]), (RETURN, 0, 0, denied)]
    steps += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, _NEWEST + 1), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    for number in _table(_CALLS).values():
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, denied)]
    for block in _asked_calls():
        steps += block
    steps.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


_Step = tuple[int, int, int, int]


def _asked_calls() -> Iterator[list[_Step]]:
    """The calls that hang on what they ask for; those that ask in memory are not there, and programs know why."""
    known = _table(_ASKED)
    for name in ("clone3", "openat2"):
        yield [(EQUAL, 0, 1, known[name]), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    yield _unless(known["clone"], 0, [(ANY_BIT, 0, 1, _CLONE_SPACES)])
    yield _unless(known["ioctl"], 1, *([(EQUAL, 0, 1, number)] for number in _IOCTLS))
    yield _unless(known["fcntl"], 1, *([(EQUAL, 0, 1, number)] for number in _FCNTLS))
    yield _unless(known["prlimit64"], 0, [(EQUAL, 1, 0, 0)])  # of oneself
    # Before its third version Landlock does not guard the size of a file that is opened to be read.
    emptied = [(AND, 0, 0, os.O_TRUNC | os.O_ACCMODE), (EQUAL, 0, 1, os.O_TRUNC)]
    yield _unless(known["openat"], 2, emptied)
    if "open" in known:
        yield _unless(known["open"], 1, emptied)


def _unless(number: int, argument: int, *refused: Sequence[_Step]) -> list[_Step]:
    """Refuse a call where one of the tests of an argument goes on to the next step, else let it through."""
    steps: list[_Step] = [(LOAD, 0, 0, _ARGUMENT[argument])]
    for test in refused:
        steps += [*test, (RETURN, 0, 0, FAIL | errno.EPERM)]
    steps.append((RETURN, 0, 0, ALLOW))
    return [(EQUAL, 0, len(steps), number), *steps]
