# SPDX-License-Identifier: Apache-2.0
"""Soft reserved memory on a real kernel: the writes of `device.soft`, one after the other, and what they come to."""

from __future__ import annotations

from typing import Any

import pytest

from emupmem.kernel.cmdline import WITHOUT_KMEM, format_memmap
from emupmem.model import GIB, MIB, DeviceKind, Reservation
from tests.vm.image import image
from tests.vm.kernel import boot_kernel
from tests.vm.machine import Content, JobResult, Machine
from tests.vm.test_vm import READY, WAIT, done, said
from tests.vm.test_vm_keep import reserved
from tests.vm.test_vm_memory import STORE
from tests.vm.tools import KDUMP as KDUMP_FILES
from tests.vm.tools import PMDK, USE, tools

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
    shown = boot_kernel(
        "bookworm", ITEM, memory="4608M", nodes=("3G", "1536M"), script=SCRIPT, modules=modules
    )
    assert "[mem 0x0000000100000000-0x000000015fffffff] soft reserved" in shown
    code = next(line for line in shown.splitlines() if "Kernel code" in line)
    assert int(code.split("-")[0], 16) < 1536 * MIB, "the size of the item is the end of the memory for KASLR"
    for line in ("resource 0x100000000", "size 1610612736", "align 2097152", "target_node 1"):
        assert line in shown
    for line in (
        "dax: device_dax",
        "memory: kmem",
        "12 online Movable",
        "again: device_dax",
    ):
        assert line in shown, shown
    assert "Node 1 MemTotal:        1572864 kB" in shown
    assert "memory_tier22/nodelist:1" in shown
    assert "memory_tier4/nodelist:0" in shown


# What a program does with a pool, by libpmemobj itself: a pool is mapped where its handle points to.
POOL = """
import ctypes, sys
class Oid(ctypes.Structure):
    _fields_ = [("pool", ctypes.c_uint64), ("offset", ctypes.c_uint64)]
pmem = ctypes.CDLL("libpmemobj.so.1")
pmem.pmemobj_open.restype, pmem.pmemobj_root.restype = ctypes.c_void_p, Oid
pmem.pmemobj_errormsg.restype = ctypes.c_char_p
pool = pmem.pmemobj_open(sys.argv[1].encode(), b"app")
assert pool, pmem.pmemobj_errormsg()
pool = ctypes.c_void_p(pool)
where = pool.value + pmem.pmemobj_root(pool, ctypes.c_size_t(64)).offset
if sys.argv[2] == "first":
    ctypes.memmove(where, b"kept in the pool", 16)
    pmem.pmemobj_persist(pool, ctypes.c_void_p(where), ctypes.c_size_t(16))
else:
    print(ctypes.string_at(where, 16).decode())
pmem.pmemobj_close(pool)
"""

ONE_NODE = (
    READY
    + USE
    + """
# udev has loaded what it may: kmem waits for the unit. Which range gets number 0 is the kernel's choice at each boot.
udevadm settle
until ls /sys/bus/dax/devices | grep -q dax; do sleep 1; done
[ ! -e /sys/module/kmem ]
policy=$(cat /sys/devices/system/memory/auto_online_blocks)
emupmem apply --as memory --size 512M --min-free 1G --yes
emupmem apply --as devdax --size 256M --offset 5G --min-free 1G --add --yes
systemctl start emupmem.service
"""
    + WAIT
    + """
[ "$(cat /sys/devices/system/memory/auto_online_blocks)" = "$policy" ]
emupmem verify --json > /job/out/memory.json
# only the unit differs between the two kinds
sed -i '/512M/s/ memory/ dax/' /etc/systemd/system/emupmem.service
systemctl daemon-reload
systemctl restart emupmem.service
emupmem verify --json > /job/out/dax.json
# a pool of PMDK, as the manual has it; what a program stores in it is there when it is opened again
for device in /sys/bus/dax/devices/*; do
    case $(readlink -f $device) in *ndbus*) pmem=/dev/${device##*/} ;; *hmem*) soft=/dev/${device##*/} ;; esac
done
with_tools pmempool create --layout=app obj $pmem
for turn in first second; do with_tools python3 /job/pool.py $pmem $turn; done > /job/out/pool
with_tools pmempool check $pmem
with_tools pmempool info $soft && exit 9 || true  # whether it is refused or dies there is its version's
with_tools pmempool rm $pmem
for device in /dev/dax*; do python3 /job/store.py $device; done > /job/out/stored
"""
)

# Debian's kdump, as its package has it, but for the initramfs, which is that of the image, and for what the capture
# kernel starts: the next script. Its own words for that come after these, which are those of the settings.
KDUMP = """
for folder in usr sbin; do [ ! -d /job/kdump/$folder ] || cp -a /job/kdump/$folder/. /$folder/; done
[ ! -d /job/kdump/lib ] || cp -a /job/kdump/lib/. /usr/lib/
kdump=/var/lib/kdump
mkdir -p /etc/kdump $kdump
touch /etc/kdump/sysctl.conf $kdump/latest_sysctls-$(uname -r)
cp /boot/initrd.img-$(uname -r) $kdump/
[ -e /boot/vmlinuz-$(uname -r) ] || cp /usr/lib/modules/$(uname -r)/vmlinuz /boot/vmlinuz-$(uname -r)
cp /usr/share/kdump-tools/kdump-tools.conf /etc/default/kdump-tools
appended="reset_devices nr_cpus=1 irqpoll usbcore.nousb systemd.unit=emupmem-job.service"
echo "KDUMP_CMDLINE_APPEND='$appended'" >> /etc/default/kdump-tools
kdump-config load
emupmem doctor --json > /job/out/doctor.json
"""

