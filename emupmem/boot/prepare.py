# SPDX-License-Identifier: Apache-2.0
"""Apply and remove: what to change, computed first; the transaction does it after it is shown.

At every moment the machine boots either its old or its new configuration: files are replaced by
rename, grub.cfg is set aside before the generator (which writes it in place) runs, and whatever
goes wrong after the first write puts everything back. A run that was killed leaves what the next
`apply` or `remove` finishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from emupmem.boot import detect, efi, elsewhere, loader, systemd_boot
from emupmem.boot import trial as boot_trial
from emupmem.boot.change import OUR_WORDS, Change, Options
from emupmem.boot.elsewhere import WORDS_RECORD, Elsewhere
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import dropin, environment, trial
from emupmem.boot.grub.defaults import (
    effective_defaults,
    effective_line,
    items_of_all,
    items_of_words,
    read_defaults,
    read_own_dropin,
    refuse_dropin_items,
    refuse_mangled,
    reserved_twice,
    undone_defaults,
    unread_dropin,
    words_to_take_out,
)
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.boot.transaction import has_leftovers, menu_problems
from emupmem.device import boot_unit
from emupmem.device.blocks import mounts
from emupmem.device.unit import NO_CHANGE, BootMount, UnitChange
from emupmem.device.unit import read as read_unit
from emupmem.editor import defaults, quoting
from emupmem.editor import text as editor_text
from emupmem.kernel.cmdline import format_memmap, parse_command_line, parse_memmap_value
from emupmem.model import UNCHANGED, CommandLine, EmupmemError, FileEdit, Plan, Request, Reservation
from emupmem.planner import survey
from emupmem.planner.plan import plan, satisfied
from emupmem.planner.situation import STEPS, Situation
from emupmem.system.machine import Machine


def next_line(machine: Machine) -> CommandLine:
    """The kernel command line of the next start, whatever the boot loader. Raises EmupmemError."""
    other = detect.of(machine)
    if other is None:
        return effective_line(machine, read_defaults(machine))
    standing = other.standing(machine)
    if standing.line is None:
        raise EmupmemError(f"which entry of {standing.menu} boots by default cannot be told")
    return standing.line


def _through_dropin(
    machine: Machine,
    before: bytes,
    variable: str,
    items: Sequence[str],
    extra: Sequence[str],
    made: Plan | None,
    found: survey.Survey | None,
) -> Change:
    """The change that reserves in a drop-in of our own (takes it away where there are no items).

    Raises EmupmemError where another file still has the last word, or would be changed by it.
    """
    was = machine.read(dropin.NAME)
    without = effective_defaults(machine, before, None)
    last = without[variable]
    words = (f"memmap={','.join(items)}", *extra) if items else ()
    data = dropin.text(variable, words, f"{last.filename}:{last.line}").encode() if words else None
    values = effective_defaults(machine, before, data)
    wanted = " ".join([*quoting.words_of(without[variable].value or ""), *words])
    if " ".join(quoting.words_of(values[variable].value or "")) != wanted:
        other = values[variable]
        raise EmupmemError(
            f"{other.filename}:{other.line} assigns {variable} anew, so neither {GRUB_DEFAULT} nor {dropin.NAME} "
            "would reach the kernel",
            "make that file extend the variable",
        )
    change = _change(machine, before, before, made, found, data)
    edits = (*change.edits, FileEdit(dropin.NAME, was, data))
    note = (
        (f"{last.filename}:{last.line} assigns {variable} anew: the reservation goes into {dropin.NAME}",)
        if data is not None and was is None
        else ()
    )
    return replace(change, edits=edits, warnings=(*change.warnings, *note))


def prepare_apply(
    machine: Machine,
    found: survey.Survey,
    request: Request,
    options: Options,
    wishes: Sequence[boot_unit.Wish] = (),
) -> Change:
    """The change that makes the machine reserve what is asked, and mount it as `wishes` say, one for a device.

    Raises EmupmemError for a reservation that differs (without --replace or --add), for a drop-in
    that would override, and for everything that the planner and the editor refuse.
    """
    boot_unit.check_wishes(machine, wishes)
    other = detect.of(machine)
    if other is not None:
        change, made = _apply_elsewhere(machine, other, found, request, options)
        return _with_mounts(machine, change, made, wishes)
    before = read_defaults(machine)
    held = grub_defaults.configured_items(machine, before)
    if len(held) > 1 and not options.replace:
        raise reserved_twice(held, "--replace puts the new one in place of both")
    present, variable = items_of_all(held), next(iter(held), editor_text.LINUX)
    own = read_own_dropin(machine)
    if own is not None:
        if present:
            raise EmupmemError(
                f"both {GRUB_DEFAULT} and {dropin.NAME} reserve memory", "sudo emupmem remove takes away both"
            )
        present, variable = items_of_words(own[1]), own[0]
    refuse_dropin_items(machine, before, present)
    line = effective_line(machine, before)
    refuse_mangled(line)
    made, items = _decide(line, found, request, options, present, in_place=variable == options.variable)
    if made is not None and not (options.add and present):
        variable = options.variable
    words = OUR_WORDS if options.nokaslr else ()
    if own is not None:
        kept_words = [w for w in own[1] if not quoting.items_of(w) and w not in words]
        change = _through_dropin(machine, before, variable, items, (*kept_words, *words), made, found)
    else:
        change = _placed(machine, before, variable, items, words, made, found)
    return _with_mounts(machine, change, made, wishes)


def _decide(
    line: CommandLine,
    found: survey.Survey,
    request: Request,
    options: Options,
    present: Sequence[str],
    in_place: bool = True,
) -> tuple[Plan | None, tuple[str, ...]]:
    """A plan, None where what is `present` is what was asked; and all our items afterwards.

    `line` are the words of the next start. Raises EmupmemError for a reservation that differs, and as the
    planner does.
    """
    kept = tuple(present) if options.add else ()
    situation = _with_line(found.situation, survey.without_reservations(line, kept))
    if not options.add and in_place and _as_asked(situation, request, present):
        return None, tuple(present)
    if present and not (options.add or options.replace):
        raise EmupmemError(
            f"there is a different reservation already: memmap={','.join(present)}",
            "--replace puts the new one in its place, --add joins them",
        )
    made = plan(situation, request)
    items = (*kept, *_items(made.memmap))
    if options.add:
        joined = sorted(_reservations(items), key=_start)
        items = _items(format_memmap([(r.size, r.start) for r in joined]))
    return made, items


def _with_mounts(
    machine: Machine, change: Change, made: Plan | None, wishes: Sequence[boot_unit.Wish]
) -> Change:
    """The change with the unit that mounts the devices as wished, one wish for a device."""
    meant = sorted(made.reservations if made else _reservations(change.normal), key=_start)
    if len(wishes) > len(meant):
        raise EmupmemError(
            f"--mount is given {len(wishes)} times for {len(meant)} device{'s' * (len(meant) > 1)}",
            "give it once for each device",
        )
    pairs = [((r.start, r.size), wish) for r, wish in zip(meant, wishes, strict=False)]
    return replace(change, unit=boot_unit.unit_change(machine, _ranges(change), pairs))


def _apply_elsewhere(
    machine: Machine, other: loader.Loader, found: survey.Survey, request: Request, options: Options
) -> tuple[Change, Plan | None]:
    """The change for a machine that another loader starts than GRUB with grub-mkconfig."""
    if options.variable != editor_text.LINUX:
        raise EmupmemError(
            f"--variable names a variable of GRUB's, and {other.title} starts this machine", "leave it away"
        )
    standing = other.standing(machine)
    line = standing.line or parse_command_line(machine.peek("/proc/cmdline"))
    refuse_mangled(line)
    made, items = _decide(line, found, request, options, standing.items)
    words = OUR_WORDS if options.nokaslr else ()
    change = _elsewhere(machine, other, standing, items, words, ())
    warnings = (*found.notes, *(made.warnings if made else ()), *change.warnings)
    return replace(change, plan=made, warnings=warnings), made


def _elsewhere(
    machine: Machine,
    other: loader.Loader,
    standing: loader.Standing,
    items: Sequence[str],
    extra: Sequence[str],
    drop: Sequence[str],
) -> Change:
    steps = other.steps(machine, items, extra, drop)
    what = Elsewhere(other, standing, steps, tuple(items), tuple(extra), tuple(drop))
    unfinished = machine.live and elsewhere.unfinished(machine, steps)
    wanted, notes = tuple(items), standing.notes
    return Change(b"", b"", wanted, wanted, None, notes, unfinished, edits=steps.edits, elsewhere=what)


def _placed(
    machine: Machine,
    before: bytes,
    variable: str,
    items: Sequence[str],
    words: Sequence[str],
    made: Plan | None,
    found: survey.Survey | None,
) -> Change:
    """The change that puts the items into /etc/default/grub, or where that is overridden, into a drop-in."""
    sh = grub_defaults.judge(machine)
    after = defaults.set_items(before, variable, items, extra_words=words, sh=sh)
    if after != before:
        defaults.prove(before, after, variable, items, extra_words=words, sh=sh)
    change = _change(machine, before, after, made, found)
    wanted = defaults.effective([(GRUB_DEFAULT, after)], sh=sh)[variable].items
    if effective_defaults(machine, after)[variable].items == wanted:
        return change
    if grub_defaults.configured_items(machine, before):
        last = effective_defaults(machine, after)[variable]
        raise EmupmemError(
            f"{last.filename}:{last.line} assigns {variable} anew, so what {GRUB_DEFAULT} says does not reach the "
            "kernel",
            "sudo emupmem remove takes the reservation out there; apply then uses a drop-in of its own",
        )
    return _through_dropin(machine, before, variable, items, words, made, found)


def prepare_remove(machine: Machine, items: Sequence[str] = ()) -> Change:
    """The change that gives reserved memory back: all of it, or the named items.

    Where nothing else changed the file since apply, the kept backup gives the former bytes.
    """
    other = detect.of(machine)
    if other is not None:
        return _with_units(machine, _remove_elsewhere(machine, other, items))
    before = read_defaults(machine)
    held = grub_defaults.configured_items(machine, before)
    own = read_own_dropin(machine)
    here = items_of_words(own[1]) if own is not None else ()
    present, variable = (*items_of_all(held), *here), next(iter(held), editor_text.LINUX)
    named, left = _left(present, items)
    if left and len(held) + bool(here) > 1:
        raise reserved_twice(
            held | ({dropin.NAME: here} if here else {}), "remove without a name gives all of it back"
        )
    sh = grub_defaults.judge(machine)
    if own is not None and (left or not held):
        extra = [w for w in own[1] if not quoting.items_of(w)] if left else []
        change = _through_dropin(machine, before, own[0], left, extra, None, None)
    else:
        after = defaults.remove_items(before, named, sh=sh) if left else undone_defaults(machine, before)
        if after != before:
            gone = words_to_take_out(machine, before, after)
            defaults.prove(before, after, variable, left, drop_words=gone, sh=sh)
        change = _change(machine, before, after, None, None, None if own is not None else True)
        if own is not None:
            gone_file = FileEdit(dropin.NAME, machine.read(dropin.NAME), None)
            change = replace(change, edits=(*change.edits, gone_file))
    refuse_dropin_items(machine, before, present)
    return _with_units(machine, change)


def _left(present: Sequence[str], items: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The named items, and those that stay. Raises EmupmemError for one that is not there."""
    named = [i.removeprefix("memmap=") for i in items]
    for name, item in zip(named, items, strict=True):
        if name not in present:
            known = f"there are: {', '.join(present)}" if present else "nothing is reserved"
            raise EmupmemError(f"there is no reservation {item}", known)
    return named, tuple(i for i in present if i not in named) if named else ()


