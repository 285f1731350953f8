# SPDX-License-Identifier: Apache-2.0
"""Lines on a terminal: colours where they are wanted, and breaks between words where a line does not fit.

Elsewhere (a pipe, a file, a log) every line stays whole and without a colour. rich could do this too, but takes
longer to import than most commands run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

Part = str | tuple[str, str]
"""Text, or text and the names of its style, as in `("✓", "bold green")`."""

CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36"}
NARROWEST, USUAL = 40, 80
"""Columns: fewer show nothing to anybody; what is assumed where there is no terminal."""


def has_colours(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether to colour: NO_COLOR forbids it, CLICOLOR_FORCE wants it even in a pipe; else on a terminal that can."""
    known = os.environ if environment is None else environment
    if known.get("NO_COLOR"):
        return False
    if known.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    return moves(stream, known) and known.get("CLICOLOR") != "0"


def moves(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether it is a terminal on which a line can be written over: not so with TERM=dumb, as screen readers set it."""
    known = os.environ if environment is None else environment
    return stream.isatty() and known.get("TERM", "") not in ("", "dumb")


def width_of(stream: TextIO) -> int:
    """Columns of a terminal; COLUMNS says it where it is set, USUAL is the answer where nothing does."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and said.isascii() and 0 < len(said) < 6 and int(said):
        return max(int(said), NARROWEST)
    try:
        return max(os.get_terminal_size(stream.fileno()).columns or USUAL, NARROWEST)
    except (OSError, ValueError):
        return USUAL


def fitted(text: str, width: int, hang: int = 0) -> Iterator[tuple[int, int]]:
    """Where to break a line: the (start, end) of each piece, all but the first to be indented by `hang`.

    Breaks are between words only: a path or a command-line word that is too long stays whole.
    """
    start, room = 0, width
    while len(text) - start > room:
        blank = text.rfind(" ", start + 1, start + room + 1)
        if blank < 0 or not text[start:blank].strip():  # only the indentation before it: the word is too long
            words = len(text[start:]) - len(text[start:].lstrip(" "))
            blank = text.find(" ", start + words)
        if blank < 0:
            break
        yield start, blank
        start = blank + len(text[blank:]) - len(text[blank:].lstrip(" "))
        room = max(width - hang, 1)
        if start == len(text):
            return
    yield start, len(text)


_LEAST = 20
"""Columns that words need beside what they hang on."""


class Printer:
    """Prints lines on one stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.width = width_of(self.stream)
        self.colours = has_colours(self.stream)
        self.breaks = self.stream.isatty()

    def print(self, *parts: Part, style: str = "", hang: int = 0, whole: bool = False) -> None:
        """Print one line. `style` is for all of it, `hang` the indentation of what follows a break.

        `whole` is for what is copied, such as a command: the terminal may break it, we do not.
        """
        pairs = [(p, style) if isinstance(p, str) else p for p in parts]
        text = "".join(p for p, _ in pairs)
        hang = hang if hang + _LEAST <= self.width else 4
        pieces = fitted(text, self.width, hang) if self.breaks and not whole else ((0, len(text)),)
        for number, (start, end) in enumerate(pieces):
            indent = " " * hang if number else ""
            self.stream.write(f"{indent}{self._painted(pairs, start, end)}\n")

    def _painted(self, pairs: list[tuple[str, str]], start: int, end: int) -> str:
        """What lies between two places of the text, with its colours."""
        made, at = [], 0
        for text, style in pairs:
            shown = text[max(start - at, 0) : max(end - at, 0)]
            codes = ";".join(CODES[name] for name in style.split())
            made.append(f"\x1b[{codes}m{shown}\x1b[0m" if codes and shown and self.colours else shown)
            at += len(text)
        return "".join(made)
