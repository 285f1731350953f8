# SPDX-License-Identifier: Apache-2.0
"""GRUB with BLS entries, booted: what emupmem leaves in /boot is what a real GRUB makes a command line of.

A scenario makes the /boot, on ext4 as Fedora has it: entries whose words are in GRUB's environment block, changed by
the stand-in for grubby. GRUB 2.14 of Debian testing reads it: its blscfg is that of Fedora's patches, taken over. It
does not have all of them: a default that begins with a digit is a number for it, so the machine's id begins with a
letter. The initrd is busybox, which says what the kernel was told and made of it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests import fake
from tests.boot import test_loader
from tests.scenario import kernel as scenario_kernel
from tests.scenario.machine import Host, Node, Scenario, lacking, lacking_disk
from tests.scenario.test_grub import GRUBBY, ROOT, TRIES
from tests.vm import progress
from tests.vm.grub import grub_efi
from tests.vm.image import image
from tests.vm.kernel import KEPT, MODULES, TOKEN, initramfs
from tests.vm.machine import BOOT_SECONDS, Image, converse, firmware_args, qemu
from tests.vm.test_vm_uki import CONSOLE, RESERVED, SAY, SYSTEMD_BOOT, line_of

WORDS = f"{ROOT} ro quiet {CONSOLE}"
ID = f"f{test_loader.ID[1:]}"
TRIAL = "/boot/loader/entries/emupmem-trial.conf"


def host(made: Image, folder: Path) -> Host:
    """RHEL 8's way of writing entries, with a kernel that is a real one."""
    (release,) = (p.name for p in made.modules.iterdir())
    entry = test_loader.FEDORA.replace(fake.RELEASE, release)
    block = f"# GRUB Environment Block\nsaved_entry={ID}-{release}\nkernelopts={WORDS}\n"
    files = {
        **scenario_kernel.files(release),
        f"/boot/vmlinuz-{release}": made.kernel.read_bytes(),
        f"/boot/initramfs-{release}.img": initramfs(made, folder, SAY, MODULES).read_bytes(),
        "/etc/default/grub": 'GRUB_CMDLINE_LINUX="quiet"\nGRUB_ENABLE_BLSCFG=true\n',
        "/boot/grub2/grub.cfg": f"set timeout=0\n{TRIES.files['/boot/grub2/grub.cfg']!s}",
        "/boot/grub2/grubenv": block.ljust(1024, "#"),
        f"/boot/loader/entries/{ID}-{release}.conf": entry.replace("OPTIONS", "$kernelopts $tuned_params"),
    }
    programs = {**TRIES.programs, "grubby": GRUBBY.replace("OLD = '/', True, False", "OLD = '/', True, True")}
    cmdline = f"BOOT_IMAGE=(hd1)/vmlinuz-{release} {WORDS}"
    return replace(TRIES, cmdline=cmdline, release=release, files=files, programs=programs, machine_id=ID)


class BootDisk:
    """A /boot on ext4, as emupmem left it; what GRUB writes to it stays."""

    def __init__(self, nodes: Mapping[str, Node], folder: Path) -> None:
        self.folder, self.disk = folder, folder / "boot.ext4"
        for path, node in nodes.items():
            place = folder / path.lstrip("/")
            if node.kind == "folder":
                place.mkdir(parents=True, exist_ok=True)
            elif node.kind == "file":
                place.write_bytes(node.data)
        esp = folder / "esp" / SYSTEMD_BOOT
        esp.parent.mkdir(parents=True)
        esp.write_bytes(grub_efi().read_bytes())
        make = ["mke2fs", "-q", "-t", "ext4", "-d", str(folder / "boot"), str(self.disk), "96M"]
        subprocess.run(make, check=True)

    def boots(self) -> str:
        """What the kernel says that the firmware and GRUB start."""
        argv = [
            *qemu("6G"),
            *firmware_args("uefi", self.folder / "vars.fd"),
            *("-drive", f"file=fat:rw:{self.folder / 'esp'},format=raw,if=virtio"),
            *("-drive", f"file={self.disk},format=raw,if=virtio", "-no-reboot"),
        ]
        (result,) = converse(argv, TOKEN, 1, BOOT_SECONDS, guest=progress.Boot("BLS entries"))
        assert result.status == 0, result.output
        return result.output

    def environment(self) -> str:
        """GRUB's environment block, as it is on the disk."""
        read = ["debugfs", "-R", "cat /grub2/grubenv", str(self.disk)]
        return subprocess.run(read, check=True, capture_output=True, text=True).stdout


@pytest.mark.vm(image="trixie uefi", boots=3, seconds=30)
def test_a_trial_by_grub_is_taken_once_and_the_entries_as_it_reads_them(tmp_path: Path) -> None:
    if why := lacking() or lacking_disk("ext4"):
        pytest.skip(f"no scenarios: {why}")
    made = image("trixie", KEPT["trixie"])
    (tmp_path / "initrd").mkdir()
    with Scenario(host(made, tmp_path / "initrd")) as machine:
        done = machine.emupmem("apply", "--size", "1G", "--yes", "--trial")
        assert done.status == 0, done
        tried = machine.snapshot(["/boot"])
        done = machine.emupmem("apply", "--size", "1G", "--yes")
        assert done.status == 0, done
        applied = machine.snapshot(["/boot"])
    assert TRIAL in tried
    assert TRIAL not in applied

    disk = BootDisk(tried, tmp_path / "tried")
    assert "next_entry=emupmem-trial" in disk.environment()
    said = disk.boots()
    assert line_of(said).split()[1:] == [*WORDS.split(), "memmap=1G!4G"]
    assert RESERVED in said
    assert "next_entry=emupmem-trial" not in disk.environment()
    assert line_of(disk.boots()).split()[1:] == WORDS.split(), "the start after it is the old configuration"

    said = BootDisk(applied, tmp_path / "applied").boots()
    assert line_of(said).split()[1:] == [*WORDS.split(), "memmap=1G!4G"]
    assert f"\n{(1 << 30) // 512}\n" in said, "the size of /dev/pmem0"
