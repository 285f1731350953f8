# SPDX-License-Identifier: Apache-2.0
"""The parts of the virtual machine harness that need no virtual machine."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests import PROJECT
from tests.vm.image import DAY, _clean
from tests.vm.machine import _Stream, fetch, firmware_args, make_job_disk, qemu

START = "\x1etoken start 0\n"
END = "\x1etoken end 0 7\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_stream_is_the_same_however_it_is_cut(size: int) -> None:
    heard: list[str] = []
    stream = _Stream("token", None, heard.append)
    data = f"noise{START}one\ntwö \x1e not a mark\nno newline{END}late".encode()
    for at in range(0, len(data), size):
        stream.feed(data[at : at + size])
    (result,) = stream.results("console")
    assert result.status == 7
    assert result.output == "one\ntwö \x1e not a mark\nno newline" == "".join(heard)
    assert result.console == "console"


def test_a_reset_ends_a_script_without_status() -> None:
    stream = _Stream("token", None, None)
    stream.feed(f"{START}first\x1etoken start 1\nsecond\x1etoken end 1 0\n".encode())
    assert [(one.status, one.output) for one in stream.results("")] == [(None, "first"), (0, "second")]


def test_power_cut_stops_at_the_match() -> None:
    stream = _Stream("token", "wri(t+)en", None)
    stream.feed(f"{START}writ".encode())
    assert not stream.cut
    stream.feed(b"ten")
    assert stream.cut
    assert stream.results("")[0].status is None


def test_after_the_last_script_the_power_goes() -> None:
    stream = _Stream("token", None, None, 2)
    stream.feed(f"{START}one{END}".encode())
    assert not stream.cut
    stream.feed(b"\x1etoken start 1\ntwo\x1etoken end 1 0\n")
    assert stream.cut
    assert [(one.status, one.output) for one in stream.results("")] == [(7, "one"), (0, "two")]


@pytest.mark.skipif(not shutil.which("debugfs", path="/usr/sbin:/sbin"), reason="needs e2fsprogs")
def test_files_go_to_the_job_disk_and_come_back(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some/file").write_bytes(b"\x00\xff")
    make_job_disk(tmp_path / "disk", "token", ["true"], {"out/a": "text", "out/b/c": tmp_path / "some"})
    assert fetch(tmp_path / "disk") == {"a": b"text", "b/c/file": b"\x00\xff"}


def test_nodes_and_firmware() -> None:
    assert "node,memdev=ram1" in qemu("8G", ("4G", "4G"))
    assert "memory-backend=ram0" in qemu("2G,slots=2,maxmem=4G")
    with pytest.raises(ValueError, match="coreboot"):
        firmware_args("coreboot", Path("vars"))


PLACES = ("tests/vm", "tests/packaging", "tests/fleet", ".packaging")


def cannot_fail(line: str) -> bool:
    """Whether `set -e` passes over what a line looks for: after !, before &&, before the end of a pipe."""
    line = line.strip()
    if line.startswith("! ") and not line.startswith("! -"):
        return True
    whole = line.startswith(("if ", "while ", "until ", "(", "#")) or re.search(
        r"exit|break|continue|\|\||\$\(", line
    )
    return bool(re.match(r"[^\"'#`]*\S && \S", line) and not whole) or bool(re.search(r"[^`] \| tee ", line))


def test_what_a_script_looks_for_can_fail() -> None:
    for line in (
        "! grep a b",
        "  ! grep a b",
        "save a && cmp a b",
        "[ -c a ] && echo yes",
        "verify | tee out",
    ):
        assert cannot_fail(line), line
    for line in (
        "grep a b && exit 9 || [ $? = 1 ]",
        "if a && b; then",
        "(cd a && b) > c",
        "[ -e a ] && break",
    ):
        assert not cannot_fail(line), line
    files = sorted(f for place in PLACES for f in (PROJECT / place).rglob("*") if f.suffix in (".py", ".sh"))
    found = [
        f"{file.name}: {line}"
        for file in files
        if file != Path(__file__)
        for line in file.read_text().splitlines()
        if cannot_fail(line)
    ]
    assert found == []


def test_images_that_another_clone_uses_stay(tmp_path: Path) -> None:
    """A guest's disk is an overlay of its image: without that it does not start again."""
    for name in ("trixie-bios-old", "trixie-bios-used", "trixie-bios-used.tmp-1", "trixie-uefi-old"):
        (tmp_path / name).mkdir()
        if name.endswith("old"):
            os.utime(tmp_path / name, (time.time() - 2 * DAY,) * 2)
    _clean(tmp_path, "trixie-bios-")
    assert {p.name for p in tmp_path.iterdir()} == {"trixie-bios-used", "trixie-uefi-old"}
