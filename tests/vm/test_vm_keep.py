# SPDX-License-Identifier: Apache-2.0
"""Saving, restoring and namespaces on real kernels with real devices."""

from __future__ import annotations

import pytest

from emupmem.model import GIB, KIB, MIB
from tests.vm.image import ROOT_UUID, SPARE, image
from tests.vm.machine import ORDERLY, Image, Machine
from tests.vm.test_vm import FEWER, INSTALL, WAIT, WARM, done, said

MOUNTED = (
    INSTALL
    + """
set -eux
"""
    + WAIT
    + """
grep ' /mnt/kept ' /proc/mounts
"""
)

# Reserved from the first boot on, see `reserved`: the unit does at once what it does at each boot after that.
KEPT_FIRST = (
    INSTALL
    + FEWER
    + """
set -eux
mkdir -p /var/lib/emupmem
emupmem apply --size 512M --mount /mnt/kept --keep /var/lib/emupmem/pmem0.img --owner dev --yes
systemd-analyze verify /etc/systemd/system/emupmem.service
systemctl start emupmem.service
"""
    + MOUNTED
    + """
[ ! -e /var/lib/emupmem/pmem0.img ]
runuser -u dev -- sh -c 'echo first > /mnt/kept/file'
# a program that does not end by itself must not keep the content from being saved
(cd /mnt/kept && exec setsid sleep 1000) < /dev/null > /dev/null 2>&1 &
"""
)

KEPT_SECOND = (
    MOUNTED
    + """
[ "$(cat /mnt/kept/file)" = first ]
emupmem verify > /job/out/verify
runuser -u dev -- sh -c 'echo second > /mnt/kept/file'
# the power goes before anything of that is saved
echo "NOW CUT THE POWER" > /dev/console
sync
sleep 1000
"""
)

