# SPDX-License-Identifier: Apache-2.0
"""Boot loaders: what each machine boots with, what its next start will tell the kernel, and how to change that.

Each way is one `Loader`: it reads how the next start stands, and gives the edits and commands of a change as
data. `prepare` decides what is wanted, `transaction` carries it out, has everything read again and judged, or
puts all back. To add a loader: one file with its class, and one line in `detect`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

from emupmem.boot import entry as boot_entry
from emupmem.boot.bls import text
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import PLACEHOLDER, Owner, Refused, RefusedRemoval
from emupmem.editor import text as editor_text
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import Command, CommandLine, EmupmemError, FileEdit
from emupmem.record import record
from emupmem.system.host import Host
from emupmem.system.machine import Machine

PROGRAMS = (
    "grubby",
    "sdbootutil",
    "rpm-ostree",
    "ostree",
    "kernel-install",
    "bootctl",
    "kernelstub",
    "sdboot-manage",
    "proxmox-boot-tool",
    "limine-entry-tool",
    "ukify",
    "mkinitcpio",
    "dracut",
    "transactional-update",
)
"""What the loaders here look for, or run."""

Check = Callable[[Host], tuple[str, ...]]
"""Raises EmupmemError for what apply must not touch, gives warnings for what could not be told."""


@record
class Options:
    """How apply should go about it. `variable` is the one of GRUB's that is to hold the reservation."""

    variable: str = editor_text.LINUX
    add: bool = False
    replace: bool = False
    nokaslr: bool = False


@record
class Standing:
    """How the next start is set up.

    `items` are ours (`1G!4G`) in the source that new kernels take their words from, `where` names it. `menu` is
    where the entries lie, `default` the one that boots by itself, None where that cannot be told. `trial` are the
    words of the entry for a trial boot, which is not among `entries`; `chosen` says that the next start takes it.
    `notes` are for a person who changes it.

    `places` are set where our items can be in more than one place: each with its items. `source` is what the next
    start's words will be once the entries are made anew from their source; None where they are the source.
    """

    items: tuple[str, ...]
    where: str
    menu: str
    entries: tuple[BootEntry, ...]
    default: BootEntry | None
    trial: tuple[str, ...] = ()
    chosen: bool = False
    notes: tuple[str, ...] = ()
    places: tuple[tuple[str, tuple[str, ...]], ...] = ()
    source: CommandLine | None = None

    @property
    def line(self) -> CommandLine | None:
        """The words of the next start by default, None where they cannot be told."""
        if self.source is not None:
            return self.source
        return self.default.command_line if self.default is not None else None


@record
class NextStart:
    """What `verify` judges of the next start: our items in the source, what was made of it, the files of that.

    `configured` is None where the source could not be read, `recovery` are the items of recovery entries, `whole`
    says that the menu is written to its end.
    """

    configured: tuple[str, ...] | None
    recovery: tuple[str, ...]
    where: str
    entries: tuple[BootEntry, ...] | None
    menu: str
    files: tuple[str, ...]
    whole: bool = True


@record
class Trial:
    """The entry of a trial boot: the file that makes it, the words it adds, where a confirm is to put them.

    `chosen` says that the next start takes it, `starts` that it is in the menu and its kernel is there, `this_boot`
    whether it was made in this boot (None: the time of the file tells).
    """

    file: str
    words: tuple[str, ...]
    chosen: bool
    starts: bool
    variable: str = ""
    this_boot: bool | None = None


@record
class Wanted:
    """What the next start should be told: exactly our `items`, words to `add` and to `drop` beside them.

    `recovery` are the items of recovery entries, None where they are the same. `trial` are the words that the
    entry for a trial boot adds (empty: there must be no such entry). `variable` is one of GRUB's.
    """

    items: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    recovery: tuple[str, ...] | None = None
    trial: tuple[str, ...] = ()
    variable: str = ""


