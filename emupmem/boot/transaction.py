# SPDX-License-Identifier: Apache-2.0
"""Carrying out a change, whatever the boot loader: set aside, written, made, read again, judged, or all put back.

Files are replaced by rename, then the loader's own programs run, then everything is read again. At every moment
what boots is whole: as it was, as it will be, or a whole copy of it lies beside it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from emupmem.boot.bls import sources
from emupmem.boot.change import Change, Outcome, Tell
from emupmem.boot.loader import Loader, Steps
from emupmem.boot.program_state import put_state_back
from emupmem.device import boot_unit
from emupmem.device.unit import FILE as UNIT_FILE
from emupmem.editor import edits
from emupmem.model import UNCHANGED, Command, EmupmemError, FileEdit
from emupmem.record import record
from emupmem.system import backups, files, lock
from emupmem.system.backups import BACKUPS, stamp
from emupmem.system.host import Host
from emupmem.system.lock import Interrupts, interrupts
from emupmem.system.machine import Machine

GENERATOR_SECONDS = 600
"""How long a program that writes a boot menu may take."""

KERNEL_FOLDER = "/etc/kernel"
LEFT_BY_PROGRAMS = re.compile(r"sed[A-Za-z0-9]{6}|grubenv\.new|grub\.cfg\.new")
"""What sed -i, grub-editenv and grub-mkconfig write first, and leave where they are killed or fail."""

WORDS_RECORD = f"{BACKUPS}/words"
"""Words beside memmap= that applies added."""


def carry_out_change(machine: Machine, change: Change, tell: Tell = lambda step: None) -> Outcome:
    """Do it, and prove it; or put everything back and say why.

    `tell` is called after every step with its name. Raises EmupmemError; the old configuration
    is then in force again (the message says so if even that failed).
    """
    with interrupts() as stop, lock.change_lock(machine):
        stop.check()
        # The loader first: a unit without its reservation does nothing, and is all that a crash can leave.
        outcome = _carry_out_boot(machine, change, tell, stop) if change.boot_needed else Outcome()
        problems = [p for p in (outcome.problem, _carry_out_unit(machine, change)) if p]
        return replace(outcome, problem="; ".join(problems))


def _carry_out_unit(machine: Machine, change: Change) -> str:
    """Write the unit or take it away; what could not be taken away is told and is no failure."""
    if not change.unit.needed:
        return ""
    try:
        boot_unit.write_unit(machine, change.unit)
    except EmupmemError as exc:
        if change.unit.after is None:
            return f"{exc.message}: it does nothing without a reservation"
        failure = EmupmemError(
            exc.message, "the reservation itself is in force; the same command again finishes it"
        )
        failure.changed = change.boot_needed
        raise failure from exc
    return ""


def _carry_out_boot(machine: Machine, change: Change, tell: Tell, stop: Interrupts) -> Outcome:
    """The boot loader's side of the transaction."""
    by, steps = change.by, change.steps
    _mend(machine, by)
    _refuse_changed(machine, steps.edits)
    state = by.kept_state(machine) if machine.live else ()
    if (steps.undo or state) and not steps.owned and by.standing(machine) != change.before:
        raise _changed(change.before.menu)  # it has no files to watch
    for step in steps.commands if machine.live else ():
        if machine.find(step.argv[0]) is None:
            raise EmupmemError(f"{step.argv[0]} is not installed", state=UNCHANGED)
    backups.remove_leftovers(machine, _litter(machine, by, steps))
    tell("locked")
    former = _former(machine, by, steps, state)
    backup = _back_up(machine, steps, former)
    tell("backup")
    stop.check()
    backups.drop_stale(machine, former.kept)
    try:
        for name in former.kept:  # some programs write in place, and to put a copy back needs no room
            backups.set_aside(machine, name)
        tell("set aside")
        if not change.trial:  # before the entry is gone: another one than the default might start
            _choose(machine, by, False)
        _write(machine, steps, former)
        tell("written")
        carry = _make(machine, change, stop)
        tell("generated")
        if change.trial:
            _choose(machine, by, True)
            by.prove(machine, change.before, steps)  # what chose it may have written more than its choice
        tell("chosen")
        stop.check()
    except BaseException as exc:
        _roll_back(machine, change, former, exc)
        raise
    problem = _edited_meanwhile(machine, steps)
    _drop_copies(machine, by, steps)
    for folder in steps.folders:
        files.drop_folder(machine, folder)
    if not change.normal and not change.trial:
        _forget_records(machine)
    tell("done")
    return Outcome(backup, carry, by.done_by(steps), problem)


# Before ----------------------------------------------------------------------------------------------


