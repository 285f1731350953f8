# SPDX-License-Identifier: Apache-2.0
"""systemd-boot, and sdbootutil, which keeps its entries on openSUSE; a trial is one extra entry, chosen for one start.


systemd-boot deletes the UEFI variable LoaderEntryOneShot before it starts the kernel (src/boot/boot.c,
config_load_defaults), so whatever happens to that kernel, the start after it is the old configuration.
"""

from __future__ import annotations

from dataclasses import replace

from emupmem.boot import efi, owner, programs
from emupmem.boot.bls import entries as bls_entries
from emupmem.boot.bls import files as bls_files
from emupmem.boot.bls import menu as bls_menu
from emupmem.boot.bls import sources as bls_sources
from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls import trial as bls_trial
from emupmem.boot.bls.entries import (
    FORGET_TRIAL,
    bls_entry,
    default_entry_of,
    is_of_another_snapshot,
    is_of_this_system,
    no_entries_error,
    own_line,
    snapshots_kept,
    trial_chosen,
)
from emupmem.boot.bls.files import (
    TRIAL_ENTRY,
    edit_of,
    entry_files,
    entry_text,
    real_edits,
    trial_file,
)
from emupmem.boot.bls.sources import (
    source_edits,
    source_items,
    sources_or_entries,
    torn_files,
    written_files,
)
from emupmem.boot.efi import SELECTED, efi_text
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import Refused
from emupmem.boot.loader import Loader, Standing, Steps, Trial, Wanted, taken_choice
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import Command, EmupmemError, FileEdit
from emupmem.system.host import Host
from emupmem.system.machine import Machine


class SystemdBoot(Loader):
    """systemd-boot, its entries as kernel-install or a person wrote them.

    The entries are rewritten by rename, one after the other: each is whole at every moment. What new kernels
    take their words from is kept in step: /etc/kernel/cmdline.
    """

    title = "systemd-boot"
    back = "in the boot menu (hold Space at the start) press e on the entry, delete {memmap}, press Enter"

    def standing(self, machine: Host) -> Standing:
        running = own_line(machine)
        entries: list[BootEntry] = []
        menu, others = "", 0
        for name in entry_files(machine):
            text = entry_text(machine, name)
            ours = is_of_this_system(machine, name, text, running)
            menu = menu or name.rpartition("/")[0]
            others += not ours and is_of_another_snapshot(machine, text)
            if bls_text.value(text, "linux"):
                entries.append(bls_entry(name, text, bls_text.options(text), ours))
        if not any(e.ours for e in entries):
            raise no_entries_error(machine, "systemd-boot")
        default = default_entry_of(machine, entries)
        items, where = source_items(machine, default)
        text = bls_text.options(machine.text(file)) if (file := trial_file(machine)) else ""
        words = parse_command_line(text).words
        chosen = trial_chosen(machine)
        return Standing(items, where, menu, tuple(entries), default, words, chosen, snapshots_kept(others))

    def sources(self, machine: Host) -> tuple[str, ...]:
        return sources_or_entries(machine)

    def new_kernels_take(self, machine: Host, now: Standing) -> str:
        return bls_sources.taken_by_new_kernels(machine)

    def files(self, machine: Host) -> tuple[str, ...]:
        return written_files(machine)

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        items, extra, drop = wanted.items, wanted.add, wanted.drop
        edits = self.new_kernels(machine, wanted)
        for name in self._ours(machine):
            before = entry_text(machine, name)
            after = bls_text.rework_entry(before, items, extra, drop)
            bls_text.prove_words(bls_text.options(before), bls_text.options(after), items, extra, drop)
            edits.append(edit_of(machine, name, after))
        trial = trial_file(machine)  # the last one: while it is there, a confirm can be finished
        edits += [FileEdit(trial, machine.read(trial), None)] if trial else []
        return Steps(wanted, real_edits(edits))

    def torn(self, machine: Host) -> tuple[str, ...]:
        return torn_files(machine, self._ours(machine))

    def new_kernels(self, machine: Host, wanted: Wanted) -> list[FileEdit]:
        """What makes new kernels take the words as wanted. Raises EmupmemError."""
        default = self.standing(machine).default
        installs = default is not None and programs.has_program(machine, "kernel-install")
        made = default.text if default is not None and installs else None
        return source_edits(machine, made, wanted.items, wanted.add, wanted.drop)

    def _ours(self, machine: Host) -> list[str]:
        running = own_line(machine)
        return [
            n for n in entry_files(machine) if is_of_this_system(machine, n, entry_text(machine, n), running)
        ]

    def refuse(self, machine: Host) -> None:
        if machine.running and efi_text(machine, SELECTED).endswith(".efi"):
            raise Refused(owner.unified_owner(machine, started=True))
        if owner.boots_image(machine):
            raise Refused(owner.unified_owner(machine, started=False))
        _refuse_other_snapshot(machine)
        _refuse_program(machine)

    def _check(self, machine: Host) -> tuple[str, ...]:
        return (*super()._check(machine), *self._starts_another(machine))

    def _starts_another(self, machine: Host) -> tuple[str, ...]:
        """A warning where what boots by itself is none of the entries that are changed."""
        told, ours = _told(machine), {bls_menu.id_of(n).lower() for n in self._ours(machine)}
        if not told or not ours or told.lower() in ours or told.lower().endswith(".efi"):
            return ()  # without root there may be none; an image is another loader's affair
        return (f"the next start is {told}, which is not changed: choose this system in the boot menu",)

    def refuse_trial(self, machine: Host) -> None:
        refuse_one_shot(machine)

    def trial(self, machine: Host) -> Trial | None:
        return read_trial_entry(machine)

    def trial_steps(self, machine: Host, now: Standing, wanted: Wanted) -> Steps:
        return trial_steps(machine, now, wanted)

    def chosen(self, machine: Host) -> bool:
        return trial_chosen(machine)

    def choosing(self, wanted: bool) -> Command | None:
        return CHOOSE if wanted else FORGET_TRIAL

    def choice(self, machine: Host) -> str:
        return efi.one_shot(machine)

    def choose_again(self, machine: Machine, name: str) -> None:
        step = Command(("bootctl", "set-oneshot", name), "choose what was chosen before")
        done = machine.run(step)
        if done.status:
            raise EmupmemError(f"bootctl failed with status {done.status}: {done.last_words}")


