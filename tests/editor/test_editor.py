# SPDX-License-Identifier: Apache-2.0
"""The editor of GRUB settings: every fixture and random text, with sh as the judge of every edit.

`tests/fixtures/grub/` holds texts of our own in the styles of the distributions, and one per trap.
EMUPMEM_CORPUS may name a folder with real files in `grub/` and their values in `grub/expected.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from emupmem.editor import defaults, edits, lens, quoting
from emupmem.editor import shell as editor_shell
from emupmem.editor.text import DEFAULT, LINUX, MARK, VARIABLES
from emupmem.model import EmupmemError
from tests import FIXTURES, examples
from tests.fuzz import work
from tests.judge import here

FOLDER = FIXTURES / "grub"
ITEM = ("16G!4G",)
WORD = "memmap=16G!4G"

REFUSED = {
    "dos-lines": r"dos-lines:2: the value of GRUB_CMDLINE_LINUX contains a carriage return \(DOS line ends\)",
    "bom": r"bom:1: starts with a byte order mark",
    "open-quote": r"open-quote:\d: sh cannot read this file: .*(Unterminated|unterminated|unexpected EOF)",
    "merge-conflict": r"merge-conflict:\d: sh cannot read this file: .*(?i:syntax error)",
    "exits": r"exits: sh cannot read this file: sh stops before the end of the file",
    "quote-in-value": r"quote-in-value:\d: the value of GRUB_CMDLINE_LINUX\w* has a quote that is never closed",
    "readonly": r"readonly: sh could not read the edited file: .*(?i:read.?only)",
    "from-a-variable": r"from-a-variable:2: after the edit sh would read GRUB_CMDLINE_LINUX with memmap=1G!4G",
    "backslash-at-end": r"backslash-at-end: the edit would change GRUB_TIMEOUT as well",
}
NAMES = sorted(p.name for p in FOLDER.iterdir())
EDITABLE = [name for name in NAMES if name not in REFUSED]


def fixture(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


@cache
def by_sh(text: bytes) -> dict[str, str | None]:
    """Source a text of our own with sh, apart from the code under test; byte for byte as latin-1."""
    show = "".join(f'; printf \'%s\\0%s\\0\' "${{{v}+1}}" "${{{v}-}}"' for v in VARIABLES)
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        command = ["sh", "-c", f". {file.name} >/dev/null 2>&1{show}"]
        run = subprocess.run(
            command, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}, capture_output=True, check=True
        )
    fields = run.stdout.decode("latin-1").split("\0")
    return {v: fields[2 * n + 1] if fields[2 * n] else None for n, v in enumerate(VARIABLES)}


asked_once = cache(editor_shell.run_sh)


@pytest.fixture(autouse=True)
def one_answer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """sh is asked once of a text in a file of FOLDER, and of what becomes of it: all but one say the same each time."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in NAMES and name != "changes-by-itself":
        monkeypatch.setattr(editor_shell, "run_sh", lambda texts: asked_once(tuple(texts)))


def foreign(value: str | None) -> list[str]:
    """The words of a value with our items taken out, by a rule written a second time."""
    out = []
    for full in quoting.words_of(value or ""):
        word = full
        if full.startswith("memmap="):
            parts = word[7:].split(",")
            others = [p for p in parts if not re.fullmatch(r"\w+!\w+[KMGTg]|\w+!0x\w+", p)]
            word = "memmap=" + ",".join(others) if others else ""
        out += [word] if word else []
    return out


# --- every fixture -----------------------------------------------------------------------------------


def test_there_are_enough_fixtures_and_all_refusals_exist() -> None:
    assert len(EDITABLE) >= 45
    assert set(REFUSED) <= set(NAMES)