def _remove_elsewhere(machine: Machine, other: loader.Loader, items: Sequence[str]) -> Change:
    if isinstance(other, loader.Owned):
        other.refuse_removal(machine)
    standing = other.standing(machine)
    present = standing.items or tuple(
        dict.fromkeys(i.text for e in standing.entries if e.ours for i in e.command_line.reservations)
    )
    _, left = _left(present, items)
    drop = () if left else _added_words(machine)
    return _elsewhere(machine, other, standing, left, (), drop)


def _added_words(machine: Machine) -> tuple[str, ...]:
    """Words beside memmap= that the last apply added: its record names them."""
    words = machine.peek(WORDS_RECORD).split()
    return tuple(w for w in OUR_WORDS if w in words)


def _with_units(machine: Machine, change: Change) -> Change:
    """The change with the unit left for what stays reserved, and a warning for content that is kept no more."""
    left_unit = _unit_left(machine, change)
    lost = [m for m in _kept(left_unit.before) if m.dir not in {k.dir for k in _kept(left_unit.after)}]
    warnings = [
        f"what {m.dir} holds is not saved to {m.keep} any more: emupmem save {m.keep} {m.dir} does it once more"
        for m in lost
        if machine.live and any(x.dir == m.dir for x in mounts(machine))
    ]
    return replace(change, unit=left_unit, warnings=(*change.warnings, *warnings))


