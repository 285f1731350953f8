# SPDX-License-Identifier: Apache-2.0
"""--verbose: each program that is run and each file that is written, without secrets, and never an error."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from emupmem.boot.grub import environment
from emupmem.cli import log as cli_log
from emupmem.model import Command, EmupmemError
from emupmem.system import log
from tests.cli.runner import Run
from tests.cli.test_cli import log as saved_log
from tests.cli.test_streams import APPLY, CLOSED, FULL, GONE, Case, build_grub, on, plainly
from tests.fake import FakeMachine, put, script

__all__ = ["saved_log"]

BACKUP = "wrote: /var/backups/emupmem/grub."
LINES = ("wrote: /etc/default/grub", "set aside: /boot/grub/grub.cfg", "locked: /var/backups/emupmem/lock")


def lines(err: str, beginning: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith(beginning)]


@pytest.mark.parametrize("option", ["-v", "--verbose", "--debug"])
def test_apply_shows_what_it_runs_and_writes(
    run: Run, here: FakeMachine, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMUPMEM_DEBUG", "")
    done = run(option, *APPLY, "--json")
    assert done.status == 0
    assert done.json["changed"]
    for line in LINES:
        assert lines(done.err, line) == [line]
    assert lines(done.err, BACKUP)
    (ran,) = lines(done.err, "ran: update-grub2")
    assert ran.startswith("ran: update-grub2 · status 0 · ")
    assert ran.endswith(" s")
    assert not logging.getLogger("emupmem").handlers


def test_nothing_is_shown_without_it(run: Run, here: FakeMachine) -> None:
    done = run(*APPLY)
    assert done.status == 0
    assert done.err == ""
    assert "ran: " not in done.out


def test_nothing_is_imported_for_it_without_it(tmp_path: Path) -> None:
    code = (
        "import sys, typer; sys.argv = ['emupmem', 'suggest', '--json', '--from', '/dev/null']\n"
        "known = set(sys.modules)  # older versions of typer import much by themselves\n"
        "from emupmem.cli.main import main\n"
        "try: main()\n"
        "finally: print([m for m in set(sys.modules) - known if m in ('logging', 'emupmem.report.masking')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]"


def test_it_is_masked(here: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    put(here, "/etc/hostname", "zaphod\n")
    put(here, "/etc/passwd", "arthur:x:1000:1000::/home/arthur:/bin/sh\n")
    secrets = ("zaphod", "arthur", "trillian", "3fa85f64-5717-4562-b3fc-2c963f66afa6", "52:54:00:ab:cd:ef")
    with cli_log.shown():
        log.ran(here, ("tool", *secrets[:1], *secrets[3:], "/srv/arthur/x", "/home/trillian/y"), 0, 0.25)
        log.file(here, "wrote", "/media/arthur/zaphod.tar.gz")
        log.place("wrote", Path("/media/arthur/zaphod.tar.gz"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "ran: tool host-1 00000000-0000-0000-0000-000000000001 02:00:00:00:00:01 /srv/user-2/x "
    )
    assert err.splitlines()[1:] == ["wrote: /media/user-2/host-1.tar.gz"] * 2
    assert not [s for s in secrets if s in err]


def test_the_names_of_a_tree_are_masked_too(
    run: Run, here: FakeMachine, saved_log: str, tmp_path: Path
) -> None:
    tree = build_grub(tmp_path / "marvin")
    put(tree, "/etc/hostname", "marvin\n")
    done = run("-v", *APPLY, "--root", str(tree.root), "--from", saved_log)
    assert done.status == 0
    assert lines(done.err, f"wrote: {tmp_path}/host-1/etc/default/grub")
    assert "marvin" not in "".join(lines(done.err, "wrote: "))


def test_one_line_and_nothing_that_drives_a_terminal(
    here: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    with cli_log.shown():
        log.file(here, "wrote", "/a\nran: rm\t\x1b[2J %s %d")
    assert capsys.readouterr().err == "wrote: /a\\x0aran: rm\\x09\\x1b[2J %s %d\n"


def test_a_program_that_fails_or_is_missing(here: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    script(here, "bad", "#!/bin/sh\nexit 3\n")
    with cli_log.shown():
        here.run(Command(("bad", "a b"), ""))
        here.output("nothing-of-that-name")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("ran: bad 'a b' · status 3 · ")
    assert second == "not run to its end: nothing-of-that-name · nothing-of-that-name is not installed"


def test_the_environment_block(here: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    script(here, "grub-editenv", '#!/bin/sh\necho "$3" >"$1"\n')
    with cli_log.shown():
        environment.set_grubenv(here, "next_entry", "emupmem")
    assert "wrote: /boot/grub/grubenv\n" in capsys.readouterr().err
    script(here, "grub-editenv", "#!/bin/sh\nexit 1\n")
    with cli_log.shown(), pytest.raises(EmupmemError):
        environment.set_grubenv(here, "next_entry", "other")
    assert "wrote: " not in capsys.readouterr().err


def test_a_log_that_fails_is_no_error(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    with cli_log.shown():
        log.ran(here, (1, 2), 0, 0.0)  # type: ignore[arg-type]
        monkeypatch.setattr(cli_log, "say", broken)
        log.file(here, "wrote", "/x")
        monkeypatch.setattr(cli_log, "secrets", broken)
        log.file(FakeMachine("/nowhere"), "wrote", "/x")


@pytest.mark.parametrize(
    ("encoding", "out", "err"),
    [
        ("ascii", "", ""),
        *(
            pytest.param(*way, marks=pytest.mark.slow)
            for way in (("C", FULL, ""), ("utf-8", "", FULL), ("C", "", CLOSED), ("ascii", CLOSED, GONE))
        ),
    ],
)
def test_in_every_encoding_and_with_nobody_to_read_it(
    tmp_path: Path, encoding: str, out: str, err: str
) -> None:
    done = on(tmp_path, Case(build_grub, ("-v", *APPLY, "--json"), ""), encoding, out, err)
    assert done.status == 0, done.said
    plainly(done)
    assert b"memmap=1G!4G" in (tmp_path / "machine/etc/default/grub").read_bytes()
    assert b"ran: " not in done.out
    if not err:
        assert b"ran: update-grub2 - status 0 - " in done.err
    if not out:
        assert json.loads(done.out)["changed"]
