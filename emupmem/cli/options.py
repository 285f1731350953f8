# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from emupmem.model import DeviceKind


class Source(StrEnum):
    """Where the firmware's memory map is read on a running machine."""

    AUTO = "auto"
    DMESG = "dmesg"
    JOURNAL = "journal"
    SYSFS = "sysfs"


class TrialBy(StrEnum):
    """How a trial is started."""

    GRUB = "grub"
    KEXEC = "kexec"


class VariableOption(StrEnum):
    """The GRUB variable that holds the argument."""

    LINUX = "GRUB_CMDLINE_LINUX"
    DEFAULT = "GRUB_CMDLINE_LINUX_DEFAULT"


Size = Annotated[
    str | None, typer.Option("--size", metavar="SIZE", help="Size of each device, such as 16G or 512M.")
]
Count = Annotated[int, typer.Option("--count", metavar="N", min=1, help="How many devices, 1 to 4.")]
Offset = Annotated[
    str | None,
    typer.Option(
        "--offset", metavar="ADDR", help="Start of the first device, such as 4G (default: the lowest place)."
    ),
]
MinFree = Annotated[
    str, typer.Option("--min-free", metavar="SIZE", help="RAM that must stay for the system.")
]
Node = Annotated[
    int | None, typer.Option("--numa-node", metavar="N", min=0, help="Reserve on this NUMA node only.")
]
Far = Annotated[
    bool,
    typer.Option(
        "--far",
        help="Reserve on the NUMA node that is farthest from the processors of the first; emupmem bench measures it.",
    ),
]
As = Annotated[
    DeviceKind,
    typer.Option(
        "--as",
        help="pmem: /dev/pmem0, a block device for file systems with DAX. devdax: the same memory as /dev/dax0.0, "
        "which programs map as a whole. dax: such a device without persistent memory. memory: ordinary memory in "
        "blocks that can be taken away again, a slower tier of its own where all of a NUMA node is reserved, as with "
        "a CXL expander.",
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Plan from a saved boot log or an archive of emupmem collect (- for standard input), not this machine.",
    ),
]
SourceOption = Annotated[
    Source, typer.Option("--source", help="Where to read the memory map of this machine.")
]
EPILOG = (
    "Exit status: 0 as planned; 1 error; 2 wrong usage; 3 not as planned "
    "(a check failed, a reboot is pending, or --check found that something would change)."
)


class FileSystem(StrEnum):
    """The file systems that can map files directly."""

    EXT4 = "ext4"
    XFS = "xfs"


Check = Annotated[bool, typer.Option("--check", help="Exit 3 if something would change; change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done and stop.")]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Edit the tree of another machine. Nothing of it is run but its GRUB defaults, which sh reads "
        "where it finds no programs and can change nothing.",
    ),
]
Fs = Annotated[
    FileSystem | None, typer.Option("--fs", help="The file system; ext4 unless the device holds another.")
]
Owner = Annotated[
    str,
    typer.Option("--owner", metavar="USER[:GROUP]", help="Owner of the mounted folder: USER or USER:GROUP."),
]
Permissions = Annotated[
    str, typer.Option("--mode", metavar="MODE", help="Permissions of the mounted folder, such as 0755.")
]
NamespaceName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A namespace or its device, such as namespace0.0 or /dev/pmem0."),
]
