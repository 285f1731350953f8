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


def blocks(markdown: str) -> list[str]:
    """The lines of what is fenced, or indented by four blanks after an empty line."""
    found, fenced, indented, before = [], False, False, ""
    for line in markdown.split("\n"):
        indented = not fenced and line.startswith("    ") and (indented or not before)
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or indented:
            found.append(line.removeprefix("    ") if indented else line)
        before = line
    return found


def test_each_command_of_a_block_has_a_line_of_its_own() -> None:
    wanted = blocks(manual())
    assert {"pmempool check /dev/dax0.0", "sudo emupmem verify"} <= {w.partition("  ")[0] for w in wanted}
    shown = plain_text(manual()).splitlines()
    assert [w for w in wanted if f"    {w}".rstrip() not in shown] == []
    page = man_page(manual()).replace("\\-", "-").replace("\\(aq", "'").replace("\\(ti", "~").splitlines()
    assert [w for w in wanted if w not in page] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\n\n    a  # b\n    c\n\ntwo", "  one\n\n    a  # b\n    c\n\n  two"),
        ("one\n\n    at the end", "  one\n\n    at the end"),
        ("```\none\n\n    more\n```\ntwo", "    one\n    \n        more\n\n  two"),
        ("- item\n    goes on\n- next", "  - item goes on\n  - next"),
    ],
)
def test_what_is_indented_is_a_block(text: str, shown: str) -> None:
    assert plain_text(f"# ONE\n\n{text}\n").partition("ONE\n")[2].lstrip("\n") == f"{shown}\n"


def test_names_of_members_are_not_broken() -> None:
    _, _, section = plain_text(manual()).partition("\nJSON\n")
    names = re.findall(r'"\w+"', manual().partition("# JSON\n")[2].partition("\n# ")[0])
    assert [n for n in names if n not in section] == []
    wide = '`{"' + '","'.join(["member"] * 30) + '"}` and `/a/' + "long" * 30 + "` path"
    lines = plain_text(f"# ONE\n\n- {wide}\n").splitlines()
    broken = [line for line in lines if line.startswith("    ") and not re.search(r"^ +([\"/]|path$)", line)]
    assert broken == []
    assert max(len(line) for line in lines if "long" not in line) <= 79


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
