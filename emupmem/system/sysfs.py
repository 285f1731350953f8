# SPDX-License-Identifier: Apache-2.0
"""What /sys, /proc and a kernel's own files say: memory, nodes, regions, versions, configuration."""

from __future__ import annotations

import contextlib
import gzip
import platform
import re
import struct
from pathlib import Path

from emupmem.kernel.distance import NodeDistances
from emupmem.model import DaxDevice, MemoryBlock, NodeRange, Span
from emupmem.record import record
from emupmem.system.pe import read_pe
from emupmem.system.reader import FileReader, Reader


@record
class Region:
    """A libnvdimm region: bytes; `start` None where the kernel hides it from us.

    `claim` says what an info block on it made of it: `pfn` (fsdax), `btt` (sector), `dax` (devdax), empty where
    there is none; `char` is the character device of devdax, and `block_size` its size then.
    """

    name: str
    size: int
    start: int | None
    provider: str
    numa_node: int | None
    block: str
    block_size: int
    dax: bool | None
    mode: str
    driver: str
    claim: str = ""
    char: str = ""


def read_dax_devices(machine: Reader) -> tuple[DaxDevice, ...]:
    """The devices of the dax bus, by address."""
    base, drivers = "/sys/bus/dax/devices", "/sys/bus/dax/drivers"
    found = []
    for name in machine.names(base):
        here = f"{base}/{name}"
        value = {
            f: _number(machine.peek(f"{here}/{f}")) for f in ("resource", "size", "align", "target_node")
        }
        driver = next((d for d in machine.names(drivers) if machine.exists(f"{drivers}/{d}/{name}")), "")
        made = DaxDevice(
            name, value["resource"], value["size"] or 0, value["align"] or 0, value["target_node"], driver
        )
        found.append(made)
    return tuple(sorted(found, key=lambda d: (d.start is None, d.start, d.name)))


def read_block_size(machine: Reader) -> int:
    """The size of a memory block in bytes, 0 where the kernel has none."""
    try:
        return int(machine.peek("/sys/devices/system/memory/block_size_bytes"), 16)
    except ValueError:
        return 0


