# SPDX-License-Identifier: Apache-2.0
"""`sudo emupmem` in hints, where sudo finds the name and where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emupmem.cli.sudo import sudo_name
from tests import PROJECT


def install(*places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("")


RHEL, FEDORA = 'ID="rhel"\nVERSION_ID="9.4"\n', "ID=fedora\n"
ALMA = 'ID="almalinux"\nID_LIKE="rhel centos fedora"\n'


@pytest.mark.parametrize(
    ("there", "release", "full"),
    [
        ("/usr/bin", "ID=debian\n", False),
        ("/usr/local/bin", "ID=debian\n", False),
        ("/usr/local/bin", FEDORA, False),
        ("/usr/local/bin", RHEL, True),
        ("/usr/local/bin", ALMA, True),
        ("/usr/local/bin", "", False),
        ("", "ID=debian\n", True),
    ],
)
def test_the_full_path_where_sudo_does_not_look(tmp_path: Path, there: str, release: str, full: bool) -> None:
    own = tmp_path / "home/dev/.local/bin/emupmem"
    install(own, *([tmp_path / there[1:] / "emupmem"] if there else []))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text(release)
    assert sudo_name(str(own), tmp_path) == (str(own) if full else "emupmem")


@pytest.mark.parametrize("called", ["emupmem", "/nowhere/emupmem", "/usr/lib/emupmem/__main__.py", "-c", ""])
def test_a_name_that_leads_nowhere_is_not_told(tmp_path: Path, called: str) -> None:
    assert sudo_name(called, tmp_path) == "emupmem"


@pytest.mark.slow
@pytest.mark.parametrize("command", [("apply", "--size", "1G"), ("doctor", "--json"), ("help",)])
def test_what_is_installed_for_one_user_says_so_everywhere(tmp_path: Path, command: tuple[str, ...]) -> None:
    if any((Path(f) / "emupmem").exists() for f in ("/usr/bin", "/usr/local/bin")):
        pytest.skip("emupmem is installed here")
    own = tmp_path / "bin/emupmem"
    own.parent.mkdir()
    own.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(PROJECT)!r})\n"
        "import os\nos.geteuid = lambda: 1000\nfrom emupmem.__main__ import start\nstart()\n"
    )
    own.chmod(0o755)
    done = subprocess.run(
        [str(own), *command], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    said = done.stdout + done.stderr
    assert f"sudo {own}" in said, said
    assert "sudo emupmem" not in said, said
