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

from emupmem.cli.main import main


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
        jsonschema.validate(json.loads(out), {**schemas, "$ref": f"#/$defs/{name}"})


@cache
def schema_of_all() -> Any:
    return json.loads(resources.files("emupmem").joinpath("schema.json").read_text("utf-8"))


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main`; words and standard input are afterwards what they were, whatever else a test patches."""

    def call(*argv: str, stdin: bytes = b"", terminal: bool = False) -> Done:
        before = sys.argv, sys.stdin
        sys.argv = ["emupmem", *argv]
        sys.stdin = (Terminal if terminal else io.TextIOWrapper)(io.BytesIO(stdin))
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            sys.argv, sys.stdin = before
        assert isinstance(caught.value.code, int)
        done = Done(caught.value.code, *capsys.readouterr())
        check_json(argv, done.out)
        return done

    return call
