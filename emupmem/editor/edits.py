# SPDX-License-Identifier: Apache-2.0
"""Splicing: new words into a text, and old ones out of it, every other byte as it was."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import AnyStr

from emupmem.editor.lens import Assignment, layout_of, mention
from emupmem.editor.quoting import (
    BLANKS,
    OddValueError,
    ValueChar,
    chars_of,
    items_of,
    items_of_word,
    word_spans,
    words_of,
)
from emupmem.editor.shell import Sourced
from emupmem.editor.text import MARK, VARIABLES, external, internal
from emupmem.kernel.cmdline import RESERVATION
from emupmem.record import record

_PLAIN = re.compile(r"[A-Za-z0-9_.,:=/+@%-]*")  # needs no quotes in sh; no tilde, sh expands it


def undo_lines(current: AnyStr, before: AnyStr, after: AnyStr) -> AnyStr | None:
    """Take the change from `before` to `after` back out of `current`; None where its lines are not there."""
    if current == after:
        return before
    lines = _lines_put_back(internal(current), internal(before), internal(after))
    return None if lines is None else external("".join(lines), current)


# --- edits of one raw value --------------------------------------------------------------------------


def _reworked(
    raw: str, replacement: Sequence[str], names: Sequence[str] | None, drop: Sequence[str] = ()
) -> str:
    """Put `replacement` where the first item of ours stands and delete the further ones.

    Only items in `names` are touched (None: all). Foreign items of the same comma list stay; a word that
    becomes empty goes with one adjoining blank.
    """
    try:
        units, _ = chars_of(raw)
    except OddValueError:
        return raw  # left alone; when there is something of ours in it, sh will tell
    value = "".join(u.char for u in units)
    gone: set[int] = set()
    put: dict[int, str] = {}
    fresh = ",".join(replacement)
    for start, end in word_spans(value)[0]:
        word = value[start:end]
        if word in drop:
            _take_word(gone, value, start, end)
            continue
        left = 0
        parts = _parts(word, start)
        for first, last in parts:
            item = value[first:last]
            if not RESERVATION.fullmatch(item) or (names is not None and item not in names):
                left += 1
            elif fresh:
                gone.update(range(first, last))
                put[first], fresh = fresh, ""
                left += 1
            else:
                _take_part(gone, parts, first, last)
        if parts and not left:
            _take_word(gone, value, start, end)
    return _spliced_units(raw, units, gone, put)


def _parts(word: str, start: int) -> list[tuple[int, int]]:
    """Where the items of a `memmap=` word stand; nothing for a word without an item of ours."""
    if not items_of_word(word):
        return []
    at = start + len("memmap=")
    parts = []
    for part in word.removeprefix("memmap=").split(","):
        parts.append((at, at + len(part)))
        at += len(part) + 1
    return parts


def _take_part(gone: set[int], parts: Sequence[tuple[int, int]], first: int, last: int) -> None:
    """Delete an item with one comma: the one before it, or the one behind where none is left before."""
    gone.update(range(first, last))
    if first > parts[0][0] and first - 1 not in gone:
        gone.add(first - 1)
    elif last < parts[-1][1]:
        gone.add(last)


def _take_word(gone: set[int], value: str, start: int, end: int) -> None:
    gone.update(range(start, end))
    if start and value[start - 1] in BLANKS and start - 1 not in gone:
        gone.add(start - 1)
    elif end < len(value) and value[end] in BLANKS:
        gone.add(end)


def _spliced_units(raw: str, units: Sequence[ValueChar], gone: set[int], put: Mapping[int, str]) -> str:
    out, at = [], 0
    for index, unit in enumerate(units):
        if index in gone:
            out += [raw[at : unit.start], put.get(index, "")]
            at = unit.end
    return "".join([*out, raw[at:]])


def _appended(raw: str, words: str) -> str:
    """Add words at the end of a raw value, inside its last quotes; quotes are added where needed."""
    units, tail = chars_of(raw)
    text = f" {words}" if units else words
    if tail:
        return f"{raw[:-1]}{text}{tail}"
    if _PLAIN.fullmatch(raw):
        return f'"{raw}{text}"'
    return f'{raw}"{text}"'


# --- edits of a whole text -----------------------------------------------------------------------------


@record
class WantedWords:
    """What a variable shall hold: these items of ours, words added at the end, words taken out."""

    items: tuple[str, ...]
    extra: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@record
class Placing:
    """The edit of `set_items`, as pure functions from text to text."""

    variable: str
    items: tuple[str, ...]
    extra: tuple[str, ...]
    drop: tuple[str, ...]
    is_set: bool

    @classmethod
    def of(
        cls, variable: str, items: Sequence[str], extra: Sequence[str], drop: Sequence[str], now: Sourced
    ) -> Placing:
        value = now.values[-1][variable]
        missing = tuple(dict.fromkeys(w for w in extra if w not in words_of(value or "")))
        return cls(variable, tuple(items), missing, tuple(drop), value is not None)

    def wishes(self) -> dict[str, WantedWords]:
        return {
            **{n: WantedWords(()) for n in VARIABLES},
            self.variable: WantedWords(self.items, self.extra, self.drop),
        }

    def is_there(self, source: str, now: Sourced) -> bool:
        """Whether sh reads all as wished, and no other line can hold more of ours: there is nothing to edit."""
        values = now.values[-1]
        told = all(items_of(values[name] or "") == wish.items for name, wish in self.wishes().items())
        words = words_of(values[self.variable] or "")
        told = told and not self.extra and not any(word in self.drop for word in words)
        return told and bool(self.items) and source.count("memmap=") == 1

    def in_place(self, source: str) -> str:
        """Edit the assignments that are there; append a line where there is none to edit."""
        layout = layout_of(source)
        mine = layout.of(self.variable)
        raws = {a: source[a.start : a.end] for a in layout.assignments}
        live = _live(mine, source)
        target = next((a for a in live if a.top and _items_in(raws[a])), None)
        present = [(a in live, item) for a in mine for item in _items_in(raws[a])]
        keep = present == [(True, item) for item in self.items]  # as wished, and nothing in dead lines
        for a in layout.assignments:
            if a.name != self.variable:
                raws[a] = _reworked(raws[a], (), None)
            elif keep:
                raws[a] = _reworked(raws[a], (), (), self.drop)
            else:
                raws[a] = _reworked(raws[a], self.items if a is target else (), None, self.drop)
        words = self._new_words([raws[a] for a in live], not keep and not target)
        last = next((a for a in reversed(mine) if a.top), None)
        if last and layout.nodes is None and last.line < mention(self.variable, source):
            last = None  # plain lines only are known, and something later may be the one that counts
        if words and last:
            raws[last] = _appended(raws[last], words)
        spliced = _without_own_lines(source, _spliced(source, raws))
        if words and not last:
            return _with_line(spliced, self.variable, words, self.is_set or bool(mine))
        return spliced

    def appended(self, source: str) -> str:
        """Take ours out everywhere and add a line that extends whatever value there is."""
        raws = {}
        for a in layout_of(source).assignments:
            drop = self.drop if a.name == self.variable else ()
            raws[a] = _reworked(source[a.start : a.end], (), None, drop)
        words = self._new_words([raw for a, raw in raws.items() if a.name == self.variable], True)
        spliced = _without_own_lines(source, _spliced(source, raws))
        return _with_line(spliced, self.variable, words, True) if words else spliced

    def _new_words(self, raws: Sequence[str], with_items: bool) -> str:
        there = {word for raw in raws for word in _words_in(raw)}
        words = [f"memmap={','.join(self.items)}"] if self.items and with_items else []
        return " ".join(words + [w for w in self.extra if w not in there])


def stripped(source: str, names: Sequence[str] | None) -> str:
    raws = {a: _reworked(source[a.start : a.end], (), names) for a in layout_of(source).assignments}
    return _without_own_lines(source, _spliced(source, raws))


def _live(mine: Sequence[Assignment], source: str) -> list[Assignment]:
    """The assignments that the value is made of: the last one, and those before while it extends them."""
    live: list[Assignment] = []
    for a in reversed(mine):
        live.insert(0, a)
        if a.top and not re.search(rf"\$\{{?{a.name}\b", source[a.start : a.end], re.A):
            break
    return live


def _words_in(raw: str) -> tuple[str, ...]:
    try:
        return words_of("".join(u.char for u in chars_of(raw)[0]))
    except OddValueError:
        return ()


def _items_in(raw: str) -> list[str]:
    return [item for word in _words_in(raw) for item in items_of_word(word)]


def _spliced(source: str, raws: Mapping[Assignment, str]) -> str:
    out, at = [], 0
    for a in sorted(raws, key=lambda a: a.start):
        out += [source[at : a.start], raws[a]]
        at = a.end
    return "".join([*out, source[at:]])


def _with_line(source: str, name: str, words: str, extend: bool) -> str:
    # A missing final newline stays missing, so that taking the line out gives the old bytes back.
    line = f'{MARK}\n{name}="{f"${name} " if extend else ""}{words}"'
    if not source or source.endswith("\n"):
        return f"{source}{line}\n"
    return f"{source}\n{line}"


_OWN_LINE = re.compile(rf'^{MARK}\n({"|".join(VARIABLES)})="(?:\$\1)?"(?:\n|(?P<bare>\Z))', re.M)


def _without_own_lines(source: str, changed: str) -> str:
    """Take out lines that emupmem appended and that hold nothing any more."""
    if changed == source:
        return source
    while found := _OWN_LINE.search(changed):
        start = found.start() - (1 if found["bare"] is not None and found.start() else 0)
        changed = changed[:start] + changed[found.end() :]
    return changed


# --- undo ------------------------------------------------------------------------------------------------


def _lines_put_back(current: str, before: str, after: str) -> list[str] | None:
    """Replace each block of lines that `after` changed by the old one; None unless all are found once."""
    lines, old, new = (_lines(text) for text in (current, before, after))
    moves = []
    for i1, i2, j1, j2 in _changed_blocks(old, new):
        if j1 == j2 and j1:  # nothing of ours to look for: the line before marks the place
            i1, j1 = i1 - 1, j1 - 1  # noqa: PLW2901
        places = _places_of(new[j1:j2], lines)
        if len(places) != 1:
            return None
        moves.append((places[0], j2 - j1, old[i1:i2]))
    moves.sort()
    if any(at + count > following for (at, count, _), (following, _, _) in pairwise(moves)):
        return None  # two blocks of the same lines, of which somebody left only one
    for at, count, block in reversed(moves):
        lines[at : at + count] = block
    if any(not line.endswith("\n") for line in lines[:-1]):
        return None
    return lines


def _places_of(block: Sequence[str], lines: Sequence[str]) -> list[int]:
    """The lines with which a block of them begins; the third place and all others are not looked for."""
    if not block:
        return []
    if not block[-1].endswith("\n"):  # only the last line of all is like that
        start = len(lines) - len(block)
        return [start] if start >= 0 and list(lines[start:]) == list(block) else []
    # in one string: `find` does not take the square of equal lines
    text, sought = "\n" + "".join(lines), "\n" + "".join(block)
    found: list[int] = []
    at = text.find(sought)
    while at >= 0 and len(found) < 2:
        found.append(text.count("\n", 0, at))
        at = text.find(sought, at + 1)
    return found


_MOST_PAIRS = 4_000_000
"""Of lines, that difflib may have to compare: it takes the square of what repeats."""


def _changed_blocks(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Where lines differ: (from, to) in the old text and in the new one. Equal ends are left out first."""
    most = min(len(old), len(new))
    head = next((n for n in range(most) if old[n] != new[n]), most)
    tail = next((n for n in range(most - head) if old[-1 - n] != new[-1 - n]), most - head)
    left, right = old[head : len(old) - tail], new[head : len(new) - tail]
    if len(left) * len(right) > _MOST_PAIRS:
        return [(head, head + len(left), head, head + len(right))]
    middle = difflib.SequenceMatcher(None, left, right, autojunk=False)
    return [
        (head + i1, head + i2, head + j1, head + j2)
        for tag, i1, i2, j1, j2 in middle.get_opcodes()
        if tag != "equal"
    ]


def _lines(text: str) -> list[str]:
    # not splitlines(): only a newline ends a line of a file, and undo must keep every byte
    return re.findall(r"[^\n]*\n|[^\n]+", text)
