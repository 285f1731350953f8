# SPDX-License-Identifier: Apache-2.0
"""RAM as a DAX device, and as memory of a node and a tier of its own: on real kernels, each reboot a real one."""

from __future__ import annotations

import pytest

from emupmem.model import GIB, MIB
from tests.vm.image import image
from tests.vm.machine import Machine
from tests.vm.test_vm import FEWER, INSTALL, WAIT, WARM, done, said

NODES = ("3G", "1536M")
"""The second node lies at 4 GiB as a whole, and is all that a plan may take."""
ITEM = "1536M%4G-1+0xefffffff"

FIRST = (
    INSTALL
    + FEWER
    + """
set -eux
"""
    + WARM
    + """
sha256sum /etc/default/grub > /root/before
emupmem suggest --as memory --numa-node 1 --min-free 1G --json > /job/out/suggest.json
emupmem apply --as dax --numa-node 1 --size 1536M --min-free 1G --yes --json > /job/out/apply.json
emupmem apply --as dax --numa-node 1 --size 1536M --min-free 1G --check
systemd-analyze verify --man=no /etc/systemd/system/emupmem.service
cp /etc/systemd/system/emupmem.service /job/out/unit
emupmem verify > /job/out/pending && exit 9 || [ $? = 3 ]
"""
)

# A program maps the device itself: what it stores is read back through another mapping.
STORE = """
import mmap, os
fd = os.open("/dev/dax0.0", os.O_RDWR)
first = mmap.mmap(fd, 4 << 20)
first[: 4 << 20] = bytes(range(256)) * (4 << 12)
second = mmap.mmap(fd, 4 << 20)
assert second[:256] == bytes(range(256)) and second[-1] == 255
print("STORED")
"""

SECOND = (
    """
set -eux
"""
    + WARM
    + WAIT
    + """
cat /proc/cmdline
ls -l /sys/bus/dax/devices /sys/bus/dax/drivers/*
cat /sys/devices/system/memory/auto_online_blocks
emupmem verify | tee /job/out/verify
emupmem verify --json > /job/out/verify.json
python3 -c "$(cat /job/store.py)" > /job/out/stored
emupmem save /var/tmp/x.img /dev/dax0.0 2> /job/out/save && exit 9 || [ $? = 1 ]
dmesg > /job/out/dmesg
cat /proc/iomem > /job/out/iomem
# the same range becomes memory: only the unit changes, and the next boot makes it so
emupmem apply --as memory --numa-node 1 --size 1536M --min-free 1G --yes && exit 9 || [ $? = 1 ]
emupmem apply --as memory --numa-node 1 --size 1536M --min-free 1G --replace --yes --json > /job/out/apply.json
cat /etc/systemd/system/emupmem.service
"""
)

THIRD = (
    """
set -eux
"""
    + WARM
    + WAIT
    + """
emupmem verify | tee /job/out/verify
emupmem verify --json > /job/out/verify.json
cat /sys/devices/system/node/node*/meminfo | grep MemTotal
grep -r . /sys/devices/virtual/memory_tiering/*/nodelist
# the unit puts right what somebody took apart: offline, and the driver of the other kind
for state in /sys/bus/node/devices/node1/memory*/state; do echo offline > $state; done
emupmem verify --wait 0 > /job/out/offline && exit 9 || [ $? = 3 ]
systemctl restart emupmem.service
emupmem verify
emupmem suggest --json > /job/out/again.json
emupmem remove 1536M%4G --yes
sha256sum -c /root/before
[ ! -e /etc/systemd/system/emupmem.service ]
"""
)


@pytest.mark.vm(image="trixie uefi", boots=3, seconds=250)
def test_a_dax_device_and_then_a_memory_tier() -> None:
    with Machine(image("trixie", "uefi"), memory="4608M", nodes=NODES) as guest:
        scripts = (FIRST, SECOND, THIRD)
        first, second, third = (done(r) for r in guest.boots(scripts, {"store.py": STORE}))
    plan = said(first, "suggest.json")["plan"]
    assert (plan["memmap"], plan["nokaslr"]) == (f"memmap={ITEM}", False)
    assert said(first, "apply.json")["reboot_required"]
    assert "1536M%%4G-1+0xefffffff" in first.files["unit"].decode()
    verdict = said(second, "verify.json")
    assert verdict["ok"], verdict
    assert verdict["devices"] == [{"dev": "/dev/dax0.0", "start": 4 * GIB, "size": 1536 * MIB}]
    assert b"STORED" in second.files["stored"]
    assert b"only the content of pmem devices" in second.files["save"]
    assert said(second, "apply.json")["reboot_required"]
    found = {c["name"]: c["found"] for c in said(third, "verify.json")["checks"]}
    assert "movable, in node 1, which has 1.5 GiB in all" in found["online"]
    assert "node 0 in memory_tier4" in found["tier"]
    assert b"are offline" in third.files["offline"]
