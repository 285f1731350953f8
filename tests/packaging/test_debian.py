# SPDX-License-Identifier: Apache-2.0
"""The Debian package: it agrees with the project, it builds, lintian is content. Guests: tests/vm/test_vm.py."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from emupmem import __version__
from tests import PROJECT
from tests.vm import package

DEBIAN = PROJECT / ".packaging/debian"


def text(name: str) -> str:
    return (DEBIAN / name).read_text()


def test_the_version_is_the_program_s() -> None:
    found = re.match(r"emupmem \((\S+)\)", text("changelog"))
    assert found is not None
    assert found[1] == __version__


def test_the_libraries_are_those_of_the_project() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    needs = dict(re.findall(r"^ python3-(\w+) \(>= ([\d.]+)~?\)", text("control"), re.MULTILINE))
    # Debian's python3-regex counts from 0.1 and has the day as well.
    needs["regex"] = f"{needs['regex'][4:8]}.{needs['regex'][8:10]}"
    wanted = {name.removeprefix("python-"): least for name, _, least in (d.partition(">=") for d in declared)}
    assert needs == wanted


def test_what_runs_is_executable() -> None:
    for name in ("debian/rules", "deb.sh"):
        assert os.access(DEBIAN.parent / name, os.X_OK), name
    assert subprocess.run(["sh", "-n", str(DEBIAN.parent / "deb.sh")], check=False).returncode == 0
    assert subprocess.run(["sh", "-n", str(DEBIAN / "emupmem.prerm")], check=False).returncode == 0


def test_every_override_has_a_reason() -> None:
    lines = text("emupmem.lintian-overrides").splitlines()
    for number, line in enumerate(lines):
        assert line.startswith("#") or (number and lines[number - 1].startswith("#")), line


@pytest.fixture(scope="module")
def made() -> Path:
    if why := package.lacking():
        pytest.skip(why)
    return package.package()


@pytest.mark.slow(seconds=60)
def test_the_tests_ran_with_debian_s_libraries_and_lintian_is_content(made: Path) -> None:
    """The oldest versions of the declared range: `package.TESTS` are those whose outcome depends on them."""
    said = package.log(made)
    assert re.search(r"^\d{3,} passed", said, re.MULTILINE), said[-3000:]
    # deb.sh stops at errors and warnings of lintian
    assert not re.search(r"^[EW]: ", said, re.MULTILINE)


@pytest.mark.slow(seconds=60)
def test_what_is_in_it(made: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "-c", str(made)], capture_output=True, text=True, check=True).stdout
    files = {line.split()[5].removeprefix(".") for line in listed.splitlines() if line[0] == "-"}
    own = (p for p in (PROJECT / "emupmem").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    modules = {str(p.relative_to(PROJECT)) for p in own}
    place = "/usr/lib/python3/dist-packages"
    assert {f"{place}/{m}" for m in modules} <= files
    others = {f for f in files if not f.startswith(place)}
    completion = {
        "/usr/share/bash-completion/completions/emupmem",
        "/usr/share/zsh/vendor-completions/_emupmem",
        "/usr/share/fish/vendor_completions.d/emupmem.fish",
    }
    assert others - completion == {
        "/usr/bin/emupmem",
        "/usr/share/doc/emupmem/changelog.gz",
        "/usr/share/doc/emupmem/copyright",
        "/usr/share/lintian/overrides/emupmem",
        "/usr/share/man/man8/emupmem.8.gz",
    }
    if (PROJECT / "emupmem/cli/completion.py").exists():
        assert completion <= others
    field = ["dpkg-deb", "-f", str(made), "Depends", "Architecture"]
    said = subprocess.run(field, capture_output=True, text=True, check=True).stdout
    assert "Architecture: all" in said
    for library in (
        "python3-typer (>= 0.15)",
        "python3-regex",
        "python3-augeas (>= 1.2)",
        "python3-rich (>= 13)",
    ):
        assert library in said
