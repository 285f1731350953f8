"""Apply and remove: what to change (computed first, shown, proven) and the one transaction that does it.

At every moment the machine boots either its old or its new configuration: files are replaced by
rename, grub.cfg is set aside before the generator (which writes it in place) runs, and whatever
goes wrong after the first write puts everything back. A run that was killed leaves what the next
`apply` or `remove` finishes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from emupmem import dropin, elsewhere, foreign, grubcfg, loader, mount, oneshot, survey, trial
from emupmem.blocks import mounts
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.editor import defaults, quoting
from emupmem.editor import edits as editor_edits
from emupmem.editor import text as editor_text
from emupmem.elsewhere import GENERATOR_SECONDS, WORDS_RECORD, Elsewhere, put, refuse_changed
from emupmem.kernel.cmdline import format_memmap, mangled, parse_command_line, parse_memmap_value
from emupmem.model import UNCHANGED, Command, CommandLine, EmupmemError, FileEdit, Plan, Request, Reservation
from emupmem.planner.plan import plan, satisfied
from emupmem.planner.situation import STEPS, Situation
from emupmem.system import backups, files, lock
from emupmem.system.backups import BACKUPS, stamp
from emupmem.system.lock import Interrupts, interrupts
from emupmem.system.machine import Machine
from emupmem.unit import FILE as UNIT_FILE
from emupmem.unit import NO_CHANGE, BootMount, UnitChange
from emupmem.unit import read as read_unit
from emupmem.units import human

OUR_WORDS = ("nokaslr",)
"""Words beside memmap= that apply adds when asked to."""

WRITTEN = (GRUB_DEFAULT, UNIT_FILE, trial.SCRIPT, dropin.NAME)
"""What is replaced by rename; the menu is what the generator writes in place."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How apply should go about it."""

    variable: str = editor_text.LINUX
    add: bool = False
    replace: bool = False
    nokaslr: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """A new text for /etc/default/grub and what the boot menu must carry afterwards.

    `normal` and `recovery` are the items (`1G!4G`) of the normal and the recovery entries.
    `regenerate` says that the menu is not what the (unchanged) defaults ask for. `edits` are other
    files that change with it, `trial` the words that the entry for a trial boot adds (empty: there must be none).
    `elsewhere` is set where another loader than GRUB with grub-mkconfig starts the machine: then `edits` are
    all files that emupmem itself writes.
    """

    before: bytes
    after: bytes
    normal: tuple[str, ...]
    recovery: tuple[str, ...]
    plan: Plan | None = None
    warnings: tuple[str, ...] = ()
    regenerate: bool = False
    unit: UnitChange = NO_CHANGE
    edits: tuple[FileEdit, ...] = ()
    trial: tuple[str, ...] = ()
    elsewhere: Elsewhere | None = None

    @property
    def needed(self) -> bool:
        return self.boot_needed or self.unit.needed

    @property
    def boot_needed(self) -> bool:
        """Whether GRUB's side changes; the unit that mounts may change alone."""
        runs = self.elsewhere is not None and bool(self.elsewhere.steps.commands)
        changed = any(e.before != e.after for e in self.edits)
        return self.before != self.after or self.regenerate or changed or runs

    @property
    def diff(self) -> str:
        """A unified diff, empty when the texts stay as they are."""
        others = "".join(unified(e.before or b"", e.after or b"", e.name) for e in self.edits)
        return unified(self.before, self.after) + others + self.unit.diff

    @property
    def memmap(self) -> str:
        """All reservations after the change as one argument, empty where there are none."""
        return f"memmap={','.join(self.normal)}" if self.normal else ""

    @property
    def tries(self) -> str:
        """The argument of the entry for a trial boot, empty where there is none."""
        return next((w for w in self.trial if w.startswith("memmap=") and "!" in w), "")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done: names of the backup and the number of entries that carry the argument.

    `problem` is what a person should look at although the change itself is done.
    """

    backup: str = ""
    entries: int = 0
    generator: str = ""
    problem: str = ""


def unified(before: bytes, after: bytes, name: str = GRUB_DEFAULT) -> str:
    """The unified diff of two versions of a file."""
    old, new = (t.decode("utf-8", "backslashreplace").splitlines(keepends=True) for t in (before, after))
    lines = difflib.unified_diff(old, new, name, name)
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )


# What to change -----------------------------------------------------------------------------------


def read_defaults(machine: Machine) -> bytes:
    """The text of /etc/default/grub. Raises EmupmemError where there is none."""
    data = machine.read(GRUB_DEFAULT)
    if data is None:
        raise EmupmemError(
            f"there is no {GRUB_DEFAULT}: this machine is not started by a GRUB that grub-mkconfig sets up",
            "emupmem changes such machines only",
        )
    return data


def next_line(machine: Machine) -> CommandLine:
    """The kernel command line of the next start, whatever the boot loader. Raises EmupmemError."""
    other = loader.of(machine)
    if other is None:
        return effective_line(machine, read_defaults(machine))
    standing = other.standing(machine)
    if standing.line is None:
        raise EmupmemError(f"which entry of {standing.menu} boots by default cannot be told")
    return standing.line


def effective_line(machine: Machine, main: bytes) -> CommandLine:
    """The kernel command line that GRUB's defaults give a normal entry, drop-ins included."""
    values = _effective(machine, main)
    return parse_command_line(
        " ".join(grubcfg.kernel_text(values[v].value or "") for v in editor_text.VARIABLES)
    )


