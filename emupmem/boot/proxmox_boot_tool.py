# SPDX-License-Identifier: Apache-2.0
"""Proxmox: proxmox-boot-tool writes the entries of systemd-boot onto each partition of its list.

It takes their words from the first line of /etc/kernel/cmdline, and from nothing else in it; without that file from
the boot that runs. That line is changed by rename, `proxmox-boot-tool refresh` is run, and what it wrote is read
again on every partition: it ends with 0 whatever partition it passed over (zz-proxmox-boot of proxmox-kernel-helper
8.1.0). To roll back, the old line is put back and refresh is run again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.menu import is_meant, natural_order, told_names
from emupmem.boot.bls.sources import KERNEL_CMDLINE, made_by_us
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import PROXMOX, PROXMOX_ESPS, PROXMOX_TREE, Refused, RefusedRemoval
from emupmem.boot.loader import Loader, NextStart, Standing, Steps, Wanted
from emupmem.boot.partitions import Partition, PartitionState, read_partitions
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import Command, CommandLine, EmupmemError, FileEdit
from emupmem.system.host import Host

MENU = f"the partitions of {PROXMOX_ESPS}"
_BOOTED = "the command line of the boot that runs (/proc/cmdline)"
_INITRD = re.compile(r"\binitrd=[0-9a-zA-Z\\/.-]*\s*")
"""What zz-proxmox-boot takes out of /proc/cmdline."""

_PIN = "/etc/kernel/proxmox-boot-pin"
_TREE_NOTE = (
    f"systemd-boot takes its words from {KERNEL_CMDLINE} there: where GRUB starts that machine (BIOS, Secure Boot), "
    "run emupmem on it"
)
_NOTES = {
    PartitionState.MISSING: "{uuid} is not here: proxmox-boot-tool passes over it (proxmox-boot-tool clean forgets it)",
    PartitionState.UNREADABLE: "{uuid} cannot be looked at: {why}",
    PartitionState.GRUB: "GRUB starts from {uuid}, with the words of /etc/default/grub: they stay as they are",
    PartitionState.EMPTY: "{uuid} has no entries yet: proxmox-boot-tool refresh makes them",
    PartitionState.UNPREPARED: "{uuid} is not set up for systemd-boot: proxmox-boot-tool passes over it",
}
_REFRESH = Command(
    ("proxmox-boot-tool", "refresh", "--hook", "zz-proxmox-boot"),
    "write the boot entries onto the partitions",
)
"""Without --hook it would also tell apt anew which kernels to keep."""


class ProxmoxBootTool(Loader):
    """systemd-boot with entries of proxmox-boot-tool's. A partition that GRUB starts from takes GRUB's words."""

    title = PROXMOX.title
    back = "in the boot menu (hold Space at the start) press e on the entry, delete {memmap}, press Enter"
    by_hand = f"look at {KERNEL_CMDLINE}, then proxmox-boot-tool refresh"

    # How it stands -------------------------------------------------------------------------------------------

    def standing(self, machine: Host) -> Standing:
        text, where = _source(machine)
        line = parse_command_line(text)
        items = tuple(i.text for i in line.reservations)
        if not machine.running:
            entries = _entries_to_be(machine, line)
            return Standing(items, where, MENU, entries, entries[0], notes=(_TREE_NOTE,), source=line)
        found = read_partitions(machine)
        entries = tuple(_entry(p.uuid, name, text) for p in found for name, text in p.entries)
        if not entries:
            said = "; ".join(_notes(found)) or "the list is empty"
            raise EmupmemError(
                f"there are no entries of proxmox-boot-tool on {MENU}: {said}",
                "proxmox-boot-tool status shows them",
            )
        default = _default(machine, found)
        return Standing(items, where, MENU, entries, default, notes=_notes(found), source=line)

    def line(self, machine: Host) -> CommandLine:
        return parse_command_line(_source(machine)[0])  # without root as well

    def next_start(self, machine: Host, unseen: list[tuple[str, str]]) -> NextStart:
        try:
            line, where = self.line(machine), _source(machine)[1]
            items = tuple(i.text for i in line.reservations)
        except EmupmemError:
            return super().next_start(machine, unseen)
        try:
            entries = self.standing(machine).entries
        except EmupmemError as exc:
            unseen.append(("generated", exc.message))
            entries = None
        return NextStart(items, items, where, entries, MENU, self.sources(machine))

    def sources(self, machine: Host) -> tuple[str, ...]:
        return (KERNEL_CMDLINE,) if machine.exists(KERNEL_CMDLINE) else ()

    def files(self, machine: Host) -> tuple[str, ...]:
        return (KERNEL_CMDLINE,)

    def seen(self, machine: Host, name: str) -> str:
        try:
            notes = self.standing(machine).notes
        except EmupmemError:
            notes = ()
        return "; ".join([f"{super().seen(machine, name)}, by {self.title}", *notes])

    # Whether it may be changed -------------------------------------------------------------------------------

    def refuse(self, machine: Host) -> None:
        if "root=" in _source(machine)[0]:
            return
        if not machine.running:
            raise Refused(PROXMOX_TREE)
        raise EmupmemError(
            f"the first line of {KERNEL_CMDLINE} has no root=: proxmox-boot-tool refresh does nothing with it",
            "write the whole kernel command line on its first line",
        )

    def refuse_removal(self, machine: Host) -> None:
        try:
            self.refuse(machine)
        except Refused as exc:
            raise RefusedRemoval(exc.by) from None

    # What a change is ----------------------------------------------------------------------------------------

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        edit = _line_edit(machine, wanted)
        edits = (edit,) if edit.before != edit.after else ()
        if not machine.live:
            return Steps(wanted, edits)
        now = self.standing(machine)
        words = _words_after(machine, edit)
        if not edits and all(e.kernel and e.words == words for e in now.entries):
            return Steps(wanted)
        assert now.source is not None
        others = [e.ids[0] for e in now.entries if e.kernel and e.words != now.source.words]
        note = f"{others[0]} has other words than {now.where}: the refresh takes those" if others else ""
        return Steps(wanted, edits, (_REFRESH,), undo=(_REFRESH,), notes=(note,) if note else ())

    def to_run_there(self, machine: Host) -> Command | None:
        return _REFRESH

    # While it is carried out ---------------------------------------------------------------------------------

    def prove(self, machine: Host, before: Standing, steps: Steps) -> int:
        """As every loader does; but an old kernel may go, and what counts of before is what entries are made of."""
        after = self.standing(machine)
        _prove_whole(after)
        there = {e.ids for e in after.entries}
        kept = [e for e in before.entries if e.ids in there]
        if gone := {_partition_of(e) for e in before.entries} - {_partition_of(e) for e in kept}:
            raise EmupmemError(f"the boot entries are not as planned: those on {min(gone)} are gone")
        words = before.source.words if before.source is not None else ()
        entries = tuple(dataclasses.replace(e, words=words, kernel=_kernel(e.version)) for e in kept)
        return super().prove(machine, dataclasses.replace(before, entries=entries), steps)

    def prove_undone(self, machine: Host, before: Standing) -> None:
        after = self.standing(machine)
        _prove_whole(after)
        words = before.source.words if before.source is not None else ()
        if wrong := sorted({_partition_of(e) for e in after.entries if e.words != words}):
            raise EmupmemError(f"the entries on {' and '.join(wrong)} do not have their former words")


def _prove_whole(standing: Standing) -> None:
    if torn := next((e.ids[0] for e in standing.entries if not e.kernel), ""):
        raise EmupmemError(f"the boot entries are not as planned: {torn} is not written to its end")


# The source of the words -----------------------------------------------------------------------------------


def _source(machine: Host) -> tuple[str, str]:
    """The words that proxmox-boot-tool takes, as they are written, and where from. Raises EmupmemError."""
    data = machine.read(KERNEL_CMDLINE)
    if data is not None:
        return data.partition(b"\n")[0].decode("utf-8", "surrogateescape"), KERNEL_CMDLINE
    if not machine.running:
        raise Refused(PROXMOX_TREE)
    return _booted_line(machine), _BOOTED


def _booted_line(machine: Host) -> str:
    return _INITRD.sub("", machine.text("/proc/cmdline").removesuffix("\n"))


def _line_edit(machine: Host, wanted: Wanted) -> FileEdit:
    """The edit of /etc/kernel/cmdline; every byte behind its first line stays."""
    data, text = machine.read(KERNEL_CMDLINE), _source(machine)[0]
    line = bls_text.reworked(text, wanted.items, wanted.add, wanted.drop)
    bls_text.prove_words(text, line, wanted.items, wanted.add, wanted.drop)
    after = line.encode("utf-8", "surrogateescape")
    if data is None:
        return FileEdit(KERNEL_CMDLINE, None, after + b"\n" if line != text else None)
    if made_by_us(machine, data) and machine.running:
        # It goes where the same words would be taken without it: not while this boot has the reservation.
        booted = parse_command_line(_booted_line(machine)).words
        if booted == parse_command_line(line).words:
            return FileEdit(KERNEL_CMDLINE, data, None)
    _, end, rest = data.partition(b"\n")
    return FileEdit(KERNEL_CMDLINE, data, after + end + rest)


def _words_after(machine: Host, edit: FileEdit) -> tuple[str, ...]:
    """The words that proxmox-boot-tool takes once the edit is made."""
    if edit.after is None:
        return parse_command_line(_booted_line(machine)).words
    return parse_command_line(edit.after.partition(b"\n")[0].decode("utf-8", "surrogateescape")).words


# The entries -----------------------------------------------------------------------------------------------


def _entry(place: str, name: str, text: str) -> BootEntry:
    """An entry on a partition; one that is not written to its end has no kernel."""
    version = name.removeprefix("proxmox-")
    whole = bls_text.value(text, "linux") and bls_text.value(text, "initrd")
    kernel = _kernel(version) if whole else ""
    words = parse_command_line(bls_text.options(text)).words
    title = bls_text.value(text, "title") or name
    return BootEntry((title,), (f"{place}/{name}",), (0,), kernel, words, 1, False, True, version)


def _kernel(version: str) -> str:
    """The kernel of which a partition has a copy."""
    return f"/boot/vmlinuz-{version}"


def _partition_of(entry: BootEntry) -> str:
    return entry.ids[0].partition("/")[0]


def _entries_to_be(machine: Host, line: CommandLine) -> tuple[BootEntry, ...]:
    """The entries that the refresh will make of a tree: one for each kernel that has an initial disk."""
    names = machine.names("/boot")
    versions = [n.removeprefix("vmlinuz-") for n in names if n.startswith("vmlinuz-")]
    versions = [v for v in versions if f"initrd.img-{v}" in names]
    if not versions:
        raise EmupmemError(
            "there is no kernel with an initial disk in /boot of this tree", "mount its /boot there as well"
        )
    pinned = machine.peek(_PIN).split("\n")[0]
    order = sorted(versions, key=lambda v: (v == pinned, natural_order(v)), reverse=True)
    return tuple(
        BootEntry((v,), (f"proxmox-{v}",), (0,), _kernel(v), line.words, 1, False, True, v) for v in order
    )


def _default(machine: Host, found: Sequence[Partition]) -> BootEntry | None:
    """The entry that boots by itself: on all partitions the same one, so that of the first that has entries."""
    for partition in (p for p in found if p.entries):
        texts = {f"{name}.conf": text for name, text in partition.entries}
        names = sorted(texts, key=natural_order, reverse=True)
        patterns = told_names(machine, partition.config)
        told = [n for p in patterns for n in names if is_meant(n, p)]
        name = (*told, *names)[0]
        return _entry(partition.uuid, name.removesuffix(".conf"), texts[name])
    return None


def _notes(found: Sequence[Partition]) -> tuple[str, ...]:
    return tuple(_NOTES[p.state].format(uuid=p.uuid, why=p.why) for p in found if p.state in _NOTES)
