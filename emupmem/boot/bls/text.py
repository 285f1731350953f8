# SPDX-License-Identifier: Apache-2.0
"""Boot Loader Specification entries and plain kernel command lines as text: read, and reworked byte for byte. Pure.

Such a text is what systemd-boot hands to the kernel as it stands; GRUB's `blscfg` reads the same files as
lines of its script. Source: uapi-group.org, Boot Loader Specification; grub-core/commands/blscfg.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from emupmem.boot.grub import menu
from emupmem.editor import quoting
from emupmem.kernel.cmdline import is_cut, parse_command_line
from emupmem.model import UNCHANGED, CommandLine, EmupmemError

# A word of the kernel's: blanks inside double quotes belong to it (lib/cmdline.c next_arg).
_WORD = re.compile(r'(?:[^ \t\n\r\v\f"]|"[^"]*"?)+')
_FIELD = re.compile(r"([A-Za-z_-]+)[ \t]+(.*?)[ \t\r]*\Z")

Rework = Callable[[str], str]


def fields(text: str) -> tuple[tuple[str, str], ...]:
    """(key, value) of each line, comments and blank lines left out; keys may come more than once.

    Of a value that begins and ends with a double quote systemd-boot takes both off, whatever stands between them
    (src/boot/util.c, line_get_key_value).
    """
    return tuple((key, value[1:-1] if _is_quoted(value) else value) for key, value in _raw_fields(text))


def _raw_fields(text: str) -> tuple[tuple[str, str], ...]:
    found = (_FIELD.match(line.lstrip()) for line in text.split("\n") if not line.lstrip().startswith("#"))
    return tuple((f[1], f[2]) for f in found if f is not None)


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] == '"'


def value(text: str, key: str) -> str:
    """The first value of a key, empty where there is none."""
    return next((v for k, v in fields(text) if k == key), "")


def options(text: str) -> str:
    """The kernel's command line: the values of all `options` lines, as systemd-boot reads them."""
    return " ".join(v for k, v in fields(text) if k == "options")


def grub_options(text: str) -> str:
    """The same as GRUB's script has it: quotes are its own affair (see `grub_line`)."""
    return " ".join(v for k, v in _raw_fields(text) if k == "options")


def with_options(text: str, rework: Rework, added: str = "") -> str:
    """The entry with every `options` value reworked, and `added` words at the end of the last one.

    Every other byte stays. An entry without options gets a line of its own; one that only had our words goes.
    """
    lines, emptied = text.split("\n"), set()
    at = _option_lines(lines)
    for n in at:
        head, body, end = _parts(lines[n])
        new = rework(body)
        emptied |= {n} if body and body == body.strip() and not new else set()
        lines[n] = head + new + end
    lines = [line for n, line in enumerate(lines) if n not in emptied]
    at = _option_lines(lines)
    if added and at:
        head, body, end = _parts(lines[at[-1]])
        lines[at[-1]] = f"{_joined(head + body, added)}{end}"
    elif added:
        at_end = len(lines) - (lines[-1] == "")
        end = "\r" if at_end and lines[at_end - 1].endswith("\r") else ""
        lines.insert(at_end, f"options {added}{end}")
    return "\n".join(lines)


def _parts(line: str) -> tuple[str, str, str]:
    """What stands before, in and after the value of an `options` line; quotes around all of it are outside."""
    found = re.fullmatch(r'(\s*options[ \t]+)(?:(")(.*)("[ \t]*)|(.*?))(\r?)', line, re.DOTALL)
    assert found is not None
    return found[1] + (found[2] or ""), found[3] or found[5] or "", (found[4] or "") + found[6]


def reworked(line: str, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()) -> str:
    """A command line in which our items are exactly `items`; every other byte stays.

    Items that are there are replaced where the first one stands, else the word comes at the end; `extra`
    words are added unless they are there, `drop` words taken away with one blank beside each.
    """
    line, placed = _replaced(line, items, drop)
    return _joined(line, _missing(line, items if not placed else (), extra))


def rework_file(text: str, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()) -> str:
    """The same for a file such as /etc/kernel/cmdline: words on several lines, comment lines left alone.

    Raises EmupmemError where a quote opens in one line and closes in another: what is ours could not be found again.
    """
    lines = text.split("\n")
    live = _live_lines(lines)
    for n in live[:-1]:
        if lines[n].count('"') % 2:
            raise EmupmemError(
                f"a quote is open at the end of line {n + 1} of the kernel's words: {lines[n].strip()[:60]}",
                "write it on one line, and close it",
                state=UNCHANGED,
            )
    left = tuple(items)
    for n in live:
        lines[n], placed = _replaced(lines[n], left, drop)
        left = () if placed else left
    emptied = {n for n in live if not lines[n].strip()}  # lines of their own that our words had
    lines = [line for n, line in enumerate(lines) if n not in emptied]
    live = _live_lines(lines)
    added = _missing(file_line("\n".join(lines)), left, extra)
    if added and live:
        lines[live[-1]] = _joined(lines[live[-1]], added)
    elif added:
        lines.insert(max(0, len(lines) - 1), added)
    return "\n".join(lines)