@pytest.mark.parametrize("variable", [DEFAULT, pytest.param(LINUX, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EDITABLE)
def test_set_changes_only_our_word_and_can_be_undone(name: str, variable: str) -> None:
    text = fixture(name)
    before = by_sh(text)
    other = next(v for v in VARIABLES if v != variable)

    changed = defaults.set_items(text, variable, ITEM, filename=name)
    after = by_sh(changed)

    assert quoting.items_of(after[variable] or "") == ITEM
    assert quoting.items_of(after[other] or "") == ()
    if name != "changes-by-itself":
        assert foreign(after[variable]) == foreign(before[variable])
        assert foreign(after[other]) == foreign(before[other])
        if not quoting.items_of(before[variable] or "") and name != "function":
            assert after[variable] == (f"{before[variable]} {WORD}" if before[variable] else WORD)
    assert defaults.set_items(changed, variable, ITEM, filename=name) is changed
    assert defaults.undo(changed, text, changed) == text
    defaults.prove(text, changed, variable, ITEM, filename=name)


@pytest.mark.parametrize("name", EDITABLE)
def test_every_other_byte_stays(name: str) -> None:
    """Lines that the edit does not touch are the same bytes, in the same order."""
    text = fixture(name)
    changed = defaults.set_items(text, LINUX, ITEM, filename=name)
    touched = re.compile(rb"memmap=|GRUB_CMDLINE_LINUX|" + MARK.encode())
    kept = [line for line in text.split(b"\n") if not touched.search(line)]
    rest = iter(changed.split(b"\n"))
    assert all(
        any(line == there for there in rest) for line in kept if b"idle=poll" not in line and line != b'two"'
    )
    assert text.endswith(b"\n") == changed.endswith(b"\n") or not text


@pytest.mark.parametrize("name", EDITABLE)
def test_remove_takes_all_of_ours_and_nothing_else(name: str) -> None:
    text = fixture(name)
    before = by_sh(text)
    bare = defaults.remove_items(text, filename=name)
    after = by_sh(bare)
    for variable in VARIABLES:
        assert quoting.items_of(after[variable] or "") == ()
        if name != "changes-by-itself":
            assert foreign(after[variable]) == foreign(before[variable])
    assert defaults.remove_items(bare, filename=name) is bare
    if not name.startswith("ours-") and name != "if-block-only":
        assert bare is text


NOT_QUOTED = {"empty-unquoted", "unquoted", "unquoted-odd", "trailing-comment", "mixed-quotes"}


@pytest.mark.parametrize("variable", [LINUX, pytest.param(DEFAULT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n for n in EDITABLE if not n.startswith("ours-") and n not in NOT_QUOTED])
def test_set_then_remove_gives_the_old_bytes(name: str, variable: str) -> None:
    text = defaults.remove_items(fixture(name), filename=name)
    assert (
        defaults.remove_items(defaults.set_items(text, variable, ITEM, filename=name), filename=name) == text
    )


@pytest.mark.parametrize("name", sorted(NOT_QUOTED))
def test_remove_keeps_the_quotes_that_set_had_to_add(name: str) -> None:
    text = fixture(name)
    back = defaults.remove_items(defaults.set_items(text, DEFAULT, ITEM))
    assert by_sh(back) == by_sh(text)
    assert back.replace(b'"', b"") == text.replace(b'"', b"")


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals_name_file_and_reason(name: str, variable: str) -> None:
    with pytest.raises(EmupmemError, match=REFUSED[name]) as caught:
        defaults.set_items(fixture(name), variable, ITEM, filename=name)
    assert caught.value.hint
    assert "\n" not in caught.value.message


# --- the exact edits ---------------------------------------------------------------------------------

EDITS = [
    ("debian-stock", LINUX, 'GRUB_CMDLINE_LINUX="memmap=16G!4G"'),
    ("debian-stock", DEFAULT, 'GRUB_CMDLINE_LINUX_DEFAULT="quiet memmap=16G!4G"'),
    ("empty-unquoted", LINUX, 'GRUB_CMDLINE_LINUX="memmap=16G!4G"'),
    ("unquoted", LINUX, 'GRUB_CMDLINE_LINUX="net.ifnames=0 memmap=16G!4G"'),
    ("unquoted-odd", LINUX, r'GRUB_CMDLINE_LINUX=\"\"" memmap=16G!4G"'),
    ("unquoted-odd", DEFAULT, r'GRUB_CMDLINE_LINUX_DEFAULT=quiet\ splash" memmap=16G!4G"'),
    ("single-quoted", LINUX, "GRUB_CMDLINE_LINUX='iommu=pt intel_iommu=on memmap=16G!4G'"),
    ("mixed-quotes", LINUX, "GRUB_CMDLINE_LINUX=\"quiet\"' splash memmap=16G!4G'"),
    ("exported", LINUX, 'export GRUB_CMDLINE_LINUX="a b memmap=16G!4G"'),
    ("exported", DEFAULT, '  GRUB_CMDLINE_LINUX_DEFAULT="indented=1 memmap=16G!4G"'),
    (
        "trailing-comment",
        LINUX,
        'GRUB_CMDLINE_LINUX="quiet memmap=16G!4G"   # keep: memmap=8G!8G was tried',
    ),
    ("continued", LINUX, '    idle=poll memmap=16G!4G"'),
    ("twice", LINUX, 'GRUB_CMDLINE_LINUX="second=2 memmap=16G!4G"'),
    ("extends-itself", LINUX, 'GRUB_CMDLINE_LINUX="${GRUB_CMDLINE_LINUX} noresume memmap=16G!4G"'),
    ("dollar-escapes", LINUX, r'GRUB_CMDLINE_LINUX="memmap=64K\\\$0x18690000 quiet memmap=16G!4G"'),
    ("ours-in-the-middle", LINUX, 'GRUB_CMDLINE_LINUX="a=1 memmap=16G!4G b=2"'),
    ("ours-in-the-middle", DEFAULT, 'GRUB_CMDLINE_LINUX_DEFAULT="memmap=16G!4G quiet"'),
    ("ours-in-a-list", LINUX, r'GRUB_CMDLINE_LINUX="memmap=64K\\\$0x18690000,16G!4G,4M@1M quiet"'),
    ("ours-in-single-quotes", LINUX, "GRUB_CMDLINE_LINUX='memmap=16G!4G,64K$0x18690000 quiet'"),
    ("ours-unquoted", LINUX, "GRUB_CMDLINE_LINUX=memmap=16G!4G"),
    ("ours-across-quotes", LINUX, 'GRUB_CMDLINE_LINUX="quiet memmap="\'16G!4G\'" a=1"'),
    ("ours-in-a-chain", LINUX, 'GRUB_CMDLINE_LINUX="a=1 memmap=16G!4G"'),
    ("ours-own-line", LINUX, 'GRUB_CMDLINE_LINUX="memmap=16G!4G"'),
    ("acpi-osi", LINUX, r'GRUB_CMDLINE_LINUX="acpi_osi=\"!Windows 2012\" quiet memmap=16G!4G"'),
    ("acpi-osi", DEFAULT, "GRUB_CMDLINE_LINUX_DEFAULT=\"acpi_osi='!Windows 2015' splash memmap=16G!4G\""),
    ("if-block", LINUX, 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=16G!4G"'),
    ("if-block-not-taken", LINUX, 'GRUB_CMDLINE_LINUX="quiet memmap=16G!4G"'),
    ("case-block", LINUX, 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=16G!4G"'),
    ("two-assignments-one-line", LINUX, 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=16G!4G"'),
    ("hash-without-blank", LINUX, 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=16G!4G"'),
    ("plus-equals", LINUX, 'GRUB_CMDLINE_LINUX="quiet memmap=16G!4G"'),
    ("nested-command", DEFAULT, "GRUB_CMDLINE_LINUX_DEFAULT='a memmap=16G!4G'"),
    ("here-doc-last", LINUX, 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=16G!4G"'),
    ("chained-to-default", LINUX, 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX memmap=16G!4G"'),
    ("blank-around-equals", LINUX, 'GRUB_CMDLINE_LINUX="memmap=16G!4G"'),
    (
        "semicolons",
        LINUX,
        'GRUB_TIMEOUT=1; GRUB_CMDLINE_LINUX="a memmap=16G!4G"; GRUB_CMDLINE_LINUX_DEFAULT="b" # c',
    ),
]


@pytest.mark.parametrize(("name", "variable", "line"), EDITS)
def test_the_line_that_comes_out(name: str, variable: str, line: str) -> None:
    changed = defaults.set_items(fixture(name).decode(), variable, ITEM)
    assert changed.split("\n").count(line) == 1
    assert quoting.items_of(by_sh(changed.encode())[variable] or "") == ITEM


def test_a_missing_variable_gets_a_marked_line_at_the_end() -> None:
    assert defaults.set_items("A=1\n", LINUX, ITEM) == f'A=1\n{MARK}\n{LINUX}="{WORD}"\n'
    assert defaults.set_items("A=1", LINUX, ITEM) == f'A=1\n{MARK}\n{LINUX}="{WORD}"'
    assert defaults.set_items("", LINUX, ITEM) == f'{MARK}\n{LINUX}="{WORD}"\n'


def test_several_items_are_one_list() -> None:
    changed = defaults.set_items('GRUB_CMDLINE_LINUX="a"\n', LINUX, ("1G!4G", "1G!5G"))
    assert changed == 'GRUB_CMDLINE_LINUX="a memmap=1G!4G,1G!5G"\n'
    assert defaults.set_items(changed, LINUX, ("1G!4G", "1G!6G")) == changed.replace("5G", "6G")


def test_items_that_are_there_in_another_form_stay_as_they_are() -> None:
    text = 'GRUB_CMDLINE_LINUX="memmap=1G!4G a memmap=1G!5G"\n'
    assert defaults.set_items(text, LINUX, ("1G!4G", "1G!5G")) is text


def test_a_dead_assignment_does_not_count_as_done() -> None:
    changed = defaults.set_items(fixture("ours-dead"), LINUX, ("1G!4G",))
    assert changed == b'GRUB_CMDLINE_LINUX=""\nGRUB_CMDLINE_LINUX="quiet memmap=1G!4G"\n'


def test_setting_one_variable_clears_the_other() -> None:
    changed = defaults.set_items(fixture("ours-in-the-middle"), DEFAULT, ITEM)
    assert changed == b'GRUB_CMDLINE_LINUX="a=1 b=2"\nGRUB_CMDLINE_LINUX_DEFAULT="memmap=16G!4G quiet"\n'
    own = defaults.set_items(fixture("ours-own-line"), DEFAULT, ITEM).decode()
    assert own == f'GRUB_TIMEOUT=1\n{MARK}\n{DEFAULT}="{WORD}"\n'


def test_extra_and_dropped_words() -> None:
    text = 'GRUB_CMDLINE_LINUX="quiet"\n'
    changed = defaults.set_items(text, LINUX, ITEM, ("nokaslr",))
    assert changed == 'GRUB_CMDLINE_LINUX="quiet memmap=16G!4G nokaslr"\n'
    assert defaults.set_items(changed, LINUX, ITEM, ("nokaslr",)) is changed
    assert defaults.set_items(changed, LINUX, (), (), ("nokaslr",)) == text
    defaults.prove(text, changed, LINUX, ITEM, extra_words=("nokaslr",))
    there = 'GRUB_CMDLINE_LINUX="nokaslr quiet"\n'
    assert (
        defaults.set_items(there, LINUX, ITEM, ("nokaslr",))
        == 'GRUB_CMDLINE_LINUX="nokaslr quiet memmap=16G!4G"\n'
    )
    via = 'A=nokaslr\nGRUB_CMDLINE_LINUX="$A"\n'
    assert defaults.set_items(via, LINUX, ITEM, ("nokaslr",)) == via.replace("$A", "$A memmap=16G!4G")
    with pytest.raises(EmupmemError, match="nokaslr still in it"):
        defaults.set_items(via, LINUX, ITEM, (), ("nokaslr",))


def test_named_items_are_removed_and_others_stay() -> None:
    text = 'GRUB_CMDLINE_LINUX="memmap=1G!4G,1G!5G,64K@1M memmap=1G!6G a"\n'
    assert defaults.remove_items(text, ["1G!5G", "1G!6G"]) == 'GRUB_CMDLINE_LINUX="memmap=1G!4G,64K@1M a"\n'
    assert defaults.remove_items(text, ["2G!8G"]) is text


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("memmap=1G!4G", ""),
        ("memmap=1G!4G a", "a"),
        ("a memmap=1G!4G", "a"),
        ("a memmap=1G!4G b", "a b"),
        ("a  memmap=1G!4G  b", "a   b"),
        (" memmap=1G!4G ", " "),
        ("memmap=1G!4G memmap=1G!5G", ""),
        ("memmap=1G!4G memmap=1G!5G a", "a"),
        ("memmap=1G!4G,64K@1M,1G!5G", "memmap=64K@1M"),
        ("memmap=1G!4G,1G!5G,64K@1M", "memmap=64K@1M"),
        ("memmap=0x40000000!0x100000000", ""),
        ("memmap=1g!4g", ""),
    ],
)
def test_a_word_goes_with_one_blank(value: str, left: str) -> None:
    assert defaults.remove_items(f'GRUB_CMDLINE_LINUX="{value}"\n') == f'GRUB_CMDLINE_LINUX="{left}"\n'


@pytest.mark.parametrize(
    "word",
    [
        "memmap=4G\\\\!12G",
        "memmap=4G!",
        "memmap=!4G",
        "memmap=4G!12GB",
        "memmap=1.5G!4G",
        "memmap=exactmap",
        "memmap=2G@1G",
        "memmap=64K#1G",
        "memmap=4G%12G-1+12",
        "memmap=8G",
        "xmemmap=1G!4G",
        "foo='a memmap=1G!4G'",
    ],
)
def test_what_is_not_exactly_ours_stays(word: str) -> None:
    text = f'GRUB_CMDLINE_LINUX="{word}"\n'
    assert defaults.remove_items(text) is text
    assert defaults.set_items(text, LINUX, ITEM) == f'GRUB_CMDLINE_LINUX="{word} {WORD}"\n'


def test_our_appended_line_goes_with_its_comment_unless_somebody_used_it() -> None:
    text = defaults.set_items("A=1", LINUX, ITEM)
    assert defaults.remove_items(f"{text}\n") == "A=1\n"
    used = text.replace("memmap", "splash memmap")
    assert defaults.remove_items(used) == f'A=1\n{MARK}\n{LINUX}="splash"'


def test_bytes_stay_bytes_and_undecodable_ones_survive() -> None:
    text = fixture("latin-1-comment")
    changed = defaults.set_items(text, LINUX, ITEM)
    assert isinstance(changed, bytes)
    assert changed == text.replace(b'"quiet"', b'"quiet memmap=16G!4G"')
    as_str = defaults.set_items(text.decode("utf-8", "surrogateescape"), LINUX, ITEM)
    assert as_str.encode("utf-8", "surrogateescape") == changed


# --- reading -----------------------------------------------------------------------------------------


def test_read_gives_values_words_items_and_lines() -> None:
    file = defaults.read_grub_file(fixture("acpi-osi"), "g")
    assert file.linux.value == 'acpi_osi="!Windows 2012" quiet'
    assert file.linux.words == ('acpi_osi="!Windows 2012"', "quiet")
    assert file.variable(DEFAULT).words == ("acpi_osi='!Windows 2015'", "splash")
    assert (file.linux.line, file.default.line) == (1, 2)
    assert file.by_lens
    assert file.warnings == ()
    listed = defaults.read_grub_file(fixture("ours-in-a-list"))
    assert listed.linux.items == ("1G!4G", "1G!5G", "1G!6G")
    assert not listed.default.is_set
    assert listed.default.line == 0


def test_read_sees_what_sh_sees() -> None:
    assert (
        defaults.read_grub_file(fixture("extends-itself")).linux.value
        == "root=/dev/vda1 swiotlb=8192 noresume"
    )
    assert defaults.read_grub_file(fixture("from-a-variable")).linux.items == ("1G!4G",)
    assert defaults.read_grub_file(fixture("function")).linux.value == "quiet splash"
    assert defaults.read_grub_file(fixture("utf-8-value")).linux.value == "name=Käse"
    assert defaults.read_grub_file(fixture("only-comments")).linux.value is None


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("blank-around-equals", "g:1: sh: GRUB_CMDLINE_LINUX: not found"),
        ("plus-equals-own", "g:2: sh: GRUB_CMDLINE_LINUX+= splash: not found"),
        ("two-lines", "g:1: the value of GRUB_CMDLINE_LINUX holds a line break"),
    ],
)
def test_oddities_are_told(name: str, warning: str) -> None:
    assert any(w.startswith(warning) for w in defaults.read_grub_file(fixture(name), "g").warnings)


@pytest.mark.parametrize("name", ["case-block", "plus-equals", "hash-without-blank", "nested-command"])
def test_where_the_lens_gives_up_is_known(name: str) -> None:
    assert not defaults.read_grub_file(fixture(name)).by_lens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"A=1\nB=\0\n", r"g:2: contains a NUL byte"),
        ("A=1\n".encode("utf-16"), r"g:1: contains a NUL byte"),
        (b"\xef\xbb\xbfA=1\n", r"g:1: starts with a byte order mark"),
        (b"A=1\nif\n", r"g:\d: sh cannot read this file: .*(?i:syntax error)"),
        (
            b'GRUB_CMDLINE_LINUX_DEFAULT="a"\r\n',
            r"g:1: the value of GRUB_CMDLINE_LINUX_DEFAULT contains a car",
        ),
        (b"set -e\nfalse\n", r"g: sh cannot read this file: sh stops before the end"),
        (b"A=${B?no B here}\n", r"g:1: sh cannot read this file: .*no B here"),
    ],
)
def test_unreadable_texts(text: bytes, message: str) -> None:
    for act in (
        lambda: defaults.read_grub_file(text, "g"),
        lambda: defaults.remove_items(text, filename="g"),
    ):
        with pytest.raises(EmupmemError, match=message) as caught:
            act()
        assert caught.value.hint


@pytest.mark.parametrize(
    ("variable", "items", "extra", "message"),
    [
        ("GRUB_TIMEOUT", ITEM, (), "not a variable of kernel arguments"),
        (LINUX, ("4G",), (), "not an item of memmap="),
        (LINUX, ("4G!0",), (), "not an item"),
        (LINUX, ("4G!012G",), (), "not an item"),
        (LINUX, ('4G!4G";reboot',), (), "not an item"),
        (LINUX, (), ("a b",), "not a word"),
        (LINUX, (), ("a$b",), "not a word"),
        (LINUX, (), ("memmap=1G!4G",), "not a word"),
    ],
)
def test_wishes_are_checked(
    variable: str, items: tuple[str, ...], extra: tuple[str, ...], message: str
) -> None:
    with pytest.raises(EmupmemError, match=message):
        defaults.set_items("", variable, items, extra)


# --- the proof ---------------------------------------------------------------------------------------

BASE = b'A=1\nGRUB_CMDLINE_LINUX="quiet"\nGRUB_CMDLINE_LINUX_DEFAULT="splash"\n'


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (BASE, "no memmap= of ours instead of memmap=16G!4G"),
        (BASE.replace(b"quiet", b"quiet memmap=16G!8G"), "memmap=16G!8G instead of memmap=16G!4G"),
        (BASE.replace(b"quiet", b"memmap=16G!4G"), "the other words changed"),
        (BASE.replace(b"quiet", b"quiet loud memmap=16G!4G"), "the other words changed: quiet loud"),
        (
            BASE.replace(b"quiet", b"quiet memmap=16G!4G").replace(b"splash", b""),
            "DEFAULT with the other words",
        ),
        (
            BASE.replace(b"quiet", b"quiet memmap=16G!4G").replace(b"splash", b"memmap=1G!4G"),
            "instead of none",
        ),
        (BASE.replace(b"quiet", b"quiet memmap=16G!4G").replace(b"A=1", b"A=2"), "augeas sees more changed"),
        (BASE.replace(b"quiet", b"quiet memmap=16G!4G") + b"B=2\n", "augeas sees more changed"),
        (BASE.replace(b"quiet", b"quiet memmap=16G!4G") + b"B+=2\n", "augeas could not read the edited file"),
        (
            BASE.replace(b"quiet", b"quiet memmap=16G!4G") + b"exit\n",
            "augeas sees more|sh could not read the",
        ),
        (BASE.replace(b"quiet", b"quiet memmap=\\!4G memmap=16G!4G"), "the other words changed"),
    ],
)
def test_a_wrong_edit_is_not_proven(after: bytes, message: str) -> None:
    with pytest.raises(EmupmemError, match=message):
        defaults.prove(BASE, after, LINUX, ITEM, filename="g")


