# SPDX-License-Identifier: Apache-2.0
"""Apply, remove and trials: what to change, computed first; the transaction does it after it is shown.

At every moment the machine boots either its old or its new configuration: files are replaced by
rename, what a program writes in place is set aside before it runs, and whatever goes wrong after the
first write puts everything back. A run that was killed leaves what the next `apply` or `remove` finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec

from emupmem.boot import detect
from emupmem.boot import trial as boot_trial
from emupmem.boot.change import Change
from emupmem.boot.grub.defaults import refuse_half_written, refuse_mangled, reserved_twice
from emupmem.boot.loader import Loader, Options, Owned, Standing, Steps, Wanted
from emupmem.boot.transaction import WORDS_RECORD, is_unfinished
from emupmem.device import boot_unit, devdax
from emupmem.device.blocks import mounts
from emupmem.device.installed import unit_program
from emupmem.device.unit import NO_CHANGE, BootDevice, BootMount, UnitChange, read_unit
from emupmem.kernel.cmdline import (
    OUR_WORDS,
    WITHOUT_KMEM,
    format_memmap,
    items_meant,
    parse_command_line,
    parse_memmap_value,
)
from emupmem.model import UNCHANGED, CommandLine, DeviceKind, EmupmemError, Plan, Request, Reservation
from emupmem.planner import survey
from emupmem.planner.kernels import words_beside
from emupmem.planner.plan import plan, satisfied
from emupmem.planner.situation import STEPS, Situation
from emupmem.system.host import Host
from emupmem.system.machine import asked_once

P = ParamSpec("P")


def _asks_once(plan: Callable[Concatenate[Host, P], Change]) -> Callable[Concatenate[Host, P], Change]:
    """For what plans: bootctl and others were asked the same six times over."""

    @wraps(plan)
    def planned(machine: Host, /, *words: P.args, **named: P.kwargs) -> Change:
        with asked_once(machine):
            return plan(machine, *words, **named)

    return planned


def next_line(machine: Host) -> CommandLine:
    """The kernel command line of the next start, whatever the boot loader. Raises EmupmemError."""
    return detect.of(machine).line(machine)


def change_of(
    machine: Host,
    by: Loader,
    now: Standing,
    steps: Steps,
    made: Plan | None = None,
    notes: Sequence[str] = (),
) -> Change:
    """The change that these steps make, finished first where a killed run left something."""
    unfinished = is_unfinished(machine, by, steps) if machine.live else bool(by.torn(machine))
    steps = replace(steps, unfinished=True) if unfinished else steps
    others = () if unfinished else _of_others(now)  # a run that was killed may have put them there
    steps = replace(steps, remembered=_remembered(machine, now, steps.wanted, others))
    added = [w for w in steps.wanted.add if w in others and w not in added_words(machine)]
    told = [f"an entry has {w} already: remove leaves it in all entries" for w in added]
    warnings = (*told, *notes, *(made.warnings if made else ()), *now.notes, *steps.notes)
    return Change(by, now, steps, made, tuple(dict.fromkeys(warnings)))


def _remembered(
    machine: Host, now: Standing, wanted: Wanted, others: Sequence[str]
) -> tuple[str, ...] | None:
    """The words that are of applies afterwards, not those that somebody else had put there; None where that stays."""
    recorded, there = (
        added_words(machine),
        {*(now.line.words if now.line is not None else ()), *others},
    )
    ours = [*(w for w in recorded if w not in wanted.drop), *(w for w in wanted.add if w not in there)]
    after = tuple(w for w in OUR_WORDS if w in ours)
    return after if after != recorded else None


def _of_others(now: Standing) -> list[str]:
    """Words of ours that an entry has before: they go into all of them, and so remove leaves them in all."""
    line = now.line.words if now.line is not None else ()
    return [w for w in OUR_WORDS if w not in line and any(e.ours and w in e.words for e in now.entries)]


@_asks_once
def prepare_apply(
    machine: Host,
    found: survey.Survey,
    request: Request,
    options: Options,
    wishes: Sequence[boot_unit.MountWish] = (),
    *,
    trial: bool = False,
) -> Change:
    """The change that makes the machine reserve what is asked, and mount it as `wishes` say, one for a device.

    For a `trial` nothing is set up at boot. Raises EmupmemError for a reservation that differs (without --replace
    or --add), for a drop-in that would override, and for everything that the planner and the editor refuse.
    """
    boot_unit.check_wishes(machine, wishes)
    if request.kind is not DeviceKind.PMEM and not trial:
        unit_program(machine)
    if request.kind is DeviceKind.DEVDAX and machine.live:
        devdax.require_program(machine)
    by = detect.of(machine)
    now = by.standing(machine)
    by.refuse_apply(machine, now, options)
    line = now.line or parse_command_line(machine.peek("/proc/cmdline"))
    refuse_half_written(line)
    refuse_mangled(line)
    in_place = not now.places or now.where == options.variable
    present = _recorded(machine, now.items)
    made, items = _decide(line, found, request, options, now.items, present, in_place)
    variable = options.variable if made is not None and not (options.add and now.items) else now.where
    nokaslr = options.nokaslr or (made is not None and made.needs_nokaslr)
    words = words_beside(_reservations(items), nokaslr)
    drop = tuple(w for w in added_words(machine) if w == WITHOUT_KMEM and w not in words)
    steps = by.steps(machine, Wanted(items, words, drop, variable=variable))
    change = change_of(machine, by, now, steps, made, found.notes)
    return change if trial else _with_unit(machine, change, made, request.kind, wishes)


def _decide(
    line: CommandLine,
    found: survey.Survey,
    request: Request,
    options: Options,
    present: Sequence[str],
    existing: Sequence[Reservation],
    in_place: bool = True,
) -> tuple[Plan | None, tuple[str, ...]]:
    """A plan, None where what is `present` is what was asked; and all our items afterwards.

    `line` are the words of the next start, `existing` the present items with what becomes of them.
    Raises EmupmemError for a reservation that differs, and as the planner does.
    """
    kept = tuple(present) if options.add else ()
    planned = survey.without_reservations(line, kept)
    situation = _with_line(found.situation, planned)
    if not options.add and in_place and _as_asked(situation, request, existing):
        return None, tuple(present)
    if present and not (options.add or options.replace):
        raise EmupmemError(
            f"there is a different reservation already: memmap={','.join(present)}",
            "--replace puts the new one in its place, --add keeps both",
        )
    if options.nokaslr:
        situation = _with_line(situation, replace(planned, nokaslr=True))
    made = plan(situation, request)
    items = (*kept, *_items(made.memmap))
    if options.add:
        joined = sorted(_reservations(items), key=_start)
        items = _items(format_memmap(joined))
    return made, items


def _with_unit(
    machine: Host,
    change: Change,
    made: Plan | None,
    kind: DeviceKind,
    wishes: Sequence[boot_unit.MountWish],
) -> Change:
    """The change with the unit that mounts the devices as wished, one wish for a device, or sets them up."""
    meant = sorted(made.reservations if made else _reservations(change.normal), key=_start)
    meant = [r for r in meant if r.kind.soft is kind.soft]
    if len(wishes) > len(meant):
        raise EmupmemError(
            f"--mount is given {len(wishes)} times for {len(meant)} device{'s' * (len(meant) > 1)}",
            "give it once for each device",
        )
    pairs = [((r.start, r.size), wish) for r, wish in zip(meant, wishes, strict=False)]
    devices = [BootDevice(r.start, r.size, kind) for r in meant if kind is not DeviceKind.PMEM]
    plain = [(r.start, r.size) for r in meant if kind is DeviceKind.PMEM]
    return _with_keep_warnings(
        machine, replace(change, unit=_unit_of(machine, change, pairs, devices, plain))
    )


def _unit_of(
    machine: Host,
    change: Change,
    pairs: Sequence[tuple[tuple[int, int], boot_unit.MountWish]] = (),
    devices: Sequence[BootDevice] = (),
    plain: Sequence[tuple[int, int]] = (),
) -> UnitChange:
    ranges, soft = _ranges(change)
    return boot_unit.unit_change(machine, ranges, pairs, soft, devices, plain)


@_asks_once
def prepare_remove(machine: Host, items: Sequence[str] = ()) -> Change:
    """The change that gives reserved memory back: all of it, or the named items.

    Where nothing else changed GRUB's defaults since apply, the kept backup gives the former bytes.
    """
    by = detect.of(machine)
    by.refuse_removal(machine)
    now = by.standing(machine)
    if now.line is not None:
        refuse_half_written(now.line)
    made = now.entries if now.source is None else ()  # the rest is made anew of its source
    present = now.items or tuple(
        dict.fromkeys(i.text for e in made if e.ours for i in e.command_line.reservations)
    )
    left = _left(present, items)
    if left and len(now.places) > 1:
        raise reserved_twice(dict(now.places), "remove without a name gives all of it back")
    needed = words_beside(_reservations(left), bool(left))
    drop = tuple(w for w in added_words(machine) if w not in needed)
    steps = by.steps(machine, Wanted(left, drop=drop, variable=now.where))
    return _with_units(machine, change_of(machine, by, now, steps))


def _left(present: Sequence[str], items: Sequence[str]) -> tuple[str, ...]:
    """The items that stay when the named ones go; none where none is named.

    Raises EmupmemError for one that is not there.
    """
    named = items_meant(present, items)
    for name in named:
        if name not in present:
            known = f"there are: {', '.join(present)}" if present else "nothing is reserved"
            raise EmupmemError(f"there is no reservation {name}", known)
    return tuple(i for i in present if i not in named) if named else ()


def added_words(machine: Host) -> tuple[str, ...]:
    """Words beside memmap= that applies added: their record names them."""
    words = machine.peek(WORDS_RECORD).split()
    return tuple(w for w in OUR_WORDS if w in words)


def _with_units(machine: Host, change: Change) -> Change:
    """The change with the unit left for what stays reserved."""
    return _with_keep_warnings(machine, replace(change, unit=_unit_left(machine, change)))


def _with_keep_warnings(machine: Host, change: Change) -> Change:
    """The change with a warning for content that is kept no more: of a range that goes, or in another file."""
    after = {(m.start, m.size, m.keep) for m in _kept(change.unit.after)}
    lost = [m for m in _kept(change.unit.before) if (m.start, m.size, m.keep) not in after]
    warnings = [
        f"what {m.dir} holds is not saved to {m.keep} any more: emupmem save {m.keep} {m.dir} does it once more"
        for m in lost
        if machine.live and any(x.dir == m.dir for x in mounts(machine))
    ]
    return replace(change, warnings=(*change.warnings, *warnings))


def _kept(text: str | None) -> tuple[BootMount, ...]:
    """The mounts of a unit whose content is kept; none where it was edited."""
    try:
        return tuple(m for m in read_unit(text) if m.keep) if text is not None else ()
    except EmupmemError:
        return ()


def _ranges(change: Change) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(start, size) of persistent and of soft reserved memory afterwards."""
    pmem, soft = (
        [r for r in _reservations(change.normal) if r.kind.soft is is_soft] for is_soft in (False, True)
    )
    return [(r.start, r.size) for r in pmem], [(r.start, r.size) for r in soft]


