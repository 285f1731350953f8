# SPDX-License-Identifier: Apache-2.0
"""What all commands share: exit statuses, questions, words for people."""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from typing import Any, NoReturn

from emupmem.cli import stdio
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
    print(plain(text), file=sys.stderr)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))
