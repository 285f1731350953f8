# SPDX-License-Identifier: Apache-2.0
"""One run of a command: what it is about, what was asked for, what --json prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any, NoReturn

import typer

from emupmem.cli import stdio
from emupmem.cli.output import Exit, as_typed, ask, one_line, print_json, say
from emupmem.cli.progress import shown_waiting
from emupmem.model import EmupmemError
from emupmem.record import open_record
from emupmem.system import machine as system_machine


def require_root(machine: system_machine.Machine, what: str) -> None:
    """Raise EmupmemError where we are not root; `what` is what needs it."""
    if not machine.is_root:
        raise EmupmemError(f"{what} and needs root", f"sudo {shlex.join(as_typed())}")


def root_machine(what: str) -> system_machine.Machine:
    """The running machine. Raises EmupmemError, as `require_root`."""
    machine = system_machine.Machine()
    require_root(machine, what)
    return machine


@open_record
class Session:
    """One run of a command; `result` is the object that --json prints, filled on the way."""

    result: dict[str, Any]
    as_json: bool
    dry_run: bool = False
    check: bool = False
    yes: bool = False
    machine: system_machine.Machine = field(init=False, repr=False, compare=False)
    """Set inside `errors`: that there is none to be had is an error of the command."""

    @property
    def only_shows(self) -> bool:
        return self.dry_run or self.check

    def be_root(self, what: str) -> None:
        """Take the running machine. Raises EmupmemError, as `root_machine`."""
        self.machine = root_machine(what)

    def changing(self) -> None:
        """From here on something is changed, unless it is only shown: see `stdio.changing`."""
        if not self.only_shows:
            stdio.changing()

    def confirm(self, question: str) -> None:
        """Ask, unless --yes answers. Raises EmupmemError for every answer but yes."""
        if not self.yes:
            ask(question)

    def preview_or_ask(self, steps: Iterable[str], question: str) -> None:
        """Show what would be done, or ask where something is lost (no question: nothing is); the caller does it."""
        self.changing()
        if self.only_shows:
            for step in steps:
                say(f"  {step}")
        elif question:
            self.confirm(question)

    def finish(self, status: Exit) -> NoReturn:
        """End the command."""
        if self.as_json:
            print_json(self.result)
        raise typer.Exit(status)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """With --json the object is printed in every case: an error becomes its `error`."""
        try:
            with shown_waiting():
                yield
        except EmupmemError as exc:
            if self.as_json:
                changed = {"changed": True} if exc.changed else {}
                print_json(self.result | changed | {"error": one_line(exc)})
            raise
