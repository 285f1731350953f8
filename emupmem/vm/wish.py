# SPDX-License-Identifier: Apache-2.0
"""What is wished of a virtual device, and what was found to be behind it."""

from __future__ import annotations

from enum import StrEnum

from emupmem.record import record


class GuestDevice(StrEnum):
    """What the guest sees."""

    NVDIMM = "nvdimm"
    VIRTIO = "virtio-pmem"


class Persistence(StrEnum):
    """Which flushes the platform promises: `-machine nvdimm-persistence=`."""

    MEM_CTRL = "mem-ctrl"
    CPU = "cpu"


class Backing(StrEnum):
    """What is behind a device."""

    RAM = "memory of QEMU"
    FILE = "an ordinary file"
    VOLATILE_FILE = "a file in memory"
    DAX_FILE = "a DAX file"
    DEVDAX = "a DAX character device"
    BLOCK = "a block device, through the page cache"


@record
class Backend:
    """What is behind a virtual device, as it was found: bytes, None where it is not there yet.

    `emulated` says that the memory below is RAM of this machine; `sync` whether MAP_SYNC mappings work;
    `align` what the device wants mappings to be a multiple of (0: nothing in particular); `identity` is the
    same for all names of one file or device; `old_labels` that labels are at its very end, where another start put
    them.
    """

    kind: Backing
    path: str = ""
    size: int | None = None
    sync: bool | None = None
    emulated: bool = False
    align: int = 0
    room: int | None = None
    identity: str = ""
    old_labels: bool = False


@record
class DeviceWish:
    """One device: what is behind it and how it shall be. `size` in bytes, `node` of the guest."""

    backend: Backend
    size: int
    node: int | None = None
    label: int = 0


@record
class DeviceOptions:
    """What holds for all devices. `share` False keeps what the guest writes from the file."""

    device: GuestDevice = GuestDevice.NVDIMM
    share: bool = True
    readonly: bool = False
    align: int = 0
    persistence: Persistence | None = None
    pmem: bool = False
    machine: str = ""
    ram: int | None = None
