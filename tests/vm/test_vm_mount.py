# SPDX-License-Identifier: Apache-2.0
"""From a reservation to a folder that a program can map, on real kernels and with real reboots."""

from __future__ import annotations

import pytest

from emupmem.model import GIB
from tests.vm.image import image
from tests.vm.machine import JobResult, Machine
from tests.vm.test_vm import FEWER, INSTALL, PROGRAM, WAIT, WARM, done, said

REFUSED = """
refused() { emupmem "$@" 2>&1 && exit 9 || [ $? = 1 ]; }
"""

FIRST = """
set -eu
INSTALL
REFUSED
refused apply --size 1G --mount /mnt/pmem0 --owner nobody-here --yes > /job/out/owner
refused apply --size 1G --mount /etc/pmem --yes > /job/out/system
refused apply --size 1G --mount /home/dev/pmem --yes > /job/out/loose
refused apply --size 256M --mount /mnt/pmem0 --fs xfs --yes > /job/out/small
[ ! -e /etc/systemd/system/emupmem.service ]
grep memmap /etc/default/grub && exit 9 || [ $? = 1 ]

emupmem apply --size 1G --mount /mnt/pmem0 --owner dev --fs FS --dry-run
[ ! -e /etc/systemd/system/emupmem.service ]
emupmem apply --size 1G --mount /mnt/pmem0 --owner dev --fs FS --yes --json > /job/out/apply.json
emupmem apply --size 1G --mount /mnt/pmem0 --owner dev --fs FS --check

# a new kernel is installed, and GRUB's hook runs: it is the one that boots next
for file in vmlinuz initrd.img config; do ln /boot/$file-$(uname -r) /boot/$file-99.9-test; done
ln -s $(uname -r) /lib/modules/99.9-test
/etc/kernel/postinst.d/zz-update-grub 99.9-test /boot/vmlinuz-99.9-test
grep -c 'vmlinuz-99.9-test .*memmap=1G!4G' /boot/grub/grub.cfg
systemd-analyze verify --man=no /etc/systemd/system/emupmem.service > /job/out/analyze 2>&1
systemctl is-enabled emupmem.service
cp /etc/systemd/system/emupmem.service /job/out/unit
emupmem verify --json > /job/out/pending.json && exit 9 || [ $? = 3 ]
"""

