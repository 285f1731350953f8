# SPDX-License-Identifier: Apache-2.0
"""What others than root, or a file that somebody sent, could try: none of it reaches a shell, a file or a terminal."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from emupmem import units
from emupmem.boot.grub import dropin
from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_apply
from emupmem.boot.transaction import carry_out_change
from emupmem.cli import render
from emupmem.cli.terminal import Printer
from emupmem.device import installed
from emupmem.doctor.finding import Finding
from emupmem.editor import text as editor_text
from emupmem.model import GIB, Check, EmupmemError, Request
from emupmem.report import archive
from emupmem.system import accounts
from emupmem.system.machine import Machine
from tests.boot.test_change import CLOUD, FOUND
from tests.cli.runner import Run
from tests.crash.test_crash import WISHES, stock
from tests.fake import FakeMachine, build, put, script


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Rights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_rights_of_new_files_do_not_hang_on_the_umask(tmp_path: Path, umask: int) -> None:
    machine = stock(tmp_path)
    before = os.umask(umask)
    try:
        carry_out_change(machine, prepare_apply(machine, FOUND, Request(GIB), Options(), WISHES))
        assert os.umask(umask) == umask, "and it is as it was afterwards"
    finally:
        os.umask(before)
    root = machine.root
    assert mode(root / "etc/systemd/system") == 0o755
    assert mode(root / "etc/systemd/system/emupmem.service") == 0o644
    assert mode(root / "var/backups") == 0o755
    assert mode(root / "var/backups/emupmem") == 0o700
    assert mode(root / "var/backups/emupmem/lock") == 0o600
    assert mode(root / "boot/grub/grub.cfg") == 0o600


def test_backups_have_the_rights_of_the_original(tmp_path: Path) -> None:
    machine = build(tmp_path)
    (machine.root / "etc/default/grub").chmod(0o600)
    carry_out_change(machine, prepare_apply(machine, FOUND, Request(GIB), Options()))
    names = list((machine.root / "var/backups/emupmem").glob("grub.*"))
    assert len(names) == 2
    assert all(mode(n) == 0o600 for n in names)


def test_links_that_wait_at_our_names_are_not_followed(tmp_path: Path) -> None:
    machine = build(tmp_path)
    victim = put(machine, "/victim", "precious")
    for name in ("etc/default/.grub.emupmem-new", "boot/grub/.grub.cfg.emupmem-old.new"):
        (machine.root / name).symlink_to(victim)
    (machine.root / "boot/grub/.grub.cfg.emupmem-old").symlink_to(victim)
    carry_out_change(machine, prepare_apply(machine, FOUND, Request(GIB), Options()))
    assert victim.read_text() == "precious"


def test_a_program_that_others_can_change_is_not_started_at_boot(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    path = put(machine, "/usr/local/bin/emupmem", "")
    path.chmod(0o755)
    assert installed.unit_program(machine) == "/usr/local/bin/emupmem"
    path.chmod(0o775)
    with pytest.raises(EmupmemError, match="which others than root can change"):
        installed.unit_program(machine)


def test_the_program_that_runs_is_preferred_where_only_root_can_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pipx or uv install it for root; an older /usr/local/bin/emupmem may no longer start."""
    machine = FakeMachine(tmp_path)
    for place in ("/usr/local/bin/emupmem", "/root/.local/bin/emupmem", "/home/dev/.local/bin/emupmem"):
        put(machine, place, "").chmod(0o755)
    (tmp_path / "home/dev").chmod(0o777)
    for called, program in (
        ("/root/.local/bin/emupmem", "/root/.local/bin/emupmem"),
        ("/home/dev/.local/bin/emupmem", "/usr/local/bin/emupmem"),
        ("/usr/lib/python3/dist-packages/emupmem/__main__.py", "/usr/local/bin/emupmem"),
    ):
        monkeypatch.setattr("sys.argv", [called])
        assert installed.unit_program(machine) == program


# Words ------------------------------------------------------------------------------------------------------


def test_the_name_of_a_drop_in_cannot_leave_its_comment(tmp_path: Path) -> None:
    machine = build(tmp_path)
    put(machine, "/etc/default/grub.d/50\nGRUB_TIMEOUT=99\n#.cfg", CLOUD)
    machine.output("update-grub2")
    carry_out_change(machine, prepare_apply(machine, FOUND, Request(GIB), Options(editor_text.DEFAULT)))
    text = (machine.root / dropin.NAME.lstrip("/")).read_text()
    assert "\nGRUB_TIMEOUT" not in text
    assert dropin.read_dropin(text) == (editor_text.DEFAULT, ("memmap=1G!4G",))


