"""The cage around sh: what a text of GRUB defaults cannot do, whoever runs emupmem and whatever confines it."""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import TypeVar

import pytest

from emupmem.cli import main
from tests.fake import LOG, build

USER = 12345
ROOT = os.geteuid() == 0
T = TypeVar("T")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may write to, outside pytest's own, which is closed to other users."""
    folder = Path(mkdtemp(prefix="cage", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def as_user(call: Callable[[], T]) -> T:
    """What a call gives, or raises, in a process of an ordinary user; what it imports must be there already."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            signal.alarm(120)
            os.close(reader)
            become_user()
            with open(writer, "wb") as stream:
                stream.write(pickle.dumps(outcome(call)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    result = pickle.loads(said)
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def become_user() -> None:
    if ROOT:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # dumpable, as what a user starts is


def outcome(call: Callable[[], T]) -> T | BaseException:
    try:
        return call()
    except BaseException as exc:
        return exc


def emupmem(output: Path, *argv: str) -> object:
    """Run a command line with its output in a file; its exit status."""
    number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    sys.stdout = sys.stderr = open(number, "w")  # noqa: SIM115
    sys.argv = ["emupmem", *argv]
    try:
        main()
    except SystemExit as exc:
        return exc.code
    finally:
        sys.stdout.flush()


@pytest.mark.parametrize("who", ["root", "user"])
def test_a_dry_run_on_the_tree_of_another_machine_deletes_nothing(
    who: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = open_folder / "x" / "file"
    victim.parent.mkdir()
    victim.parent.chmod(0o777)
    victim.write_text("precious")
    victim.chmod(0o666)
    defaults = build(open_folder / "tree").root / "etc/default/grub"
    (open_folder / "boot.log").write_text(LOG)
    for name in ("stdout", "stderr", "argv"):  # put back what emupmem() changes
        monkeypatch.setattr(sys, name, getattr(sys, name))
    tree, log, said = str(open_folder / "tree"), str(open_folder / "boot.log"), open_folder / "said"
    argv = ["apply", "--root", tree, "--from", log, "--dry-run", "--size", "1G"]
    assert emupmem(said, *argv) == 0  # loads all modules, which a user may not read here
    said.chmod(0o666)
    defaults.write_text(f"/bin/rm -rf {victim.parent}\n: > {victim}\n{defaults.read_text()}")
    status = as_user(lambda: emupmem(said, *argv)) if who == "user" else emupmem(said, *argv)
    assert victim.exists(), "it is deleted"
    assert victim.read_text() == "precious"
    assert status == 0, said.read_text()
    assert "memmap=1G!" in said.read_text()
