# SPDX-License-Identifier: Apache-2.0
"""Pipes, FIFOs and terminals in the place of a file: read to their end, and nobody waits without knowing for what."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from emupmem.model import EmupmemError
from emupmem.parser.bootlog import parse_boot_log
from emupmem.system import pipe
from emupmem.system.streams import given_file
from tests import PROJECT
from tests.fake import LOG

DATA = LOG.encode()


def silence(words: str) -> None:
    """Nobody is told anything."""
    pytest.fail(words)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds with people is over at once."""
    for name in ("QUIET_SECONDS", "SILENT_SECONDS"):
        monkeypatch.setattr(pipe, name, 0.01)


class Writer:
    """Somebody at the other end: writes when a person is told to wait, and no sooner."""

    def __init__(self, descriptor: int, pieces: list[bytes]) -> None:
        self.descriptor, self.pieces, self.told = descriptor, pieces, list[str]()

    def tell(self, words: str) -> None:
        self.told.append(words)
        thread = threading.Thread(target=self.write)
        thread.start()
        thread.join()

    def write(self) -> None:
        for piece in self.pieces:
            os.write(self.descriptor, piece)
        os.close(self.descriptor)


def test_a_fifo_that_somebody_writes_to_is_read(tmp_path: Path) -> None:
    """As bash's <( ): its writer may be slow, and begin with a single byte."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def write() -> None:
        with fifo.open("wb", buffering=0) as file:
            file.write(DATA[:1])
            file.write(DATA[1:])

    writer = threading.Thread(target=write)
    writer.start()
    with given_file(str(fifo), print) as file:
        assert file.read() == DATA
    writer.join()


def test_a_pipe_of_the_shell_is_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, DATA)
    os.close(writing)
    with given_file(f"/dev/fd/{reading}", silence) as file:
        assert parse_boot_log(file).firmware is not None
    os.close(reading)


@pytest.mark.parametrize("before", [b"", DATA[:1], DATA[:70]])
def test_a_person_is_told_once_what_is_waited_for(impatient: None, before: bytes) -> None:
    """A pipe of the shell is waited for as long as its writer lives: `<(ssh host dmesg)` asks for a password."""
    reading, writing = os.pipe()
    os.write(writing, before)
    writer = Writer(writing, [DATA[len(before) : 80], DATA[80:]])
    with given_file(f"/dev/fd/{reading}", writer.tell) as file:
        assert file.read() == DATA
    os.close(reading)
    assert writer.told == [
        f"emupmem: still waiting for /dev/fd/{reading}: who writes to it has not ended; Ctrl-C stops this"
    ]


def test_standard_input_too(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    writer = Writer(writing, [DATA])
    with os.fdopen(reading) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stream)
        with given_file("-", writer.tell) as file:
            assert file.read() == DATA
    assert writer.told == [
        "emupmem: still waiting for standard input: who writes to it has not ended; Ctrl-C stops this"
    ]


def test_a_socket_as_standard_input_is_a_pipe_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sshd and inetd give to a program."""
    here, there = socket.socketpair()
    with here, monkeypatch.context() as patch, os.fdopen(os.dup(here.fileno())) as stream:
        there.sendall(DATA)
        there.close()
        patch.setattr(sys, "stdin", stream)
        with given_file("-", silence) as file:
            assert file.read() == DATA


def test_a_fifo_whose_writer_is_silent_is_left(impatient: None, tmp_path: Path) -> None:
    fifo, told = tmp_path / "fifo", list[str]()
    os.mkfifo(fifo)
    both = os.open(fifo, os.O_RDWR)
    for written in (b"", b"[", DATA):
        os.write(both, written)
        with (
            pytest.raises(EmupmemError, match=r"who has it open wrote nothing for 0\.01 seconds") as caught,
            given_file(str(fifo), told.append) as file,
        ):
            file.read()
        assert "save the log first" in caught.value.hint
    os.close(both)
    assert len(told) == 3


def test_a_terminal_is_told_how_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = pty.openpty()
    told: list[str] = []

    def type_it(words: str) -> None:
        told.append(words)
        os.write(outer, b"BIOS\n\x04")

    with os.fdopen(inner) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stream)
        with given_file("-", type_it) as file:
            assert file.read() == b"BIOS\n"
    os.close(outer)
    assert told == ["emupmem: standard input is a terminal: paste the log, then press Enter and Ctrl-D"]


START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job has it ignored
    "from emupmem.__main__ import start; start()"
)


@pytest.mark.slow
def test_a_writer_that_never_ends_is_stopped_by_ctrl_c() -> None:
    """`journalctl -kf` and `dmesg -w` follow the log for ever."""
    reading, writing = os.pipe()
    argv = [sys.executable, "-c", START, "suggest", "--size", "1G", "--from", f"/dev/fd/{reading}"]
    out = subprocess.PIPE
    with subprocess.Popen(argv, cwd=PROJECT, stdout=out, stderr=out, pass_fds=[reading]) as done:
        assert done.stderr is not None
        os.write(writing, DATA)
        assert done.stderr.readline().startswith(b"emupmem: still waiting for /dev/fd/")
        done.send_signal(signal.SIGINT)
        shown, said = done.communicate()
        assert (done.returncode, shown) == (1, b"")
        assert said.startswith(b"emupmem: stopped\n")
    os.close(reading)
    os.close(writing)


@pytest.mark.slow
def test_the_pipes_of_bash() -> None:
    line = f"exec {sys.executable} -m emupmem suggest --size 1G --from "
    for given, status, words in (
        ("<(true)", 1, b"emupmem: the log is empty"),
        ("<(printf '%s' \"$LOG\")", 0, b""),
        ("- < <(printf '%s' \"$LOG\")", 0, b""),
        ('- <<< "$LOG"', 0, b""),
    ):
        done = subprocess.run(
            ["bash", "-c", line + given],
            cwd=PROJECT,
            env={**os.environ, "LOG": LOG},
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr.partition(b"\n")[0]) == (status, words), done.stderr
