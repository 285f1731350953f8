"""Machines that systemd-boot starts, with the real bootctl and kernel-install 257 of Debian 13."""

from __future__ import annotations

import json
import re

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
