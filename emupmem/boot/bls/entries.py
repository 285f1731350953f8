# SPDX-License-Identifier: Apache-2.0
"""Entries of the Boot Loader Specification: which are this system's, which boots by default."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from emupmem.boot.bls import menu as bls_menu
from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.files import BOOT_FOLDERS, TRIAL_ENTRY, entry_files, entry_text
from emupmem.boot.bls.sources import KERNEL_CMDLINE
from emupmem.boot.efi import SELECTED, efi_text, one_shot
from emupmem.boot.entry import BootEntry
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import Command, CommandLine, EmupmemError, RootOnly
from emupmem.system.errors import SUDO
from emupmem.system.host import Host

SNAPSHOT = re.compile(r"(?:\A|/)\.snapshots/\d+/snapshot\Z")
"""How a subvolume of snapper's ends."""

FORGET_TRIAL = Command(("bootctl", "set-oneshot", ""), "forget the choice of the trial")

BOOTCTL_LIST = ("bootctl", "list", "--json=short")


def trial_chosen(machine: Host) -> bool:
    """Whether the next start takes the trial."""
    return one_shot(machine) == TRIAL_ENTRY


def is_of_this_system(machine: Host, name: str, text: str, running: CommandLine) -> bool:
    """Whether an entry starts this system, and not another one that shares the partition.

    By the machine's id or its entry token where the entry tells one, else by the root file system.
    """
    if not bls_text.value(text, "linux") or is_of_another_snapshot(machine, text):
        return False
    ident = machine.peek("/etc/machine-id").strip()
    told = bls_text.value(text, "machine-id")
    if told:
        return told == ident
    stem = name.rpartition("/")[2]
    return is_named_or_roots_here(machine, stem, bls_text.options(text), running)


def is_named_or_roots_here(machine: Host, stem: str, line: str, running: CommandLine) -> bool:
    """Whether something to boot is this system's: by the entry token in its name, else by the root file system."""
    token = machine.peek("/etc/kernel/entry-token").strip() or machine.peek("/etc/machine-id").strip()
    if token and stem.startswith(f"{token}-"):
        return True
    if re.match(r"[0-9a-f]{32}-", stem):
        return False  # another machine's
    return _root_words(line) == _root_words(running.text)


def is_of_same_root(machine: Host, name: str, line: str, running: CommandLine) -> bool:
    """Whether an entry of GRUB's starts this system: by the machine's id in its name, else by the root file system.

    An image's first entries have the id of the machine that it was built on. `line` is what GRUB makes of its words.
    """
    ident = machine.peek("/etc/machine-id").strip()
    if ident and name.rpartition("/")[2].startswith(f"{ident}-"):
        return True
    return _root_words(line) == _root_words(running.text)


def own_line(machine: Host) -> CommandLine:
    """A command line that starts this system: of this boot; in a tree /etc/kernel/cmdline, else the default entry."""
    if machine.running:
        return parse_command_line(machine.peek("/proc/cmdline"))
    texts = {bls_menu.id_of(n): entry_text(machine, n) for n in entry_files(machine)}
    menu = [
        bls_text.options(texts[n])
        for n in bls_menu.menu_names(machine)
        if n in texts and bls_text.value(texts[n], "linux")
    ]
    here = [line for line in menu if f"root={root_of_fstab(machine)}" in parse_command_line(line).words]
    lines = (bls_text.file_line(machine.peek(KERNEL_CMDLINE)), *here, *menu)
    return parse_command_line(next((line for line in lines if "root=" in line), ""))


def root_of_fstab(machine: Host) -> str:
    """What /etc/fstab mounts at /, empty where it does not say."""
    lines = [x.split("#")[0].split() for x in machine.peek("/etc/fstab").splitlines()]
    return next((f[0] for f in lines if len(f) > 1 and f[1] == "/"), "")


def is_of_another_snapshot(machine: Host, text: str) -> bool:
    """Whether an entry starts a snapshot of snapper's that is not the one that runs (or boots by default in a tree)."""
    theirs, here = subvolume(bls_text.options(text)), _subvolume_here(machine)
    return bool(theirs and here and SNAPSHOT.search(theirs) and theirs != here)


def subvolume(line: str) -> str:
    """The subvolume that a command line names in its rootflags, empty where it names none."""
    return _subvolume_of(_root_flags(line))


def _root_flags(line: str) -> list[str]:
    words = parse_command_line(line).words
    return [f for w in words if w.startswith("rootflags=") for f in w[10:].split(",")]


def _subvolume_of(options: Sequence[str]) -> str:
    named = [o.removeprefix("subvol=").strip("/") for o in options if o.startswith("subvol=")]
    return named[-1] if named else ""


def _subvolume_here(machine: Host) -> str:
    """The subvolume of /: of the kernel that runs, else as it is mounted; of a tree, as its own files say."""
    if machine.running:
        named = subvolume(machine.peek("/proc/cmdline"))
        return named or _mounted_subvolume(machine.peek("/proc/self/mountinfo"))
    default = _default_of_tree(machine)
    lines = [bls_text.options(default), bls_text.file_line(machine.peek(KERNEL_CMDLINE))]
    rows = [x.split() for x in machine.peek("/etc/fstab").splitlines()]
    root = [r[3].split(",") for r in rows if len(r) > 3 and r[1] == "/"]
    return next((s for s in [*map(subvolume, lines), *map(_subvolume_of, root)] if s), "")


