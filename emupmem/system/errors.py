"""The second line of an error of the operating system: what to do about it."""

from __future__ import annotations

import errno
import os


def sudo_hint(exc: OSError) -> str:
    return "run it with sudo" if exc.errno in (errno.EACCES, errno.EPERM) and os.geteuid() else ""


def write_hint(exc: OSError) -> str:
    hints = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EBUSY: "the file is a mount point of its own",
    }
    if exc.errno == errno.EPERM and os.geteuid() == 0:
        return "it may be immutable (lsattr shows i): chattr -i takes that away"
    return sudo_hint(exc) or hints.get(exc.errno or 0, "")
