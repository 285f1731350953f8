"""A trial boot: one extra entry in GRUB's menu (or systemd-boot's: see `oneshot`), chosen for one start.

Nothing is permanent.

GRUB forgets the choice (`next_entry` of its environment block) before it starts the kernel, so a
machine that hangs, panics or is switched off comes back with its old configuration. That needs a
place that GRUB itself can write to: it reads RAID, LVM, btrfs and others, and cannot write there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from emupmem import foreign, grubcfg, loader, oneshot
from emupmem.blocks import Mounted, mount_of, mounts, stack
from emupmem.boot.grub import environment
from emupmem.kernel.cmdline import is_cut, parse_command_line
from emupmem.model import Command, EmupmemError
from emupmem.system import backups
from emupmem.system.machine import Machine

ID = "emupmem-trial"
SCRIPT = "/etc/grub.d/42_emupmem_trial"
NEXT = "next_entry"
MARK = "# emupmem-trial:"
PSTORE = "/var/lib/systemd/pstore"
BLOCK = 1024
BEGINS = b"# GRUB Environment Block\n"
"""What GRUB takes for its environment block (grub-core/lib/envblk.c)."""
HEAD = f"""#!/bin/sh
# Written by emupmem: one entry for one trial start. `emupmem confirm` makes its reservation permanent,
# `emupmem abandon` takes it away. Where its kernel was removed meanwhile there is no entry.
{MARK} @WORDS@
for file in @FILES@; do [ -e "$file" ] || exit 0; done
exec tail -n +7 "$0"
"""
KEXEC_MARK = "emupmem.trial=kexec,"
"""Begins the word that stands before the added ones in a kernel that kexec started, and names the variable
for a confirm: there is no entry on the disk to tell a trial by. The kernel and init pass over it."""

WRITABLE = ("ext2", "ext3", "ext4", "xfs", "vfat")
"""File systems on which GRUB can overwrite the block that is there (grub-core/commands/loadenv.c)."""


@dataclass(frozen=True, slots=True)
class State:
    """How a trial stands. `words` are the added ones (`memmap=1G!4G`, `nokaslr`).

    `chosen` says that the next start is the trial, `running` that this boot is, `started_since`
    that the machine was started after the trial was made; `why` is what a failed one left behind, or why it
    will not come. `kexec` says that nothing of it is on the disk.
    """

    words: tuple[str, ...]
    variable: str
    chosen: bool
    running: bool
    started_since: bool
    why: str = ""
    kexec: bool = False


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
    default = _default(cfg, grubenv)
    head, body = _entry(cfg, default)
    added = " ".join(words)
    # GRUB_SAVEDEFAULT would make an entry that a person chose the default for good; Ubuntu's initrdfail
    # (10_linux there, GRUB_FORCE_PARTUUID) starts an entry again with its initramfs if it failed without.
    kept = [line for line in body if line.strip() not in ("savedefault", "initrdfail")]
    if len(kept) < len(body) and any(line.strip() == "initrdfail" for line in body):
        kept.insert(0, "\tset initrdfail=1")
    text = "\n".join(_with(line, added) if _starts(line, grubcfg.LINUX) else line for line in kept)
    files = [found for path in _files(default, body) if (found := _local(path, there))]
    top = HEAD.replace("@WORDS@", f"{variable} {added}").replace("@FILES@", shlex.join(files))
    return f"{top}menuentry 'Trial of emupmem: {added}'{_rights(head)} --id {ID} {{\n{text}\n}}\n"


def _default(cfg: str, grubenv: Mapping[str, str]) -> grubcfg.BootEntry:
    """What boots by default, a choice for one start left aside. Raises EmupmemError."""
    found = grubcfg.default_entry(cfg, {k: v for k, v in grubenv.items() if k != NEXT})
    if found is None or not found.ours:
        raise EmupmemError(
            "which entry boots by default cannot be told from the menu",
            "apply without --trial, or set GRUB_DEFAULT=0",
        )
    return found


def _entry(cfg: str, entry: grubcfg.BootEntry) -> tuple[str, list[str]]:
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


def _with(line: str, words: str) -> str:
    """A command line with words added: before a `--`, after which all is init's."""
    dashes = re.search(r"\s--(?=\s|$)", line)
    at = dashes.start() if dashes else len(line.rstrip())
    return f"{line[:at].rstrip()} {words}{line[at:].rstrip()}"


