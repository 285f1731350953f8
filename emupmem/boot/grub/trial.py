# SPDX-License-Identifier: Apache-2.0
"""A trial boot: one extra entry in GRUB's menu (or systemd-boot's: see `systemd_boot`), chosen for one start.

Nothing is permanent.

GRUB forgets the choice (`next_entry` of its environment block) before it starts the kernel, so a
machine that hangs, panics or is switched off comes back with its old configuration. That needs a
place that GRUB itself can write to: it reads RAID, LVM, btrfs and others, and cannot write there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from emupmem.boot import entry as boot_entry
from emupmem.boot import foreign
from emupmem.boot.grub import environment
from emupmem.boot.grub import menu as grub_menu
from emupmem.device.blocks import Mounted, mount_of, mounts, stack
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError
from emupmem.system import backups
from emupmem.system.host import Host

ID = "emupmem-trial"
SCRIPT = "/etc/grub.d/42_emupmem_trial"
NEXT = "next_entry"
MARK = "# emupmem-trial:"
BLOCK = 1024
BEGINS = b"# GRUB Environment Block\n"
"""What GRUB takes for its environment block (grub-core/lib/envblk.c)."""
HEAD = f"""#!/bin/sh
# Written by emupmem: one entry for one trial start. `emupmem confirm` makes its reservation permanent,
# `emupmem abandon` deletes it. Once its kernel is removed, there is no entry.
{MARK} @WORDS@
for file in @FILES@; do [ -e "$file" ] || exit 0; done
exec tail -n +7 "$0"
"""

WRITABLE = ("ext2", "ext3", "ext4", "xfs", "vfat")
"""File systems on which GRUB can overwrite the block that is there (grub-core/commands/loadenv.c)."""


def script(
    cfg: str,
    grubenv: Mapping[str, str],
    words: Sequence[str],
    variable: str,
    there: Callable[[str], bool] = lambda path: False,
) -> str:
    """The script that makes the entry: the one that boots by default, with `words` added.

    `there` tells whether a file is on this machine: the entry is made only while its kernel is.
    Raises EmupmemError where the default entry cannot be told.
    """
    default = default_to_try(cfg, grubenv)
    head, body = entry_text_of(cfg, default)
    added = " ".join(words)
    # GRUB_SAVEDEFAULT would make an entry that a person chose the default for good; Ubuntu's initrdfail
    # (10_linux there, GRUB_FORCE_PARTUUID) starts an entry again with its initramfs if it failed without.
    kept = [line for line in body if line.strip() not in ("savedefault", "initrdfail")]
    if len(kept) < len(body) and any(line.strip() == "initrdfail" for line in body):
        kept.insert(0, "\tset initrdfail=1")
    text = "\n".join(with_words(line, added) if _starts(line, grub_menu.LINUX) else line for line in kept)
    files = [found for path in files_of_entry(default, body) if (found := local_path(path, there))]
    top = HEAD.replace("@WORDS@", f"{variable} {added}").replace("@FILES@", shlex.join(files))
    return f"{top}menuentry 'Trial of emupmem: {added}'{_rights(head)} --id {ID} {{\n{text}\n}}\n"


def default_to_try(cfg: str, grubenv: Mapping[str, str]) -> boot_entry.BootEntry:
    """What boots by default, a choice for one start left aside. Raises EmupmemError."""
    found = grub_menu.default_entry(cfg, {k: v for k, v in grubenv.items() if k != NEXT})
    if found is None or not found.ours:
        raise EmupmemError(
            "cannot determine the default boot entry from the menu",
            "apply without --trial, or set GRUB_DEFAULT=0",
        )
    if "$" in found.kernel:
        raise EmupmemError(
            f"the default boot entry “{found.title}” takes its kernel from a variable ({found.kernel})",
            "apply without --trial",
        )
    return found


def entry_text_of(cfg: str, entry: boot_entry.BootEntry) -> tuple[str, list[str]]:
    """The line that opens an entry, and the lines between its braces."""
    lines = cfg.split("\n")
    first = next(n for n in range(entry.line - 1, -1, -1) if lines[n].lstrip().startswith("menuentry "))
    depth, last = 0, first
    for last in range(first, len(lines)):
        line = lines[last].strip()
        depth += line.endswith("{")
        depth -= line == "}"
        if depth == 0:
            break
    return lines[first], lines[first + 1 : last]


def _starts(line: str, commands: Sequence[str]) -> bool:
    return line.split(None, 1)[:1] != [] and line.split(None, 1)[0] in commands


def with_words(line: str, words: str) -> str:
    """A command line with words added: before a `--`, after which all is init's."""
    dashes = re.search(r"\s--(?=\s|$)", line)
    at = dashes.start() if dashes else len(line.rstrip())
    return f"{line[:at].rstrip()} {words}{line[at:].rstrip()}"


