# SPDX-License-Identifier: Apache-2.0
"""A small scanner of shell quoting: which characters inside a value make up which word."""

from __future__ import annotations

import re
from typing import NamedTuple

from emupmem.kernel.cmdline import RESERVATION

BLANKS = " \t\n\r\v\f"
_OPAQUE = "\uffff"  # stands for an expansion: never a blank, never part of a word of ours


def words_of(value: str) -> tuple[str, ...]:
    """Split a value at blanks outside quotes, as GRUB's lexer and the kernel do; quotes are kept.

    Source: grub-core/script/yylex.l, lib/cmdline.c next_arg().
    """
    return tuple(value[a:b] for a, b in word_spans(value)[0])


def items_of(value: str) -> tuple[str, ...]:
    """List our items (`16G!4G`) in the `memmap=` words of a value, in order."""
    return tuple(item for word in words_of(value) for item in items_of_word(word))


# --- the scanner of shell quoting --------------------------------------------------------------------


class ValueChar(NamedTuple):
    """One character of a value and the slice of the raw text that writes it; made for each character, so a tuple."""

    start: int
    end: int
    char: str


class OddValueError(Exception):
    """The raw text of a value is not what the scanner understands; another way must be found."""


def chars_of(raw: str) -> tuple[list[ValueChar], str]:
    """Scan a raw value; give its characters and the quote that closes it at the very end, or ''."""
    try:
        return _scanned(raw)
    except RecursionError:  # hundreds of expansions in expansions
        raise OddValueError from None


def _scanned(raw: str) -> tuple[list[ValueChar], str]:
    units: list[ValueChar] = []
    quote = tail = ""
    at = 0
    while at < len(raw):
        char, tail = raw[at], ""
        if quote != "'" and char == "\\":
            at = _escape(raw, at, quote, units)
        elif char == quote:
            quote, tail, at = "", char, at + 1
        elif not quote and char in "'\"":
            quote, at = char, at + 1
        elif quote != "'" and char in "$`":
            end = _expansion_end(raw, at)
            units.append(ValueChar(at, end, _OPAQUE if end > at + 1 else char))
            at = end
        else:
            units.append(ValueChar(at, at + 1, char))
            at += 1
    if quote:
        raise OddValueError
    return units, tail


def _escape(raw: str, at: int, quote: str, units: list[ValueChar]) -> int:
    following = raw[at + 1 : at + 2]
    if following == "\n":
        return at + 2  # a continued line: no character at all
    if following and (not quote or following in '$`"\\'):
        units.append(ValueChar(at, at + 2, following))
        return at + 2
    units.append(ValueChar(at, at + 1, "\\"))
    return at + 1


def _expansion_end(raw: str, at: int) -> int:
    """Find where the expansion at `at` ends; `at + 1` when the `$` stands for itself."""
    if raw[at] == "`":
        return _closing(raw, at + 1, "`")
    if raw.startswith("$(", at):
        return _closing(raw, at + 2, ")")
    if raw.startswith("${", at):
        return _closing(raw, at + 2, "}")
    found = re.compile(r"\$(?:[A-Za-z_]\w*|[0-9@*#?$!-])", re.A).match(raw, at)
    return found.end() if found else at + 1


def _closing(raw: str, at: int, close: str) -> int:
    while at < len(raw):
        char = raw[at]
        if char == close:
            return at + 1
        if char == "\\":
            at += 2
        elif close == "`":
            at += 1
        elif char == "'" and close == ")":
            at = _closing_single(raw, at + 1)
        elif char == '"':
            at = _closing(raw, at + 1, '"')
        elif char == "(" and close == ")":
            at = _closing(raw, at + 1, ")")
        elif char in "$`":
            at = _expansion_end(raw, at)
        else:
            at += 1
    raise OddValueError


def _closing_single(raw: str, at: int) -> int:
    end = raw.find("'", at)
    if end < 0:
        raise OddValueError
    return end + 1


def word_spans(value: str) -> tuple[list[tuple[int, int]], bool]:
    """Split at blanks outside quotes; also tell whether all quotes are closed."""
    spans: list[tuple[int, int]] = []
    quote, start, at = "", -1, 0
    while at < len(value):
        char = value[at]
        if not quote and char in BLANKS:
            if start >= 0:
                spans.append((start, at))
            start, at = -1, at + 1
            continue
        if start < 0:
            start = at
        if char == "\\" and quote != "'":
            at += 1
        elif char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        at += 1
    if start >= 0:
        spans.append((start, len(value)))
    return spans, not quote


def items_of_word(word: str) -> list[str]:
    if not word.startswith("memmap="):
        return []
    return [part for part in word.removeprefix("memmap=").split(",") if RESERVATION.fullmatch(part)]


def without_items(word: str) -> str:
    """The word without our items, empty when nothing is left."""
    if not items_of_word(word):
        return word
    parts = [p for p in word.removeprefix("memmap=").split(",") if not RESERVATION.fullmatch(p)]
    return f"memmap={','.join(parts)}" if parts else ""
