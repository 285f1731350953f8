# SPDX-License-Identifier: Apache-2.0
"""GRUB that reads entries of the Boot Loader Specification: Fedora, RHEL.

A trial is one extra entry that `next_entry` of GRUB's environment block chooses, as grub2-reboot would: the menu
clears that choice before it starts the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from emupmem.boot import foreign
from emupmem.boot.bls import sources as bls_sources
from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls import trial as bls_trial
from emupmem.boot.bls.entries import (
    bls_entry,
    default_entry_of,
    is_of_same_root,
    no_entries_error,
    own_line,
)
from emupmem.boot.bls.files import TRIAL_ENTRY, edit_of, entry_files, entry_text, real_edits, trial_file
from emupmem.boot.bls.sources import (
    KERNEL_CMDLINE,
    source_edits,
    sources_or_entries,
    torn_files,
    written_files,
)
from emupmem.boot.foreign import Refused, RefusedRemoval
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import environment
from emupmem.boot.grub import trial as grub_trial
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.boot.loader import Loader, Standing, Steps, Trial, Wanted, taken_choice
from emupmem.editor import defaults
from emupmem.editor import text as editor_text
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import UNCHANGED, Command, CommandLine, EmupmemError, FileEdit
from emupmem.system.host import Host
from emupmem.system.machine import Machine

TRIAL_ID = TRIAL_ENTRY.removesuffix(".conf")
"""What GRUB calls the entry of a trial: blscfg names entries by their files."""

MAY_BE_UNSET = ("tuned_params",)
"""Variables in entries that have a value only while TuneD wants to add words."""

# Fedora's patch of get_entry_number looks for names first. GRUB itself (2.14, booted) takes a default that begins with
# a digit for a number, and where there is no such entry the first one: names of files backwards, ours before digits.
_LOOKS_FOR_NAMES = re.compile(r"^ID(_LIKE)?=.*\b(fedora|rhel)\b", re.MULTILINE)


class GrubBls(Loader):
    """GRUB that takes its entries from /boot/loader/entries (Fedora, RHEL 8 and later): grubby changes them.

    grubby deletes every argument of the same name, so it is given the whole merged `memmap=` list.
    /etc/default/grub and /etc/kernel/cmdline, which new kernels and grub2-mkconfig read, are kept in step.
    """

    title = "GRUB with BLS entries"
    back = "in GRUB's menu (hold Shift or press Esc at the start) press e, delete {memmap}, press Ctrl-x"
    folders = ("/boot",)

    def standing(self, machine: Host) -> Standing:
        running = own_line(machine)
        variables = environment.grubenv(machine)
        entries = []
        for name in entry_files(machine, self.folders):
            text = entry_text(machine, name)
            line = _line(text, variables)
            if bls_text.value(text, "linux"):
                entries.append(bls_entry(name, text, line, _is_ours(machine, name, line, running)))
        if not any(e.ours for e in entries):
            raise no_entries_error(machine, "GRUB")
        saved = variables.get("saved_entry", "")
        default = next((e for e in entries if e.ours and saved in (e.ids[0], e.title)), None)
        default = default or default_entry_of(machine, entries)
        items = tuple(i.text for i in default.command_line.reservations) if default is not None else ()
        tried = _line(machine.text(file), variables) if (file := trial_file(machine)) else ""
        return Standing(
            items,
            "the boot entries",
            "/boot/loader/entries",
            tuple(entries),
            default,
            parse_command_line(tried).words,
            self.chosen(machine),
        )

    def new_kernels_take(self, machine: Host, now: Standing) -> str:
        return bls_sources.taken_by_new_kernels(machine)

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
        trial = trial_file(machine)
        gone = [FileEdit(trial, machine.read(trial), None)] if trial else []
        if not machine.running:
            made = self._entries_of_tree(machine, standing, wanted)
            return Steps(wanted, real_edits([*edits, *source, *made, *gone]))
        # Since 8.40-47.el8 grubby makes that file where there is none, of the words of the oldest entry.
        edits += source or [FileEdit(KERNEL_CMDLINE, None, None)]
        wrong = [e for e in standing.entries if e.ours and self._differs(e.command_line, items, extra, drop)]
        if not wrong:
            return Steps(wanted, real_edits([*edits, *gone]))
        # It writes both files as well, the second one's first line only: afterwards they are as they should be.
        command = self._grubby(machine, standing, items, extra, drop)
        edits += gone  # when grubby has run: until then a confirm can be finished
        rewritten = tuple(e.name for e in edits)
        return Steps(
            wanted,
            tuple(edits),
            (command,),
            (*files, env),
            rewritten=rewritten,
        )

    def _entries_of_tree(self, machine: Host, standing: Standing, wanted: Wanted) -> list[FileEdit]:
        """The entries of a tree, edited as text: its grubby is not run."""
        _refuse_variables(machine, entry_files(machine, self.folders))
        ours, edits = {e.ids[0] for e in standing.entries if e.ours}, []
        variables = environment.grubenv(machine)
        for name in entry_files(machine, self.folders):
            text = entry_text(machine, name)
            if name.rpartition("/")[2].removesuffix(".conf") not in ours:
                continue
            after = bls_text.rework_entry(text, wanted.items, wanted.add, wanted.drop)
            old, new = _line(text, variables), _line(after, variables)
            bls_text.prove_words(old, new, wanted.items, wanted.add, wanted.drop)
            edits.append(edit_of(machine, name, after))
        return edits

    def _new_kernels(self, machine: Host, standing: Standing) -> str:
        """The words of the default entry without those that TuneD adds to each entry by itself."""
        known = {k: v for k, v in environment.grubenv(machine).items() if k not in MAY_BE_UNSET}
        names = entry_files(machine, self.folders)
        default = standing.default.ids if standing.default else ()
        name = next((n for n in names if n.rpartition("/")[2].removesuffix(".conf") in default), names[0])
        return _line(entry_text(machine, name), known)

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
        _refuse_others(standing)
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
        try:
            self.refuse(machine)
        except Refused as exc:
            raise RefusedRemoval(exc.by) from exc

    def refuse(self, machine: Host) -> None:
        if not machine.running:
            _refuse_variables(machine, entry_files(machine, self.folders))
            return
        if machine.live and machine.find("grubby") is None:
            raise EmupmemError(
                "GRUB takes its entries from /boot/loader/entries here (BLS), and grubby is not installed",
                "dnf install grubby",
            )
        if machine.is_root:
            _refuse_unset(machine, entry_files(machine, self.folders))
            _refuse_others(self.standing(machine))

    # A trial -------------------------------------------------------------------------------------------------

    def refuse_trial(self, machine: Host) -> None:
        why, fix = grub_trial.obstacle(machine)
        if not why and (there := environment.unreached_grubenv(machine)):
            why = f"{environment.grubenv_name(machine)} is a link to {there} on another partition"
        if why:
            raise EmupmemError(
                f"GRUB could not forget the trial by itself: {why}", fix or "apply without --trial"
            )
        now, saved = self.standing(machine), environment.grubenv(machine).get("saved_entry", "")
        if now.default is None or saved not in (now.default.ids[0], now.default.title):
            raise EmupmemError(
                "no entry is saved as the default: one more could take its place",
                "sudo grub2-set-default ENTRY (the name of a file in /boot/loader/entries without .conf), "
                "or apply without --trial",
            )
        if saved[0].isdigit() and not _LOOKS_FOR_NAMES.search(machine.peek("/etc/os-release")):
            raise EmupmemError(
                f"this GRUB takes the default {saved} for a number: the entry of the trial would be the default",
                "apply without --trial",
            )

    def trial(self, machine: Host) -> Trial | None:
        file = trial_file(machine)
        words = bls_trial.trial_words(machine.peek(file)) if file else ()
        if not words:
            return None
        kernel = grub_trial.local_path(bls_text.value(machine.text(file), "linux"), machine.exists)
        return Trial(file, words, self.chosen(machine), bool(kernel))

    def trial_steps(self, machine: Host, now: Standing, wanted: Wanted) -> Steps:
        default = now.default.ids[0] if now.default is not None else ""
        name = next((n for n in entry_files(machine, self.folders) if n.endswith(f"/{default}.conf")), "")
        if not name:
            raise EmupmemError("cannot determine the default boot entry", "apply without --trial")
        file = f"{name.rpartition('/')[0]}/{TRIAL_ENTRY}"
        text = bls_trial.trial_entry(machine.text(name), wanted.trial)
        kept = bls_sources.kept_source(machine, self._new_kernels(machine, now))
        edits = [*kept, FileEdit(file, machine.read(file), text.encode("utf-8", "surrogateescape"))]
        other = "" if now.chosen else self.choice(machine)
        return Steps(
            wanted, real_edits(edits), owned=(environment.grubenv_name(machine),), notes=taken_choice(other)
        )

    def chosen(self, machine: Host) -> bool:
        return self.choice(machine) == TRIAL_ID

    def choose(self, machine: Machine, wanted: bool) -> None:
        environment.set_grubenv(machine, grub_trial.NEXT, TRIAL_ID if wanted else "")

    def choice(self, machine: Host) -> str:
        return environment.grubenv(machine).get(grub_trial.NEXT, "")

    def choose_again(self, machine: Machine, name: str) -> None:
        environment.set_grubenv(machine, grub_trial.NEXT, name)


def _line(text: str, variables: Mapping[str, str]) -> str:
    """What GRUB makes of the options of an entry."""
    return bls_text.grub_line(bls_text.grub_options(text), variables)


def _is_ours(machine: Host, name: str, line: str, running: CommandLine) -> bool:
    """Whether an entry starts this system. One that names no root file system is not told to start another one."""
    rooted = any(w.startswith("root=") for w in parse_command_line(line).words)
    return not rooted or is_of_same_root(machine, name, line, running)


def _refuse_others(standing: Standing) -> None:
    """Raise EmupmemError where an entry starts another system: grubby changes all, or those of one kernel's path."""
    other = next((e for e in standing.entries if not e.ours), None)
    if other is not None:
        raise EmupmemError(
            f"{standing.menu}/{other.ids[0]}.conf starts another system, and grubby would change it as well",
            "move that file away and try again, or change this system's entries one by one: "
            "sudo grubby --update-kernel=/boot/vmlinuz-RELEASE --args='memmap=…'",
            state=UNCHANGED,
        )


