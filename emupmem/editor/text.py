# SPDX-License-Identifier: Apache-2.0
"""The words of the editor: texts of one character per byte, the two variables, what may be put in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import AnyStr

from emupmem.editor.quoting import items_of_word
from emupmem.model import EmupmemError

LINUX = "GRUB_CMDLINE_LINUX"
DEFAULT = "GRUB_CMDLINE_LINUX_DEFAULT"
VARIABLES = (LINUX, DEFAULT)

MARK = "# added by emupmem"
"""The comment above a line that emupmem appended: only such a line is taken out as a whole."""

MOST_WORDS = 4000
"""Words of a file, a comment counted as one. Augeas takes the square of their number: 50 s for 20,000 of them."""
MOST_JOINTS = 200
"""Joints (| & and what opens a block) of a file. Augeas takes the cube of their number: a minute for 1,000 of them."""
MOST_BYTES = 1 << 20
_SIZE = "[1-9][0-9]*[KMGTPE]?"
_NEW_ITEM = re.compile(rf"{_SIZE}(?:!{_SIZE}|%{_SIZE}-1\+0xefffffff)")
_NEW_WORD = re.compile(r"[A-Za-z0-9_.,:=/!-]+")


# --- texts and wishes ------------------------------------------------------------------------------------


def internal(text: str | bytes) -> str:
    return (text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")).decode("latin-1")


def external(source: str, like: AnyStr) -> AnyStr:
    data = source.encode("latin-1")
    return data if isinstance(like, bytes) else data.decode("utf-8", "surrogateescape")


def printable(source: str) -> str:
    return source.encode("latin-1").decode("utf-8", "surrogateescape")


def checked_text(text: str | bytes, filename: str) -> str:
    if len(text) > MOST_BYTES:
        raise EmupmemError(
            f"{filename}: {len(text)} bytes, which no settings of GRUB have", "restore the file"
        )
    source = internal(text)
    if "\0" in source:
        line = source.count("\n", 0, source.index("\0")) + 1
        raise EmupmemError(f"{filename}:{line}: contains a NUL byte", "sh cannot read this; restore the file")
    if source.startswith(("\xef\xbb\xbf", "\xff\xfe", "\xfe\xff")):
        raise EmupmemError(
            f"{filename}:1: starts with a byte order mark, which sh takes for a command",
            f"remove it: sed -i '1s/^\\xef\\xbb\\xbf//' {filename}",
        )
    _check_amount(source, filename)
    return source


_WORD = re.compile(r"[^\s;]+")
_JOINT = re.compile(r"[|&]|\b(?:then|do|in)\b|(?:^|[\s)])\{", re.A)


def _check_amount(source: str, filename: str) -> None:
    words = joints = 0
    for line in source.split("\n"):
        if line[:1] == "#":
            words += 1
        else:
            words += len(_WORD.findall(line))
            joints += len(_JOINT.findall(line))
    for number, most, what in ((words, MOST_WORDS, "words"), (joints, MOST_JOINTS, "of | & { then do in")):
        if number > most:
            raise EmupmemError(
                f"{filename}: more than {most} {what}, which no settings of GRUB have",
                "restore the file, or move what is not for GRUB out of it",
            )


def check_wanted_words(
    variable: str, items: Sequence[str], extra_words: Sequence[str], drop_words: Sequence[str]
) -> None:
    if variable not in VARIABLES:
        raise EmupmemError(f"{variable} is not a variable of kernel arguments", f"use {LINUX} or {DEFAULT}")
    for item in items:
        if not _NEW_ITEM.fullmatch(item):
            raise EmupmemError(f"not an item of memmap=: {item}", "SIZE!START is, for example 16G!4G")
    for word in extra_words:
        if not _NEW_WORD.fullmatch(word) or items_of_word(word) or word in drop_words:
            raise EmupmemError(f"not a word that can be added: {word}", "plain kernel arguments only")
