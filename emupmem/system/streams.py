# SPDX-License-Identifier: Apache-2.0
"""Files that the user names, and the standard streams."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from emupmem.model import EmupmemError
from emupmem.system import log, pipe, plain
from emupmem.system.errors import sudo_hint, write_hint
from emupmem.system.files import is_folder, refuse_kernel_folder, sync_folder

GZIP = b"\x1f\x8b"


def standard_streams() -> None:
    """Have descriptors 0 to 2 open: a file that we open must not become anybody's standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


@contextlib.contextmanager
def given_file(name: str, tell: pipe.Tell) -> Iterator[BinaryIO]:
    """A file that the user named, `-` for standard input; pipes such as bash's <( ) are files too.

    `tell` says a line to the person where nothing comes of a pipe. Raises EmupmemError, also for what would never
    end: devices, files of the kernel, FIFOs that nobody writes to.
    """
    if name == "-":
        shown = "standard input"
        with contextlib.suppress(io.UnsupportedOperation):
            plain.refuse_endless(sys.stdin.buffer.fileno(), shown)
        if sys.stdin.buffer.seekable():
            yield sys.stdin.buffer
        else:
            yield pipe.with_a_head(sys.stdin.buffer.fileno(), shown, tell, len(GZIP))
        return
    try:
        place = Path(name)
        if plain.kind_of(place.stat().st_mode) == "a socket":
            raise EmupmemError(f"{name} cannot be read: it is a socket")
        with plain.open_at_once(place) as file:
            plain.refuse_endless(file.fileno(), name)
            if file.seekable():
                yield file
            else:
                head = pipe.wait_for_writer(file.fileno(), name)
                yield pipe.with_a_head(file.fileno(), name, tell, len(GZIP), head)
    except OSError as exc:
        hint = sudo_hint(exc) or "give a saved log (sudo dmesg > FILE) or an archive of emupmem collect"
        raise EmupmemError(f"{name} cannot be read: {exc.strerror}", hint) from exc


def is_gzip(file: BinaryIO) -> bool:
    """Whether a stream of `given_file` begins as a gzip file does; nothing of it is consumed."""
    if isinstance(file, io.BufferedReader):
        return file.peek(2)[:2] == GZIP
    head = file.read(2)
    file.seek(-len(head), io.SEEK_CUR)
    return head == GZIP


def new_file(name: str, data: bytes, force: bool = False) -> None:
    """Write a file of the user's, whole or not at all, readable by its owner only: who called sudo, where there is one.

    One that is there is refused, or with `force` replaced if it is a plain file. Raises EmupmemError.
    """
    target = Path(name)
    refuse_taken(name, force)
    # A name of its own and a rename only where something is replaced: a stick with FAT has no hard links.
    fresh = target.with_name(f".{target.name}.emupmem-new") if force else target
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if force:
            fresh.unlink(missing_ok=True)  # of a run that was killed
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
            try:
                file.write(data)
                file.flush()
                _give_to_caller(file.fileno(), target.parent)
                os.fsync(file.fileno())
                fresh.rename(target)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
        sync_folder(target.parent)
    except FileExistsError as exc:
        raise EmupmemError(f"{name} is there already", "--force replaces it") from exc
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be written: {exc.strerror}", write_hint(exc)) from exc
    log.place("wrote", target)


def _give_to_caller(descriptor: int, folder: Path) -> None:
    """Give a file to the person who called sudo, where the folder is that person's: what is root's stays root's."""
    if os.geteuid() != 0 or not os.environ.get("SUDO_UID", "").isdecimal():
        return
    caller, group = int(os.environ["SUDO_UID"]), os.environ.get("SUDO_GID", "")
    if caller and folder.stat().st_uid == caller:
        os.fchown(descriptor, caller, int(group) if group.isdecimal() else -1)


def refuse_taken(name: str, force: bool) -> None:
    """Raise EmupmemError where a new file of that name would go over something else."""
    target = Path(name)
    refuse_kernel_folder(name, os.path.realpath(name))
    if not target.name or is_folder(target):
        raise EmupmemError(f"{name} is a folder", "give the name of a file in it")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_file():
        raise EmupmemError(f"{name} is not a regular file", "give another name")
    if not force:
        raise EmupmemError(f"{name} is there already", "--force replaces it")
