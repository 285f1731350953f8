"""mount, umount, save, restore, and what the unit at boot runs. No logic of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from emupmem.cli.options import DryRun, Fs, Json, Owner, Permissions, Yes
from emupmem.cli.output import Exit, root_machine, say, usage
from emupmem.cli.session import Session
from emupmem.cli.stdio import changing


def mount(
    device: Annotated[
        str | None,
        typer.Argument(metavar="[DEVICE]", help="As /dev/pmem0; else the only emulated one."),
    ] = None,
    folder: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Where; else /mnt and the device's name.")
    ] = None,
    fs: Fs = None,
    owner: Owner = "",
    mode: Permissions = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Make a new file system over the one that an emulated device holds."),
    ] = False,
    at_boot: Annotated[bool, typer.Option("--at-boot", help="Do it at every boot as well.")] = False,
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
    from emupmem.device import decide
    from emupmem.device import mount as device_mount

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
        request = decide.MountRequest(device, folder, fs.value if fs else None, owner, mode, force, keep)
        if session.dry_run:
            prepared = device_mount.prepare(session.machine, request)
            session.result |= _steps(prepared.steps)
            if not session.as_json:
                _show_steps(prepared.steps, owner, mode)
            session.finish(Exit.OK)
        session.changing()
        outcome, unit = device_mount.mount(session.machine, request, at_boot)
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
    """Unmount persistent memory; where it is in use, tell by whom. The content stays until the power goes."""
    from emupmem.device import boot_unit
    from emupmem.device import mount as device_mount

    session = Session({"device": "", "dir": folder, "changed": False}, as_json)
    with session.errors():
        session.be_root("this unmounts")
        session.changing()
        gone = device_mount.umount(session.machine, folder)
        session.result |= {"device": gone.source, "dir": gone.dir, "changed": True}
        if not session.as_json:
            print(f"✓ {gone.source} is no longer mounted at {gone.dir}")
            if boot_unit.is_at_boot(session.machine, gone.dir):
                print("It is mounted again at the next boot.")
    session.finish(Exit.OK)


def save(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The image to write; replaced as a whole.")],
    source: Annotated[
        str | None,
        typer.Argument(metavar="[DEVICE|DIR]", help="A device, or where it is mounted; else the only one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Save the content of a device: a sparse raw image with a checksum. A mounted one is frozen meanwhile."""
    from emupmem.device import image

    session = Session({}, as_json)
    with session.errors():
        session.be_root("this reads a device")
        session.changing()
        with _progress() as progress:
            done = image.save(session.machine, file, source, progress)
        _tell_snapshot(session, f"{done.device} saved to {done.file}", done)


def restore(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An image that `emupmem save` wrote.")],
    device: Annotated[
        str | None, typer.Argument(metavar="[DEVICE]", help="Where to write it; else the only one.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take an image without a checksum, or with a wrong one, as it is.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Put a saved image back onto a device. It is checked as a whole before anything is written."""
    from emupmem.device import image

    session = Session({}, as_json, yes=yes)
    with session.errors():
        session.be_root("this writes a device")
        session.changing()
        if not session.yes and not image.is_blank(session.machine, device):
            session.confirm(f"{image.choose(session.machine, device).dev} is not blank: overwrite all of it?")
        with _progress() as progress:
            done = image.restore(session.machine, file, device, force, progress)
        if not done.checksum:
            say("! it was restored without a valid checksum")
        _tell_snapshot(session, f"{done.device} restored from {done.file}", done)


def _tell_snapshot(session: Session, what: str, done: Any) -> None:
    from dataclasses import asdict

    from emupmem.units import human

    session.result |= asdict(done)
    if session.as_json:
        session.finish(Exit.OK)
    rate = human(int(done.size / max(done.seconds, 0.001)))
    sizes = f"{human(done.size)}, {human(done.allocated)} on disk"
    print(f"✓ {what} · {sizes} · {done.seconds:.1f} s, {rate}/s")


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar with rate on a terminal, silence elsewhere; a signal stops the work at a safe moment."""
    from emupmem.system.lock import interrupts

    with interrupts() as signals:
        if not sys.stderr.isatty():
            yield lambda what, done, size: signals.check()
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        from emupmem.cli import render
        from emupmem.units import human

        columns = (
            TextColumn("{task.description:11}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[rate]:>10}"),
            TimeRemainingColumn(),
        )
        # Without a thread of its own: save forks the guard of a frozen file system.
        bar = Progress(*columns, console=render.console(stderr=True), transient=True, auto_refresh=False)
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, size: int) -> None:
            signals.check()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=size, rate="")
            bar.update(tasks[what], completed=done)
            speed = bar.tasks[tasks[what]].speed
            bar.update(tasks[what], rate=f"{human(int(speed))}/s" if speed else "")
            bar.refresh()

        with bar:
            yield show


def boot_mount(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs: RANGE DIR FS OWNER MODE KEEP for each mount."""
    from emupmem.device import at_boot as device_at_boot
    from emupmem.device import unit as device_unit

    machine = root_machine("this is for emupmem.service")
    changing()
    raise typer.Exit(
        device_at_boot.boot(machine, device_unit.from_words(words), lambda line: print(line, flush=True))
    )


def boot_save(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs when it is stopped: the same words."""
    from emupmem.device import keep as device_keep
    from emupmem.device import unit as device_unit

    machine = root_machine("this is for emupmem.service")
    changing()
    well = device_keep.save_all(machine, device_unit.from_words(words), lambda line: print(line, flush=True))
    raise typer.Exit(Exit.OK if well else Exit.ERROR)


def _steps(steps: Any) -> dict[str, Any]:
    return {"device": steps.device.dev, "dir": steps.dir, "fs": steps.fs}


def _show_steps(steps: Any, owner: str, mode: str) -> None:
    lines = [shlex.join(c.argv) for c in steps.commands]
    if steps.make:
        lines.insert(-1, f"mkdir -p {shlex.quote(steps.dir)}")
    lines += [f"chown {owner} {shlex.quote(steps.dir)}"] if owner else []
    lines += [f"chmod {mode} {shlex.quote(steps.dir)}"] if mode else []
    print(
        "\n".join(lines) or f"Already as asked: {steps.device.dev} at {steps.dir}. Nothing would be changed."
    )


def _tell_mount(outcome: Any, unit: Any) -> None:
    from emupmem.cli import render

    if not outcome.changed:
        print(f"Already as asked: {outcome.steps.device.dev} at {outcome.steps.dir}.")
    elif outcome.steps.kept and outcome.steps.commands:
        print(f"The {outcome.steps.fs} that was on {outcome.steps.device.dev} is kept.")
    render.ladder(render.console(), outcome.rungs)
    if unit is not None:
        print(f"{'✓ ' if unit.needed else ''}emupmem.service does this at every boot")
