# SPDX-License-Identifier: Apache-2.0
"""Entries and plain command lines as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emupmem.boot.bls import text as bls_text
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError

WORDS = st.sampled_from(
    [
        "quiet",
        "root=UUID=0",
        'x="a b"',
        '"y=a  b"',
        "memmap=1G!4G",
        "memmap=64K#0x1000,2G!8G",
        "memmap=1G!4G,1G!5G,32M$0x1",
        "nokaslr",
        "--x",
        "=",
        "memmap=",
        "ä",
    ]
)
BLANKS = st.sampled_from([" ", "  ", "\t"])
LINES = st.lists(st.tuples(WORDS, BLANKS)).map(lambda pairs: "".join(w + b for w, b in pairs))
ITEMS = st.sampled_from([(), ("1G!4G",), ("2G!4G", "1G!8G")])


@settings(deadline=None)
@given(LINES, ITEMS, st.booleans())
def test_ours_become_exactly_these_and_all_else_stays(
    line: str, items: tuple[str, ...], nokaslr: bool
) -> None:
    extra = ("nokaslr",) if nokaslr else ()
    changed = bls_text.reworked(line, items, extra)
    bls_text.prove_words(line, changed, items, extra)
    assert bls_text.reworked(changed, items, extra) == changed
    gone = bls_text.reworked(changed, ())
    assert not parse_command_line(gone).reservations


@settings(deadline=None)
@given(LINES.filter(lambda line: "!" not in line), ITEMS)
def test_taking_away_gives_the_former_bytes(line: str, items: tuple[str, ...]) -> None:
    assert bls_text.reworked(bls_text.reworked(line, items), ()) == line


@settings(deadline=None)
@given(st.lists(LINES, max_size=4), ITEMS, st.sampled_from(["\n", "\r\n"]))
def test_entries_keep_every_other_line(lines: list[str], items: tuple[str, ...], end: str) -> None:
    text = end.join(["# a comment", "title x y", *(f"options \t{x}" for x in lines), "linux /v", ""])
    changed = bls_text.rework_entry(text, items)
    bls_text.prove_words(bls_text.options(text), bls_text.options(changed), items)
    assert bls_text.value(changed, "linux") == "/v"
    kept = [x for x in changed.split(end) if not x.startswith("options")]
    assert kept == ["# a comment", "title x y", "linux /v", ""]


def test_an_entry_without_options_gets_some() -> None:
    assert (
        bls_text.rework_entry("title x\nlinux /v\n", ["1G!4G"]) == "title x\nlinux /v\noptions memmap=1G!4G\n"
    )
    assert bls_text.rework_entry("linux /v", ["1G!4G"]) == "linux /v\noptions memmap=1G!4G"


@pytest.mark.parametrize(
    "text", ["linux /v\n", "linux /v", "options \r\nlinux /v\r\n", "linux /v\r\n", "options a\n"]
)
def test_an_entry_gets_its_former_bytes_back(text: str) -> None:
    changed = bls_text.rework_entry(text, ["1G!4G"], ["nokaslr"])
    assert bls_text.rework_entry(changed, (), (), ["nokaslr"]) == text


@pytest.mark.parametrize("end", ["", " ", "\r", "\t\r"])
def test_quotes_around_a_whole_value_are_the_loaders(end: str) -> None:
    """systemd-boot takes them off: what is added stands between them."""
    text = f'linux "/v"\noptions   "root=UUID=0 ro quiet"{end}\n'
    assert bls_text.options(text) == "root=UUID=0 ro quiet"
    assert bls_text.value(text, "linux") == "/v"
    changed = bls_text.rework_entry(text, ["1G!4G"], ["nokaslr"])
    assert f'options   "root=UUID=0 ro quiet memmap=1G!4G nokaslr"{end}\n' in changed
    bls_text.prove_words(bls_text.options(text), bls_text.options(changed), ["1G!4G"], ["nokaslr"])
    assert bls_text.rework_entry(changed, (), (), ["nokaslr"]) == text


def test_quotes_that_are_words_of_their_own_stay() -> None:
    text = 'options root=UUID=0 dyndbg="file a +p"\n'
    assert bls_text.options(text) == bls_text.grub_options(text) == 'root=UUID=0 dyndbg="file a +p"'
    assert bls_text.rework_entry(text, ["1G!4G"]) == f"{text[:-1]} memmap=1G!4G\n"
    assert bls_text.grub_options('options "a b"\n') == '"a b"'
    odd = 'options "a b" c="d" memmap=1G!4G\n'  # without ours the loader would take quotes off
    with pytest.raises(EmupmemError, match="without changing other words"):
        bls_text.prove_words(bls_text.options(odd), bls_text.options(bls_text.rework_entry(odd, ())), ())


@pytest.mark.parametrize("text", ["", "\n", "# a\n", "# a", "# a\n\n# b\n", "quiet\n", "\r\n", "quiet\n\n"])
def test_a_file_gets_its_former_bytes_back(text: str) -> None:
    changed = bls_text.rework_file(text, ["1G!4G"], ["nokaslr"])
    assert bls_text.rework_file(changed, (), (), ["nokaslr"]) == text
    assert bls_text.rework_file("nokaslr", ["1G!4G"], (), ["nokaslr"]).strip() == "memmap=1G!4G"


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ("quiet memmap=1G!4G", ""),
        ("memmap=1G!4G", "other words"),
        ("quiet memmap=1GB!4G", "it has no reservation"),
        ("quiet memmap=1G!4G,1G!4G", "it has 1G!4G,1G!4G instead of 1G!4G"),
        ("quiet memmap=1G!4G " + "x" * 2047, "2047 bytes"),
    ],
)
def test_the_kernels_reading_is_the_proof(after: str, why: str) -> None:
    if not why:
        bls_text.prove_words("quiet", after, ["1G!4G"])
        return
    with pytest.raises(EmupmemError, match=why):
        bls_text.prove_words("quiet", after, ["1G!4G"])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("$kernelopts $tuned_params", "root=UUID=1 ro "),
        ("${kernelopts}x", "root=UUID=1 rox"),
        ("a memmap=64K$0x1", "a memmap=64Kx1"),
        ("a memmap=64K\\$kernelopts", "a memmap=64K$kernelopts"),
        ("a 'b c'", 'a "b c"'),
    ],
)
def test_what_grub_makes_of_options(options: str, line: str) -> None:
    assert bls_text.grub_line(options, {"kernelopts": "root=UUID=1 ro"}).strip() == line.strip()


@settings(deadline=None)
@given(st.text(alphabet='ab #\n\t=!"memap1G4,', max_size=60), ITEMS)
def test_files_of_words_keep_their_comments(text: str, items: tuple[str, ...]) -> None:
    try:
        changed = bls_text.rework_file(text, items)
        bls_text.prove_words(bls_text.file_line(text), bls_text.file_line(changed), items)
    except EmupmemError:
        return  # quotes that span lines: then nothing is written
    comments = [x for x in text.split("\n") if x.lstrip().startswith("#")]
    assert [x for x in changed.split("\n") if x.lstrip().startswith("#")] == comments


def test_a_quote_over_several_lines_is_refused() -> None:
    """What is added behind it would not be found again: added twice, never taken away."""
    text = 'root=/dev/sda1\na="b\nquiet\nc="d\n'
    with pytest.raises(
        EmupmemError, match=r'a quote is open at the end of line 2 of the kernel\'s words: a="b'
    ) as said:
        bls_text.rework_file(text, ("1G!4G",))
    assert said.value.hint.startswith("write it on one line, and close it; ")
    assert bls_text.rework_file('# it\'s "\na="b c"\n', ("1G!4G",)) == '# it\'s "\na="b c" memmap=1G!4G\n'
