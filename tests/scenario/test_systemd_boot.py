# SPDX-License-Identifier: Apache-2.0
"""Machines that systemd-boot starts, with the real bootctl and kernel-install 257 of Debian 13."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tests.scenario import kernel
from tests.scenario.machine import Host, Play, Scenario, diff

pytestmark = pytest.mark.scenario

RELEASE, NEXT = "6.12.48+deb13-amd64", "6.12.57+deb13-amd64"
ROOT = "root=UUID=e0b0eed5-0000-4000-8000-000000000001"
ID = "0123456789abcdef0123456789abcdef"
BLS = f"systemd.machine_id={ID}"
TRIXIE = Host(
    tree="systemd",
    cmdline=f"initrd=\\{ID}\\{RELEASE}\\initrd.img-{RELEASE} {ROOT} ro quiet {BLS}",
    release=RELEASE,
    efi={
        "LoaderInfo": "systemd-boot 257.8-1~deb13u2",
        "LoaderEntrySelected": f"{ID}-{RELEASE}.conf",
        "LoaderFeatures": b"\xff\xff\x03\0\0\0\0\0",  # all that 257 has
    },
    machine_id=ID,
    esp="/boot/efi",
    files={**kernel.files(RELEASE), **kernel.files(NEXT, built_in=True)},
)


def trixie(play: Play, host: Host = TRIXIE) -> Scenario:
    """Debian as its packages of systemd-boot and of the kernel leave it."""
    machine = play(host)
    machine.must("bootctl", "install", "--make-entry-directory=auto", "--no-variables")
    add(machine, host.release)
    return machine


def add(machine: Scenario, release: str) -> None:
    """What the kernel's package does, the initrd being made already."""
    machine.must("kernel-install", "add", release, f"/boot/vmlinuz-{release}", f"/boot/initrd.img-{release}")


def entry(release: str) -> str:
    return f"/boot/efi/loader/entries/{ID}-{release}.conf"


def options(machine: Scenario, release: str) -> list[str]:
    """The words that an entry hands to its kernel."""
    found = re.findall(r"^options\s+(.*)$", machine.read(entry(release)), re.MULTILINE)
    return " ".join(found).split()


def test_trixie_there_and_back(play: Play) -> None:
    machine = trixie(play)
    before = machine.snapshot()
    assert options(machine, RELEASE) == [ROOT, "ro", "quiet", BLS]
    (shown,) = json.loads(machine.must("bootctl", "list", "--json=short"))
    assert (shown["id"], shown["isSelected"]) == (f"{ID}-{RELEASE}.conf", True)

    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert options(machine, RELEASE) == [ROOT, "ro", "quiet", BLS, "memmap=1G!4G"]
    assert machine.read("/etc/kernel/cmdline") == f"{ROOT} ro quiet memmap=1G!4G\n"
    assert set(diff(before, machine.snapshot())) == {entry(RELEASE), "/etc/kernel/cmdline"}
    assert machine.emupmem("verify").status == 3
    (shown,) = json.loads(machine.must("bootctl", "list", "--json=short"))
    assert "memmap=1G!4G" in shown["options"].split()

    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    assert diff(before, machine.snapshot()) == {}
    assert machine.processes() == []


def test_a_new_kernel_carries_the_reservation_until_it_is_removed(play: Play) -> None:
    machine = trixie(play)
    before = machine.snapshot()
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    add(machine, NEXT)
    assert options(machine, NEXT) == [ROOT, "ro", "quiet", "memmap=1G!4G", BLS]
    assert machine.emupmem("remove", "--yes").status == 0
    assert options(machine, NEXT) == [ROOT, "ro", "quiet", BLS]
    machine.must("kernel-install", "remove", NEXT)
    assert diff(before, machine.snapshot()) == {}
    add(machine, NEXT)
    assert options(machine, NEXT) == [ROOT, "ro", "quiet", BLS]


def test_a_kernel_installed_while_the_reservation_is_booted(play: Play) -> None:
    """Without /etc/kernel/cmdline kernel-install takes the words of the boot that runs."""
    machine = trixie(play)
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    machine.boot(f"{TRIXIE.cmdline} memmap=1G!4G")
    assert machine.emupmem("remove", "--yes").status == 0
    add(machine, NEXT)
    assert options(machine, NEXT) == [ROOT, "ro", "quiet", BLS]


