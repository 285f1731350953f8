# SPDX-License-Identifier: Apache-2.0
"""Unified kernel images, booted: what emupmem and the real tools leave on an EFI partition is what OVMF starts.

A scenario makes the partition: ukify and kernel-install make the images of real kernels, emupmem makes its addon.
QEMU shows that folder as a disk. The images' initrd is busybox, which says what the kernel was told and made of it.
Once the loader is systemd-boot, which starts the default image, a trial's entry or what a person makes of an entry
in its menu; once it is the image itself, in the place where the firmware looks for a loader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.scenario import kernel as scenario_kernel
from tests.scenario.machine import Host, Node, Scenario, lacking
from tests.scenario.test_systemd_boot import ID
from tests.scenario.test_uki import ADDON, ESP, LINE, UKI, add
from tests.vm import progress
from tests.vm.image import image
from tests.vm.kernel import KEPT, MODULES, TOKEN, initramfs
from tests.vm.machine import BOOT_SECONDS, Image, converse, firmware_args, qemu

SAY = """
echo "RELEASE $(uname -r)"
echo "LINE $(cat /proc/cmdline)"
grep -i persistent /proc/iomem
cat /sys/block/pmem0/size
true
"""
CONSOLE = "console=ttyS0 panic=-1 no_timer_check"
"""With the last word a kernel does not take a machine that is slow for one with a broken timer."""
RESERVED = "100000000-13fffffff : Persistent Memory (legacy)"
SYSTEMD_BOOT = "EFI/BOOT/BOOTX64.EFI"


def host(made: Image, folder: Path) -> Host:
    """A machine of images, whose kernel is a real one."""
    (release,) = (p.name for p in made.modules.iterdir())
    files = {
        **scenario_kernel.files(release),
        f"/boot/vmlinuz-{release}": made.kernel.read_bytes(),
        f"/boot/initrd.img-{release}": initramfs(made, folder, SAY, MODULES).read_bytes(),
        "/etc/kernel/install.conf": "layout=uki\nuki_generator=ukify\n",
    }
    efi = {**(UKI.efi or {}), "LoaderEntrySelected": f"{ID}-{release}.efi"}
    efi |= {"StubImageIdentifier": f"\\EFI\\Linux\\{ID}-{release}.efi"}
    return replace(UKI, cmdline=f"{LINE} {CONSOLE}", release=release, files=files, efi=efi)


def after_apply(machine: Scenario, *more: str) -> dict[str, Node]:
    done = machine.emupmem("apply", "--size", "1G", "--yes", *more)
    assert done.status == 0, done
    return machine.snapshot([ESP])


class Partition:
    """The EFI partition of a machine, as emupmem leaves it: `tried` with a trial set up, `applied` for good."""

    def __init__(self, made: Image, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.suite = folder, made.suite
        with Scenario(host(made, folder)) as machine:
            self.release = machine.host.release
            machine.must("bootctl", "install", "--make-entry-directory=no", "--no-variables")
            add(machine, self.release)
            self.tried = after_apply(machine, "--trial")
            self.applied = after_apply(machine)
        assert ADDON in self.applied
        assert ADDON not in self.tried

    def boots(self, nodes: Mapping[str, Node], default: str = "", loader: str = "") -> str:
        """Start it; `default` is the entry that systemd-boot takes, `loader` the file that the firmware starts."""
        name = f"esp{len(list(self.folder.iterdir()))}"
        for path, node in nodes.items():
            place = self.folder / name / path.removeprefix(ESP).lstrip("/")
            if node.kind == "file":
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(node.data)
        esp = self.folder / name
        (esp / "loader/loader.conf").write_text(
            f"timeout 0\ndefault {default}\n" if default else "timeout 0\n"
        )
        if loader:
            (esp / SYSTEMD_BOOT).write_bytes((esp / loader).read_bytes())
        argv = [
            *qemu("6G"),
            *firmware_args("uefi", self.folder / f"{name}.fd"),
            *("-drive", f"file=fat:rw:{esp},format=raw,if=virtio", "-no-reboot"),
        ]
        guest = progress.Boot(f"{self.suite} unified image")
        (result,) = converse(argv, TOKEN, 1, BOOT_SECONDS, guest=guest)
        assert result.status == 0, result.output
        found = re.search(r"^RELEASE (.*)$", result.output, re.MULTILINE)
        assert found is not None, result.output
        assert found[1] == self.release
        return result.output


def line_of(said: str) -> str:
    """The command line that a kernel had."""
    (found,) = re.findall(r"^LINE (.*)$", said, re.MULTILINE)
    return str(found)


@pytest.fixture
def partition(request: pytest.FixtureRequest, tmp_path: Path) -> Partition:
    if why := lacking():
        pytest.skip(f"no scenarios: {why}")
    suite = request.param
    return Partition(image(suite, KEPT.get(suite, "bios")), tmp_path / "uki")


@pytest.mark.vm(image="trixie uefi", boots=4, seconds=80)
@pytest.mark.parametrize("partition", ["trixie"], indirect=True)
def test_images_of_6_12(partition: Partition) -> None:
    image_file = f"EFI/Linux/{ID}-{partition.release}.efi"
    words = f"{LINE} {CONSOLE}"
    for loader in ("", image_file):
        said = partition.boots(partition.applied, loader=loader)
        assert line_of(said) == f"{words} memmap=1G!4G"
        assert RESERVED in said
        assert f"\n{(1 << 30) // 512}\n" in said, "the size of /dev/pmem0"
    said = partition.boots(partition.tried, "emupmem-trial.conf")
    assert line_of(said) == f"{words} memmap=1G!4G"
    assert RESERVED in said

    # what `apply` tells a person to type in the menu, where the machine does not come up
    entry = f"title back\nefi /{image_file}\noptions {words} --\n".encode()
    nodes = {**partition.applied, f"{ESP}/loader/entries/back.conf": Node("file", 0o644, 0, 0, entry)}
    said = partition.boots(nodes, "back.conf")
    assert line_of(said) == f"{words} -- memmap=1G!4G"
    assert "Persistent" not in said


@pytest.mark.vm(image="forky bios", boots=2, seconds=40)
@pytest.mark.parametrize("partition", ["forky"], indirect=True)
def test_images_of_7(partition: Partition) -> None:
    assert partition.release.startswith("7.")
    for loader in ("", f"EFI/Linux/{ID}-{partition.release}.efi"):
        said = partition.boots(partition.applied, loader=loader)
        assert line_of(said) == f"{LINE} {CONSOLE} memmap=1G!4G"
        assert RESERVED in said