SNAPSHOTS = (
    MOUNTED
    + WARM
    + """
[ "$(cat /mnt/kept/file)" = first ]                     # the last complete save, nothing of the second
umount /mnt/kept
wipefs -qa /dev/pmem0
mkdir -p /mnt/pmem
refuses() { word="$1"; shift; "$@" 2> /run/why && exit 9 || [ $? = 1 ]; cat /run/why; grep -q "$word" /run/why; }

# a file system with DAX, written through mappings, saved while it is mounted
mkfs.ext4 -q -b 4096 /dev/pmem0
mount -o dax /dev/pmem0 /mnt/pmem
mkdir /mnt/pmem/folder
head -c 40000000 /dev/urandom > /mnt/pmem/folder/noise
python3 - <<'END'
import mmap
with open('/mnt/pmem/mapped', 'w+b') as file:
    file.truncate(4 << 20)
    with mmap.mmap(file.fileno(), 0) as area:
        area[:] = bytes(range(256)) * (len(area) // 256)
END
# pages of the block device that the page cache holds from before must not be what is saved
dd if=/dev/pmem0 of=/dev/null bs=1M status=none
python3 - <<'END'
import mmap
with open('/mnt/pmem/mapped', 'r+b') as file, mmap.mmap(file.fileno(), 0) as area:
    area[:4] = b'last'
END
(cd /mnt/pmem && sha256sum folder/noise mapped) > /root/sums
emupmem save /root/image /mnt/pmem --json > /job/out/save.json
touch /mnt/pmem/still-writable                         # thawed
refuses 'is mounted on /mnt/pmem' emupmem save /root/other /dev/pmem0
refuses 'is mounted on /mnt/pmem' emupmem restore /root/image --yes
refuses 'is on the file system that is to be saved' emupmem save /mnt/pmem/image /mnt/pmem
refuses 'is not a mount point' emupmem save /root/other /root
refuses 'not a device that memmap= made' emupmem save /root/other /
refuses 'not a device that memmap= made' emupmem save /root/other /dev/vda
refuses 'not a device that memmap= made' emupmem restore /root/image /dev/vda1 --yes --force
refuses 'is a disk' emupmem save /dev/vdb /mnt/pmem
[ ! -e /root/other ]
[ "$(stat -c %a /root/image)" = 600 ]

# killed while it is frozen: thawed all the same
cat > /root/hold.py <<'END'
import sys, time
sys.path.insert(0, '/job/src')
from emupmem.device import freeze
with freeze.frozen('/mnt/pmem'):
    open('/run/frozen', 'w').close()
    time.sleep(1000)
END
/opt/emupmem/bin/python /root/hold.py &
until [ -e /run/frozen ]; do sleep 0.2; done
kill -KILL $!
wait || true
touch /mnt/pmem/thawed

# wiped, restored, compared
umount /mnt/pmem
blkid -p /root/image > /job/out/blkid
fsck.ext4 -f -n /root/image
dd if=/dev/urandom of=/dev/pmem0 bs=1M count=64 conv=fsync status=none
refuses 'no terminal to ask on' emupmem restore /root/image
emupmem restore /root/image --yes --json > /job/out/restore.json
mount -o dax /dev/pmem0 /mnt/pmem
(cd /mnt/pmem && sha256sum -c /root/sums)
[ ! -e /mnt/pmem/still-writable ]
umount /mnt/pmem

# refused before anything is written
cp /root/image /root/copy
refuses 'has no checksum' emupmem restore /root/copy --yes
cp --preserve=xattr /root/image /root/copy
printf x | dd of=/root/copy bs=1 seek=123456789 conv=notrunc status=none
sha256sum /dev/pmem0 > /root/device
refuses 'its checksum differs' emupmem restore /root/copy --yes
truncate -s 511M /root/copy
refuses 'of the same size' emupmem restore /root/copy --yes --force
sha256sum -c /root/device
emupmem save /root/again
cmp /root/again /dev/pmem0

# mounted where this shell cannot see it
mkdir -p /run/ns
mount -t tmpfs none /run/ns
unshare -m sh -c 'mount /dev/pmem0 /mnt/pmem; touch /run/ns/there; exec sleep 1000' &
other=$!
until [ -e /run/ns/there ]; do sleep 0.2; done
refuses 'is in use' emupmem restore /root/image --yes --force
kill $other
wait || true

# a sparse image on a file system without attributes for users
emupmem save /run/ns/image
[ -e /run/ns/image.emupmem ]
emupmem restore /run/ns/image --yes
cmp /run/ns/image /dev/pmem0

# no room: refused, and nothing is left
mkdir /run/small
mount -t tmpfs -o size=8M none /run/small
refuses 'the image needs' emupmem save /run/small/image
[ -z "$(ls -A /run/small)" ]

# ramdax is not in this kernel
emupmem namespaces bind --yes 2> /job/out/old && exit 9 || [ $? = 1 ]
emupmem namespaces list 2>> /job/out/old && exit 9 || [ $? = 1 ]

# another file system there is saved when the unit is stopped, and comes back into a memory that holds nothing of it
mkfs.ext4 -q -b 4096 -F /dev/pmem0
mount -o dax /dev/pmem0 /mnt/kept
echo third > /mnt/kept/file
systemctl stop emupmem.service
grep ' /mnt/kept ' /proc/mounts && exit 9 || [ $? = 1 ]
rm -r /run/emupmem
dd if=/dev/zero of=/dev/pmem0 bs=1M conv=fsync status=none || true
systemctl start emupmem.service
[ "$(cat /mnt/kept/file)" = third ]

# an image that was changed is refused, and never saved over
umount /mnt/kept
printf x | dd of=/var/lib/emupmem/pmem0.img bs=1 seek=1234567 conv=notrunc status=none
rm -r /run/emupmem
systemctl stop emupmem.service
journalctl -b -u emupmem.service --no-pager -o cat > /job/out/stopped
systemctl start emupmem.service && exit 9 || true
journalctl -b -u emupmem.service --no-pager -o cat > /job/out/damaged
grep ' /mnt/kept ' /proc/mounts && exit 9 || [ $? = 1 ]
emupmem remove --yes
[ -e /var/lib/emupmem/pmem0.img ]
"""
)


