# SPDX-License-Identifier: Apache-2.0
"""Limine with limine-entry-tool (CachyOS, Omarchy, Arch): its entries are made from KERNEL_CMDLINE of its settings.

The settings and the entries are changed here, each by rename, and the tool is asked what it would make of the
settings. Its own run, `limine-mkinitcpio`, comes to the same words, but not as safely: it makes each initial disk
anew and copies it and the kernel over those that boot now, in place, which nothing could put back.
"""

from __future__ import annotations

import dataclasses

from emupmem.boot import foreign, owner
from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.entries import is_of_same_root, own_line
from emupmem.boot.bls.files import BOOT_FOLDERS, real_edits
from emupmem.boot.entry import BootEntry, joined
from emupmem.boot.foreign import LIMINE_CONFIGS, LIMINE_DEFAULTS, Refused, RefusedRemoval
from emupmem.boot.limine_text import (
    LimineEntry,
    limine_entries,
    own_words,
    settings,
    with_cmdline,
    with_own_lines,
)
from emupmem.boot.loader import Loader, Standing, Steps, Wanted
from emupmem.kernel.cmdline import OUR_WORDS, parse_command_line
from emupmem.model import UNCHANGED, CommandLine, EmupmemError, FileEdit
from emupmem.system.host import Host

TOOL = "limine-entry-tool"
DEFAULT = "default"
"""The key of KERNEL_CMDLINE for kernels that have none of their own."""

SIGNATURE = b"++CONFIG_B2SUM_SIGNATURE++"
"""What Limine's programs have before the checksum of limine.conf: all zeros, or it starts with no other one."""
_DIGITS = 128

_ENROLLED = (
    "the checksum of limine.conf is enrolled into Limine here: with another one it would start nothing"
)
_UNIFIED = "Limine starts unified kernel images here: their command line is built into them"


class Limine(Loader):
    """Limine, its entries by limine-entry-tool. Those of snapshots keep their words."""

    title = "Limine"
    back = "in Limine's menu press E on the entry, delete {memmap}, press F10"

    def __init__(self, by: foreign.Owner) -> None:
        self.by = by

    def standing(self, machine: Host) -> Standing:
        config, running = _config(machine), own_line(machine)
        menu = limine_entries(machine.text(config))
        entries = tuple(_boot_entry(machine, e, running) for e in menu if _is_linux(e))
        ours = [e for e in entries if e.ours]
        if not ours:
            raise EmupmemError(
                f"there are no boot entries that start this system in {config}",
                "run it with sudo; else make them: sudo limine-mkinitcpio",
            )
        release = machine.peek("/proc/sys/kernel/osrelease") if machine.running else ""
        default = next((e for e in ours if release and e.version == release), ours[0])
        items = tuple(
            i.text for i in parse_command_line(owner.limine_lines(machine).get(DEFAULT, "")).reservations
        )
        kept = sum(1 for e in menu if e.is_snapshot)
        notes = (f"{kept} entr{'ies' if kept > 1 else 'y'} of snapshots keep their words",) if kept else ()
        return Standing(items, LIMINE_DEFAULTS, config, entries, default, notes=notes)

    def sources(self, machine: Host) -> tuple[str, ...]:
        return (LIMINE_DEFAULTS,)

    def files(self, machine: Host) -> tuple[str, ...]:
        return (LIMINE_DEFAULTS, *(n for n in LIMINE_CONFIGS if machine.exists(n)))

    def seen(self, machine: Host, name: str) -> str:
        return f"{super().seen(machine, name)}, by {TOOL}"

    def refuse(self, machine: Host) -> None:
        if why := _obstacle(machine):
            raise Refused(dataclasses.replace(self.by, reason=why))

    def refuse_removal(self, machine: Host) -> None:
        if why := _obstacle(machine):
            raise RefusedRemoval(dataclasses.replace(self.by, reason=why))

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        items, extra, drop = wanted.items, wanted.add, wanted.drop
        config = _config(machine)
        before = machine.text(config)
        after = before
        for entry in _our_entries(machine):
            if entry.cmdline_at is None or "${" in entry.cmdline:
                raise EmupmemError(
                    f"{config}: the entry “{entry.name}” has no plain cmdline: of its own",
                    "write its words into that line, or add memmap=… to its macro by hand",
                    state=UNCHANGED,
                )
            new = bls_text.reworked(entry.cmdline, items, extra, drop)
            bls_text.prove_words(entry.cmdline, new, items, extra, drop)
            after = with_cmdline(after, entry.cmdline_at, new)
        edits = [
            self._settings_edit(machine, wanted),
            FileEdit(
                config, before.encode("utf-8", "surrogateescape"), after.encode("utf-8", "surrogateescape")
            ),
        ]
        return Steps(wanted, real_edits(edits))

    def prove(self, machine: Host, before: Standing, steps: Steps) -> int:
        count = super().prove(machine, before, steps)
        if machine.live:
            for entry in _our_entries(machine):
                if entry.kernel:
                    self._ask(machine, entry.kernel, steps.wanted)
        return count

    def _settings_edit(self, machine: Host, wanted: Wanted) -> FileEdit:
        """Our lines at the end of the last file: one for each key that has a command line."""
        layers = {n: machine.text(n) for n in owner.limine_layers(machine)}
        now, before, data = (
            settings(list(layers.values())),
            layers[LIMINE_DEFAULTS],
            machine.read(LIMINE_DEFAULTS),
        )
        if len(now) > 1 and not machine.running:
            raise Refused(self.by)  # only its tool knows which kernel takes which of them
        if all(bls_text.reworked(v, wanted.items, wanted.add, wanted.drop) == v for v in now.values()):
            return FileEdit(LIMINE_DEFAULTS, data, data)
        ours = [f"memmap={','.join(wanted.items)}", *wanted.add] if wanted.items else []
        gone, former = (*ours, *wanted.drop), own_words(before)
        bare = with_own_lines(before, {}, wanted.drop, ours=False)
        base = settings(list({**layers, LIMINE_DEFAULTS: bare}.values()))
        words = {}
        for key in (DEFAULT, *(k for k in now if k != DEFAULT)):
            had = bls_text.raw_words(former.get(key, ""))
            kept = [w for w in had if w not in gone and not w.startswith("memmap=")]
            there = parse_command_line(base.get(key, "")).words
            words[key] = " ".join([*ours[:1], *kept, *(w for w in ours[1:] if w not in there)])
        after = with_own_lines(before, words, wanted.drop, ours=bool(ours))
        made = settings(list({**layers, LIMINE_DEFAULTS: after}.values()))
        wrong = next(
            (k for k, v in made.items() if bls_text.wrong_line(parse_command_line(v), wanted.items)), ""
        )
        if wrong:
            raise EmupmemError(
                f"KERNEL_CMDLINE[{wrong}] reserves memory already, in another file than {LIMINE_DEFAULTS}",
                "remove that first: grep -r memmap= /etc/limine-entry-tool.d /usr/share/limine-entry-tool.d",
                state=UNCHANGED,
            )
        for key, value in now.items():
            if _of_others(value) != _of_others(made.get(key, "")):
                raise EmupmemError(
                    f"KERNEL_CMDLINE[{key}] cannot be changed without changing other words of it",
                    f"take memmap= out of {LIMINE_DEFAULTS} by hand, then sudo limine-mkinitcpio",
                    state=UNCHANGED,
                )
        return FileEdit(LIMINE_DEFAULTS, data, after.encode("utf-8", "surrogateescape") if after else None)

    def _ask(self, machine: Host, kernel: str, wanted: Wanted) -> None:
        """Raise EmupmemError unless the tool would make entries with exactly our items, and with a root=."""
        done = machine.output(TOOL, "--get-cmdline", kernel, "--no-mutex", "--no-hooks")
        said = done.stdout.decode("utf-8", "surrogateescape").strip().splitlines() if done is not None else []
        if done is None or done.status or not said:
            why = f": {done.last_words}" if done is not None else ""
            raise EmupmemError(f"{TOOL} does not tell the command line of {kernel}{why}")
        line = parse_command_line(said[-1])
        wrong = bls_text.wrong_line(line, wanted.items)
        missing = next((w for w in wanted.add if w not in line.words), "")
        if wrong or missing or not any(w.startswith("root=") for w in line.words):
            raise EmupmemError(f"{TOOL} reads other words for {kernel}: {joined(line.words)}")


