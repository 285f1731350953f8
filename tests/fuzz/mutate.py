# SPDX-License-Identifier: Apache-2.0
"""Mutations that know what the texts are made of: tokens, lines, words, numbers, quotes, repetition."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

_WORD = re.compile(rb"[^\s=,!:;'\"]+")
_NUMBER = re.compile(rb"0[xX][0-9a-fA-F]+|[0-9a-f]{8,16}|\d+")
_ODD = [
    b"\0", b"\r", b"\r\n", b"\n", b"\x1b[1m", b"\x1b", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"\xff\xfe", b"\xc2\xa0", b"\xe2\x80\xa8", b"\x85", b"\x0b", b"\x0c", b"\x1c", b"'", b'"', b"\\", b"`",
    b"$", b"#", b" ", b"\t", b"=", b"{", b"}", b"(", b")", b";", b"|", b"<", b">", b"\\\n", b"'\"'\"'",
]  # fmt: skip
_NUMBERS = [
    b"0", b"1", b"-1", b"00", b"07", b"08", b"0x", b"0x0", b"4294967296", b"18446744073709551615", b"1e999",
    b"18446744073709551616", b"9" * 40, b"9" * 5000, b"0x" + b"f" * 40, b"ffffffffffffffff", b"0" * 16, b"1_0",
    b"NaN", b"1.5", b"000000013fffffff", b"000ffffffffff000", b"0100", b"4096", b"4097", b"2147483648", b"\xd9\xa3",
]  # fmt: skip

Mutation = Callable[[Random, bytes], bytes]


class Mutator:
    """Changes an input in a few places. `tokens` are the words of its language, `seeds` whole texts."""

    def __init__(self, tokens: Sequence[bytes], seeds: Sequence[bytes]) -> None:
        self.tokens, self.seeds = list(tokens) or [b""], list(seeds) or [b""]
        self.mutations: list[Mutation] = [
            self.insert, self.insert, self.replace, self.replace, self.number, self.odd, self.line, self.line,
            self.lines, self.cut, self.splice, self.repeat, self.join, self.everywhere,
        ]  # fmt: skip

    def __call__(self, data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
            data = rng.choice(self.mutations)(rng, data)
        return data[:most]

    def insert(self, rng: Random, data: bytes) -> bytes:
        """A token, at the edge of a word more often than inside one."""
        at = _place(rng, data)
        blank = rng.choice((b"", b" ", b" ", b"\n"))
        return data[:at] + blank + rng.choice(self.tokens) + blank + data[at:]

    def replace(self, rng: Random, data: bytes) -> bytes:
        """A word becomes another one."""
        return _swap(rng, data, _WORD, rng.choice(self.tokens))

    def number(self, rng: Random, data: bytes) -> bytes:
        """A number becomes a neighbour, or one that nobody expects."""
        found = list(_NUMBER.finditer(data[:100_000]))
        if not found:
            return data + rng.choice(_NUMBERS)
        one = rng.choice(found)
        new = rng.choice(_NUMBERS)
        if rng.random() < 0.5 and len(one[0]) < 20:
            base = 16 if one[0][:2].lower() == b"0x" or len(one[0]) >= 8 else 10
            digits = one[0].removeprefix(b"0x").removeprefix(b"0X")
            try:
                value = max(0, int(digits, base) + rng.choice((-1, 1, 4096, -4096, 1 << 20, 1 << 32)))
            except ValueError:
                value = 0
            new = (one[0][:2] if base == 16 and one[0][:2] == b"0x" else b"") + (
                f"{value:0{len(digits)}x}" if base == 16 else str(value)
            ).encode()
        return data[: one.start()] + new + data[one.end() :]

    def odd(self, rng: Random, data: bytes) -> bytes:
        """A character that means something to somebody, put in or in the place of another."""
        at = _place(rng, data)
        return data[:at] + rng.choice(_ODD) + data[at + rng.choice((0, 0, 1)) :]

    def line(self, rng: Random, data: bytes) -> bytes:
        """A line is dropped, doubled, moved, cut, or put before another."""
        lines = data.split(b"\n")
        at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
        what = rng.randrange(5)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(to, lines[at])
        elif what == 2:
            lines.insert(to, lines.pop(at))
        elif what == 3:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        else:
            lines[at] = lines[at][rng.randrange(len(lines[at]) + 1) :]
        return b"\n".join(lines)

    def lines(self, rng: Random, data: bytes) -> bytes:
        """A run of lines is dropped or doubled."""
        lines = data.split(b"\n")
        first, last = sorted((rng.randrange(len(lines) + 1), rng.randrange(len(lines) + 1)))
        return b"\n".join(
            lines[:last] + lines[first:] if rng.random() < 0.4 else lines[:first] + lines[last:]
        )

    def cut(self, rng: Random, data: bytes) -> bytes:
        """The beginning or the end is lost."""
        at = rng.randrange(len(data) + 1)
        return data[:at] if rng.random() < 0.7 else data[at:]

    def splice(self, rng: Random, data: bytes) -> bytes:
        """Some lines of another text."""
        other = rng.choice(self.seeds).split(b"\n")
        first, last = sorted((rng.randrange(len(other) + 1), rng.randrange(len(other) + 1)))
        lines = data.split(b"\n")
        at = rng.randrange(len(lines) + 1)
        return b"\n".join(lines[:at] + other[first:last] + lines[at:])

    def repeat(self, rng: Random, data: bytes) -> bytes:
        """A piece many times over: what makes careless patterns slow."""
        at = rng.randrange(len(data) + 1)
        piece = data[at : at + rng.choice((1, 1, 2, 3, 8, 30, 200))]
        return data[:at] + piece * rng.choice((2, 3, 16, 64, 500)) + data[at:]

    def join(self, rng: Random, data: bytes) -> bytes:
        """Two lines become one, or one two."""
        if rng.random() < 0.5:
            return _swap(rng, data, re.compile(rb"\n"), rng.choice((b"", b" ", b"\\\n", b"; ")))
        return _swap(rng, data, re.compile(rb" "), b"\n")

    def everywhere(self, rng: Random, data: bytes) -> bytes:
        """The same change in all lines: line ends, a prefix, an indent."""
        prefix = rng.choice((b"", b"> ", b"    ", b"[    0.000000] ", b"<6>", b"kernel: ", b"#"))
        end = rng.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n"))
        return end.join(prefix + line for line in data.split(b"\n"))


def _place(rng: Random, data: bytes) -> int:
    if rng.random() < 0.3 or not data:
        return rng.randrange(len(data) + 1)
    at = rng.randrange(len(data))
    found = _WORD.search(data, at, at + 200)
    return at if found is None else rng.choice((found.start(), found.end()))


def _swap(rng: Random, data: bytes, pattern: re.Pattern[bytes], new: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    found = pattern.search(data, at) or pattern.search(data)
    return data if found is None else data[: found.start()] + new + data[found.end() :]
