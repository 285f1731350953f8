# SPDX-License-Identifier: Apache-2.0
"""Machines that GRUB starts, with the real GRUB 2.06 of Debian 12: all of it but grub-probe."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests import fake
from tests.boot import test_grub_bls, test_loader
from tests.scenario import kernel
from tests.scenario.machine import Host, Play, Scenario, diff, lacking_disk

pytestmark = pytest.mark.scenario

RELEASE, NEXT = "6.1.0-13-amd64", "6.1.0-18-amd64"
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


def bookworm(play: Play, host: Host = BOOKWORM) -> Scenario:
    """Debian as grub-install and update-grub2 leave it."""
    machine = play(host)
    machine.must("grub-editenv", "/boot/grub/grubenv", "create")
    machine.must("update-grub2")
    return machine


def lines(machine: Scenario, menu: str = "/boot/grub/grub.cfg") -> list[str]:
    """The command lines of a menu's entries."""
    return re.findall(r"^\s*linux\s+\S+\s+(.*?)\s*$", machine.read(menu), re.MULTILINE)


def test_bookworm_there_and_back(play: Play) -> None:
    machine = bookworm(play)
    before = machine.snapshot()
    assert lines(machine) == [f"{ROOT} ro  quiet", f"{ROOT} ro  quiet", f"{ROOT} ro single"]
    suggested = machine.emupmem("suggest", "--size", "1G", "--json")
    assert suggested.status == 0, suggested.stderr
    assert "memmap=1G!4G" in suggested.stdout
    assert diff(before, machine.snapshot()) == {}

    assert machine.emupmem("apply", "--size", "1G", "--yes").status == 0
    words = "memmap=1G!4G"
    assert lines(machine) == [
        f"{ROOT} ro {words} quiet",
        f"{ROOT} ro {words} quiet",
        f"{ROOT} ro single {words}",
    ]
    assert set(diff(before, machine.snapshot())) == {"/boot/grub/grub.cfg", "/etc/default/grub"}
    verdict = machine.emupmem("verify", "--json")
    assert (verdict.status, verdict.json["pending"]) == (3, True)
    assert {c["name"]: c["status"] for c in verdict.json["checks"]}["booted"] == "pending"

    assert machine.emupmem("remove", "--yes").status == 0
    assert diff(before, machine.snapshot()) == {}
    assert machine.processes() == []


def test_a_new_kernel_gets_the_reservation(play: Play) -> None:
    machine = bookworm(play)
    machine.emupmem("apply", "--size", "1G", "--yes")
    for name, content in kernel.files(NEXT).items():
        machine.write(name, content)
    machine.must("run-parts", "--arg", NEXT, "--arg", f"/boot/vmlinuz-{NEXT}", "/etc/kernel/postinst.d")
    assert len(lines(machine)) == 5
    assert all("memmap=1G!4G" in line.split() for line in lines(machine))


def test_the_booted_reservation_is_seen(play: Play) -> None:
    machine = bookworm(play)
    machine.emupmem("apply", "--size", "1G", "--yes")
    machine.boot(f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} {ROOT} ro memmap=1G!4G quiet")
    checks = {c["name"]: c for c in machine.emupmem("verify", "--json", "--wait", "0").json["checks"]}
    assert checks["booted"]["status"] == "ok"
    assert checks["iomem"]["status"] == "fail", "the kernel of this machine did not do it"


def test_a_trial_with_a_boot_of_its_own(play: Play) -> None:
    """GRUB writes its choice back on ext4 only, and its paths begin below /boot there."""
    if why := lacking_disk("ext4"):
        pytest.skip(f"no scenarios with ext4: {why}")
    machine = play(replace(BOOKWORM, disks=[("/boot", "ext4", 64 << 20)]))
    machine.must("mkdir", "/boot/grub")
    machine.must("grub-editenv", "/boot/grub/grubenv", "create")
    machine.must("update-grub2")
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes", "--trial")
    assert done.status == 0, done
    assert machine.must("grub-editenv", "/boot/grub/grubenv", "list") == "next_entry=emupmem-trial\n"
    assert [line.split()[-1] for line in lines(machine)].count("memmap=1G!4G") == 1
    assert f"linux\t/vmlinuz-{RELEASE} " in machine.read("/boot/grub/grub.cfg")
    assert machine.emupmem("abandon", "--yes").status == 0
    assert diff(before, machine.snapshot()) == {}


