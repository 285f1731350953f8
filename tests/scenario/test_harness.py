"""The harness itself: what a test says is what is seen, and this host is out of reach."""

from __future__ import annotations

import pytest

from tests.scenario.machine import Host, Play

pytestmark = pytest.mark.scenario
RELEASE = "6.1.0-13-amd64"

def test_x(play):
    host = Host("grub", "BOOT_IMAGE=/boot/vmlinuz-x root=UUID=0 ro quiet", RELEASE, efi={"LoaderInfo": "systemd-boot 257.8"})
    s = play(host)
    for c in ["cat /proc/cmdline /proc/version /proc/iomem; ls -la / /dev /sys/firmware /sys/firmware/efi/efivars; cat /proc/mounts; grep Cap /proc/self/status; dmesg; hostname; uname -r; ps ax; ls /proc/*/exe -la; ip a; cat /proc/self/mountinfo"]:
        print(s.run("sh", "-c", c))
    print(s.emupmem("suggest"))
    print(s.emupmem("doctor"))