def _mend(machine: Machine, by: Loader) -> None:
    """Let the whole copies of what a killed run tore take their place; what it had only made goes."""
    for name in by.torn(machine):
        if backups.is_aside(machine, name):
            with contextlib.suppress(EmupmemError):  # where there is no room, the whole copy counts more
                backups.back_up(machine, name, stamp(), machine.read(name) or b"", ".torn")
            backups.put_back(machine, name)
        else:
            files.delete_file(machine, name)


def _refuse_changed(machine: Host, watched: Sequence[FileEdit]) -> None:
    """Raise EmupmemError where a file is not as it was when the change was made up."""
    for edit in watched:
        if machine.read(edit.name) != edit.before:
            raise _changed(edit.name)


def _changed(name: str) -> EmupmemError:
    return EmupmemError(
        f"{name} was changed by another program in the meantime", "look at it and try again", state=UNCHANGED
    )


@record
class _Former:
    """What a change may have to put back: contents, links and where they lead, and what was not there.

    `kept` are the files that are set aside, `names` those in the folders that programs write to, `missing` the
    folders that are not there, the deepest one first; `choice` is what was chosen for the next start only, `state`
    what programs keep and no file tells.
    """

    moment: str
    files: dict[str, bytes | None]
    kept: tuple[str, ...]
    links: dict[str, str]
    names: dict[str, frozenset[str]]
    missing: tuple[str, ...]
    choice: str
    state: tuple[str, ...]


def _former(machine: Host, by: Loader, steps: Steps, state: tuple[str, ...]) -> _Former:
    edited = [e.name for e in steps.edits if e.before != e.after or e.name in steps.rewritten]
    touched = [*steps.menus, *edited, *steps.owned]
    names = dict.fromkeys([*touched, WORDS_RECORD])
    contents = {n: machine.read(n) for n in names}
    links = {n: target for n in names if (target := machine.link_target(n))}
    folders = {n.rpartition("/")[0] for n in touched}
    there = {f: frozenset(machine.names(f)) for f in folders}
    above = {str(p) for f in folders for p in (Path(f), *Path(f).parents)}
    missing = sorted((f for f in above if not machine.exists(f)), key=len, reverse=True)
    kept = tuple(n for n in dict.fromkeys(touched) if contents[n] is not None)
    choice = by.choice(machine) if machine.live else ""
    return _Former(stamp(), contents, kept, links, there, tuple(missing), choice, state)


def _back_up(machine: Machine, steps: Steps, former: _Former) -> str:
    """Keep what was written by hand or by other programs, but not the menu, which is made of it.

    The name of the first backup of a file that is written, else of another; empty where there is none.
    """
    first, written = "", {e.name for e in steps.changed if e.after is not None}
    for edit in steps.changed:
        if edit.name in steps.recorded and edit.after is not None:
            backups.back_up(machine, edit.name, former.moment, edit.after, ".written")
    kept = [n for n in former.kept if n not in steps.menus]
    for name in sorted(kept, key=lambda n: n not in written):
        data = former.files[name]
        backup = backups.back_up(machine, name, former.moment, data) if data is not None else ""
        first = first or backup
    return first


# What is done ----------------------------------------------------------------------------------------


def _put(machine: Machine, name: str, data: bytes | None, mode: int = 0o644) -> None:
    """Make a file have this content, or none. Raises EmupmemError."""
    if machine.read(name) == data:
        return
    if data is None:
        files.delete_file(machine, name)
    else:
        files.install_file(machine, name, data, mode)


def _put_in_order(machine: Machine, edits: Sequence[FileEdit]) -> None:
    """Make files as planned that a program wrote as well; those behind one that is written are never older than it.

    20-grub.install makes /etc/kernel/cmdline anew where it is older than /etc/default/grub.
    """
    written = False
    for edit in edits:
        written |= machine.read(edit.name) != edit.after
        if written and edit.after is not None:
            files.install_file(machine, edit.name, edit.after, edit.mode)
        else:
            _put(machine, edit.name, edit.after, edit.mode)


def _write(machine: Machine, steps: Steps, former: _Former) -> None:
    if KERNEL_FOLDER in former.missing and any(e.after for e in steps.edits):
        backups.back_up(machine, KERNEL_FOLDER, former.moment, b"", ".made")
    for edit in steps.edits:
        data = edit.after
        if edit.name == sources.KERNEL_CMDLINE:
            made = edit.before is None or sources.made_by_us(machine, edit.before)
            if data is None and edit.before is not None and edit.name in steps.rewritten:
                # grubby would make another: it goes when all is done, and the record tells a killed run that it may
                data = sources.bare(edit.before, steps.wanted.drop)
            if data is not None and made:
                backups.back_up(machine, edit.name, former.moment, data, ".made")
        elif data is None and edit.name in steps.rewritten:
            continue  # the entry of a trial goes when the programs have run
        _put(machine, edit.name, data, edit.mode)
    if steps.remembered:
        files.install_file(machine, WORDS_RECORD, " ".join(steps.remembered) + "\n", 0o600)
    elif steps.remembered is not None and machine.exists(WORDS_RECORD):
        files.delete_file(machine, WORDS_RECORD)