def test_a_generator_that_fails_leaves_all_as_it_was(play: Play) -> None:
    machine = bookworm(play)
    before = machine.snapshot()
    machine.write("/etc/grub.d/10_linux", "#!/bin/sh\necho 'no space' >&2\nexit 1\n")
    broken = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 1, done
    assert diff(broken, machine.snapshot()) == {}, "what grub-mkconfig leaves half-made is gone too"
    assert set(diff(before, broken)) == {"/etc/grub.d/10_linux"}


def test_without_the_generator(play: Play) -> None:
    machine = bookworm(play)
    machine.remove("/usr/sbin/update-grub2", "/usr/sbin/update-grub", "/usr/sbin/grub-mkconfig")
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 1
    assert "Traceback" not in done.stderr
    assert diff(before, machine.snapshot()) == {}


# GRUB with BLS entries, as Fedora has it: grubby is a stand-in, written after grubby-bls 8.40 --------------

ID = test_loader.ID
GRUBBY = f"#!/usr/bin/python3 -I\nROOT, QUIET, OLD = '/', True, False\n{test_loader.GRUBBY}"
FEDORA = replace(
    BOOKWORM,
    cmdline=f"BOOT_IMAGE=(hd0,gpt1)/vmlinuz-{RELEASE} {ROOT} ro quiet",
    efi={},
    os_release='ID=fedora\nNAME="Fedora Linux"\nVERSION_ID=41\nPRETTY_NAME="Fedora Linux 41"\n',
    programs={"grubby": GRUBBY},
    removed=("update-grub", "update-grub2", "grub-mkconfig"),
    files={
        **kernel.files(RELEASE),
        "/etc/default/grub": 'GRUB_CMDLINE_LINUX="quiet"\nGRUB_ENABLE_BLSCFG=true\n',
        "/etc/kernel/cmdline": f"{ROOT} ro quiet\n",
        "/boot/grub2/grub.cfg": "insmod blscfg\nblscfg\n",
        "/boot/grub2/grubenv": f"# GRUB Environment Block\nsaved_entry={ID}-{RELEASE}\n",
        f"/boot/loader/entries/{ID}-{RELEASE}.conf": test_loader.FEDORA.replace(
            fake.RELEASE, RELEASE
        ).replace("OPTIONS", f"{ROOT} ro quiet"),
    },
)


TRIES = replace(
    FEDORA,
    machine_id=ID,
    disks=(("/boot", "ext4", 64 << 20),),
    programs={**FEDORA.programs, "grub2-editenv": '#!/bin/sh\nexec grub-editenv "$@"\n'},
    files={
        **FEDORA.files,
        "/boot/grub2/grub.cfg": test_grub_bls.CFG,
        "/boot/grub2/grubenv": f"# GRUB Environment Block\nsaved_entry={ID}-{RELEASE}\n".ljust(1024, "#"),
    },
)


def test_a_trial_of_bls_entries_by_the_real_grub_editenv(play: Play) -> None:
    """Fedora's grub2-reboot sets the same variable of the same block, by this program."""
    if why := lacking_disk("ext4"):
        pytest.skip(f"no scenarios with ext4: {why}")
    machine = play(TRIES)
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes", "--trial")
    assert done.status == 0, done
    trial = "/boot/loader/entries/emupmem-trial.conf"
    assert set(diff(before, machine.snapshot())) == {trial, "/boot/grub2/grubenv"}
    assert "next_entry=emupmem-trial" in machine.must("grub-editenv", "/boot/grub2/grubenv", "list").split()
    assert f"options {ROOT} ro quiet memmap=1G!4G\n" in machine.read(trial)
    assert "the next start tries memmap=1G!4G" in machine.emupmem("verify").stdout
    machine.must(
        "grub-editenv", "/boot/grub2/grubenv", "unset", "next_entry"
    )  # the menu does so at the start
    machine.boot(f"{TRIES.cmdline} memmap=1G!4G")
    assert "this boot is the trial of memmap=1G!4G" in machine.emupmem("verify", "--wait", "0").stdout
    machine.boot(TRIES.cmdline)
    assert machine.emupmem("abandon", "--yes").status == 0
    assert diff(before, machine.snapshot()) == {}


def test_fedora_there_and_back(play: Play) -> None:
    machine = play(FEDORA)
    before = machine.snapshot()
    done = machine.emupmem("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    entry = f"/boot/loader/entries/{ID}-{RELEASE}.conf"
    assert f"options {ROOT} ro quiet memmap=1G!4G\n" in machine.read(entry)
    changed = {entry, "/etc/default/grub", "/etc/kernel/cmdline"}
    assert set(diff(before, machine.snapshot())) == changed
    assert machine.emupmem("verify").status == 3
    done = machine.emupmem("remove", "--yes")
    assert done.status == 0, done
    assert diff(before, machine.snapshot()) == {}
