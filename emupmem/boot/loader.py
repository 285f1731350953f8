# SPDX-License-Identifier: Apache-2.0
"""Boot loaders: what each machine boots with, what its next start will tell the kernel, and how to change that.

GRUB with a grub.cfg by grub-mkconfig is the case that `prepare` handles itself (`detect.of` gives None for it). Each
other way is one `Loader`: it reads how the next start stands, and gives the edits and commands of a change
as data; the transaction carries them out, reads everything again and judges it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from emupmem.boot import entry as boot_entry
from emupmem.boot.bls import text
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import PLACEHOLDER, Owner, Refused, RefusedRemoval
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import Command, CommandLine, EmupmemError, FileEdit
from emupmem.system.machine import Machine

PROGRAMS = ("grubby", "sdbootutil", "rpm-ostree", "kernel-install", "bootctl")
"""What the loaders here look for, or run."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How the next start is set up.

    `items` are ours (`1G!4G`) in the source that new kernels take their words from, `where` names it. `menu` is
    where the entries lie, `default` the one that boots by itself, None where that cannot be told. `trial` are the
    words of the entry for a trial boot, which is not among `entries`; `chosen` says that the next start takes it.
    `notes` are for a person who changes it.
    """

    items: tuple[str, ...]
    where: str
    menu: str
    entries: tuple[BootEntry, ...]
    default: BootEntry | None
    trial: tuple[str, ...] = ()
    chosen: bool = False
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> CommandLine | None:
        """The words of the entry that boots by default."""
        return self.default.command_line if self.default is not None else None


@dataclass(frozen=True, slots=True)
class Steps:
    """A change as data: files to write, then programs to run; `undo` takes back what those did.

    `owned` are files that the programs write or make: kept before they run, and put back when something goes
    wrong. Of these, and of what a program writes after us, an edit may be one that changes nothing. `torn` are
    files that a run which was killed left half-written: first of all their whole copy takes their place.
    """

    edits: tuple[FileEdit, ...] = ()
    commands: tuple[Command, ...] = ()
    owned: tuple[str, ...] = ()
    undo: tuple[Command, ...] = ()
    torn: tuple[str, ...] = ()


class Loader(ABC):
    """One way to tell the kernel of the next start what to reserve.

    `title` names it, `back` tells how to start without the reservation by hand.
    """

    title: str
    back: str

    @abstractmethod
    def standing(self, machine: Machine) -> Standing:
        """How the next start stands. Raises EmupmemError where that cannot be read."""

    @abstractmethod
    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        """What makes our items exactly `items`, with `extra` words added and `drop` words taken away.

        Nothing in it where all is so already. Raises EmupmemError.
        """

    @abstractmethod
    def refuse(self, machine: Machine) -> None:
        """Raise EmupmemError where this way is not open on the machine."""

    def refuse_trial(self, machine: Machine) -> None:
        """Raise EmupmemError where a trial boot is not possible."""
        raise EmupmemError(
            f"a trial is not known for {self.title}, which starts this machine",
            "apply without --trial; " + self.back.format(memmap="memmap=…") + " goes back",
        )


class Owned(Loader):
    """Boot entries that belong to another tool: nothing is changed, and what to do instead is said."""

    back = "as that tool says"

    def __init__(self, by: Owner) -> None:
        self.by, self.title = by, by.title

    def standing(self, machine: Machine) -> Standing:
        raise Refused(self.by)

    def steps(
        self, machine: Machine, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> Steps:
        raise Refused(self.by)

    def refuse(self, machine: Machine) -> None:
        raise Refused(self.by)

    def refuse_trial(self, machine: Machine) -> None:
        raise Refused(self.by)

    def refuse_removal(self, machine: Machine) -> None:
        """Raise EmupmemError with the way to give back what is reserved."""
        booted = parse_command_line(machine.peek("/proc/cmdline")).reservations if machine.running else ()
        words = f"memmap={','.join(i.text for i in booted)}" if booted else PLACEHOLDER
        raise RefusedRemoval(self.by, words)


def problems(
    before: Standing, after: Standing, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
) -> str:
    """What is wrong after a change, the first thing; empty where all entries are as planned and else as before."""
    wrong = boot_entry.problems(after.entries, items, items)
    if wrong:
        entry, why = wrong[0]
        return f"{after.menu}{f': {entry.ids[-1] or entry.title}' if entry else ''}: {why}"
    old = {e.ids: e for e in before.entries}
    for entry in after.entries:
        was = old.get(entry.ids)
        if was is None:
            continue
        wanted = [w for w in text.foreign_words(was.command_line) if not (was.ours and w in drop)]
        wanted += [w for w in extra if was.ours and w not in wanted]
        if sorted(text.foreign_words(entry.command_line)) != sorted(wanted):
            return f"{after.menu}: {entry.ids[-1] or entry.title}: other words of it were changed"
        if entry.kernel != was.kernel:
            return f"{after.menu}: {entry.ids[-1] or entry.title}: it starts another kernel"
    if len(after.entries) < len(before.entries):
        return f"{after.menu}: entries are gone"
    return ""
