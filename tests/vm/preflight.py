# SPDX-License-Identifier: Apache-2.0
"""What this machine lacks, found before the first test: a line each, and what is skipped because of it."""

from __future__ import annotations

import os
import shutil
import urllib.request
from functools import cache
from pathlib import Path

from tests.vm import image
from tests.vm.machine import FIRMWARE_FILES

SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
BOOT_TOOLS = ("qemu-system-x86_64", "qemu-img", "setpriv", "mke2fs", "debugfs", "busybox", "cpio")
BUILD_TOOLS = ("mmdebstrap", "sfdisk", "mkfs.vfat", "mke2fs")
ROOM = 6 << 30
"""Bytes for one image and the overlays on it."""
TRIES = 3


def no_guest(wanted: str) -> str:
    """Why no guest "SUITE FIRMWARE" can boot here: one line, or ""."""
    return _no_boot(wanted) or ("" if cached(wanted) else _no_build(wanted))


def cached(wanted: str) -> bool:
    """Whether the image is there already."""
    suite, firmware = wanted.split()
    return image.place(suite, firmware).is_dir()


def lines() -> list[str]:
    """What is missing, for the head of a run."""
    found = [
        "not root: what only root can do is skipped" if os.geteuid() else "",
        _missing(BOOT_TOOLS) and f"no guest can boot: {_missing(BOOT_TOOLS)}",
        _little_room() and f"no image can be built: {_little_room()}",
    ]
    return [f"this machine: {line}" for line in found if line]


def _no_boot(wanted: str) -> str:
    missing = _missing(BOOT_TOOLS)
    if not missing and not wanted.endswith("bios") and not any(Path(p[0]).exists() for p in FIRMWARE_FILES):
        missing = "OVMF is not installed"
    return missing and f"no guest boots here: {missing} (make deps)"


@cache
def _no_build(wanted: str) -> str:
    why = _missing(BUILD_TOOLS) or _not_root() or _little_room() or _no_mirror(wanted.split()[0])
    return why and f"no image of {wanted} here, and none can be built: {why}"


def _missing(tools: tuple[str, ...]) -> str:
    path = os.environ.get("PATH", os.defpath) + SBIN
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


def _not_root() -> str:
    return "" if os.geteuid() == 0 or shutil.which("sudo") else "neither root nor sudo"


def _little_room() -> str:
    folder = image.cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return f"{free >> 20} MiB free in {folder}, {ROOM >> 20} are needed" if free < ROOM else ""


@cache
def _no_mirror(suite: str) -> str:
    """Asked a few times: a pause of the network must not leave out a test."""
    address, why = f"{image.mirror()}/dists/{suite}/InRelease", ""
    for _ in range(TRIES):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                answer.read(1)
            return ""
        except OSError as exc:
            why = f"{address}: {exc}"
    return why