SECOND = """
set -eu
WARM
REFUSED
WAIT
grep 'vmlinuz-99.9-test .*memmap=1G!4G' /proc/cmdline
grep ' /mnt/pmem0 ' /proc/mounts > /job/out/mounts
stat -c '%U:%G %a' /mnt/pmem0 > /job/out/owner
runuser -u dev -- python3 -c "$(cat /job/program.py)" > /job/out/faults
emupmem verify > /job/out/verify
emupmem verify --json > /job/out/verify.json
emupmem_as dev verify --json > /job/out/user.json
systemd-analyze --no-pager time || true

# asked again, nothing changes
emupmem mount --json > /job/out/again.json
emupmem mount /dev/pmem0 /mnt/pmem0 --fs FS --owner dev --at-boot --json > /job/out/boot.json

# refusals on the real thing
OTHER=$([ FS = xfs ] && echo ext4 || echo xfs)
refused mount /dev/vda > /job/out/disk
refused mount /dev/vda1 > /job/out/partition
refused mount /dev/null > /job/out/null
refused mount /dev/pmem0 /mnt/other > /job/out/mounted
refused mount /dev/pmem0 /mnt/pmem0 --force > /job/out/force
refused mount /dev/pmem0 /mnt/pmem0 --fs $OTHER > /job/out/otherfs
refused umount /job > /job/out/notpmem
runuser -u dev -- python3 -c "
import mmap, os, time
fd = os.open('/mnt/pmem0/data', os.O_RDWR)
m = mmap.mmap(fd, 4096)
os.close(fd)
print('mapped', os.getpid(), flush=True)
time.sleep(1000)
" > /run/mapped &
until grep -q mapped /run/mapped; do sleep 0.5; done
refused umount /mnt/pmem0 > /job/out/busy
kill $(cut -d' ' -f2 /run/mapped)
wait || true
emupmem_as dev umount /mnt/pmem0 2>&1 && exit 9 || [ $? = 1 ]
emupmem umount /mnt/pmem0
echo hidden > /mnt/pmem0/file
refused mount /dev/pmem0 /mnt/pmem0 > /job/out/full
rm /mnt/pmem0/file

# the file system that is there is kept; another one needs --force
emupmem mount /dev/pmem0 /mnt/pmem0 --json > /job/out/kept.json
[ -s /mnt/pmem0/data ]
emupmem umount /mnt/pmem0 --json
refused mount /dev/pmem0 /mnt/pmem0 --fs $OTHER > /job/out/signature
emupmem mount /dev/pmem0 /mnt/pmem0 --fs $OTHER --force --dry-run
emupmem mount /dev/pmem0 /mnt/pmem0 --fs $OTHER --force --json > /job/out/other.json
grep ' /mnt/pmem0 ' /proc/mounts >> /job/out/mounts
emupmem umount /mnt/pmem0
wipefs -qa /dev/pmem0
mkswap /dev/pmem0 > /dev/null
refused mount /dev/pmem0 > /job/out/swap
swapon /dev/pmem0
refused mount /dev/pmem0 --force > /job/out/swapon
swapoff /dev/pmem0
wipefs -qa /dev/pmem0

# a mount that is not DAX is told, and how to cure it
mkfs.FS -q -b 4096 /dev/pmem0
mount /dev/pmem0 /mnt/pmem0
emupmem verify > /job/out/nodax && exit 9 || [ $? = 3 ]
refused mount /dev/pmem0 /mnt/pmem0 > /job/out/withoutdax
umount /mnt/pmem0
wipefs -qa /dev/pmem0

# partitions, and what ndctl makes of a device: left alone, each with its own words
python3 -c '
with open("/dev/pmem0", "r+b") as disk:  # one partition of 1 MiB, as a DOS table
    disk.seek(446)
    disk.write(bytes((0, 0, 0, 0, 0x83, 0, 0, 0)) + (2048).to_bytes(4, "little") * 2 + bytes(48) + b"\\x55\\xaa")
'
udevadm settle
blockdev --rereadpt /dev/pmem0
udevadm settle
refused mount /dev/pmem0 > /job/out/partitioned
refused mount /dev/pmem0p1 > /job/out/apart
wipefs -qa /dev/pmem0
udevadm settle
blockdev --rereadpt /dev/pmem0
ndctl create-namespace -f -e namespace0.0 -m fsdax --map=dev > /dev/null
emupmem verify --wait 0 > /job/out/smaller && exit 9 || [ $? = 3 ]
refused mount /dev/pmem0 /mnt/pmem0 --at-boot > /job/out/apiece
ndctl create-namespace -f -e namespace0.0 -m sector > /dev/null
emupmem verify --wait 0 > /job/out/sector && exit 9 || [ $? = 3 ]
refused mount > /job/out/nodevice

# The next boot finds: an mkfs that fails, a device of another size, one that the kernel refuses
# because its size is crooked, and a good one after all of these.
mv /usr/sbin/mkfs.FS /root/mkfs.FS
printf '#!/bin/sh\necho no luck today >&2\nexit 1\n' > /usr/sbin/mkfs.FS
chmod +x /usr/sbin/mkfs.FS
sed -i 's/memmap=1G!4G/memmap=1G!4G,512M!5G,255M!5632M,512M!6G/' /etc/default/grub /boot/grub/grub.cfg
/opt/emupmem/bin/python - <<'END'
from pathlib import Path
from emupmem.device import unit
mounts = "1G!4G pmem0 FS  1G!5G other xfs  255M!5632M crooked ext4  512M!6G good xfs".split()
words = []
for memmap, name, fs in zip(mounts[::3], mounts[1::3], mounts[2::3]):
    words += (memmap, f"/mnt/{name}", fs, "dev", "-", "-")
Path(unit.FILE).write_text(unit.unit_text(unit.from_words(words), "/usr/local/bin/emupmem"))
END
"""

THIRD = """
set -eu
WAIT
systemctl is-active multi-user.target
systemctl is-failed emupmem.service
[ "$(grep -c ' /mnt/.* xfs .*dax=always' /proc/mounts)" = 1 ]
stat -c '%U:%G' /mnt/good > /job/out/owner
emupmem verify > /job/out/verify && exit 9 || [ $? = 3 ]
/opt/emupmem/bin/python -c 'from emupmem.device import dax; print(dax.prove_dax("/mnt/good"))' > /job/out/proof
mv /root/mkfs.FS /usr/sbin/mkfs.FS

# GRUB's side taken away by hand: the unit stays, and the next boot must not care
sed -i 's/memmap=1G!4G,512M!5G,255M!5632M,512M!6G//' /etc/default/grub /boot/grub/grub.cfg
grep memmap /boot/grub/grub.cfg && exit 9 || [ $? = 1 ]
"""

FOURTH = """
set -eu
WARM
[ ! -e /dev/pmem0 ]
WAIT
systemctl is-active multi-user.target
[ "$(systemctl is-failed emupmem.service || true)" != failed ]
emupmem verify --json > /job/out/verify.json
/usr/local/bin/emupmem boot-mount '1G!4G' /mnt/pmem0 FS dev - - > /job/out/quiet
emupmem remove --yes > /job/out/remove
[ ! -e /etc/systemd/system/emupmem.service ]
[ ! -L /etc/systemd/system/multi-user.target.wants/emupmem.service ]
emupmem remove --yes
"""


def text(result: JobResult, name: str) -> str:
    return result.files[name].decode()