def read_memory_blocks(machine: Reader, span: Span) -> tuple[MemoryBlock, ...]:
    """The memory blocks that lie wholly in a range, those that are there."""
    size = read_block_size(machine)
    if not size:
        return ()
    found = []
    for number in range(-(-span.start // size), span.end // size):
        here = f"/sys/devices/system/memory/memory{number}"
        state = machine.peek(f"{here}/state")
        if state:
            block = Span(number * size, (number + 1) * size)
            found.append(MemoryBlock(f"memory{number}", block, state, machine.peek(f"{here}/valid_zones")))
    return tuple(found)


def read_firmware_entries(machine: Reader) -> list[tuple[int, str, str, str]]:
    """(index, start, end, type) of /sys/firmware/memmap, as text."""
    folder = "/sys/firmware/memmap"
    return [
        (int(n), *(machine.peek(f"{folder}/{n}/{field}") for field in ("start", "end", "type")))  # type: ignore[misc]
        for n in machine.names(folder)
        if n.isdigit()
    ]


def read_huge_page_bytes(machine: Reader) -> int:
    """RAM that is kept as huge pages now, of all sizes, in bytes."""
    base = "/sys/kernel/mm/hugepages"
    sizes = [(n, found[1]) for n in machine.names(base) if (found := re.fullmatch(r"hugepages-(\d+)kB", n))]
    return sum((_number(machine.peek(f"{base}/{n}/nr_hugepages")) or 0) * int(kib) * 1024 for n, kib in sizes)


def read_nodes(machine: FileReader) -> tuple[NodeRange, ...]:
    """Memory ranges of the NUMA nodes by sysfs, each node's gaps filled where no other node lies in them.

    RAM that is reserved has no memory blocks; the gap it leaves inside a node is the node's.
    A single node has all the memory there is.
    """
    base = "/sys/devices/system/node"
    block = read_block_size(machine)
    if not block:
        return ()
    blocks: list[tuple[int, int]] = []
    nodes = [int(n[4:]) for n in machine.names(base) if re.fullmatch(r"node\d+", n)]
    for node in nodes:
        numbers = [n[6:] for n in machine.names(f"{base}/node{node}") if re.fullmatch(r"memory\d+", n)]
        blocks += [(int(n) * block, node) for n in numbers]
    if len(nodes) == 1:
        return (NodeRange(nodes[0], 0, 1 << 52),)
    regions = [(r.start, r.numa_node) for r in read_regions(machine) if r.start is not None]
    for dax in read_dax_devices(machine):
        if dax.start is not None and dax.size:
            regions += [(dax.start, dax.node), (dax.start + dax.size - block, dax.node)]
    blocks += [(start, node) for start, node in regions if node is not None]
    out: list[NodeRange] = []
    for start, node in sorted(blocks):
        if out and out[-1].node == node:
            out[-1] = NodeRange(node, out[-1].start, start + block)
        else:
            out.append(NodeRange(node, start, start + block))
    return tuple(out)


def node_numbers(machine: Reader, which: str) -> tuple[int, ...]:
    """The NUMA nodes of a list, `has_memory` or `has_cpu`, written as 0-1,4; none where the kernel has no such list."""
    text = machine.peek(f"/sys/devices/system/node/{which}")
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        return ()
    ends = [part.partition("-") for part in text.split(",")]
    return tuple(n for low, _, high in ends for n in range(int(low), int(high or low) + 1))


def read_node_distances(machine: Reader) -> tuple[NodeDistances, ...]:
    """How far the nodes are that are online, as the firmware's table (SLIT) says or the kernel without one."""
    base = "/sys/devices/system/node"
    numbers = sorted(int(n[4:]) for n in machine.names(base) if re.fullmatch(r"node\d{1,4}", n))
    with_processors = node_numbers(machine, "has_cpu")
    found = []
    for node in numbers:
        words = machine.peek(f"{base}/node{node}/distance").split()
        if len(words) == len(numbers) and all(re.fullmatch(r"\d{1,4}", w) for w in words):
            to = dict(zip(numbers, map(int, words), strict=True))
            found.append(NodeDistances(node, node in with_processors, tuple(to.items())))
    return tuple(found)


def read_regions(machine: FileReader) -> tuple[Region, ...]:
    """The libnvdimm regions that carry persistent memory, with the block device of each."""
    bus = "/sys/bus/nd/devices"
    found = [_region(machine, bus, n) for n in machine.names(bus) if re.fullmatch(r"region\d+", n)]
    return tuple(sorted(found, key=lambda r: (r.start is None, r.start, r.name)))


def _region(machine: FileReader, bus: str, name: str) -> Region:
    here = f"{bus}/{name}"
    claims = [c for c in machine.names(here) if re.fullmatch(r"(namespace|pfn|btt|dax)\d+\.\d+", c)]
    # The block device hangs on the namespace, or on the pfn or btt device that claimed it.
    owner = next((c for c in claims if machine.names(f"{here}/{c}/block")), "")
    block = next(iter(machine.names(f"{here}/{owner}/block")), "") if owner else ""
    namespace = owner or next((c for c in claims if c.startswith("namespace")), "")
    mode = machine.peek(f"{here}/{namespace}/mode") if namespace else ""
    driver = (
        machine.path(f"{here}/{namespace}/driver").name
        if machine.exists(f"{here}/{namespace}/driver")
        else ""
    )
    provider = machine.path(here).parent
    char = "" if block else _character(machine, name)
    size = _number(machine.peek(f"/sys/class/block/{block}/size")) or 0 if block else 0
    kind = re.sub(r"[\d.]", "", owner)
    return Region(
        name,
        _number(machine.peek(f"{here}/size")) or 0,
        _number(machine.peek(f"{here}/resource")),
        peek_file(provider / "provider"),
        _number(machine.peek(f"{here}/numa_node")),
        block,
        (_number(machine.peek(f"/sys/bus/dax/devices/{char}/size")) or 0) if char else size * 512,
        {"1": True, "0": False}.get(machine.peek(f"/sys/class/block/{block}/queue/dax")) if block else None,
        mode,
        driver,
        "dax" if char else kind if kind in ("pfn", "btt") else "",
        char,
    )


def _character(machine: FileReader, region: str) -> str:
    """The DAX character device of a region, empty where it has none."""
    base = "/sys/bus/dax/devices"
    return next((n for n in machine.names(base) if region in machine.path(f"{base}/{n}").parts), "")


def read_kernel_banner(machine: FileReader, image: str) -> str:
    """The version text inside a kernel image (boot protocol header, offset 0x20e); empty if none.

    It tells the stable number that `uname -r` of a distribution hides. Of a unified image: of the kernel in it.
    """
    try:
        with machine.path(image).open("rb") as file:
            head = file.read(0x10000)
            if head[:2] == b"MZ" and head[0x202:0x206] != b"HdrS":
                file.seek(0)
                unified = read_pe(file)
                file.seek(unified.kernel if unified is not None else 0)
                head = file.read(0x10000)
    except OSError:
        return ""
    if head[0x202:0x206] != b"HdrS":
        return ""
    start = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
    text = head[start : start + 512].split(b"\0")[0].decode("ascii", "replace")
    return f"Linux version {text}" if text else ""


def read_kernel_config(machine: Reader, release: str) -> tuple[str, str]:
    """(file, text) of the build configuration of a kernel; two empty strings where none is kept."""
    for name in (
        f"/boot/config-{release}",
        f"/usr/lib/modules/{release}/config",
        f"/lib/modules/{release}/config",
        f"/usr/lib/modules/{release}/build/.config",
    ):
        text = machine.peek(name)
        if text:
            return name, text
    if machine.live and release == platform.release():
        with contextlib.suppress(OSError, EOFError):
            return "/proc/config.gz", gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    return "", ""


def peek_file(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None
