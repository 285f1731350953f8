# SPDX-License-Identifier: Apache-2.0
"""rpm-ostree: kernel arguments that belong to a deployment.

A trial is a new deployment as well, with a word in its arguments that tells it from a reservation for good. No loader
forgets it by itself: the deployment that runs now stays in the menu, and is pinned, so that no update drops it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from emupmem.boot.bls import text
from emupmem.boot.bls.sources import sources_or_entries
from emupmem.boot.entry import BootEntry
from emupmem.boot.foreign import BOOTC, Refused
from emupmem.boot.loader import Loader, Standing, Steps, Trial, Wanted
from emupmem.editor.quoting import items_of_word
from emupmem.kernel.cmdline import OUR_WORDS, parse_command_line
from emupmem.model import Command, EmupmemError
from emupmem.system.host import Host

KARGS = ("rpm-ostree", "kargs")
STATUS = ("rpm-ostree", "status", "--json")
PIN_HELP = ("ostree", "admin", "pin", "--help")

LOADER_ENTRIES = "/boot/loader"
MARK = "emupmem.trial="
"""Begins the word that tells a trial: whether the deployment before it was pinned for it, which words beside memmap=
are the trial's, and in which boot it was made (`emupmem.trial=pinned,nokaslr,boot.1f2e3d4c`). The kernel and init pass
over it."""
BOOT = "boot."
PINNED, KEPT = f"{MARK}pinned", f"{MARK}kept"


class RpmOstree(Loader):
    """rpm-ostree: kernel arguments belong to a deployment; a change makes a new one, the old one stays in the menu."""

    title = "rpm-ostree"
    back = "in the boot menu choose the deployment before this one"
    forgets = False

    def standing(self, machine: Host) -> Standing:
        return self._standing_of(machine, *_without_mark(self._arguments(machine)))

    def _standing_of(self, machine: Host, line: str, marks: Sequence[str]) -> Standing:
        tried = parse_command_line(line).words if marks else ()
        words = parse_command_line(text.reworked(line, (), (), _ours(marks)) if marks else line).words
        entry = BootEntry(("next deployment",), ("",), (0,), "", words, 1, False, True)
        items = tuple(i.text for i in entry.command_line.reservations)
        kernel = machine.peek("/proc/sys/kernel/osrelease")
        entry = replace(entry, version=kernel)
        name = "rpm-ostree kargs"
        return Standing(items, name, name, (entry,), entry, tried, bool(marks))

    def _arguments(self, machine: Host) -> str:
        done = machine.output(*KARGS, timeout=60)
        if done is None:
            raise Refused(BOOTC)
        lines = [x for x in done.stdout.decode("utf-8", "surrogateescape").splitlines() if x.strip()]
        if done.status or not lines:
            raise EmupmemError(f"rpm-ostree kargs failed with status {done.status}: {done.last_words}")
        return lines[-1]  # versions before 2020 print a heading first

    def sources(self, machine: Host) -> tuple[str, ...]:
        return sources_or_entries(machine)

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        old, marks = _without_mark(self._arguments(machine))
        items, extra, drop = wanted.items, wanted.add, wanted.drop
        drop = (*drop, *(w for w in _ours(marks) if w not in extra))
        new = text.reworked(old, items, extra, drop)
        text.prove_words(old, new, items, extra, drop)
        gone, added = _difference(text.raw_words(old), text.raw_words(new))
        gone += marks  # at once with the words: alone they would be a reservation for good
        commands = (_kargs(gone, added, "make a deployment with the new arguments"),) if gone or added else ()
        # First: of a run that is killed then, the mark is left, and the next one does both.
        if _pins(marks):
            commands = (_pin(_before_trial(machine), False), *commands)
        return Steps(wanted, commands=commands)

    def kept_state(self, machine: Host) -> tuple[str, ...]:
        return self._arguments(machine), *_pinned(machine)

    def undo_to(self, machine: Host, state: tuple[str, ...]) -> tuple[Command, ...]:
        line, *pinned = state
        gone, added = _difference(text.raw_words(self._arguments(machine)), text.raw_words(line))
        undo = [_kargs(gone, added, "take that back")] if gone or added else []
        now = _pinned(machine)
        undo += [_pin(name, True) for name in pinned if name not in now]
        undo += [_pin(name, False) for name in now if name not in pinned]
        return tuple(undo)

    # A trial -------------------------------------------------------------------------------------------------

    def refuse_trial(self, machine: Host) -> None:
        self.refuse(machine)

    def trial(self, machine: Host) -> Trial | None:
        try:
            line, marks = _without_mark(self._arguments(machine))
            now = self._standing_of(machine, line, marks)
        except EmupmemError:
            return None
        words = [w for w in now.trial if w in _ours(marks) or items_of_word(w)]
        boots = [w for w in _said(marks) if w.startswith(BOOT)]
        here = _boot_of(machine) in boots if boots else None
        return Trial(LOADER_ENTRIES, tuple(words), now.chosen, True, this_boot=here) if words else None

    def trial_steps(self, machine: Host, now: Standing, wanted: Wanted) -> Steps:
        if now.chosen:
            marks = _without_mark(self._arguments(machine))[1]
            cut_off = _pins(marks) and _before_trial(machine) == "booted" and not _is_pinned(machine)
            return Steps(wanted, commands=(_pin("booted", True),) if cut_off else ())
        pins = _is_pinning_known(machine) and not _is_pinned(machine)
        there = now.default.words if now.default is not None else ()
        add = [w for w in wanted.trial if w not in there]
        said = [*(w for w in OUR_WORDS if w in add), _boot_of(machine)]
        add.append(",".join([PINNED if pins else KEPT, *filter(None, said)]))
        # Behind the mark: so no pin is left that nobody takes away.
        pin = (_pin("booted", True),) if pins else ()
        note = "rpm-ostree has no choice for one start: a start that hangs comes again, until you choose the "
        note += "deployment before it in the boot menu"
        if not pins and not _is_pinned(machine):
            note += ", which this ostree cannot pin"
        return Steps(
            wanted,
            commands=(_kargs([], add, "make a deployment with the new arguments"), *pin),
            notes=(note,),
        )

    def trial_problem(self, before: Standing, after: Standing, wanted: Wanted) -> str:
        # rpm-ostree groups the words by their keys.
        return super().trial_problem(
            before, replace(after, trial=_in_order_of(before, after, wanted)), wanted
        )

    def chosen(self, machine: Host) -> bool:
        return bool(_without_mark(self._arguments(machine))[1])

    def refuse_removal(self, machine: Host) -> None:
        if not machine.running:
            self.refuse(machine)  # its program is asked, and would be that of this machine

    def refuse(self, machine: Host) -> None:
        if not machine.running:
            raise EmupmemError(
                "this is the tree of an ostree system: kernel arguments belong to its deployments",
                "run emupmem on that machine",
            )
        self._arguments(machine)


def _without_mark(line: str) -> tuple[str, list[str]]:
    """The arguments without the words that tell a trial, and these words: one, if nobody has written another."""
    marks = [w for w in text.raw_words(line) if w.partition(",")[0] in (PINNED, KEPT)]
    return (text.reworked(line, tuple(_items(line)), (), tuple(marks)) if marks else line), marks


def _pins(marks: Sequence[str]) -> bool:
    return any(m.partition(",")[0] == PINNED for m in marks)


def _ours(marks: Sequence[str]) -> tuple[str, ...]:
    """The words beside memmap= that a trial brought, by its mark; others of the same name are a person's."""
    return tuple(w for w in OUR_WORDS if w in _said(marks))


