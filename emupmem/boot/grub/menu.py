# SPDX-License-Identifier: Apache-2.0
"""What GRUB will boot: the generated grub.cfg read line by line. Pure.

Only as much of GRUB's script language as grub-mkconfig writes: quoting (grub-core/script/yylex.l),
menuentry and submenu blocks, `linux` lines, the `### BEGIN /etc/grub.d/… ###` marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from emupmem.boot.entry import BootEntry, joined
from emupmem.model import EmupmemError
from emupmem.record import open_record

LINUX = ("linux", "linux16", "linuxefi")
MOST_BYTES = 4 << 20
_DEEPEST = 64  # blocks in blocks; no menu is like that, and each level makes every entry's path longer


@open_record
class _Block:
    kind: str
    title: str = ""
    id: str = ""
    index: int = 0
    children: int = 0


NOWHERE = -1
"""The place of an entry that is in no menu."""

_SECTION = re.compile(r"^### (BEGIN|END) (/\S*/grub\.d/\S+) ###$", re.MULTILINE)
"""grub-mkconfig's own marks; what a script prints may have others."""

_LINUX_SCRIPT = re.compile(r"\d*_?linux")
"""Scripts that make entries of GRUB_CMDLINE_LINUX: 10_linux, 20_linux_xen, 10_linux_zfs, under any number."""

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\d+|[?#*@]|\{(?:[A-Za-z_]\w*|\d+|[?#*@])\})", re.ASCII)
EATEN = "\ufffd"
"""Stands in a `memmap=` word for a `$…` that GRUB takes for a variable of its own."""

_PLAIN = {
    quote: re.compile(pattern)
    for quote, pattern in (("", r"""[^'"\\$# \t]+"""), ("'", "[^']+"), ('"', r'[^"\\$]+'))
}
"""What stands for itself, outside of quotes and in each kind of them."""


def split_words(line: str, expand: bool = False) -> list[str]:
    """Words of one GRUB script line, quotes and backslashes resolved.

    `$variables` are left as they are, or with `expand` taken out, as GRUB does where they are not set.
    """
    words: list[str] = []
    word: list[str] | None = None  # pieces: a string that grows by one copies itself each time
    i, quote = 0, ""
    while i < len(line):
        if run := _PLAIN[quote].match(line, i):
            i = run.end()
            word = word if word is not None else []
            word.append(run[0])
            continue
        c = line[i]
        if expand and c == "$" and quote != "'" and (variable := _VARIABLE.match(line, i)):
            i = variable.end()
            if word is not None and "".join(piece[:7] for piece in word[:7]).startswith("memmap="):
                word.append(EATEN)
            continue
        kept = ""
        if quote == "'":
            if c == "'":
                quote = ""
            else:
                kept = c
        elif quote == '"':
            if c == '"':
                quote = ""
            elif c == "\\" and i + 1 < len(line) and line[i + 1] in '"\\$':
                i += 1
                kept = line[i]
            else:
                kept = c
        elif c in " \t":
            if word is not None:
                words.append("".join(word))
            word = None
        elif c in "'\"":
            quote, word = c, word if word is not None else []
        elif c == "\\" and i + 1 < len(line):
            i += 1
            kept = line[i]
        elif c == "#" and word is None:
            break
        else:
            kept = c
        if kept:
            word = word if word is not None else []
            word.append(kept)
        i += 1
    if word is not None:
        words.append("".join(word))
    return words


@lru_cache(maxsize=4)
def entries(text: str) -> tuple[BootEntry, ...]:
    """Every `linux` line of a grub.cfg, in order. Raises EmupmemError for a text that no generator makes."""
    if len(text) > MOST_BYTES:
        raise EmupmemError(
            f"grub.cfg has {len(text)} bytes, which no boot menu has", "regenerate it: update-grub2"
        )
    found: list[BootEntry] = []
    stack, too_deep = [_Block("top")], 0
    section, sections = "", bool(_SECTION.search(text))
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if mark := _SECTION.match(raw):
            section = mark[2] if mark[1] == "BEGIN" else ""
        elif line == "}":
            if too_deep:
                too_deep -= 1
            elif len(stack) > 1:
                stack.pop()
        elif line.endswith("{"):
            if len(stack) > _DEEPEST:
                too_deep += 1
            else:
                stack.append(_open_block(line, stack))
        elif line.split(None, 1)[:1] and line.split(None, 1)[0] in LINUX:
            words = split_words(line)
            if len(words) > 1:
                # a kernel that a variable names keeps its name here, its words lose theirs
                kept = split_words(line, expand=True)
                words = [*words[:2], *kept[2 if _VARIABLE.sub("", words[1]) else 1 :]]
                ours = not sections or bool(_LINUX_SCRIPT.match(section.rpartition("/")[2]))
                found.append(_entry(stack, words, number, ours))
    return tuple(found)


def _open_block(line: str, stack: list[_Block]) -> _Block:
    words = split_words(line)
    kind = words[0] if words else ""
    if kind not in ("menuentry", "submenu"):
        return _Block("function" if kind == "function" else "other")
    if any(b.kind == "function" for b in stack):  # an entry where it is called, with its arguments
        return _Block(kind, words[1] if len(words) > 1 else "", "", NOWHERE)
    parent = next(b for b in reversed(stack) if b.kind in ("top", "submenu"))
    block = _Block(kind, words[1] if len(words) > 1 else "", "", parent.children)
    parent.children += 1
    for option, value in pairwise(words):
        if option in ("--id", "$menuentry_id_option", "${menuentry_id_option}"):
            block.id = value
        elif option.startswith("--id="):
            block.id = option[5:]
    return block


def _entry(stack: Sequence[_Block], words: list[str], line: int, ours: bool) -> BootEntry:
    blocks = [b for b in stack if b.kind in ("menuentry", "submenu")]
    last = blocks[-1] if blocks else _Block("top")
    recovery = (
        "-recovery-" in last.id
        or "recovery mode" in last.title
        or any(w in ("single", "recovery", "systemd.unit=rescue.target") for w in words[2:])
    )
    return BootEntry(
        tuple(b.title for b in blocks),
        tuple(b.id for b in blocks),
        tuple(b.index for b in blocks),
        words[1],
        tuple(words[2:]),
        line,
        recovery,
        ours,
    )


def whole(text: str) -> bool:
    """Whether a menu was written to its end: all sections closed, and a Linux entry in it."""
    marks = [(found[1], found[2]) for found in _SECTION.finditer(text)]
    wanted = [(kind, name) for _, name in marks[::2] for kind in ("BEGIN", "END")]
    return text.endswith("\n") and marks == wanted and bool(entries(text))


def language(text: str, system: str = "") -> str:
    """The locale that a menu was made in: grub-mkconfig puts $LANG and translated titles into it.

    It writes $LANG only for a graphical terminal: without, titles that are not English are of the `system`'s locale.
    """
    found = re.search(r"^[ \t]*set lang=([A-Za-z_]{1,40})(@\w{1,20})?$", text, re.MULTILINE)
    if found:
        return f"{found[1]}.UTF-8{found[2] or ''}"  # C.UTF-8 as well
    submenus = re.findall(r"""^[ \t]*submenu ["'](.*)$""", text, re.MULTILINE)
    translated = submenus and not any(title.startswith("Advanced options for ") for title in submenus)
    known = re.fullmatch(r"[A-Za-z_]{1,40}(\.[\w-]{1,20})?(@\w{1,20})?", system)
    return system if translated and known else "C"


def uses_bls(text: str) -> bool:
    """Whether the menu comes from Boot Loader Specification files instead of grub.cfg."""
    return any(line.split()[:1] == ["blscfg"] for line in text.splitlines())


def is_stub(text: str) -> bool:
    """Whether a menu only leads to another one (`configfile`), as those in an EFI system partition mostly do."""
    first = {words[0] for line in text.splitlines() if (words := line.split())}
    return "configfile" in first and not first & {"blscfg", "menuentry", *LINUX}


def default_entry(text: str, grubenv: Mapping[str, str]) -> BootEntry | None:
    """The entry that boots by default, None where it cannot be told.

    `grubenv` holds the variables of GRUB's environment block; a one-shot `next_entry` counts.
    """
    there = entries(text)  # first: it has an end
    wanted = grubenv.get("next_entry") or _default_word(text)
    if wanted in ("${saved_entry}", "$saved_entry"):
        wanted = grubenv.get("saved_entry") or "0"
    if wanted is None:
        return None
    parts = wanted.split(">")
    # The first kernel of an entry is the one it boots.
    shown = (e for e in there if NOWHERE not in e.index)
    return next((e for e in shown if len(e.titles) == len(parts) and _names(e, parts)), None)


def _default_word(text: str) -> str | None:
    found = None
    for raw in text.splitlines():
        words = split_words(raw) if "default" in raw else []
        if words[:1] == ["set"] and len(words) > 1 and words[1].startswith("default="):
            value = words[1].removeprefix("default=")
            if "next_entry" not in value:
                found = value
    return found


def _names(entry: BootEntry, parts: Sequence[str]) -> bool:
    levels = zip(parts, entry.titles, entry.ids, entry.index, strict=True)
    return all(part in (title, ident) or part == str(index) for part, title, ident, index in levels)


def kernel_text(value: str) -> str:
    """What of a GRUB_CMDLINE_… value reaches the kernel: its words after GRUB's own unquoting.

    `memmap=64K\\$0x18690000` loses its backslash there, `memmap=64K$0x…` its variable.
    """
    return joined(split_words(value, expand=True))