def _rights(opening: str) -> str:
    """Who may start an entry, with its blank before it: with superusers set, an entry without asks for a password."""
    words = grubcfg.split_words(opening)
    users = [w for w in words if w.startswith("--users=")]
    users += [f"--users={b}" for a, b in pairwise(words) if a == "--users"]
    unrestricted = ["--unrestricted"] if "--unrestricted" in words else []
    return "".join(f" {shlex.quote(w)}" for w in (*unrestricted, *users))


def _files(entry: grubcfg.BootEntry, body: Sequence[str]) -> list[str]:
    """The kernel and the initial disks of an entry, as GRUB names them."""
    disks = [w for line in body if _starts(line, _INITRD) for w in grubcfg.split_words(line)[1:]]
    return list(dict.fromkeys((entry.kernel, *disks)))


_INITRD = ("initrd", "initrd16", "initrdefi")


def _local(path: str, there: Callable[[str], bool]) -> str:
    """A path of GRUB's as Linux sees it (with a /boot of its own, GRUB's begin below it); empty if it is not there."""
    return next((p for p in (path, f"/boot{path}") if there(p)), "")


def kexec(machine: Machine, words: Sequence[str], variable: str) -> tuple[Command, Command]:
    """What loads the kernel that boots by default with `words` added, and what starts it at once.

    Nothing on the disk changes, and any reset goes back. Raises EmupmemError where that is not possible.
    """
    if machine.find("kexec") is None:
        raise EmupmemError("kexec is not installed", "apt-get install kexec-tools, or --trial without kexec")
    lockdown = machine.peek("/sys/kernel/security/lockdown")
    if lockdown and "[none]" not in lockdown:
        raise EmupmemError(
            f"the kernel is locked down ({lockdown}) and starts only signed kernels by kexec",
            "--trial without kexec goes through GRUB",
        )
    if machine.peek("/proc/sys/kernel/kexec_load_disabled") == "1":
        raise EmupmemError(
            "kexec is switched off until the next start (kernel.kexec_load_disabled)",
            "--trial without kexec goes through GRUB",
        )
    if chosen(machine):
        raise EmupmemError(
            "the next start is chosen to be a trial already: a reset would lead into that one",
            "reboot tries it; sudo emupmem abandon takes it away",
        )
    cfg = menu(machine)
    default = _default(cfg, environment.grubenv(machine))
    names = _files(default, _entry(cfg, default)[1])
    paths = [_local(name, machine.exists) for name in names]
    if "" in paths:
        raise EmupmemError(f"the menu names {names[paths.index('')]}, which is not there")
    if len(paths) > 2:
        raise EmupmemError(
            f"the entry has {len(paths) - 1} initial disks, and kexec takes one",
            "--trial without kexec goes through GRUB",
        )
    line = _with(f"BOOT_IMAGE={default.kernel} {default.text}", " ".join((KEXEC_MARK + variable, *words)))
    if is_cut(line):
        raise EmupmemError("the command line is longer than the 2047 bytes that the kernel reads")
    initrd = (f"--initrd={paths[1]}",) if len(paths) > 1 else ()
    load = Command(("kexec", "-a", "-l", paths[0], *initrd, f"--command-line={line}"), "load the kernel")
    return load, Command(("systemctl", "kexec"), "start it: all services are stopped first")


UNLOAD = Command(("kexec", "-u"), "forget the kernel that was loaded")


def read_script(text: str) -> tuple[str, tuple[str, ...]] | None:
    """(variable, added words) of a script of ours, None for another text."""
    found = re.search(
        rf"^{re.escape(MARK)} (GRUB_CMDLINE_LINUX(?:_DEFAULT)?) (memmap=\S+(?: \S+)*)$", text, re.M
    )
    return (found[1], tuple(found[2].split(" "))) if found else None


def problem(cfg: str, words: Sequence[str]) -> str:
    """What is wrong with the trial entry of a generated menu that should add `words`; empty where all is well."""
    found = [e for e in grubcfg.entries(cfg) if e.ids[-1:] == (ID,)]
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
        if grubcfg.too_long(entry):
            return f"the trial entry: {grubcfg.TOO_LONG}"
    return ""


def menu(machine: Machine) -> str:
    """The boot menu; where a run that was killed tore it, the whole copy beside it."""
    name = environment.grub_cfg(machine)
    text = (machine.read(name) or b"").decode("utf-8", "surrogateescape")
    if not grubcfg.whole(text) and backups.is_aside(machine, name):
        return (backups.read_aside(machine, name) or b"").decode("utf-8", "surrogateescape")
    return text


def chosen(machine: Machine) -> bool:
    """Whether the next start is the trial."""
    return environment.grubenv(machine).get(NEXT) == ID


def left_over(machine: Machine) -> bool:
    """Whether the menu or GRUB's environment block still has a trial, its script being gone."""
    return chosen(machine) or bool(problem(menu(machine), ()))