def _effective(
    machine: Machine, main: bytes, own: bytes | bool | None = True
) -> dict[str, defaults.Effective]:
    """What GRUB's defaults come to with `main` as /etc/default/grub, and `own` as our drop-in.

    `own` is True for the one that is there, None for none.
    """
    texts = dict(survey.grub_texts(machine)) | {GRUB_DEFAULT: main}
    if own is not True:
        texts.pop(dropin.NAME, None)
        texts |= {dropin.NAME: own} if isinstance(own, bytes) else {}
    order = [GRUB_DEFAULT, *sorted(n for n in texts if n != GRUB_DEFAULT)]
    return defaults.effective([(n, texts[n]) for n in order], sh=survey.judge(machine))


def _refuse_mangled(line: CommandLine) -> None:
    """Raise EmupmemError for an item that would make the kernel leave almost all memory unused."""
    item = mangled(line)
    if item:
        size = human(next(i.size for i in line.items if i.text == item))
        raise EmupmemError(
            f"memmap={item} on the kernel command line is a limit of {size} for all memory, as the kernel reads it",
            r"take it out or write it right (memmap=SIZE!START; a $ as \\\$) in the boot configuration",
        )


def _own_dropin(machine: Machine) -> tuple[str, tuple[str, ...]] | None:
    """(variable, words) of our drop-in, None where there is none. Raises EmupmemError for one that was edited."""
    data = machine.read(dropin.NAME)
    if data is None or not survey.reads_dropins(machine):
        return None
    found = dropin.read(data.decode("utf-8", "replace"))
    if found is None:
        raise EmupmemError(
            f"{dropin.NAME} is not as emupmem wrote it", "take it away by hand, then try again"
        )
    return found


def _unread_dropin(machine: Machine) -> tuple[FileEdit, ...]:
    """What takes our drop-in away where no grub-mkconfig reads it."""
    data = machine.read(dropin.NAME)
    if data is None or not data.startswith(dropin.MARK.encode()) or survey.reads_dropins(machine):
        return ()
    return (FileEdit(dropin.NAME, data, None),)


