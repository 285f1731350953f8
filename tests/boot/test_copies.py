# SPDX-License-Identifier: Apache-2.0
"""Copies that lie beside a file: of this run, of one that was killed, and of another that ended meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import transaction
from emupmem.boot.change import Change
from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_apply, prepare_remove
from emupmem.boot.transaction import carry_out_change
from emupmem.model import GIB, EmupmemError, Request
from emupmem.system import backups
from emupmem.system.machine import Machine
from tests.boot.test_change import FOUND, apply, default
from tests.boot.test_loader import apply as apply_there
from tests.boot.test_loader import fedora, fedora_without_cmdline, opensuse, ostree, rhel8_uefi, survey_of
from tests.boot.test_rollback import tree
from tests.fake import STOCK, FakeMachine, build, menu, put, script

CFG = "/boot/grub/grub.cfg"
BROKEN = "#!/bin/sh\nexit 1\n"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return build(tmp_path)


def prepared(machine: Machine) -> Change:
    return prepare_apply(machine, FOUND, Request(GIB), Options())


def torn(machine: Machine) -> str:
    """The menu is half-written by a generator that is at work or was killed; its whole copy."""
    whole = menu(machine)
    backups.set_aside(machine, CFG)
    put(machine, CFG, whole[: len(whole) // 3])
    return whole


def test_a_menu_that_another_run_made_whole_meanwhile_stays(machine: FakeMachine) -> None:
    """It was torn when the change was made up, and its copy is gone since that run came to its end."""
    whole = torn(machine)
    change = prepared(machine)
    put(machine, CFG, whole)
    backups.drop_aside(machine, CFG)
    script(machine, "update-grub2", BROKEN)
    with pytest.raises(EmupmemError, match="failed with status 1"):
        carry_out_change(machine, change)
    assert menu(machine) == whole


def test_a_menu_that_was_torn_after_the_change_was_made_up_is_made_whole_first(machine: FakeMachine) -> None:
    change = prepared(machine)
    whole = torn(machine)
    script(machine, "update-grub2", BROKEN)
    with pytest.raises(EmupmemError, match="failed with status 1"):
        carry_out_change(machine, change)
    assert menu(machine) == whole


def test_a_copy_that_a_killed_run_left_is_never_put_back(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since then somebody changed both files; then the disk is full before new copies are made."""
    for name in ("/etc/default/grub", CFG):
        backups.set_aside(machine, name)
    edited = STOCK.replace(b"quiet splash", b"quiet")
    put(machine, "/etc/default/grub", edited)
    machine.output("update-grub2")
    made = menu(machine)
    change = prepared(machine)

    def full(machine: Machine, name: str) -> bool:
        raise EmupmemError(f"{name} cannot be copied: No space left on device")

    monkeypatch.setattr(backups, "set_aside", full)
    with pytest.raises(EmupmemError, match="No space left"):
        carry_out_change(machine, change)
    assert default(machine) == edited
    assert menu(machine) == made


def test_in_a_tree_the_whole_copy_takes_the_place_of_a_torn_menu(machine: FakeMachine) -> None:
    """A rescue system: nothing can be run, and the copy is all there is to boot from."""
    apply(machine, GIB)
    whole = torn(machine)
    machine.live = False
    carry_out_change(machine, prepare_remove(machine))
    assert default(machine) == STOCK
    assert menu(machine) == whole


def test_in_a_tree_a_torn_menu_is_mended_where_nothing_else_is_to_be_done(machine: FakeMachine) -> None:
    """The power failed while the menu was made for `remove`."""
    whole = torn(machine)
    machine.live = False
    change = prepare_remove(machine)
    assert change.needed
    carry_out_change(machine, change)
    assert menu(machine) == whole
    assert not prepare_remove(machine).needed


