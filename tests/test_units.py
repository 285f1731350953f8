# SPDX-License-Identifier: Apache-2.0
"""Sizes between people and bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.model import GIB, KIB, MIB, TIB, EmupmemError
from emupmem.units import human, parse_size, span_text, tight


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16G", 16 * GIB),
        ("16g", 16 * GIB),
        ("16GiB", 16 * GIB),
        ("16 GiB", 16 * GIB),
        ("16Gi", 16 * GIB),
        ("16GIB", 16 * GIB),
        ("512mi", 512 * MIB),
        ("1.5G", 1536 * MIB),
        ("512M", 512 * MIB),
        ("1T", TIB),
        ("64K", 64 * KIB),
        ("4096", 4096),
        ("4096B", 4096),
        ("0x100000000", 4 * GIB),
        ("007G", 7 * GIB),
    ],
)
def test_sizes_that_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("16GB", "decimal units"),
        ("16kb", "decimal units"),
        ("", "is not a size"),
        ("G", "is not a size"),
        ("-1G", "is not a size"),
        ("1e3", "is not a size"),
        ("1..5G", "is not a size"),
        ("0xzz", "is not a size"),
        ("4G!4G", "is not a size"),
        ("٣G", "is not a size"),
        ("0.0001K", "whole number of bytes"),
        ("9999999T", "more than any machine"),
        ("9" * 5000, "more than any machine"),
        ("1." + "9" * 5000, "is not a size"),
        ("i", "is not a size"),
        ("1i", "is not a size"),
    ],
)
def test_sizes_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(EmupmemError, match=words):
        parse_size(text)


@given(st.text(max_size=12))
def test_no_text_breaks_it(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except EmupmemError as exc:
        assert exc.message


@given(st.integers(0, 1 << 52))
def test_what_is_shown_tight_reads_back(size: int) -> None:
    assert parse_size(tight(size)) == size


def test_people_see_no_more_than_there_is() -> None:
    assert human(16 * GIB) == "16 GiB"
    assert human(16 * GIB - 1) == "15.9 GiB"
    assert human(4 * GIB - GIB // 4) == "3.7 GiB"
    assert human(512 * MIB) == "512 MiB"
    assert human(100) == "100 B"
    assert human(-GIB) == "-1 GiB"
    assert span_text(4 * GIB, 20 * GIB) == "0x100000000-0x4ffffffff"


@pytest.mark.parametrize(
    "text", ["0x1_0", "0x_1", "0x١", "0x", "0x ", "0x-1", "15g\n1kb", "1\n2", "x GB", "-1GB", ".", ""]
)
def test_what_python_would_read_as_a_number_is_no_size(text: str) -> None:
    with pytest.raises(EmupmemError, match="is not a size") as caught:
        parse_size(text)
    assert "\n" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("text", "why"),
    [("9" * 50, "more than any"), ("9" * 50 + "GiB", "more than any"), ("0x" + "f" * 50, "more than any"),
     ("x" * 50, "not a size"), ("0." + "9" * 50, "not a size"), ("-" + "9" * 50, "not a size")],
)  # fmt: skip
def test_a_long_word_is_called_what_it_is(text: str, why: str) -> None:
    with pytest.raises(EmupmemError, match=f"is {why}"):
        parse_size(text)
