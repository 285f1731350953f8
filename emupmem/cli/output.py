# SPDX-License-Identifier: Apache-2.0
"""What all commands share: exit statuses, questions, words for people."""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from typing import Any, NoReturn

from emupmem.cli import stdio
from emupmem.cli.terminal import Printer
from emupmem.model import UNCHANGED, EmupmemError
from emupmem.units import parse_size, plain


class Exit(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_AS_PLANNED = 3


def as_typed() -> list[str]:
    return ["emupmem", *sys.argv[1:]]


def size_of(text: str) -> int:
    try:
        return parse_size(text)
    except EmupmemError as exc:
        usage(exc.message, exc.hint)


def mode_of(text: str) -> None:
    """Raise EmupmemError for permissions that are none: wrong use."""
    from emupmem.device.decide import check_mode  # the commands that mount have it already

    try:
        check_mode(text)
    except EmupmemError as exc:
        usage(exc.message, exc.hint)


def ask(question: str) -> None:
    if stdio.is_quiet():
        usage("--quiet does not show what there is to say yes to", "add --yes, or leave --quiet away")
    if not sys.stdin.isatty():
        raise EmupmemError("there is no terminal to ask on", "--yes goes ahead without asking")
    sys.stdout.flush()
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if not stdio.is_read():
        raise EmupmemError(
            "standard error, where to ask, cannot be written", "--yes goes ahead without asking"
        )
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise EmupmemError("not confirmed", state=UNCHANGED)


class UsageError(EmupmemError):
    """Wrong options: exit status 2. Where nothing is advised, `main` names the command's own --help."""


def usage(message: str, hint: str = "") -> NoReturn:
    raise UsageError(message, hint)


def one_line(error: EmupmemError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def say(text: str) -> None:
    """Tell on standard error what is wrong or should be known, --quiet or not."""
    _show(text, Printer(sys.stderr))


def tell(text: str = "") -> None:
    """Tell on standard output what was found or done; nothing with --quiet."""
    _show(text, Printer())


def _show(text: str, out: Printer) -> None:
    for line in plain(text).split("\n"):
        bare = line.lstrip(" ")
        lead = len(line) - len(bare)
        first = next((len(m) for m in _MARKS if bare.startswith(m)), 0)
        out.print(
            line, hang=lead + first, whole=bare.startswith("then: ")
        )  # any program: nothing tells where it ends


_MARKS = ("emupmem: ", "Next:  ", "✓ ", "! ", "· ", "→ ")


def print_product(text: str) -> None:
    """Print what the command is there to print, --quiet or not: other programs may read it."""
    with stdio.loud():
        print(text)


def print_json(result: dict[str, Any]) -> None:
    print_product(json.dumps(result, indent=2))
