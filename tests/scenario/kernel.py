# SPDX-License-Identifier: Apache-2.0
"""Kernels that boot loaders and their tools take for real ones: a header, a configuration, lists of modules.

A real one is a hundred megabytes. The programs here look at no more of it than this.
"""

from __future__ import annotations

import struct

CONFIG = """CONFIG_X86_PMEM_LEGACY_DEVICE=y
CONFIG_X86_PMEM_LEGACY={0}
CONFIG_BLK_DEV_PMEM={0}
CONFIG_FS_DAX=y
CONFIG_RANDOMIZE_BASE=y
"""

MODULES = (
    "kernel/drivers/nvdimm/nd_e820.ko",
    "kernel/drivers/nvdimm/nd_pmem.ko",
    "kernel/drivers/nvdimm/libnvdimm.ko",
)


def image(release: str) -> bytes:
    """Return a bzImage by its header alone (Documentation/arch/x86/boot.rst), its version text in it."""
    data = bytearray(0x1000)
    data[0x1F1] = 4  # setup sectors
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<HH", data, 0x206, 0x20F, 0)
    struct.pack_into("<H", data, 0x20E, 0x300 - 0x200)
    data[0x211] = 1  # loaded high: a bzImage
    text = f"{release} (builder@example) #1 SMP PREEMPT_DYNAMIC".encode()
    data[0x300 : 0x300 + len(text)] = text
    return bytes(data)


def files(release: str, *, built_in: bool = False) -> dict[str, str | bytes]:
    """Return what Debian's package of a kernel puts on the disk, and its initrd: content by path.

    With `built_in` the drivers of persistent memory are no modules.
    """
    folder = f"/usr/lib/modules/{release}"
    listed = "".join(f"{name}:\n" for name in MODULES)
    names = "".join(f"{name}\n" for name in MODULES)
    return {
        f"/boot/vmlinuz-{release}": image(release),
        f"/boot/initrd.img-{release}": f"initrd of {release}\n",
        f"/boot/config-{release}": CONFIG.format("y" if built_in else "m"),
        f"{folder}/modules.dep": "" if built_in else listed,
        f"{folder}/modules.builtin": names if built_in else "",
        f"{folder}/modules.order": "",
    }