@record
class Steps:
    """A change as data: files to write, then programs to run; `wanted` is what they come to.

    An edit may be one that changes nothing: then the file is only watched. All files here are kept before the
    programs run, and put back when something goes wrong:

    - `menus` are what boots now and what a program makes anew, in place: put back first of all;
    - `owned` are files that programs write or make besides;
    - `rewritten` are edited files that a program writes as well: they are made as planned when it has run.

    `undo` takes back what programs did beside writing files, `refresh` has copies made of what was put back.
    `unfinished` says that something is to be done though no file changes. `recorded` are edited files whose new
    text is kept for a later removal, `remembered` are the words beside memmap= that are of applies afterwards (None:
    the same ones as before). `language` is the locale of the programs. `folders` go at the end where they are empty
    then.
    """

    wanted: Wanted = Wanted()
    edits: tuple[FileEdit, ...] = ()
    commands: tuple[Command, ...] = ()
    owned: tuple[str, ...] = ()
    undo: tuple[Command, ...] = ()
    menus: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    refresh: tuple[Command, ...] = ()
    recorded: tuple[str, ...] = ()
    remembered: tuple[str, ...] | None = None
    unfinished: bool = False
    notes: tuple[str, ...] = ()
    language: str = "C"
    folders: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[FileEdit, ...]:
        """The edits that change something."""
        return tuple(e for e in self.edits if e.before != e.after)