def _make(machine: Machine, change: Change, stop: Interrupts) -> int:
    """Run the programs and have everything read again; the number of entries that carry the argument."""
    steps = change.steps
    for step in steps.commands if machine.live else ():
        _run(machine, step, stop, steps.language)
    _put_in_order(machine, [e for e in steps.edits if e.name in steps.rewritten])
    carry = change.by.prove(machine, change.before, steps)
    for name in (*steps.menus, *steps.owned) if steps.commands and machine.live else ():
        if machine.exists(name):
            files.sync_written(machine, name)  # the programs do not
    return carry


def _run(machine: Machine, step: Command, stop: Interrupts, language: str = "C") -> None:
    stop.check()
    done = machine.run(step, GENERATOR_SECONDS, language)
    if done.status:
        raise EmupmemError(f"{step.argv[0]} failed with status {done.status}: {done.last_words}")


def _choose(machine: Machine, by: Loader, wanted: bool) -> None:
    """Let the next start be the trial, or not; a choice of somebody else stays.

    A choice that a loader does not forget is taken away by the steps of the change.
    """
    if not machine.live or not (wanted or by.forgets) or by.chosen(machine) == wanted:
        return
    by.choose(machine, wanted)
    if by.chosen(machine) != wanted:
        raise EmupmemError(f"the entry of the trial is {'not' if wanted else 'still'} chosen")


def _choose_again(machine: Machine, by: Loader, name: str) -> None:
    """Let the next start be what somebody had chosen, where a trial had taken its place."""
    if name and not by.choice(machine):
        by.choose_again(machine, name)


def _edited_meanwhile(machine: Host, steps: Steps) -> str:
    ours = (e for e in steps.edits if e.name not in steps.rewritten and e.name not in steps.owned)
    name = next((e.name for e in ours if machine.read(e.name) != e.after), "")
    if not name:
        return ""
    return f"{name} was changed by another program while the menu was generated: look at it, then run emupmem verify"


# What a killed run leaves ----------------------------------------------------------------------------


def is_unfinished(machine: Host, by: Loader, steps: Steps) -> bool:
    """Whether a run that was killed left something behind."""
    return backups.has_leftovers(machine, (*_names(machine, by, steps), UNIT_FILE))


def _names(machine: Host, by: Loader, steps: Steps) -> tuple[str, ...]:
    names = (*by.files(machine), *steps.menus, *steps.owned, *(e.name for e in steps.edits))
    return tuple(dict.fromkeys(names))


def _litter(machine: Host, by: Loader, steps: Steps) -> list[str]:
    """Half-written files beside what a change writes."""
    return backups.leftovers(machine, (*_names(machine, by, steps), UNIT_FILE))


def _drop_copies(machine: Machine, by: Loader, steps: Steps) -> None:
    for name in _names(machine, by, steps):
        backups.drop_aside(machine, name)


def _forget_records(machine: Machine) -> None:
    """Nothing is reserved any more: what tells of it goes, and a folder that was made for it."""
    folders = [n for n in machine.names(BACKUPS) if n.startswith("kernel.") and n.endswith(".made")]
    if folders:
        files.drop_folder(machine, KERNEL_FOLDER)
    for name in (WORDS_RECORD, *sources.made_records(machine), *(f"{BACKUPS}/{n}" for n in folders)):
        files.discard_file(machine, name)


# All put back ----------------------------------------------------------------------------------------


