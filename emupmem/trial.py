"""A trial boot: one extra entry in GRUB's menu, chosen for one start, and nothing permanent.

GRUB forgets the choice (`next_entry` of its environment block) before it starts the kernel, so a
machine that hangs, panics or is switched off comes back with its old configuration. That needs a
place that GRUB itself can write to: it reads RAID, LVM, btrfs and others, and cannot write there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emupmem import grubcfg, loader
from emupmem.blocks import Mounted, mount_of, mounts
from emupmem.cmdline import parse_command_line
from emupmem.machine import Machine
from emupmem.model import Command, EmupmemError

ID = "emupmem-trial"
SCRIPT = "/etc/grub.d/42_emupmem_trial"
NEXT = "next_entry"
MARK = "# emupmem-trial:"
HEAD = f"""#!/bin/sh
# Written by emupmem: one entry for one trial start. `emupmem confirm` makes its reservation permanent,
# `emupmem abandon` takes it away.
{MARK} @WORDS@
exec tail -n +6 "$0"
"""
KEXEC_WORD = "emupmem.trial=kexec"
"""What a kernel that was started by kexec carries: there is no entry on the disk to tell it by."""

WRITABLE = ("ext2", "ext3", "ext4", "xfs", "vfat")
"""File systems on which GRUB can overwrite the block that is there (grub-core/commands/loadenv.c)."""


@dataclass(frozen=True, slots=True)
class Script:
    """The text of the script and the words of its kernel, the reservation included."""

    text: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class State:
    """How a trial stands. `words` are the added ones (`memmap=1G!4G`, `nokaslr`).

    `chosen` says that the next start is the trial, `running` that this boot is, `started_since`
    that the machine was started after the trial was made; `why` is what a failed one left behind.
    """

    words: tuple[str, ...]
    variable: str
    chosen: bool
    running: bool
    started_since: bool
    why: str = ""


def script(cfg: str, grubenv: Mapping[str, str], words: Sequence[str], variable: str) -> Script:
    """The script that makes the entry: the one that boots by default, with `words` added.

    Raises EmupmemError where the default entry cannot be told.
    """
    default = grubcfg.default_entry(cfg, {k: v for k, v in grubenv.items() if k != NEXT})
    if default is None or not default.ours:
        raise EmupmemError(
            "which entry boots by default cannot be told from the menu",
            "apply without --trial, or set GRUB_DEFAULT=0",
        )
    lines = cfg.split("\n")
    first = next(n for n in range(default.line - 1, -1, -1) if lines[n].lstrip().startswith("menuentry "))
    depth, last = 0, first
    for last in range(first, len(lines)):
        line = lines[last].strip()
        depth += line.endswith("{")
        depth -= line == "}"
        if depth == 0:
            break
    body = lines[first + 1 : last]
    at = default.line - 1 - (first + 1)
    body[at] = f"{body[at].rstrip()} {' '.join(words)}"
    added = " ".join(words)
    text = HEAD.replace("@WORDS@", f"{variable} {added}")
    text += f"menuentry 'Trial of emupmem: {added}' --id {ID} {{\n" + "\n".join(body) + "\n}\n"
    return Script(text, (*default.words, *words))


def kexec(machine: Machine, words: Sequence[str]) -> tuple[Command, Command]:
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
        raise EmupmemError("kexec is switched off until the next start (kernel.kexec_load_disabled)")
    cfg = (machine.read(machine.grub_cfg()) or b"").decode("utf-8", "surrogateescape")
    default = grubcfg.default_entry(cfg, {k: v for k, v in machine.grubenv().items() if k != NEXT})
    if default is None or not default.ours:
        raise EmupmemError("which kernel boots by default cannot be told from the menu", "set GRUB_DEFAULT=0")
    lines = cfg.split("\n")[default.line :]
    until = next((n for n, line in enumerate(lines) if line.strip() == "}"), len(lines))
    disks = [
        w for line in lines[:until] for w in grubcfg.split_words(line)[1:] if line.split()[:1] == ["initrd"]
    ]
    paths = [_on_this_machine(machine, p) for p in (default.kernel, *disks[:1])]
    line = f"BOOT_IMAGE={default.kernel} {default.text} {' '.join(words)} {KEXEC_WORD}"
    initrd = (f"--initrd={paths[1]}",) if len(paths) > 1 else ()
    load = Command(("kexec", "-a", "-l", paths[0], *initrd, f"--command-line={line}"), "load the kernel")
    return load, Command(("systemctl", "kexec"), "start it: all services are stopped first")


def _on_this_machine(machine: Machine, path: str) -> str:
    """A path of GRUB's as Linux sees it: with a /boot of its own, GRUB's begin below it."""
    found = next((p for p in (path, f"/boot{path}") if machine.exists(p)), None)
    if found is None:
        raise EmupmemError(f"the menu names {path}, which is not there")
    return found


def read_script(text: str) -> tuple[str, tuple[str, ...]] | None:
    """(variable, added words) of a script of ours, None for another text."""
    found = re.search(
        rf"^{re.escape(MARK)} (GRUB_CMDLINE_LINUX(?:_DEFAULT)?) (memmap=\S+(?: \S+)*)$", text, re.M
    )
    return (found[1], tuple(found[2].split(" "))) if found else None


def problem(cfg: str, words: Sequence[str]) -> str:
    """What is wrong with the trial entry of a generated menu; empty where all is well."""
    found = [e for e in grubcfg.entries(cfg) if e.ids[-1:] == (ID,)]
    if not words:
        return "the trial entry is still in it" if found else ""
    if len(found) != 1:
        return "the trial entry is not in it" if not found else "the trial entry is in it more than once"
    if found[0].words != tuple(words):
        return f"the trial entry has {' '.join(found[0].words)} instead of {' '.join(words)}"
    return ""


def menu(machine: Machine) -> str:
    """The boot menu; where a run that was killed tore it, the whole copy beside it."""
    name = machine.grub_cfg()
    text = (machine.read(name) or b"").decode("utf-8", "surrogateescape")
    if not grubcfg.whole(text) and machine.is_aside(name):
        return (machine.read_aside(name) or b"").decode("utf-8", "surrogateescape")
    return text


def chosen(machine: Machine) -> bool:
    """Whether the next start is the trial."""
    return machine.grubenv().get(NEXT) == ID


def left_over(machine: Machine) -> bool:
    """Whether the menu or GRUB's environment block still has a trial, its script being gone."""
    return chosen(machine) or bool(problem(menu(machine), ()))


