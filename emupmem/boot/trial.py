# SPDX-License-Identifier: Apache-2.0
"""A trial boot: how it stands, whatever the loader."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emupmem.boot import detect
from emupmem.boot.grub import environment
from emupmem.boot.grub.trial import (
    chosen,
    default_to_try,
    entry_text_of,
    files_of_entry,
    local_path,
    menu_or_copy,
    with_words,
)
from emupmem.kernel.cmdline import is_cut, parse_command_line
from emupmem.model import Command, EmupmemError
from emupmem.record import record
from emupmem.system.distribution import install_hint
from emupmem.system.host import Host

PSTORE = "/var/lib/systemd/pstore"
KEXEC_MARK = "emupmem.trial=kexec,"
"""Begins the word that stands before the added ones in a kernel that kexec started, and names the variable
for a confirm: there is no entry on the disk to tell a trial by. The kernel and init pass over it."""


@record
class State:
    """How a trial stands. `words` are the added ones (`memmap=1G!4G`, `nokaslr`).

    `chosen` says that the next start is the trial, `running` that this boot is, `started_since`
    that the machine was started after the trial was made; `why` is what a failed one left behind, or why it
    will not come. `kexec` says that nothing of it is on the disk, `again` that the loader does not forget it: each
    start is the trial, until it is confirmed or abandoned.
    """

    words: tuple[str, ...]
    variable: str
    chosen: bool
    running: bool
    started_since: bool
    why: str = ""
    kexec: bool = False
    again: bool = False

    @property
    def stage(self) -> str:
        """`running`, `waiting` for the next start, or `over`: the machine came back without it, or it will not come."""
        if self.running:
            return "running"
        return "waiting" if self.chosen and not self.why else "over"


def kexec(machine: Host, words: Sequence[str], variable: str) -> tuple[Command, Command]:
    """What loads the kernel that boots by default with `words` added, and what starts it at once.

    Nothing on the disk changes, and any reset goes back. Raises EmupmemError where that is not possible.
    """
    if machine.find("kexec") is None:
        hint = f"{install_hint(machine, 'kexec')}, or --trial without kexec"
        raise EmupmemError("kexec is not installed", hint)
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
            "reboot to try it, or cancel it with sudo emupmem abandon",
        )
    cfg = menu_or_copy(machine)
    default = default_to_try(cfg, environment.grubenv(machine))
    names = files_of_entry(default, entry_text_of(cfg, default)[1])
    paths = [local_path(name, machine.exists) for name in names]
    if "" in paths:
        raise EmupmemError(f"the menu names {names[paths.index('')]}, which is not there")
    if len(paths) > 2:
        raise EmupmemError(
            f"the entry has {len(paths) - 1} initial disks, and kexec takes one",
            "--trial without kexec goes through GRUB",
        )
    line = with_words(
        f"BOOT_IMAGE={default.kernel} {default.text}", " ".join((KEXEC_MARK + variable, *words))
    )
    if is_cut(line):
        raise EmupmemError("the command line is longer than the 2047 bytes that the kernel reads")
    initrd = (f"--initrd={paths[1]}",) if len(paths) > 1 else ()
    load = Command(("kexec", "-a", "-l", paths[0], *initrd, f"--command-line={line}"), "load the kernel")
    return load, Command(("systemctl", "kexec"), "start it: all services are stopped first")


UNLOAD = Command(("kexec", "-u"), "forget the kernel that was loaded")


def refuse_trial(machine: Host, entry: bool = True) -> None:
    """Raise EmupmemError where a trial is not possible: by an `entry` of the menu, or by kexec.

    Where the loader could not forget the choice by itself, with the reason.
    """
    if not machine.live:  # kexec would start the kernel of another machine on this one
        raise EmupmemError("a trial is for the running machine", "--root edits a tree")
    by = detect.of(machine)
    if entry:
        by.refuse_trial(machine)
    else:
        by.refuse_kexec(machine)


def state(machine: Host) -> State | None:
    """The trial of this machine, None where there is none."""
    line = parse_command_line(machine.peek("/proc/cmdline"))
    mark = next((n for n, w in enumerate(line.words) if w.startswith(KEXEC_MARK)), None)
    if mark is not None and line.words[mark + 1 :]:
        variable = line.words[mark].removeprefix(KEXEC_MARK)
        return State(line.words[mark + 1 :], variable, False, True, True, kexec=True)
    by = detect.of(machine)
    made = by.trial(machine)
    if made is None:
        return None
    words, variable, coming = made.words, made.variable, made.chosen
    booted = re.search(r"^btime (\d+)", machine.peek("/proc/stat"), re.MULTILINE)
    written = machine.modified(made.file)
    since = booted is not None and written is not None and int(booted[1]) > written
    if made.this_boot is not None:
        since = not made.this_boot
    wanted = [i.text for i in parse_command_line(words[0]).reservations]
    running = [i.text for i in line.reservations] == wanted
    if coming and not made.starts:
        gone = "its entry is not in the menu any more (was its kernel removed?)"
        return State(words, variable, False, running, False, gone)
    again = coming and not by.forgets
    over = since and not running and (again or not coming)
    why = _last_words(machine, written or 0) if over else ""
    return State(words, variable, coming, running, since, why, again=again)


def _last_words(machine: Host, since: float) -> str:
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
