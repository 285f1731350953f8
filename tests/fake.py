# SPDX-License-Identifier: Apache-2.0
"""A machine in a folder: a GRUB default, a generator that sources it as grub-mkconfig does, /proc and /sys.

The files, the locks, the renames and the generator are real; only the root directory is not `/`.
What the product promises of real machines is proven in tests/vm/test_vm.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import emupmem.system.machine
from emupmem.model import Command
from emupmem.system.machine import Machine
from emupmem.system.programs import Completed
from tests import played

STOCK = b"""# If you change this file, run 'update-grub' afterwards to update
# /boot/grub/grub.cfg.
GRUB_DEFAULT=0
GRUB_TIMEOUT=5
GRUB_DISTRIBUTOR=`( . /etc/os-release; echo ${NAME:-Debian} ) 2>/dev/null || echo Debian`
GRUB_CMDLINE_LINUX_DEFAULT="quiet splash"
GRUB_CMDLINE_LINUX=""
"""

RELEASE = "6.12.0-1-amd64"

GENERATOR = """#!/bin/sh -e
# Sources the defaults and the drop-ins, writes the menu as grub-mkconfig does: .new, then in place.
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/etc/default/grub"
for file in "$root"/etc/default/grub.d/*.cfg; do
  if [ -e "$file" ]; then . "$file"; fi
done
out="$root/boot/grub/grub.cfg"
echo "Generating grub configuration file ..." >&2
{
  echo 'set default="0"'
  echo '### BEGIN /etc/grub.d/10_linux ###'
  for kind in simple advanced recovery; do
    case $kind in
      recovery) args="single ${GRUB_CMDLINE_LINUX}" ;;
      *) args="${GRUB_CMDLINE_LINUX} ${GRUB_CMDLINE_LINUX_DEFAULT}" ;;
    esac
    echo "menuentry 'Debian GNU/Linux ($kind mode)' --class debian \\$menuentry_id_option 'gnulinux-$kind-x' {"
    echo "	linux	/boot/vmlinuz-RELEASE root=UUID=0 ro $args"
    echo "	initrd	/boot/initrd.img-RELEASE"
    echo "}"
  done
  echo '### END /etc/grub.d/10_linux ###'
  echo '### BEGIN /etc/grub.d/30_os-prober ###'
  echo "menuentry 'Another system' {"
  echo "	linux	/boot/vmlinuz-other root=/dev/sdb1"
  echo "}"
  echo '### END /etc/grub.d/30_os-prober ###'
} > "$out.new"
cat "$out.new" > "$out"
rm "$out.new"
echo done >&2
""".replace("RELEASE", RELEASE)

CONFIG = """CONFIG_X86_PMEM_LEGACY_DEVICE=y
CONFIG_X86_PMEM_LEGACY=m
CONFIG_BLK_DEV_PMEM=m
CONFIG_FS_DAX=y
"""

LOG = """Linux version 6.12.0-1-amd64 (builder@example) #1 SMP Debian 6.12.5-1 (2024-12-15)
Command line: BOOT_IMAGE=/boot/vmlinuz-6.12.0-1-amd64 root=UUID=0 ro quiet
BIOS-provided physical RAM map:
BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable
BIOS-e820: [mem 0x000000000009fc00-0x000000000009ffff] reserved
BIOS-e820: [mem 0x0000000000100000-0x00000000bfffffff] usable
BIOS-e820: [mem 0x00000000feffc000-0x00000000feffffff] reserved
BIOS-e820: [mem 0x0000000100000000-0x000000053fffffff] usable
NX (Execute Disable) protection: active
"""


setattr(emupmem.system.machine, "subprocess", played.Subprocess())  # noqa: B010


class FakeMachine(Machine):
    """A machine in a folder that counts as the running one."""

    def __init__(self, root: str | Path = "/") -> None:
        super().__init__(root)
        self.live = True
        self.root_user = True

    @property
    def is_root(self) -> bool:
        return self.root_user

    def find(self, program: str) -> str | None:
        candidate = self.root / "sbin" / program
        return str(candidate) if os.access(candidate, os.X_OK) else None

    def _run(self, command: Command, timeout: float, language: str) -> Completed:
        name = command.argv[0]
        if name.startswith("/") and self.exists(name):
            command = replace(command, argv=(str(self.path(name)), *command.argv[1:]))
        return super()._run(command, timeout, language)


def script(machine: Machine, name: str, text: str) -> None:
    """Put an executable into the folder."""
    path = machine.root / "sbin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def put(machine: Machine, name: str, data: bytes | str) -> Path:
    """Write a file of the machine."""
    path = machine.root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


_menus: dict[bytes, str] = {}
"""What the generator made of the defaults of a machine that is only built: it says the same each time."""


def build(root: Path, grub: bytes = STOCK) -> FakeMachine:
    """A Debian-like machine of 20 GiB with GRUB, booted without a reservation, its menu generated."""
    machine = FakeMachine(root)
    put(machine, "/etc/default/grub", grub)
    put(machine, "/boot/grub/grub.cfg", "")
    put(machine, f"/boot/config-{RELEASE}", CONFIG)
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro quiet splash\n")
    put(machine, "/proc/version", LOG.partition("\n")[0])
    put(machine, "/proc/sys/kernel/osrelease", RELEASE)
    put(machine, "/proc/stat", "cpu 0\nbtime 1000000000\n")
    put(machine, "/log", LOG)
    script(machine, "dmesg", f"#!/bin/sh\ncat '{machine.root}/log'\n")
    script(machine, "update-grub2", GENERATOR)
    if grub not in _menus:
        done = machine.output("update-grub2")
        assert done is not None
        assert done.status == 0, done
        _menus[grub] = menu(machine)
    put(machine, "/boot/grub/grub.cfg", _menus[grub])
    return machine


def running(patch: Callable[[object, str, object], None], machine: Machine) -> None:
    """Let the program take a machine in a folder for the running one; `patch` is setattr or monkeypatch's."""
    real = emupmem.system.machine.Machine

    def make(root: str | Path = "/") -> Machine:
        return machine if str(root) == "/" else real(root)

    patch(emupmem.system.machine, "Machine", make)


def menu(machine: Machine) -> str:
    """The generated menu."""
    return (machine.root / "boot/grub/grub.cfg").read_text()


def leftovers(machine: Machine) -> list[str]:
    """Temporary files that a change must not leave."""
    found = [
        *machine.root.glob("etc/default/.*"),
        *machine.root.glob("boot/grub/*"),
        *machine.root.glob("boot/grub/.*"),
    ]
    return sorted(p.name for p in found if p.name != "grub.cfg" and p.is_file())