def test_sh_alone_finds_a_changed_variable() -> None:
    odd = b"B=$(echo $(echo x))\n" + BASE  # the lens gives up: no tree to compare
    good = odd.replace(b"quiet", b"quiet memmap=16G!4G")
    assert not defaults.prove(odd, good, LINUX, ITEM).by_lens
    with pytest.raises(EmupmemError, match="g: the edit would change B as well"):
        defaults.prove(odd, good.replace(b"echo x", b"echo y"), LINUX, ITEM, filename="g")
    with pytest.raises(EmupmemError, match="read GRUB_CMDLINE_LINUX_DEFAULT with no value any more"):
        defaults.prove(odd, good + b"unset GRUB_CMDLINE_LINUX_DEFAULT\n", LINUX, ITEM)
    with pytest.raises(EmupmemError, match="g: the edit would change C as well"):
        defaults.prove(odd, good + b"C='a\nb'\n", LINUX, ITEM, filename="g")


def test_what_changes_by_itself_is_not_blamed_on_us() -> None:
    text = fixture("changes-by-itself")
    changed = defaults.set_items(text, LINUX, ITEM)
    defaults.prove(text, changed, LINUX, ITEM)
    with pytest.raises(EmupmemError, match="the other words changed: loud"):
        defaults.prove(text, changed.replace(b"quiet", b"loud"), LINUX, ITEM)