class Loader(ABC):
    """One way to tell the kernel of the next start what to reserve.

    `title` names it, `back` tells how to start without the reservation by hand, `by_hand` what to do
    where not all could be put back (`{run}` is what makes the menu).
    """

    title: str
    back: str
    by_hand: str = "look at {menu}"
    forgets: bool = True
    """Whether the loader forgets a trial by itself: the start after it is the old configuration. Where it does not,
    the steps of a change choose the trial, or choose it no more."""

    # How it stands -------------------------------------------------------------------------------------------

    @abstractmethod
    def standing(self, machine: Host) -> Standing:
        """How the next start stands. Raises EmupmemError where that cannot be read."""

    def line(self, machine: Host) -> CommandLine:
        """The kernel command line of the next start. Raises EmupmemError where it cannot be told."""
        now = self.standing(machine)
        if now.line is None:
            raise EmupmemError(f"cannot determine the default boot entry in {now.menu}")
        return now.line

    def next_start(self, machine: Host, unseen: list[tuple[str, str]]) -> NextStart:
        """The same for a verdict: what cannot be read goes to `unseen`, as (rung, reason)."""
        try:
            now = self.standing(machine)
        except EmupmemError as exc:
            unseen += [("configured", exc.message), ("generated", exc.message)]
            return NextStart(None, (), self.title, None, self.title, ())
        return NextStart(now.items, now.items, now.where, now.entries, now.menu, self.sources(machine))

    def sources(self, machine: Host) -> tuple[str, ...]:
        """The files whose times tell when the next start was changed."""
        return ()

    def target(self, machine: Host) -> BootEntry | None:
        """The entry that boots next, None where that cannot be told."""
        try:
            return self.standing(machine).default
        except EmupmemError:
            return None

    def trial(self, machine: Host) -> Trial | None:
        """The trial that is set up, None where there is none."""
        return None

    def seen(self, machine: Host, name: str) -> str:
        """The loader and its menu in one line; `name` is what it calls itself, as far as that is known."""
        try:
            now = self.standing(machine)
        except EmupmemError as exc:
            return f"{name or self.title}: {exc.message}"
        count = sum(1 for e in now.entries if e.ours)
        return (
            f"{name or self.title}, {count} entr{'ies' if count != 1 else 'y'} of this system in {now.menu}"
        )

    def new_kernels_take(self, machine: Host, now: Standing) -> str:
        """Where the words of a new kernel's entry come from."""
        return now.where

    # Whether it may be changed -------------------------------------------------------------------------------

    @abstractmethod
    def refuse(self, machine: Host) -> None:
        """Raise EmupmemError where this way is not open on the machine."""

    def checks(self, machine: Host) -> dict[str, Check]:
        """The checks before a change, by name."""
        return {"loader": self._check}

    def _check(self, machine: Host) -> tuple[str, ...]:
        self.refuse(machine)
        try:
            self.standing(machine)
        except EmupmemError:
            if machine.running and not machine.is_root:
                return ()  # a dry run without root
            raise
        return ()

    def refuse_apply(self, machine: Host, now: Standing, options: Options) -> None:
        """Raise EmupmemError for what must not be joined with a new reservation, and for options of others."""
        if options.variable != editor_text.LINUX:
            raise EmupmemError(
                f"--variable names a variable of GRUB's, and {self.title} starts this machine",
                "omit it",
            )

    def refuse_removal(self, machine: Host) -> None:  # noqa: B027 (most loaders refuse none)
        """Raise EmupmemError where a reservation must not be given back here."""

    def refuse_trial(self, machine: Host) -> None:
        """Raise EmupmemError where a trial boot is not possible."""
        raise self._no_trial()

    def _no_trial(self) -> EmupmemError:
        return EmupmemError(
            f"a trial is not known for {self.title}, which starts this machine",
            "apply without --trial; " + self.back.format(memmap="memmap=…") + " goes back",
        )

    def refuse_kexec(self, machine: Host) -> None:
        """Raise EmupmemError where a trial by kexec is not possible."""
        raise EmupmemError("a trial by kexec reads GRUB's menu", "--trial without kexec, or no trial here")

    # What a change is ----------------------------------------------------------------------------------------

    @abstractmethod
    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        """What makes the next start as wanted, and takes the entry of a trial away.

        Nothing in it where all is so already. Raises EmupmemError.
        """

    def settle(self, machine: Host, now: Standing) -> Steps:
        """What is left to do without another reservation: an unfinished run, a trial that is given up.

        A file that goes without it was made for a trial, or by a run that was killed.
        """
        steps = self.steps(machine, Wanted(now.items))
        return replace(steps, unfinished=any(e.after is None for e in steps.changed))

    def trial_steps(self, machine: Host, now: Standing, wanted: Wanted) -> Steps:
        """What makes the entry of a trial with the words `wanted.trial`. Raises EmupmemError."""
        raise self._no_trial()

    def files(self, machine: Host) -> tuple[str, ...]:
        """Files that a change may write, whatever this one does: what a killed run left is beside them."""
        return ()

    def to_run_there(self, machine: Host) -> Command | None:
        """What makes the menu on the machine whose tree was edited, None where nothing is needed."""
        return None

    def torn(self, machine: Host) -> tuple[str, ...]:
        """Files that a run which was killed left half-written: their whole copy takes their place.

        Asked while nobody else is at work: a file that is being written looks the same. One without a copy was
        only made by that run, and goes.
        """
        return ()

    # While it is carried out ---------------------------------------------------------------------------------

    def chosen(self, machine: Host) -> bool:
        """Whether the next start takes the entry of a trial."""
        return False

    def choosing(self, wanted: bool) -> Command | None:
        """The program that lets the next start be the trial, or not, as it is shown."""
        return None

    def choose(self, machine: Machine, wanted: bool) -> None:
        """Let the next start be the trial, or not. Raises EmupmemError."""
        step = self.choosing(wanted)
        if step is None:
            return
        done = machine.run(step)
        if done.status:
            raise EmupmemError(f"{step.argv[0]} failed with status {done.status}: {done.last_words}")

    def choice(self, machine: Host) -> str:
        """What the next start takes for once, whoever chose it; empty where nothing is chosen."""
        return ""

    def choose_again(self, machine: Machine, name: str) -> None:  # noqa: B027 (where there is no such choice)
        """Let the next start be what somebody had chosen. Raises EmupmemError."""

    def prove(self, machine: Host, before: Standing, steps: Steps) -> int:
        """Read everything again; the number of entries that carry the reservation.

        Raises EmupmemError where the entries are not as planned.
        """
        after = self.standing(machine)
        wrong = problems_after(
            self.judged(before, steps.wanted), self.judged(after, steps.wanted), steps.wanted
        )
        if not wrong and machine.live:
            wrong = self.trial_problem(before, after, steps.wanted)
        if wrong:
            raise EmupmemError(f"the boot entries are not as planned: {wrong}")
        return sum(1 for e in after.entries if e.ours and e.command_line.reservations)

    def kept_state(self, machine: Host) -> tuple[str, ...]:
        """What its programs keep and no file tells, for `undo_to`; empty where files are all. Raises EmupmemError."""
        return ()

    def undo_to(self, machine: Host, state: tuple[str, ...]) -> tuple[Command, ...]:
        """What makes it that state again, none where it is. Raises EmupmemError where that cannot be told."""
        return ()

    def prove_undone(self, machine: Host, before: Standing) -> None:  # noqa: B027 (most put files back, which is sure)
        """Raise EmupmemError where what undid a change did not make all as it was."""

    def judged(self, standing: Standing, wanted: Wanted) -> Standing:
        """The part of it that a change can answer for."""
        return standing

    def trial_problem(self, before: Standing, after: Standing, wanted: Wanted) -> str:
        """What is wrong with the entry of the trial, empty where nothing is."""
        if not wanted.trial:
            return "the entry of the trial is still there" if after.trial else ""
        words = before.default.words if before.default is not None else ()
        words = (*words, *(w for w in wanted.trial if w not in words))
        return "" if after.trial == words else "the entry of the trial is not there, or has other words"

    def done_by(self, steps: Steps) -> str:
        """Who made the entries, for the report."""
        return self.title


