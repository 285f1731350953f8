# SPDX-License-Identifier: Apache-2.0
"""What flows between the stages: frozen values only, no behaviour that reads the machine.

Sizes and addresses are bytes. An end is exclusive everywhere in the code; what the kernel prints
is inclusive (exclusive before Linux 3.5) and the parser is the only place that knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from emupmem.record import record

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

LOW_LIMIT = 4 * GIB
"""Nothing is reserved below: the kernel, DMA buffers, the initrd and the PCI hole live there."""

MAX_MEMMAP_REGIONS = 4
"""What the kernel's address randomisation can keep clear of (arch/x86/boot/compressed/kaslr.c)."""


UNCHANGED = "nothing was changed"
"""The state of a machine (see EmupmemError) on which nothing was done."""


class EmupmemError(Exception):
    """A refusal or failure that a person can act on: one line of what is wrong, one of what to do.

    `advice` is what to do, `state` how the machine stands now. Who undoes a change sets the state, and replaces
    what was said before. `changed` is whether something was changed all the same.
    """

    def __init__(self, message: str, hint: str = "", *, state: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = hint
        self.state = state
        self.changed = False

    @property
    def hint(self) -> str:
        """The second line of the error: the advice, then the state."""
        return "; ".join(part for part in (self.advice, self.state) if part)


class RootOnly(EmupmemError):
    """What only root is shown was asked for by somebody else: nothing is known of it."""


class Busy(EmupmemError):
    """Somebody else holds for now what is needed: the lock of all changes, or a device. Worth another try."""


class Presence(StrEnum):
    """How a kernel has a module."""

    LOADED = "loaded"
    BUILT_IN = "built in"
    AVAILABLE = "available"
    MISSING = "missing"
    BLOCKED = "blocked"
    UNKNOWN = "unknown"


@record
class ModuleState:
    """A module of the driver chain; `where` is the FILE:LINE or the place that blocks it."""

    name: str
    presence: Presence
    where: str = ""

    @property
    def text(self) -> str:
        """As `nd_pmem available` or `nd_e820 blocked by /etc/modprobe.d/x.conf:3`."""
        return f"{self.name} {self.presence.value}{f' by {self.where}' if self.where else ''}"


class DeviceKind(StrEnum):
    """What a reservation becomes. The last two are one thing to the kernel at its start, soft reserved memory."""

    PMEM = "pmem"
    DEVDAX = "devdax"
    DAX = "dax"
    MEMORY = "memory"

    @property
    def soft(self) -> bool:
        """Whether the kernel is told `SIZE%START-1+0xefffffff`; else it is `SIZE!START`."""
        return self in (DeviceKind.DAX, DeviceKind.MEMORY)


class Kind(StrEnum):
    """What a range of the firmware map is, in one vocabulary for all kernels and sources."""

    RAM = "usable"
    RESERVED = "reserved"
    SOFT_RESERVED = "soft reserved"
    ACPI_DATA = "ACPI data"
    ACPI_NVS = "ACPI NVS"
    UNUSABLE = "unusable"
    PMEM = "persistent (type 7)"
    PRAM = "persistent (type 12)"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range of physical addresses in bytes: `start` belongs to it, `end` does not."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@record
class MapEntry:
    """One line of a memory map; `words` are the kernel's own words for the type."""

    start: int
    end: int
    kind: Kind
    words: str = ""
    line: int = 0

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)


@record
class FirmwareMap:
    """What the firmware says of the memory, before any `memmap=`.

    `entries` are sorted by start and do not overlap. `source` names where it was read
    (`dmesg`, `journal`, `/sys/firmware/memmap`, a file name), `who` the prefix of its lines
    (`BIOS-e820`, `extended`, `BIOS-e801`, `BIOS-88`, `Xen`, `sysfs`).
    """

    entries: tuple[MapEntry, ...]
    source: str = ""
    who: str = "BIOS-e820"

    @property
    def ram(self) -> tuple[Span, ...]:
        """The usable ranges, one per entry: neighbours are not joined."""
        return tuple(e.span for e in self.entries if e.kind is Kind.RAM)

    @property
    def ram_bytes(self) -> int:
        return sum(e.size for e in self.entries if e.kind is Kind.RAM)