def test_an_entry_that_cannot_be_read_stops_no_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = opensuse(tmp_path)
    script(machine, "sdbootutil", "#!/bin/sh\nexit 1\n")
    before = machine.read("/etc/kernel/cmdline")
    change = prepare_apply(machine, survey_of(machine), Request(GIB), Options())
    unreadable = next(n for n in change.steps.owned)
    real = Machine.read
    failing: list[str] = []

    def read(self: Machine, name: str) -> bytes | None:
        if failing and name == unreadable:
            raise EmupmemError(f"{name} cannot be read: {errno.errorcode[errno.EIO]}")
        return real(self, name)

    def tell(step: str) -> None:
        if step == "written":
            failing.append(step)

    monkeypatch.setattr(Machine, "read", read)
    with pytest.raises(EmupmemError) as caught:
        transaction.carry_out_change(machine, change, tell)
    assert "the old configuration is back; run sdbootutil" in caught.value.hint
    assert real(machine, "/etc/kernel/cmdline") == before


def test_the_newest_backup_stays_where_the_clock_went_back(machine: FakeMachine) -> None:
    for n in range(backups.MOST_BACKUPS):
        backups.back_up(machine, "/etc/default/grub", f"2030-01-01T00:00:{n:02d}.000000Z", b"later")
    name = backups.back_up(machine, "/etc/default/grub", "1970-01-01T00:00:00.000000Z", b"now")
    assert machine.read(name) == b"now"


def test_the_backup_that_is_named_is_that_of_the_file_that_was_written(tmp_path: Path) -> None:
    """grubby may write the defaults too, so they are kept as well; but they are as they should be."""
    machine = fedora(tmp_path)
    change = prepare_apply(machine, survey_of(machine), Request(GIB), Options())
    carry_out_change(machine, change)
    entry = next(n for n in change.steps.owned if n.endswith(".conf"))
    for name in ("/etc/kernel/cmdline", entry):
        put(machine, name, machine.text(name).replace(" memmap=1G!4G", ""))
    again = prepare_apply(machine, survey_of(machine), Request(GIB), Options(replace=True))
    assert [e.name for e in again.steps.changed] == ["/etc/kernel/cmdline"]
    assert "/cmdline." in carry_out_change(machine, again).backup


def test_kernel_arguments_that_changed_meanwhile_stay(tmp_path: Path) -> None:
    """rpm-ostree has no file to watch: what another one did would be taken for ours, and taken back."""
    machine = ostree(tmp_path)
    first, second = (prepare_apply(machine, survey_of(machine), Request(GIB), Options()) for _ in range(2))
    carry_out_change(machine, first)
    done = machine.output("rpm-ostree", "kargs")
    with pytest.raises(EmupmemError, match="rpm-ostree kargs was changed by another program"):
        carry_out_change(machine, second)
    assert machine.output("rpm-ostree", "kargs") == done


@pytest.mark.parametrize("build_tree", [rhel8_uefi, ostree])
def test_a_tree_whose_own_program_makes_the_change_is_not_given_back_from_here(
    build_tree: Callable[[Path], FakeMachine], tmp_path: Path
) -> None:
    """That program of this machine would be asked, and tell of this machine."""
    machine = build_tree(tmp_path)
    put(machine, "/ostree/repo/config" if build_tree is ostree else "/etc/x", "")
    machine.live = False
    machine.output = lambda *argv, timeout=0: pytest.fail(f"{argv} is run")  # type: ignore[method-assign]
    with pytest.raises(EmupmemError) as caught:
        prepare_remove(machine)
    assert "on that machine" in caught.value.hint or "run emupmem there" in caught.value.hint


def test_a_link_that_leads_nowhere_yet_stays_one(tmp_path: Path) -> None:
    machine = fedora_without_cmdline(tmp_path)
    put(machine, "/etc/kernel/x", "")
    (machine.root / "etc/kernel/cmdline").symlink_to("../cmdline")
    put(machine, "/fail", "end")
    before = tree(machine)
    with pytest.raises(EmupmemError):
        apply_there(machine)
    assert tree(machine) == before


def test_what_another_program_wrote_is_named_also_where_not_all_is_put_back(machine: FakeMachine) -> None:
    text = """#!/bin/sh
cd "$(dirname $0)/.."
echo GRUB_CMDLINE_LINUX=mine > etc/default/grub
rm boot/grub/grub.cfg boot/grub/.grub.cfg.emupmem-old
mkdir boot/grub/grub.cfg
exit 1
"""
    script(machine, "update-grub2", text)
    with pytest.raises(EmupmemError) as caught:
        apply(machine, GIB)
    assert "not all could be put back" in caught.value.hint
    assert "is kept as /var/backups/emupmem/grub." in caught.value.hint
