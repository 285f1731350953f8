# SPDX-License-Identifier: Apache-2.0
"""`emupmem verify`."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from emupmem.cli import render
from emupmem.cli.options import Json
from emupmem.cli.output import Exit, say, tell, usage
from emupmem.cli.session import Session
from emupmem.cli.terminal import Printer
from emupmem.system import machine
from emupmem.verifier import ladder, observe


def verify(
    wait: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", min=0, max=86400, help="How long to wait for the device to appear."
        ),
    ] = 10,
    require: Annotated[
        bool, typer.Option("--require", help="Exit 3 also if nothing is reserved and nothing should be.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every step, from the boot configuration to DAX."""
    if math.isnan(wait):  # older parsers let it pass
        usage("Invalid value for '--wait': it must be 86400 or less")
    session = Session({"ok": False, "pending": False, "checks": [], "devices": []}, as_json)
    with session.errors():
        seen = observe.observe(machine.Machine(), wait)
        verdict = ladder.verdict_of(seen)
        ok = verdict.ok and not (require and verdict.nothing_reserved)
        session.result |= {
            "ok": ok,
            "pending": verdict.pending,
            "checks": [
                {"name": c.name, "status": c.status, "expected": c.expected, "found": c.found, "hint": c.hint}
                for c in verdict.checks
            ],
            "devices": [{"dev": d.dev, "start": d.start, "size": d.size} for d in verdict.devices],
        }
        if not session.as_json:
            _show_verdict(verdict)
    session.finish(Exit.OK if ok else Exit.NOT_AS_PLANNED)


def _show_verdict(verdict: Any) -> None:
    render.print_ladder(Printer(), verdict.checks)
    if verdict.nothing_reserved:
        tell(f"{verdict.nothing.capitalize()}.")
    elif verdict.pending:
        tell("Reboot pending.")
    unseen = [c.name for c in verdict.checks if c.status == "skipped" and not c.explained_by]
    if unseen:
        say(f"not seen: {', '.join(unseen)}" + ("" if machine.Machine().is_root else "; with sudo it can be"))