class Owned(Loader):
    """Boot entries that belong to another tool: nothing is changed, and what to do instead is said."""

    back = "as that tool says"

    def __init__(self, by: Owner) -> None:
        self.by, self.title = by, by.title

    def standing(self, machine: Host) -> Standing:
        raise Refused(self.by)

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        raise Refused(self.by)

    def refuse(self, machine: Host) -> None:
        raise Refused(self.by)

    def refuse_trial(self, machine: Host) -> None:
        raise Refused(self.by)

    def refuse_removal(self, machine: Host) -> None:
        """Raise EmupmemError with the way to give back what is reserved."""
        booted = parse_command_line(machine.peek("/proc/cmdline")).reservations if machine.running else ()
        words = f"memmap={','.join(i.text for i in booted)}" if booted else PLACEHOLDER
        raise RefusedRemoval(self.by, words)


def problems_after(before: Standing, after: Standing, wanted: Wanted) -> str:
    """What is wrong after a change, the first thing; empty where all entries are as planned and else as before."""
    wrong = boot_entry.problems(after.entries, wanted.items, wanted.items)
    if wrong:
        entry, why = wrong[0]
        return f"{after.menu}{f': {entry.ids[-1] or entry.title}' if entry else ''}: {why}"
    old = {e.ids: e for e in before.entries}
    for entry in after.entries:
        was = old.get(entry.ids)
        if was is None:
            continue
        words = [w for w in text.foreign_words(was.command_line) if not (was.ours and w in wanted.drop)]
        words += [w for w in wanted.add if was.ours and w not in words]
        if sorted(text.foreign_words(entry.command_line)) != sorted(words):
            return f"{after.menu}: {entry.ids[-1] or entry.title}: other words of it were changed"
        if entry.kernel != was.kernel:
            return f"{after.menu}: {entry.ids[-1] or entry.title}: it starts another kernel"
    if len(after.entries) < len(before.entries):
        return f"{after.menu}: entries are gone"
    return ""


def taken_choice(other: str) -> tuple[str, ...]:
    """The warning that somebody else's choice for the next start is lost."""
    return (f"the next start was chosen to be “{other}”: the trial takes its place",) if other else ()