def _unit_left(machine: Host, change: Change) -> UnitChange:
    """The unit without the mounts of what is given back. It never stops the giving back."""
    try:
        ranges, soft = _ranges(change)
        return boot_unit.unit_change(machine, ranges, soft=soft)
    except EmupmemError:
        return NO_CHANGE


def _with_line(situation: Situation, line: CommandLine) -> Situation:
    return replace(situation, command_line=line)


def _start(reservation: Reservation) -> int:
    return reservation.start


def _items(memmap: str) -> tuple[str, ...]:
    return tuple(i.text for i in parse_memmap_value(memmap.removeprefix("memmap=")))


def _reservations(items: Sequence[str]) -> list[Reservation]:
    parsed = parse_memmap_value(",".join(items)) if items else ()
    return [
        Reservation(
            i.start, i.size, _step(i.start, i.size), kind=DeviceKind.DAX if i.soft else DeviceKind.PMEM
        )
        for i in parsed
    ]


def _recorded(machine: Host, items: Sequence[str]) -> list[Reservation]:
    """The reservations of these items, with what the unit makes of them."""
    kinds = boot_unit.recorded_kinds(machine)
    found = _reservations(items)
    known = [kinds.get((r.start, r.size), r.kind) for r in found]
    return [replace(r, kind=k) if k.soft is r.kind.soft else r for r, k in zip(found, known, strict=True)]