@pytest.mark.vm(image="bookworm bios", boots=4, seconds=300)
def test_mounts_refusals_and_boots_that_go_wrong() -> None:
    """The good path on every kernel is in test_vm.py."""
    suite, firmware, fs, other = "bookworm", "bios", "ext4", "xfs"

    def script(words: str) -> str:
        return (
            words.replace("INSTALL", INSTALL + FEWER + WARM)
            .replace("WARM", WARM)
            .replace("REFUSED", REFUSED)
            .replace("WAIT", WAIT)
            .replace("FS", fs)
        )

    files = {"program.py": PROGRAM}
    with Machine(image(suite, firmware), memory="6G") as guest:
        first = done(guest.boot(script(FIRST), files))
        assert "there is no user nobody-here" in text(first, "owner")
        assert "belongs to the system" in text(first, "system")
        assert "/home/dev can be changed by others than root" in text(first, "loose")
        assert "mkfs.xfs makes nothing under 300 MiB" in text(first, "small")
        mounts = said(first, "apply.json")["mounts"]
        wanted = {
            "start": 4 * GIB,
            "size": GIB,
            "dir": "/mnt/pmem0",
            "fs": fs,
            "owner": "dev",
            "mode": "",
            "keep": "",
        }
        assert mounts == [wanted]
        assert "emupmem.service" not in text(first, "analyze"), "systemd has nothing to say about the unit"
        assert said(first, "pending.json")["pending"] is True

        second = done(guest.boot(script(SECOND), files))
        print(suite, fs, text(second, "faults"), text(second, "verify"), text(second, "journal"))
        assert "/dev/pmem0 is mounted at /mnt/pmem0" in text(second, "journal")
        assert "newly created" in text(second, "journal")
        assert "dax=always" in text(second, "mounts").splitlines()[0]
        assert text(second, "owner") == "dev:dev 755\n"
        faults = int(text(second, "faults").split()[1])
        assert 4 <= faults < 64, "8 MiB by 2 MiB, and a few of the interpreter"
        checks = said(second, "verify.json")["checks"]
        assert [c["status"] for c in checks] == ["ok"] * 12, checks
        names = ["filesystem", "mounted", "dax-file", "map-sync", "huge-pages"]
        assert [c["name"] for c in checks][7:] == names
        assert said(second, "user.json")["ok"] is True
        proof = {"dax_file": True, "map_sync": True, "huge_pages": True}
        same = {"device": "/dev/pmem0", "dir": "/mnt/pmem0", "fs": fs, **proof}
        assert said(second, "again.json") == {**same, "changed": False}
        assert said(second, "boot.json") == {**same, "changed": False}
        assert "not persistent memory: emupmem never touches another disk" in text(second, "disk")
        assert "emupmem never touches another disk" in text(second, "partition")
        assert "is not a block device" in text(second, "null")
        assert "is mounted at /mnt/pmem0 already" in text(second, "mounted")
        assert "never recreated" in text(second, "force")
        assert f"with {fs}, not {other}" in text(second, "otherfs")
        assert "/job is not persistent memory" in text(second, "notpmem")
        assert "in use by python3 (process " in text(second, "busy")
        assert "is not empty" in text(second, "full")
        assert said(second, "kept.json") == {**same, "changed": True}
        assert f"holds {fs}" in text(second, "signature")
        assert said(second, "other.json") == {**same, "fs": other, "changed": True}
        assert "holds swap" in text(second, "swap")
        assert "is in use" in text(second, "swapon")
        assert "✗ mounted      /mnt/pmem0 without dax" in text(second, "nodax")
        assert "without DAX" in text(second, "withoutdax")
        assert "/dev/pmem0 has partitions" in text(second, "partitioned")
        assert "/dev/pmem0p1 is a partition" in text(second, "apart")
        print(text(second, "smaller"), text(second, "sector"), text(second, "nodevice"))
        assert "1 GiB (fsdax with a page map on it, 1006 MiB of it usable)" in text(second, "smaller")
        assert "a part of what memmap=1G!4G reserves" in text(second, "apiece")
        assert "1 GiB (sector, " in text(second, "sector")
        assert "/dev/pmem0s has no DAX" in text(second, "nodevice")

        third = done(guest.boot(script(THIRD), files))
        print(text(third, "journal"), text(third, "verify"))
        for words in (
            f"/mnt/pmem0 is not mounted: mkfs.{fs} failed with status 1: no luck today",
            "/mnt/other is not mounted: this boot reserves memmap=512M!5G where it was memmap=1G!5G",
            "/mnt/crooked is not mounted: no device for memmap=255M!5632M appeared",
            "is mounted at /mnt/good · xfs, newly created",
        ):
            assert words in text(third, "journal")
        assert "✗ kernel-map" in text(third, "verify")
        assert "misaligned, unable to map" in text(third, "verify")
        assert text(third, "owner") == "dev:dev\n"
        assert "dax_file=True, map_sync=True" in text(third, "proof")
        faults = int(text(third, "proof").partition("faults=")[2].partition(",")[0])
        assert faults < 16, "4 MiB of a small XFS by 2 MiB"

        fourth = done(guest.boot(script(FOURTH), files, last=True))
        assert "this boot does not reserve memmap=1G!4G" in text(fourth, "quiet")
        left = [c for c in said(fourth, "verify.json")["checks"] if c["name"] == "filesystem"]
        assert "nothing is reserved for it" in left[0]["found"]
        assert "emupmem.service removed" in text(fourth, "remove")
