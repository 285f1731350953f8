# SPDX-License-Identifier: Apache-2.0
"""What a package says before it is removed."""

from __future__ import annotations

import pytest

from emupmem.device import keep, ramdax, unit
from emupmem.device.unit import BootMount, unit_text
from emupmem.model import GIB
from tests.cli.runner import Run
from tests.fake import FakeMachine, put, script

KEPT = BootMount(4 * GIB, GIB, "/mnt/kept", "ext4", keep="/var/lib/emupmem/image")


def set_up(machine: FakeMachine, mount: BootMount, program: str = "/usr/bin/emupmem") -> None:
    put(machine, program, "#!/bin/sh\n").chmod(0o755)
    put(machine, unit.FILE, unit_text([mount], program))
    script(machine, "systemctl", "#!/bin/sh\necho active\n")


def test_where_nothing_is_left_nothing_is_said(run: Run, here: FakeMachine) -> None:
    assert run("boot-left") == (0, "", "")


def test_everything_that_stays_is_named(run: Run, here: FakeMachine) -> None:
    assert run("apply", "--size", "1G", "--yes").status == 0
    set_up(here, BootMount(4 * GIB, GIB, "/mnt/pmem0", "ext4"))
    put(here, ramdax.RULE, "")
    done = run("boot-left")
    assert (done.status, done.out) == (0, "")
    for words in (
        "memmap=1G!4G in GRUB_CMDLINE_LINUX: the memory stays reserved",
        "/etc/systemd/system/emupmem.service, which no longer mounts /mnt/pmem0",
        ramdax.RULE,
        "/var/backups/emupmem",
        "install emupmem again, sudo emupmem remove, then remove the package",
    ):
        assert words in done.err


def test_a_trial_that_waits_is_named(run: Run, here: FakeMachine) -> None:
    put(here, "/boot/grub/grubenv", "# GRUB Environment Block\n" + "#" * 999)
    script(here, "grub-editenv", "#!/bin/sh\n")
    script(here, "grub-reboot", "#!/bin/sh\n")
    put(here, "/etc/grub.d/42_emupmem_trial", "#!/bin/sh\n# memmap=1G!4G\n")
    assert run("boot-left").status == 0


def test_content_that_only_the_program_can_save_keeps_it_from_being_removed(
    run: Run, here: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(here, KEPT)
    assert run("boot-left").status == 0, "the device does not hold what belongs to the image"
    put(here, keep.note(KEPT), KEPT.keep)
    done = run("boot-left")
    assert done.status == 3
    assert "without it the content of /mnt/kept is not saved at a shutdown" in done.err
    assert "sudo systemctl stop emupmem.service saves it now" in done.err
    script(here, "systemctl", "#!/bin/sh\necho inactive\n")
    assert run("boot-left").status == 0, "it was saved when the unit was stopped"


def test_a_unit_that_starts_another_emupmem_goes_on(run: Run, here: FakeMachine) -> None:
    set_up(here, KEPT, "/usr/local/bin/emupmem")
    put(here, keep.note(KEPT), KEPT.keep)
    done = run("boot-left")
    assert done.status == 0
    assert "no longer mounts" not in done.err


def test_it_never_fails_for_what_it_cannot_read(run: Run, here: FakeMachine) -> None:
    put(here, unit.FILE, "[Service]\nExecStart=/bin/true\n")
    put(here, "/etc/default/grub", "exit 1\n")
    assert run("boot-left").status == 0