def refuse(machine: Machine) -> None:
    """Raise EmupmemError where GRUB could not forget the choice by itself, with the reason."""
    if not machine.live:
        raise EmupmemError("a trial is for the running machine", "--root edits a tree")
    other = loader.of(machine)
    if other is not None:
        raise EmupmemError(
            f"a trial is an entry in the menu that grub-mkconfig makes, and {other.title} starts this machine",
            "apply without --trial; " + other.back.format(memmap="memmap=…") + " goes back",
        )
    folder = machine.grub_cfg().rpartition("/")[0]
    cfg = menu(machine)
    if f"save_env {NEXT}" not in cfg or "load_env" not in cfg:
        raise EmupmemError(
            f"the menu does not clear {NEXT}: GRUB cannot write to its environment block here",
            "a trial that hangs would be started again and again; apply without --trial",
        )
    on = mount_of(mounts(machine), machine.real(folder))
    if on is None:
        raise EmupmemError(f"which file system {folder} is on cannot be told", "apply without --trial")
    why = _unwritable(machine, on)
    if why:
        raise EmupmemError(
            f"GRUB cannot clear its choice: {folder} is on {why}",
            "a trial that hangs would be started again and again; apply without --trial",
        )


def _unwritable(machine: Machine, on: Mounted) -> str:
    """Why GRUB cannot write to a file system, empty where it can."""
    if on.fs not in WRITABLE:
        return f"{on.fs}, which GRUB only reads"
    if "ro" in on.options:
        return f"{on.source}, which is mounted read-only"
    parts = machine.path(f"/sys/dev/block/{on.number}").parts
    for part in parts:
        if re.fullmatch(r"dm-\d+", part):
            return f"{on.source}, a device of LVM or LUKS, which GRUB only reads"
        if re.fullmatch(r"md\d+.*", part):
            return f"{on.source}, a RAID, which GRUB only reads"
    return ""


def state(machine: Machine) -> State | None:
    """The trial of this machine, None where there is none."""
    line = parse_command_line(machine.peek("/proc/cmdline"))
    if KEXEC_WORD in line.words:
        added = tuple(w for w in line.words if w.startswith("memmap=") or w == "nokaslr")
        return State(added, "GRUB_CMDLINE_LINUX", False, True, True)
    read = read_script(machine.peek(SCRIPT))
    if read is None:
        return None
    variable, words = read
    booted = re.search(r"^btime (\d+)", machine.peek("/proc/stat"), re.MULTILINE)
    written = machine.modified(SCRIPT)
    since = booted is not None and written is not None and int(booted[1]) > written
    wanted = [i.text for i in parse_command_line(words[0]).reservations]
    running = [i.text for i in line.reservations] == wanted
    chosen = machine.grubenv().get(NEXT) == ID
    why = _last_words(machine) if since and not running and not chosen else ""
    return State(words, variable, chosen, running, since, why)


def _last_words(machine: Machine) -> str:
    """What the start before this one left behind: a panic in pstore or in the journal."""
    texts = [machine.peek(f"/sys/fs/pstore/{n}") for n in machine.names("/sys/fs/pstore")]
    done = machine.output("journalctl", "-k", "-b", "-1", "-o", "cat", "--no-pager") if machine.live else None
    if done is not None and not done.status:
        texts.append(done.stdout.decode("utf-8", "replace"))
    for text in texts:
        found = re.search(r"Kernel panic - not syncing.*", text)
        if found:
            return found[0]
    return "it hung, panicked or was switched off; its log was not kept"
