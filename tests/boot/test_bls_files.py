# SPDX-License-Identifier: Apache-2.0
"""What lies in the place of an entry or of a command line and is none: refused in two lines, nothing is changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import loader, prepare
from emupmem.model import GIB, EmupmemError, Request
from tests.boot import test_loader

ENTRY, CMDLINE = "boot/efi/loader/entries/zz.conf", "etc/kernel/cmdline"
NO_FILE = "a plain file belongs there: move what is in its place away"


def folder(place: Path) -> None:
    place.mkdir()


def fifo(place: Path) -> None:
    os.mkfifo(place)


def circle(place: Path) -> None:
    place.symlink_to(place.name)


def huge(place: Path) -> None:
    place.write_text("options a\n" * 200_000)


@pytest.mark.parametrize(
    ("name", "spoil", "message", "hint"),
    [
        *((n, folder, "cannot be read: Is a directory", NO_FILE) for n in (ENTRY, CMDLINE)),
        *((n, fifo, "cannot be read: it is a FIFO", NO_FILE) for n in (ENTRY, CMDLINE)),
        *((n, circle, "too many symbolic links", "links there lead in a circle") for n in (ENTRY, CMDLINE)),
        (ENTRY, huge, "is longer than 1 MiB: that is no boot entry", "move it away"),
    ],
)
def test_it_is_refused_in_two_lines(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str, hint: str
) -> None:
    machine = test_loader.systemd_boot(tmp_path)
    place = machine.root / name
    place.unlink(missing_ok=True)
    spoil(place)
    with pytest.raises(EmupmemError, match=f"^/{re.escape(name)}:? {message}") as wrong:
        prepare.prepare_apply(machine, test_loader.survey_of(machine), Request(GIB), loader.Options())
    assert wrong.value.hint.startswith(hint)
