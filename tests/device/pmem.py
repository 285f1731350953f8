# SPDX-License-Identifier: Apache-2.0
"""A machine in a folder that has pmem devices: its mkfs, mount and umount only write down that they were called.

Imports no test and no pytest: what runs it in a process of its own would wait for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from emupmem.device.dax import DaxProof
from emupmem.model import GIB, Busy
from emupmem.system import files, lock, processes
from tests.fake import CONFIG, RELEASE, FakeMachine, build, put, script

GOOD = DaxProof(True, True, 2)


class PmemMachine(FakeMachine):
    """Has block devices without mknod: a file named like one is one."""

    claimed = False
    owned: tuple[str, str, tuple[int, int] | None, int | None]

    def block_number(self, name: str) -> str:
        return self.peek(f"/sys/class/block/{name.rpartition('/')[2]}/dev") if self.exists(name) else ""


def device_stand_ins(patch: Callable[[object, str, object], None]) -> None:
    """What needs real devices and processes, for a `PmemMachine`; `patch` is setattr or monkeypatch's."""

    @contextlib.contextmanager
    def hold(machine: PmemMachine, name: str) -> Iterator[None]:
        if machine.claimed:
            raise Busy(f"{name} is in use", "something holds it")
        yield

    def own(
        machine: PmemMachine, name: str, number: str, owner: tuple[int, int] | None, mode: int | None
    ) -> bool:
        machine.owned = (name, number, owner, mode)
        return False

    patch(lock, "hold_device", hold)
    patch(files, "set_mount_owner", own)
    patch(processes, "processes_using", lambda machine, number: ["python3 (process 42)"])


def add_device(
    machine: FakeMachine, n: int = 0, start: int = 4 * GIB, size: int = GIB, node: str = "region"
) -> None:
    """A pmem device with its region, as sysfs shows it."""
    here = f"/sys/devices/platform/e820_pmem/ndbus0/region{n}"
    block = f"{here}/namespace{n}.0/block/pmem{n}"
    for name, value in (("size", size), ("resource", hex(start)), ("numa_node", 0)):
        put(machine, f"{here}/{name}", f"{value}\n")
    put(machine, f"{here}/namespace{n}.0/mode", "memory\n")
    put(machine, f"{block}/size", f"{size // 512}\n")
    put(machine, f"{block}/queue/dax", "1\n")
    put(machine, f"{block}/dev", f"259:{n}\n")
    put(machine, f"{block}/ro", "0\n")
    put(machine, f"/dev/pmem{n}", "")
    for link, target in ((f"/sys/bus/nd/devices/region{n}", here), (f"/sys/class/block/pmem{n}", block)):
        path = machine.root / link.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def reserve(machine: FakeMachine, value: str) -> None:
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro {value} quiet\n")


def mounted(
    machine: FakeMachine, dev: str, folder: str, fs: str = "ext4", options: str = "dax=always"
) -> None:
    number = machine.peek(f"/sys/class/block/{dev}/dev") or "8:1"
    line = f"40 1 {number} / {folder} rw,relatime shared:1 - {fs} /dev/{dev} rw,{options}\n"
    path = machine.root / "proc/self/mountinfo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line)


def holds(machine: FakeMachine, output: str, status: int = 0) -> None:
    """Let blkid say that the device holds something."""
    script(machine, "blkid", f"#!/bin/sh\nprintf '{output}'\nexit {status}\n")


def pmem_machine(folder: Path) -> PmemMachine:
    """A machine with one blank emulated device."""
    built = build(folder)
    machine = PmemMachine(built.root)
    root = machine.root
    add_device(machine)
    reserve(machine, "memmap=1G!4G")
    put(machine, "/etc/passwd", "root:x:0:0::/root:/bin/sh\ndev:x:1000:1001::/home/dev:/bin/sh\n")
    put(machine, "/etc/group", "root:x:0:\nusers:x:100:\n")
    put(machine, "/proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    script(machine, "../usr/local/bin/emupmem", "#!/bin/sh\n")
    put(machine, f"/boot/config-{RELEASE}", f"{CONFIG}CONFIG_FS_DAX_PMD=y\n")
    (root / "mnt").mkdir()
    holds(machine, "", 2)
    script(machine, "wipefs", "#!/bin/sh\n")
    for name in ("mkfs.ext4", "mkfs.xfs", "systemctl", "e2fsck"):
        script(machine, name, f"#!/bin/sh\necho {name} \"$@\" >> '{root}/calls'\n")
    script(
        machine,
        "mount",
        f"#!/bin/sh\necho mount \"$@\" >> '{root}/calls'\n"
        'n=$(cat "$0.number" 2>/dev/null || echo 259:0)\n'
        f"echo \"41 1 $n / $6 rw - $2 $5 rw,$4\" >> '{root}/proc/self/mountinfo'\n",
    )
    script(machine, "umount", f"#!/bin/sh\necho umount \"$@\" >> '{root}/calls'\n")
    return machine