def test_a_variable_made_from_ours_is_told() -> None:
    text = fixture("follows-the-other")
    proof = defaults.prove(text, defaults.set_items(text, LINUX, ITEM), LINUX, ITEM)
    assert proof.carried == ("GRUB_CMDLINE_LINUX_RECOVERY",)
    assert proof.by_lens
    assert defaults.prove(text, defaults.set_items(text, DEFAULT, ITEM), DEFAULT, ITEM).carried == ()


def test_a_text_that_reads_the_variable_by_itself_cannot_fool_the_proof() -> None:
    text = 'GRUB_CMDLINE_LINUX="a"\neval "GRUB_CMDLINE_LINUX=b"\n'
    changed = defaults.set_items(text, LINUX, ITEM)
    assert by_sh(changed.encode())[LINUX] == f"b {WORD}"


# --- undo --------------------------------------------------------------------------------------------


def test_undo_keeps_what_somebody_else_changed_meanwhile() -> None:
    before = fixture("debian-stock").decode()
    after = defaults.set_items(before, LINUX, ITEM)
    now = after.replace("GRUB_TIMEOUT=5", "GRUB_TIMEOUT=9") + "NEW=1\n"
    assert defaults.undo(now, before, after) == before.replace("GRUB_TIMEOUT=5", "GRUB_TIMEOUT=9") + "NEW=1\n"


