# SPDX-License-Identifier: Apache-2.0
"""The files of the Boot Loader Specification: where they lie, what they hold."""

from __future__ import annotations

from collections.abc import Sequence

from emupmem.boot.bls import text as bls_text
from emupmem.kernel.cmdline import OUR_WORDS, parse_command_line
from emupmem.model import MIB, EmupmemError, FileEdit
from emupmem.system import backups
from emupmem.system.host import Host

BOOT_FOLDERS = ("/efi", "/boot/efi", "/boot")
"""Where an EFI system partition or an extended boot partition is mounted (bootctl(1))."""

TRIAL_ENTRY = "emupmem-trial.conf"
"""The entry of a trial boot (see `systemd_boot`): no one of those that a change is about."""

LONGEST_ENTRY = MIB
"""Characters. Longer ones are rubbish that would take minutes to take apart."""


# Entries of the Boot Loader Specification ------------------------------------------------------------


def entry_files(machine: Host, folders: Sequence[str] = BOOT_FOLDERS) -> list[str]:
    """The entries that lie here, one name for each file."""
    found: dict[str, str] = {}
    for folder in folders:
        for name in machine.names(f"{folder}/loader/entries"):
            if name.lower().endswith(".conf") and name != TRIAL_ENTRY:
                file = f"{folder}/loader/entries/{name}"
                found.setdefault(machine.real(file), file)
    return list(found.values())


def trial_file(machine: Host) -> str:
    """The entry of a trial boot, empty where there is none."""
    names = [f"{folder}/loader/entries/{TRIAL_ENTRY}" for folder in BOOT_FOLDERS]
    return next((n for n in names if machine.exists(n)), "")


def entry_text(machine: Host, name: str) -> str:
    """An entry; of one that a program tore when it was killed, the copy that lies beside it.

    What was written anew since then is no torn one, see `_is_torn`. Raises EmupmemError for what cannot be an entry.
    """
    text, data = machine.text(name), backups.read_aside(machine, name)
    if len(text) > LONGEST_ENTRY:
        raise EmupmemError(f"{name} is longer than 1 MiB: that is no boot entry", "move it away")
    if data is None:
        return text
    aside = data.decode("utf-8", "surrogateescape")
    return aside if _is_torn(machine, name, text, aside) else text


def _is_torn(machine: Host, name: str, text: str, whole: str) -> bool:
    """Whether an entry is the beginning of another one: sdboot-manage adds the lines of the initrd later.

    It lacks all lines of a key without which nothing starts, or the last ones, and then its options, but for ours,
    begin like those of the whole one. What a person took away since then mostly was another line, or is there no more.
    """
    here, there = (_options_of_others(t) for t in (text, whole))
    begins = there[: len(here)] == here
    folder = name.rpartition("/loader/entries/")[0]
    for key in ("title", "linux", "efi", "initrd", "options"):
        begun, all_ = ([v for k, v in bls_text.fields(t) if k == key] for t in (text, whole))
        lacking = all_[len(begun) :]
        if not lacking or (begun and not begins) or (key != "options" and all_[: len(begun)] != begun):
            continue
        seen = machine.exists(f"{folder}{bls_text.value(whole, 'linux')}")
        if not (key == "initrd" and seen and not all(machine.exists(f"{folder}{v}") for v in lacking)):
            return True
    return False


def _options_of_others(text: str) -> list[str]:
    words = bls_text.foreign_words(parse_command_line(bls_text.options(text)))
    return [w for w in words if w not in OUR_WORDS]


def edit_of(machine: Host, name: str, text: str) -> FileEdit:
    before = entry_text(machine, name)
    return FileEdit(name, before.encode("utf-8", "surrogateescape"), text.encode("utf-8", "surrogateescape"))


def real_edits(edits: Sequence[FileEdit]) -> tuple[FileEdit, ...]:
    return tuple(e for e in edits if e.before != e.after)


# Unified kernel images -----------------------------------------------------------------------------


def unified_images(machine: Host) -> list[str]:
    """The unified kernel images that systemd-boot finds by itself."""
    found = [n for folder in BOOT_FOLDERS for n in machine.names(f"{folder}/EFI/Linux")]
    return sorted({n for n in found if n.lower().endswith(".efi")})
