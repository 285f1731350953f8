# SPDX-License-Identifier: Apache-2.0
"""The manual: `emupmem help`, and the page emupmem(8) for man.

One source: `manual.md` beside the package, with the commands and options put in from the program itself. Only what
that file uses of Markdown is known here: headings, paragraphs, lists, tables, fenced and indented blocks, `code`,
**bold**, *word*.
"""

from __future__ import annotations

import pydoc
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import Annotated, Any

import typer

from emupmem import __version__
from emupmem.cli.main import shown_commands
from emupmem.cli.output import print_product

DATE = "2026-11-27"
"""When the manual was last changed."""

_SIGNS = {"\\": "\\e", "“": "\\(lq", "”": "\\(rq", "…": "...", "→": "\\(->", "–": "\\(en"}


def manual_help(
    schema: Annotated[
        bool, typer.Option("--schema", help="Show the JSON Schema of what --json prints, for every command.")
    ] = False,
) -> None:
    """Show the manual: all commands with their options, files, exit status, JSON, how to recover."""
    text = (
        resources.files("emupmem").joinpath("schema.json").read_text("utf-8")
        if schema
        else plain_text(manual())
    )
    if sys.stdout.isatty():
        pydoc.pager(text)
    else:
        print_product(text.removesuffix("\n"))


def manual() -> str:
    """The whole manual, in Markdown."""
    text = resources.files("emupmem").joinpath("manual.md").read_text("utf-8")
    return text.replace("@COMMANDS@", "\n".join(_commands()))


def _commands() -> Iterator[str]:
    for name, command in shown_commands():
        yield from _command(name, command)


def _command(name: str, command: Any) -> Iterator[str]:
    for sub, inner in getattr(command, "commands", {}).items():
        yield from _command(f"{name} {sub}", inner)
    if hasattr(command, "commands"):
        return
    context = command.make_context(name, [], resilient_parsing=True)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    shown = " ".join(map(_argument, arguments))
    yield f"## {name} {shown}".rstrip() + "\n"
    yield from (" ".join(p.split()) + "\n" for p in (command.help or "").split("\n\n"))
    yield from (
        f"- `{_argument(p)}`: {' '.join(p.help.split())}" for p in arguments if getattr(p, "help", None)
    )
    for option in command.params:
        record = option.get_help_record(context) if option.param_type_name == "option" else None
        if record is not None and "--help" not in option.opts:
            words = " ".join(record[1].split())
            yield f"- `{record[0]}`: {words}"
    yield ""


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[].")
    shown = f"{name}..." if argument.nargs == -1 else name
    return str(shown if argument.required else f"[{shown}]")


# Markdown to man and to plain text ---------------------------------------------------------------------------


def _blocks(markdown: str) -> Iterator[tuple[str, str]]:
    """(kind, text): `head`, `sub`, `item`, `row`, `code` (with its line breaks) or `text`."""
    inside: list[str] | None = None
    held: list[str] = []
    kind = ""
    for line in [*_fenced(markdown.split("\n")), ""]:
        if line.startswith("```"):
            if inside is not None:
                yield "code", "\n".join(inside)
            inside = [] if inside is None else None
        elif inside is not None:
            inside.append(line)
        elif held and line and not re.match(r"- |\||#", line):
            held.append(line.strip())
        else:
            if held:
                yield kind, " ".join(held)
            held, kind = [], ""
            if re.match(r"#+ ", line):
                yield ("head" if line.startswith("# ") else "sub"), line.lstrip("# ")
            elif line.startswith("- "):
                held, kind = [line[2:]], "item"
            elif line.startswith("|"):
                if not re.match(r"\| ?-", line):
                    yield "row", line
            elif line:
                held, kind = [line], "text"


def _fenced(lines: Iterable[str]) -> Iterator[str]:
    """The lines, with fences around what is a block because it is indented by four blanks after an empty line."""
    before, fenced, indented = "", False, False
    for line in lines:
        begins = not fenced and not indented and not before.strip() and line.startswith(_INDENT)
        ends = indented and not line.startswith(_INDENT)
        if begins or ends:
            yield "```"
        indented = (indented or begins) and not ends
        fenced ^= line.startswith("```")
        yield line.removeprefix(_INDENT) if indented else line
        before = line
    if indented:
        yield "```"


_INDENT = "    "


