# SPDX-License-Identifier: Apache-2.0
"""rpm-ostree: kernel arguments that belong to a deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from emupmem.boot.bls import text
from emupmem.boot.bls.sources import sources_or_entries
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import BOOTC, Refused
from emupmem.boot.loader import Loader, Standing, Steps, Wanted
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import Command, EmupmemError
from emupmem.system.host import Host

KARGS = ("rpm-ostree", "kargs")


class RpmOstree(Loader):
    """rpm-ostree: kernel arguments belong to a deployment; a change makes a new one, the old one stays in the menu."""

    title = "rpm-ostree"
    back = "in the boot menu choose the deployment before this one"

    def standing(self, machine: Host) -> Standing:
        line = self._arguments(machine)
        words = parse_command_line(line).words
        entry = BootEntry(("next deployment",), ("",), (0,), "", words, 1, False, True)
        items = tuple(i.text for i in entry.command_line.reservations)
        kernel = machine.peek("/proc/sys/kernel/osrelease")
        entry = replace(entry, version=kernel)
        return Standing(items, "rpm-ostree kargs", "rpm-ostree kargs", (entry,), entry)

    def _arguments(self, machine: Host) -> str:
        done = machine.output(*KARGS, timeout=60)
        if done is None:
            raise Refused(BOOTC)
        lines = [x for x in done.stdout.decode("utf-8", "surrogateescape").splitlines() if x.strip()]
        if done.status or not lines:
            raise EmupmemError(f"rpm-ostree kargs failed with status {done.status}: {done.last_words}")
        return lines[-1]  # versions before 2020 print a heading first

    def sources(self, machine: Host) -> tuple[str, ...]:
        return sources_or_entries(machine)

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        old, items, extra, drop = self._arguments(machine), wanted.items, wanted.add, wanted.drop
        new = text.reworked(old, items, extra, drop)
        text.prove_words(old, new, items, extra, drop)
        gone, added = _difference(text.raw_words(old), text.raw_words(new))
        if not gone and not added:
            return Steps(wanted)
        return Steps(
            wanted,
            commands=(_kargs(gone, added, "make a deployment with the new arguments"),),
            undo=(_kargs(added, gone, "take that back"),),
            remembered=extra,
        )

    def refuse_removal(self, machine: Host) -> None:
        if not machine.running:
            self.refuse(machine)  # its program is asked, and would be that of this machine

    def refuse(self, machine: Host) -> None:
        if not machine.running:
            raise EmupmemError(
                "this is the tree of an ostree system: kernel arguments belong to its deployments",
                "run emupmem on that machine",
            )
        self._arguments(machine)


def _difference(old: Sequence[str], new: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words only in old, words only in new), each as often as it is there more often."""
    gone, added = list(old), []
    for word in new:
        if word in gone:
            gone.remove(word)
        else:
            added.append(word)
    return gone, added


def _kargs(gone: Sequence[str], added: Sequence[str], why: str) -> Command:
    argv = ("rpm-ostree", "kargs", *(f"--delete={w}" for w in gone), *(f"--append={w}" for w in added))
    return Command(argv, why)