def test_undo_of_a_changed_line_removes_our_items() -> None:
    before = "GRUB_CMDLINE_LINUX=quiet\nA=1\n"
    after = defaults.set_items(before, LINUX, ITEM)
    assert defaults.undo(after.replace("quiet", "loud"), before, after) == 'GRUB_CMDLINE_LINUX="loud"\nA=1\n'
    twice = after + after
    assert quoting.items_of(by_sh(defaults.undo(twice, before, after).encode())[LINUX] or "") == ()


def test_undo_of_an_appended_line() -> None:
    before = "A=1"
    after = defaults.set_items(before, LINUX, ITEM)
    assert defaults.undo(after, before, after) == before
    assert defaults.undo("B=2\n" + after, before, after) == "B=2\nA=1"
    assert defaults.undo(after + "\n", before, after) == "A=1\n"
    assert defaults.undo(after + "\nB=2\n", before, after) == "A=1\nB=2\n"


def test_undo_of_a_removal_puts_the_old_lines_back() -> None:
    before = fixture("ours-own-line").decode() + "Z=1\n"
    after = defaults.remove_items(before)
    assert after == "GRUB_TIMEOUT=1\nZ=1\n"
    assert defaults.undo(after, before, after) == before
    assert defaults.undo(after + "Y=1\n", before, after) == before + "Y=1\n"


def test_undo_takes_no_line_of_somebody_else_where_one_of_two_equal_lines_is_gone() -> None:
    before = "A=1\nB=2\n"
    after = "ours\nA=1\nours\nB=2\n"
    assert edits.undo_lines(after + "C=3\n", before, after) is None  # not clear which is which
    assert edits.undo_lines("ours\nC=3\n", before, after) is None


def test_undo_needs_neither_sh_nor_augeas_when_the_lines_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fixture("debian-stock")
    after = defaults.set_items(before, LINUX, ITEM)
    monkeypatch.setattr(editor_shell, "run_sh", None)
    monkeypatch.setattr(lens, "_augeas", None)
    assert defaults.undo(b"# new\n" + after, before, after) == b"# new\n" + before


def test_undo_keeps_odd_line_ends() -> None:
    before = b'# a\rb\x0cc\x85\nGRUB_CMDLINE_LINUX="q"\n'
    after = defaults.set_items(before, LINUX, ITEM)
    assert defaults.undo(b"#\n" + after, before, after) == b"#\n" + before


# --- drop-ins ----------------------------------------------------------------------------------------


def said(found: defaults.Effective) -> tuple[str | None, str, int, tuple[str, ...]]:
    return found.value, found.filename, found.line, found.items


def test_effective_names_the_file_that_has_the_last_word() -> None:
    texts = [
        ("/etc/default/grub", defaults.set_items(fixture("debian-stock"), DEFAULT, ITEM)),
        ("/etc/default/grub.d/50-cloudimg-settings.cfg", fixture("ubuntu-cloud-drop-in")),
        ("/etc/default/grub.d/99-none.cfg", b"# nothing\n"),
    ]
    found = defaults.effective(texts)
    last = ("console=tty1 console=ttyS0", "/etc/default/grub.d/50-cloudimg-settings.cfg", 8, ())
    assert said(found[DEFAULT]) == last
    assert said(found[LINUX]) == ("", "/etc/default/grub", 10, ())


def test_effective_follows_extensions_and_equal_values() -> None:
    texts: list[tuple[str, bytes | str]] = [
        ("a", 'GRUB_CMDLINE_LINUX="x memmap=1G!4G"\nGRUB_CMDLINE_LINUX_DEFAULT="same"\n'),
        ("b", 'B=1\nGRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX y"\n'),
        ("c", b'GRUB_CMDLINE_LINUX_DEFAULT="same"\n'),
        ("d", b'C+=1\ncase x in\n *) GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX z" ;;\nesac\n'),
    ]
    found = defaults.effective(texts)
    assert said(found[LINUX]) == ("x memmap=1G!4G y z", "d", 3, ("1G!4G",))
    assert (found[DEFAULT].filename, found[DEFAULT].line) == ("c", 1)
    assert defaults.effective([("a", "A=1\n")])[LINUX] == defaults.Effective(None, "", ())
    assert defaults.effective([]) == dict.fromkeys(VARIABLES, defaults.Effective(None, "", ()))


def test_effective_names_the_broken_file() -> None:
    with pytest.raises(EmupmemError, match=r"^b:\d: sh cannot read this file: .*(?i:syntax|EOF)"):
        defaults.effective([("a", "A=1\n"), ("b", 'B="\n'), ("c", "C=1\n")])
    with pytest.raises(EmupmemError, match=r"^b: sh cannot read this file: sh stops"):
        defaults.effective([("a", "A=1\n"), ("b", "exit 1\n"), ("c", "C=1\n")])


