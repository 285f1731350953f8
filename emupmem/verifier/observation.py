# SPDX-License-Identifier: Apache-2.0
"""What was seen of a machine after the reboot."""

from __future__ import annotations

from emupmem.boot import entry
from emupmem.device.proof import SeenMount
from emupmem.model import (
    BootLog,
    Check,
    CommandLine,
    DaxDevice,
    Device,
    DeviceKind,
    FirmwareMap,
    IomemLine,
    MemmapItem,
    MemoryBlock,
    ModuleState,
)
from emupmem.record import record


@record
class SeenRegion:
    """A libnvdimm region and the device of its namespace (bytes; None where not shown to us).

    `claim` and `char` are those of `sysfs.Region`.
    """

    name: str
    size: int
    start: int | None
    block: str
    block_size: int
    dax: bool | None
    numa_node: int | None
    provider: str = ""
    mode: str = ""
    claim: str = ""
    char: str = ""


@record
class SeenSoft:
    """A reservation of soft reserved memory and what became of it.

    `kind` is what the unit makes of it at every boot, None where nothing says. `char` tells whether the node under
    /dev is there. `blocks` are the memory blocks of the range, `node_total` bytes the node has in all, `tiers` the
    memory tiers, slowest last, with their nodes. `modules` are the drivers of its kind.
    """

    item: MemmapItem
    kind: DeviceKind | None
    device: DaxDevice | None
    char: bool = False
    blocks: tuple[MemoryBlock, ...] = ()
    node_total: int = 0
    tiers: tuple[tuple[str, tuple[int, ...]], ...] = ()
    modules: tuple[ModuleState, ...] = ()


@record
class SeenTrial:
    """A trial boot: its added words, and how it stands (see `trial.State`)."""

    words: tuple[str, ...]
    chosen: bool
    running: bool
    started_since: bool
    why: str = ""
    kexec: bool = False
    again: bool = False


@record
class Observation:
    """What was seen of one machine; None stands for "could not be seen".

    `configured` are our items in the GRUB defaults as written (`1G!4G`) for normal entries,
    `recovery` those for recovery entries, `variable` where they stand; `entries` what the boot loader
    will offer, `menu` where that lies, `whole` that it was written to its end, `menu_is_newer` whether it
    was written after this boot, `log` this boot's log, `firmware` the firmware's map, `iomem` /proc/iomem,
    `modules` are those of the driver chain.
    `soft` are the reservations of soft reserved memory; `tries` that this boot is a trial, which sets nothing up.
    `devdax` are the starts of the ranges that the unit makes devdax devices of.
    `mounts` are those of our devices and of the boot unit;
    empty where there are none, and then nothing is said of them.
    """

    configured: tuple[str, ...] | None
    variable: str
    command_line: CommandLine
    recovery: tuple[str, ...] = ()
    entries: tuple[entry.BootEntry, ...] | None = None
    menu: str = "/boot/grub/grub.cfg"
    whole: bool = True
    menu_is_newer: bool | None = None
    log: BootLog | None = None
    firmware: FirmwareMap | None = None
    iomem: tuple[IomemLine, ...] | None = None
    regions: tuple[SeenRegion, ...] = ()
    modules: tuple[ModuleState, ...] = ()
    unseen: tuple[tuple[str, str], ...] = ()
    mounts: tuple[SeenMount, ...] = ()
    trial: SeenTrial | None = None
    soft: tuple[SeenSoft, ...] = ()
    tries: bool = False
    devdax: frozenset[int] = frozenset()

    def why_unseen(self, what: str) -> str:
        return dict(self.unseen).get(what, "could not be read")


@record
class Verdict:
    """The ladder, the devices that the reservations became, and the short answer."""

    checks: tuple[Check, ...]
    devices: tuple[Device, ...]

    @property
    def pending(self) -> bool:
        return any(c.status == "pending" for c in self.checks)

    @property
    def ok(self) -> bool:
        return not any(c.status in ("pending", "fail") for c in self.checks)

    @property
    def nothing_reserved(self) -> bool:
        return (
            self.ok and not self.devices and not any(c.name in ("device", "dax-device") for c in self.checks)
        )

    @property
    def nothing(self) -> str:
        """What `nothing_reserved` says, as far as it was seen."""
        if any(c.name == "configured" and c.status == "skipped" for c in self.checks):
            return "nothing is reserved in this boot; what the next start reserves could not be seen"
        return "nothing is reserved"
