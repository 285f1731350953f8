# SPDX-License-Identifier: Apache-2.0
"""save and restore. No logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from emupmem.cli.options import Json, Yes
from emupmem.cli.output import Exit, say, tell
from emupmem.cli.session import Session
from emupmem.cli.stdio import is_quiet
from emupmem.device import image, keep
from emupmem.system.lock import interrupts
from emupmem.units import human


def save(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The image to write; replaced as a whole.")],
    source: Annotated[
        str | None,
        typer.Argument(metavar="[DEVICE|DIR]", help="A device or its mount point (default: the only one)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Save the content of a device: a sparse raw image with a checksum.

    A mounted file system is frozen while it is saved.
    """
    session = Session({}, as_json)
    with session.errors():
        session.be_root("this reads a device")
        session.changing()
        with _progress() as progress:
            done = image.save_image(session.machine, file, source, progress)
        keep.saved_by_hand(session.machine, done.file, done.device)
        _tell_snapshot(session, f"{done.device} saved to {done.file}", done)


def restore(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An image that `emupmem save` wrote.")],
    device: Annotated[
        str | None, typer.Argument(metavar="[DEVICE]", help="The device to write to (default: the only one).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Accept an image without a checksum or with a wrong one.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Put a saved image back onto a device. The whole image is checked before anything is written."""
    session = Session({}, as_json, yes=yes)
    with session.errors():
        session.be_root("this writes a device")
        session.changing()
        if not session.yes and not image.is_blank(session.machine, device):
            session.confirm(
                f"{image.choose_device(session.machine, device).dev} is not blank: overwrite all of it?"
            )
        with _progress() as progress:
            done = image.restore_image(session.machine, file, device, force, progress)
        if not done.checksum:
            say("! it was restored without a valid checksum")
        _tell_snapshot(session, f"{done.device} restored from {done.file}", done)


def _tell_snapshot(session: Session, what: str, done: Any) -> None:
    session.result |= asdict(done)
    if session.as_json:
        session.finish(Exit.OK)
    rate = human(int(done.size / max(done.seconds, 0.001)))
    sizes = f"{human(done.size)}, {human(done.allocated)} on disk"
    tell(f"✓ {what} · {sizes} · {done.seconds:.1f} s, {rate}/s")


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar with rate on a terminal, silence elsewhere; a signal stops the work at a safe moment."""
    with interrupts() as signals:
        if is_quiet() or not sys.stderr.isatty():
            yield lambda what, done, size: signals.check()
            return
        from rich.console import Console  # 20 ms, terminals only
        from rich.progress import (  # as above
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:11}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[rate]:>10}"),
            TimeRemainingColumn(),
        )
        # Without a thread of its own: save forks the guard of a frozen file system.
        bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, size: int) -> None:
            signals.check()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=size, rate="")
            bar.update(tasks[what], completed=done)
            speed = bar.tasks[tasks[what]].speed
            bar.update(tasks[what], rate=f"{human(int(speed))}/s" if speed else "")
            bar.refresh()

        with bar:
            yield draw
