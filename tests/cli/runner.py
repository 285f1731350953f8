# SPDX-License-Identifier: Apache-2.0
"""The program as people call it, in this process: see the fixture `run`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import jsonschema
import pytest

from emupmem.cli import completion
from emupmem.cli import main as cli_main
from emupmem.cli.typed import command_of


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]
"""Called with the words after `emupmem`, and stdin= (bytes) and terminal= (whether a person types it)."""


class Terminal(io.TextIOWrapper):
    """Standard input of a person."""

    def isatty(self) -> bool:
        return True


def check_json(argv: Sequence[str], out: str) -> None:
    """Assert that what a command printed for --json is as its published schema says."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    if "--json" in words and out.startswith("{"):
        schemas = schema_of_all()
        names = [w for w in words if not w.startswith("-")]
        name = next(n for n in (" ".join(names[:2]), names[0]) if n in schemas["$defs"])
        _validator(name).validate(json.loads(out))


@cache
def _validator(name: str) -> Any:
    """What judges the JSON of a command. The schema itself is judged once, in test_schema.py."""
    schema = {**schema_of_all(), "$ref": f"#/$defs/{name}"}
    return jsonschema.validators.validator_for(schema)(schema)


@cache
def schema_of_all() -> Any:
    return json.loads(resources.files("emupmem").joinpath("schema.json").read_text("utf-8"))


@cache
def _built(name: str) -> Any:
    """A command as typer makes it, which takes five times as long as what it does on a machine in a folder."""
    return command_of(_program_for([name]))


_program_for = cli_main.program_for
assert vars(completion)["program_for"] is _program_for  # before it is replaced; `shown_commands` takes ours


def _built_once(words: Sequence[str]) -> Any:
    """In place of both: what was typed comes to the command that it names."""
    typed = next((w for w in words if not w.startswith("-")), "")
    return _built(typed) if typed in cli_main.COMMANDS else command_of(_program_for(words))


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main`; words and standard input are afterwards what they were, whatever else a test patches."""

    def call(*argv: str, stdin: bytes = b"", terminal: bool = False) -> Done:
        before = sys.argv, sys.stdin
        sys.argv = ["emupmem", *argv]
        sys.stdin = (Terminal if terminal else io.TextIOWrapper)(io.BytesIO(stdin))
        try:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
                patch.setattr(cli_main, "program_for", tuple)
                patch.setattr(cli_main, "command_of", _built_once)
                cli_main.main()
        finally:
            sys.argv, sys.stdin = before
        assert isinstance(caught.value.code, int)
        done = Done(caught.value.code, *capsys.readouterr())
        check_json(argv, done.out)
        return done

    return call
