# SPDX-License-Identifier: Apache-2.0
"""The command line that typer makes, the same with every typer from 0.15 on and with the click that it brings or not.

- Older ones end a call without any words with 0 and the help on standard output: that is wrong use.
- Up to 0.20 they escape a bracket of their help for rich, also where rich does not show it: `\\[required]`.
"""

from __future__ import annotations

from typing import Any

import typer


class NoArgsIsHelpError(Exception):
    """A program or group without a command: its message is its help. Called as newer versions call theirs."""

    def format_message(self) -> str:
        return str(self)


def command_of(program: typer.Typer) -> Any:
    """What a Typer program is when it runs."""
    command = typer.main.get_command(program)
    _mend(command)
    return command


def _mend(command: Any) -> None:
    for inner in getattr(command, "commands", {}).values():
        _mend(inner)
    if getattr(command, "no_args_is_help", False):
        command.parse_args = _strict(command.parse_args)
    for option in command.params:
        option.get_help_record = _unescaped(option.get_help_record)


def _strict(parse: Any) -> Any:
    def parse_args(context: Any, words: list[str]) -> Any:
        if not words and not context.resilient_parsing:
            raise NoArgsIsHelpError(context.get_help())
        return parse(context, words)

    return parse_args


def _unescaped(record_of: Any) -> Any:
    def get_help_record(context: Any) -> tuple[str, str] | None:
        record = record_of(context)
        return record and (record[0].replace("\\[", "["), record[1].replace("\\[", "["))

    return get_help_record