def _rights(opening: str) -> str:
    """Who may start an entry, with its blank before it: with superusers set, an entry without asks for a password."""
    words = grub_menu.split_words(opening)
    users = [w for w in words if w.startswith("--users=")]
    users += [f"--users={b}" for a, b in pairwise(words) if a == "--users"]
    unrestricted = ["--unrestricted"] if "--unrestricted" in words else []
    return "".join(f" {shlex.quote(w)}" for w in (*unrestricted, *users))


def files_of_entry(entry: boot_entry.BootEntry, body: Sequence[str]) -> list[str]:
    """The kernel and the initial disks of an entry, as GRUB names them."""
    disks = [w for line in body if _starts(line, _INITRD) for w in grub_menu.split_words(line)[1:]]
    return list(dict.fromkeys((entry.kernel, *disks)))


_INITRD = ("initrd", "initrd16", "initrdefi")


def local_path(path: str, there: Callable[[str], bool]) -> str:
    """A path of GRUB's as Linux sees it (with a /boot of its own, GRUB's begin below it); empty if it is not there."""
    return next((p for p in (path, f"/boot{path}") if there(p)), "")


def read_script(text: str) -> tuple[str, tuple[str, ...]] | None:
    """(variable, added words) of a script of ours, None for another text."""
    found = re.search(
        rf"^{re.escape(MARK)} (GRUB_CMDLINE_LINUX(?:_DEFAULT)?) (memmap=\S+(?: \S+)*)$", text, re.M
    )
    return (found[1], tuple(found[2].split(" "))) if found else None


def problem(cfg: str, words: Sequence[str]) -> str:
    """What is wrong with the trial entry of a generated menu that should add `words`; empty where all is well."""
    found = [e for e in grub_menu.entries(cfg) if e.ids[-1:] == (ID,)]
    if not words:
        return "the trial entry is still in it" if found else ""
    if not found:
        return "the trial entry is not in it"
    if len({e.index for e in found}) > 1:
        return "the trial entry is in it more than once"
    wanted = [i.text for i in parse_command_line(" ".join(words)).reservations]
    for entry in found:
        have = [i.text for i in entry.command_line.reservations]
        if have != wanted or not set(words) <= set(entry.words):
            return f"the trial entry has {' '.join(entry.words)} and should have {' '.join(words)}"
        if boot_entry.too_long(entry):
            return f"the trial entry: {boot_entry.TOO_LONG}"
    return ""


def menu_or_copy(machine: Host) -> str:
    """The boot menu; where a run that was killed tore it, the whole copy beside it."""
    name = environment.grub_cfg(machine)
    text = machine.text(name)
    if not grub_menu.whole(text) and backups.is_aside(machine, name):
        return (backups.read_aside(machine, name) or b"").decode("utf-8", "surrogateescape")
    return text


def chosen(machine: Host) -> bool:
    """Whether the next start is the trial."""
    return environment.grubenv(machine).get(NEXT) == ID


def obstacle(machine: Host) -> tuple[str, str]:
    """(why GRUB could not forget a choice by itself, what cures that); two empty strings where it can.

    It overwrites the blocks of a file that is there (save_env, grub-core/commands/loadenv.c), and only if the
    menu tells it to. Raises EmupmemError where the menu or the file may not be read.
    """
    if machine.exists(foreign.PROXMOX_ESPS):
        return "it reads its environment block from the partitions of proxmox-boot-tool", ""
    cfg = menu_or_copy(machine)
    if f"save_env {NEXT}" not in cfg or "load_env" not in cfg:
        return f"the menu does not clear {NEXT}", ""
    name = environment.grubenv_name(machine)
    data = machine.read(name)
    create = f"sudo {'grub2-editenv' if '/grub2/' in name else 'grub-editenv'} {name} create"
    if data is None:
        return f"there is no {name}", create
    if len(data) != BLOCK or not data.startswith(BEGINS):
        return f"{name} is no environment block", create
    on = mount_of(mounts(machine), machine.real(name))
    if on is None:
        return f"cannot determine which file system {name} is on", ""
    why = _unwritable(machine, on)
    return (f"{name} is on {why}", "") if why else ("", "")


def _unwritable(machine: Host, on: Mounted) -> str:
    """Why GRUB cannot write to a file system, empty where it can."""
    if on.fs not in WRITABLE:
        return f"{on.fs}, which GRUB only reads"
    if "ro" in on.options:
        return f"{on.source}, which is mounted read-only"
    kinds = stack(machine, on.number)
    return f"{on.source} ({', '.join(kinds)}), which GRUB is not sure to write to" if kinds else ""


def is_in_menu(machine: Host) -> bool:
    """Whether the entry is in the menu; what we may not read is taken for good."""
    try:
        data = machine.read(environment.grub_cfg(machine))
    except EmupmemError:
        return True
    return f"--id {ID} " in (data or b"").decode("utf-8", "replace")
