# SPDX-License-Identifier: Apache-2.0
"""The boot unit's text: escaped by systemd's rules, read back without loss, changed by what is asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.device import unit
from emupmem.device.unit import BootMount, UnitChange, changed, quote, read_program, read_unit, unit_text
from emupmem.model import GIB, MIB, EmupmemError
from tests import examples

PROGRAM = "/usr/local/bin/emupmem"
PLAIN = BootMount(4 * GIB, GIB, "/mnt/pmem0", "ext4", "dev", "0755")

words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
tricky = st.text(st.sampled_from("\\\"'%$ ;#{}abn@-é"), min_size=1, max_size=20)
names = (words | tricky).map(lambda w: "/" + w)
mounts = st.builds(
    BootMount,
    st.integers(1, 1 << 30).map(lambda n: n * 2 * MIB),
    st.integers(1, 1 << 20).map(lambda n: n * 2 * MIB),
    names,
    st.sampled_from(["ext4", "xfs"]),
    words.filter(lambda w: w != "-"),
    st.sampled_from(["", "0755", "770"]),
    st.just("") | names.filter(lambda n: n != "-"),
)


def systemd_unquotes(argument: str) -> str:
    """What systemd.syntax, systemd.unit and systemd.service say of a quoted argument, step by step."""
    assert argument[0] == argument[-1] == '"'
    out, inner = "", iter(argument[1:-1])
    for c in inner:
        assert c != '"', "an inner quote is escaped"
        out += next(inner) if c == "\\" else c
    for sign in "%$":
        done, rest = "", iter(out)
        for c in rest:
            if c == sign:
                assert next(rest) == sign, f"a single {sign} means something else to systemd"
            done += c
        out = done
    return out


@given(words | tricky)
def test_quoting_is_undone_by_systemd_s_rules(word: str) -> None:
    assert systemd_unquotes(quote(word)) == word


@given(st.lists(mounts, min_size=1, max_size=4))
def test_what_was_written_is_read_back(wanted: list[BootMount]) -> None:
    made = unit_text(wanted, PROGRAM)
    assert read_unit(made) == tuple(wanted)
    assert read_program(made) == PROGRAM
    assert [line for line in made.split("\n") if line.startswith("[")] == ["[Unit]", "[Service]", "[Install]"]
    assert made.count("\nExecStart=") == 1


@pytest.mark.parametrize("word", ["a\nb", "a\rb", "a\0b", "\x1b[1m", "\x7f", "\x85", "\udcff"])
def test_control_characters_are_refused(word: str) -> None:
    with pytest.raises(EmupmemError, match="no unit file can hold"):
        quote(word)


@pytest.mark.parametrize("program", ["emupmem", "/opt/my tools/emupmem", "/opt/$x/emupmem", "/a\nb", "/a%b"])
def test_programs_that_systemd_would_read_otherwise_are_refused(program: str) -> None:
    with pytest.raises(EmupmemError, match="cannot be started by systemd"):
        unit_text([PLAIN], program)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@examples(5)
@given(mounts)
def test_systemd_itself_reads_the_unit_without_a_word(mount: BootMount) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "emupmem.service"
        file.write_text(unit_text([mount], "/usr/bin/true"), "utf-8")
        argv = ["systemd-analyze", "verify", "--man=no", str(file)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    about = [line for line in done.stderr.splitlines() if "emupmem.service" in line]
    assert about == []


def test_the_unit_can_neither_stop_nor_be_forgotten() -> None:
    made = unit_text([PLAIN], PROGRAM)
    for line in (
        "Type=oneshot",
        "RemainAfterExit=yes",
        "ConditionKernelCommandLine=memmap",
        f"ConditionFileIsExecutable={PROGRAM}",
        "WantedBy=multi-user.target",
        "TimeoutStartSec=300",
    ):
        assert f"\n{line}\n" in made
    assert "Requires" not in made
    assert "Before=" not in made
    assert "volatile" in made
    assert f'{PROGRAM} boot-mount \\\n    "1G!4G" "/mnt/pmem0" "ext4" "dev" "0755" "-"\n' in made


@pytest.mark.parametrize(
    "edited",
    [
        "[Service]\nExecStart=/bin/true\n",
        unit_text([PLAIN], PROGRAM).replace("boot-mount", "something"),
        unit_text([PLAIN], PROGRAM).replace(' "0755"', ""),
        unit_text([PLAIN], PROGRAM).replace("1G!4G", "1G@4G"),
        unit_text([PLAIN], PROGRAM) + "ExecStart=/bin/true\n",
    ],
)
def test_an_edited_unit_is_not_guessed_at(edited: str) -> None:
    with pytest.raises(EmupmemError):
        read_unit(edited)


def test_changes() -> None:
    range0, range1 = (4 * GIB, GIB), (5 * GIB, GIB)
    second = BootMount(*range1, "/mnt/pmem1", "xfs")
    first = changed(None, False, [range0], PROGRAM, [PLAIN])
    assert first.needed
    assert first.diff.startswith(f"--- /dev/null\n+++ {unit.FILE}\n")
    assert first.mounts == (PLAIN,)
    assert not changed(first.after, True, [range0], PROGRAM, [PLAIN]).needed
    assert changed(first.after, False, [range0], PROGRAM, [PLAIN]).needed, "written, but not enabled"
    both = changed(first.after, True, [range0, range1], PROGRAM, [second])
    assert both.mounts == (PLAIN, second)
    one = changed(both.after, True, [range1], PROGRAM, [])
    assert one.mounts == (second,), "what is no longer reserved is no longer mounted"
    none = changed(one.after, True, [], PROGRAM, [])
    assert (none.after, none.needed) == (None, True)
    assert none.diff.endswith("-WantedBy=multi-user.target\n")
    assert not UnitChange(None, None).needed


def test_two_devices_in_one_folder_are_refused() -> None:
    again = BootMount(5 * GIB, GIB, "/mnt/pmem0", "ext4")
    with pytest.raises(EmupmemError, match="two devices cannot both be mounted at /mnt/pmem0"):
        changed(None, False, [(4 * GIB, GIB), (5 * GIB, GIB)], PROGRAM, [PLAIN, again])


def test_an_open_quote_is_told_and_does_not_take_the_square_of_the_line() -> None:
    for tail in ('"', '"\\\\"' + ' "', '"\\' * 100_000):
        with pytest.raises(EmupmemError, match=r"a quote of its ExecStart is not closed"):
            unit.read_unit(f"{unit.MARK}\nExecStart=/usr/bin/emupmem {unit.COMMAND} {tail}\n")