@record
class NodeRange:
    """A range of memory that belongs to a NUMA node."""

    node: int
    start: int
    end: int


@record
class MemmapItem:
    """One item of a `memmap=` list as the kernel reads it.

    `op` is `!` (persistent), `@` (RAM), `#` (ACPI data), `$` (reserved), `%` (change of type),
    `exactmap`, or `limit` (a bare size, or anything the kernel takes for one: acts like `mem=`).
    `text` is the item as written. `size` and `start` are bytes (`start` 0 for a limit). `soft` marks
    the one change of type that is a reservation: RAM into soft reserved memory.
    """

    op: str
    size: int
    start: int
    text: str
    soft: bool = False

    @property
    def reserves(self) -> bool:
        """Whether it makes a device: what emupmem calls its own, whoever wrote it."""
        return self.op == "!" or self.soft

    @property
    def span(self) -> Span:
        return Span(self.start, self.start + self.size)


@record
class CommandLine:
    """A kernel command line read by the kernel's rules (lib/cmdline.c, kernel/params.c, e820.c).

    `items` are all `memmap=` items in order; `mem_limits` the values of `mem=` in bytes;
    `crashkernel` the values of `crashkernel=` as written; `hugepages` the bytes that
    `hugepages=`/`hugepagesz=` ask for (`hugepages_text` the words, for messages); `fake_mem` the
    ranges whose attributes `efi_fake_mem=` changes (until Linux 6.10): soft reserved, most of all.
    """

    text: str
    words: tuple[str, ...]
    items: tuple[MemmapItem, ...]
    mem_limits: tuple[int, ...] = ()
    crashkernel: tuple[str, ...] = ()
    hugepages: int = 0
    hugepages_text: str = ""
    nokaslr: bool = False
    fake_mem: tuple[Span, ...] = ()

    @property
    def reservations(self) -> tuple[MemmapItem, ...]:
        """The items that make a device: what emupmem calls its own."""
        return tuple(i for i in self.items if i.reserves)

    @property
    def pmem(self) -> tuple[MemmapItem, ...]:
        """The reservations that make persistent memory."""
        return tuple(i for i in self.items if i.op == "!")

    @property
    def soft(self) -> tuple[MemmapItem, ...]:
        """The reservations that make soft reserved memory."""
        return tuple(i for i in self.items if i.soft)


@record
class KernelRelease:
    """A kernel's version; `stable` is None where the distribution hides it. `text` is for people.

    `release` is what `uname -r` prints, `i386` whether it is of 32 bits, as far as the banner shows that.
    """

    major: int
    minor: int
    stable: int | None
    text: str = ""
    release: str = field(default="", compare=False)
    i386: bool = field(default=False, compare=False)


@record
class IomemLine:
    """One line of /proc/iomem; `depth` 0 is the outermost."""

    depth: int
    start: int
    end: int
    name: str


@record
class Loss:
    """A range that the kernel took out of the RAM, the line that says so, and its number (0: not counted)."""

    start: int
    end: int
    text: str
    line: int = 0

    @property
    def why(self) -> str:
        """The line as a reason for people."""
        return f"{self.text} (line {self.line})" if self.line else self.text


