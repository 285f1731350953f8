# SPDX-License-Identifier: Apache-2.0
"""Which memory `emupmem bench` measures: nodes, DAX devices and files on a DAX mount, all of them only read."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from emupmem.device.blocks import mount_of, mounts
from emupmem.device.dax import HUGE, is_dax_file
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import KIB, MIB, EmupmemError
from emupmem.record import record
from emupmem.system.errors import sudo_hint
from emupmem.system.latency import (
    LOADS,
    MOST,
    WINDOW,
    mapped_file,
    one_processor,
    own_memory,
    random_order,
    walk,
)
from emupmem.system.machine import Machine
from emupmem.system.sysfs import Region, node_numbers, read_dax_devices
from emupmem.units import human

LEAST = 4 * WINDOW
"""Less than this of a file is no sample."""
_ROOM = MOST + 64 * MIB
"""What a node must have free: the kernel ends programs where there is none."""
_WHAT = "name a node (node1), a DAX device (/dev/dax0.0), or a file on a DAX mount"


@record
class Latency:
    """What loads of one memory took, in ns: the middle one of its windows, and what half of them lie between.

    `node` is the NUMA node of the memory, None where it is not known; `times` the ratio to the first that was measured.
    """

    target: str
    node: int | None
    loads: int
    ns: float
    low: float
    high: float
    times: float


@record
class Measured:
    """All that was measured by one processor; first the memory of its own node, or where that has none of the first."""

    processor: int
    node: int
    results: tuple[Latency, ...]
    notes: tuple[str, ...]


@record
class _Source:
    """One memory to measure: how it is had, and whether it is RAM that the command line reserves."""

    target: str
    node: int | None
    reserved: bool
    windows: AbstractContextManager[tuple[int, ...]]


def measure(machine: Machine, targets: Sequence[str]) -> Measured:
    """Measure the targets, without any all nodes with memory, beside the memory of this processor's own node.

    Raises EmupmemError where one of them is not to be measured.
    """
    with one_processor() as processor, ExitStack() as stack:
        nodes = node_numbers(machine, "has_memory")
        own = _node_of(machine, processor)
        home = own if own in (nodes or [own]) else nodes[0]
        wanted = list(dict.fromkeys([f"node{home}", *(targets or [f"node{n}" for n in nodes])]))
        sources = [_source(machine, target, nodes) for target in wanted]
        opened = [(source, stack.enter_context(source.windows)) for source in sources]
        results = _results(opened)
        notes = _notes(machine, home, nodes, sources)
        if own != home:
            notes = (f"node {own}, where processor {processor} is, has no memory of its own", *notes)
    return Measured(processor, home, results, notes)


def _node_of(machine: Machine, processor: int) -> int:
    names = machine.names(f"/sys/devices/system/cpu/cpu{processor}")
    return next((int(n[4:]) for n in names if re.fullmatch(r"node\d+", n)), 0)


def _results(opened: Sequence[tuple[_Source, Sequence[int]]]) -> tuple[Latency, ...]:
    """Walk the windows of all in turn: what else happens on the machine meanwhile slows none more than the others."""
    order = random_order()
    times: list[list[float]] = [[] for _ in opened]
    for turn in range(max(len(addresses) for _, addresses in opened)):
        for (_, addresses), seen in zip(opened, times, strict=True):
            if turn < len(addresses):
                seen.append(walk(addresses[turn], order)[0])
    first = statistics.median(times[0])
    found = []
    for (source, addresses), seen in zip(opened, times, strict=True):
        low, middle, high = statistics.quantiles(seen, n=4)
        ns, low, high = (round(x, 1) for x in (middle, low, high))
        loads = LOADS * len(addresses)
        found.append(Latency(source.target, source.node, loads, ns, low, high, round(middle / first, 2)))
    return tuple(found)


# What to measure -----------------------------------------------------------------------------------------


def _source(machine: Machine, target: str, nodes: Sequence[int]) -> _Source:
    if re.fullmatch(r"node\d{1,4}", target):
        node = int(target[4:])
        return _Source(target, node, False, _node_memory(machine, node, nodes))
    name = str(Path(target).absolute())
    kind = machine.entry_kind(name)
    base = name.rpartition("/")[2]
    device = next((d for d in read_dax_devices(machine) if d.name == base and name == f"/dev/{base}"), None)
    if device is not None and device.driver == "kmem":
        raise EmupmemError(
            f"{name} is memory of the system, by the driver kmem",
            f"emupmem bench node{device.node} measures it",
        )
    if device is not None and kind == "character":
        offsets = tuple(range(0, min(device.size, MOST) - WINDOW + 1, WINDOW))
        windows = _file_windows(machine, name, offsets, max(device.align, HUGE))
        return _Source(name, device.node, _is_reserved(machine, device.start), windows)
    if kind == "file":
        region = _region_of(machine, name)
        reserved = region is not None and _is_reserved(machine, region.start)
        node_of = region.numa_node if region is not None else None
        return _Source(name, node_of, reserved, _file_windows(machine, name))
    raise EmupmemError(*_no_target(name, kind))


def _no_target(name: str, kind: str) -> tuple[str, str]:
    if kind == "missing":
        return f"{name} is not there", _WHAT
    if kind == "block":
        why = f"{name} is a block device: a program that maps it gets the page cache, not this memory"
        return why, "mount it (emupmem mount) and name a file on it"
    if kind == "folder":
        why = f"{name} is a folder"
        return (
            why,
            f"name a file in it with some MiB of data: dd if=/dev/urandom of={name}/sample bs=1M count=64",
        )
    return f"{name} is no memory to measure", _WHAT


@contextmanager
def _node_memory(machine: Machine, node: int, nodes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Memory of our own on a node; anywhere, where the kernel knows no nodes."""
    if node not in (nodes or [0]):
        known = ", ".join(map(str, nodes)) or "0"
        raise EmupmemError(f"node {node} has no memory", f"nodes with memory: {known}")
    found = re.search(r"MemFree:\s+(\d+) kB", machine.peek(f"/sys/devices/system/node/node{node}/meminfo"))
    if found is not None and int(found[1]) * KIB < _ROOM:
        raise EmupmemError(
            f"node {node} has {human(int(found[1]) * KIB)} free: {human(_ROOM)} are needed",
            "end what uses its memory first (numastat shows it)",
        )
    with own_memory(node if len(nodes) > 1 else None) as windows:
        yield windows


