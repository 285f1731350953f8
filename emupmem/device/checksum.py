# SPDX-License-Identifier: Apache-2.0
"""The checksum of an image, in an attribute or in a file next to it."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from emupmem.device.unit import SIDECAR
from emupmem.model import EmupmemError
from emupmem.system import log
from emupmem.system.files import sync_folder

ATTRIBUTE = "user.emupmem"
FORMAT = "crc32-256k-sha256"


def attach_checksum(image: int, checksum: str) -> bool:
    """Put the checksum into the file's attributes; False where the file system has none for users."""
    try:
        os.setxattr(image, ATTRIBUTE, checksum.encode())
    except OSError as exc:
        if exc.errno in (errno.ENOTSUP, errno.EPERM, errno.ENOSPC):
            return False
        raise
    return True


def write_sidecar(path: Path, sums: Sequence[str]) -> None:
    """Keep checksums in a file of their own, replaced as a whole; the last two at most."""
    fresh = path.with_name(f".{path.name}-sum")  # not the name of the new image
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, "".join(f"{one}\n" for one in sums[-2:]).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.rename(path)
    sync_folder(path.parent)
    log.place("wrote", path)


def read_sidecar(path: Path) -> tuple[str, ...]:
    """The checksums beside an image; none where there is no such file."""
    try:
        return tuple(path.read_text("ascii", "replace").split("\n")[:-1])
    except OSError:
        return ()


def known_checksum(path: Path, image: int) -> tuple[str, ...]:
    """The checksums that the image may have: its own, or those beside it."""
    try:
        return (os.getxattr(image, ATTRIBUTE).decode("ascii", "replace"),)
    except OSError:
        return read_sidecar(path.with_name(path.name + SIDECAR))


def unverified_error(file: str, known: Sequence[str]) -> EmupmemError:
    if known:
        return EmupmemError(
            f"{file} is not what was saved: its checksum differs; nothing was written",
            "damaged, or changed since, as a disk of QEMU is; --force restores it as it is",
        )
    return EmupmemError(
        f"{file} has no checksum; nothing was written",
        "a copy may have lost it (cp --preserve=xattr keeps it); --force restores it unchecked",
    )


def digest_of(size: int, sums: Sequence[int]) -> str:
    """The checksum of it all, with its size."""
    packed = struct.pack(f"<{len(sums)}I", *sums)
    return f"{FORMAT}:{size}:{hashlib.sha256(packed).hexdigest()}"
