# SPDX-License-Identifier: Apache-2.0
"""Showing a change of the boot configuration, asking, doing it, telling. No logic of its own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from emupmem.boot import transaction
from emupmem.boot.change import Change, Outcome
from emupmem.cli import render
from emupmem.cli.output import Exit, say, tell
from emupmem.cli.session import Session
from emupmem.cli.terminal import Printer
from emupmem.device.unit import FILE
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import Command, EmupmemError
from emupmem.system.backups import BACKUPS
from emupmem.system.machine import Machine


def ask_and_carry_out(session: Session, prepared: Change, warnings: Sequence[str]) -> NoReturn:
    """Show, ask, do, tell; ends the command with its exit status."""
    session.changing()
    machine, result = session.machine, session.result
    booted = machine.peek("/proc/cmdline") if machine.live else ""
    result |= {
        "memmap": prepared.tries or prepared.memmap,
        "would_change": prepared.needed,
        "diff": prepared.diff,
        "warnings": list(warnings),
    }
    if prepared.unit.after is not None or prepared.unit.before is not None:
        result["mounts"] = _mounts(prepared)
    for warning in warnings:
        say(f"! {warning}")
    if not prepared.needed:
        waits = bool(prepared.tries)  # a trial that runs now would be chosen anew
        result["reboot_required"] = machine.live and (waits or not _boots_as(booted, prepared))
        if not session.as_json:
            there = f"Already set up: {prepared.memmap or 'nothing is reserved'}"
            there = f"The next start tries {prepared.tries} already" if waits else there
            tell(f"{there}. Nothing was changed.")
            if result["reboot_required"]:
                tell("Reboot, then:  sudo emupmem verify")
        session.finish(Exit.OK)
    if not session.as_json:
        _show_change(machine, prepared)
        # Now, when it can still be read: afterwards there may be nobody to read it.
        for line in _way_back(machine, prepared):
            tell(line)
    reboot = bool(prepared.trial) or _needs_reboot(machine, booted, prepared)
    result["reboot_required"] = reboot and session.check
    if session.only_shows:
        session.finish(Exit.NOT_AS_PLANNED if session.check else Exit.OK)
    session.confirm("Apply?")
    outcome = transaction.carry_out_change(machine, prepared)
    if outcome.problem:
        say(f"! {outcome.problem}")
        result["warnings"].append(outcome.problem)
    result |= {"changed": True, "backup": outcome.backup, "reboot_required": reboot}
    if not session.as_json:
        _tell(machine, prepared, outcome, reboot)
    left = outcome.entries and not prepared.memmap
    session.finish(Exit.NOT_AS_PLANNED if left else Exit.OK)


def _mounts(prepared: Change) -> list[dict[str, Any]]:
    """What is mounted at every boot after the change."""
    try:
        found = prepared.unit.mounts
    except EmupmemError:
        return []  # edited by somebody, and left alone
    return [
        {
            "start": m.start,
            "size": m.size,
            "dir": m.dir,
            "fs": m.fs,
            "owner": m.owner,
            "mode": m.mode,
            "keep": m.keep,
        }
        for m in found
    ]


def _needs_reboot(machine: Machine, booted: str, prepared: Change) -> bool:
    """Whether the change comes with the next start; of a tree nobody knows what runs there now."""
    if not machine.live:
        return prepared.boot_needed
    return not _boots_as(booted, prepared) or (prepared.unit.needed and bool(_set_up(prepared)))


def _set_up(prepared: Change) -> list[str]:
    """The ranges of soft reserved memory that the unit sets up, with what they become."""
    try:
        return [f"{d.range} as {d.kind}" for d in prepared.unit.devices]
    except EmupmemError:
        return []


def _boots_as(booted: str, prepared: Change) -> bool:
    return tuple(i.text for i in parse_command_line(booted).reservations) == prepared.normal


def _show_change(machine: Machine, prepared: Change) -> None:
    out = Printer()
    if prepared.plan:
        render.plan_line(out, prepared.plan)
    render.diff(out, prepared.diff)
    there = None if machine.live else prepared.by.to_run_there(machine)
    if there is not None:
        out.print(f"then, on that machine: {shlex.join(there.argv)}", whole=True)
        return
    if not prepared.boot_needed:
        return
    lines = [f"then: {shlex.join(step.argv)} " for step in _programs(prepared)] or [""]
    for line in (*lines[:-1], f"{lines[-1]}(and check every entry of {prepared.before.menu})"):
        out.print(line.strip(), whole=True)


def _programs(prepared: Change) -> list[Command]:
    """What is run, in order."""
    choosing = prepared.by.choosing(bool(prepared.trial)) if prepared.chooses else None
    commands = list(prepared.steps.commands)
    if choosing is None:
        return commands
    return [*commands, choosing] if prepared.trial else [choosing, *commands]


def _tell_files(prepared: Change, outcome: Outcome) -> None:
    """The files that were written and those that were removed, and where their former text is."""
    written = [e for e in prepared.steps.changed if e.after is not None]
    removed = [e.name for e in prepared.steps.changed if e.after is None]
    if written:
        there = [e for e in written if e.before is not None]
        kept = f" (before: {outcome.backup if len(written) == 1 else BACKUPS})" if there else ""
        tell(f"✓ {', '.join(e.name for e in written)} written{kept}")
    if removed:
        tell(f"✓ {', '.join(removed)} removed")


def _tell(machine: Machine, prepared: Change, outcome: Outcome, reboot: bool) -> None:
    _tell_files(prepared, outcome)
    if not machine.live:
        there = prepared.by.to_run_there(machine)
        first = f"{shlex.join(there.argv)}, " if there is not None else ""
        tell(f"Nothing was run in the tree. On that machine: {first}reboot, emupmem verify")
        return
    if prepared.trial:
        _tell_trial(machine, prepared, outcome)
        return
    what = (
        f"{outcome.entries} entries carry {prepared.memmap}"
        if prepared.memmap
        else f"{outcome.entries} still reserve memory"
        if outcome.entries
        else "no entry reserves memory"
    )
    if outcome.generator:
        tell(f"✓ {outcome.generator} · {what}")
    if prepared.unit.needed and not outcome.problem:
        mounts = ", ".join(m["dir"] for m in _mounts(prepared))
        does = [f"mounts {mounts}"] if mounts else []
        does += [f"sets up {', '.join(_set_up(prepared))}"] if _set_up(prepared) else []
        tell(f"✓ {FILE} " + (f"written: {' and '.join(does)} at every boot" if does else "removed"))
    if reboot:
        tell("Reboot, then:  sudo emupmem verify")
        for line in _way_back(machine, prepared):
            tell(line)


def _way_back(machine: Machine, prepared: Change) -> list[str]:
    """What to do where the machine does not come up with the change; nothing where it takes none of its memory."""
    if not machine.live or not prepared.boot_needed:
        return []
    if prepared.trial:
        again = "If it hangs or panics: switch it off and on, "
        again += "and the old configuration is back. By hand: " if prepared.by.forgets else ""
        return [f"{again}{prepared.by.back.format(memmap=prepared.tries)}, or choose another entry."]
    if not prepared.memmap:
        return []
    back = prepared.by.back.format(memmap=prepared.memmap)
    return [f"If the machine does not come up: {back}; then sudo emupmem remove."]


def _tell_trial(machine: Machine, prepared: Change, outcome: Outcome) -> None:
    what = f"one extra entry carries {prepared.tries}; the next start, and only that, takes it"
    if not prepared.by.forgets:
        what = f"the next deployment carries {prepared.tries}; the one before it stays in the boot menu"
    tell(f"✓ {outcome.generator} · {what}")
    tell("Reboot, then:  sudo emupmem verify, and sudo emupmem confirm if all is well")
    for line in _way_back(machine, prepared):
        tell(line)


def change_result() -> dict[str, Any]:
    """What --json prints of a change before anything is known; `would_change` is whether there is anything to do."""
    return {
        "changed": False,
        "would_change": False,
        "memmap": "",
        "diff": "",
        "backup": "",
        "reboot_required": False,
        "warnings": [],
    }