@contextmanager
def _file_windows(
    machine: Machine, name: str, offsets: tuple[int, ...] = (), align: int = HUGE
) -> Iterator[tuple[int, ...]]:
    """A device at these offsets, or what there is of data in a file; opened for reading only."""
    try:
        descriptor = os.open(machine.path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be read: {exc.strerror}", sudo_hint(exc)) from exc
    try:
        with mapped_file(descriptor, name, offsets or _data_of(descriptor, name), align) as windows:
            yield windows
    finally:
        os.close(descriptor)


def _data_of(descriptor: int, name: str) -> tuple[int, ...]:
    """The windows of a file on a DAX mount that hold data: a hole is the kernel's own page of zeros."""
    if not is_dax_file(f"/proc/self/fd/{descriptor}"):
        raise EmupmemError(
            f"{name} is not on a DAX mount: a program that maps it gets the page cache, which is ordinary memory",
            "emupmem mount makes one; for ordinary memory name a node (node0)",
        )
    found: list[int] = []
    size, at = os.fstat(descriptor).st_size, 0
    while at < size and len(found) * WINDOW < MOST:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            break  # no more data
        end = os.lseek(descriptor, at, os.SEEK_HOLE)
        found += range(-(-at // WINDOW) * WINDOW, end - WINDOW + 1, WINDOW)
        at = end
    if len(found) * WINDOW < LEAST:
        raise EmupmemError(
            f"{name} has less than {human(LEAST)} of data: nothing of a hole is in that memory",
            "name a file with some MiB of data: dd if=/dev/urandom of=FILE bs=1M count=64 makes one",
        )
    return tuple(found[: MOST // WINDOW])


def _region_of(machine: Machine, name: str) -> Region | None:
    """The region that a file's file system is on."""
    mount = mount_of(mounts(machine), machine.real(name))
    source = mount.source.removeprefix("/dev/") if mount is not None else ""
    return next((r for r in machine.regions() if r.block and r.block == source), None)


def _is_reserved(machine: Machine, start: int | None) -> bool:
    line = parse_command_line(machine.peek("/proc/cmdline"))
    return start is not None and any(i.start <= start < i.start + i.size for i in line.reservations)


# What it is worth ---------------------------------------------------------------------------------------


def _notes(machine: Machine, home: int, nodes: Sequence[int], sources: Sequence[_Source]) -> tuple[str, ...]:
    """What a person should know of the figures."""
    found = []
    if len(nodes) < 2:
        found.append(
            "this machine has one NUMA node: RAM that is reserved on it is as fast as the rest, and there is no "
            "slowness to be had in software"
        )
    near = [s.target for s in sources if s.reserved and s.node == home]
    found += [f"{name} is RAM of node {home}, as fast as the rest of it" for name in near]
    if re.search(r"^flags\s*:.*\bhypervisor\b", machine.peek("/proc/cpuinfo"), re.MULTILINE):
        found.append(
            "this is a virtual machine: where the memory of its nodes really lies is for its host to say"
        )
    return tuple(found)
