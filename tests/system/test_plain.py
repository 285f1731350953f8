# SPDX-License-Identifier: Apache-2.0
"""What a person gives is read without waiting for ever and without end."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emupmem.boot.grub import menu
from emupmem.editor.text import checked_text
from emupmem.model import EmupmemError
from emupmem.parser.bootlog import parse_boot_log
from emupmem.system import plain
from emupmem.system.machine import Machine
from emupmem.system.streams import given_file
from tests import PROJECT
from tests.cli.runner import Run
from tests.fake import LOG, build


@pytest.mark.parametrize(
    "name", ["/proc/sys/kernel/osrelease", "/proc/version", "/proc/cmdline", "/proc/meminfo"]
)
def test_files_of_the_kernel_are_read(name: str) -> None:
    assert Machine().read(name) == Path(name).read_bytes() or name == "/proc/meminfo"
    assert Machine().peek(name)


def test_a_pipe_without_an_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "LARGEST_LOG", 1 << 20)
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as yes:
        assert yes.stdout is not None
        with (
            given_file(f"/dev/fd/{yes.stdout.fileno()}", print) as file,
            pytest.raises(EmupmemError, match="is longer than"),
        ):
            parse_boot_log(file)
        yes.kill()


def test_a_log_without_an_end_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "LARGEST_LOG", 1 << 20)
    (tmp_path / "log").write_bytes(b"x" * (1 << 21))
    with pytest.raises(EmupmemError, match="is longer than"), given_file(str(tmp_path / "log"), print):
        pass


def test_a_machine_reads_plain_files_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "LARGEST_FILE", 1 << 20)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"x" * ((1 << 20) + 1))
    (tmp_path / "well").write_bytes(b"x" * (1 << 20))
    machine = Machine(tmp_path)
    with pytest.raises(EmupmemError, match="/fifo cannot be read: it is a FIFO"):
        machine.read("/fifo")
    with pytest.raises(EmupmemError, match="/large cannot be read: it is larger than"):
        machine.read("/large")
    assert (machine.peek("/fifo"), machine.peek("/large")) == ("", "")
    assert len(machine.read("/well") or b"") == 1 << 20


def test_defaults_and_menus_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmupmemError, match="/etc/default/grub: 1048577 bytes"):
        checked_text(b"#" * ((1 << 20) + 1), "/etc/default/grub")
    with pytest.raises(EmupmemError, match=r"grub.cfg has 4194305 bytes"):
        menu.entries("#" * ((4 << 20) + 1))
    with monkeypatch.context() as patch, pytest.raises(EmupmemError, match=r"grub.cfg has 4194305 bytes"):
        patch.setattr(menu, "split_words", lambda line: pytest.fail("its lines are looked at"))
        menu.default_entry("#" * ((4 << 20) + 1), {})


@pytest.mark.parametrize(
    "line",
    [
        "BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usablx\n",
        "BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable\n",
        "BIOS-e820: [mem 0x0000000000100000-0x00000000bfffffff] usable\n",
    ],
)
def test_more_lines_than_a_map_has_are_not_read_on(line: str) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def readinto(self, buffer: object) -> int:
            got = super().readinto(buffer)  # type: ignore[arg-type]
            self.taken += got
            return got

    log = Counting((LOG.partition("BIOS-e820")[0] + line * 200_000).encode())
    found = parse_boot_log(log)
    assert found.firmware is None
    assert found.problem is not None
    assert log.taken < 2 << 20


def test_odd_surroundings_are_no_surprise(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text(LOG)
    for columns in ("0", "-1", "x", "1", "100000"):
        monkeypatch.setenv("COLUMNS", columns)
        done = run("suggest", "--size", "1G", "--from", str(tmp_path / "log"))
        assert done.status == 0
        assert "chosen: 1G at 4G" in done.out
        assert "memmap=1G!4G" in done.out
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    done = run("collect", "x.tar.gz")
    assert done.err.splitlines() == [
        "emupmem: the folder that you are in is gone",
        "         cd to another one",
    ]


def test_ctrl_c_while_the_program_starts() -> None:
    """Python is stopped in its own imports: no traceback, and the status of a program that Ctrl-C ended."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "class Find:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'emupmem.cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Find())\n"
        "from emupmem.__main__ import start\nstart()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_a_machine_of_tests_is_read_as_before(tmp_path: Path) -> None:
    assert build(tmp_path).read("/etc/default/nosuch") is None