def _items_in(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(i for w in words for i in quoting.items_of(w))


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
    without = _effective(machine, before, None)
    last = without[variable]
    words = (f"memmap={','.join(items)}", *extra) if items else ()
    data = dropin.text(variable, words, f"{last.filename}:{last.line}").encode() if words else None
    values = _effective(machine, before, data)
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
    wishes: Sequence[mount.Wish] = (),
) -> Change:
    """The change that makes the machine reserve what is asked, and mount it as `wishes` say, one for a device.

    Raises EmupmemError for a reservation that differs (without --replace or --add), for a drop-in
    that would override, and for everything that the planner and the editor refuse.
    """
    mount.check_wishes(machine, wishes)
    other = loader.of(machine)
    if other is not None:
        change, made = _apply_elsewhere(machine, other, found, request, options)
        return _with_mounts(machine, change, made, wishes)
    before = read_defaults(machine)
    held = survey.configured_items(machine, before)
    if len(held) > 1 and not options.replace:
        raise _in_both(held, "--replace puts the new one in place of both")
    present, variable = _all_items(held), next(iter(held), editor_text.LINUX)
    own = _own_dropin(machine)
    if own is not None:
        if present:
            raise EmupmemError(
                f"both {GRUB_DEFAULT} and {dropin.NAME} reserve memory", "sudo emupmem remove takes away both"
            )
        present, variable = _items_in(own[1]), own[0]
    _refuse_dropin_items(machine, before, present)
    line = effective_line(machine, before)
    _refuse_mangled(line)
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


def _with_mounts(machine: Machine, change: Change, made: Plan | None, wishes: Sequence[mount.Wish]) -> Change:
    """The change with the unit that mounts the devices as wished, one wish for a device."""
    meant = sorted(made.reservations if made else _reservations(change.normal), key=_start)
    if len(wishes) > len(meant):
        raise EmupmemError(
            f"--mount is given {len(wishes)} times for {len(meant)} device{'s' * (len(meant) > 1)}",
            "give it once for each device",
        )
    pairs = [((r.start, r.size), wish) for r, wish in zip(meant, wishes, strict=False)]
    return replace(change, unit=mount.unit_change(machine, _ranges(change), pairs))


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
    _refuse_mangled(line)
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
    sh = survey.judge(machine)
    after = defaults.set_items(before, variable, items, extra_words=words, sh=sh)
    if after != before:
        defaults.prove(before, after, variable, items, extra_words=words, sh=sh)
    change = _change(machine, before, after, made, found)
    wanted = defaults.effective([(GRUB_DEFAULT, after)], sh=sh)[variable].items
    if _effective(machine, after)[variable].items == wanted:
        return change
    if survey.configured_items(machine, before):
        last = _effective(machine, after)[variable]
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
    other = loader.of(machine)
    if other is not None:
        return _with_units(machine, _remove_elsewhere(machine, other, items))
    before = read_defaults(machine)
    held = survey.configured_items(machine, before)
    own = _own_dropin(machine)
    here = _items_in(own[1]) if own is not None else ()
    present, variable = (*_all_items(held), *here), next(iter(held), editor_text.LINUX)
    named, left = _left(present, items)
    if left and len(held) + bool(here) > 1:
        raise _in_both(
            held | ({dropin.NAME: here} if here else {}), "remove without a name gives all of it back"
        )
    sh = survey.judge(machine)
    if own is not None and (left or not held):
        extra = [w for w in own[1] if not quoting.items_of(w)] if left else []
        change = _through_dropin(machine, before, own[0], left, extra, None, None)
    else:
        after = defaults.remove_items(before, named, sh=sh) if left else _undone(machine, before)
        if after != before:
            gone = _words_gone(machine, before, after)
            defaults.prove(before, after, variable, left, drop_words=gone, sh=sh)
        change = _change(machine, before, after, None, None, None if own is not None else True)
        if own is not None:
            gone_file = FileEdit(dropin.NAME, machine.read(dropin.NAME), None)
            change = replace(change, edits=(*change.edits, gone_file))
    _refuse_dropin_items(machine, before, present)
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
        return mount.unit_change(machine, _ranges(change))
    except EmupmemError:
        return NO_CHANGE


