# SPDX-License-Identifier: Apache-2.0
"""Where a value stands in a text: by augeas (Shellvars lens, in memory), else by the shape of plain lines."""

from __future__ import annotations

import importlib
import re
from functools import lru_cache
from typing import Protocol, cast

from emupmem.editor.text import VARIABLES
from emupmem.model import EmupmemError
from emupmem.record import record

_INDEX = re.compile(r"\[[0-9]+\]")


# --- where the values stand ----------------------------------------------------------------------------


@record
class Assignment:
    """An assignment of one of the two variables: offsets of the raw value; `top` outside if and case."""

    name: str
    start: int
    end: int
    top: bool
    line: int


@record
class Layout:
    """Where the two variables are assigned, in order; `nodes` is the lens's tree, None if it failed."""

    assignments: tuple[Assignment, ...]
    nodes: tuple[tuple[str, str], ...] | None
    error_line: int = 0

    def of(self, name: str) -> list[Assignment]:
        return [a for a in self.assignments if a.name == name]


class _Augeas(Protocol):
    """What is used of python-augeas, which has no types."""

    def set(self, path: str, value: str) -> None: ...
    def get(self, path: str) -> str | bytes | None: ...
    def match(self, path: str) -> list[str]: ...
    def remove(self, path: str) -> int: ...
    def span(self, path: str) -> tuple[str, int, int, int, int, int, int]: ...
    def text_store(self, lens: str, node: str, path: str) -> None: ...


_AUGEAS_HINT = "install python-augeas and libaugeas (Debian: apt install python3-augeas augeas-lenses)"


@lru_cache(maxsize=1)
def _augeas() -> _Augeas:
    """Start augeas without loading any file or lens: 0.08 s with the first text instead of 1 s."""
    try:
        augeas = importlib.import_module("augeas")  # late: not every command needs it
        # NO_LOAD, NO_MODL_AUTOLOAD, ENABLE_SPAN; as numbers because 0.5 does not name them all
        return cast(_Augeas, augeas.Augeas(flags=1 << 5 | 1 << 6 | 1 << 7))
    except (ImportError, OSError, AttributeError, RuntimeError, ValueError) as exc:
        raise EmupmemError(f"cannot use augeas to edit GRUB settings: {exc}", _AUGEAS_HINT) from exc


@lru_cache(maxsize=16)
def layout_of(source: str) -> Layout:
    """Find the assignments with the lens, or by the shape of plain lines where it gives up."""
    tree = _augeas()
    for path in ("/emupmem", "/augeas/text"):
        tree.remove(path)
    # text_store refuses a missing final newline
    tree.set("/emupmem/in", source if source.endswith("\n") else f"{source}\n")
    try:
        tree.text_store("Shellvars.lns", "/emupmem/in", "/emupmem/tree")
    except (ValueError, RuntimeError) as exc:
        line = tree.get("/augeas/text/emupmem/tree/error/line")
        if tree.get("/augeas/text/emupmem/tree/error") != "parse_failed":
            raise EmupmemError(f"augeas has no Shellvars lens: {exc}", _AUGEAS_HINT) from exc
        return Layout(_plain_lines(source), None, int(line or 0))
    return _from_tree(tree, source)


def _from_tree(tree: _Augeas, source: str) -> Layout:
    encoded = source.encode()  # spans count bytes of what augeas was given

    def offset(position: int) -> int:
        return position if source.isascii() else len(encoded[:position].decode())

    nodes, found = [], []
    for path in tree.match("/emupmem/tree//*"):
        plain = _INDEX.sub("", path.removeprefix("/emupmem/tree/"))
        value = tree.get(path)
        nodes.append((plain, value if isinstance(value, str) else ""))
        name = plain.rsplit("/", 1)[-1]
        if name in VARIABLES and value is not None:  # None: `export NAME` without a value
            _, _, _, start, end, *_ = tree.span(path)
            start, end = offset(start), offset(end)
            line = source.count("\n", 0, start) + 1
            found.append(Assignment(name, start, end, plain == name, line))
    found.sort(key=lambda a: a.start)
    return Layout(tuple(found), tuple(nodes))


_PLAIN_LINE = re.compile(
    r"^(?P<indent>[ \t]*)(?:export[ \t]+)?(?P<name>GRUB_CMDLINE_LINUX(?:_DEFAULT)?)="
    r"(?P<raw>\"(?:[^\"`$\\\n]|\$(?P=name)\b)*\"|'[^'\n]*'|[A-Za-z0-9_.,:=/+@%!-]*)"
    r"(?=[ \t]*(?:;|\Z|\n|[ \t]\#))",
    re.M | re.A,
)


def _plain_lines(source: str) -> tuple[Assignment, ...]:
    return tuple(
        Assignment(
            m["name"],
            m.start("raw"),
            m.end("raw"),
            not m["indent"],
            source.count("\n", 0, m.start("raw")) + 1,
        )
        for m in _PLAIN_LINE.finditer(source)
    )


def line_of(name: str, source: str) -> int:
    """The line of the last assignment, those outside if and case first; 0 when there is none."""
    mine = layout_of(source).of(name)
    last = next((a for a in reversed(mine) if a.top), mine[-1] if mine else None)
    return last.line if last else mention(name, source)


def mention(name: str, source: str) -> int:
    """The last line that looks like an assignment, whatever lens and plain lines make of it; or 0."""
    lines = [m.start() for m in re.finditer(rf"^[^#\n]*\b{name}\+?=", source, re.M | re.A)]
    return source.count("\n", 0, lines[-1]) + 1 if lines else 0
