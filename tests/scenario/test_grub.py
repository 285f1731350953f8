"""Machines that GRUB starts, with the real GRUB 2.06 of Debian 12: all of it but grub-probe."""

from __future__ import annotations

import pytest

from tests.scenario import kernel
from tests.scenario.machine import Host, Play, diff

pytestmark = pytest.mark.scenario

RELEASE = "6.1.0-13-amd64"
ROOT = "root=UUID=e0b0eed5-0000-4000-8000-000000000001"
BANNER = (
    f"Linux version {RELEASE} (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0, "
    "GNU ld (GNU Binutils for Debian) 2.40) #1 SMP PREEMPT_DYNAMIC Debian 6.1.55-1 (2023-09-29)"
)
BOOKWORM = Host(
    tree="grub",
    cmdline=f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} {ROOT} ro quiet",
    release=RELEASE,
    version=BANNER,
    files=kernel.files(RELEASE),
)


def test_bookworm(play):
    s = play(BOOKWORM)
    print(s.must("update-grub2"))
    print(s.read("/boot/grub/grub.cfg"))
    before = s.snapshot()
    print(s.emupmem("doctor"))
    print(s.emupmem("apply", "--size", "1G", "--yes"))
    print(s.run("grep", "-n", "memmap", "/boot/grub/grub.cfg"))
    print(s.emupmem("verify", "--json"))
    print(s.emupmem("remove", "--yes"))
    print(diff(before, s.snapshot()))
    print(s.processes())
