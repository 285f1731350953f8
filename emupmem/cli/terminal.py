# SPDX-License-Identifier: Apache-2.0
"""Lines on a terminal: colours where they are wanted, and breaks between words where a line does not fit.

Elsewhere (a pipe, a file, a log) every line stays whole and without a colour. rich could do this too, but takes
longer to import than most commands run.
"""

from __future__ import annotations

import os
import re
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

    Breaks are between words only, and not inside a command to copy: a path or a command that is too long stays whole.
    """
    length = len(text) if len(text) <= width else len(text.rstrip(" "))
    start, room, gaps = 0, width, _gaps(text, hang) if length > width else []
    while length - start > room:
        ahead = [gap for gap in gaps if gap[0] > start]
        if not ahead:
            break
        end, after = max((gap for gap in ahead if gap[0] <= start + room), default=ahead[0])
        yield start, end
        start, room = after, max(width - hang, 1)
    yield start, length


def _gaps(text: str, hang: int) -> list[tuple[int, int]]:
    """The (start, end) of the blanks where a line may end: not its indentation, nor where a break gains nothing."""
    from emupmem.cli.copied import commands_in  # compiles its patterns: only where a line is too long

    kept = list(commands_in(text))
    return [
        gap.span()
        for gap in re.finditer(r"(?<=[^ ]) +(?=[^ ])", text)
        if gap.end() > hang and not any(first < gap.start() < last for first, last in kept)
    ]


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

    def margin(self, wanted: int, least: int) -> int:
        """Where what hangs on a mark of three columns is to begin: further left where it would not fit otherwise."""
        return least if self.breaks and wanted + 3 + _LEAST > self.width else wanted

    def _painted(self, pairs: list[tuple[str, str]], start: int, end: int) -> str:
        """What lies between two places of the text, with its colours."""
        made, at = [], 0
        for text, style in pairs:
            shown = text[max(start - at, 0) : max(end - at, 0)]
            codes = ";".join(CODES[name] for name in style.split())
            made.append(f"\x1b[{codes}m{shown}\x1b[0m" if codes and shown and self.colours else shown)
            at += len(text)
        return "".join(made)
