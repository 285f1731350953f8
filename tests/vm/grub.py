# SPDX-License-Identifier: Apache-2.0
"""GRUB of Debian testing as one EFI program: the first in Debian that reads BLS entries (2.14, module blsuki)."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from tests.vm import image
from tests.vm.machine import run
from tests.vm.tools import unpack

SUITE = "forky"
PACKAGES = ("grub-common", "grub-efi-amd64-bin")
MODULES = (
    *("part_gpt", "part_msdos", "ext2", "fat", "search", "search_fs_file", "normal", "linux", "reboot"),
    *("loadenv", "test", "blsuki", "configfile", "echo", "true"),
)
FIRST = "search --file --set=root /grub2/grub.cfg\nset prefix=($root)/grub2\n"
"""What it does first: the menu lies where Fedora has it, on a /boot of its own."""


def grub_efi() -> Path:
    """Return that program, making it (half a minute) where the cache has none.

    Raises RuntimeError with the output of the tool that failed.
    """
    key = hashlib.sha256(repr((SUITE, PACKAGES, MODULES, FIRST)).encode()).hexdigest()[:12]
    folder = image.cache() / "grub"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{SUITE}-{key}.efi"
    with image._lock(folder / "lock"):
        if not made.exists():
            _make(made)
    return made


def _make(made: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="emupmem-grub-") as name:
        work = Path(name)
        tree, first, half = work / "tree", work / "first", made.with_suffix(".new")
        first.write_text(FIRST)
        unpack(SUITE, PACKAGES, tree)
        libraries = tree / "usr/lib/x86_64-linux-gnu"
        mkimage = [str(tree / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
        mkimage += [str(tree / "usr/bin/grub-mkimage"), "-d", str(tree / "usr/lib/grub/x86_64-efi")]
        run([*mkimage, "-O", "x86_64-efi", "-p", "/grub2", "-c", str(first), "-o", str(half), *MODULES])
        half.replace(made)