def test_a_trial_is_chosen_by_the_real_bootctl(play: Play) -> None:
    machine = trixie(play)
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes", "--trial")
    assert done.status == 0, done
    (chosen,) = [n for p, n in machine.snapshot(["/sys/firmware/efi/efivars"]).items() if "OneShot" in p]
    assert chosen.data[4:].decode("utf-16-le") == "emupmem-trial.conf\0"
    assert options(machine, RELEASE) == [ROOT, "ro", "quiet", BLS]
    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    assert diff(before, machine.snapshot()) == {}
    assert not [p for p in machine.snapshot(["/sys/firmware/efi/efivars"]) if "OneShot" in p]


# Unified kernel images and other loaders --------------------------------------------------------------------

SYSTEMD_BOOT = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
"""ukify and kernel-install want a kernel that is an EFI program: this one is there."""


def test_a_unified_image_is_the_default_now(play: Play) -> None:
    machine = trixie(play)
    image = ("--cmdline=root=/dev/vda1 quiet", f"--uname={NEXT}", "--output=/boot/efi/EFI/Linux/next.efi")
    machine.must("ukify", "build", f"--linux={SYSTEMD_BOOT}", f"--initrd=/boot/initrd.img-{NEXT}", *image)
    machine.must("bootctl", "set-default", "next.efi")
    listed = json.loads(machine.must("bootctl", "list", "--json=short"))
    assert [e["id"] for e in listed if e["isDefault"]] == ["next.efi"]
    before = machine.snapshot()
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 1
    assert diff(before, machine.snapshot()) == {}


def test_a_unified_image_that_was_built_with_the_reservation_is_named(play: Play) -> None:
    machine = trixie(play)
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    machine.write("/etc/kernel/install.conf", "layout=uki\nuki_generator=ukify\n")
    machine.must("kernel-install", "add", NEXT, SYSTEMD_BOOT, f"/boot/initrd.img-{NEXT}")
    image = f"{ID}-{NEXT}.efi"
    machine.must("grep", "-q", "memmap=1G!4G", f"/boot/efi/EFI/Linux/{image}")
    done = machine.emupmem("remove", "--yes")
    assert image in done.stdout + done.stderr, "it still carries memmap=1G!4G"
    assert done.status == 3
    assert options(machine, RELEASE) == [ROOT, "ro", "quiet", BLS]


def test_a_loader_that_leaves_no_name_is_not_systemd_boot(play: Play) -> None:
    """systemd-boot always sets LoaderInfo; rEFInd and a kernel that the firmware starts do not."""
    machine = trixie(play, replace(TRIXIE, efi={}, cmdline=f"{ROOT} ro quiet initrd=\\initrd.img"))
    before = machine.snapshot()
    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 1
    assert diff(before, machine.snapshot()) == {}


REFIND = replace(
    TRIXIE, efi={"LoaderInfo": "rEFInd 0.14.2"}, cmdline=f"{ROOT} ro quiet initrd=boot\\initrd.img"
)


def test_the_real_mkrlconf_leaves_the_reservation_in_its_file(play: Play) -> None:
    """Its package runs it at each update; a new kernel takes the words of the same file."""
    machine = play(REFIND)
    machine.must("mkrlconf")
    before = machine.snapshot()
    options = "/boot/refind_linux.conf"
    assert f'standard options"  "{ROOT} ro quiet"' in machine.read(options)
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert set(diff(before, machine.snapshot())) == {options}
    assert f'standard options"  "{ROOT} ro quiet memmap=1G!4G"' in machine.read(options)
    assert f'single-user mode"    "{ROOT} ro quiet single memmap=1G!4G"' in machine.read(options)
    made = machine.snapshot()
    assert "Not overwriting" in machine.must("mkrlconf")
    assert diff(made, machine.snapshot()) == {}
    assert machine.emupmem("remove", "--yes").status == 0
    assert diff(before, machine.snapshot()) == {}
