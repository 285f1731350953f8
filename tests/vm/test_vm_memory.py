# SPDX-License-Identifier: Apache-2.0
"""RAM as a DAX device, and as memory of a node and a tier of its own: on real kernels, each reboot a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.kernel.cmdline import WITHOUT_KMEM
from emupmem.model import GIB, MIB
from tests.vm.image import image
from tests.vm.machine import Content, Machine
from tests.vm.nested import IDLE, qemu_folder
from tests.vm.test_vm import READY, WAIT, WARM, done, said
from tests.vm.tools import NUMACTL, USE, tools

NODES = ("3G", "1536M")
"""The second node lies at 4 GiB as a whole, and is all that a plan may take."""
ITEM = "1536M%4G-1+0xefffffff"

FIRST = (
    READY
    + """
sha256sum /etc/default/grub > /root/before
emupmem suggest --as memory --far --min-free 1G --json > /job/out/suggest.json
emupmem apply --as dax --far --size 1536M --min-free 1G --trial --yes --json > /job/out/apply.json
sha256sum -c /root/before
[ ! -e /etc/systemd/system/emupmem.service ]
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

# The sum of a device's beginning, and its first bytes.
LOOK = """
import hashlib, mmap, os, sys
device = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 64 << 20, prot=mmap.PROT_READ)
print(hashlib.sha256(device[:]).hexdigest(), device[:12])
"""

SECOND = (
    """
set -eux
"""
    + WARM
    + """
# the trial: kmem is not loaded, although the kernel gives the range to it (Linux 6.3 and later)
[ ! -e /sys/module/kmem ]
emupmem verify --json > /job/out/trial.json
emupmem confirm --yes --json > /job/out/confirm.json
grep -i trial /boot/grub/grub.cfg && exit 9 || [ $? = 1 ]
emupmem apply --as dax --numa-node 1 --size 1536M --min-free 1G --check
systemd-analyze verify --man=no /etc/systemd/system/emupmem.service
cp /etc/systemd/system/emupmem.service /job/out/unit
systemctl start emupmem.service
"""
    + IDLE
    + """
[ ! -e /sys/module/kmem ]
emupmem verify --json > /job/out/dax.json
python3 /job/store.py /dev/dax0.0 > /job/out/stored
python3 /job/look.py /dev/dax0.0 > /run/before
emupmem bench /dev/dax0.0 --json > /job/out/dax-bench.json
python3 /job/look.py /dev/dax0.0 | cmp - /run/before
# a virtual machine on it
given="--qemu /job/nested/qemu --backend /dev/dax0.0"
/usr/local/bin/emupmem qemu run $given -- $idle < /run/monitor > /job/out/behind 2>&1 &
user=$!
started /job/out/behind
grep /dev/dax0.0 /proc/$user/maps
echo quit >&3
wait $user
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
    + USE
    + """
emupmem verify --json > /job/out/verify.json
cat /sys/devices/system/memory/auto_online_blocks
# the manual's recipes, by the real numactl
numactl() { with_tools numactl "$@"; }
numactl --membind=1 python3 /job/recipes.py membind
echo 3 > /sys/kernel/mm/mempolicy/weighted_interleave/node0
numactl --weighted-interleave=0,1 python3 /job/recipes.py interleave
echo 1 > /sys/kernel/mm/numa/demotion_enabled
python3 /job/recipes.py demotion
numactl --cpunodebind=0 /usr/local/bin/emupmem bench --json > /job/out/bench.json
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


# What the programs do that the manual's recipes for a memory tier run.
RECIPES = """
import mmap, os, re, sys
def taken(size):
    m = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, 4096): m[at] = 1
    return m
def pages():
    found = {0: 0, 1: 0}
    for line in open("/proc/self/numa_maps"):
        if "anon=" in line:
            for node, count in re.findall(r"N([0-9]+)=([0-9]+)", line):
                found[int(node)] += int(count)
    return found
def demoted():
    return sum(int(n) for n in re.findall(r"^pgdemote_[a-z]+ ([0-9]+)", open("/proc/vmstat").read(), re.M))
def write(name, text):
    with open(name, "w") as file: file.write(text)
before = pages()
if sys.argv[1] == "demotion":
    os.mkdir("/sys/fs/cgroup/cold")
    write("/sys/fs/cgroup/cold/cgroup.procs", str(os.getpid()))
kept = taken(64 << 20)
there = pages()[1] - before[1]
if sys.argv[1] == "membind":
    assert there >= 16384, there
elif sys.argv[1] == "interleave":
    assert 4000 < there < 4200, there
else:
    assert there == 0, there
    count = demoted()
    try: write("/sys/fs/cgroup/cold/memory.reclaim", "32M")
    except OSError as exc: print("reclaimed less:", exc)
    assert demoted() > count and pages()[1] > 1000, (demoted() - count, pages())
    write("/sys/fs/cgroup/cgroup.procs", str(os.getpid()))
print(sys.argv[1], pages())
"""


@pytest.mark.vm(image="trixie uefi", boots=3, seconds=280)
def test_a_dax_device_and_then_a_memory_tier(tmp_path: Path) -> None:
    nested = qemu_folder(tmp_path / "nested")
    with Machine(image("trixie", "uefi"), memory="4608M", nodes=NODES) as guest:
        scripts = (FIRST, SECOND, THIRD)
        files: dict[str, Content] = {"store.py": STORE, "look.py": LOOK, "recipes.py": RECIPES}
        files |= {"nested": nested, "tools": tools("trixie", *NUMACTL)}
        *_, last = (done(r) for r in guest.boots(scripts, files))
    plan = said(last, "suggest.json")["plan"]
    assert any("node 1 is at distance 20 from node 0" in w for w in plan["warnings"]), plan
    assert (plan["memmap"], plan["nokaslr"]) == (f"memmap={ITEM}", False)
    assert plan["words"] == [WITHOUT_KMEM]
    assert said(last, "apply.json")["reboot_required"]
    assert "1536M%%4G-1+0xefffffff" in last.files["unit"].decode()
    tried = said(last, "trial.json")
    assert tried["ok"], tried
    assert "this boot is the trial" in tried["checks"][0]["found"]
    assert said(last, "confirm.json")["trial"] == "running"
    verdict = said(last, "dax.json")
    assert verdict["ok"], verdict
    assert verdict["devices"] == [{"dev": "/dev/dax0.0", "start": 4 * GIB, "size": 1536 * MIB}]
    assert b"STORED" in last.files["stored"]
    local, device = said(last, "dax-bench.json")["results"]
    assert (local["target"], device["target"], device["node"]) == ("node0", "/dev/dax0.0", 1)
    assert b"only the content of pmem devices" in last.files["save"]
    assert said(last, "replace.json")["reboot_required"]
    found = {c["name"]: c["found"] for c in said(last, "verify.json")["checks"]}
    assert "movable, in node 1, which has 1.5 GiB in all" in found["online"]
    assert "node 0 in memory_tier4" in found["tier"]
    measured = said(last, "bench.json")
    assert [(r["target"], r["node"]) for r in measured["results"]] == [("node0", 0), ("node1", 1)]
    assert any("virtual machine" in note for note in measured["notes"]), measured
    assert b"are offline" in last.files["offline"]
    assert not [f for f in said(last, "doctor.json")["findings"] if f["status"] in ("fail", "stop")]
