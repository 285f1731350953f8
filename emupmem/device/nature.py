# SPDX-License-Identifier: Apache-2.0
"""What keeps the content of a persistent-memory device, in a few words."""

from __future__ import annotations

from emupmem.system.host import Host

EMULATED = ("e820", "ramdax")
"""Providers of regions that are RAM: what memmap= made, and its division by ramdax."""

VOLATILE = "emulated, volatile"

ASYNCHRONOUS = "virtio-pmem"
"""The provider whose flushes the host carries out: the kernel has no MAP_SYNC there (drivers/nvdimm/virtio_pmem.c)."""


def nature(machine: Host, provider: str, reserved: bool, domain: str = "") -> str:
    """What a device is and how far its content survives, as it is to be shown with the device.

    `provider` is that of its libnvdimm bus, `reserved` whether it lies in a range that this boot reserves,
    `domain` the region's persistence domain. Inside a virtual machine the host decides, and it cannot be asked.
    """
    if provider == "ramdax" or reserved:
        return VOLATILE
    if provider == "e820":
        return "marked as persistent by the firmware (type 12), not by memmap="
    if provider == ASYNCHRONOUS:
        return "virtio-pmem, kept by what the host has behind it"
    flushed = f"persistence domain {domain}" if domain else ""
    if provider.startswith(("CXL", "cxl")):
        kind = "CXL memory"
    elif is_virtual(machine):
        kind = "virtual NVDIMM, kept by what the host has behind it"
    else:
        kind = "NVDIMM"
    return f"{kind} · {flushed}" if flushed else kind


def is_virtual(machine: Host) -> bool:
    """Whether the processor says that a hypervisor runs this machine."""
    flags = next((x for x in machine.peek("/proc/cpuinfo").splitlines() if x.startswith("flags")), "")
    return "hypervisor" in flags.split()