def _variables(machine: Host, name: str) -> Sequence[str]:
    """The variables of GRUB's in the options of an entry."""
    return bls_text.variables(bls_text.grub_options(entry_text(machine, name)))


def _refuse_variables(machine: Host, names: Sequence[str]) -> None:
    """Raise Refused for a tree whose entries take their words from GRUB's environment block."""
    for name in names:
        found = [v for v in _variables(machine, name) if v not in MAY_BE_UNSET]
        if found:
            raise Refused(foreign.grubby_there(name, found[0]))


def _refuse_unset(machine: Host, names: Sequence[str]) -> None:
    """Raise EmupmemError for an entry whose words are in a variable that GRUB's environment block does not set.

    grubby changes the variable there, or nothing at all, and what the menu sets instead is not seen here.
    """
    known = {**dict.fromkeys(MAY_BE_UNSET, ""), **environment.grubenv(machine)}
    for name in names:
        variables = _variables(machine, name)
        used = [v for v in variables if v not in MAY_BE_UNSET]
        if used and (there := environment.unreached_grubenv(machine)):
            raise EmupmemError(
                f"{name} takes its words from ${used[0]} of {environment.grubenv_name(machine)}, a link to {there}: "
                "GRUB does not follow it onto another partition",
                f"put a file in its place: sudo cp --remove-destination {there} {environment.grubenv_name(machine)}",
                state=UNCHANGED,
            )
        unset = next((v for v in variables if v not in known), "")
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