def test_a_user_is_no_option_of_getent(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    script(machine, "getent", f"#!/bin/sh\necho \"$@\" > '{tmp_path}/asked'\n")
    with pytest.raises(EmupmemError, match="there is no user"):
        accounts.find_account(machine, "--help")
    assert (tmp_path / "asked").read_text() == "passwd -- --help\n"


# Terminals ----------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;title\x07\x1b[31m\u202e\udcff"


def test_control_characters_are_made_visible() -> None:
    assert units.plain(EVIL) == r"\x1b]0;title\x07\x1b[31m\u202e\xff"
    assert units.plain("ä\tb\n…") == "ä\tb\n…"


def test_no_message_drives_the_terminal(run: Run, tmp_path: Path) -> None:
    done = run("suggest", "--from", f"{tmp_path}/{EVIL}")
    assert done.status == 1
    assert r"\x1b[31m" in done.err
    assert "\x1b" not in done.err


def test_no_finding_drives_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out = Printer()
    render.findings(out, [Finding("name", "stop", EVIL, EVIL)])
    render.print_ladder(out, [Check("name", "fail", EVIL, EVIL, EVIL)])
    render.diff(out, f"+{EVIL}\n")
    shown = capsys.readouterr().out
    assert shown.count(r"\x1b]0;title") == 6
    assert "\x1b" not in shown


# Archives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_of_headers_without_end(kind: bytes) -> None:
    body = b"10 a=abcd\n"
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(body)
    data = (info.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0")) * 3000
    with pytest.raises(EmupmemError, match="no archive of emupmem collect"):
        archive.unpack(io.BytesIO(gzip.compress(data + bytes(1024))), "a")


# Where we are started from -------------------------------------------------------------------------------------


def started(
    *words: str, closed: tuple[int, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    redirect = " ".join(f"{n}>&-" for n in closed)
    line = f'"$@" {redirect}'
    argv = ["sh", "-c", line, "sh", sys.executable, "-m", "emupmem", *words]
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "closed", [*(pytest.param(n, marks=pytest.mark.slow) for n in ((0,), (1,), (2,), (1, 2))), (0, 1, 2)]
)
def test_closed_descriptors_are_not_taken_by_files(closed: tuple[int, ...], tmp_path: Path) -> None:
    done = started("--version", closed=closed)
    assert done.returncode == 0
    assert "unexpected" not in done.stderr
    code = (
        "import os; from emupmem.system.streams import standard_streams; standard_streams();"
        f"file = open({str(tmp_path / 'x')!r}, 'w'); raise SystemExit(file.fileno() < 3)"
    )
    argv = ["sh", "-c", '"$@" ' + " ".join(f"{n}>&-" for n in closed), "sh", sys.executable, "-c", code]
    assert subprocess.run(argv, check=False).returncode == 0


def test_programs_get_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUB_CONFIG", "/evil")
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("IFS", "/")
    done = Machine().output("env")
    assert done is not None
    names = {line.partition("=")[0] for line in done.stdout.decode().splitlines()}
    assert names == {"PATH", "LC_ALL", "LANG", "LVM_SUPPRESS_FD_WARNINGS"}


@pytest.mark.parametrize("root", ["tree", "/"])
def test_two_slashes_at_the_start_of_a_name_are_one(tmp_path: Path, root: str) -> None:
    """POSIX leaves `//name` to the system, pathlib keeps it apart, and Linux means `/name`."""
    machine = Machine(tmp_path / root)
    assert machine.real("//nowhere//file") == "/nowhere/file"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to("//nowhere/file")
    assert Machine(tmp_path / "tree").real("/link") == "/nowhere/file"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("/", "/"),
        ("/.hidden", "/.hidden"),
        ("/a/../../b", "/b"),
        ("/gone/../link", "/a/b"),
        ("/link/../c", "/a/c"),
        ("/file/below/../../link", "/a/b"),
        ("/gone/./below//it", "/gone/below/it"),
    ],
)
def test_names_are_followed_inside_the_tree(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/a/b")
    machine = Machine(tmp_path)
    assert machine.real(name) == place
    assert machine.path(name) == tmp_path / place[1:]
