# SPDX-License-Identifier: Apache-2.0
"""What the guest of the demo consists of, and what is typed in it. Data only."""

from __future__ import annotations

import hashlib

SUITE = "trixie"
MIRROR = "http://deb.debian.org/debian"
MEMORY = "6G"
DISK_MIB = 2560
ROOT_UUID = "e0b0eed5-0000-4000-8000-0000000000de"

PACKAGES = (
    *("systemd-sysv", "udev", "kmod", "e2fsprogs", "util-linux", "mount", "initramfs-tools"),
    *("linux-image-cloud-amd64", "grub-pc"),
    *("python3", "python3-typer", "python3-regex", "python3-augeas", "python3-rich"),
)

BOOTS = (
    ("emupmem suggest --size 1G", "emupmem apply --size 1G --yes"),
    (
        "emupmem verify",
        "emupmem mount /dev/pmem0 /mnt/pmem0",
        "grep pmem /proc/mounts",
        "echo 'hello, persistent memory' >/mnt/pmem0/hello",
        "sync /mnt/pmem0/hello",
        "cat /mnt/pmem0/hello",
        "df -h /mnt/pmem0",
        "emupmem umount /mnt/pmem0",
        "emupmem remove --yes",
    ),
    ("emupmem verify", "test ! -e /dev/pmem0", "! grep memmap= /proc/cmdline"),
)
"""The commands of each boot; the demo stops at the first that fails."""

INSTALL_LOADER = "grub-install /dev/vda && update-grub"
"""In a first boot with the kernel from outside: from outside GRUB would record the wrong disk."""

# What the second disk says is run, framed on the second serial port; then the guest switches itself off.
RUNNER = r"""#!/bin/bash
mount /dev/vdb /job || exit 0
stty -F /dev/ttyS1 raw -echo
export HOME=/root USER=root LANG=C.UTF-8 TERM=dumb PYTHONPATH=/job/src
export PYTHONPYCACHEPREFIX=/var/cache/emupmem-demo
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
cd /root
{
    printf '\036start\n'
    bash /job/script </dev/null 2>&1
    printf '\036end %d\n' $?
} | cat >/dev/ttyS1
systemctl --no-block poweroff
"""

UNIT = """[Unit]
Description=The demo
ConditionPathExists=/dev/vdb

[Service]
Type=exec
ExecStart=/usr/local/lib/emupmem-demo

[Install]
WantedBy=multi-user.target
"""

COMMAND = '#!/bin/sh\nexec python3 -m emupmem "$@"\n'

SETUP = rf"""#!/bin/sh
set -eu
echo guest >/etc/hostname
printf 'UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n' >/etc/fstab
mkdir -p /job
systemctl enable -q emupmem-demo.service
systemctl set-default -q multi-user.target
systemctl mask -q apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer getty.target \
    systemd-timesyncd.service systemd-networkd.service networking.service systemd-logind.service
sed -i -e 's/^GRUB_TIMEOUT=.*/GRUB_TIMEOUT=0/' \
    -e 's/^GRUB_CMDLINE_LINUX_DEFAULT=.*/GRUB_CMDLINE_LINUX_DEFAULT="console=ttyS0"/' /etc/default/grub
chmod -x /etc/grub.d/20_linux_xen /etc/grub.d/30_*
# An emulated processor translates programs anew wherever they lie: with the same addresses each time it need not.
echo 'kernel.randomize_va_space = 0' >/etc/sysctl.d/emupmem-demo.conf
# A small initramfs: GRUB reads it through the firmware, which is slow.
sed -i 's/^MODULES=.*/MODULES=list/' /etc/initramfs-tools/initramfs.conf
printf '%s\n' virtio_pci virtio_blk ext4 >>/etc/initramfs-tools/modules
update-initramfs -u
"""

FILES = {
    "usr/local/lib/emupmem-demo": RUNNER,
    "usr/local/bin/emupmem": COMMAND,
    "etc/systemd/system/emupmem-demo.service": UNIT,
    "var/tmp/setup": SETUP,
}
"""What is put into the guest's tree, by name."""


def recipe_key() -> str:
    """Twelve letters for all that decides what is on the disk."""
    parts = (PACKAGES, sorted(FILES.items()), SUITE, DISK_MIB, ROOT_UUID, INSTALL_LOADER)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def boot_script(commands: tuple[str, ...]) -> str:
    """A bash script that shows each command as typed at a prompt, then runs it."""
    lines = ["set -e", "export COLUMNS=100"]
    for command in commands:
        lines += [f"cat <<'END'\nroot@guest:~# {command}\nEND", command]
    return "\n".join(lines) + "\n"