# The line is what stands between "there" and "then" of what it says.
PREVENT = """
fix=$(grep -o 'there KDUMP_CMDLINE_APPEND=[^,]*, then sudo kdump-config reload' /job/out/doctor.json | tr -d '\\\\')
fix=${fix#there }
echo "${fix%, then *}" >> /etc/default/kdump-tools
kdump-config reload
emupmem doctor --json > /job/out/prevented.json
"""

CRASH = """
[ "$(cat /sys/kernel/kexec_crash_loaded)" = 1 ]
sync
echo c > /proc/sysrq-trigger
sleep 1000
"""

CAPTURED = """
set -eux
cp /proc/cmdline /job/out/captured
cp /proc/iomem /job/out/iomem
udevadm settle
ls -l /sys/bus/dax/devices > /job/out/dax
ls /sys/bus/nd/devices > /job/out/nd
makedumpfile --dump-dmesg /proc/vmcore /job/out/dmesg
"""


@pytest.mark.parametrize(
    ("suite", "line"),
    [
        pytest.param("bookworm", True, marks=pytest.mark.vm(image="bookworm bios", boots=2, seconds=125)),
        pytest.param("forky", False, marks=pytest.mark.vm(image="forky bios", boots=2, seconds=155)),
    ],
)
def test_the_unit_on_one_node_and_a_crash_kernel(suite: str, line: bool) -> None:
    """Linux 6.1 gives the device to device_dax, 7.2 to kmem; each kind is made of both. GRUB's part: test_vm_memory.

    Then it crashes: with doctor's line in kdump's settings, and without.
    """
    made = image(suite, "bios")
    words = f"memmap=512M%4G-1+0xefffffff,256M!5G {WITHOUT_KMEM} crashkernel=192M"
    with Machine(made, qemu_args=reserved(made, words)) as guest:
        files: dict[str, Content] = {"store.py": STORE, "pool.py": POOL}
        files |= {"tools": tools(suite, *PMDK), "kdump": tools(suite, *KDUMP_FILES)}
        first = ONE_NODE + KDUMP + (PREVENT if line else "") + CRASH
        crashed, result = guest.boots([first, CAPTURED], files, last=True)
        assert crashed.status is None, crashed.output
        done(result)
    memory, dax = said(result, "memory.json"), said(result, "dax.json")
    assert memory["ok"], memory
    found = {c["name"]: c["found"] for c in memory["checks"]}
    assert "4 blocks, 512 MiB, movable, in node 0" in found["online"]
    assert "no tier of its own" in found["tier"]
    assert dax["ok"], dax
    (devdax,) = (d for d in dax["devices"] if d["start"] == 5 * GIB)
    assert [d["size"] for d in dax["devices"] if d["start"] == 4 * GIB] == [512 * MIB]
    assert devdax["size"] == 254 * MIB, "its info block takes the first piece of 2 MiB"
    assert "devdax: programs map the device itself" in {c["name"]: c["found"] for c in dax["checks"]}["dax"]
    assert b"emulated, volatile \xc2\xb7 mapped, stored and read back" in result.files["journal"]
    assert result.files["stored"].decode().split() == ["STORED", "STORED"]
    assert result.files["pool"] == b"kept in the pool\n"
    assert not [f for f in said(result, "doctor.json")["findings"] if f["status"] in ("fail", "stop")]
    dumped(result, line)


def dumped(result: JobResult, line: bool) -> None:
    """What doctor said before the crash, and what came of it in the capture kernel."""
    inherits = kdump_of(said(result, "doctor.json"))
    assert (inherits["status"], "takes 4 MiB of the 192 MiB" in inherits["evidence"]) == ("note", True), (
        inherits
    )
    captured, iomem = result.files["captured"].decode(), result.files["iomem"].decode()
    assert "elfcorehdr=" in captured
    assert "sysrq: Trigger a crash" in result.files["dmesg"].decode()
    # what was changed from RAM is nothing there: its map has no such RAM
    assert ("Soft Reserved" in iomem, b"hmem" in result.files["dax"]) == (False, False)
    # the other range is, by the words or the map; whether a device is made of it, is the line's business
    assert "140000000-14fffffff : Persistent Memory (legacy)" in iomem
    # (nd_pmem, which would take the range in iomem, is not in every initramfs of kdump)
    assert (b"namespace0.0" in result.files["nd"]) is not line, iomem
    if line:
        assert kdump_of(said(result, "prevented.json"))["status"] == "ok"


def kdump_of(doctor: Any) -> Any:
    (found,) = [f for f in doctor["findings"] if f["name"] == "kdump"]
    return found
