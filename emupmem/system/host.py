# SPDX-License-Identifier: Apache-2.0
"""The reading half of a machine: what is in its files, what its programs say. Nothing here changes anything.

Whatever decides, plans, judges or reports takes a `Host`: the machine that we run on, a tree, an archive. What
writes, or starts programs for their effect, takes a `Machine`: so by its type an archive cannot be written to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from emupmem.model import EmupmemError, NodeRange
from emupmem.system.pe import PeFile, read_pe
from emupmem.system.programs import Completed
from emupmem.system.sysfs import Region, read_firmware_entries, read_huge_page_bytes, read_kernel_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from emupmem.editor.shell import Judge


class Host(ABC):
    """What can be seen of one machine. Names are absolute, as the machine itself sees its files.

    `live` says that it is the one we run on, `replay` what sh once made of its GRUB defaults where they are not to
    be sourced, `answers` what programs said, while each is asked once. What a kind of host cannot know is answered
    as if it were not there.
    """

    live: bool = False
    replay: Judge | None = None
    answers: dict[tuple[str, ...], Completed | None] | None = None

    @property
    def running(self) -> bool:
        """Whether a running kernel is to be seen in it: the live machine, or what was collected of one."""
        return self.live

    @property
    @abstractmethod
    def is_root(self) -> bool:
        """Whether all may be read."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """As `uname -m` says it."""

    # Files ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Content of a file, None where it is not there. Raises EmupmemError where it may not be read."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether something is there; links are followed."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted; none where it cannot be read."""

    @abstractmethod
    def real(self, name: str) -> str:
        """The name that an absolute path leads to once all symbolic links are followed."""

    @abstractmethod
    def modified(self, name: str) -> float | None:
        """When a file was last written (seconds of the epoch)."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read from, for what may be large. Raises EmupmemError."""
        raise EmupmemError(f"{name} cannot be read")

    def peek(self, name: str) -> str:
        """Text of a small file, empty where it is missing or not ours to read."""
        try:
            return (self.read(name) or b"").decode("utf-8", "replace").strip("\n\0")
        except EmupmemError:
            return ""

    def text(self, name: str) -> str:
        """A file as text from which its bytes come back (surrogateescape); empty where there is none.

        Raises EmupmemError where it may not be read.
        """
        return (self.read(name) or b"").decode("utf-8", "surrogateescape")

    def pe_file(self, name: str) -> PeFile | None:
        """What is in a PE file, None where there is none. Raises EmupmemError where it may not be read."""
        if self.entry_kind(name) != "file":
            return None
        with self.open(name) as file:
            return read_pe(file)

    def link_target(self, name: str) -> str:
        """Where a symbolic link leads, as it is written; empty for everything else."""
        return ""

    def is_link(self, name: str) -> bool:
        """Whether the last part of a name is a symbolic link."""
        return bool(self.link_target(name))

    # Devices and mounted folders -----------------------------------------------------------------------------

    def block_number(self, name: str) -> str:
        """`MAJOR:MINOR` of a block device, empty for everything else."""
        return ""

    def loose(self, name: str) -> bool:
        """Whether others than root (and ourselves) may change a file or what is in a folder."""
        return False

    def loose_parent(self, name: str) -> str:
        """The first folder above `name` in which others than root could put something else; empty if none."""
        return next((str(p) for p in reversed(Path(name).parents) if self.loose(str(p))), "")

    def entry_kind(self, name: str) -> str:
        """`file`, `folder`, `block`, `character`, `other` or `missing`: what a name leads to."""
        return "missing"

    def file_system(self, name: str) -> str:
        """`MAJOR:MINOR` of the file system that a name lies on, empty where it is not there."""
        return ""

    def file_size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        return None

    def room(self, folder: str) -> int:
        """Bytes that are free on the file system of a folder; 0 where that cannot be told."""
        return 0

    def block_size(self, folder: str) -> int:
        """Bytes that the file system of a folder gives in one piece; 0 where that cannot be told."""
        return 0

    def folder_state(self, name: str) -> str:
        """`missing`, `empty`, `full`, or `no folder`."""
        return "missing"

    # Programs ------------------------------------------------------------------------------------------------

    @abstractmethod
    def find(self, program: str) -> str | None:
        """Absolute path of a program on the fixed PATH, None where it is missing."""

    @abstractmethod
    def output(self, *argv: str, timeout: float = 30) -> Completed | None:
        """What a program that changes nothing prints; None where it cannot be run. `timeout` in seconds."""

    def made(self, argv: Sequence[str], given: Mapping[str, bytes], result: str) -> tuple[Completed, bytes]:
        """What a program makes of files in a folder that is gone afterwards: how it ended, its `result`.

        `{}` in a word stands for that folder, `given` are the files that it begins with. Raises EmupmemError.
        """
        raise EmupmemError(f"{argv[0]} is not run here")

    # What the kernel shows -----------------------------------------------------------------------------------

    def firmware_entries(self) -> list[tuple[int, str, str, str]]:
        """(index, start, end, type) of /sys/firmware/memmap, as text."""
        return read_firmware_entries(self)

    def huge_page_bytes(self) -> int:
        """RAM that is kept as huge pages now, of all sizes, in bytes."""
        return read_huge_page_bytes(self)

    @abstractmethod
    def nodes(self) -> tuple[NodeRange, ...]:
        """Memory ranges of the NUMA nodes by sysfs, each node's gaps filled where no other node lies in them.

        RAM that is reserved has no memory blocks; the gap it leaves inside a node is the node's.
        A single node has all the memory there is.
        """

    @abstractmethod
    def regions(self) -> tuple[Region, ...]:
        """The libnvdimm regions that carry persistent memory, with the block device of each."""

    def settle(self) -> None:
        """Wait until udev has nothing more to do, so that a healthy device is not reported missing."""
        if self.live:
            self.output("udevadm", "settle", "--timeout=10")

    @abstractmethod
    def kernel_banner(self, image: str) -> str:
        """The version text inside a kernel image (boot protocol header, offset 0x20e); empty if none.

        It tells the stable number that `uname -r` of a distribution hides.
        """

    def kernel_config(self, release: str) -> tuple[str, str]:
        """(file, text) of the build configuration of a kernel; two empty strings where none is kept."""
        return read_kernel_config(self, release)
