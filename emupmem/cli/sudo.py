# SPDX-License-Identifier: Apache-2.0
"""How `sudo emupmem` is written where sudo does not find that name.

sudo looks in folders of its own (secure_path), not in the caller's PATH: what pipx, uv or pip installed for one
user is not there. Every hint then has the full path.
"""

from __future__ import annotations

import re
from pathlib import Path

NAME = "emupmem"
FOLDERS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
LOCAL = ("/usr/local/sbin", "/usr/local/bin")
"""On Debian's, SUSE's and Fedora's secure_path, not on that of RHEL before 10 and what is built from it."""

OS_RELEASE = Path("/etc/os-release")

_PLAIN = re.compile(r"[\w./+@~-]+", re.ASCII)
_HINT = re.compile(r"\bsudo(\s+)emupmem\b")


def sudo_name(called: str, root: Path = Path("/")) -> str:
    """The word that sudo needs for the program that was `called` so: its name, or its full path."""
    own = Path(called)
    # `python -m emupmem`, a test: there is no file of that name to tell of.
    if own.name != NAME or not own.is_absolute() or not _PLAIN.fullmatch(called) or not own.is_file():
        return NAME
    if _in(FOLDERS, root) or (_in(LOCAL, root) and not _is_red_hat(root)):
        return NAME
    return called


def _in(folders: tuple[str, ...], root: Path) -> bool:
    return any((root / f.lstrip("/") / NAME).is_file() for f in folders)


def _is_red_hat(root: Path) -> bool:
    try:
        text = (root / OS_RELEASE.relative_to("/")).read_text("utf-8", "replace")
    except OSError:
        return False
    named = re.findall(r"^(?:ID|ID_LIKE)=(.*)$", text, re.MULTILINE)
    return bool({"rhel", "centos"} & set(re.findall(r"\w+", " ".join(named))))


def spelled(text: str, name: str) -> str:
    """A text for people with `sudo emupmem` as sudo needs it."""
    return _HINT.sub(lambda m: f"sudo{m[1]}{name}", text) if name != NAME else text
