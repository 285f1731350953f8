# SPDX-License-Identifier: Apache-2.0
"""A change of the boot configuration as data: computed first, shown, proven, then carried out."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from emupmem.boot.elsewhere import Elsewhere
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.device.unit import NO_CHANGE, UnitChange
from emupmem.editor import text
from emupmem.model import FileEdit, Plan

OUR_WORDS = ("nokaslr",)
"""Words beside memmap= that apply adds when asked to."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How apply should go about it."""

    variable: str = text.LINUX
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
