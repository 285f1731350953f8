# SPDX-License-Identifier: Apache-2.0
"""The schema of what --json prints: the fixture `run` holds every object that a test sees against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from emupmem.cli.main import shown_commands
from tests.cli.runner import Run, check_json, schema_of_all


def with_json(name: str, command: Any) -> Iterator[str]:
    """The names of the commands that have --json."""
    for sub, inner in getattr(command, "commands", {}).items():
        yield from with_json(f"{name} {sub}", inner)
    if any("--json" in p.opts for p in command.params):
        yield name


def test_every_command_with_json_has_its_schema_and_no_other() -> None:
    names = set()
    for name, command in shown_commands():
        names |= set(with_json(name, command))
    commands = {n for n, d in schema_of_all()["$defs"].items() if "--json" in d.get("description", "")}
    assert commands == names


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema_of_all())


def test_help_prints_it(run: Run) -> None:
    assert json.loads(run("help", "--schema").out) == schema_of_all()


@pytest.mark.parametrize(
    "text",
    [
        '{"device": "", "dir": "/mnt"}',
        '{"device": "", "dir": "/mnt", "changed": 1}',
        '{"device": "", "dir": "/mnt", "changed": false, "more": 1}',
    ],
)
def test_another_object_is_found(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check_json(("umount", "/mnt", "--json"), text)


def test_an_error_stands_alone() -> None:
    check_json(("save", "x", "--json"), '{"error": "it failed"}')
