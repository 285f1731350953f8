# SPDX-License-Identifier: Apache-2.0
"""doctor and collect: what stands in the way here, and an archive that tells it elsewhere. No logic of its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from emupmem.cli import render
from emupmem.cli.options import Json
from emupmem.cli.output import Exit, print_product, say, tell, usage
from emupmem.cli.session import Session
from emupmem.cli.terminal import Printer
from emupmem.doctor import finding, look
from emupmem.doctor.finding import Finding
from emupmem.model import EmupmemError
from emupmem.system import machine as system_machine
from emupmem.system.streams import given_file, is_gzip, new_file, refuse_taken
from emupmem.units import human

if TYPE_CHECKING:
    from emupmem.report.masking import Masked


def doctor(
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="An archive of emupmem collect (- for standard input), not this machine.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show everything that decides whether this will work, before and after. Changes nothing, needs no root."""
    session = Session({"ok": False, "findings": []}, as_json)
    with session.errors():
        findings = _findings(from_)
        ok = finding.good(findings)
        session.result |= {"ok": ok, "findings": [asdict(f) for f in findings]}
        if not session.as_json:
            render.findings(Printer(), findings)
    session.finish(Exit.OK if ok else Exit.NOT_AS_PLANNED)


def _findings(from_: str | None) -> tuple[Finding, ...]:
    if from_ is None:
        return look.findings_of(system_machine.Machine())
    from emupmem.report import archive, collected  # 7 ms, archives only

    name = "standard input" if from_ == "-" else from_
    with given_file(from_, say) as file:
        if not is_gzip(file):
            raise EmupmemError(
                f"{name}: no archive of emupmem collect", "emupmem suggest --from plans from a log"
            )
        return collected.doctor_from(archive.unpack(file, name), name)


def collect(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="The archive to write, such as machine.tar.gz.")
    ],
    list_: Annotated[
        bool, typer.Option("--list", help="Show what would be written and what is masked; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write one archive for suggest --from and doctor --from on another machine, secrets masked."""
    from emupmem.report import archive, gather  # 13 ms, collect only

    session = Session({"file": file, "written": False, "files": [], "masked": {}, "unreadable": []}, as_json)
    with session.errors():
        if file == "-":
            usage("collect writes a file, not to standard output")
        if not list_:
            session.changing()
            refuse_taken(file, force)
        machine = system_machine.Machine()
        made = gather.gather_machine(machine)
        data = archive.pack(made.archive)
        session.result |= {
            "files": [
                {"name": name, "size": len(content), "masked": made.places.get(name, {})}
                for name, content in sorted(made.archive.members.items())
            ],
            "masked": made.values,
            "unreadable": made.archive.facts["unreadable"],
        }
        if not list_:
            new_file(file, data, force)
            session.result["written"] = True
        if not session.as_json:
            _tell(made, file, len(data), list_)
        if not machine.is_root:
            say("! not root: what only root may read is not in it; sudo emupmem collect takes it along")
    session.finish(Exit.OK)


def _tell(made: Masked, file: str, size: int, only_list: bool) -> None:
    members = sorted(made.archive.members.items())
    if only_list:
        for name, content in members:
            masked = ", ".join(f"{n} × {kind}" for kind, n in made.places.get(name, {}).items())
            print_product(f"{len(content):>9}  {name}" + (f"  (masked: {masked})" if masked else ""))
    for name in made.archive.facts["unreadable"]:
        say(f"! {name} could not be read")
    values = ", ".join(f"{n} × {kind}" for kind, n in made.values.items()) or "nothing"
    what = "would be written" if only_list else "written"
    tell(f"{'' if only_list else '✓ '}{file} {what}: {len(members)} files, {human(size)} · masked: {values}")
    if not only_list:
        tell(f"Elsewhere:  emupmem suggest --from {file}   or   emupmem doctor --from {file}")
