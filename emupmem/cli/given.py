# SPDX-License-Identifier: Apache-2.0
"""Have typer check what was typed, and leave alone what needs no check.

typer 0.29 checks values with pydantic, defaults and options that were not given too. To import it takes as long as
all the rest of a command's start, so it is left to the values that need it: paths, and what is no number or choice.
Older versions of typer have no such check, and nothing is changed there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Any


def check_only_given(command: Any) -> None:
    """Do so for a command, or a group with all that is in it, as `typer.main.get_command` makes them."""
    for below in getattr(command, "commands", {}).values():
        check_only_given(below)
    if not isinstance(command.get_params, partial):
        command.get_params = partial(_params, command.get_params)  # with --help, made when it is asked for


def _params(usual: Callable[[Any], list[Any]], context: Any) -> list[Any]:
    found = usual(context)
    for param in found:
        if hasattr(param, "type_descriptor") and not isinstance(param.process_value, partial):
            param.process_value = partial(_process, param, param.process_value)
    return found


def _process(param: Any, usual: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    """What typer's own `process_value` returns, without its check where that could only say yes."""
    kind = param.type_descriptor.annotation
    several = param.multiple or param.nargs != 1
    plain = None if several else _plain(kind, value, param.type_descriptor.parameter_info)
    if plain is not None:
        value = plain
    elif several or not _needs_no_check(kind, value, param.default) or (value is None and param.required):
        if not several or value not in (None, (), []) or param.required:
            return usual(context, value)
        value = ()
    return param.callback(context, param, value) if param.callback is not None else value


def _plain(kind: Any, word: Any, limits: Any) -> Any:
    """What a word means that is a number within the limits, or a choice, as it is listed; None for all else."""
    if type(word) is not str or not isinstance(kind, type):
        return None
    if kind is int and re.fullmatch(r"0|[1-9][0-9]{0,8}", word):
        number, low, high = int(word), limits.min, limits.max
        return number if (low is None or low <= number) and (high is None or number <= high) else None
    return kind(word) if issubclass(kind, StrEnum) and word in list(kind) else None


def _needs_no_check(kind: Any, value: Any, default: Any) -> bool:
    if value is None or (kind is str and type(value) is str):
        return True
    return value is default and isinstance(kind, type) and isinstance(value, kind)
