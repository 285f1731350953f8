"""A trial boot by systemd-boot: one extra entry, chosen for one start.

systemd-boot deletes the UEFI variable LoaderEntryOneShot before it starts the kernel (src/boot/boot.c,
config_load_defaults), so whatever happens to that kernel, the start after it is the old configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from emupmem import bls, loader
from emupmem.loader import TRIAL_ENTRY, Standing, Steps
from emupmem.model import Command, EmupmemError, FileEdit
from emupmem.system.machine import Machine

MARK = "# emupmem-trial:"
FEATURES = loader.efi_variable("LoaderFeatures")
ONE_SHOT_BIT = 1 << 3
"""EFI_LOADER_FEATURE_ENTRY_ONESHOT: the loader knows that variable, and deletes it (since version 240)."""

SORT_KEY = "zz-emupmem-trial"
"""Sorted after all distributions: the first entry boots by default (Boot Loader Specification, Sorting)."""

CHOOSE = Command(("bootctl", "set-oneshot", TRIAL_ENTRY), "choose it for the next start only")
FORGET = loader.FORGET_TRIAL


def refuse(machine: Machine) -> None:
    """Raise EmupmemError where systemd-boot could not forget the choice by itself, with the reason."""
    features = (machine.read(FEATURES) or b"")[4:12]  # after the attributes
    if "systemd-boot" not in loader.loader_name(machine).lower() or not (
        int.from_bytes(features, "little") & ONE_SHOT_BIT
    ):
        raise EmupmemError(
            "the boot loader does not say that it knows a choice for one start",
            "bootctl status lists what it knows; apply without --trial",
        )
    if machine.find("bootctl") is None:
        raise EmupmemError(
            "bootctl is not installed: nothing could choose the entry", "apply without --trial"
        )
    default = _default(machine)
    if not bls.value(_text(machine, default), "sort-key"):
        raise EmupmemError(
            f"{default} has no sort-key: an entry of ours beside it could become the one that boots by default",
            "apply without --trial, or give it a line like “sort-key debian”",
        )


def steps(machine: Machine, standing: Standing, words: Sequence[str]) -> Steps:
    """What makes the entry and chooses it: the one that boots by default, with `words` added.

    The words of new kernels are written down where kernel-install would take those of the running boot: of the
    trial. Raises EmupmemError.
    """
    default = _default(machine)
    name = f"{default.rpartition('/')[0]}/{TRIAL_ENTRY}"
    before = machine.read(name)
    after = entry(_text(machine, default), words).encode("utf-8", "surrogateescape")
    edits = [*loader.kept_source(machine, standing), FileEdit(name, before, after)]
    chosen = () if standing.chosen else (CHOOSE,)
    return Steps(tuple(e for e in edits if e.before != e.after), chosen, (), (FORGET,) if chosen else ())


def entry(text: str, words: Sequence[str]) -> str:
    """The trial's entry, made of the one that boots by default."""
    items = [i for w in words if w.startswith("memmap=") for i in w.removeprefix("memmap=").split(",")]
    extra = [w for w in words if not w.startswith("memmap=")]
    after = bls.rework_entry(text, items, extra)
    bls.prove(bls.options(text), bls.options(after), items, extra)
    kept = [x for x in after.split("\n") if not re.match(r"\s*(#|title\s|sort-key\s)", x)]
    head = [f"{MARK} {' '.join(words)}", f"title Trial of emupmem: {' '.join(words)}", f"sort-key {SORT_KEY}"]
    return "\n".join([*head, *kept])


@dataclass(frozen=True, slots=True)
class Entry:
    """The trial's entry: its file, the added words, and whether its kernel is there."""

    file: str
    words: tuple[str, ...]
    starts: bool


def read(machine: Machine) -> Entry | None:
    """The trial's entry, None where there is none."""
    name = loader.trial_file(machine)
    text = machine.peek(name) if name else ""
    found = re.search(rf"^{re.escape(MARK)} (memmap=\S+(?: \S+)*)$", text, re.MULTILINE)
    if found is None:
        return None
    kernel = f"{name.removesuffix(f'/loader/entries/{TRIAL_ENTRY}')}/{bls.value(text, 'linux').lstrip('/')}"
    return Entry(name, tuple(found[1].split(" ")), machine.exists(kernel))


def _default(machine: Machine) -> str:
    """The file of the entry that boots by default."""
    default = loader.SystemdBoot().standing(machine).default
    files = [n for n in loader.entry_files(machine) if default and n.endswith(f"/{default.ids[0]}.conf")]
    if len(files) != 1:
        raise EmupmemError("which entry boots by default cannot be told", "apply without --trial")
    return files[0]


def _text(machine: Machine, name: str) -> str:
    return (machine.read(name) or b"").decode("utf-8", "surrogateescape")