def _step(start: int, size: int) -> int:
    return next((s for s in STEPS if start % s == 0 and size % s == 0), 1)


def _as_asked(situation: Situation, request: Request, present: Sequence[Reservation]) -> bool:
    if not present:
        return False
    bare = _with_line(
        situation, survey.without_reservations(situation.command_line or parse_command_line(""))
    )
    return satisfied(bare, request, present)


@_asks_once
def prepare_trial(
    machine: Host, found: survey.Survey, request: Request, options: Options, entry: bool = True
) -> Change:
    """The change that makes one extra entry in the boot menu with the reservation, and nothing permanent.

    Without `entry` only the plan is wanted, for kexec.

    Raises EmupmemError as prepare_apply does, where something is reserved already, and where the loader
    could not forget the choice by itself.
    """
    by = detect.of(machine)
    boot_trial.refuse_trial(machine, entry)
    wanted = prepare_apply(machine, found, request, options, trial=True)
    now = wanted.before
    if now.items:
        raise EmupmemError(
            f"memmap={','.join(now.items)} is reserved already: a trial is for a first reservation",
            "sudo emupmem remove first, or apply without --trial",
        )
    if not wanted.normal:
        raise EmupmemError("there is nothing to try")
    words = (wanted.memmap, *wanted.steps.wanted.add)
    steps = by.trial_steps(machine, now, Wanted(trial=words, variable=options.variable))
    if not entry:
        steps = replace(steps, notes=())
    return change_of(machine, by, now, steps, wanted.plan, found.notes)


