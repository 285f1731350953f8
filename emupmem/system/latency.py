# SPDX-License-Identifier: Apache-2.0
"""How long a load of memory takes, in ns: each load waits for the one before it, and none finds its line in a cache.

Python is too slow to be in that loop, and a compiler is not on every machine: so the loop is 34 bytes of x86-64, which
stand in a page that can be run and no longer be written. It only reads. Where to load comes from a list of offsets, not
from the memory itself: what is in that may be anything, and stays as it is.

Three things that would make memory look faster or slower than it is are kept out. Caches: the lines of a window are
flushed before it is walked (clflush, which a program without privileges may do). Page tables: the flush has just
translated all addresses of the window, so a walk does not wait for that. Prefetchers: the order is random, and of four
neighbouring lines one is loaded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from emupmem.model import KIB, MIB, EmupmemError

WINDOW = 512 * KIB
"""What is flushed and then walked at once: 128 pages, which the processor can know the places of."""
STRIDE = 256
LOADS = WINDOW // STRIDE
MOST = 64 * MIB
"""What is looked at of one memory."""

# rdi: the window, rsi: the list of offsets (32 bits each), rdx: how many.
_FLUSH = bytes.fromhex(
    "8b06"  # again: mov eax, [rsi]
    "0fae3c07"  #    clflush [rdi + rax]
    "4883c604"  #    add rsi, 4
    "48ffca"  #      dec rdx
    "75f1"  #        jne again
    "0faef0"  #      mfence: what follows waits until all of them are out
    "c3"  #          ret
)
_WALK = bytes.fromhex(
    "31c0"  #        xor eax, eax
    "4531c0"  #      xor r8d, r8d
    "8b0e"  # again: mov ecx, [rsi]        the next offset, known long before it is needed
    "4801c1"  #      add rcx, rax          rax is 0, and is so only after the load before this one
    "488b040f"  #    mov rax, [rdi + rcx]  the load
    "4901c0"  #      add r8, rax           the sum of all that was loaded: proof of where
    "4883e000"  #    and rax, 0
    "4883c604"  #    add rsi, 4
    "48ffca"  #      dec rdx
    "75e7"  #        jne again
    "4c89c0"  #      mov rax, r8
    "c3"  #          ret
)
_WALK_AT = 64
_ROUTINE = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)

_MBIND, _MOVE_PAGES = 237, 279  # arch/x86/entry/syscalls/syscall_64.tbl
_BIND = 2  # MPOL_BIND: there or not at all
_NODE_BITS = 1024


class _Routines(NamedTuple):
    page: mmap.mmap
    """Where they stand; kept with them."""
    flush: Callable[[int, int, int], int]
    walk: Callable[[int, int, int], int]


@cache
def _routines() -> _Routines:
    """The two loops, ready to be called. Raises EmupmemError where this system lets no program make such a page."""
    if os.uname().machine != "x86_64":
        raise EmupmemError(f"latency is measured on x86-64 only, this is {os.uname().machine}")
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[: len(_FLUSH)] = _FLUSH
    page[_WALK_AT : _WALK_AT + len(_WALK)] = _WALK
    here = ctypes.addressof(ctypes.c_char.from_buffer(page))
    if _libc().mprotect(ctypes.c_void_p(here), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        raise EmupmemError(
            f"the loop that measures may not run here: {_why()}",
            "SELinux (execmem) or a sandbox forbids it: run it as another user, or outside of the sandbox",
        )
    return _Routines(page, _ROUTINE(here), _ROUTINE(here + _WALK_AT))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return libc


def _why() -> str:
    return os.strerror(ctypes.get_errno())


@contextmanager
def own_memory(node: int | None) -> Iterator[tuple[int, ...]]:
    """Memory of our own, on a NUMA node where one is named: the addresses of its windows.

    Raises EmupmemError where it cannot be had there.
    """
    with mmap.mmap(-1, MOST + WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if node is not None:
            _bind(first, len(memory), node)
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1  # else all of it is the one page of zeros
        start = -(-first // WINDOW) * WINDOW
        found = tuple(range(start, start + MOST, WINDOW))
        if node is not None:
            _check_place(found, node)
        yield found


def _bind(start: int, size: int, node: int) -> None:
    mask = (ctypes.c_ulong * (_NODE_BITS // 64))()
    mask[node // 64] = 1 << node % 64
    call = _libc().syscall
    if call(_MBIND, ctypes.c_void_p(start), ctypes.c_size_t(size), _BIND, mask, _NODE_BITS + 1, 0):
        raise EmupmemError(
            f"memory of node {node} cannot be had: {_why()}",
            "/proc/self/status shows which nodes a program may use here (Mems_allowed_list)",
        )


def _check_place(addresses: tuple[int, ...], node: int) -> None:
    """Raise EmupmemError unless the kernel says that the pages are on the node."""
    count = len(addresses)
    pages, nodes = (ctypes.c_void_p * count)(*addresses), (ctypes.c_int * count)()
    if _libc().syscall(_MOVE_PAGES, 0, ctypes.c_ulong(count), pages, None, nodes, 0):
        raise EmupmemError(
            f"where memory lies cannot be seen: {_why()}", "is this a container? ask outside of it"
        )
    if set(nodes) != {node}:
        raise EmupmemError(
            f"memory that was to be on node {node} is elsewhere",
            "has the node enough that is free? try again",
        )


@contextmanager
def mapped_file(
    descriptor: int, name: str, offsets: tuple[int, ...], align: int
) -> Iterator[tuple[int, ...]]:
    """A file or a DAX device, mapped for reading only, a multiple of `align` bytes: the addresses of its windows.

    Raises EmupmemError.
    """
    size = -(-(max(offsets) + WINDOW) // align) * align
    start = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if start == ctypes.c_void_p(-1).value:
        raise EmupmemError(f"{name} cannot be mapped: {_why()}", "sudo dmesg may show why")
    try:
        yield tuple(start + at for at in offsets)
    finally:
        _libc().munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))


@contextmanager
def one_processor() -> Iterator[int]:
    """Stay on one of the processors that we may use, the first; its number."""
    before = os.sched_getaffinity(0)
    processor = min(before)
    os.sched_setaffinity(0, {processor})
    try:
        yield processor
    finally:
        os.sched_setaffinity(0, before)


def random_order() -> array[int]:
    """The offsets in a window that are loaded, in an order that no prefetcher follows: the same in each run."""
    offsets = array("I", range(0, WINDOW, STRIDE))
    random.Random(STRIDE).shuffle(offsets)  # noqa: S311 (nobody has to be kept from guessing it)
    return offsets


def walk(address: int, order: array[int]) -> tuple[float, int]:
    """(ns for each load of a window, sum of what was loaded modulo 2^64), with no line of it in a cache before."""
    made = _routines()
    offsets, count = order.buffer_info()
    made.flush(address, offsets, count)
    began = time.perf_counter_ns()
    total = made.walk(address, offsets, count)
    return (time.perf_counter_ns() - began) / count, total