def _roll_back(machine: Machine, change: Change, former: _Former, exc: BaseException) -> None:
    """Put everything back; tells in the error what state the machine is in."""
    by, steps, kept = change.by, change.steps, ""
    failed: list[str] = []
    again: list[str] = []

    def attempt(step: Callable[[], object], problems: list[str] = failed) -> None:
        try:
            step()
        except EmupmemError as second:
            problems.append(second.message)

    # The menu first: it is what boots, and putting it back is a rename that needs no room. But nobody may be
    # sent to an entry that it does not have.
    if not change.before.chosen:
        attempt(partial(_choose, machine, by, False))
    for name in steps.menus:
        attempt(partial(_put_back, machine, former, name))
    for edit in steps.edits:
        try:
            kept += _put_edit_back(machine, steps, former, edit)
        except EmupmemError as second:
            failed.append(second.message)
    wrote = machine.live and bool(steps.undo) and _programs_wrote(machine, change, former)
    for step in steps.undo if wrote else ():
        attempt(partial(_run, machine, step, Interrupts()), again if steps.owned else failed)
    if wrote and not again:
        attempt(partial(by.prove_undone, machine, change.before))
    attempt(partial(put_state_back, machine, by, former.state, partial(_run, machine, stop=Interrupts())))
    for name in (*steps.menus, *steps.owned, *steps.rewritten, WORDS_RECORD):
        attempt(partial(_put_back, machine, former, name))
    if change.before.chosen:
        attempt(partial(_choose, machine, by, True))
    else:
        attempt(partial(_choose_again, machine, by, former.choice))
    _clear_new(machine, former, not failed)
    for step in steps.refresh if machine.live else ():
        attempt(partial(_run, machine, step, Interrupts()))
    state = "the old configuration is back, nothing is changed"
    if again:  # the files are put back all the same; sdbootutil does more than write them
        todo = "; ".join(" ".join(step.argv) for step in steps.undo)
        state = f"the old configuration is back; run {todo} when that works again: {again[0]}"
    if failed:
        run = "; ".join(" ".join(step.argv) for step in steps.commands)
        what = by.by_hand.format(menu=change.before.menu, run=run or "what makes the menu")
        state = f"and not all could be put back: {'; '.join(failed)}. Before you reboot: {what}"
    else:
        _drop_copies(machine, by, steps)
    if isinstance(exc, EmupmemError):
        exc.state = state + kept
        exc.changed = bool(failed)


def _programs_wrote(machine: Host, change: Change, former: _Former) -> bool:
    """Whether the programs did something that their `undo` is to take back.

    Where that cannot be read: so, if `undo` only makes all anew of the files that were put back.
    """
    owned = change.steps.owned
    try:
        if owned:
            return any(machine.read(n) != former.files[n] for n in owned)
        return bool(change.steps.undo) and change.by.standing(machine) != change.before
    except EmupmemError:
        return bool(owned) or change.steps.undo == change.steps.commands


def _put_edit_back(machine: Machine, steps: Steps, former: _Former, edit: FileEdit) -> str:
    """Put an edited file back; an edit that somebody made meanwhile is kept in it, or else beside it.

    What of that there is to tell. Raises EmupmemError.
    """
    now, name = machine.read(edit.name), edit.name
    if name not in former.files:
        return ""  # it was only watched
    if name in steps.rewritten or name in steps.owned or now in (edit.before, edit.after, None):
        _put_back(machine, former, name, edit.mode)
        return ""
    lines = bool(now) and b"\0" not in (now or b"")  # and no program
    undone = (
        edits.undo_lines(now, edit.before, edit.after)
        if lines and edit.before and edit.after and now
        else None
    )
    if undone is not None:
        files.replace_file(machine, name, undone)
        return f"; {name} keeps the change that another program made"
    kept = backups.back_up(machine, name, stamp(), now or b"", ".edited")
    _put(machine, name, edit.before, edit.mode)
    return f"; what another program wrote into {name} is kept as {kept}"


def _put_back(machine: Machine, former: _Former, name: str, mode: int = 0o644) -> None:
    """Make a file what it was: by its copy, which needs no room, else by its content. Raises EmupmemError."""
    link, data = former.links.get(name, ""), former.files[name]
    if link and machine.link_target(name) != link:
        files.make_link(machine, name, link)  # sed -i puts a file in the place of a link
    if data is not None and backups.is_aside(machine, name):
        backups.put_back(machine, name)
    elif data is None and link:
        files.delete_file(machine, machine.real(name))  # it led nowhere
    elif data is None and (machine.exists(name) or machine.is_link(name)):
        files.delete_file(machine, name)
    else:
        _put(machine, name, data, mode)


def _clear_new(machine: Machine, former: _Former, all_back: bool) -> None:
    """Take away what is left of a program that was ended, of our records, and the folders that were made."""
    for folder, names in former.names.items():
        for name in machine.names(folder):
            if name not in names and LEFT_BY_PROGRAMS.fullmatch(name):
                files.discard_file(machine, f"{folder}/{name}")
    for folder in former.missing:
        files.drop_folder(machine, folder)
    for name in machine.names(BACKUPS):
        # What was never in force is nothing to undo later.
        if name.endswith(f".{former.moment}.made") or (
            all_back and name.endswith(f".{former.moment}.written")
        ):
            files.discard_file(machine, f"{BACKUPS}/{name}")