@record
class BootLog:
    """What one boot's log tells, the last boot where the text holds several.

    `firmware` is None when the text has no map (see `problem`). `user` is the map after the
    command line, `modified` after the kernel's own trimming; both None where not printed.
    `losses` are ranges that the kernel took out of the RAM, line by line; `unplaced` is a line that
    says RAM was lost where nothing says which, empty where all is known. `i386` is a kernel of 32 bits,
    `old_words` a map in the words of kernels before 3.5. `confidential` is the kind of a guest whose memory
    is encrypted (`Intel TDX`, `AMD SEV-SNP`). `line_known` is whether the command line is there as a whole.
    `symptoms` are lines that tell of a broken reservation, as printed; `warnings` what must be said
    of the reading although there is a map, such as that the log ends inside it.
    """

    firmware: FirmwareMap | None
    problem: EmupmemError | None = None
    user: tuple[MapEntry, ...] | None = None
    modified: tuple[MapEntry, ...] | None = None
    command_line: CommandLine | None = None
    linux_version: str = ""
    efi: bool | None = None
    xen: bool = False
    hypervisor: str = ""
    nodes: tuple[NodeRange, ...] = ()
    symptoms: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()
    unplaced: str = ""
    i386: bool = False
    old_words: bool = False
    confidential: str = ""
    line_known: bool = False


@record
class Request:
    """What the user asks of the planner. Sizes in bytes; `size` None lets the planner choose.

    `far` asks for the node that is farthest from the processors, which becomes `numa_node`.
    """

    size: int | None = None
    count: int = 1
    offset: int | None = None
    min_free: int = 2 * GIB
    numa_node: int | None = None
    kind: DeviceKind = DeviceKind.PMEM
    far: bool = False


@record
class Reservation:
    """One range that becomes one device. `align` is the step that start and size are multiples of."""

    start: int
    size: int
    align: int
    numa_node: int | None = None
    kind: DeviceKind = DeviceKind.PMEM

    @property
    def end(self) -> int:
        return self.start + self.size


@record
class Rejected:
    """A range that was not chosen, and why in words for people."""

    start: int
    size: int
    reason: str


@record
class Offer:
    """The most that a usable range could give (bytes, 0 where nothing), with the reason."""

    start: int
    size: int
    at_most: int
    reason: str = ""


@record
class Plan:
    """A reservation that keeps all the rules.

    `memmap` is the one kernel argument; `add_nokaslr` proposes that word as well, `needs_nokaslr` says that
    without it the kernel may place itself inside.
    `ram_left` bytes of RAM stay for the system, page structs and other takers deducted.
    """

    memmap: str
    reservations: tuple[Reservation, ...]
    ram_left: int
    page_structs: int
    warnings: tuple[str, ...] = ()
    add_nokaslr: bool = False
    needs_nokaslr: bool = False


class NamespaceMode(StrEnum):
    """What a namespace of persistent memory becomes (ndctl-create-namespace(1))."""

    FSDAX = "fsdax"
    DEVDAX = "devdax"
    SECTOR = "sector"
    RAW = "raw"


@record
class Command:
    """A program to run, as data until the one place that runs it: argv, and why."""

    argv: tuple[str, ...]
    why: str = ""


@record
class FileEdit:
    """A file of the boot configuration: its content before and after, None where there is none."""

    name: str
    before: bytes | None
    after: bytes | None
    mode: int = 0o644


@record
class Check:
    """One rung of the verification ladder."""

    name: str
    status: str  # ok | fail | pending | skipped
    expected: str = ""
    found: str = ""
    hint: str = ""
    explained_by: str = ""  # the rung below that broke: this one was not looked at


@record
class Device:
    """A pmem block device: its name under /dev and the physical range behind it (bytes)."""

    dev: str
    start: int | None
    size: int
    numa_node: int | None = None
    dax: bool | None = None
    mode: str = ""


@record
class DaxDevice:
    """A device of the dax bus: bytes; `start` None where the kernel hides it from us.

    `driver` is device_dax, kmem, or empty; `node` the NUMA node that its memory would be of.
    """

    name: str
    start: int | None
    size: int
    align: int
    node: int | None
    driver: str


@record
class MemoryBlock:
    """A block of memory that can be taken offline: `state` is online or offline, `zones` what it is or could be in."""

    name: str
    span: Span
    state: str
    zones: str