def _kept(text: str | None) -> tuple[BootMount, ...]:
    """The mounts of a unit whose content is kept; none where it was edited."""
    try:
        return tuple(m for m in read_unit(text) if m.keep) if text is not None else ()
    except EmupmemError:
        return ()


def _ranges(change: Change) -> list[tuple[int, int]]:
    return [(r.start, r.size) for r in _reservations(change.normal)]


def _unit_left(machine: Machine, change: Change) -> UnitChange:
    """The unit without the mounts of what is given back. It never stops the giving back."""
    try:
        return boot_unit.unit_change(machine, _ranges(change))
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
    return [Reservation(i.start, i.size, _step(i.start, i.size)) for i in parsed]


def _step(start: int, size: int) -> int:
    return next((s for s in STEPS if start % s == 0 and size % s == 0), 1)


def _as_asked(situation: Situation, request: Request, present: Sequence[str]) -> bool:
    if not present:
        return False
    bare = _with_line(
        situation, survey.without_reservations(situation.command_line or parse_command_line(""))
    )
    return satisfied(bare, request, _reservations(present))


def _change(
    machine: Machine,
    before: bytes,
    after: bytes,
    made: Plan | None,
    found: survey.Survey | None,
    own: bytes | bool | None = True,
) -> Change:
    values = effective_defaults(machine, after, own)
    recovery = values[editor_text.LINUX].items
    normal = (*recovery, *values[editor_text.DEFAULT].items)
    warnings = (*(found.notes if found else ()), *(made.warnings if made else ()))
    cfg = environment.grub_cfg(machine)
    script = machine.read(trial.SCRIPT)
    regenerate = machine.live and (
        bool(menu_problems(machine, cfg, normal, recovery))
        or has_leftovers(machine, cfg)
        or (script is None and trial.left_over(machine))
    )
    gone = (FileEdit(trial.SCRIPT, script, None, 0o755),) if script is not None else ()
    edits = (*gone, *unread_dropin(machine))
    return Change(
        before, after, normal, recovery, made, warnings, regenerate and before == after, edits=edits
    )


