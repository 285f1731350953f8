# SPDX-License-Identifier: Apache-2.0
"""The same promises without GRUB: a machine that systemd-boot starts, its kernels added by kernel-install."""

from __future__ import annotations

import pytest

from emupmem.model import GIB, MIB
from tests.boot import generators
from tests.vm.image import image
from tests.vm.machine import Machine
from tests.vm.test_vm import INSTALL, WAIT, WARM, done, said

THREE = "1G!4G,256M!5G,512M%5376M-1+0xefffffff"
"""A device for a file system, one that is mapped as a whole, and one that is no persistent memory."""

TOOL = f"#!/usr/bin/python3\nROOT = '/'\n{generators.PROXMOX_BOOT_TOOL}"

# What an update of the kernel's package, or of the initramfs, runs.
HEAD = """
set -eux
entry=$(echo /boot/efi/loader/entries/$(cat /etc/machine-id)-*.conf)
update() { /etc/kernel/postinst.d/zz-systemd-boot "$(uname -r)" "/boot/vmlinuz-$(uname -r)"; }
alone() { [ "$(ls -A "${entry%/*}")" = "${entry##*/}" ]; }
words() { sed -n 's/^options *//p' "$1" | tr ' ' '\\n' | sort; }
"""

# Debian has no /etc/kernel/cmdline: kernel-install takes the words of the boot that runs.
FIRST = """
INSTALL
WARM
same() {
    cmp "$entry" /root/entry
    [ ! -e /etc/kernel/cmdline ]
    alone
}
refused() {
    emupmem apply --size 1G --yes 2> /job/out/$1 && exit 9 || [ $? = 1 ]
    same
}
[ ! -e /etc/default/grub ]
[ ! -e /boot/grub ]
cp "$entry" /root/entry
emupmem doctor --json > /job/out/doctor.json
emupmem_as dev suggest --size 1G --json > /job/out/user.json
emupmem apply --size 1G --check && exit 9 || [ $? = 3 ]

mount -o remount,ro /boot/efi
refused readonly
mount -o remount,rw /boot/efi
dd if=/dev/zero of=/boot/efi/filler bs=64K 2> /dev/null || true
dd if=/dev/zero of=/boot/efi/filler.2 bs=512 2> /dev/null || true
refused full
rm /boot/efi/filler*

# a trial, tampered with: its kernel panics
emupmem apply --size 1G --trial --yes
cmp "$entry" /root/entry
emupmem verify --json > /job/out/tries.json && exit 9 || [ $? = 3 ]
sed -i '/^options/s/ memmap=1G!4G$/& panic=1 rdinit=\\/nonexistent/' "${entry%/*}/emupmem-trial.conf"
grep '^options.* memmap=1G!4G panic=1 rdinit=/nonexistent$' "${entry%/*}/emupmem-trial.conf"
sync
"""

# The machine came back by itself.
BACK = """
WARM
grep memmap= /proc/cmdline && exit 9 || [ $? = 1 ]
emupmem verify --json > /job/out/panic.json && exit 9 || [ $? = 3 ]
emupmem abandon --yes
cmp "$entry" /root/entry
alone
[ ! -e /etc/kernel/cmdline ]
emupmem apply --size 1G --trial --yes
"""

TRIAL = """
WARM
grep 'memmap=1G!4G' /proc/cmdline
emupmem verify --json > /job/out/trial.json
# an update meanwhile makes nothing permanent
update
[ "$(words "$entry")" = "$(words /root/entry)" ]
emupmem confirm --yes
emupmem verify --json > /job/out/confirmed.json
alone
emupmem apply --size 1G --mount /mnt/pmem0 --yes --json > /job/out/apply.json
emupmem apply --size 1G --mount /mnt/pmem0 --check
emupmem apply --as devdax --size 256M --add --yes
emupmem apply --as dax --size 512M --add --yes --json > /job/out/kinds.json
cp "$entry" /job/out/entry.conf
cp /etc/kernel/cmdline /job/out/
update
[ "$(words "$entry")" = "$(words /job/out/entry.conf)" ]
bootctl list --json=short > /job/out/bootctl.json
"""

SECOND = """
WARM
WAIT
grep 'memmap=1G!4G' /proc/cmdline
grep -E ' /mnt/pmem0 .*dax=always' /proc/mounts
emupmem verify --json > /job/out/verify.json
emupmem doctor --json > /job/out/doctor.json
emupmem umount /mnt/pmem0
emupmem remove --yes
cmp "$entry" /root/entry
alone
# the running kernel still has it, and an update before the next start must not take it from there
update
cmp "$entry" /root/entry
emupmem verify > /job/out/pending && exit 9 || [ $? = 3 ]
"""

THIRD = """
WARM
grep memmap= /proc/cmdline && exit 9 || [ $? = 1 ]
emupmem verify --json > /job/out/verify.json
ls /dev/pmem* /dev/dax* && exit 9 || true

# a command line that somebody wrote keeps every other byte
sed 's/^/# of this machine\\n/; s/ ro / ro\\n  quiet /' /etc/kernel/cmdline > /root/cmdline
cp /root/cmdline /etc/kernel/cmdline
update
cp "$entry" /root/entry
emupmem apply --size 1G --yes
cp /etc/kernel/cmdline /job/out/
cp "$entry" /job/out/entry.conf
update
[ "$(words "$entry")" = "$(words /job/out/entry.conf)" ]
emupmem remove --yes
cmp /etc/kernel/cmdline /root/cmdline
cmp "$entry" /root/entry
alone
"""

