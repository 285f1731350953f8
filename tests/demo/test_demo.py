# SPDX-License-Identifier: Apache-2.0
"""What the demo types, what it passes on of the guest's words, and what it says where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emupmem.demo import guest, recipe
from emupmem.demo.disk import demo_disk, job_disk
from emupmem.model import EmupmemError
from emupmem.system.machine import Machine
from tests.cli.runner import Run
from tests.fake import FakeMachine


def said(text: str, *, size: int = 1 << 16) -> tuple[int | None, str]:
    """What `_listen` makes of a guest that writes this, in pieces of that many characters."""
    code = (
        "import os, sys\n"
        "text = sys.argv[1].encode(); step = int(sys.argv[2])\n"
        "for at in range(0, len(text), step): os.write(1, text[at:at + step])\n"
    )
    argv = [sys.executable, "-c", code, text, str(size)]
    passed: list[str] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        status = guest._listen(child, passed.append)
    return status, "".join(passed)


@pytest.mark.parametrize("size", [1, 3, 4096])
def test_only_what_the_script_says_is_passed_on(size: int) -> None:
    text = "noise\x1estart\n✓ one\ntwo\n\x1eend 0\nnoise"
    assert said(text, size=size) == (0, "✓ one\ntwo\n")
    assert said("\x1estart\nfailed\n\x1eend 3\n", size=size) == (3, "failed\n")


def test_a_guest_that_is_lost_has_no_status() -> None:
    assert said("\x1estart\nhalf a line") == (None, "half a line")
    assert said("") == (None, "")


def test_a_script_shows_what_is_typed_and_stops_at_what_fails(tmp_path: Path) -> None:
    script = recipe.boot_script(("echo 'it''s'", "false", "echo never"))
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "root@guest:~# echo 'it''s'\nits\nroot@guest:~# false\n"


def test_the_job_has_this_program_with_it(tmp_path: Path) -> None:
    image = job_disk(Machine(), tmp_path, "echo hello\n")

    def inside(name: str) -> str:
        argv = ["debugfs", "-R", f"cat {name}", str(image)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    assert inside("/script") == "echo hello\n"
    assert "def main()" in inside("/src/emupmem/cli/main.py")
    assert inside("/src/emupmem/manual.md").startswith("# NAME")


def test_what_is_missing_is_named(run: Run, here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeMachine, "find", lambda self, program: None)
    done = run("demo")
    assert done.status == 1
    assert "the demo needs qemu-system-x86, mmdebstrap" in done.err
    assert "apt install qemu-system-x86 mmdebstrap" in done.err


def test_a_file_is_no_place_for_disks(here: FakeMachine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for cache in (file, file / "below"):
        with pytest.raises(EmupmemError, match="cannot be a folder") as caught:
            demo_disk(here, cache, print)
        assert "name another place" in caught.value.hint


def test_it_needs_root(run: Run, here: FakeMachine) -> None:
    here.root_user = False
    done = run("demo")
    assert (done.status, "needs root" in done.err) == (1, True)
