# SPDX-License-Identifier: Apache-2.0
"""What lies in the place of an entry or of a command line and is none: refused in two lines, nothing is changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import loader, prepare
from emupmem.boot.bls import entries
from emupmem.boot.bls import files as bls_files
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, EmupmemError, Request
from emupmem.system import backups
from tests.boot import test_loader
from tests.fake import RELEASE, build, put

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


def test_what_somebody_took_away_since_is_not_torn(tmp_path: Path) -> None:
    """Beside the entry lies the copy of a run that was killed."""
    machine = build(tmp_path)
    name = "/boot/efi/loader/entries/x.conf"
    lines = ["title x", "linux /v", "initrd /ucode.img", "initrd /i.img", "options ro", ""]
    put(machine, name, "\n".join(lines))
    backups.set_aside(machine, name)
    for gone, torn in (
        ((), False),
        ((2,), False),
        ((0, 2), True),
        ((3,), True),
        ((2, 3), True),
        ((1,), True),
        ((1, 2, 3), True),
        ((4,), True),
        (range(6), True),
    ):
        text = "\n".join(x for n, x in enumerate(lines) if n not in gone)
        put(machine, name, text)
        assert bls_files.entry_text(machine, name) == ("\n".join(lines) if torn else text), gone
        put(machine, name, text.replace("options ro", "options ro memmap=1G!4G nokaslr"))
        assert (bls_files.entry_text(machine, name) == "\n".join(lines)) is torn, gone
        if gone in ((), (2,), (3,)):  # another root, or a word more: somebody wrote it anew
            for other in ("options rw", "options ro quiet"):
                anew = text.replace("options ro", other)
                put(machine, name, anew)
                assert bls_files.entry_text(machine, name) == anew
    for begun in (
        "title x\nlinux /v\ninitrd /uc",
        "title x\noptions r",
        "title x\noptions ro quiet\nlinux /v\n",
        "",
    ):
        put(machine, name, begun)
        assert bls_files.entry_text(machine, name) == "\n".join(lines), begun
    # the kernel lies there, and the initrd that is named no more does not
    put(machine, "/boot/efi/v", "")
    put(machine, name, "\n".join(x for n, x in enumerate(lines) if n != 3))
    assert "/i.img" not in bls_files.entry_text(machine, name)
    put(machine, "/boot/efi/i.img", "")
    assert "/i.img" in bls_files.entry_text(machine, name)


def test_a_root_that_moved_stays_and_what_is_put_back_is_kept(tmp_path: Path) -> None:
    machine = test_loader.systemd_boot(tmp_path)
    name = f"/boot/efi/loader/entries/{test_loader.ID}-{RELEASE}.conf"
    old = machine.text(name).replace(test_loader.ROOT, "root=UUID=OLD ro\noptions    quiet")
    put(machine, name, old)
    put(machine, "/proc/cmdline", "root=UUID=NEW ro quiet")
    backups.set_aside(machine, name)
    new = old.replace("root=UUID=OLD ro\noptions    quiet", "root=UUID=NEW ro quiet mitigations=off")
    put(machine, name, new)
    assert test_loader.remove(machine) is None or machine.text(name) == new
    assert machine.text(name) == new


@pytest.mark.parametrize(
    ("running", "entry", "same"),
    [
        ("subvol=@", "subvol=@", True),
        ("subvol=@", "subvol=/@", True),
        ("subvol=/@", "compress=zstd,subvol=@,noatime", True),
        ("subvol=@", "subvol=@fedora", False),
        ("subvol=root", "subvol=root00", False),
        ("subvol=@", "noatime", False),
        ("subvolid=256", "subvolid=257", False),
        ("subvolid=256,subvol=@", "subvol=/@", True),
        ("subvolid=256,subvol=@", "subvolid=256,subvol=@fedora", False),
        ("noatime", "compress=zstd", True),
        ("subvol=@/.snapshots/1/snapshot", "subvol=/@/.snapshots/1/snapshot", True),
    ],
)
def test_another_subvolume_is_another_system(tmp_path: Path, running: str, entry: str, same: bool) -> None:
    machine = build(tmp_path)
    words = "root=UUID=0 rootflags={} rw quiet"
    here = parse_command_line(words.format(running))
    for told in (entries.is_named_or_roots_here, entries.is_of_same_root):
        assert told(machine, "x.conf", words.format(entry), here) is same


def test_the_entries_of_another_system_on_the_same_btrfs_keep_their_words(tmp_path: Path) -> None:
    machine = test_loader.systemd_boot(tmp_path)
    folder = "/boot/efi/loader/entries"
    for name in machine.names(folder):
        (machine.root / folder.lstrip("/") / name).unlink()
    line = "root=UUID=0 rootflags=subvol={} rw"
    for file in ("/proc/cmdline", "/etc/kernel/cmdline"):
        put(machine, file, f"{line.format('@')}\n")
    put(machine, f"{folder}/arch.conf", f"title A\nlinux /a\noptions {line.format('@')}\n")
    theirs = f"title F\nlinux /f\noptions {line.format('@fedora')} memmap=2G!6G\n"
    put(machine, f"{folder}/fedora.conf", theirs)
    test_loader.apply(machine)
    assert "memmap=1G!4G" in machine.text(f"{folder}/arch.conf")
    assert machine.text(f"{folder}/fedora.conf") == theirs
    test_loader.remove(machine)
    assert "memmap" not in machine.text(f"{folder}/arch.conf")
    assert machine.text(f"{folder}/fedora.conf") == theirs