def reserved(made: Image, reserves: str = "memmap=512M!4G") -> list[str]:
    """QEMU's arguments for a kernel that reserves, by words from outside: GRUB's part is proven in test_vm.py."""
    (version,) = (folder.name for folder in made.modules.iterdir())
    words = f"BOOT_IMAGE=/boot/vmlinuz-{version} root=UUID={ROOT_UUID} ro console=ttyS0 {SPARE} {reserves}"
    return ["-kernel", str(made.kernel), "-initrd", str(made.initrd), "-append", words]


@pytest.mark.vm(image="bookworm bios", boots=3, seconds=350)
def test_save_and_restore_on_a_real_device() -> None:
    made = image("bookworm", "bios")
    with Machine(made, qemu_args=reserved(made)) as guest:
        first = done(guest.boot(KEPT_FIRST, ORDERLY))
        cut = guest.boot(KEPT_SECOND, power_cut=r"NOW CUT THE POWER")
        second = done(guest.boot(SNAPSHOTS, last=True))
    assert b"newly created \xc2\xb7 saved to /var/lib/emupmem/pmem0.img" in first.files["journal"]
    assert cut.status is None
    assert b"brought back from /var/lib/emupmem/pmem0.img" in second.files["journal"]
    assert b"is not saved: it was neither brought back nor made in this boot" in second.files["stopped"]
    assert b"its checksum differs; nothing was written" in second.files["damaged"]
    saved, restored = said(second, "save.json"), said(second, "restore.json")
    assert set(saved) == {"file", "device", "size", "allocated", "seconds", "checksum"}
    assert saved["device"] == "/dev/pmem0"
    assert saved["size"] == 512 * MIB
    assert 40 * MIB < saved["allocated"] < 100 * MIB, "sparse"
    assert saved["checksum"] == restored["checksum"] != ""
    assert b'TYPE="ext4"' in second.files["blkid"]
    assert second.files["old"].decode().count("ramdax exists since Linux 6.19; this is 6.1.") == 2


NAMESPACES = (
    FEWER
    + """
set -eux
. /job/warm
emupmem apply --size 512M --yes
until [ -b /dev/pmem0 ]; do sleep 1; done
refuses() { word="$1"; shift; "$@" 2> /run/why && exit 9 || [ $? = 1 ]; cat /run/why; grep -q "$word" /run/why; }
ns() { emupmem namespaces "$@"; }
ns list
refuses 'sudo emupmem namespaces bind' ns create --size 64M
mkfs.ext4 -q -b 4096 /dev/pmem0
mount /dev/pmem0 /mnt
refuses 'is mounted on /mnt' ns bind --yes
umount /mnt
ns bind --dry-run 2> /job/out/dry
grep -q 'driver_override' /job/out/dry
[ -b /dev/pmem0 ]
refuses 'no terminal' ns bind
ns bind --yes --at-boot --json > /job/out/bind.json
ns bind --yes
ns create --size 128M --json > /job/out/create.json
ns create --size 64M --mode devdax
ns create --size 64M --mode raw
ns list
ns list --json > /job/out/list.json
mkfs.ext4 -q -b 4096 /dev/pmem0
mount -o dax /dev/pmem0 /mnt
refuses 'is mounted on /mnt' ns resize namespace0.0 --size 256M --yes
refuses 'is mounted on /mnt' ns delete /dev/pmem0 --yes
refuses 'is mounted on /mnt' ns unbind --yes

# what they are worth behind a virtual NVDIMM, judged on the real devices (QEMU itself is not in here)
printf '#!/bin/sh\necho QEMU emulator version 9.0.0\n' > /root/qemu
chmod +x /root/qemu
behind() { emupmem qemu args --qemu /root/qemu --backend "$@"; }
behind /mnt --pmem 16M --json -- -m 1G > /job/out/daxfile.json
behind /root --pmem 16M --json > /job/out/file.json
dev=$(python3 -c 'import json
for n in json.load(open("/job/out/list.json"))["regions"][0]["namespaces"]:
    if n["mode"] == "devdax": print(n["dev"])')
behind "/dev/$dev" --json > /job/out/devdax.json
refuses 'is mounted on /mnt' behind /dev/pmem0
umount /mnt
refuses 'in one piece' ns create --size 400M
refuses 'at most' ns resize namespace0.1 --size 256M --yes
ns resize namespace0.0 --size 64M --yes --json > /job/out/smaller.json
ns delete namespace0.1 --yes
ns resize /dev/pmem0 --size 160M --yes --json > /job/out/larger.json
ns list --json > /job/out/after.json
refuses 'there is no namespace namespace0.9' ns delete namespace0.9 --yes
dmesg > /job/out/dmesg
made=$(python3 -c 'import json; print(json.load(open("/job/out/larger.json"))["made"][0]["dev"])')
emupmem save /root/image "/dev/$made"
"""
)

