"""The cage around sh: what a text of GRUB defaults cannot do, whoever runs emupmem and whatever confines it."""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TypeVar

import pytest

from emupmem import cage, editor
from emupmem.cage import Way
from emupmem.cli import main
from emupmem.model import EmupmemError
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
    defaults.write_text(f"/bin/rm -rf {victim.parent}\necho > {victim}\n{defaults.read_text()}")
    status = as_user(lambda: emupmem(said, *argv)) if who == "user" else emupmem(said, *argv)
    assert victim.exists(), "it is deleted"
    assert victim.read_text() == "precious"
    assert status == 0, said.read_text()
    assert "memmap=1G!" in said.read_text()


# Each way on its own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prisoner:
    """Who runs sh, what confines it and which sh it is, in a folder that this user may change."""

    user: int
    folder: Path

    def reads(self, text: str, *, programs: bool) -> editor.Sourced:
        """What sh makes of a text; as the ordinary user it is when that is who we are to be."""
        path = editor.SH_PATH if programs else editor.NO_PROGRAMS

        def call() -> editor.Sourced:
            return editor.run_sh([text.encode()], path)

        return as_user(call) if self.user == USER else call()

    def owns(self, path: Path) -> Path:
        if ROOT:
            os.chown(path, self.user if self.user == USER else cage.NOBODY, -1)
        return path

    def left(self) -> list[str]:
        """Processes of this sh that are still there."""
        mark = os.fsencode(editor.SH)
        lines = [line for p in Path("/proc").glob("[0-9]*/cmdline") if mark in (line := seen(p))]
        return [line.decode(errors="replace") for line in lines]


def seen(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture(params=["namespaces", "landlock", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Nothing else but this way; "one by one" are namespaces as before Linux 5.12."""
    chosen = Way.LANDLOCK if request.param == "landlock" else Way.NAMESPACES
    monkeypatch.setattr(cage, "WAYS", (chosen,))
    if request.param == "one by one":
        monkeypatch.setattr(cage, "_MOUNT_SETATTR", 9999)
    return chosen


@pytest.fixture(params=["root", "user"])
def user(request: pytest.FixtureRequest) -> int:
    if request.param == "root" and not ROOT:
        pytest.skip("needs root")
    return 0 if request.param == "root" else USER


@pytest.fixture(params=["dash", "bash", "busybox"])
def prisoner(
    request: pytest.FixtureRequest, way: Way, user: int, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Prisoner:
    program = shutil.which(request.param, path="/usr/bin:/bin")
    if program is None:
        pytest.skip(f"no {request.param} here")
    Path(open_folder, "sh").symlink_to(Path(program).resolve())
    monkeypatch.setattr(editor, "SH", f"{open_folder}/sh")
    found = Prisoner(user, open_folder)
    for programs in (False, True):

        def can() -> bool:
            return cage.best(editor.SH, programs=programs) is way  # noqa: B023

        if not (as_user(can) if user == USER else can()):
            pytest.skip(f"{way.value} cannot be had here")
    return found


def picture(folder: Path) -> list[tuple[object, ...]]:
    """Everything that can be changed of what is in a folder."""
    found: list[tuple[object, ...]] = []
    for path in (folder, *sorted(folder.rglob("*"))):
        at = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found.append((path, at.st_mode, at.st_uid, at.st_nlink, at.st_mtime_ns, at.st_size, at.st_ino, content))
    return found


HARM = """
D=FOLDER F=FOLDER/F N=FOLDER/new
( : > $F )
echo x >> $F
echo x > $N
( : > /proc/self/root$F )
( : > /proc/1/root$F )
( : > /proc/PARENT/root$F )
( : > /proc/PARENT/cwd$F )
( : > /proc/$PPID/root$F )
for f in /proc/[0-9]*; do ( : > $f/root$F; : > $f/root$N ); done
( : > /dev/shm/NAME )
/bin/rm -rf $D
/bin/mv $F ${F}2
/bin/ln $F ${F}3
/bin/ln -s $F ${F}4
/bin/chmod 0777 $F
/bin/chmod 0700 $D
/usr/bin/truncate -s 0 $F
/usr/bin/touch $F $N
/bin/mkdir $N
/usr/bin/mkfifo $N
/bin/cp /bin/sh $N
busybox rm -rf $D
busybox touch $F
/usr/bin/chattr +i $F
/usr/bin/setfattr -n user.x -v 1 $F
/usr/bin/perl -e '($f, $n) = @ARGV; open(H, "+<", $f) and truncate(H, 0); utime(1, 1, $f); unlink($f); rename($f, $n)' $F $N
/usr/bin/perl -e '($f, $n) = @ARGV; use Fcntl; sysopen(H, $f, O_RDONLY|O_TRUNC)' $F $N
/usr/bin/unshare -Urm /bin/sh -c "mount -o remount,rw /; mount -o bind,remount,rw /tmp; rm -rf $D"
/usr/bin/nsenter -t PARENT -m -U /bin/rm -rf $D
/bin/mount -o remount,rw /
sudo -n rm -rf $D
su root -c "rm -rf $D"
exec 9>&1
GRUB_CMDLINE_LINUX=done
"""


@pytest.mark.parametrize("programs", [False, True])
def test_no_file_can_be_changed(prisoner: Prisoner, programs: bool) -> None:
    folder = prisoner.folder / "D"
    folder.mkdir()
    folder.chmod(0o777)
    file = folder / "F"
    file.write_text("precious\n")
    prisoner.owns(file).chmod(0o666)
    prisoner.owns(folder)
    text = HARM.replace("PARENT", str(os.getpid())).replace("NAME", folder.parent.name)
    text = text.replace("FOLDER", str(folder))
    before = picture(folder)
    result = prisoner.reads(text, programs=programs)
    assert picture(folder) == before
    assert not Path("/dev/shm", folder.parent.name).exists()
    assert not result.failed
    assert result.values[-1][editor.LINUX] == "done"