@_asks_once
def prepare_confirm(machine: Host) -> Change:
    """The change that makes the reservation of a trial permanent and takes the entry away.

    Raises EmupmemError where no trial is there, or this boot is not it.
    """
    by = detect.of(machine)
    state = boot_trial.state(machine)
    if state is None:
        rest = _rest_of_confirm(machine)
        if rest is not None:
            return rest
        raise EmupmemError("there is no trial to confirm", "emupmem apply --trial begins one")
    if not state.running:
        raise EmupmemError(
            f"this boot is not the trial of {state.words[0]}", "emupmem verify shows its state"
        )
    now = by.standing(machine)
    wanted = Wanted(_items(state.words[0]), state.words[1:], variable=state.variable)
    change = change_of(machine, by, now, by.steps(machine, wanted))
    soft = [BootDevice(r.start, r.size, r.kind) for r in _reservations(wanted.items) if r.kind.soft]
    return replace(change, unit=_unit_of(machine, change, devices=soft)) if soft else change


def _rest_of_confirm(machine: Host) -> Change | None:
    """What a confirm that was killed left to do: the reservation of this boot is permanent, its menu is not made."""
    rest = _settled(machine)
    booted = parse_command_line(machine.peek("/proc/cmdline")).reservations
    done = rest is not None and rest.needed and rest.normal == tuple(i.text for i in booted)
    return rest if booted and done else None


def _settled(machine: Host) -> Change | None:
    """What is left to do without another reservation; None where another tool owns the entries."""
    by = detect.of(machine)
    if isinstance(by, Owned):
        return None
    now = by.standing(machine)
    return change_of(machine, by, now, by.settle(machine, now))


def _is_to_abandon(change: Change) -> bool:
    """Whether something of a trial is left: its entry, its choice, or a file that was made for it."""
    return bool(change.before.trial or change.before.chosen or change.steps.unfinished)


@_asks_once
def prepare_abandon(machine: Host) -> Change:
    """The change that takes the entry of a trial away again. Raises EmupmemError where there is none."""
    change = _settled(machine)
    if change is None or not change.needed or not _is_to_abandon(change):
        state = boot_trial.state(machine)
        if state:
            raise EmupmemError(
                "there is no trial to abandon", "a trial by kexec is nowhere on the disk: reboot goes back"
            )
        raise EmupmemError("there is no trial to abandon", state=UNCHANGED)
    return change
