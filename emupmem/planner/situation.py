# SPDX-License-Identifier: Apache-2.0
"""What the planner is given beside the map, and what it answers where nothing fits."""

from __future__ import annotations

from emupmem.kernel.distance import NodeDistances
from emupmem.model import (
    GIB,
    MIB,
    CommandLine,
    DeviceKind,
    EmupmemError,
    FirmwareMap,
    KernelRelease,
    Loss,
    NodeRange,
    Rejected,
    Span,
)
from emupmem.record import record

STEPS = (GIB, 128 * MIB, 16 * MIB, 2 * MIB)
"""Steps of alignment, best first.

1 GiB keeps devdax huge pages and NUMA simple; 128 MiB is the memory section that kernels before
5.3 map as a whole; 16 MiB is ndctl's own region alignment; below 2 MiB the driver refuses
(`misaligned, unable to map`, memremap_compat_align() since 5.7).
"""

LEAST_BLOCK = 128 * MIB
"""The smallest block in which memory is added to a running x86-64 kernel (probe_memory_block_size of init_64.c)."""

STRUCT_PAGE, PAGE = 64, 4096
BELOW_4G = "below 4 GiB: the kernel, DMA and the initrd need it"


@record
class Situation:
    """What the planner knows of the machine.

    `vetoes` are (name, spans): RAM as other sources see it; a place must be RAM for all of them.
    `losses` are ranges that the kernel took out of the RAM: no place may touch one.
    `command_line` holds every word that will be on the command line beside the new reservation,
    reservations that stay included. `hugepages` are the bytes of huge pages that the machine has
    now, however it got them (sysctl): the next boot will have as many. `efi` and `kernel` are None
    where unknown. `block` is the size of a memory block in bytes, 0 where unknown. `distances` are those
    of the nodes that the running kernel has, none where only a log is known. `asked` is what words of this boot take
    away, which the next one need not have.
    """

    firmware: FirmwareMap
    vetoes: tuple[tuple[str, tuple[Span, ...]], ...] = ()
    nodes: tuple[NodeRange, ...] = ()
    command_line: CommandLine | None = None
    efi: bool | None = None
    kernel: KernelRelease | None = None
    hugepages: int = 0
    losses: tuple[Loss, ...] = ()
    block: int = 0
    distances: tuple[NodeDistances, ...] = ()
    asked: tuple[Span, ...] = ()

    def steps(self, kind: DeviceKind) -> tuple[int, ...]:
        """The steps of alignment for a kind, best first: kmem adds whole blocks only (dax_kmem_range of kmem.c)."""
        if kind is not DeviceKind.MEMORY:
            return STEPS
        block = max(self.block, LEAST_BLOCK)
        return tuple(dict.fromkeys((max(GIB, block), block)))


class NoPlan(EmupmemError):
    """Nothing fits. `largest` is the largest size in bytes that would (0: none), per device."""

    def __init__(self, message: str, hint: str, largest: int, rejected: tuple[Rejected, ...]) -> None:
        super().__init__(message, hint)
        self.largest = largest
        self.rejected = rejected


def page_structs(size: int) -> int:
    """Bytes of DRAM for the page structs of `size` bytes of pmem: 64 per 4 KiB page (fsdax, map=mem)."""
    return size // PAGE * STRUCT_PAGE
