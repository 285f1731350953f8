# SPDX-License-Identifier: Apache-2.0
"""RAM as a DAX device, and as memory of a node and a tier of its own: on real kernels, each reboot a real one."""

from __future__ import annotations

import pytest

from emupmem.kernel.cmdline import WITHOUT_KMEM
from emupmem.model import GIB, MIB
from tests.vm.image import image
from tests.vm.machine import Machine
from tests.vm.test_vm import READY, WAIT, WARM, done, said

NODES = ("3G", "1536M")
"""The second node lies at 4 GiB as a whole, and is all that a plan may take."""
ITEM = "1536M%4G-1+0xefffffff"

FIRST = (
    READY
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
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
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
# kmem is not loaded, although the kernel gives the range to it (Linux 6.3 and later)
[ ! -e /sys/module/kmem ]
emupmem verify --json > /job/out/dax.json
printf '#!/bin/sh\necho QEMU emulator version 9.0.0\n' > /root/qemu
chmod +x /root/qemu
emupmem qemu args --qemu /root/qemu --backend /dev/dax0.0 --json > /job/out/behind.json
python3 /job/store.py /dev/dax0.0 > /job/out/stored
emupmem save /var/tmp/x.img /dev/dax0.0 2> /job/out/save && exit 9 || [ $? = 1 ]
# the same range becomes memory: only the unit changes, and the next boot makes it so
emupmem apply --as memory --numa-node 1 --size 1536M --min-free 1G --yes && exit 9 || [ $? = 1 ]
emupmem apply --as memory --numa-node 1 --size 1536M --min-free 1G --replace --yes --json > /job/out/replace.json
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
emupmem verify --json > /job/out/verify.json
cat /sys/devices/system/memory/auto_online_blocks
for recipe in membind interleave demotion; do python3 /job/recipes.py $recipe; done > /job/out/recipes
# the unit puts right what somebody took apart: offline, and the driver of the other kind
for state in /sys/bus/node/devices/node1/memory*/state; do echo offline > $state; done
emupmem verify --wait 0 > /job/out/offline && exit 9 || [ $? = 3 ]
systemctl restart emupmem.service
emupmem verify
emupmem doctor --json > /job/out/doctor.json
emupmem remove 1536M%4G --yes
sha256sum -c /root/before
[ ! -e /etc/systemd/system/emupmem.service ]
"""
)


# What the manual says of a memory tier, by the system calls that numactl makes (set_mempolicy, x86-64).
RECIPES = """
import ctypes, mmap, os, re, sys
libc = ctypes.CDLL(None, use_errno=True)
BIND, WEIGHTED_INTERLEAVE = 2, 6
def policy(mode, nodes):
    mask = ctypes.c_ulong(nodes)
    assert not libc.syscall(238, mode, ctypes.byref(mask), 64), os.strerror(ctypes.get_errno())
def taken(size):
    m = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, 4096): m[at] = 1
    return m
def pages():
    found = {}
    for line in open("/proc/self/numa_maps"):
        if "anon=" in line:
            for node, count in re.findall(r"N([0-9]+)=([0-9]+)", line):
                found[int(node)] = found.get(int(node), 0) + int(count)
    return found
def demoted():
    return sum(int(n) for n in re.findall(r"^pgdemote_[a-z]+ ([0-9]+)", open("/proc/vmstat").read(), re.M))
def write(name, text):
    with open(name, "w") as file: file.write(text)
if sys.argv[1] == "membind":
    before = pages().get(1, 0)
    policy(BIND, 2)
    kept = taken(64 << 20)
    assert pages()[1] - before >= 16384, pages()
elif sys.argv[1] == "interleave":
    for node, weight in (0, 3), (1, 1): write(f"/sys/kernel/mm/mempolicy/weighted_interleave/node{node}", str(weight))
    policy(WEIGHTED_INTERLEAVE, 3)
    kept = taken(64 << 20)
    assert 4000 < pages()[1] < 4500, pages()
else:
    write("/sys/kernel/mm/numa/demotion_enabled", "1")
    os.mkdir("/sys/fs/cgroup/cold")
    write("/sys/fs/cgroup/cold/cgroup.procs", str(os.getpid()))
    kept = taken(64 << 20)
    assert pages().get(1, 0) == 0, pages()
    before = demoted()
    try: write("/sys/fs/cgroup/cold/memory.reclaim", "32M")
    except OSError as exc: print("reclaimed less:", exc)
    assert demoted() > before and pages()[1] > 1000, (demoted() - before, pages())
    write("/sys/fs/cgroup/cgroup.procs", str(os.getpid()))
print(sys.argv[1], pages())
"""


@pytest.mark.vm(image="trixie uefi", boots=3, seconds=280)
def test_a_dax_device_and_then_a_memory_tier() -> None:
    with Machine(image("trixie", "uefi"), memory="4608M", nodes=NODES) as guest:
        scripts = (FIRST, SECOND, THIRD)
        files = {"store.py": STORE, "recipes.py": RECIPES}
        *_, last = (done(r) for r in guest.boots(scripts, files))
    plan = said(last, "suggest.json")["plan"]
    assert (plan["memmap"], plan["nokaslr"]) == (f"memmap={ITEM}", False)
    assert plan["words"] == [WITHOUT_KMEM]
    assert said(last, "apply.json")["reboot_required"]
    assert "1536M%%4G-1+0xefffffff" in last.files["unit"].decode()
    verdict = said(last, "dax.json")
    assert verdict["ok"], verdict
    assert verdict["devices"] == [{"dev": "/dev/dax0.0", "start": 4 * GIB, "size": 1536 * MIB}]
    assert b"STORED" in last.files["stored"]
    assert "mem-path=/dev/dax0.0" in " ".join(said(last, "behind.json")["argv"])
    assert b"only the content of pmem devices" in last.files["save"]
    assert said(last, "replace.json")["reboot_required"]
    found = {c["name"]: c["found"] for c in said(last, "verify.json")["checks"]}
    assert "movable, in node 1, which has 1.5 GiB in all" in found["online"]
    assert "node 0 in memory_tier4" in found["tier"]
    assert b"are offline" in last.files["offline"]
    assert not [f for f in said(last, "doctor.json")["findings"] if f["status"] in ("fail", "stop")]