def prepare_trial(
    machine: Machine, found: survey.Survey, request: Request, options: Options, entry: bool = True
) -> Change:
    """The change that makes one extra entry in GRUB's menu with the reservation, and nothing permanent.

    Without `entry` only the plan is wanted, for kexec.

    Raises EmupmemError as prepare_apply does, where something is reserved already, and where GRUB
    could not forget the choice by itself.
    """
    if entry:
        boot_trial.refuse(machine)
    elif detect.of(machine) is not None:
        raise EmupmemError("a trial by kexec reads GRUB's menu", "--trial without kexec, or no trial here")
    wanted = prepare_apply(machine, found, request, options)
    permanent = wanted.elsewhere
    own = read_own_dropin(machine)
    configured = grub_defaults.configured_items(machine, wanted.before)
    present = permanent.before.items if permanent is not None else items_of_all(configured)
    present = present or items_of_words(own[1] if own else ())
    if present:
        raise EmupmemError(
            f"memmap={','.join(present)} is reserved already: a trial is for a first reservation",
            "sudo emupmem remove first, or apply without --trial",
        )
    if not wanted.normal:
        raise EmupmemError("there is nothing to try")
    if permanent is not None:
        return _trial_elsewhere(machine, wanted, permanent)
    cfg = environment.grub_cfg(machine)
    text = trial.menu(machine)
    words = (wanted.memmap, *(OUR_WORDS if options.nokaslr else ()))
    made = trial.script(text, environment.grubenv(machine), words, options.variable, machine.exists)
    before = machine.read(trial.SCRIPT)
    edit = FileEdit(trial.SCRIPT, before, made.encode("utf-8", "surrogateescape"), 0o755)
    # Tried before and not chosen any more, or not to its end: the menu is made and the choice is taken again.
    again = not trial.chosen(machine) or bool(trial.problem(text, words)) or has_leftovers(machine, cfg)
    other = "" if trial.chosen(machine) else environment.grubenv(machine).get(trial.NEXT, "")
    notes = _replaces(other if entry else "")
    return Change(
        wanted.before,
        wanted.before,
        (),
        (),
        wanted.plan,
        (*wanted.warnings, *notes),
        again,
        edits=(edit,),
        trial=words,
    )


