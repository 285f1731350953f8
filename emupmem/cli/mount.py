# SPDX-License-Identifier: Apache-2.0
"""mount and umount. No logic of its own."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from emupmem.cli import render
from emupmem.cli.options import DryRun, Fs, Json, Owner, Permissions
from emupmem.cli.output import Exit, mode_of, tell, usage
from emupmem.cli.session import Session
from emupmem.cli.terminal import Printer
from emupmem.device import boot_unit, decide
from emupmem.device import mount as device_mount


def mount(
    device: Annotated[
        str | None,
        typer.Argument(metavar="[DEVICE]", help="Such as /dev/pmem0 (default: the only emulated one)."),
    ] = None,
    folder: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Mount point (default: /mnt and the device's name).")
    ] = None,
    fs: Fs = None,
    owner: Owner = "",
    mode: Permissions = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the file system on an emulated device."),
    ] = False,
    at_boot: Annotated[bool, typer.Option("--at-boot", help="Also do it at every boot.")] = False,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="FILE",
            help="Save the content here at an orderly shutdown and bring it back at boot (with --at-boot).",
        ),
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a DAX file system on the device if it is blank, mount it, and prove that it is DAX."""
    session = Session(
        {
            "device": device or "",
            "dir": folder or "",
            "fs": fs.value if fs else "",
            "dax_file": None,
            "map_sync": None,
            "huge_pages": None,
            "changed": False,
        },
        as_json,
        dry_run=dry_run,
    )
    with session.errors():
        session.be_root("this makes and mounts file systems")
        if keep and not at_boot:
            usage("--keep belongs to --at-boot: what is saved at shutdown is brought back at boot")
        mode_of(mode)
        request = decide.MountRequest(device, folder, fs.value if fs else None, owner, mode, force, keep)
        if session.dry_run:
            prepared = device_mount.prepare(session.machine, request)
            session.result |= _steps(prepared.steps)
            if not session.as_json:
                _show_steps(prepared.steps, owner, mode)
            session.finish(Exit.OK)
        session.changing()
        outcome, unit = device_mount.mount_device(session.machine, request, at_boot)
        seen = outcome.seen
        session.result |= _steps(outcome.steps) | {
            "dax_file": seen.dax_file,
            "map_sync": seen.map_sync,
            "huge_pages": seen.huge,
            "changed": outcome.changed or (unit is not None and unit.needed),
        }
        if not session.as_json:
            _tell_mount(outcome, unit)
    session.finish(Exit.OK if outcome.ok else Exit.NOT_AS_PLANNED)


def umount(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where persistent memory is mounted.")],
    as_json: Json = False,
) -> None:
    """Unmount persistent memory; if it is in use, name the program. The content stays until the power is off."""
    session = Session({"device": "", "dir": folder, "changed": False}, as_json)
    with session.errors():
        session.be_root("this unmounts")
        session.changing()
        gone = device_mount.unmount_device(session.machine, folder)
        session.result |= {"device": gone.source, "dir": gone.dir, "changed": True}
        if not session.as_json:
            tell(f"✓ {gone.source} is no longer mounted at {gone.dir}")
            if boot_unit.is_at_boot(session.machine, gone.dir):
                tell("It is mounted again at the next boot.")
    session.finish(Exit.OK)


def _steps(steps: Any) -> dict[str, Any]:
    return {"device": steps.device.dev, "dir": steps.dir, "fs": steps.fs}


def _show_steps(steps: Any, owner: str, mode: str) -> None:
    lines = [shlex.join(c.argv) for c in steps.commands]
    if steps.make:
        lines.insert(-1, f"mkdir -p {shlex.quote(steps.dir)}")
    lines += [f"chown {owner} {shlex.quote(steps.dir)}"] if owner else []
    lines += [f"chmod {mode} {shlex.quote(steps.dir)}"] if mode else []
    tell("\n".join(lines) or f"Already set up: {steps.device.dev} at {steps.dir}. Nothing would be changed.")


def _tell_mount(outcome: Any, unit: Any) -> None:
    if not outcome.changed:
        tell(f"Already set up: {outcome.steps.device.dev} at {outcome.steps.dir}.")
    elif outcome.steps.kept and outcome.steps.commands:
        tell(f"The {outcome.steps.fs} that was on {outcome.steps.device.dev} is kept.")
    render.print_ladder(Printer(), outcome.rungs)
    if unit is not None:
        tell(f"{'✓ ' if unit.needed else ''}emupmem.service does this at every boot")