def refuse(machine: Machine) -> None:
    """Raise EmupmemError where GRUB could not forget the choice by itself, with the reason."""
    if not machine.live:
        raise EmupmemError("a trial is for the running machine", "--root edits a tree")
    other = loader.of(machine)
    if other is not None:
        other.refuse_trial(machine)
        return
    why, fix = obstacle(machine)
    if why:
        again = "a trial that hangs would be started again and again; "
        raise EmupmemError(f"GRUB cannot clear its choice: {why}", again + (fix or "apply without --trial"))


def obstacle(machine: Machine) -> tuple[str, str]:
    """(why GRUB could not forget a choice by itself, what cures that); two empty strings where it can.

    It overwrites the blocks of a file that is there (save_env, grub-core/commands/loadenv.c), and only if the
    menu tells it to. Raises EmupmemError where the menu or the file may not be read.
    """
    if machine.exists(foreign.PROXMOX_ESPS):
        return "it reads its environment block from the partitions of proxmox-boot-tool", ""
    cfg = menu(machine)
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
        return f"which file system {name} is on cannot be told", ""
    why = _unwritable(machine, on)
    return (f"{name} is on {why}", "") if why else ("", "")


def _unwritable(machine: Machine, on: Mounted) -> str:
    """Why GRUB cannot write to a file system, empty where it can."""
    if on.fs not in WRITABLE:
        return f"{on.fs}, which GRUB only reads"
    if "ro" in on.options:
        return f"{on.source}, which is mounted read-only"
    kinds = stack(machine, on.number)
    return f"{on.source} ({', '.join(kinds)}), which GRUB is not sure to write to" if kinds else ""


def state(machine: Machine) -> State | None:
    """The trial of this machine, None where there is none."""
    line = parse_command_line(machine.peek("/proc/cmdline"))
    mark = next((n for n, w in enumerate(line.words) if w.startswith(KEXEC_MARK)), None)
    if mark is not None and line.words[mark + 1 :]:
        variable = line.words[mark].removeprefix(KEXEC_MARK)
        return State(line.words[mark + 1 :], variable, False, True, True, kexec=True)
    made = _made(machine)
    if made is None:
        return None
    file, variable, words, coming, in_menu = made
    booted = re.search(r"^btime (\d+)", machine.peek("/proc/stat"), re.MULTILINE)
    written = machine.modified(file)
    since = booted is not None and written is not None and int(booted[1]) > written
    wanted = [i.text for i in parse_command_line(words[0]).reservations]
    running = [i.text for i in line.reservations] == wanted
    if coming and not in_menu:
        gone = "its entry is not in the menu any more (was its kernel removed?)"
        return State(words, variable, False, running, False, gone)
    why = _last_words(machine, written or 0) if since and not running and not coming else ""
    return State(words, variable, coming, running, since, why)


def _made(machine: Machine) -> tuple[str, str, tuple[str, ...], bool, bool] | None:
    """(file that makes the entry, variable, added words, whether it is chosen, is in the menu), or None."""
    if isinstance(loader.of(machine), loader.SystemdBoot):
        entry = oneshot.read(machine)
        return (entry.file, "", entry.words, loader.trial_chosen(machine), entry.starts) if entry else None
    read = read_script(machine.peek(SCRIPT))
    return (SCRIPT, *read, chosen(machine), _in_menu(machine)) if read else None


def _in_menu(machine: Machine) -> bool:
    """Whether the entry is in the menu; what we may not read is taken for good."""
    try:
        data = machine.read(environment.grub_cfg(machine))
    except EmupmemError:
        return True
    return f"--id {ID} " in (data or b"").decode("utf-8", "replace")


def _last_words(machine: Machine, since: float) -> str:
    """What the start before this one left behind: a panic in pstore (moved by systemd-pstore) or in the journal."""
    folders = ["/sys/fs/pstore", PSTORE]
    folders += [f"{PSTORE}/{n}" for n in machine.names(PSTORE)]
    names = [f"{folder}/{n}" for folder in folders for n in machine.names(folder)]
    texts = [machine.peek(n) for n in names if (machine.modified(n) or 0) >= since]
    done = machine.output("journalctl", "-k", "-b", "-1", "-o", "cat", "--no-pager") if machine.live else None
    if done is not None and not done.status:
        texts.append(done.stdout.decode("utf-8", "replace"))
    for text in texts:
        found = re.search(r"Kernel panic - not syncing.*", text)
        if found:
            return found[0]
    return "it hung, panicked or was switched off; its log was not kept"
