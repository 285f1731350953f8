# SPDX-License-Identifier: Apache-2.0
"""`make install` where there are no Debian packages: what is missing is named as that system calls it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import PROJECT


def deps(folder: Path, *programs: str, what: str = "build") -> subprocess.CompletedProcess[str]:
    """deps.sh on a machine that has these programs only; each of them succeeds."""
    for name in programs:
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    argv = ["/bin/sh", str(PROJECT / "tests/vm/deps.sh"), what]
    return subprocess.run(argv, env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("manager", "package"),
    [("dnf install", "augeas-devel"), ("zypper install", "augeas-devel"), ("pacman -S", "pkgconf")],
)
def test_each_system_gets_its_own_line(tmp_path: Path, manager: str, package: str) -> None:
    done = deps(tmp_path, manager.split()[0])
    assert done.returncode == 1
    assert done.stderr.startswith(f"emupmem: a compiler and headers are missing: {manager} gcc ")
    assert package in done.stderr
    assert package in (PROJECT / "README.md").read_text()
    assert "a Debian or Ubuntu host" in deps(tmp_path, what="all").stderr


def test_what_is_there_is_enough(tmp_path: Path) -> None:
    assert deps(tmp_path, "dnf", "cc", "pkg-config").returncode == 0
    assert deps(tmp_path, what="all").returncode == 1, "the tests need more"


def test_an_unknown_system_is_told_what_to_look_for(tmp_path: Path) -> None:
    done = deps(tmp_path)
    assert done.returncode == 1
    assert "libaugeas-dev" in done.stderr
    assert "not found" not in done.stderr