# --- the sandbox -------------------------------------------------------------------------------------


def test_the_sandbox_has_no_input_no_rights_and_an_empty_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "1")
    open_to_all = Path(tempfile.mkdtemp(dir="/tmp"))
    open_to_all.chmod(0o777)
    target = open_to_all / "written"
    text = f'echo harm > {target}\nread LINE\nWHO=$(id -u)\nGROUPS_=$(id -G)\nHERE=$PWD\nGRUB_CMDLINE_LINUX="$SECRET"\n'
    result = here([text.encode()])
    assert not result.failed
    assert result.values[-1][LINUX] == ""
    assert not target.exists() or target.stat().st_size == 0
    assert result.rest["HERE"].strip("'") == "/"
    assert result.rest["LINE"].strip("'") == ""
    if os.geteuid() == 0:
        assert result.rest["WHO"].strip("'") == "65534"
        assert result.rest["GROUPS_"].strip("'") == "65534"


def test_a_text_cannot_change_itself_or_leave_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    result = here([b"for f in /proc/self/fd/*; do : 2>/dev/null >$f; done\nB=2\n"])
    assert result.failed or result.rest["B"].strip("'") == "2"
    monkeypatch.setattr(editor_shell, "SH_SECONDS", 0.5)
    with tempfile.NamedTemporaryFile() as marker:
        Path(marker.name).chmod(0o666)
        with pytest.raises(
            EmupmemError, match=r"did not finish reading the GRUB settings within 0\.5 seconds"
        ) as caught:
            here([f"( sleep 97.{os.getpid()}; : > {marker.name} ) & sleep 97.{os.getpid()}\n".encode()])
    assert caught.value.hint
    # of this test alone, and those that were killed may need a moment to go
    there = ["ps", "ax", "-o", "args"]
    while (
        f"sleep 97.{os.getpid()}".encode() in subprocess.run(there, capture_output=True, check=False).stdout
    ):
        time.sleep(0.1)


def test_values_of_any_shape_come_through_set() -> None:
    text = b"A='x\ny=1\n'\nB=\"it's\"\nC=\"a\\\"b\"\nE='a\tb'\nGRUB_CMDLINE_LINUX='q\nA=2'\n"
    result = editor_shell.run_sh([text])
    assert result.values[-1][LINUX] == "q\nA=2"
    assert {"A", "B", "C", "E"} <= set(result.rest)
    assert not {"y", LINUX} & set(result.rest)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "busybox", "dash"])