# Proxmox's way on the same partition, not mounted: the stand-in mounts it as proxmox-boot-tool does.
PROXMOX = """
cat > /usr/sbin/proxmox-boot-tool << 'END'
TOOL
END
chmod +x /usr/sbin/proxmox-boot-tool
mkdir /boot/efi/EFI/proxmox
echo 'default proxmox-*' >> /boot/efi/loader/loader.conf
uname -r > /packages
{ findmnt -no UUID /boot/efi; echo 0000-0000; } > /etc/kernel/proxmox-boot-uuids
sed -n 's/^options *//p' "$entry" > /etc/kernel/cmdline
cp /etc/kernel/cmdline /root/cmdline
umount /boot/efi
proxmox-boot-tool refresh
device=/dev/disk/by-uuid/$(head -n 1 /etc/kernel/proxmox-boot-uuids)
esp() { unshare --mount sh -ec 'mount -o ro "$0" /mnt; "$@"' "$device" "$@"; }
made="/mnt/loader/entries/proxmox-$(uname -r).conf"
esp cat "$made" > /root/made.conf
emupmem apply --size 1G --yes 2> /job/out/gone
esp grep '^options .* memmap=1G!4G$' "$made"
# where it is mounted it is looked at there
mount /boot/efi
emupmem remove --yes
umount /boot/efi
esp cat "$made" | cmp - /root/made.conf
cmp /etc/kernel/cmdline /root/cmdline
grep -E ' /mnt | /var/tmp' /proc/mounts && exit 9 || [ $? = 1 ]
"""


@pytest.mark.vm(image="trixie sdboot", boots=5, seconds=250)
def test_systemd_boot_from_suggest_to_remove() -> None:
    def script(text: str) -> str:
        return HEAD + text.replace("INSTALL", INSTALL).replace("WAIT", WAIT).replace("WARM", WARM)

    with Machine(image("trixie", "sdboot")) as guest:
        # warm restarts in one run of the machine: after the panic it comes back without any help
        for result in (results := guest.boots([script(s) for s in (FIRST, BACK, TRIAL)])):
            done(result)
        first = results[-1]
        (loader,) = [f for f in said(first, "doctor.json")["findings"] if f["name"] == "loader"]
        assert loader["status"] == "ok", loader
        assert loader["evidence"].startswith("systemd-boot 257"), loader
        assert said(first, "user.json")["plan"]["memmap"] == "memmap=1G!4G"
        assert b"Read-only file system" in first.files["readonly"], first.files["readonly"]
        assert b"No space left on device" in first.files["full"], first.files["full"]
        for refusal in ("readonly", "full"):
            assert b"the old configuration is back" in first.files[refusal], first.files[refusal]
        assert said(first, "apply.json")["memmap"] == "memmap=1G!4G"
        (check,) = said(first, "tries.json")["checks"]
        assert (check["name"], check["status"]) == ("trial", "pending")
        assert "the machine came back without memmap=1G!4G" in said(first, "panic.json")["checks"][0]["found"]
        tried = said(first, "trial.json")
        assert "this boot is the trial" in tried["checks"][0]["found"]
        assert [c["status"] for c in tried["checks"]] == ["ok"] * 6, tried
        assert [c["status"] for c in said(first, "confirmed.json")["checks"]] == ["ok"] * 7
        assert said(first, "kinds.json")["memmap"] == f"memmap={THREE}"
        words = options(first.files["entry.conf"])
        assert {f"memmap={THREE}".encode(), b"modprobe.blacklist=kmem"} <= set(words)
        # what kernel-install adds by itself stays out of its source
        there = [w for w in words if not w.startswith(b"systemd.machine_id=")]
        assert first.files["cmdline"].split() == there
        (default,) = [e for e in said(first, "bootctl.json") if e["isDefault"]]
        assert f"memmap={THREE}" in default["options"].split()

        # a cold start: each kind of device is made anew
        second = done(guest.boot(script(SECOND)))
        found = said(second, "verify.json")
        assert [c["status"] for c in found["checks"]] == ["ok"] * 14, found
        # which range has number 0 is the kernel's choice
        assert [(d["dev"].rstrip("0123456789."), d["start"], d["size"]) for d in found["devices"]] == [
            ("/dev/pmem", 4 * GIB, GIB),
            ("/dev/dax", 5 * GIB, 254 * MIB),
            ("/dev/dax", 5 * GIB + 256 * MIB, 512 * MIB),
        ]
        assert "devdax" in found["checks"][5]["found"]
        assert said(second, "doctor.json")["ok"] is True

        third = done(guest.boot(script(THIRD + PROXMOX.replace("TOOL", TOOL.strip())), last=True))
        assert [c["status"] for c in said(third, "verify.json")["checks"]] == ["ok"] * 3
        assert b"0000-0000 is not here: proxmox-boot-tool passes over it" in third.files["gone"]
        lines = third.files["cmdline"].splitlines()
        assert lines[0] == b"# of this machine"
        assert b"memmap=1G!4G" in lines[-1].split()
        assert b"memmap=1G!4G" in options(third.files["entry.conf"])


def options(entry: bytes) -> list[bytes]:
    """The kernel's words of an entry that has one line of them."""
    (line,) = [line for line in entry.splitlines() if line.startswith(b"options")]
    return line.split()[1:]