def raw_words(line: str) -> list[str]:
    """The words of a command line, quotes left as they are."""
    return _WORD.findall(line)


def file_line(text: str) -> str:
    """The command line that such a file makes: comment lines left out, all white space as one blank."""
    return " ".join(" ".join(x for x in text.split("\n") if not _is_comment(x)).split())


def _option_lines(lines: Sequence[str]) -> list[int]:
    return [n for n, line in enumerate(lines) if (f := _FIELD.match(line.lstrip())) and f[1] == "options"]


def _live_lines(lines: Sequence[str]) -> list[int]:
    return [n for n, line in enumerate(lines) if line.strip() and not _is_comment(line)]


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def rework_entry(text: str, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()) -> str:
    """The same for the `options` of an entry."""
    left = list(items)

    def rework(line: str) -> str:
        changed, placed = _replaced(line, tuple(left), drop)
        if placed:
            left.clear()
        return changed

    changed = with_options(text, rework)
    return with_options(changed, lambda line: line, _missing(options(changed), tuple(left), extra))


def prove_words(
    before: str, after: str, items: Sequence[str], extra: Sequence[str] = (), drop: Sequence[str] = ()
) -> None:
    """Raise EmupmemError unless the kernel reads our items in `after` as exactly `items`, and all else as before."""
    old, new = parse_command_line(before), parse_command_line(after)
    wrong = wrong_line(new, items)
    if wrong:
        raise EmupmemError(f"the command line would not be as planned: {wrong}", state=UNCHANGED)
    wanted = [w for w in foreign_words(old) if w not in drop]
    wanted += [w for w in dict.fromkeys(extra) if w not in wanted]
    if sorted(foreign_words(new)) != sorted(wanted):
        raise EmupmemError(
            "the command line cannot be changed without changing other words of it", state=UNCHANGED
        )


def wrong_line(line: CommandLine, items: Sequence[str]) -> str:
    """What is wrong with a command line that should reserve exactly these items; empty where all is well."""
    if is_cut(line.text):
        return "it is longer than the 2047 bytes that the kernel reads"
    have = [i.text for i in line.reservations]
    if have == list(items):
        return ""
    return f"it has {','.join(have) or 'no reservation'} instead of {','.join(items) or 'none'}"


def foreign_words(line: CommandLine) -> list[str]:
    """The words that are not ours; of a `memmap=` list the items that are not."""
    return [left for w in line.words if (left := quoting.without_items(w))]


def foreign_items(line: CommandLine) -> tuple[str, ...]:
    """The `memmap=` items of others, as written."""
    words = (w for w in foreign_words(line) if w.startswith("memmap="))
    return tuple(item for w in words for item in w.removeprefix("memmap=").split(","))


_VARIABLE = re.compile(r"(?<!\\)\$(?:\{(\w+)\}|([A-Za-z_]\w*|[0-9]+))")
"""A variable of GRUB's: a backslash guards the dollar that follows it; $0 and the like are empty."""


def variables(text: str) -> tuple[str, ...]:
    """The names of the variables that GRUB replaces in an `options` value."""
    return tuple(found[1] or found[2] for found in _VARIABLE.finditer(text))


def grub_line(text: str, variables: Mapping[str, str]) -> str:
    """What GRUB makes of an `options` value: `$name` replaced from its environment, quotes taken off."""

    def expanded(found: re.Match[str]) -> str:
        return variables.get(found[1] or found[2], "")

    return menu.kernel_text(_VARIABLE.sub(expanded, text))


def _replaced(line: str, items: Sequence[str], drop: Sequence[str]) -> tuple[str, bool]:
    """Our items replaced where the first one stands; whether there was a place for them."""
    fresh, out, at = ",".join(items), [], 0
    placed = not items
    for found in _WORD.finditer(line):
        word, start, end = found[0], found.start(), found.end()
        new = "" if word in drop else word
        if quoting.items_of(word):
            new, fresh, placed = _without(word, fresh), "", True
        if new == word:
            continue
        if not new:
            if start and line[start - 1] in " \t" and start - 1 >= at:
                start -= 1
            elif end < len(line) and line[end] in " \t":
                end += 1
        out += [line[at:start], new]
        at = end
    return "".join([*out, line[at:]]), placed


def _without(word: str, fresh: str) -> str:
    """A `memmap=` word with `fresh` in the place of its first item of ours, and none of the others."""
    parts: list[str] = []
    for part in word.removeprefix("memmap=").split(","):
        if not quoting.items_of(f"memmap={part}"):
            parts.append(part)
        elif fresh:
            parts.append(fresh)
            fresh = ""
    return f"memmap={','.join(parts)}" if parts else ""


def _missing(line: str, items: Sequence[str], extra: Sequence[str]) -> str:
    there = parse_command_line(line).words
    new = [f"memmap={','.join(items)}"] if items else []
    return " ".join([*new, *(w for w in dict.fromkeys(extra) if w not in there)])


def _joined(line: str, words: str) -> str:
    """Words added at the end of a line, before the blanks and line ends that close it."""
    if not words:
        return line
    body = line.rstrip(" \t\r\n")
    return f"{body}{' ' if body else ''}{words}{line[len(body) :]}"
