# SPDX-License-Identifier: Apache-2.0
"""Carrying out a change on a machine that another loader starts than GRUB with grub-mkconfig.

Files are replaced by rename, then the loader's own program runs, then all entries are read again and judged;
whatever goes wrong puts everything back. Each entry is whole at every moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from emupmem.boot import loader
from emupmem.boot.bls import files as bls_files
from emupmem.boot.bls import sources
from emupmem.boot.grub import environment
from emupmem.model import UNCHANGED, Command, EmupmemError
from emupmem.system import backups
from emupmem.system import files as system_files
from emupmem.system.backups import BACKUPS, stamp
from emupmem.system.lock import Interrupts
from emupmem.system.machine import Machine

GENERATOR_SECONDS = 600
"""How long a program that writes a boot menu may take."""

KERNEL_FOLDER = "/etc/kernel"
LEFT_BY_PROGRAMS = re.compile(r"sed[A-Za-z0-9]{6}|grubenv\.new")
"""What sed -i and grub-editenv write first, and leave where they are killed."""

WORDS_RECORD = f"{BACKUPS}/words"
"""Words beside memmap= that an apply added where no former bytes tell them."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What a change does: the steps, how the next start stood before, and our items afterwards.

    `extra` and `drop` are words beside the reservation that come and go, `trial` those of the entry for a trial
    boot (empty: there must be none).
    """

    by: loader.Loader
    before: loader.Standing
    steps: loader.Steps
    items: tuple[str, ...]
    extra: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    trial: tuple[str, ...] = ()


def refuse_changed(machine: Machine, files: Sequence[tuple[str, bytes | None]]) -> None:
    """Raise EmupmemError where a file (name, content) is not as it was when the change was made up."""
    for name, before in files:
        if machine.read(name) != before:
            raise EmupmemError(f"{name} was changed by somebody else meanwhile", "look at it and try again")


def put(machine: Machine, name: str, data: bytes | None, mode: int = 0o644) -> None:
    """Make a file have this content, or none. Raises EmupmemError."""
    if machine.read(name) == data:
        return
    if data is None:
        system_files.delete_file(machine, name)
    else:
        system_files.install_file(machine, name, data, mode)


def carry_out(
    machine: Machine, what: Elsewhere, tell: Callable[[str], None], stop: Interrupts
) -> tuple[str, int]:
    """Do it: the name of the last backup, and how many entries carry the argument.

    Raises EmupmemError; the old configuration is then in force again (the message says so if not).
    """
    _mend(machine, what.steps)
    refuse_changed(machine, [(e.name, e.before) for e in what.steps.edits])
    for step in what.steps.commands if machine.live else ():
        if machine.find(step.argv[0]) is None:
            raise EmupmemError(f"{step.argv[0]} is not installed", state=UNCHANGED)
    backups.remove_leftovers(machine, _litter(machine, what.steps))
    tell("locked")
    former = _former(machine, what.steps)
    backup = ""
    for name, data in former.files.items():
        if data is not None and name != WORDS_RECORD:
            backup = backups.back_up(machine, name, former.moment, data)
    tell("backup")
    stop.check()
    try:
        for name, data in former.files.items():
            if data is not None and name != WORDS_RECORD:
                backups.set_aside(
                    machine, name
                )  # some programs write in place, and to put it back needs no room
        _write(machine, what, former)
        tell("written")
        for step in what.steps.commands if machine.live else ():
            _run(machine, step, stop)
        for name in what.steps.owned if what.steps.commands else ():
            if machine.exists(name):
                system_files.sync_written(machine, name)  # grubby (sed) and its like do not
        tell("generated")
        carry = _prove(machine, what)
        stop.check()
    except BaseException as exc:
        _roll_back(machine, what, former, exc)
        raise
    _drop_copies(machine, what.steps)
    if not what.items and not what.trial:
        _forget_records(machine)
    tell("done")
    return backup, carry


def _mend(machine: Machine, steps: loader.Steps) -> None:
    """Let the whole copies of what a killed run tore take their place; what it had only made goes."""
    for name in steps.torn:
        if backups.is_aside(machine, name):
            backups.put_back(machine, name)
        else:
            system_files.delete_file(machine, name)


@dataclass(frozen=True, slots=True)
class _Former:
    """What a change may have to put back: contents, links and where they lead, and what was not there.

    `names` are those in the folders that programs write to, `missing` the folders that are not there, the
    deepest one first.
    """

    moment: str
    files: dict[str, bytes | None]
    links: dict[str, str]
    names: dict[str, frozenset[str]]
    missing: tuple[str, ...]


def _former(machine: Machine, steps: loader.Steps) -> _Former:
    names = dict.fromkeys([*(e.name for e in steps.edits), *steps.owned, WORDS_RECORD])
    links = {n: target for n in names if (target := machine.link_target(n))}
    folders = {n.rpartition("/")[0] for n in names if n != WORDS_RECORD}
    there = {f: frozenset(machine.names(f)) for f in folders}
    above = {str(p) for f in folders for p in (Path(f), *Path(f).parents)}
    missing = sorted((f for f in above if not machine.exists(f)), key=len, reverse=True)
    return _Former(stamp(), {n: machine.read(n) for n in names}, links, there, tuple(missing))


def _write(machine: Machine, what: Elsewhere, former: _Former) -> None:
    if KERNEL_FOLDER in former.missing and any(e.after for e in what.steps.edits):
        backups.back_up(machine, KERNEL_FOLDER, former.moment, b"", ".made")
    for edit in what.steps.edits:
        data = edit.after
        if edit.name == sources.KERNEL_CMDLINE:
            made = edit.before is None or sources.made_by_us(machine, edit.before)
            if data is None and edit.before is not None and what.steps.commands:
                # grubby would make another: it goes when all is done, and the record tells a killed run that it may
                data = sources.bare(edit.before, what.drop)
            if data is not None and made:
                backups.back_up(machine, edit.name, former.moment, data, ".made")
        put(machine, edit.name, data, edit.mode)
    if what.extra:
        system_files.install_file(machine, WORDS_RECORD, " ".join(what.extra) + "\n", 0o600)


def _forget_records(machine: Machine) -> None:
    """Nothing is reserved any more: what tells of it goes, and a folder that was made for it."""
    folders = [n for n in machine.names(BACKUPS) if n.startswith("kernel.") and n.endswith(".made")]
    if folders:
        system_files.drop_folder(machine, KERNEL_FOLDER)
    for name in (WORDS_RECORD, *sources.made_records(machine), *(f"{BACKUPS}/{n}" for n in folders)):
        system_files.discard_file(machine, name)


def unfinished(machine: Machine, steps: loader.Steps) -> bool:
    """Whether a run that was killed left something behind."""
    return bool(_litter(machine, steps)) or any(backups.is_aside(machine, n) for n in _files(machine, steps))


def _files(machine: Machine, steps: loader.Steps) -> tuple[str, ...]:
    names = [*bls_files.entry_files(machine), environment.grubenv_name(machine), *sources.SOURCES]
    names += [f"{folder}/loader/entries/{bls_files.TRIAL_ENTRY}" for folder in bls_files.BOOT_FOLDERS]
    names += [*steps.owned, *(e.name for e in steps.edits)]
    return tuple(dict.fromkeys(names))


def _litter(machine: Machine, steps: loader.Steps) -> list[Path]:
    """Half-written files beside what a change writes."""
    return backups.leftovers(machine, _files(machine, steps))


def _drop_copies(machine: Machine, steps: loader.Steps) -> None:
    for name in _files(machine, steps):
        backups.drop_aside(machine, name)


def _run(machine: Machine, step: Command, stop: Interrupts) -> None:
    stop.check()
    done = machine.run(step, GENERATOR_SECONDS)
    if done.status:
        raise EmupmemError(f"{step.argv[0]} failed with status {done.status}: {done.last_words}")


def _prove(machine: Machine, what: Elsewhere) -> int:
    """Read everything again; the number of entries that carry the argument. Raises EmupmemError."""
    for edit in what.steps.edits:
        if edit.name not in what.steps.owned:  # grubby of some versions writes /etc/default/grub as well
            put(machine, edit.name, edit.after, edit.mode)
    after = what.by.standing(machine)
    wrong = loader.problems(what.before, after, what.items, what.extra, what.drop)
    if not wrong and machine.live and (after.trial, after.chosen) != (what.trial, bool(what.trial)):
        wrong = (
            "the entry of the trial is not there, or not chosen"
            if what.trial
            else "that of the trial is still there"
        )
    if wrong:
        raise EmupmemError(f"the boot entries are not as planned: {wrong}")
    return sum(1 for e in after.entries if e.ours and e.command_line.reservations)


def _roll_back(machine: Machine, what: Elsewhere, former: _Former, exc: BaseException) -> None:
    """Put everything back; tells in the error what state the machine is in."""
    failed: list[str] = []
    again: list[str] = []

    def attempt(step: Callable[[], None], problems: list[str] = failed) -> None:
        try:
            step()
        except EmupmemError as second:
            problems.append(second.message)

    edited = [e.name for e in what.steps.edits]
    for name in edited:
        attempt(partial(_put_back, machine, former, name))
    owned = what.steps.owned
    started = machine.live and any(machine.read(n) != former.files[n] for n in owned)
    if started or (not owned and machine.live and _is_changed(machine, what)):
        for step in what.steps.undo:
            attempt(partial(_run, machine, step, Interrupts()), again if owned else failed)
    for name in former.files:
        attempt(partial(_put_back, machine, former, name))
    _clear_new(machine, former)
    state = "the old configuration is back, nothing is changed"
    if again:  # the files are put back all the same; sdbootutil does more than write them
        todo = "; ".join(" ".join(step.argv) for step in what.steps.undo)
        state = f"the old configuration is back; run {todo} when that works again: {again[0]}"
    if failed:
        state = f"and not all could be put back: {'; '.join(failed)}. Before you reboot: look at {what.before.menu}"
    else:
        _drop_copies(machine, what.steps)
    if isinstance(exc, EmupmemError):
        exc.state = state


def _put_back(machine: Machine, former: _Former, name: str) -> None:
    """Make a file what it was: by its copy, which needs no room, else by its content. Raises EmupmemError."""
    link, data = former.links.get(name, ""), former.files[name]
    if link and machine.link_target(name) != link:
        system_files.make_link(machine, name, link)  # sed -i puts a file in the place of a link
    if data is not None and backups.is_aside(machine, name):
        backups.put_back(machine, name)
    elif data is None and (machine.exists(name) or machine.is_link(name)):
        system_files.delete_file(machine, name)
    else:
        put(machine, name, data)


def _clear_new(machine: Machine, former: _Former) -> None:
    """Take away what is left of a program that was ended, of our records, and the folders that were made."""
    for folder, names in former.names.items():
        for name in machine.names(folder):
            if name not in names and LEFT_BY_PROGRAMS.fullmatch(name):
                system_files.discard_file(machine, f"{folder}/{name}")
    for folder in former.missing:
        system_files.drop_folder(machine, folder)
    for name in (sources.KERNEL_CMDLINE, KERNEL_FOLDER):
        system_files.discard_file(machine, f"{BACKUPS}/{name.rpartition('/')[2]}.{former.moment}.made")


def _is_changed(machine: Machine, what: Elsewhere) -> bool:
    """Whether a program without files of its own (rpm-ostree) did something."""
    try:
        return what.by.standing(machine) != what.before
    except EmupmemError:
        return False