def _all_items(held: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(item for items in held.values() for item in items)


def _in_both(held: dict[str, tuple[str, ...]], hint: str) -> EmupmemError:
    places = " and ".join(f"memmap={','.join(items)} in {name}" for name, items in held.items())
    return EmupmemError(f"{GRUB_DEFAULT} reserves in two places: {places}", hint)


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


def _words_gone(machine: Machine, before: bytes, after: bytes) -> tuple[str, ...]:
    """Words other than memmap= that an undo takes away: what apply had added beside it (nokaslr)."""
    old, new = (defaults.read(t, GRUB_DEFAULT, sh=survey.judge(machine)) for t in (before, after))
    gone = (set(old.variable(v).words) - set(new.variable(v).words) for v in editor_text.VARIABLES)
    return tuple(w for words in gone for w in sorted(words) if w in OUR_WORDS)


def _undone(machine: Machine, current: bytes) -> bytes:
    """The text without our items: former bytes from the backups of the applies that made it."""
    text = current
    for name in _records(machine):
        former, written = machine.read(name), machine.read(f"{name}.written")
        if former is None or written is None or not survey.configured_items(machine, written):
            continue
        candidate = editor_edits.undo_lines(text, former, written)
        if candidate is None:
            continue  # its lines are not in force: an apply that did not come to its end, or was changed since
        text = candidate
        if not survey.configured_items(machine, text):
            return text
        # that apply replaced an earlier one of ours: go on with the one before it
    return defaults.remove_items(text, None, sh=survey.judge(machine))


def _records(machine: Machine) -> list[str]:
    """Backups of /etc/default/grub that an apply or remove of ours made, newest first."""
    names = [n for n in machine.names(BACKUPS) if n.startswith("grub.") and n.endswith(".written")]
    return [f"{BACKUPS}/{n.removesuffix('.written')}" for n in sorted(names, reverse=True)]


def _change(
    machine: Machine,
    before: bytes,
    after: bytes,
    made: Plan | None,
    found: survey.Survey | None,
    own: bytes | bool | None = True,
) -> Change:
    values = _effective(machine, after, own)
    recovery = values[editor_text.LINUX].items
    normal = (*recovery, *values[editor_text.DEFAULT].items)
    warnings = (*(found.notes if found else ()), *(made.warnings if made else ()))
    cfg = environment.grub_cfg(machine)
    script = machine.read(trial.SCRIPT)
    regenerate = machine.live and (
        bool(_menu_problems(machine, cfg, normal, recovery))
        or _unfinished(machine, cfg)
        or (script is None and trial.left_over(machine))
    )
    gone = (FileEdit(trial.SCRIPT, script, None, 0o755),) if script is not None else ()
    edits = (*gone, *_unread_dropin(machine))
    return Change(
        before, after, normal, recovery, made, warnings, regenerate and before == after, edits=edits
    )


def _unfinished(machine: Machine, cfg: str) -> bool:
    """Whether a run that was killed left something."""
    return backups.is_aside(machine, cfg) or bool(_leftovers(machine, cfg))


def _leftovers(machine: Machine, cfg: str) -> list[Path]:
    return backups.leftovers(machine, (*WRITTEN, cfg, environment.grubenv_name(machine)))


def prepare_trial(
    machine: Machine, found: survey.Survey, request: Request, options: Options, entry: bool = True
) -> Change:
    """The change that makes one extra entry in GRUB's menu with the reservation, and nothing permanent.

    Without `entry` only the plan is wanted, for kexec.

    Raises EmupmemError as prepare_apply does, where something is reserved already, and where GRUB
    could not forget the choice by itself.
    """
    if entry:
        trial.refuse(machine)
    elif loader.of(machine) is not None:
        raise EmupmemError("a trial by kexec reads GRUB's menu", "--trial without kexec, or no trial here")
    wanted = prepare_apply(machine, found, request, options)
    permanent = wanted.elsewhere
    own = _own_dropin(machine)
    configured = survey.configured_items(machine, wanted.before)
    present = permanent.before.items if permanent is not None else _all_items(configured)
    present = present or _items_in(own[1] if own else ())
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
    again = not trial.chosen(machine) or bool(trial.problem(text, words)) or _unfinished(machine, cfg)
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
    steps = oneshot.steps(machine, standing, words)
    default = standing.default
    tried = (*(default.words if default else ()), *words)
    what = Elsewhere(permanent.by, standing, steps, (), trial=tried)
    notes = _replaces("" if standing.chosen else loader.one_shot(machine))
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
    state = trial.state(machine)
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
    other = loader.of(machine)
    if other is not None:
        return _elsewhere(machine, other, other.standing(machine), items, state.words[1:], ())
    before = read_defaults(machine)
    return _placed(machine, before, state.variable, items, state.words[1:], None, None)


def _rest_of_confirm(machine: Machine) -> Change | None:
    """What a confirm that was killed left to do: the reservation of this boot is permanent, its menu is not made."""
    if loader.of(machine) is not None:
        return None  # the entry of the trial is the last that goes
    before = read_defaults(machine)
    rest = _change(machine, before, before, None, None)
    booted = parse_command_line(machine.peek("/proc/cmdline")).reservations
    return rest if rest.needed and booted and rest.normal == tuple(i.text for i in booted) else None


def prepare_abandon(machine: Machine) -> Change:
    """The change that takes the entry of a trial away again. Raises EmupmemError where there is none."""
    other = loader.of(machine)
    if other is not None:
        standing = other.standing(machine)
        change = _elsewhere(machine, other, standing, standing.items, (), ())
        if not standing.trial and not standing.chosen:
            change = replace(change, edits=(), elsewhere=None, regenerate=False)
    else:
        before = read_defaults(machine)
        change = _change(machine, before, before, None, None)
    if not change.needed:
        state = trial.state(machine)
        if state:
            raise EmupmemError(
                "there is no trial to abandon", "a trial by kexec is nowhere on the disk: reboot goes back"
            )
        raise EmupmemError("there is no trial to abandon", state=UNCHANGED)
    return change


def _menu_problems(
    machine: Machine, cfg: str, normal: Sequence[str], recovery: Sequence[str]
) -> list[tuple[grubcfg.BootEntry | None, str]]:
    try:
        data = machine.read(cfg)
    except EmupmemError:
        return []  # not ours to read without root: a dry run says nothing of it
    text = (data or b"").decode("utf-8", "surrogateescape")
    wrong = grubcfg.problems(grubcfg.entries(text), normal, recovery)
    return wrong or ([] if grubcfg.whole(text) else [(None, "it is not written to its end")])


def _refuse_dropin_items(machine: Machine, main: bytes, present: Sequence[str]) -> None:
    """Reservations made in a drop-in are somebody's own; two places that reserve are a trap."""
    for name, text in survey.grub_texts(machine):
        if name in (GRUB_DEFAULT, dropin.NAME):
            continue
        for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
            code = line.split("#")[0]
            if "memmap=" in code and "!" in code:
                raise EmupmemError(
                    f"{name}:{number} reserves memory already: {code.strip()}",
                    "take that line away first, or leave the reservation to it",
                )


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
        mount.write_unit(machine, change.unit)
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
    backups.remove_leftovers(machine, _leftovers(machine, environment.grub_cfg(machine)))
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
    if backups.is_aside(machine, cfg) and not grubcfg.whole(text):
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
    language = grubcfg.language((machine.read(cfg) or b"").decode("utf-8", "surrogateescape"))
    done = machine.run(generator, GENERATOR_SECONDS, language)
    name = generator.argv[0]
    if done.status:
        raise EmupmemError(f"{name} failed with status {done.status}: {done.last_words}")
    wrong = _menu_problems(machine, cfg, change.normal, change.recovery)
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
    return sum(1 for e in grubcfg.entries(text) if e.ours and e.command_line.reservations)


def _blame(machine: Machine, change: Change) -> str:
    """Which file had the last word on the variables, for the message."""
    try:
        values = _effective(machine, change.after)  # our own drop-in is written at this point
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
    undone = editor_edits.undo_lines(now, change.before, change.after)
    if undone is not None:
        files.replace_file(machine, GRUB_DEFAULT, undone)
        return f"; {GRUB_DEFAULT} keeps what somebody else changed in it meanwhile"
    kept = backups.back_up(machine, GRUB_DEFAULT, stamp(), now, ".edited")
    files.replace_file(machine, GRUB_DEFAULT, change.before)
    return f"; what somebody else wrote into {GRUB_DEFAULT} meanwhile is kept as {kept}"
