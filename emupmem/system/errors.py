# SPDX-License-Identifier: Apache-2.0
"""What to do about an error of the operating system."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from emupmem.model import EmupmemError

SUDO = "run it with sudo"
"""The advice where only root may look."""

_NO_FILE = {
    **dict.fromkeys(
        (errno.EISDIR, errno.EINVAL), "a plain file belongs there: move what is in its place away"
    ),
    errno.EFBIG: "that is no such file: move it away",
}
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}


@contextlib.contextmanager
def os_failures(what: str) -> Iterator[None]:
    """Turn the system's errors into words."""
    try:
        yield
    except OSError as exc:
        raise EmupmemError(f"{what}: {exc.strerror}", _FULL.get(exc.errno or 0, "")) from exc


def sudo_hint(exc: OSError) -> str:
    return SUDO if exc.errno in (errno.EACCES, errno.EPERM) and os.geteuid() else ""


def read_hint(exc: OSError) -> str:
    """What to do about a file that cannot be read, or is none (see `plain.read_plain`)."""
    return sudo_hint(exc) or _NO_FILE.get(exc.errno or 0, "")


def write_hint(exc: OSError) -> str:
    hints = _FULL | {
        errno.EROFS: "the file system is read-only",
        errno.EBUSY: "the file is a mount point of its own",
        errno.ENOENT: "the folder is not there: make it, or name another place",
        errno.ENOTDIR: "a part of that path is a file: name another place",
        errno.EEXIST: "a file has that name: name another place",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    if exc.errno == errno.EPERM and os.geteuid() == 0:
        return "it may be immutable (lsattr shows i): chattr -i clears it"
    return sudo_hint(exc) or hints.get(exc.errno or 0, "")
