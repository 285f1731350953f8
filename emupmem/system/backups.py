# SPDX-License-Identifier: Apache-2.0
"""Copies of files: backups under /var/backups/emupmem, and copies set aside while a program writes in place."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path

from emupmem.model import UNCHANGED, EmupmemError
from emupmem.system import log
from emupmem.system.errors import write_hint
from emupmem.system.files import delete_file, fresh_name, make_synced_folder, sync_folder, write_like
from emupmem.system.host import Host
from emupmem.system.machine import Machine

BACKUPS = "/var/backups/emupmem"
MOST_BACKUPS = 20
"""Of one file; older ones go."""

_STAMP = r"\.(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)(?:\.[a-z]+)?"


def back_up(machine: Machine, name: str, stamp: str, data: bytes, suffix: str = "") -> str:
    """Keep `data` as the backup `NAME.STAMP` of file `name`; gives the backup's name.

    Only root may read the folder. Written and synced like every other file.
    """
    folder = machine.path(BACKUPS)
    base = name.rpartition("/")[2]
    backup = f"{BACKUPS}/{base}.{stamp}{suffix}"
    try:
        make_synced_folder(folder, 0o700)
        fresh = folder / f".{base}.{stamp}{suffix}.new"
        write_like(fresh, data, machine.path(name))
        fresh.rename(folder / f"{base}.{stamp}{suffix}")
        sync_folder(folder)
    except OSError as exc:
        with contextlib.suppress(OSError):
            (folder / f".{base}.{stamp}{suffix}.new").unlink()
        raise EmupmemError(
            f"the backup {backup} cannot be written: {exc.strerror}",
            write_hint(exc),
            state=UNCHANGED,
        ) from exc
    log.file(machine, "wrote", backup)
    _drop_old(machine, base, stamp)
    return backup


def _drop_old(machine: Machine, base: str, made: str) -> None:
    """Take away the backups of a file beyond the last ones, with what is kept beside each, as far as possible.

    What was `made` now stays, whatever the clock says.
    """
    named = re.compile(re.escape(base) + _STAMP)
    found = {n: m[1] for n in machine.names(BACKUPS) if (m := named.fullmatch(n))}
    kept = sorted(set(found.values()))[-MOST_BACKUPS:]
    for name, when in found.items():
        if when not in kept and when != made:
            with contextlib.suppress(OSError):
                (machine.path(BACKUPS) / name).unlink()
                log.file(machine, "deleted", f"{BACKUPS}/{name}")


def set_aside(machine: Machine, name: str) -> bool:
    """Copy a file beside itself before a program writes it in place, so that `put_back` needs no room.

    False where there is no file. Raises EmupmemError.
    """
    target = machine.path(name)
    aside = aside_name(target)
    made = half_name(aside)
    try:
        if not target.exists():
            return False
        write_like(made, target.read_bytes(), target)
        made = made.rename(aside)
        sync_folder(aside.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            made.unlink()
        raise EmupmemError(
            f"{name} cannot be copied before it is regenerated: {exc.strerror}",
            write_hint(exc),
            state=UNCHANGED,
        ) from exc
    log.file(machine, "set aside", name)
    return True


def is_aside(machine: Host, name: str) -> bool:
    """Whether a run that was killed left such a copy."""
    return machine.exists(str(aside_name(Path(machine.real(name)))))


def read_aside(machine: Host, name: str) -> bytes | None:
    """What that copy holds. Raises EmupmemError where it may not be read."""
    return machine.read(str(aside_name(Path(machine.real(name)))))


def leftovers(machine: Host, names: Sequence[str]) -> list[str]:
    """Half-written files that a killed run left beside `names` and the backups."""
    places = [Path(machine.real(n)) for n in names]
    beside = [str(p) for place in places for p in (fresh_name(place), half_name(aside_name(place)))]
    halves = [n for n in machine.names(BACKUPS) if n.startswith(".") and n.endswith(".new")]
    return [p for p in beside if machine.exists(p)] + [f"{BACKUPS}/{n}" for n in halves]


def has_leftovers(machine: Host, names: Sequence[str]) -> bool:
    """Whether a killed run left copies or half-written files beside `names`."""
    return any(is_aside(machine, n) for n in names) or bool(leftovers(machine, names))


def remove_leftovers(machine: Machine, names: Sequence[str]) -> None:
    """Take that away, as far as possible; the lock keeps others away."""
    for name in names:
        with contextlib.suppress(OSError):
            machine.path(name).unlink()
            log.file(machine, "deleted", name)


def put_back(machine: Machine, name: str) -> None:
    """Rename the copy that `set_aside` made over the file; where both are the same, drop the copy.

    Raises EmupmemError, also where the copy is gone.
    """
    target, aside = machine.path(name), aside_name(machine.path(name))
    try:
        if target.exists() and _same(aside, target):
            aside.unlink()  # nothing to put back, and a file that nobody can write is no obstacle
        else:
            aside.rename(target)
        sync_folder(target.parent)
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be put back: {exc.strerror}", write_hint(exc)) from exc
    log.file(machine, "put back", name)


def drop_stale(machine: Machine, names: Sequence[str]) -> None:
    """Take the copies that a killed run left away: whoever finds one later takes it for one of this run.

    Raises EmupmemError.
    """
    for name in (n for n in names if is_aside(machine, n)):
        delete_file(machine, str(aside_name(Path(machine.real(name)))))


def drop_aside(machine: Machine, name: str) -> None:
    """Take the copy away again, all being well."""
    with contextlib.suppress(OSError):
        aside_name(machine.path(name)).unlink()
        log.file(machine, "deleted the copy of", name)


def stamp() -> str:
    """This moment for the name of a backup: ISO 8601, UTC, microseconds so that two never meet."""
    now = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now // 1000 % 10**6:06d}Z"


def aside_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.emupmem-old")


def _same(one: Path, other: Path) -> bool:
    """Whether two files have the same content, mode and owner."""
    first, second = one.stat(), other.stat()
    rights = [(i.st_mode, i.st_uid, i.st_gid) for i in (first, second)]
    return rights[0] == rights[1] and one.read_bytes() == other.read_bytes()


def half_name(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}.new")