def _refuse_other_snapshot(machine: Host) -> None:
    """Raise EmupmemError where another snapshot than the one that runs is told to boot by default.

    As after `snapper rollback`: what is changed here would not be started.
    """
    told = _told(machine)
    files = _files_of(machine, told)
    if any(is_of_another_snapshot(machine, entry_text(machine, n)) for n in files):
        raise EmupmemError(
            f"the next start is another snapshot ({told}): a change of this one's entries would not reach it",
            "reboot into it first, then apply there",
        )


def _refuse_program(machine: Host) -> None:
    """Raise EmupmemError where the default starts a kernel as an EFI program: the words behind it are not read here."""
    told = _told(machine)
    for name in _files_of(machine, told):
        text = entry_text(machine, name)
        if not bls_text.value(text, "linux") and "root=" in bls_text.options(text):
            raise EmupmemError(
                f"the next start is {told}, which starts a kernel by “efi” and not by “linux”",
                "write linux and initrd lines into it, or choose another default: sudo bootctl set-default ID",
            )


def _told(machine: Host) -> str:
    """The name of what boots by default as bootctl or loader.conf tell it, empty where none does."""
    return bls_menu.id_of(bls_entries.default_id(machine)) or bls_menu.told_default(machine)


def _files_of(machine: Host, told: str) -> list[str]:
    return [n for n in entry_files(machine) if told and bls_menu.id_of(n).lower() == told.lower()]