def _of_others(line: str) -> list[str]:
    """The words that are surely not ours."""
    return sorted(w for w in bls_text.foreign_words(parse_command_line(line)) if w not in OUR_WORDS)


def _config(machine: Host) -> str:
    return next((n for n in LIMINE_CONFIGS if machine.exists(n)), LIMINE_CONFIGS[0])


def _is_linux(entry: LimineEntry) -> bool:
    return entry.protocol == "linux" and not entry.is_snapshot


def _our_entries(machine: Host) -> list[LimineEntry]:
    """The entries of this system, without those of snapshots."""
    running = own_line(machine)
    found = limine_entries(machine.text(_config(machine)))
    return [e for e in found if _is_linux(e) and _is_ours(machine, e, running)]


def _is_ours(machine: Host, entry: LimineEntry, running: CommandLine) -> bool:
    """Whether an entry starts this system: by the machine's id in its path, else by the root file system."""
    ident = machine.peek("/etc/machine-id").strip()
    if ident and f"/{ident}/" in entry.path:
        return True
    return is_of_same_root(machine, "", entry.cmdline, running)


def _boot_entry(machine: Host, entry: LimineEntry, running: CommandLine) -> BootEntry:
    words = parse_command_line(entry.cmdline).words
    ours = _is_ours(machine, entry, running)
    return BootEntry(
        entry.titles, (entry.name,), (0,), entry.path, words, entry.line + 1, False, ours, entry.version
    )


def _obstacle(machine: Host) -> str:
    """Why the entries are not for us to change, empty where they are."""
    configs = {machine.real(n) for n in LIMINE_CONFIGS if machine.exists(n)}
    if len(configs) > 1:
        names = ", ".join(sorted(configs))
        return f"there are {len(configs)} files of Limine's ({names}): which one it reads is unclear"
    if any(
        e.kernel and not e.is_snapshot and e.protocol != "linux"
        for e in limine_entries(machine.peek(_config(machine)))
    ):
        return _UNIFIED
    return _ENROLLED if _is_enrolled(machine) else ""


def _is_enrolled(machine: Host) -> bool:
    """Whether Limine starts with one certain limine.conf only, or will with the tool's next run."""
    if owner.limine_setting(machine, "ENABLE_ENROLL_LIMINE_CONFIG") == "yes":
        return True
    names = [f"{esp}/{n}" for esp in BOOT_FOLDERS for n in ("limine-bios.sys", "limine/limine-bios.sys")]
    for esp in BOOT_FOLDERS:
        folders = [f"{esp}/EFI/{n}" for n in machine.names(f"{esp}/EFI")]
        names += [f"{f}/{n}" for f in folders for n in machine.names(f) if n.lower().endswith(".efi")]
    return any(_has_checksum(machine.read(n) or b"") for n in names if machine.exists(n))


def _has_checksum(data: bytes) -> bool:
    at = data.find(SIGNATURE)
    return at >= 0 and data[at + len(SIGNATURE) :][:_DIGITS].strip(b"0") != b""
