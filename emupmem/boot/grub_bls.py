# SPDX-License-Identifier: Apache-2.0
"""GRUB that reads entries of the Boot Loader Specification: Fedora, RHEL."""

from __future__ import annotations

from collections.abc import Sequence

from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.entries import bls_entry, default_entry_of, no_entries_error
from emupmem.boot.bls.files import entry_files, entry_text, real_edits
from emupmem.boot.bls.sources import (
    KERNEL_CMDLINE,
    source_edits,
    sources_or_entries,
    torn_files,
    written_files,
)
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.boot.loader import Loader, Standing, Steps, Wanted
from emupmem.editor import defaults
from emupmem.editor import text as editor_text
from emupmem.model import UNCHANGED, Command, CommandLine, EmupmemError, FileEdit
from emupmem.system.host import Host

MAY_BE_UNSET = ("tuned_params",)
"""Variables in entries that have a value only while TuneD wants to add words."""


class GrubBls(Loader):
    """GRUB that takes its entries from /boot/loader/entries (Fedora, RHEL 8 and later): grubby changes them.

    grubby deletes every argument of the same name, so it is given the whole merged `memmap=` list.
    /etc/default/grub and /etc/kernel/cmdline, which new kernels and grub2-mkconfig read, are kept in step.
    """

    title = "GRUB with BLS entries"
    back = "in GRUB's menu (hold Shift or press Esc at the start) press e, delete {memmap}, press Ctrl-x"
    folders = ("/boot",)

    def standing(self, machine: Host) -> Standing:
        variables = tuple(environment.grubenv(machine).items())
        entries = []
        for name in entry_files(machine, self.folders):
            text = entry_text(machine, name)
            line = bls_text.grub_line(bls_text.options(text), variables)
            if bls_text.value(text, "linux"):
                entries.append(bls_entry(name, text, line, True))
        if not entries:
            raise no_entries_error(machine, "GRUB")
        saved = environment.grubenv(machine).get("saved_entry", "")
        default = next((e for e in entries if saved in (e.ids[0], e.title)), None) or default_entry_of(
            machine, entries
        )
        items = tuple(i.text for i in default.command_line.reservations) if default is not None else ()
        return Standing(items, "the boot entries", "/boot/loader/entries", tuple(entries), default)

    def sources(self, machine: Host) -> tuple[str, ...]:
        return sources_or_entries(machine)

    def files(self, machine: Host) -> tuple[str, ...]:
        return (*written_files(machine), environment.grubenv_name(machine))

    def torn(self, machine: Host) -> tuple[str, ...]:
        env = (environment.grubenv_name(machine),) if environment.torn_grubenv(machine) else ()
        return (*torn_files(machine, entry_files(machine, self.folders)), *env)

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        standing, items, extra, drop = self.standing(machine), wanted.items, wanted.add, wanted.drop
        files, env = entry_files(machine, self.folders), environment.grubenv_name(machine)
        edits = [*self._defaults(machine, items, extra, drop)]
        source = source_edits(machine, self._new_kernels(machine, standing), items, extra, drop)
        # Since 8.40-47.el8 grubby makes that file where there is none, of the words of the oldest entry.
        edits += source or [FileEdit(KERNEL_CMDLINE, None, None)]
        wrong = [e for e in standing.entries if self._differs(e.command_line, items, extra, drop)]
        if not wrong:
            return Steps(wanted, real_edits(edits), remembered=extra)
        # It writes both files as well, the second one's first line only: afterwards they are as they should be.
        command = self._grubby(machine, standing, items, extra, drop)
        rewritten = tuple(e.name for e in edits)
        return Steps(
            wanted,
            tuple(edits),
            (command,),
            (*files, env),
            rewritten=rewritten,
            remembered=extra,
        )

    def _new_kernels(self, machine: Host, standing: Standing) -> str:
        """The words of the default entry without those that TuneD adds to each entry by itself."""
        known = tuple((k, v) for k, v in environment.grubenv(machine).items() if k not in MAY_BE_UNSET)
        names = entry_files(machine, self.folders)
        default = standing.default.ids if standing.default else ()
        name = next((n for n in names if n.rpartition("/")[2].removesuffix(".conf") in default), names[0])
        return bls_text.grub_line(bls_text.options(entry_text(machine, name)), known)

    def _differs(
        self, line: CommandLine, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
    ) -> bool:
        return (
            bool(bls_text.wrong_line(line, items))
            or any(w not in line.words for w in extra)
            or any(w in line.words for w in drop)
        )

    def _defaults(
        self, machine: Host, items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
    ) -> list[FileEdit]:
        """What grub2-mkconfig --update-bls-cmdline, and on RHEL 8 any grub2-mkconfig, would write over the entries."""
        before = machine.read(GRUB_DEFAULT)
        if before is None:
            return []
        sh = grub_defaults.judge_of(machine)
        after = defaults.set_items(before, editor_text.LINUX, items, extra, drop, sh=sh)
        if after != before:
            defaults.prove(before, after, editor_text.LINUX, items, extra_words=extra, drop_words=drop, sh=sh)
        return [FileEdit(GRUB_DEFAULT, before, after)]

    def _grubby(
        self,
        machine: Host,
        standing: Standing,
        items: Sequence[str],
        extra: Sequence[str],
        drop: Sequence[str],
    ) -> Command:
        _refuse_unset(machine, entry_files(machine, self.folders))
        others = {bls_text.foreign_items(e.command_line) for e in standing.entries}
        if len(others) > 1:
            raise EmupmemError(
                "the boot entries differ in their memmap= arguments, and grubby can only make all the same",
                "make them the same first: grubby --info=ALL shows them",
            )
        merged = [*next(iter(others)), *items]
        odd = next(
            (w for e in standing.entries for w in bls_text.foreign_words(e.command_line) if _mangled(w)), ""
        )
        if odd:
            raise EmupmemError(
                f"the boot entries have the word {odd}, which grubby does not keep as it is",
                "grubby writes with sed: \\, $, & and quotes get lost; change the entries by hand",
            )
        added = [*([f"memmap={','.join(merged)}"] if merged else []), *extra]
        gone = [*([] if merged else ["memmap"]), *drop]
        argv = ["grubby", "--update-kernel=ALL"]
        argv += [f"--args={' '.join(added)}"] if added else []
        argv += [f"--remove-args={' '.join(gone)}"] if gone else []
        argv += ["--no-etc-grub-update"] if _knows(machine, "--no-etc-grub-update") else []
        return Command(tuple(argv), "change the boot entries")

    def refuse_removal(self, machine: Host) -> None:
        if not machine.running:
            self.refuse(machine)  # its program is asked, and would be that of this machine

    def refuse(self, machine: Host) -> None:
        if not machine.live and not machine.running:
            raise EmupmemError(
                "GRUB takes its entries from /boot/loader/entries here (BLS): grubby changes them, on that machine",
                "run emupmem there",
            )
        if machine.live and machine.find("grubby") is None:
            raise EmupmemError(
                "GRUB takes its entries from /boot/loader/entries here (BLS), and grubby is not installed",
                "dnf install grubby",
            )


def _refuse_unset(machine: Host, names: Sequence[str]) -> None:
    """Raise EmupmemError for an entry whose words are in a variable that GRUB's environment block does not set.

    grubby changes the variable there, or nothing at all, and what the menu sets instead is not seen here.
    """
    known = {**dict.fromkeys(MAY_BE_UNSET, ""), **environment.grubenv(machine)}
    for name in names:
        unset = next(
            (v for v in bls_text.variables(bls_text.options(entry_text(machine, name))) if v not in known), ""
        )
        if unset:
            raise EmupmemError(
                f"{name} takes its words from ${unset}, which {environment.grubenv_name(machine)} does not set",
                f"set it there: grub2-editenv {environment.grubenv_name(machine)} set '{unset}=root=… ro …'",
                state=UNCHANGED,
            )


def _mangled(word: str) -> bool:
    """Whether sed or grubby's word splitting would change a word (update_args, set_bls_value), or GRUB then."""
    return any(c in word for c in "\\$&\"'*?[ \t")


def _knows(machine: Host, option: str) -> bool:
    """Whether this grubby has an option: those that write /etc/default/grub too can be told not to."""
    done = machine.output("grubby", "--help")
    return done is not None and option.encode() in done.stdout + done.stderr