def man_page(markdown: str) -> str:
    """The page for man(7), as mandoc and groff read it."""
    lines = [f'.TH EMUPMEM 8 "{DATE}" "emupmem {__version__}" "System Manager\'s Manual"']
    rows = 0
    for kind, text in _blocks(markdown):
        rows = rows + 1 if kind == "row" else 0
        if kind == "head":
            lines += [f".SH {text}"]
        elif kind == "sub":
            lines += [f".SS {_roff(text)}"]
        elif kind == "item":
            name = re.match(r"`[^`]+`(?:, `[^`]+`)*(?=: )", text)
            lines += [".TP", *_filled(_roff(name[0]))] if name else [".IP \\(bu 2"]
            lines += _filled(_roff(text[name.end() + 2 :] if name else text))
        elif kind == "row":
            first, _, second = (c.strip() for c in text.strip("|").replace("\\|", "\0").partition("|"))
            lines += (
                []
                if rows == 1
                else [*_apart(lines), *_filled(_roff(first)), ".RS 4", *_filled(_roff(second)), ".RE"]
            )
        elif kind == "code":
            lines += [
                *([] if lines[-1].startswith(".SH") else [".PP"]),
                ".nf",
                ".RS 4",
                *(_line(_plain(c)) for c in text.split("\n")),
                ".RE",
                ".fi",
            ]
        elif lines[-1] == ".SH NAME":
            own, _, what = text.partition(" - ")
            lines += [f"{own} \\- {_plain(what)}"]
        else:
            lines += [*_apart(lines), *_filled(_roff(text))]
    return "\n".join(lines) + "\n"


def _apart(lines: Sequence[str]) -> list[str]:
    """What begins a paragraph: nothing after a heading."""
    return [] if lines[-1].startswith((".SH", ".SS")) else [".PP"]


def _roff(text: str) -> str:
    """A line with its marks as fonts."""
    parts = re.split(r"(`[^`]*`|\*\*[^*]+\*\*|\*[^*`]+\*)", text)
    return "".join(_marked(p) for p in parts)


def _marked(part: str) -> str:
    if part.startswith("`") and len(part) > 1:
        # A line may end after a comma: the keys of a JSON object are longer than one.
        code = re.sub(r",(?=\S)", r",\\:", _plain(part[1:-1]))
        return f"\\fB{code}\\fR"
    if part.startswith("**") and part.endswith("**") and len(part) > 4:
        return f"\\fB{_plain(part[2:-2])}\\fR"
    if part.startswith("*") and part.endswith("*") and len(part) > 2:
        return f"\\fI{_plain(part[1:-1])}\\fR"
    return _plain(part, minus=False)


def _plain(text: str, minus: bool = True) -> str:
    signs = _SIGNS | ({"-": "\\-", "'": "\\(aq", "^": "\\(ha", "~": "\\(ti", "`": "\\(ga"} if minus else {})
    made = "".join(signs.get(c, c) for c in text)
    return "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in made)


def _filled(text: str) -> list[str]:
    """Text in lines of at most 80 bytes where its words allow."""
    lines = [_line(x) for x in textwrap.wrap(text, 79, break_long_words=False, break_on_hyphens=False)]
    # What ends after a comma has no spaces to be adjusted by.
    return [".na", *lines, ".ad"] if "\\:" in text else lines


def _line(text: str) -> str:
    """A line that is no request, even if it begins like one."""
    return f"\\&{text}" if text.startswith((".", "'")) else text


def plain_text(markdown: str) -> str:
    """The same for a terminal or a pipe: 80 columns, the marks left out."""
    out: list[str] = []
    rows = 0
    for kind, text in _blocks(markdown):
        rows = rows + 1 if kind == "row" else 0
        bare = re.sub(r"`([^`]*)`", r"\1", re.sub(r"\*\*?([^*`]+)\*\*?", r"\1", text))
        if kind == "head":
            out += ["", text]
        elif kind == "sub":
            out += ["", f"  {bare}"]
        elif kind == "code":
            out += ["", *(f"    {c}" for c in text.split("\n"))]
        elif kind == "row":
            first, _, second = (c.strip() for c in bare.strip("|").partition("|"))
            out += [] if rows == 1 else [_wrapped(first, "  "), _wrapped(second, "      ")]
        else:
            out += [_wrapped(bare, "  - ", "    ") if kind == "item" else "\n" + _wrapped(bare, "  ")]
    return "\n".join(out).strip() + "\n"


def _wrapped(text: str, first: str, then: str = "") -> str:
    """Words in lines; what is longer than a line, such as the keys of a JSON object, may be broken after a comma."""
    lines, empty = [first], True
    for word in text.split():
        longer = len(word) > _COLUMNS - len(then or first)
        for number, part in enumerate(re.split(r"(?<=,)(?=\S)", word) if longer else [word]):
            gap = "" if empty or number else " "
            if not empty and len(lines[-1] + gap + part) > _COLUMNS:
                lines.append(then or first)
                gap = ""
            lines[-1] += gap + part
            empty = False
    return "\n".join(lines)


_COLUMNS = 79


if __name__ == "__main__":
    print(man_page(manual()), end="")
