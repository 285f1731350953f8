# SPDX-License-Identifier: Apache-2.0
"""What the program prints: in every encoding, and whether or not it can be written.

Text that the encoding of a stream lacks is replaced by ASCII, so that nothing that is printed can raise. A
full disk or a reader that has gone is an error of a command that only shows something. Of a command that
changes something it is not: what standard output does not take goes to standard error.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from emupmem.cli import sudo

MARKS = {
    "✓": "+",
    "✗": "x",
    "→": "->",
    "…": "...",
    "·": "-",
    "×": "x",
    "“": '"',
    "”": '"',
    "█": "#",
    "▒": "=",
    "░": ":",
    "─": "-",
    "│": "|",
    "├": "|",
    "└": "`",
}
"""The ASCII forms of the program's own marks; everything else is shown by its number."""

HANDLER = "emupmem"


def _ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = (MARKS.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in lacking)
    return "".join(shown), error.end


codecs.register_error(HANDLER, _ascii)


class Stream(io.TextIOBase):
    """A standard stream that remembers what it has not written yet, and hands that on where it fails.

    `stream` is what it writes to, None where the descriptor was closed from the beginning. `lenient` is whether
    a failure is nobody's error: the text then goes to `other`, and nowhere where there is none. `name` is the
    program's for sudo.
    """

    def __init__(
        self, stream: TextIO | None, other: Stream | None = None, *, lenient: bool, name: str = sudo.NAME
    ) -> None:
        self.stream, self.other, self.lenient, self.name = stream, other, lenient, name
        self.failure: OSError | None = None
        self.muted = False
        self.waiting: list[str] = []
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)

    @property
    def works(self) -> bool:
        return self.stream is not None and self.failure is None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return (self.stream.encoding if self.stream is not None else "") or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return HANDLER

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.works and self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.stream.fileno()

    def write(self, text: str) -> int:
        """Write, or hand on. Raises OSError for a stream that fails and is not lenient."""
        if not isinstance(text, str):
            raise TypeError(
                f"not text: {type(text).__name__}"
            )  # as every text stream; how others tell them apart
        if self.muted:
            return len(text)
        given, text = len(text), sudo.spelled(text, self.name)
        if self.works and self.stream is not None:
            self.waiting.append(text)
            with self._failing():
                self.stream.write(text)
        else:
            self._hand_on(text)
        return given

    def flush(self) -> None:
        """Have it written. Raises OSError for a stream that fails and is not lenient."""
        if self.works and self.stream is not None:
            with self._failing():
                self.stream.flush()
                self.waiting.clear()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as exc:  # a ValueError where the stream was closed meanwhile
            self.failure = exc if isinstance(exc, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
            text = "".join(self.waiting)
            self.waiting.clear()
            discard(self.stream)
            if not self.lenient:
                raise self.failure from exc
            self._hand_on(text)

    def _hand_on(self, text: str) -> None:
        if self.lenient and self.other is not None:
            self.other.write(text)
            self.other.flush()
        elif self.failure is not None and not self.lenient:
            raise self.failure


def discard(stream: TextIO | None) -> None:
    """Forget what a stream holds and cannot write: the interpreter would try it again at the end, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = cast(TextIO, stream).fileno()
        kept, null = os.dup(number), os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, number)
        with contextlib.suppress(OSError, ValueError):
            cast(TextIO, stream).flush()
        os.dup2(kept, number)
        os.close(kept)
        os.close(null)


_standard: list[Stream] = []
"""Standard output and standard error while a command runs."""


@contextlib.contextmanager
def guarded(closed: tuple[str, ...] = ()) -> Iterator[None]:
    """Put such streams in the place of the standard ones; `closed` names those that were closed at the start."""
    before, name = (sys.stdout, sys.stderr), sudo.sudo_name(sys.argv[0])
    err = Stream(None if "stderr" in closed else sys.stderr, lenient=True, name=name)
    out = Stream(None if "stdout" in closed else sys.stdout, err, lenient=False, name=name)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    _standard[:] = [out, err]
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # an answer that is no text is no yes
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _standard.clear()
        for stream in before:
            try:
                stream.flush()
            except (OSError, ValueError):
                discard(stream)


def changing() -> None:
    """From here on no stream that fails makes an error: something is changed, and that must be said as it is."""
    for stream in _standard:
        stream.lenient = True


def be_quiet() -> None:
    """From here on standard output shows nothing but what is printed inside `loud`."""
    for stream in _standard[:1]:
        stream.muted = True


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return bool(_standard) and _standard[0].muted


@contextlib.contextmanager
def loud() -> Iterator[None]:
    """Print all the same: what other programs read."""
    muted = is_quiet()
    for stream in _standard[:1]:
        stream.muted = False
    try:
        yield
    finally:
        for stream in _standard[:1]:
            stream.muted = muted


def failure() -> OSError | None:
    """Why standard output could not be written, None where it could."""
    return _standard[0].failure if _standard else None


def is_read() -> bool:
    """Whether standard error, where questions are asked, can be written."""
    return not _standard or _standard[1].works
