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


SYSTEM = "/sys/devices/system"
PROCESSORS = {
    **{f"{SYSTEM}/cpu/{name}": "0\n" for name in ("online", "possible", "present")},
    f"{SYSTEM}/node/online": "0\n",
    f"{SYSTEM}/node/possible": "0\n",
    f"{SYSTEM}/node/node0/cpulist": "0\n",
    f"{SYSTEM}/node/node0/meminfo": "Node 0 MemTotal: 4194304 kB\nNode 0 MemFree: 4194304 kB\n",
}
"""What libvirtd looks at before it starts a domain."""

REAPER = """
import ctypes, os, subprocess
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: libvirtd waits for its QEMUs to be gone, zombies too
subprocess.Popen(["libvirtd"])
while True:
    os.wait()
"""
AS_DEV = (
    *("setpriv", "--reuid", "dev", "--regid", "dev", "--init-groups", "env", "HOME=/home/dev"),
    "XDG_RUNTIME_DIR=/home/dev/run",
)
VIRSH = (*AS_DEV, "virsh", "-q", "-c", "qemu:///session")


@pytest.fixture
def libvirt(play: Play) -> Scenario:
    """A machine in which a user has libvirtd in session mode; it ends with the machine."""
    machine = play(Host(tree="libvirt", cmdline=CMDLINE, release=RELEASE, files=PROCESSORS))
    machine.write("/home/dev/reaper", REAPER)
    machine.must("sh", "-c", "useradd dev && mkdir -p /home/dev/run && chown -R dev /home/dev")
    serve(machine, AS_DEV, "/home/dev/run/libvirt/libvirt-sock")
    return machine


def serve(machine: Scenario, who: tuple[str, ...], socket: str) -> None:
    """Start libvirtd as a user, and wait until it is there."""
    start = " ".join((*who, "python3", "/home/dev/reaper", ">/home/dev/log", "2>&1", "&"))
    machine.must("sh", "-c", start)
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if machine.run("test", "-S", socket).status == 0:
            return
        time.sleep(0.2)
    raise AssertionError(machine.read("/home/dev/log"))


def domain(machine: Scenario, *words: str) -> str:
    """The domain that emupmem prints, defined and found valid; what was said of it."""
    made = machine.run(*AS_DEV, "/usr/local/bin/emupmem", "qemu", "args", "--libvirt", *words)
    assert made.status == 0, made.stderr
    machine.write("/home/dev/domain.xml", made.stdout)
    machine.must(*VIRSH, "define", "--validate", "/home/dev/domain.xml")
    return made.stderr


GUEST = ("--", "-m", "256M", "-name", "vm1", "-smp", "3", "-accel", "tcg")


def test_the_real_libvirt_starts_what_is_printed(libvirt: Scenario) -> None:
    file = ("--pmem", "64M", "--pmem-file", "/home/dev/pmem.img", "--label", "128K")
    said = domain(libvirt, *file, *GUEST)
    (made,) = re.findall(r"truncate -s \d+ /home/dev/pmem.img", said)
    libvirt.must(*AS_DEV, *made.split())
    assert "allocate an NVDIMM as a whole" in said
    libvirt.must(*VIRSH, "start", "vm1")
    found = libvirt.must(*VIRSH, "qemu-monitor-command", "--hmp", "vm1", "info memory-devices")
    assert f"size: {64 << 20}" in found, "the region, as with QEMU alone"
    assert libvirt.must(*VIRSH, "vcpucount", "--live", "--active", "vm1").strip() == "3"
    libvirt.must(*VIRSH, "destroy", "vm1")
    libvirt.must(*VIRSH, "undefine", "vm1")
    used = int(libvirt.must("du", "-k", "/home/dev/pmem.img").split()[0])
    assert used >= 64 << 10, "it was allocated, as was said"

    domain(libvirt, *file, "--readonly", *GUEST)
    native = libvirt.must(*VIRSH, "domxml-to-native", "qemu-argv", "--domain", "vm1")
    assert '"unarmed":true' in native
    assert '"readonly":true' not in native, "the file is opened for writing, as is said"
    libvirt.must(*VIRSH, "undefine", "vm1")

    said = domain(libvirt, "--backend", "/home/dev/pmem.img", "--device", "virtio-pmem", *GUEST)
    assert "libvirt 9.0 (Debian 12) defines this domain and cannot start it" in said
    done = libvirt.run(*VIRSH, "start", "vm1")
    assert done.status == 1
    assert "virtio-pmem memory device info is not handled yet" in done.stderr


IMAGES = "/var/lib/libvirt/images"
SYSTEM_VIRSH = ("virsh", "-q", "-c", "qemu:///system")
# What libvirtd as root would do with rights that no process has in here: mounts, groups, attributes of its own.
SYSTEM_SETTINGS = """
remember_owner = 0
namespaces = [ ]
cgroup_controllers = [ ]
security_driver = "none"
stdio_handler = "file"
"""


def test_the_daemon_of_the_system_starts_it_too(play: Play) -> None:
    """qemu:///system: the guest runs as a user of its own, to whom libvirtd gives the file."""
    machine = play(Host(tree="libvirt", cmdline=CMDLINE, release=RELEASE, files=PROCESSORS))
    machine.write("/home/dev/reaper", REAPER)
    machine.write("/etc/libvirt/qemu.conf", SYSTEM_SETTINGS)
    # as the package libvirt-daemon-system does, which would bring systemd and a firewall
    users = "groupadd -r libvirt-qemu && useradd -r -g libvirt-qemu -d /var/lib/libvirt libvirt-qemu && useradd dev"
    machine.must("sh", "-c", f"{users} && mkdir -p {IMAGES} /var/log/libvirt/qemu /run/libvirt")
    serve(machine, (), "/run/libvirt/libvirt-sock")

    def virsh(*words: str) -> str:
        done = machine.run(*SYSTEM_VIRSH, *words, timeout=300)
        assert done.status == 0, f"{words}: {done.stderr}{machine.read('/home/dev/log')}"
        return done.stdout

    def owner() -> str:
        return machine.must("stat", "-c", "%U", f"{IMAGES}/pmem.img").strip()

    words = ("--pmem", "64M", "--pmem-file", f"{IMAGES}/pmem.img", "--label", "128K", *GUEST)
    made = machine.emupmem("qemu", "args", "--libvirt", *words)
    assert made.status == 0, made.stderr
    machine.write("/root/domain.xml", made.stdout)
    virsh("define", "--validate", "/root/domain.xml")
    missing = machine.run(*SYSTEM_VIRSH, "start", "vm1", timeout=300)
    assert (missing.status, "No such file" in missing.stderr) == (1, True), (
        "as is said: nothing is made there"
    )
    (make,) = re.findall(rf"truncate -s \d+ {IMAGES}/pmem.img", made.stderr)
    machine.must(*make.split())
    machine.must("chown", "dev", f"{IMAGES}/pmem.img")
    virsh("start", "vm1")
    assert owner() == "libvirt-qemu"
    assert f"size: {64 << 20}" in virsh("qemu-monitor-command", "--hmp", "vm1", "info memory-devices")
    assert virsh("vcpucount", "--live", "--active", "vm1").strip() == "3"
    virsh("destroy", "vm1")
    assert owner() == "root", "without remember_owner libvirt does not know whose it was"
    virsh("undefine", "vm1")
