# SPDX-License-Identifier: Apache-2.0
"""Hostile and odd command lines: the exit status and the first line of each, as the table `lines.txt` has them.

A line of it is `STATUS | words | first line`; `{dir}` and the like stand for what is made here, `…` at an end for
anything. To take new lines in, write the words with a status and no first line: the test prints what it saw.
"""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

import pytest

from emupmem.report import collected
from tests.cli.runner import Run
from tests.fake import LOG, FakeMachine, put

TABLE = Path(__file__).with_name("lines.txt")
OLD = """ BIOS-e820: 0000000000000000 - 000000000009f800 (usable)
 BIOS-e820: 0000000000100000 - 00000000bf800000 (usable)
"""
ARM = "Linux version 6.1.0-18-arm64 (a@b) (gcc-12)\n"
DIGITS = "9" * 5000
NO_TRACE = ("Traceback", "unexpected: ", "Input should", "Value error", "unable to parse")


def logs() -> dict[str, str]:
    many = "".join(
        f"BIOS-e820: [mem {n << 21:#018x}-{(n << 21) + 0xFFFFF:#018x}] usable\n" for n in range(5000)
    )
    return {
        "log": LOG,
        "empty": "",
        "rubbish": "\x01\x02\x1b]0;x\x07" * 100,
        "cut": LOG[: LOG.index("0x00000000feffc")],
        "two-lines": LOG + LOG[LOG.index("BIOS-prov") :].replace("53fffffff", "43fffffff"),
        "old": OLD,
        "arm": ARM,
        "xen": LOG.replace("BIOS-e820:", "Xen:"),
        "wsl": LOG.replace("6.12.0-1-amd64", "5.15.153.1-microsoft-standard-WSL2"),
        "tdx": LOG + "tdx: Guest detected\n",
        "kdump": LOG.replace("ro quiet", "ro elfcorehdr=0x6b000000"),
        "i386": LOG.replace("6.12.0-1-amd64", "5.10.0-9-686-pae"),
        "mtrr": LOG + "WARNING: BIOS bug: CPU MTRRs don't cover all of memory, losing 3840MB of RAM.\n",
        "exactmap": LOG.replace("ro quiet", "ro memmap=exactmap memmap=4G@0"),
        "small": LOG.replace("0x000000053fffffff", "0x0000000100000fff"),
        "many": LOG.partition("BIOS-e820")[0] + many,
    }


@pytest.fixture
def places(tmp_path: Path, here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the names in the table stand for."""
    folder = tmp_path / "odd"
    for name, text in logs().items():
        put(here, f"../odd/{name}", text)
    (folder / "zip.gz").write_bytes(b"\x1f\x8b\x08rubbish")
    (folder / "utf16").write_bytes(LOG.encode("utf-16"))
    (folder / "loop").symlink_to("loop")
    (folder / "bare").mkdir()
    texts = {
        "tree": b'GRUB_CMDLINE_LINUX=""\n',
        "hugetree": b"# x\n" * 600_000,
        "nultree": b'GRUB_CMDLINE_LINUX="\0"\n',
        "longtree": b'GRUB_CMDLINE_LINUX="' + b"x" * 2030 + b'"\n',
    }
    for name, data in texts.items():
        put(here, f"../odd/{name}/etc/default/grub", data)
    os.mkfifo(folder / "fifo")
    (folder / "fifotree/etc/default").mkdir(parents=True)
    os.mkfifo(folder / "fifotree/etc/default/grub")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")  # its name must be short
    assert collected  # its base class must be the real machine: it is imported before `here` stands for it
    long = f"{folder}/{'x' * 5000}"
    return {
        "dir": str(folder),
        "log": f"{folder}/log",
        "tree": f"{folder}/tree",
        "digits": DIGITS,
        "long": long,
    }


@pytest.mark.slow
def test_each_line_of_the_table(run: Run, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emupmem.system.pipe.WRITER_SECONDS", 0.1)
    rows = [line.split(" | ", 2) for line in TABLE.read_text().splitlines() if line and line[0] != "#"]
    assert len(rows) >= 200
    wrong = []
    for status, words, first in rows:
        typed = [w.format(**places) if "{" in w else w for w in shlex.split(words)]
        done = run(*typed)
        said = (done.err or done.out).strip("\n").partition("\n")[0]
        for name in ("log", "tree", "dir"):
            said = said.replace(places[name], f"{{{name}}}")
        head = first.removesuffix("…")
        same = said == first or (head != first and said.startswith(head))
        if (int(status), True) != (done.status, same) or any(word in done.err for word in NO_TRACE):
            wrong.append(f"{done.status} | {words} | {said}")
        assert len(said) < 600, words
    assert not wrong, "\n" + "\n".join(wrong)