def test_other_shells_are_as_good_a_judge(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sh is bash on Fedora, Arch and SUSE, busybox on Alpine."""
    program = next((p for p in (Path("/bin", shell), Path("/usr/bin", shell)) if p.exists()), None)
    if program is None:
        pytest.skip(f"no {shell} here")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        # busybox goes by the name it is called with
        Path(folder, "sh").symlink_to(program.resolve())
        monkeypatch.setattr(editor_shell, "SH", f"{folder}/sh")
        for name in EDITABLE:
            text = fixture(name)
            assert defaults.remove_items(defaults.set_items(text, LINUX, ITEM)) is not None, name
            defaults.read_grub_file(text)
        for name in ("open-quote", "merge-conflict", "exits", "readonly"):
            with pytest.raises(EmupmemError, match=REFUSED[name]):
                defaults.set_items(fixture(name), LINUX, ITEM, filename=name)


def test_a_machine_without_sh_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor_shell, "SH", "/nowhere/sh")
    with pytest.raises(EmupmemError, match="cannot run sh to check the GRUB settings") as caught:
        defaults.read_grub_file("A=1\n")
    assert "/bin/sh" in caught.value.hint


def test_an_injected_judge_is_asked_instead_of_sh() -> None:
    asked: list[bytes] = []

    def judge(texts: Any) -> editor_shell.Sourced:
        asked.extend(texts)
        return editor_shell.Sourced(tuple({LINUX: "x", DEFAULT: None} for _ in texts), {"A": "1"})

    assert defaults.read_grub_file("A=1\n", sh=judge).linux.value == "x"
    assert asked == [b"A=1\n"]


# --- augeas ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_augeas() -> Iterator[None]:
    lens._augeas.cache_clear()
    lens.layout_of.cache_clear()
    yield
    lens._augeas.cache_clear()
    lens.layout_of.cache_clear()


class Unusable:
    def __getattr__(self, name: str) -> Any:
        raise OSError("libaugeas.so.0: cannot open shared object file")


@pytest.mark.usefixtures("fresh_augeas")
@pytest.mark.parametrize("kind", ["absent", "no library", "not augeas"])
def test_a_missing_augeas_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"absent": None, "no library": Unusable(), "not augeas": SimpleNamespace()}
    monkeypatch.setitem(sys.modules, "augeas", modules[kind])
    with pytest.raises(EmupmemError, match="cannot use augeas") as caught:
        defaults.set_items("A=1\n", LINUX, ITEM)
    assert "libaugeas" in caught.value.hint


@pytest.mark.usefixtures("fresh_augeas")
def test_a_missing_lens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import augeas  # type: ignore[import-untyped,unused-ignore]

    def bare(flags: int) -> Any:
        return augeas.Augeas(flags=flags | augeas.Augeas.NO_STDINC, loadpath="/nowhere")

    monkeypatch.setitem(sys.modules, "augeas", SimpleNamespace(Augeas=bare))
    with pytest.raises(EmupmemError, match="no Shellvars lens") as caught:
        defaults.set_items("A=1\n", LINUX, ITEM)
    assert "augeas-lenses" in caught.value.hint


@pytest.mark.usefixtures("fresh_augeas")
def test_what_is_there_already_needs_no_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lens takes a third of a run that changes nothing; an overridden line that holds ours is still cleared."""
    text = f'GRUB_CMDLINE_LINUX="quiet memmap={ITEM[0]}"\n'
    overridden = f'GRUB_CMDLINE_LINUX="memmap={ITEM[0]}"\n{text}'
    assert defaults.set_items(overridden, LINUX, ITEM) == f'GRUB_CMDLINE_LINUX=""\n{text}'
    monkeypatch.setitem(sys.modules, "augeas", None)
    lens._augeas.cache_clear()
    lens.layout_of.cache_clear()
    assert defaults.set_items(text, LINUX, ITEM) is text
    assert defaults.set_items(text, LINUX, ITEM, ["quiet"], ["nokaslr"]) is text
    for items, extra, drop in (
        (ITEM, ["nokaslr"], []),
        (ITEM, [], ["quiet"]),
        ((), [], []),
        (["2G!4G"], [], []),
    ):
        with pytest.raises(EmupmemError, match="cannot use augeas"):
            defaults.set_items(text, LINUX, items, extra, drop)
    with pytest.raises(EmupmemError, match="cannot use augeas"):
        defaults.set_items(text, DEFAULT, ITEM)


def test_augeas_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, emupmem.editor.defaults; sys.exit('augeas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- texts that would take hours ---------------------------------------------------------------------


def test_a_file_of_very_many_words_is_refused() -> None:
    """Augeas takes the square of their number: 60,000 lines would be hours, before anything is shown."""
    lines = (
        "x=\n" * 60_000,
        "export " + "a " * 60_000,
        "linux a b\n" * 20_000,
        "x=1;" * 5000,
        "# a\n" * 5000,
    )
    for text in lines:
        with pytest.raises(EmupmemError, match="more than 4000 words"):
            defaults.set_items(text, LINUX, ["1G!4G"])
        with pytest.raises(EmupmemError, match="more than 4000 words"):
            defaults.effective([("a", text)])


@pytest.mark.parametrize(
    "text",
    [
        "ram|" * 250,
        "a&&" * 150 + "b\n",
        "if a; then\n" * 201 + "b\n" + "fi\n" * 201,
        "case a in\nb)\n" * 201 + "c\n" + ";;\nesac\n" * 201,
        "for i in a; do\n" * 101 + "b\n" + "done\n" * 101,
        "f() {\n" * 201 + "b\n" + "}\n" * 201,
    ],
    ids=lambda text: text[:7].strip(),
)
def test_a_file_of_very_many_joints_is_refused(text: str) -> None:
    """Augeas takes the cube of their number: 4 KiB of `ram|` are a minute, 64 KiB days."""
    with pytest.raises(
        EmupmemError, match=r"more than 200 of \| & \{ then do in, which no settings of GRUB have"
    ):
        defaults.read_grub_file(text)


@pytest.mark.parametrize(
    ("text", "lasting"),
    [
        ('GRUB_X="$GRUB_Y ${SUSE_Z}" # $RANDOM\n', True),
        ("GRUB_DISTRIBUTOR=`lsb_release -i -s 2> /dev/null || echo Debian`\n", True),
        ('GRUB_X="$RANDOM"\n', False),
        ('GRUB_X="${PPID}"\n', False),
        ("GRUB_DISTRIBUTOR=`date +%N`\n", False),
        (f"""GRUB_DISTRIBUTOR="$(echo ' )"\nGRUB_A='x)"; {LINUX}=$(date +%N); : '\n# '\n""", False),
        (f"""GRUB_DISTRIBUTOR="$(case x in a )"\nGRUB_A=x # ";; esac)"; {LINUX}=$(date)\n""", False),
    ],
)
def test_what_sh_can_say_another_time_otherwise_is_asked_again(text: str, lasting: bool) -> None:
    assert editor_shell.is_lasting([text.encode()]) is lasting


@pytest.mark.parametrize("name", ["debian-13", "debian-stock", "fedora", "ubuntu-desktop"])
def test_stock_files_are_asked_once(name: str) -> None:
    assert editor_shell.is_lasting([fixture(name)])


@pytest.mark.slow
def test_a_long_comment_or_value_is_none_of_that() -> None:
    text = "# word word\n" * 3000 + "\n" * 5000 + f'GRUB_CMDLINE_LINUX="{"a" * 200_000}"\n'
    changed = defaults.set_items(text, LINUX, ["1G!4G"])
    assert changed == text.replace('"\n', ' memmap=1G!4G"\n')
    assert defaults.undo(changed, text, changed) == text


@pytest.mark.parametrize("opening", ["$(", "${A", "$(echo ", '"$(', "$((", "`"])
def test_expansions_in_expansions_are_refused_and_no_crash(opening: str) -> None:
    text = f'GRUB_CMDLINE_LINUX="{opening * 2000}x{")" * 2000}"\n'
    with contextlib.suppress(EmupmemError):
        changed = defaults.set_items(text, LINUX, ["1G!4G"])
        assert by_sh(changed.encode())[LINUX] != by_sh(text.encode())[LINUX]
    with pytest.raises(quoting.OddValueError):
        quoting.chars_of(opening * 2000 + "'")


def test_undo_in_a_file_of_equal_lines_does_not_take_the_square_of_them() -> None:
    before = "a=1\n" + "\n" * 60_000 + "b=1\n"
    after = before.replace("=1", "=2")

    def undone() -> None:
        assert edits.undo_lines(after + "# new\n", before, after) == before + "# new\n"

    work.within(100, undone)  # the square of them is more than a thousand


def test_a_block_of_equal_lines_that_fits_at_two_places_is_not_put_back() -> None:
    before, after = "a\n" * 3 + "b\n", "a\n" * 5 + "b\n"
    assert edits.undo_lines(after + "# new\n", before, after) is None
    assert edits.undo_lines("x\n" + "y", "x\n", "x\ny") is not None
    assert edits.undo_lines("y\n" + "x\n", "x\n", "x\ny") is None, "only its last line has no end"


# --- random texts ------------------------------------------------------------------------------------

PLAIN_WORDS = st.sampled_from(
    [
        "quiet",
        "splash",
        "a=1",
        "root=UUID=12-34",
        "console=ttyS0,115200n8",
        "memmap=2G@1M",
        "memmap=8G",
        "mem=4G",
    ]
)
QUOTED_WORDS = st.one_of(
    PLAIN_WORDS,
    st.sampled_from(
        [
            r"acpi_osi=\"!Windows 2012\"",
            "acpi_osi='!W 2015'",
            r"memmap=64K\\\$0x1869",
            r"memmap=4G\\!12G",
            "$GRUB_CMDLINE_LINUX",
            "${EMPTY:-some thing}",
            "$(echo x  y)",
            "`echo z`",
            "\\\n  more",
            "Käse",
            "$",
            "\\n",
        ]
    ),
)
BLANK = st.sampled_from([" ", " ", " ", "  ", "\t"])


@st.composite
def spaced(draw: st.DrawFn, words: st.SearchStrategy[str]) -> str:
    out = draw(st.sampled_from(["", "", " "]))
    for word in draw(st.lists(words, max_size=4)):
        out += word + draw(BLANK)
    return out if draw(st.booleans()) else out.rstrip()


SINGLE = st.builds("'{}'".format, spaced(PLAIN_WORDS | st.sampled_from(["memmap=1M$4G", 'a="b c"', "\\x"])))
DOUBLE = st.builds('"{}"'.format, spaced(QUOTED_WORDS))
VALUES = st.one_of(DOUBLE, DOUBLE, SINGLE, st.builds("{}{}".format, DOUBLE, SINGLE), PLAIN_WORDS, st.just(""))
OURS = st.builds(
    "{}={}{}".format,
    st.builds("{}{}".format, st.sampled_from(["", "export "]), st.sampled_from(VARIABLES)),
    VALUES,
    st.sampled_from(["", "", "  ", " # memmap=9G!9G"]),
)
OTHERS = st.sampled_from(
    [
        "",
        "",
        "#",
        "# memmap=3G!3G in a comment",
        '#GRUB_CMDLINE_LINUX="off"',
        "GRUB_TIMEOUT=5",
        'GRUB_DISTRIBUTOR=`echo Debian || echo "x"`',
        "GRUB_TERMINAL='serial console'",
        'if [ -n "$X" ]; then\n  Y=1\nfi',
        'GRUB_MORE="two\nlines"',
        "[ -d / ] && Z=1",
        "W+=x",
        'V="a"#b',
        "GRUB_THEME = none",
    ]
)
TEXTS = st.builds(
    lambda lines, end: "\n".join(lines) + (end if lines else ""),
    st.lists(st.one_of(OTHERS, OTHERS, OURS), max_size=8),
    st.sampled_from(["\n", "\n", "", "\n\n"]),
).map(str.encode)
ITEMS = st.lists(
    st.sampled_from(["16G!4G", "1G!4G", "512M!20G", "2T!1T"]), min_size=1, max_size=3, unique=True
).map(tuple)
MANY = examples(40)


def values_are_quoted(text: bytes, variable: str) -> bool:
    """Whether the text alone tells the former bytes; else the kept backup does (undo)."""
    pattern = rf"^(?:export )?{variable}=([^\n]*)".encode()
    found = re.findall(pattern, text, re.M)
    return all(value[:1] in (b'"', b"'") for value in found)


@MANY
@given(TEXTS, st.sampled_from(VARIABLES), ITEMS)
def test_random_texts_come_back_byte_by_byte(text: bytes, variable: str, items: tuple[str, ...]) -> None:
    changed = defaults.set_items(text, variable, items)
    assert defaults.undo(changed, text, changed) == text
    assert defaults.set_items(changed, variable, items) is changed
    back = defaults.remove_items(changed)
    assert by_sh(back) == by_sh(text)
    if values_are_quoted(text, variable):
        assert back == text


@MANY
@given(TEXTS, st.sampled_from(VARIABLES), ITEMS, ITEMS)
def test_random_texts_keep_foreign_words_in_order(
    text: bytes, variable: str, items: tuple[str, ...], others: tuple[str, ...]
) -> None:
    changed = defaults.set_items(text, variable, items)
    before, after = by_sh(text), by_sh(changed)
    assert quoting.items_of(after[variable] or "") == items
    assert all(foreign(after[v]) == foreign(before[v]) for v in VARIABLES)
    assert defaults.set_items(changed, variable, others) == defaults.set_items(text, variable, others)
    moved = defaults.set_items(changed, next(v for v in VARIABLES if v != variable), items)
    assert all(foreign(by_sh(moved)[v]) == foreign(before[v]) for v in VARIABLES)


@MANY
@given(TEXTS, st.sampled_from(VARIABLES), ITEMS, st.integers(min_value=0, max_value=9))
def test_random_undo_keeps_a_line_of_somebody_else(
    text: bytes, variable: str, items: tuple[str, ...], place: int
) -> None:
    changed = defaults.set_items(text, variable, items)
    lines = changed.splitlines(keepends=True)
    now = b"".join([b"# somebody else\n", *lines])
    assume(now != changed)
    assert defaults.undo(now, text, changed) == b"# somebody else\n" + text


@examples(300)
@given(st.text(alphabet="\"'\\ab =\t,memap1G!4$`(){}", max_size=30))
def test_the_word_splitter_keeps_every_character(value: str) -> None:
    words = quoting.words_of(value)
    assert "".join(words).replace(" ", "").replace("\t", "") == value.replace(" ", "").replace("\t", "")
    assert all(words)


# --- real files --------------------------------------------------------------------------------------

CORPUS = os.environ.get("EMUPMEM_CORPUS", "")
JUSTIFIED = re.compile(r"sh cannot read this file|carriage return|byte order mark|NUL byte")


def real_files() -> dict[str, Any]:
    if not CORPUS:
        return {}
    with Path(CORPUS, "grub", "expected.json").open() as file:
        found: dict[str, Any] = json.load(file)
    return found


@pytest.mark.skipif(not CORPUS, reason="EMUPMEM_CORPUS is not set")
def test_real_files() -> None:
    refused = {}
    for name, expected in real_files().items():
        text = Path(CORPUS, "grub", name).read_bytes()
        try:
            check_real_file(name, text, expected["sh"])
        except EmupmemError as exc:
            refused[name] = exc
    print(f"\n{len(refused)} refused:", *(f"\n  {exc.message}" for exc in refused.values()))
    assert all(JUSTIFIED.search(exc.message) and exc.hint for exc in refused.values())
    assert len(refused) <= 7


def check_real_file(name: str, text: bytes, expected: dict[str, Any]) -> None:
    file = defaults.read_grub_file(text, name)
    first = editor_shell.run_sh([text])
    if expected["clean"]:
        assert {v: file.variable(v).value for v in VARIABLES} == {v: expected[v] for v in VARIABLES}, name
    for variable in VARIABLES:
        changed = defaults.set_items(text, variable, ITEM, filename=name)
        second = editor_shell.run_sh([changed])
        old, new = first.values[-1][variable], second.values[-1][variable]
        if not file.linux.items:
            assert new is not None
            assert new.lstrip() == (f"{old} {WORD}" if old else WORD).lstrip(), name
        assert foreign(new) == foreign(old), name
        assert first.rest == second.rest, name
        assert defaults.undo(changed, text, changed) == text, name
        assert defaults.set_items(changed, variable, ITEM) is changed, name
