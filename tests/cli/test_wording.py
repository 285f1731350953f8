# SPDX-License-Identifier: Apache-2.0
"""What is typed wrongly: empty words, values that are none, whose help shows more, what was meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emupmem.cli import wording
from emupmem.cli.main import COMMANDS
from emupmem.kernel.cmdline import items_meant
from emupmem.system import backups
from emupmem.system.machine import Machine
from emupmem.system.streams import new_file
from tests.cli.runner import Run
from tests.fake import LOG, FakeMachine, build, put


@pytest.fixture
def tree(tmp_path: Path) -> str:
    machine = Machine(tmp_path / "tree")
    put(machine, "/etc/default/grub", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX=""\n')
    (tmp_path / "log").write_text(LOG)
    return str(tmp_path / "tree")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["suggest", "--from", ""], "the word after --from"),
        (["apply", "--root=", "--size", "1G"], "the value of --root"),
        (["collect", ""], "the word after collect"),
        ([""], "a word"),
        (["qemu", "args", "--pmem", "1G", "--", "-m", ""], ""),
        (["qemu", "args", "--pmem-file", "", "--", "-m", "1G"], "the word after --pmem-file"),
        (["remove", "1G!4G", ""], "the word after 1G!4G"),
        (["suggest", "--size", "1G="], ""),
    ],
)
def test_an_empty_word_is_found(words: list[str], what: str) -> None:
    assert wording.empty_word(words) == what


def test_an_empty_word_never_means_this_machine(run: Run, here: FakeMachine) -> None:
    before = (here.root / "etc/default/grub").read_bytes()
    done = run("apply", "--size", "1G", "--root", "", "--yes")
    assert done.status == 2
    assert done.err.splitlines() == [
        "emupmem: the word after --root is empty: is a variable not set?",
        "         see emupmem apply --help",
    ]
    assert (here.root / "etc/default/grub").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("suggest", "--foo"), "see emupmem suggest --help"),
        (("-v", "suggest", "--foo"), "see emupmem suggest --help"),
        (("qemu", "args", "--node", "x"), "see emupmem qemu args --help"),
        (("qemu", "foo"), "see emupmem qemu --help"),
        (("nvdimm", "goal", "--mode", "x"), "see emupmem nvdimm goal --help"),
        (("foo",), "see emupmem --help"),
        (("apply", "--size", "1G", "--add", "--replace"), "see emupmem apply --help"),
    ],
)
def test_the_help_of_the_command_that_was_typed(
    run: Run, here: FakeMachine, words: tuple[str, ...], hint: str
) -> None:
    done = run(*words)
    assert (done.status, done.err.splitlines()[-1].strip()) == (2, hint)


def test_no_words_of_the_library(run: Run, here: FakeMachine) -> None:
    for words in (
        ("suggest", "--count", "x"),
        ("suggest", "--count=1.5"),
        ("suggest", "--count", "0"),
        ("suggest", "--count", "9" * 5000),
        ("suggest", "--source", "x"),
        ("suggest", "extra"),
        ("verify", "--wait", "x"),
        ("verify", "--wait", "nan"),
        ("verify", "--wait", "inf"),
        ("verify", "--wait", "-1"),
        ("nvdimm", "goal", "--mode", "memory", "--memory-percent", "101"),
    ):
        done = run(*words)
        assert done.status == 2, words
        for theirs in ("parse", "Input should", "Value error", "extra argument", "maximum size", "pydantic"):
            assert theirs not in done.err, done.err
    assert "'--count': 'x' is not a whole number" in run("suggest", "--count", "x").err


def test_every_command_has_its_groups_known() -> None:
    assert {n for n, c in COMMANDS.items() if not c.function} == set(wording.GROUPS)


# Numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "first", "second"),
    [
        (
            ("--size", "0.1G"),
            2,
            "size '0.1G' is not a whole number of bytes",
            "the nearest sizes are 102M and 104M",
        ),
        (("--size", "0.0001K"), 2, "is not a whole number of bytes", "the nearest sizes are 0 and 1"),
        (("--size", "3M"), 2, "size 3M is not a multiple of 2 MiB", "take 2M or 4M"),
        (("--size", "9" * 5000), 2, "is more than any machine can address", "whole number"),
        (("--size", "0x" + "f" * 5000), 2, "is more than any machine can address", "whole number"),
        (("--offset", "-1"), 2, "offset '-1' is not a size", "write an address, as 8G or 0x200000000"),
        (("--offset", "1G"), 2, "offset 1G is below 4 GiB", "use 4G or more"),
        (
            ("--offset", "34G", "--size", "1G"),
            1,
            "no usable range has room for 1 GiB at 34G",
            "omit --offset",
        ),
        (("--offset", "34G"), 1, "no room for a reservation at 34G", "omit --offset, or give another"),
        (("--count", "5", "--size", "1G"), 1, "5 memmap regions in all", "--count 4"),
        (("--count", "0"), 2, "it must be 1 or more", "suggest --help"),
        (("--numa-node", "-1"), 2, "it must be 0 or more", "suggest --help"),
        (("--numa-node", "0"), 1, "there is no NUMA node 0", "no nodes are known"),
    ],
)
def test_the_second_line_is_about_what_was_asked(
    run: Run, words: tuple[str, ...], status: int, first: str, second: str
) -> None:
    done = run("suggest", *words, "--from", "-", stdin=LOG.encode())
    assert done.status == status
    lines = done.err.splitlines()
    assert first in lines[0]
    assert len(lines[0]) < 300
    assert second in lines[-1]


def test_a_size_as_kubernetes_writes_it(run: Run) -> None:
    assert "memmap=1G!4G" in run("suggest", "--size", "1Gi", "--from", "-", stdin=LOG.encode()).out


# What is given back --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "items"),
    [
        (["memmap=1G!4G,1G!5G"], ["1G!4G", "1G!5G"]),
        (["1024M!4096M"], ["1G!4G"]),
        (["0x40000000!0x140000000"], ["1G!5G"]),
        (["0x100000000-0x13fffffff"], ["1G!4G"]),
        (["1G\\!4G", "1G!5G"], ["1G!4G", "1G!5G"]),
        (["2G!4G"], ["2G!4G"]),
        (["1G!4G"], ["1G!4G"]),
        (["1G"], ["1G"]),
        (["0x100000000-zz"], ["0x100000000-zz"]),
    ],
)
def test_an_item_in_every_spelling(typed: list[str], items: list[str]) -> None:
    assert items_meant(["1G!4G", "1G!5G"], typed) == items


def test_remove_takes_what_apply_and_the_kernel_print(run: Run, tree: str, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    for spelling in ("memmap=1G!4G,1G!5G", "1024M!4096M,1G!0x140000000", "0x100000000-0x13fffffff,1G!5G"):
        assert (
            run("apply", "--root", tree, "--from", log, "--size", "1G", "--count", "2", "--yes").status == 0
        )
        done = run("remove", spelling, "--root", tree, "--yes", "--json")
        assert done.status == 0, done.err
        assert done.json["memmap"] == ""
        assert done.json["reboot_required"] is True
        assert b"memmap" not in (Path(tree) / "etc/default/grub").read_bytes()
    assert run("remove", "--root", tree, "--yes", "--json").json["reboot_required"] is False  # nothing to do
    done = run("remove", "1G!4G", "--root", tree)
    assert done.err.splitlines()[0] == "emupmem: there is no reservation 1G!4G"


# The kernel's limit, with --root -----------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "status"), [(1900, 0), (2010, 1), (4000, 1)])
def test_the_line_of_a_tree_is_no_longer_than_the_kernel_reads(
    run: Run, tree: str, tmp_path: Path, more: int, status: int
) -> None:
    file = Path(tree) / "etc/default/grub"
    file.write_text(f'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX="x={"x" * more}"\n')
    before = file.read_bytes()
    done = run("apply", "--root", tree, "--from", str(tmp_path / "log"), "--size", "1G", "--yes")
    assert done.status == status
    if status:
        assert "longer than the 2047 bytes that the kernel reads" in done.err
        assert file.read_bytes() == before


def test_what_the_menu_of_a_tree_adds_counts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    words = "x" * 1985
    machine = build(
        tmp_path / "there", f'GRUB_CMDLINE_LINUX_DEFAULT=""\nGRUB_CMDLINE_LINUX="{words}"\n'.encode()
    )
    done = run("apply", "--root", str(machine.root), "--from", str(tmp_path / "log"), "--size", "1G", "--yes")
    assert "longer than the 2047 bytes" in done.err  # BOOT_IMAGE=, root= and ro of the menu make it so


# Files of ours -------------------------------------------------------------------------------------------------


def test_backups_beyond_the_last_twenty_go(tmp_path: Path) -> None:
    machine = build(tmp_path)
    stamps = [f"2026-11-27T06:52:{n:02d}.000000Z" for n in range(30)]
    for stamp in stamps:
        backups.back_up(machine, "/etc/default/grub", stamp, b"x")
        backups.back_up(machine, "/etc/default/grub", stamp, b"x", ".written")
    backups.back_up(machine, "/etc/kernel/cmdline", stamps[0], b"x")
    put(machine, f"{backups.BACKUPS}/grub.by-hand", b"x")
    left = machine.names(backups.BACKUPS)
    assert sorted(n for n in left if n.startswith("grub.2")) == sorted(
        name for s in stamps[-20:] for name in (f"grub.{s}", f"grub.{s}.written")
    )
    assert {"grub.by-hand", f"cmdline.{stamps[0]}"} <= set(left)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away: root only")
def test_what_sudo_writes_belongs_to_who_called_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "12345")
    monkeypatch.setenv("SUDO_GID", "12346")
    mine, roots = tmp_path / "mine", tmp_path / "roots"
    mine.mkdir()
    roots.mkdir()
    os.chown(mine, 12345, 12346)
    for folder, owner in ((mine, (12345, 12346)), (roots, (0, 0))):
        for force in (False, True):
            new_file(str(folder / "a.tar.gz"), b"x", force)
            seen = (folder / "a.tar.gz").stat()
            assert (seen.st_uid, seen.st_gid, seen.st_mode & 0o777) == (*owner, 0o600)
    monkeypatch.setenv("SUDO_UID", "12345x")
    new_file(str(mine / "b"), b"x")
    assert (mine / "b").stat().st_uid == 0