def _mounted_subvolume(mountinfo: str) -> str:
    """The subvolume that is mounted as /: the last line for it counts. Source: proc_pid_mountinfo(5)."""
    rows = [x.split() for x in mountinfo.splitlines()]
    root = [r for r in rows if len(r) > 4 and r[4] == "/" and "btrfs" in r]
    return root[-1][3].strip("/") if root else ""


def _default_of_tree(machine: Host) -> str:
    """The entry that loader.conf of a tree names, empty where it names none, or one of those that match."""
    for folder in BOOT_FOLDERS:
        wanted = bls_text.value(machine.peek(f"{folder}/loader/loader.conf"), "default").removesuffix(".conf")
        files = (
            [n for n in entry_files(machine, (folder,)) if fnmatchcase(stem_of(n), wanted)] if wanted else []
        )
        if len(files) == 1:
            return entry_text(machine, files[0])
    return ""


def stem_of(name: str) -> str:
    """What a loader calls an entry: boot counting puts +LEFT-DONE behind the name of its file."""
    return re.sub(r"(?:\+\d+(?:-\d+)?)?(?:\.(?i:conf))?\Z", "", name.rpartition("/")[2])


def _root_words(text: str) -> list[str]:
    """What tells the root file system and how it is found; of its flags only the subvolume: `@` is `/@`."""
    words = parse_command_line(text).words
    root = [w for w in words if w.startswith("root=")][-1:]
    given = dict(f.partition("=")[::2] for f in _root_flags(text))
    named = next((k for k in ("subvol", "subvolid") if k in given), "")  # the kernel's: either may come alone
    flags = [f"{k}={v.strip('/')}" for k, v in sorted(given.items()) if k == named or "/" in v]
    # casper and live: a rescue system that shares the partition
    boot = [w for w in words if w.startswith("boot=")][-1:]
    return [*root, *flags, *boot]


def bls_entry(name: str, text: str, line: str, ours: bool) -> BootEntry:
    """An entry as `grubcfg` describes those of GRUB; `line` is its command line after the loader's own reading."""
    stem = stem_of(name)
    at = next((n for n, x in enumerate(text.split("\n"), 1) if x.lstrip().startswith("options")), 1)
    version = bls_text.value(text, "version").rpartition("@")[2]
    words = parse_command_line(line).words
    title = bls_text.value(text, "title") or stem
    return BootEntry((title,), (stem,), (0,), bls_text.value(text, "linux"), words, at, False, ours, version)


def default_entry_of(machine: Host, entries: Sequence[BootEntry]) -> BootEntry | None:
    """The entry that boots by itself: as bootctl says, else the one that started this boot, else its kernel's.

    In a tree: as loader.conf says, else the first one of systemd-boot's menu.
    """
    ours = [e for e in entries if e.ours]
    wanted = (
        [default_id(machine), efi_text(machine, SELECTED)]
        if machine.running
        else bls_menu.menu_names(machine)
    )
    names = [_plain_id(n) for n in wanted]
    by_name = [e for n in names if n for e in ours if e.ids[0] == n or _is_image(e.ids[0], n)]
    release = machine.peek("/proc/sys/kernel/osrelease") if machine.running else ""
    by_kernel = [e for e in ours if release and e.version == release]
    return next(iter([*by_name, *by_kernel, *ours]), None)


def _is_image(ident: str, name: str) -> bool:
    """Whether a name is that of an image: systemd-boot tells them in lower case."""
    return ident.endswith(".efi") and ident.lower() == name.lower()


def _plain_id(name: str) -> str:
    """A name of the menu as entries have it: printable, without .conf; of an image without its profile (`@1`)."""
    plain = bls_menu.id_of(re.sub(r"[^\x20-\x7e]", "", name)).removesuffix(".conf")
    return re.sub(r"(?<=\.efi)@\d+\Z", "", plain)


def default_id(machine: Host) -> str:
    """What bootctl calls the default (an entry's file, or a unified kernel image's), empty where it does not."""
    done = machine.output(*BOOTCTL_LIST) if machine.running else None
    if done is None or done.status:
        return ""
    try:
        listed = json.loads(done.stdout)
        return next((str(e.get("id", "")) for e in listed if e.get("isDefault")), "")
    except (ValueError, AttributeError, TypeError):
        return ""


def no_entries_error(machine: Host, what: str) -> EmupmemError:
    if not machine.is_root:
        return RootOnly("the boot entries are shown to root only", SUDO)
    return EmupmemError(
        f"there are no boot entries that start this system from {what}",
        "mount the boot partition if it is not mounted (bootctl status names it)",
    )


def snapshots_kept(count: int) -> tuple[str, ...]:
    what = (
        "1 entry of another snapshot keeps its"
        if count == 1
        else f"{count} entries of other snapshots keep their"
    )
    return (f"{what} words",) if count else ()