def _replaces(other: str) -> tuple[str, ...]:
    """The warning that somebody else's choice for the next start is lost."""
    return (f"the next start was chosen to be “{other}”: the trial takes its place",) if other else ()


def _trial_elsewhere(machine: Machine, wanted: Change, permanent: Elsewhere) -> Change:
    """The trial of what would be permanent, on a machine that systemd-boot starts."""
    standing = permanent.before
    words = (wanted.memmap, *permanent.extra)
    steps = systemd_boot.trial_steps(machine, standing, words)
    default = standing.default
    tried = (*(default.words if default else ()), *words)
    what = Elsewhere(permanent.by, standing, steps, (), trial=tried)
    notes = _replaces("" if standing.chosen else efi.one_shot(machine))
    return replace(
        wanted,
        normal=(),
        recovery=(),
        warnings=(*wanted.warnings, *notes),
        regenerate=elsewhere.unfinished(machine, steps),
        edits=steps.edits,
        elsewhere=what,
        trial=words,
    )


def prepare_confirm(machine: Machine) -> Change:
    """The change that makes the reservation of a trial permanent and takes the entry away.

    Raises EmupmemError where no trial is there, or this boot is not it.
    """
    state = boot_trial.state(machine)
    if state is None:
        rest = _rest_of_confirm(machine)
        if rest is not None:
            return rest
        raise EmupmemError("there is no trial to confirm", "emupmem apply --trial begins one")
    if not state.running:
        raise EmupmemError(
            f"this boot is not the trial of {state.words[0]}", "emupmem verify tells how it stands"
        )
    items = _items(state.words[0])
    other = detect.of(machine)
    if other is not None:
        return _elsewhere(machine, other, other.standing(machine), items, state.words[1:], ())
    before = read_defaults(machine)
    return _placed(machine, before, state.variable, items, state.words[1:], None, None)


def _rest_of_confirm(machine: Machine) -> Change | None:
    """What a confirm that was killed left to do: the reservation of this boot is permanent, its menu is not made."""
    if detect.of(machine) is not None:
        return None  # the entry of the trial is the last that goes
    before = read_defaults(machine)
    rest = _change(machine, before, before, None, None)
    booted = parse_command_line(machine.peek("/proc/cmdline")).reservations
    return rest if rest.needed and booted and rest.normal == tuple(i.text for i in booted) else None


def prepare_abandon(machine: Machine) -> Change:
    """The change that takes the entry of a trial away again. Raises EmupmemError where there is none."""
    other = detect.of(machine)
    if other is not None:
        standing = other.standing(machine)
        change = _elsewhere(machine, other, standing, standing.items, (), ())
        if not standing.trial and not standing.chosen:
            change = replace(change, edits=(), elsewhere=None, regenerate=False)
    else:
        before = read_defaults(machine)
        change = _change(machine, before, before, None, None)
    if not change.needed:
        state = boot_trial.state(machine)
        if state:
            raise EmupmemError(
                "there is no trial to abandon", "a trial by kexec is nowhere on the disk: reboot goes back"
            )
        raise EmupmemError("there is no trial to abandon", state=UNCHANGED)
    return change
