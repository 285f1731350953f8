# SPDX-License-Identifier: Apache-2.0
"""The manual: all that the program has is in it, and man reads it without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest

from emupmem.cli.main import COMMANDS, program_for
from emupmem.cli.manual import man_page, manual, plain_text
from emupmem.cli.typed import command_of
from tests.bench.table import MEASURED
from tests.cli.runner import Run


def options(command: Any) -> list[str]:
    """All options of a command and of those below it."""
    below = [o for inner in getattr(command, "commands", {}).values() for o in options(inner)]
    own = [o for p in command.params if p.param_type_name == "option" and not p.hidden for o in p.opts]
    return [o for o in own + below if o not in ("-h", "--help")]


def test_every_command_and_option_is_in_it() -> None:
    text = plain_text(manual())
    for name, place in COMMANDS.items():
        assert bool(re.search(rf"^  {name}\b", text, re.MULTILINE)) is not place.hidden, name
        if not place.hidden:
            group: Any = command_of(program_for([name]))
            command = group.commands[name] if hasattr(group, "commands") else group
            assert [o for o in options(command) if o not in text] == []


def test_the_sections_of_a_manual_page_are_there_in_their_order() -> None:
    found = re.findall(r"^\.SH (.*)$", man_page(manual()), re.MULTILINE)
    wanted = [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "COMMANDS",
        "EXIT STATUS",
        "JSON",
        "FILES",
        "RECOVERY",
        "EXAMPLES",
    ]
    assert [s for s in found if s in wanted] == wanted
    assert found[-1] == "SEE ALSO"


def test_man_reads_it_without_a_complaint() -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    page = man_page(manual())
    done = subprocess.run(["mandoc", "-T", "lint"], input=page, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    shown = subprocess.run(
        ["mandoc", "-T", "utf8"], input=page, capture_output=True, text=True, check=True
    ).stdout
    plain = re.sub(".\b", "", shown)
    assert "@COMMANDS@" not in plain
    assert "/boot/grub/.grub.cfg.emupmem-old" in plain


@pytest.mark.parametrize("text", [".not a request", "'nor this", "a \\ and – and…"])
def test_odd_text_is_shown_as_it_is(text: str) -> None:
    page = man_page(f"# ONE\n\n{text}\n")
    line = page.split("\n")[2]
    assert not line.startswith((".", "'"))
    assert line.isascii()


def test_help_prints_it(run: Run) -> None:
    done = run("help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("NAME\n\n  emupmem - ")
    assert max(len(line) for line in done.out.splitlines()) <= 110


def test_every_figure_of_it_is_one_that_somebody_can_measure() -> None:
    """A row is printed by `make bench`, or it says what else made it."""
    _, _, section = manual().partition("# MEASUREMENTS\n")
    rows = [r.strip("| ").partition(" | ")[0] for r in section.splitlines() if r.startswith("| ")][2:]
    others = ("whole path in real guests", "`make demo` ", "coverage-guided fuzzing")
    assert [r for r in rows if not r.startswith((*MEASURED, *others))] == []
    assert [m for m in MEASURED if not any(r.startswith(m) for r in rows)] == []