AT_BOOT = """
set -eux
. /job/warm
until [ -e /sys/bus/nd/devices/region0 ]; do sleep 1; done
emupmem namespaces list --json > /job/out/list.json
emupmem namespaces create --size 64M
emupmem namespaces unbind --at-boot --yes --json > /job/out/unbind.json
[ ! -e /etc/udev/rules.d/70-emupmem-ramdax.rules ]
until [ -b /dev/pmem0 ]; do sleep 1; done
emupmem verify
"""


@pytest.mark.vm(image="forky bios", boots=2, seconds=220)
def test_namespaces_on_plain_memory() -> None:
    made = image("forky", "bios")
    with Machine(made, qemu_args=reserved(made)) as guest:
        second = done(guest.boot(NAMESPACES, ORDERLY))
        third = done(guest.boot(AT_BOOT, last=True))
    assert said(second, "bind.json") == {"changed": True, "driver": "ramdax", "at_boot": True}
    created = said(second, "create.json")["made"]
    assert [(n["name"], n["mode"], n["raw_size"]) for n in created] == [("namespace0.0", "fsdax", 128 * MIB)]
    (region,) = said(second, "list.json")["regions"]
    assert region["start"] == 4 * GIB
    assert [(n["mode"], n["raw_size"]) for n in region["namespaces"]] == [
        ("fsdax", 128 * MIB),
        ("devdax", 64 * MIB),
        ("raw", 64 * MIB),
    ]
    assert region["free"] <= 512 * MIB - 256 * MIB - 128 * KIB
    assert said(second, "smaller.json")["made"][0]["raw_size"] == 64 * MIB
    assert said(second, "larger.json")["made"][0]["raw_size"] == 160 * MIB
    (after,) = said(second, "after.json")["regions"]
    assert sorted(n["raw_size"] for n in after["namespaces"]) == [64 * MIB, 160 * MIB]
    assert "allocation underrun" not in second.files["dmesg"].decode()
    assert "mem-path=/mnt/vnvdimm0.img,share=on" in " ".join(said(second, "daxfile.json")["argv"])
    emulated = "is emulated persistent memory, RAM of it"
    assert emulated in said(second, "daxfile.json")["promises"][0]
    assert emulated in said(second, "devdax.json")["promises"][0]
    assert "align=2097152" in " ".join(said(second, "devdax.json")["argv"])
    assert "an ordinary file" in said(second, "file.json")["promises"][0]
    assert said(third, "list.json")["driver"] == "ramdax"
    assert said(third, "unbind.json") == {"changed": True, "driver": "e820_pmem", "at_boot": False}