def _said(marks: Sequence[str]) -> list[str]:
    """What marks say beside whether there is a pin."""
    return [word for mark in marks for word in mark.split(",")[1:]]


def _in_order_of(before: Standing, after: Standing, wanted: Wanted) -> tuple[str, ...]:
    """The words of a trial in the order in which they are asked for, where they are the same ones."""
    words = before.default.words if before.default is not None else ()
    asked = (*words, *(w for w in wanted.trial if w not in words))
    return asked if sorted(asked) == sorted(after.trial) else after.trial


def _items(line: str) -> list[str]:
    return [i.text for i in parse_command_line(line).reservations]


def _boot_of(machine: Host) -> str:
    """The word of a mark that names this boot, empty where it has no name."""
    name = machine.peek("/proc/sys/kernel/random/boot_id")[:8]
    return f"{BOOT}{name}" if name else ""


def _is_pinning_known(machine: Host) -> bool:
    """Whether this ostree pins a deployment by what it is (`booted`), and not by its number alone."""
    done = machine.output(*PIN_HELP)
    return done is not None and b"booted" in done.stdout + done.stderr


def _is_pinned(machine: Host) -> bool:
    """Whether the deployment that runs is pinned already; not, where that is not told."""
    try:
        return "booted" in _pinned(machine)
    except EmupmemError:
        return False


def _pinned(machine: Host) -> tuple[str, ...]:
    """Which of `booted` and `rollback`, the one behind it, are pinned. Raises EmupmemError where that is not told."""
    done = machine.output(*STATUS, timeout=60)
    try:
        if done is None or done.status:
            raise ValueError(done.last_words if done is not None else "")
        found = json.loads(done.stdout)["deployments"]
        at = next((n for n, d in enumerate(found) if d.get("booted")), len(found))
        return tuple(n for n, d in zip(("booted", "rollback"), found[at:], strict=False) if d.get("pinned"))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EmupmemError(
            f"{' '.join(STATUS)} does not tell which deployments are pinned: {exc}",
            "try again when its daemon answers",
        ) from exc


def _before_trial(machine: Host) -> str:
    """The deployment before the trial, as ostree calls it: what runs now, or what ran before the trial."""
    return "rollback" if MARK in machine.peek("/proc/cmdline") else "booted"


def _pin(deployment: str, wanted: bool) -> Command:
    if wanted:
        return Command(("ostree", "admin", "pin", deployment), "keep the deployment before the trial")
    argv = ("ostree", "admin", "pin", "--unpin", deployment)
    return Command(argv, "let updates drop the deployment before it again")


def _difference(old: Sequence[str], new: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words only in old, words only in new), each as often as it is there more often."""
    gone, added = list(old), []
    for word in new:
        if word in gone:
            gone.remove(word)
        else:
            added.append(word)
    return gone, added


def _kargs(gone: Sequence[str], added: Sequence[str], why: str) -> Command:
    argv = ("rpm-ostree", "kargs", *(f"--delete={w}" for w in gone), *(f"--append={w}" for w in added))
    return Command(argv, why)
