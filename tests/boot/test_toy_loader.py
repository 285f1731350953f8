# SPDX-License-Identifier: Apache-2.0
"""A boot loader that exists nowhere: what a new one must bring, and what it gets from all the rest.

Its source is /etc/toy.conf with one line, the words of the kernel; `toy-install` copies that to /boot/toy.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.boot import detect, obstacles, prepare, transaction
from emupmem.boot.bls import text
from emupmem.boot.entry import BootEntry
from emupmem.boot.loader import Loader, Options, Standing, Steps, Wanted
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, Command, EmupmemError, FileEdit, Request
from emupmem.system.host import Host
from tests.boot.test_change import FOUND
from tests.fake import FakeMachine, build, put, script

SOURCE, MENU = "/etc/toy.conf", "/boot/toy"
INSTALL = '#!/bin/sh\nroot="$(dirname $0)/.."\ncp "$root/etc/toy.conf" "$root/boot/toy"\n'


class Toy(Loader):
    """All that a loader has to say for apply, remove and verify."""

    title = "Toy"
    back = "type {memmap} backwards"

    def standing(self, machine: Host) -> Standing:
        words = parse_command_line(machine.peek(MENU)).words
        entry = BootEntry(("Linux",), ("linux",), (0,), "/vmlinuz-6.12.0-1-amd64", words, 1, False, True)
        items = tuple(i.text for i in parse_command_line(machine.peek(SOURCE)).reservations)
        return Standing(items, SOURCE, MENU, (entry,), entry)

    def refuse(self, machine: Host) -> None:
        if machine.find("toy-install") is None:
            raise EmupmemError("toy-install is not installed", "install toy")

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        before = (machine.read(SOURCE) or b"").decode()
        after = text.reworked(before.strip(), wanted.items, wanted.add, wanted.drop) + "\n"
        if before == after and machine.peek(MENU) == after.strip():
            return Steps(wanted)
        edit = FileEdit(SOURCE, before.encode(), after.encode())
        return Steps(wanted, (edit,), (Command(("toy-install",)),), menus=(MENU,))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine that only Toy starts; one line in `detect` would do what this does."""
    machine = build(tmp_path)
    for name in ("etc/default/grub", "boot/grub/grub.cfg"):
        (machine.root / name).unlink()
    put(machine, SOURCE, "root=UUID=0 ro quiet\n")
    put(machine, MENU, "root=UUID=0 ro quiet\n")
    script(machine, "toy-install", INSTALL)
    monkeypatch.setattr(detect, "of", lambda machine: Toy())
    return machine


def apply(machine: FakeMachine, *, nokaslr: bool = False) -> None:
    prepared = prepare.prepare_apply(machine, FOUND, Request(GIB), Options(nokaslr=nokaslr))
    if prepared.needed:
        transaction.carry_out_change(machine, prepared)


def test_it_applies_and_gives_back(toy: FakeMachine) -> None:
    obstacles.refuse_machine(toy)
    apply(toy, nokaslr=True)
    assert toy.peek(MENU) == "root=UUID=0 ro quiet memmap=1G!4G nokaslr"
    again = prepare.prepare_apply(toy, FOUND, Request(GIB), Options(nokaslr=True))
    assert not again.needed
    transaction.carry_out_change(toy, prepare.prepare_remove(toy))
    assert toy.peek(MENU) == toy.peek(SOURCE) == "root=UUID=0 ro quiet"


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("#!/bin/sh\nexit 3\n", "toy-install failed with status 3"),
        ("#!/bin/sh\n", "no reservation instead of memmap=1G!4G"),
        (INSTALL + 'echo torn > "$root/boot/toy"\nexit 1\n', "failed with status 1"),
        (INSTALL + 'echo memmap=1G!4G > "$root/boot/toy"\n', "other words of it were changed"),
    ],
)
def test_whatever_its_program_does_all_is_put_back(toy: FakeMachine, program: str, problem: str) -> None:
    script(toy, "toy-install", program)
    with pytest.raises(EmupmemError, match=problem) as caught:
        apply(toy)
    assert "the old configuration is back" in caught.value.hint
    assert toy.peek(MENU) == toy.peek(SOURCE) == "root=UUID=0 ro quiet"
    assert not list(toy.root.rglob("*emupmem-*"))


def test_what_it_does_not_know_is_refused_in_its_name(toy: FakeMachine) -> None:
    with pytest.raises(EmupmemError, match="a trial is not known for Toy"):
        prepare.prepare_trial(toy, FOUND, Request(GIB), Options())
    with pytest.raises(EmupmemError, match="a variable of GRUB's, and Toy starts this machine"):
        prepare.prepare_apply(toy, FOUND, Request(GIB), Options("GRUB_CMDLINE_LINUX_DEFAULT"))
    with pytest.raises(EmupmemError, match="there is no trial to abandon"):
        prepare.prepare_abandon(toy)
    (toy.root / "sbin/toy-install").unlink()
    with pytest.raises(EmupmemError, match="toy-install is not installed"):
        obstacles.refuse_machine(toy)
