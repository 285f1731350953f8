# SPDX-License-Identifier: Apache-2.0
"""PE files as they are, damaged, and hostile (against pefile, which ukify uses: tests/scenario/test_uki.py)."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.system.pe import LARGEST_TEXT, PeFile, read_pe
from tests import pe

LINE = "root=UUID=0 ro quiet"
IMAGE = pe.unified("6.12.0-1-amd64", LINE)


def read(data: bytes) -> PeFile | None:
    return read_pe(io.BytesIO(data))


def found(data: bytes) -> PeFile:
    file = read(data)
    assert file is not None
    return file


def test_the_texts_of_an_image() -> None:
    file = found(IMAGE)
    assert (file.line, file.release, file.maker) == (LINE, "6.12.0-1-amd64", "systemd-stub 257.9-1")
    assert IMAGE[file.kernel : file.kernel + 2] == b"MZ"
    assert not file.signed
    assert found(pe.addon("x", signed=True)).signed


@pytest.mark.parametrize(
    ("text", "line"),
    [(b" a b\n\0", "a b"), (b"a\nb\tc \r\n", "a b c"), (b"", ""), (b"a\0b", "a"), (b"\xff", "\udcff")],
)
def test_a_command_line_is_read_as_the_stub_reads_it(text: bytes, line: str) -> None:
    assert found(pe.program([(".cmdline", text)])).line == line


def test_the_first_profile_replaces_the_base_and_others_do_not() -> None:
    profiles = [(".profile", b"ID=a"), (".cmdline", b"first"), (".profile", b"ID=b"), (".cmdline", b"second")]
    assert found(pe.unified("6", LINE, more=profiles)).line == "first"
    assert found(pe.program([(".cmdline", b"one"), (".cmdline", b"two")])).line == "one"


@pytest.mark.parametrize(
    ("magic", "maker"),
    [(b"#### LoaderInfo: x 1 ####", "x 1"), (b"hi", ""), (b"a#### LoaderInfo: x ####", ""), (b"", "")],
)
def test_its_maker(magic: bytes, maker: str) -> None:
    assert found(pe.program([(".sdmagic", magic)])).maker == maker


def packed(at: int, form: str, *values: int) -> bytes:
    data = bytearray(IMAGE)
    struct.pack_into(form, data, at, *values)
    return bytes(data)


TABLE = pe.AT + 24 + 240


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MZ",
        IMAGE[: pe.AT],
        IMAGE[: TABLE + 40],
        packed(0x3C, "<I", 0xFFFFFFFF),
        packed(0x3C, "<I", 0),
        packed(pe.AT + 6, "<H", 0xFFFF),
        packed(pe.AT + 20, "<H", 0xFFFF),
        packed(TABLE + 3 * 40 + 20, "<I", 0xFFFFFF00),  # .cmdline lies past the end
        packed(TABLE + 3 * 40 + 8, "<IIII", LARGEST_TEXT + 1, 0, LARGEST_TEXT + 1, 0),
        IMAGE.replace(b"PE\0\0", b"NE\0\0"),
    ],
)
def test_what_is_damaged_is_none(data: bytes) -> None:
    assert read(data) is None


@given(st.integers(0, 0x600), st.binary(max_size=64), st.integers(0, len(IMAGE)))
def test_whatever_is_in_the_headers_it_comes_to_an_end(at: int, noise: bytes, end: int) -> None:
    data = bytearray(IMAGE)
    data[at : at + len(noise)] = noise
    for hostile in (bytes(data), bytes(data[:end])):
        file = read(hostile)
        assert file is None or all(len(t) <= LARGEST_TEXT for t in file.texts.values())
