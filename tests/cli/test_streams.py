# SPDX-License-Identifier: Apache-2.0
"""What is printed in every encoding, and with nobody to read it: a change that was made is never called an error.

Each command runs in a process of its own, on a machine in a folder that it takes for the running one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from emupmem.boot import prepare, transaction
from emupmem.boot.loader import Options
from emupmem.model import GIB, MIB, Request
from emupmem.planner import survey
from tests import PROJECT, fake
from tests.boot import test_trial
from tests.device import pmem
from tests.fake import LOG, STOCK, FakeMachine, put
from tests.nvdimm import test_nvdimm

DRIVER = """
import sys
from emupmem.device import dax, proof, unit  # before Machine is replaced
from tests.fake import FakeMachine, running
from tests.device.pmem import GOOD, PmemMachine, device_stand_ins
device_stand_ins(setattr)
kind, root, sys.argv = sys.argv[1], sys.argv[2], ["emupmem", *sys.argv[3:]]
machine = (PmemMachine if kind == "pmem" else FakeMachine)(root)
running(setattr, machine)
dax.prove_dax = lambda folder: GOOD
unit.SECONDS = 0.3
from emupmem.cli.main import main
main()
"""

GRUB = STOCK.replace(b'GRUB_CMDLINE_LINUX=""', '# Größe → „viel“\nGRUB_CMDLINE_LINUX=""'.encode())
ENCODINGS = ("ascii", "iso-8859-1", "utf-8", "C")
FULL, GONE, CLOSED = "full", "gone", "closed"


def build_grub(folder: Path) -> FakeMachine:
    return fake.build(folder, GRUB)


def build_reserved(folder: Path) -> FakeMachine:
    """A machine that has a reservation in its menu."""
    machine = build_grub(folder)
    found = survey.of_machine(machine)
    transaction.carry_out_change(machine, prepare.prepare_apply(machine, found, Request(GIB), Options()))
    return machine


def build_triable(folder: Path) -> FakeMachine:
    return test_trial.prepare(build_grub(folder))


def build_tried(folder: Path) -> FakeMachine:
    """A machine whose next start is a trial."""
    machine = build_triable(folder)
    found = survey.of_machine(machine)
    transaction.carry_out_change(machine, prepare.prepare_trial(machine, found, Request(GIB), Options()))
    return machine


def build_mounted(folder: Path) -> FakeMachine:
    machine = pmem.pmem_machine(folder)
    with (machine.root / "proc/self/mountinfo").open("a") as file:
        file.write("41 1 259:0 / /mnt/pmem0 rw - ext4 /dev/pmem0 rw,dax=always\n")
    return machine


def build_region(folder: Path) -> FakeMachine:
    """One region of an NVDIMM, in which ndctl makes a namespace."""
    machine = test_nvdimm.nvdimm_machine(folder)
    one = test_nvdimm.region("region0", test_nvdimm.space("namespace0.0"), dimms=("nmem0",))
    test_nvdimm.buses(machine, one, file="then")
    put(machine, "/dev/pmem0", "")
    put(machine, "/made", '{"dev":"namespace0.0"}')
    return machine


def build_namespace(folder: Path) -> FakeMachine:
    """One namespace of an NVDIMM, which ndctl destroys."""
    machine = test_nvdimm.nvdimm_machine(folder)
    one = test_nvdimm.region("region0", test_nvdimm.space("namespace0.0"), dimms=("nmem0",))
    test_nvdimm.buses(machine, one)
    empty = test_nvdimm.region("region0", free=512 * MIB, dimms=("nmem0",))
    test_nvdimm.buses(machine, empty, file="then")
    return machine


@dataclass(frozen=True)
class Case:
    """A command that changes something: on which machine, and words of the result that nobody may lose."""

    build: Callable[[Path], FakeMachine]
    argv: tuple[str, ...]
    words: str
    kind: str = "grub"


APPLY = ("apply", "--size", "1G", "--yes")
CASES = {
    "apply": Case(build_grub, APPLY, "If the machine does not come up"),
    "apply-json": Case(build_grub, (*APPLY, "--json"), '"backup": "/var/backups/emupmem/grub.'),
    "again": Case(build_reserved, APPLY, "Already set up"),
    "trial": Case(build_triable, (*APPLY, "--trial"), "If it hangs or panics"),
    "abandon": Case(build_tried, ("abandon", "--yes"), "no entry reserves memory"),
    "remove": Case(build_reserved, ("remove", "--yes"), "no entry reserves memory"),
    "mount": Case(pmem.pmem_machine, ("mount",), "huge-pages", "pmem"),
    "at-boot": Case(pmem.pmem_machine, ("mount", "--at-boot"), "does this at every boot", "pmem"),
    "boot-mount": Case(
        pmem.pmem_machine,
        ("boot-mount", "1G!4G", "/mnt/pmem0", "ext4", "-", "-", "-"),
        "is mounted at /mnt/pmem0",
        "pmem",
    ),
    "umount": Case(build_mounted, ("umount", "/mnt/pmem0"), "no longer mounted", "pmem"),
    "nvdimm-create": Case(build_region, ("nvdimm", "create"), "namespace0.0 · fsdax"),
    "nvdimm-destroy": Case(build_namespace, ("nvdimm", "destroy", "namespace0.0", "--yes"), "is gone"),
    "collect": Case(build_grub, ("collect", "FOLDER/machine.tar.gz"), "machine.tar.gz written"),
}


@dataclass(frozen=True)
class Done:
    status: int
    out: bytes
    err: bytes
    encoding: str

    @property
    def said(self) -> str:
        """All that was said; as the terminal of that encoding shows it."""
        return (self.out + self.err).decode(self.encoding, "backslashreplace")


def environment(encoding: str) -> dict[str, str]:
    known = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON", "EMUPMEM"))}
    known |= {"PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}
    if encoding == "C":
        return known | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return known | {"PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}


def start(argv: list[str], encoding: str = "utf-8", out: str = "", err: str = "") -> Done:
    """Run it with standard output and error as said: a pipe, or full, gone (nobody reads), closed."""
    redirect = {FULL: ">/dev/full", CLOSED: ">&-", GONE: "", "": ""}
    line = f'exec "$@" {redirect[out]} {"2" * bool(redirect[err])}{redirect[err]}'
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            ["sh", "-c", line, "sh", *argv],
            stdin=subprocess.DEVNULL,
            stdout=writer if out == GONE else subprocess.PIPE,
            stderr=writer if err == GONE else subprocess.PIPE,
            check=False,
            env=environment(encoding),
        )
    finally:
        os.close(writer)
    return Done(
        done.returncode, done.stdout or b"", done.stderr or b"", "ascii" if encoding == "C" else encoding
    )


def on(folder: Path, case: Case, encoding: str = "utf-8", out: str = "", err: str = "") -> Done:
    machine = case.build(folder / "machine")
    argv = [w.replace("FOLDER", str(folder)) for w in case.argv]
    return start([sys.executable, "-c", DRIVER, case.kind, str(machine.root), *argv], encoding, out, err)


def plainly(done: Done) -> None:
    for word in ("Traceback", "unexpected", "Exception ignored", "UnicodeEncodeError"):
        assert word not in done.said, done.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "out", "err"),
    [
        ("ascii", FULL, ""),
        ("C", CLOSED, ""),
        ("iso-8859-1", GONE, ""),
        ("utf-8", FULL, FULL),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_a_change_is_no_error_whatever_becomes_of_the_words(
    tmp_path: Path, name: str, encoding: str, out: str, err: str
) -> None:
    done = on(tmp_path, CASES[name], encoding, out, err)
    assert done.status == 0, done.said
    plainly(done)
    words = CASES[name].words
    if out and not err:
        assert done.out == b""
    if not out or not err:
        # With the marks that the encoding has.
        assert (words if encoding not in ("ascii", "C") else words.replace("·", "-")) in done.said


ENDS = ("", FULL, GONE, CLOSED)


EVERY = [(e, out, "") for e in ENCODINGS for out in ENDS] + [
    ("C", "", FULL),
    ("ascii", "", CLOSED),
    ("utf-8", FULL, CLOSED),
    ("C", CLOSED, GONE),
]
FIRST = (("C", "", ""), ("iso-8859-1", FULL, ""), ("utf-8", FULL, CLOSED))


@pytest.mark.parametrize(
    ("encoding", "out", "err"),
    [way if way in FIRST else pytest.param(*way, marks=pytest.mark.slow) for way in EVERY],
)
def test_apply_in_every_encoding(tmp_path: Path, encoding: str, out: str, err: str) -> None:
    done = on(tmp_path, CASES["apply"], encoding, out, err)
    assert done.status == 0, done.said
    plainly(done)
    assert b"memmap=1G!4G" in (tmp_path / "machine/etc/default/grub").read_bytes()
    assert "memmap=1G!4G" in (tmp_path / "machine/boot/grub/grub.cfg").read_text()
    if not out or not err:
        assert "If the machine does not come up" in done.said
        assert "(before: /var/backups/emupmem/grub." in done.said
        (done.out + done.err).decode(done.encoding)


@pytest.mark.slow
@pytest.mark.parametrize("argv", [APPLY, ("apply", "--size", "1G", "--dry-run"), (*APPLY, "--trial")])
def test_how_to_get_back_is_said_before_the_change(tmp_path: Path, argv: tuple[str, ...]) -> None:
    said = on(tmp_path, Case(build_triable, argv, "")).said
    back = "If it hangs or panics" if "--trial" in argv else "If the machine does not come up: in GRUB's menu"
    assert back in said
    assert said.index(back) < (said.index("✓ ") if "✓ " in said else len(said))


def test_nothing_is_asked_that_nobody_can_read(tmp_path: Path) -> None:
    done = on(tmp_path, Case(build_grub, APPLY[:-1], ""), out=FULL, err=FULL)
    assert done.status == 1
    assert (tmp_path / "machine/etc/default/grub").read_bytes() == GRUB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "encoding"),
    [
        (("suggest", "--size", "16G", "--from", "LOG"), "ascii"),
        (("suggest", "--size", "16G", "--from", "LOG", "--json"), "iso-8859-1"),
        (("apply", "--size", "1G", "--root", "TREE", "--from", "LOG", "--dry-run"), "C"),
        (("--help",), "ascii"),
        (("--version",), "utf-8"),
    ],
)
def test_what_only_reads(tmp_path: Path, argv: tuple[str, ...], encoding: str) -> None:
    (tmp_path / "log").write_text(LOG)
    tree = build_grub(tmp_path / "tree").root
    words = [w.replace("LOG", str(tmp_path / "log")).replace("TREE", str(tree)) for w in argv]
    whole = [sys.executable, "-m", "emupmem", *words]
    done = start(whole, encoding)
    assert (done.status, done.err) == (0, b"") or "less than a quarter" in done.said, done.said
    if "--json" in argv:
        assert json.loads(done.out.decode("ascii"))["plan"]
    full = start(whole, encoding, FULL)
    assert full.status == 1
    assert full.err.decode().splitlines() == [
        "emupmem: standard output cannot be written: No space left on device",
        "         send it to another place, or look at it on the terminal",
    ]
    gone = start(whole, encoding, GONE)
    assert (gone.status, gone.err) == (1, b"")
    assert start(whole, encoding, CLOSED).status == 0
    for broken in (FULL, GONE, CLOSED):
        assert start(whole, encoding, "", broken).status == 0


OTHERS = (
    ("verify",),
    ("verify", "--json"),
    ("doctor",),
    ("doctor", "--from", "LOG"),
    ("collect", "/tmp/x.tar.gz", "--list"),
    ("help",),
    ("qemu", "args", "--pmem", "1G", "--", "-m", "2G"),
    ("nvdimm", "show"),
    ("namespaces", "list"),
    ("remove", "--root", "TREE", "--dry-run"),
    ("confirm", "--dry-run"),
    ("abandon", "--dry-run"),
    ("mount", "/dev/nosuch", "--dry-run"),
    ("umount", "/mnt/nosuch"),
    ("save", "LOG"),
    ("restore", "LOG"),
)
"""Commands that read, and those that refuse, on whatever machine this is."""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OTHERS)), ids=[" ".join(a) for a in OTHERS])
def test_the_others_end_as_always_whatever_becomes_of_their_words(tmp_path: Path, number: int) -> None:
    (tmp_path / "log").write_text(LOG)
    tree = build_grub(tmp_path / "tree").root
    words = [w.replace("LOG", str(tmp_path / "log")).replace("TREE", str(tree)) for w in OTHERS[number]]
    whole = [sys.executable, "-m", "emupmem", *words]
    usual = start(whole, ENCODINGS[number % len(ENCODINGS)])
    plainly(usual)
    for turn, broken in enumerate((FULL, GONE, CLOSED), number + 1):
        encoding = ENCODINGS[turn % len(ENCODINGS)]
        done = start(whole, encoding, broken)
        plainly(done)
        lost = usual.out and broken in (FULL, GONE)
        assert done.status == (1 if lost else usual.status), (broken, encoding, done.said)
        assert start(whole, encoding, "", broken).status == usual.status, (broken, encoding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "encoding"),
    [
        (("suggest", "--from", "/none/“ÿ…"), "iso-8859-1"),
        (("suggest", "--from", "\udcff"), "C"),
        (("nonsense-✗",), "ascii"),
    ],
    ids=["name", "bytes", "word"],
)
def test_errors(argv: tuple[str, ...], encoding: str) -> None:
    whole = [sys.executable, "-m", "emupmem", *argv]
    done = start(whole, encoding)
    assert done.status in (1, 2)
    plainly(done)
    assert done.err.startswith(b"emupmem: ")
    for broken in (FULL, GONE, CLOSED):
        assert start(whole, encoding, "", broken).status == done.status


@pytest.mark.slow
def test_a_tree_with_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    tree = fake.build(tmp_path / "tree", GRUB + b"# \xff\xfe\n").root
    argv = ["apply", "--size", "1G", "--root", str(tree), "--from", str(tmp_path / "log"), "--yes"]
    for encoding, out in zip(ENCODINGS, ("", FULL, GONE, CLOSED), strict=True):
        done = start([sys.executable, "-m", "emupmem", *argv], encoding, out)
        assert done.status == 0, done.said
        plainly(done)
    assert b"# \xff\xfe\n" in (tree / "etc/default/grub").read_bytes()
