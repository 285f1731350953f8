# SPDX-License-Identifier: Apache-2.0
"""The menu of systemd-boot: which entries it shows, in which order."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from emupmem.boot import efi
from emupmem.boot.bls import files
from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.files import unified_images
from emupmem.system.host import Host

# The menu of systemd-boot ----------------------------------------------------------------------------


def menu_names(machine: Host) -> list[str]:
    """The names of systemd-boot's menu in its order, that which boots by default first, as far as files tell.

    An image of this distribution comes before its entries: it has a sort key always and no machine id
    (boot_entry_compare, config_select_default_entry, src/boot/boot.c).
    """
    names = [*unified_images(machine), *_entries(machine)]
    for pattern in told_names(machine, _config(machine)):
        first = [n for n in names if is_meant(n, pattern)]
        if first:
            return [*first, *(n for n in names if n not in first)]
    return names


def told_default(machine: Host) -> str:
    """The name of what is told to boot by default, empty where that is left to the order of the menu."""
    if not told_names(machine, _config(machine)):
        return ""
    names = menu_names(machine)
    return names[0] if names and _is_told(machine, names[0]) else ""


def _is_told(machine: Host, name: str) -> bool:
    return any(is_meant(name, pattern) for pattern in told_names(machine, _config(machine)))


def is_meant(name: str, pattern: str) -> bool:
    """Whether one of `told_names` means the entry of this name."""
    return fnmatchcase(name.lower(), pattern) or name.lower() == f"{pattern}.conf"


def _config(machine: Host) -> str:
    return next((t for f in files.BOOT_FOLDERS if (t := machine.peek(f"{f}/loader/loader.conf"))), "")


def told_names(machine: Host, config: str) -> list[str]:
    """What is to boot by default as patterns in lower case, the first to be found wins; `config` is loader.conf."""
    values = dict(bls_text.fields(config))
    told = [efi.efi_text(machine, efi.efi_variable("LoaderEntryDefault"))] if machine.running else []
    told += [values.get("preferred", ""), values.get("default", "")]
    last = efi.efi_text(machine, efi.efi_variable("LoaderEntryLastBooted")) if machine.running else ""
    return [p.lower() for t in told if (p := last if t == "@saved" else t)]


def _entries(machine: Host) -> list[str]:
    """The names of the entries, sorted as systemd-boot does."""
    found = [(n, files.entry_text(machine, n)) for n in files.entry_files(machine)]
    found = [(n, t) for n, t in found if not n.rpartition("/")[2].startswith("auto-")]
    found.sort(key=lambda e: natural_order(id_of(e[0])), reverse=True)
    found.sort(
        key=lambda e: natural_order(
            bls_text.value(e[1], "version") if bls_text.value(e[1], "sort-key") else ""
        ),
        reverse=True,
    )
    found.sort(key=_group)
    return [id_of(n) for n, _ in found]


def _group(entry: tuple[str, str]) -> tuple[bool, bool, str, str]:
    """What entries are sorted by before their versions: those without a try left and without a key come last."""
    name, text = entry
    key = bls_text.value(text, "sort-key")
    return (
        bool(re.search(r"\+0(-\d+)?\.conf\Z", name)),
        not key,
        key,
        bls_text.value(text, "machine-id") if key else "",
    )


def id_of(name: str) -> str:
    """The name of an entry as the loader has it: without the counter of its tries."""
    return re.sub(r"\+\d+(?:-\d+)?(?=\.(?:conf|efi)\Z)", "", name.rpartition("/")[2])


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """Text in the order of versions: numbers by their value (strverscmp_improved, src/fundamental)."""
    ranks = {"-": 0, "^": 1, ".": 2}
    parts = re.findall(r"[0-9]+|[A-Za-z]+|[-^.]", text)
    return [(4, int(p), "") if p.isdecimal() else (ranks.get(p, 3), 0, p) for p in parts]
