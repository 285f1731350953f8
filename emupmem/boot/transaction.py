# SPDX-License-Identifier: Apache-2.0
"""Carrying out a change with GRUB: written, made, read again, judged, or all put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from emupmem.boot import elsewhere, foreign
from emupmem.boot import entry as boot_entry
from emupmem.boot.change import Change, Outcome, Tell
from emupmem.boot.elsewhere import GENERATOR_SECONDS, put, refuse_changed
from emupmem.boot.grub import dropin, environment, trial
from emupmem.boot.grub import menu as grub_menu
from emupmem.boot.grub.defaults import effective_defaults
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.device import boot_unit
from emupmem.device.unit import FILE as UNIT_FILE
from emupmem.editor import edits
from emupmem.model import UNCHANGED, Command, EmupmemError
from emupmem.system import backups, files, lock
from emupmem.system.backups import BACKUPS, stamp
from emupmem.system.lock import Interrupts, interrupts
from emupmem.system.machine import Machine


def grub_leftovers(machine: Machine, cfg: str) -> list[Path]:
    return backups.leftovers(machine, (*WRITTEN, cfg, environment.grubenv_name(machine)))


WRITTEN = (GRUB_DEFAULT, UNIT_FILE, trial.SCRIPT, dropin.NAME)
"""What is replaced by rename; the menu is what the generator writes in place."""


def has_leftovers(machine: Machine, cfg: str) -> bool:
    """Whether a run that was killed left something."""
    return backups.is_aside(machine, cfg) or bool(grub_leftovers(machine, cfg))


def menu_problems(
    machine: Machine, cfg: str, normal: Sequence[str], recovery: Sequence[str]
) -> list[tuple[boot_entry.BootEntry | None, str]]:
    try:
        data = machine.read(cfg)
    except EmupmemError:
        return []  # not ours to read without root: a dry run says nothing of it
    text = (data or b"").decode("utf-8", "surrogateescape")
    wrong = boot_entry.problems(grub_menu.entries(text), normal, recovery)
    return wrong or ([] if grub_menu.whole(text) else [(None, "it is not written to its end")])


# The transaction ------------------------------------------------------------------------------------


def carry_out(machine: Machine, change: Change, tell: Tell = lambda step: None) -> Outcome:
    """Write the new text, make the menu, prove the menu; or put everything back and say why.

    `tell` is called after every step with its name. Raises EmupmemError; the old configuration
    is then in force again (the message says so if even that failed).
    """
    with interrupts() as stop, lock.change_lock(machine):
        stop.check()
        # GRUB first: a unit without its reservation does nothing, and is all that a crash can leave.
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
        raise EmupmemError(
            exc.message, "the reservation itself is in force; the same command again finishes it"
        ) from exc
    return ""


def _carry_out_boot(machine: Machine, change: Change, tell: Tell, stop: Interrupts) -> Outcome:
    """The boot loader's side of the transaction."""
    if change.elsewhere is not None:
        backup, carry = elsewhere.carry_out(machine, change.elsewhere, tell, stop)
        return Outcome(backup, carry, change.elsewhere.by.title)
    refuse_changed(machine, ((GRUB_DEFAULT, change.before), *((e.name, e.before) for e in change.edits)))
    generator = _generator(machine)
    backups.remove_leftovers(machine, grub_leftovers(machine, environment.grub_cfg(machine)))
    tell("locked")
    backup = ""
    if change.before != change.after:
        moment = stamp()
        backups.back_up(machine, GRUB_DEFAULT, moment, change.after, ".written")
        backup = backups.back_up(machine, GRUB_DEFAULT, moment, change.before)
        tell("backup")
        stop.check()
    if generator is None:
        _write(machine, change)
        tell("written")
        return Outcome(backup)
    menu = _Menu(environment.grub_cfg(machine), backup, chosen=trial.chosen(machine))
    menu = replace(menu, kept=_set_menu_aside(machine, menu.name))
    tell("set aside")
    try:
        if not change.trial:
            _choose(machine, False)  # before the entry is gone: GRUB would start another one than the default
        _write(machine, change)
        tell("written")
        carry = _generate(machine, generator, change, stop, menu.name)
        tell("generated")
        files.sync_written(machine, menu.name)
        _choose(machine, bool(change.trial))
        tell("chosen")
        stop.check()
    except BaseException as exc:
        _roll_back(machine, change, menu, exc)
        raise
    backups.drop_aside(machine, menu.name)
    tell("done")
    return Outcome(backup, carry, generator.argv[0], _edited_meanwhile(machine, change))


def _choose(machine: Machine, wanted: bool) -> None:
    """Let the next start be the trial, or not; a choice of somebody else stays."""
    if wanted != trial.chosen(machine):
        environment.set_grubenv(machine, trial.NEXT, trial.ID if wanted else "")


def _write(machine: Machine, change: Change) -> None:
    if change.before != change.after:
        files.replace_file(machine, GRUB_DEFAULT, change.after)
    for edit in change.edits:
        put(machine, edit.name, edit.after, edit.mode)


@dataclass(frozen=True, slots=True)
class _Menu:
    """The grub.cfg of a transaction, the backup of the defaults; whether a copy is kept, and a trial was chosen."""

    name: str
    backup: str
    kept: bool = False
    chosen: bool = False