class SdBootUtil(SystemdBoot):
    """openSUSE with systemd-boot or grub2-bls: sdbootutil writes the entries from /etc/kernel/cmdline.

    By its own program, since that also renews what a TPM is told of the command line.
    """

    title = "sdbootutil"
    back = "in the boot menu press e on the entry, delete {memmap}, go on; or choose an older snapshot"

    def refuse_trial(self, machine: Host) -> None:
        Loader.refuse_trial(self, machine)  # its entries may be GRUB's

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        steps = super().steps(machine, wanted)
        sources = tuple(e for e in steps.edits if e.name.startswith("/etc/kernel/"))
        if not steps.edits or not machine.running:
            return steps  # of a tree the entries themselves
        command = Command(("sdbootutil", _sdbootutil_verb(machine)), "rewrite the boot entries")
        # Of the older verb, and of one that goes wrong, no entry is safe.
        entries, rewritten = tuple(entry_files(machine)), tuple(e.name for e in sources)
        return replace(
            steps, edits=sources, commands=(command,), owned=entries, undo=(command,), rewritten=rewritten
        )

    def to_run_there(self, machine: Host) -> Command | None:
        return Command(("sdbootutil", "update-all-entries"), "tell the TPM of the new command line")


def _sdbootutil_verb(machine: Host) -> str:
    """`update-all-entries` writes the options only; versions before it write whole entries."""
    done = machine.output("sdbootutil", "--help")
    has = done is not None and b"update-all-entries" in done.stdout + done.stderr
    return "update-all-entries" if has else "add-all-kernels"


FEATURES = efi.efi_variable("LoaderFeatures")
ONE_SHOT_BIT = 1 << 3
"""EFI_LOADER_FEATURE_ENTRY_ONESHOT: the loader knows that variable, and deletes it (since version 240)."""

CHOOSE = Command(("bootctl", "set-oneshot", TRIAL_ENTRY), "choose it for the next start only")


def refuse_one_shot(machine: Host) -> None:
    """Raise EmupmemError where systemd-boot could not forget the choice by itself, with the reason."""
    refuse_without_one_shot(machine)
    default = _default_text_name(machine)
    if not bls_text.value(machine.text(default), "sort-key"):
        raise EmupmemError(
            f"{default} has no sort-key: a second entry could become the default",
            "apply without --trial, or give it a line like “sort-key debian”",
        )


def refuse_without_one_shot(machine: Host) -> None:
    """Raise EmupmemError where systemd-boot or bootctl does not know a choice for one start."""
    features = (machine.read(FEATURES) or b"")[4:12]  # after the attributes
    if "systemd-boot" not in efi.loader_name(machine).lower() or not (
        int.from_bytes(features, "little") & ONE_SHOT_BIT
    ):
        raise EmupmemError(
            "the boot loader does not say that it knows a choice for one start",
            "bootctl status lists what it knows; apply without --trial",
        )
    if machine.find("bootctl") is None:
        raise EmupmemError("bootctl is not installed: the entry cannot be selected", "apply without --trial")


def trial_steps(machine: Host, standing: Standing, wanted: Wanted) -> Steps:
    """What makes the entry: the one that boots by default, with the words of the trial added.

    The words of new kernels are written down where kernel-install would take those of the running boot: of the
    trial. Raises EmupmemError.
    """
    default = _default_text_name(machine)
    name = f"{default.rpartition('/')[0]}/{TRIAL_ENTRY}"
    before = machine.read(name)
    after = bls_trial.trial_entry(machine.text(default), wanted.trial).encode("utf-8", "surrogateescape")
    line = standing.default.text if standing.default is not None else None
    edits = [*bls_sources.kept_source(machine, line), FileEdit(name, before, after)]
    other = "" if standing.chosen else efi.one_shot(machine)
    return Steps(wanted, real_edits(edits), notes=taken_choice(other))


def read_trial_entry(machine: Host) -> Trial | None:
    """The trial's entry, None where there is none."""
    name = bls_files.trial_file(machine)
    text = machine.peek(name) if name else ""
    words = bls_trial.trial_words(text)
    if not words:
        return None
    starts = bls_text.value(text, "linux") or bls_text.value(text, "efi")
    kernel = f"{name.removesuffix(f'/loader/entries/{TRIAL_ENTRY}')}/{starts.lstrip('/')}"
    return Trial(name, words, trial_chosen(machine), machine.exists(kernel))


def _default_text_name(machine: Host) -> str:
    """The file of the entry that boots by default."""
    default = SystemdBoot().standing(machine).default
    files = [n for n in bls_files.entry_files(machine) if default and n.endswith(f"/{default.ids[0]}.conf")]
    if len(files) != 1:
        raise EmupmemError("cannot determine the default boot entry", "apply without --trial")
    return files[0]
