# SPDX-License-Identifier: Apache-2.0
"""A change of the boot configuration as data: computed first, shown, proven, then carried out."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable

from emupmem.boot.loader import Loader, Standing, Steps
from emupmem.device.unit import NO_CHANGE, UnitChange
from emupmem.editor.quoting import items_of_word
from emupmem.model import FileEdit, Plan
from emupmem.record import record
from emupmem.system.pe import read_pe

Tell = Callable[[str], None]


@record
class Change:
    """What `by` does to come from `before` to `steps.wanted`, and the unit that mounts.

    `plan` is there where a new reservation was planned; `warnings` are for the person who is asked.
    """

    by: Loader
    before: Standing
    steps: Steps
    plan: Plan | None = None
    warnings: tuple[str, ...] = ()
    unit: UnitChange = NO_CHANGE

    @property
    def needed(self) -> bool:
        return self.boot_needed or self.unit.needed

    @property
    def boot_needed(self) -> bool:
        """Whether the loader's side changes; the unit that mounts may change alone."""
        steps = self.steps
        return bool(steps.changed or steps.commands or steps.unfinished or self.chooses)

    @property
    def chooses(self) -> bool:
        """Whether a trial is chosen for the next start, or its choice is taken back."""
        return self.before.chosen != bool(self.steps.wanted.trial)

    @property
    def edits(self) -> tuple[FileEdit, ...]:
        return self.steps.edits

    @property
    def normal(self) -> tuple[str, ...]:
        """Our items in the normal entries afterwards."""
        return self.steps.wanted.items

    @property
    def trial(self) -> tuple[str, ...]:
        """The words that the entry for a trial boot adds, empty where there is none."""
        return self.steps.wanted.trial

    @property
    def diff(self) -> str:
        """A unified diff, empty when the texts stay as they are."""
        edits = "".join(unified_diff(e.before or b"", e.after or b"", e.name) for e in self.edits)
        return edits + self.unit.diff

    @property
    def memmap(self) -> str:
        """All reservations after the change as one argument, empty where there are none."""
        return f"memmap={','.join(self.normal)}" if self.normal else ""

    @property
    def tries(self) -> str:
        """The argument of the entry for a trial boot, empty where there is none."""
        return next((w for w in self.trial if items_of_word(w)), "")


@record
class Outcome:
    """What was done: names of the backup and the number of entries that carry the argument.

    `problem` is what a person should look at although the change itself is done.
    """

    backup: str = ""
    entries: int = 0
    generator: str = ""
    problem: str = ""


def unified_diff(before: bytes, after: bytes, name: str) -> str:
    """The unified diff of two versions of a file."""
    old, new = (_text_of(t).splitlines(keepends=True) for t in (before, after))
    lines = difflib.unified_diff(old, new, name, name)
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )


def _text_of(data: bytes) -> str:
    """What a person is shown of a file; of an addon its words."""
    program = read_pe(io.BytesIO(data)) if data[:2] == b"MZ" else None
    return f"{program.line}\n" if program is not None else data.decode("utf-8", "backslashreplace")