def _edited_meanwhile(machine: Machine, change: Change) -> str:
    if machine.read(GRUB_DEFAULT) == change.after:
        return ""
    return f"{GRUB_DEFAULT} was changed by somebody else while the menu was made: look at it, then run emupmem verify"


def _set_menu_aside(machine: Machine, cfg: str) -> bool:
    """Keep the menu that boots now. A torn one, of a run that was killed, is replaced by its whole copy."""
    text = (machine.read(cfg) or b"").decode("utf-8", "surrogateescape")
    if backups.is_aside(machine, cfg) and not grub_menu.whole(text):
        backups.put_back(machine, cfg)
    return backups.set_aside(machine, cfg)


def _generator(machine: Machine) -> Command | None:
    if not machine.live:
        return None
    found = environment.generator(machine)
    if found is None:
        raise EmupmemError(
            "neither update-grub2, update-grub, grub2-mkconfig nor grub-mkconfig is installed: "
            "nothing could make grub.cfg",
            state=UNCHANGED,
        )
    return found


def _generate(machine: Machine, generator: Command, change: Change, stop: Interrupts, cfg: str) -> int:
    """Run the generator and judge its menu; the number of entries that carry the argument."""
    stop.check()
    # In the language of the menu that is there, or every other line of it would change as well.
    language = grub_menu.language((machine.read(cfg) or b"").decode("utf-8", "surrogateescape"))
    done = machine.run(generator, GENERATOR_SECONDS, language)
    name = generator.argv[0]
    if done.status:
        raise EmupmemError(f"{name} failed with status {done.status}: {done.last_words}")
    wrong = menu_problems(machine, cfg, change.normal, change.recovery)
    if wrong:
        entry, why = wrong[0]
        where = f"{cfg}:{entry.line} “{entry.title}”" if entry else cfg
        raise EmupmemError(
            f"{name} made a menu that is not as planned: {where}: {why}", _blame(machine, change)
        )
    text = (machine.read(cfg) or b"").decode("utf-8", "surrogateescape")
    problem = trial.problem(text, change.trial)
    if problem:
        raise EmupmemError(f"{name} made a menu that is not as planned: {cfg}: {problem}")
    return sum(1 for e in grub_menu.entries(text) if e.ours and e.command_line.reservations)


def _blame(machine: Machine, change: Change) -> str:
    """Which file had the last word on the variables, for the message."""
    try:
        values = effective_defaults(machine, change.after)  # our own drop-in is written at this point
    except EmupmemError:
        return ""
    others = sorted(
        {f"{v.filename}:{v.line}" for v in values.values() if v.filename not in ("", GRUB_DEFAULT)}
    )
    return f"{', '.join(others)} has the last word on the command line" if others else ""


def _roll_back(machine: Machine, change: Change, menu: _Menu, exc: BaseException) -> None:
    """Put the old text and the old menu back; tells in the error what state the machine is in."""
    state = "the old configuration is back, nothing is changed"
    # The menu first: it is what boots, and putting it back is a rename that needs no room. But nobody may be
    # sent to an entry that it does not have.
    steps: list[Callable[[], None]] = [] if menu.chosen else [partial(_choose, machine, False)]
    steps += [partial(backups.put_back, machine, menu.name)] if menu.kept else []
    steps += [partial(put, machine, e.name, e.before, e.mode) for e in change.edits]
    steps += [partial(_choose, machine, True)] if menu.chosen else []
    failed: list[str] = []
    for step in steps:
        try:
            step()
        except EmupmemError as second:
            failed.append(second.message)
    try:
        state += _put_defaults_back(machine, change)
    except EmupmemError as second:
        failed.append(second.message)
    else:
        if menu.backup:
            files.discard_file(
                machine, f"{menu.backup}.written"
            )  # what was never in force is nothing to undo later
    failed += _copies_put_back(machine)
    if failed:
        state = (
            f"and not all could be put back: {'; '.join(failed)}. Before you reboot: make room, restore "
            f"{GRUB_DEFAULT} from {BACKUPS} and run update-grub2"
        )
    if isinstance(exc, EmupmemError):
        exc.state = state


def _copies_put_back(machine: Machine) -> list[str]:
    """Let Proxmox make its copies of the menu from the old defaults again; what went wrong."""
    if not machine.live or not machine.exists(foreign.PROXMOX_ESPS):
        return []
    done = machine.output(*foreign.PROXMOX_REFRESH, timeout=GENERATOR_SECONDS)
    if done is not None and not done.status:
        return []
    return [
        f"{' '.join(foreign.PROXMOX_REFRESH)} failed: {done.last_words if done else 'it is not installed'}"
    ]


def _put_defaults_back(machine: Machine, change: Change) -> str:
    """Write the old text; an edit that somebody made meanwhile is kept in it, or else beside it."""
    now = machine.read(GRUB_DEFAULT)
    if now is None or now in (change.before, change.after):
        if now != change.before:
            files.replace_file(machine, GRUB_DEFAULT, change.before)
        return ""
    undone = edits.undo_lines(now, change.before, change.after)
    if undone is not None:
        files.replace_file(machine, GRUB_DEFAULT, undone)
        return f"; {GRUB_DEFAULT} keeps what somebody else changed in it meanwhile"
    kept = backups.back_up(machine, GRUB_DEFAULT, stamp(), now, ".edited")
    files.replace_file(machine, GRUB_DEFAULT, change.before)
    return f"; what somebody else wrote into {GRUB_DEFAULT} meanwhile is kept as {kept}"
