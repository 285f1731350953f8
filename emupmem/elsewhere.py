"""Carrying out a change on a machine that another loader starts than GRUB with grub-mkconfig.

Files are replaced by rename, then the loader's own program runs, then all entries are read again and judged;
whatever goes wrong puts everything back. Each entry is whole at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emupmem import loader
from emupmem.machine import BACKUPS, Interrupts, Machine, stamp
from emupmem.model import UNCHANGED, Command, EmupmemError

GENERATOR_SECONDS = 600
"""How long a program that writes a boot menu may take."""

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
        machine.delete(name)
    else:
        machine.install(name, data, mode)


def carry_out(
    machine: Machine, what: Elsewhere, tell: Callable[[str], None], stop: Interrupts
) -> tuple[str, int]:
    """Do it: the name of the last backup, and how many entries carry the argument.

    Raises EmupmemError; the old configuration is then in force again (the message says so if not).
    """
    refuse_changed(machine, [(e.name, e.before) for e in what.steps.edits])
    for step in what.steps.commands if machine.live else ():
        if machine.find(step.argv[0]) is None:
            raise EmupmemError(f"{step.argv[0]} is not installed", state=UNCHANGED)
    machine.clear(_litter(machine, what.steps))
    tell("locked")
    moment, backup = stamp(), ""
    owned = {name: machine.read(name) for name in what.steps.owned}
    for name, data in {**owned, **{e.name: e.before for e in what.steps.edits}}.items():
        if data is not None:
            backup = machine.keep(name, moment, data)
    tell("backup")
    stop.check()
    try:
        for edit in what.steps.edits:
            if edit.before is None and edit.name == loader.KERNEL_CMDLINE and edit.after is not None:
                machine.keep(edit.name, moment, edit.after, ".made")
            put(machine, edit.name, edit.after, edit.mode)
        if what.extra:
            machine.install(WORDS_RECORD, " ".join(what.extra) + "\n", 0o600)
        tell("written")
        for name in owned if machine.live else ():
            machine.set_aside(name)  # some of these programs write in place
        for step in what.steps.commands if machine.live else ():
            _run(machine, step, stop)
        for name in owned if what.steps.commands else ():
            if machine.exists(name):
                machine.sync(name)  # grubby (sed) and its like do not
        tell("generated")
        carry = _prove(machine, what)
        stop.check()
    except BaseException as exc:
        _roll_back(machine, what, owned, exc)
        raise
    _drop_copies(machine, what.steps)
    if not what.items and not what.trial:
        for name in (WORDS_RECORD, *loader.made_records(machine)):
            machine.forget(name)
    tell("done")
    return backup, carry


def unfinished(machine: Machine, steps: loader.Steps) -> bool:
    """Whether a run that was killed left something behind."""
    return bool(_litter(machine, steps)) or any(machine.is_aside(n) for n in _files(machine, steps))


def _files(machine: Machine, steps: loader.Steps) -> tuple[str, ...]:
    names = [*loader.entry_files(machine), loader.grubenv(machine), *loader.SOURCES]
    names += [*steps.owned, *(e.name for e in steps.edits)]
    return tuple(dict.fromkeys(names))


def _litter(machine: Machine, steps: loader.Steps) -> list[Path]:
    """Half-written files beside what a change writes."""
    return machine.litter(_files(machine, steps))


def _drop_copies(machine: Machine, steps: loader.Steps) -> None:
    for name in _files(machine, steps):
        machine.drop_aside(name)


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


def _roll_back(machine: Machine, what: Elsewhere, owned: dict[str, bytes | None], exc: BaseException) -> None:
    """Put everything back; tells in the error what state the machine is in."""
    failed: list[str] = []

    def attempt(step: Callable[[], None]) -> None:
        try:
            step()
        except EmupmemError as second:
            failed.append(second.message)

    def put_back(name: str, data: bytes | None, mode: int = 0o644) -> None:
        attempt(lambda: put(machine, name, data, mode))

    for edit in what.steps.edits:
        put_back(edit.name, edit.before, edit.mode)
    started = machine.live and any(machine.read(n) != data for n, data in owned.items())
    if started or (not owned and machine.live and _is_changed(machine, what)):
        for step in what.steps.undo:
            attempt(lambda step=step: _run(machine, step, Interrupts()))  # type: ignore[misc]
    for name, data in owned.items():
        put_back(name, data)
    if not failed:
        _drop_copies(machine, what.steps)
    state = "the old configuration is back, nothing is changed"
    if failed:
        state = f"and not all could be put back: {'; '.join(failed)}. Before you reboot: look at {what.before.menu}"
    if isinstance(exc, EmupmemError):
        exc.state = state


def _is_changed(machine: Machine, what: Elsewhere) -> bool:
    """Whether a program without files of its own (rpm-ostree) did something."""
    try:
        return what.by.standing(machine) != what.before
    except EmupmemError:
        return False
