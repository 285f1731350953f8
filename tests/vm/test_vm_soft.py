# SPDX-License-Identifier: Apache-2.0
"""Soft reserved memory on a real kernel: the writes of `device.soft`, one after the other, and what they come to."""

from __future__ import annotations

import pytest

from emupmem.kernel.cmdline import format_memmap
from emupmem.model import GIB, MIB, DeviceKind, Reservation
from tests.vm.kernel import boot_kernel

ITEM = format_memmap([Reservation(4 * GIB, 1536 * MIB, GIB, kind=DeviceKind.MEMORY)])
"""All of the second node, which lies at 4 GiB."""

SCRIPT = r"""
drivers=/sys/bus/dax/drivers
driver() { for d in $drivers/*; do if [ -e $d/dax0.0 ]; then echo "$1: ${d##*/}"; fi; done; }
states() {
    for b in /sys/devices/system/node/node1/memory*; do
        echo "$(cat $b/state) $(cat $b/valid_zones)"
    done | sort | uniq -c
}
all() { for b in /sys/devices/system/node/node1/memory*; do echo $1 > $b/state; done; }
dmesg | grep 'user:'
grep 'Kernel code' /proc/iomem
for f in resource size align target_node; do echo "$f $(cat /sys/bus/dax/devices/dax0.0/$f)"; done
driver before
for d in $drivers/*; do if [ -e $d/dax0.0 ]; then echo dax0.0 > $d/unbind; fi; done
echo dax0.0 > $drivers/device_dax/new_id
driver dax
[ -c /dev/dax0.0 ]
echo dax0.0 > $drivers/device_dax/unbind
echo dax0.0 > $drivers/kmem/new_id
driver memory
all online_movable
states
grep MemTotal /sys/devices/system/node/node1/meminfo
grep . /sys/devices/virtual/memory_tiering/*/nodelist
all offline
echo dax0.0 > $drivers/kmem/unbind
echo dax0.0 > $drivers/device_dax/new_id
driver again
true
"""


@pytest.mark.vm(image="bookworm bios", boots=1, seconds=30)
def test_a_node_becomes_a_dax_device_a_memory_tier_and_a_dax_device_again() -> None:
    modules = ("dax_hmem", "device_dax", "kmem")
    said = boot_kernel(
        "bookworm", ITEM, memory="4608M", nodes=("3G", "1536M"), script=SCRIPT, modules=modules
    )
    assert "[mem 0x0000000100000000-0x000000015fffffff] soft reserved" in said
    code = next(line for line in said.splitlines() if "Kernel code" in line)
    assert int(code.split("-")[0], 16) < 1536 * MIB, "the size of the item is the end of the memory for KASLR"
    for line in ("resource 0x100000000", "size 1610612736", "align 2097152", "target_node 1"):
        assert line in said
    for line in (
        "dax: device_dax",
        "memory: kmem",
        "12 online Movable",
        "again: device_dax",
    ):
        assert line in said, said
    assert "Node 1 MemTotal:        1572864 kB" in said
    assert "memory_tier22/nodelist:1" in said
    assert "memory_tier4/nodelist:0" in said
