# SPDX-License-Identifier: Apache-2.0
"""The real libvirt 9.0 and ipmctl 03.00 of Debian 12: what they say of what emupmem makes and asks."""

from __future__ import annotations

import re
import time

import pytest

from tests.nvdimm.test_ipmctl import REAL_NOTHING, REAL_VERSION
from tests.scenario import kernel
from tests.scenario.machine import Host, Play, Scenario

pytestmark = pytest.mark.scenario

RELEASE = "6.1.0-13-amd64"
CMDLINE = f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=e0b0eed5-0000-4000-8000-000000000001 ro quiet"
VIRSH = ("virsh", "-q", "-c", "qemu:///session")


def test_the_real_ipmctl_without_modules(play: Play) -> None:
    machine = play(Host(tree="grub", cmdline=CMDLINE, release=RELEASE, files=kernel.files(RELEASE)))
    assert machine.must("ipmctl", "version") == REAL_VERSION
    for words in ("show -dimm", "show -a -u B -o nvmxml -region -socket 0", "create -f -goal MemoryMode=100"):
        done = machine.run("ipmctl", *words.split())
        assert (done.stdout, done.status) == REAL_NOTHING
    shown = machine.emupmem("nvdimm", "show")
    assert (shown.status, shown.stdout, shown.stderr) == (0, "There is no persistent memory.\n", "")
    for socket in ((), ("--socket", "1")):
        done = machine.emupmem("nvdimm", "goal", "--mode", "appdirect", *socket)
        assert done.status == 1
        assert f"ipmctl finds no Optane modules{' on socket 1' if socket else ''}\n" in done.stderr


@pytest.fixture
def libvirt(play: Play) -> Scenario:
    """A machine with libvirtd in session mode; it ends with the machine."""
    machine = play(Host(tree="libvirt", cmdline=CMDLINE, release=RELEASE))
    machine.must("sh", "-c", "mkdir -p /root/run && libvirtd -d -p /run/libvirtd.pid >/root/log 2>&1")
    end = time.monotonic() + 60
    while (done := machine.run(*VIRSH, "version")).status and time.monotonic() < end:
        time.sleep(0.3)
    assert done.status == 0, done.stderr
    return machine


def domain(machine: Scenario, *words: str) -> tuple[str, str]:
    """The domain that emupmem prints, defined and found valid; and what was said of it."""
    made = machine.emupmem("qemu", "args", "--libvirt", *words)
    assert made.status == 0, made.stderr
    machine.write("/root/domain.xml", made.stdout)
    machine.must(*VIRSH, "define", "--validate", "/root/domain.xml")
    return made.stdout, made.stderr


GUEST = ("--", "-m", "256M", "-name", "vm1", "-smp", "3", "-accel", "tcg")


def test_the_real_libvirt_starts_what_is_printed(libvirt: Scenario) -> None:
    file = ("--pmem", "64M", "--pmem-file", "/root/pmem.img", "--label", "128K")
    _, said = domain(libvirt, *file, *GUEST)
    (made,) = re.findall(r"truncate -s \d+ /root/pmem.img", said)
    libvirt.must(*made.split())
    assert "allocate an NVDIMM as a whole" in said
    libvirt.must(*VIRSH, "start", "vm1")
    found = libvirt.must(*VIRSH, "qemu-monitor-command", "--hmp", "vm1", "info memory-devices")
    assert f"size: {64 << 20}" in found, "the region, as with QEMU alone"
    assert libvirt.must(*VIRSH, "vcpucount", "--live", "--active", "vm1").strip() == "3"
    libvirt.must(*VIRSH, "destroy", "vm1")
    libvirt.must(*VIRSH, "undefine", "vm1")
    used = int(libvirt.must("du", "-k", "/root/pmem.img").split()[0])
    assert used >= 64 << 10, "it was allocated, as was said"

    domain(libvirt, *file, "--readonly", *GUEST)
    native = libvirt.must(*VIRSH, "domxml-to-native", "qemu-argv", "--domain", "vm1")
    assert '"unarmed":true' in native
    assert '"readonly":true' not in native, "the file is opened for writing, as is said"
    libvirt.must(*VIRSH, "undefine", "vm1")

    _, said = domain(libvirt, "--backend", "/root/pmem.img", "--device", "virtio-pmem", *GUEST)
    assert "libvirt 9.0 (Debian 12) defines this domain and cannot start it" in said
    done = libvirt.run(*VIRSH, "start", "vm1")
    assert done.status == 1
    assert "virtio-pmem memory device info is not handled yet" in done.stderr
