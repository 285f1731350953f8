# SPDX-License-Identifier: Apache-2.0
"""A machine with a folder of its own: its files read, its programs run. Writing is in other modules of the package.

A `Machine` is a root directory. `/` is the machine we run on; any other directory is a tree of
another machine, where symbolic links are resolved inside the tree and nothing is executed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from emupmem.model import Command, EmupmemError, NodeRange
from emupmem.system import log
from emupmem.system.errors import read_hint, sudo_hint
from emupmem.system.host import Host
from emupmem.system.plain import read_plain
from emupmem.system.programs import (
    ENVIRONMENT,
    MOST_OUTPUT,
    PATH,
    QUIET,
    Completed,
    end_session,
    listen,
    make_aside,
)
from emupmem.system.sysfs import (
    Region,
    read_kernel_banner,
    read_nodes,
    read_regions,
)


def _parts(name: str) -> list[str]:
    """The parts of a path, the last one first."""
    return [p for p in reversed(name.split("/")) if p not in ("", ".")]


def _resolved(top: str, name: str) -> str:
    """The place of the file `name` of the tree `top`, links followed inside it. Raises EmupmemError for a loop."""
    parts = _parts(name)
    place, links = top, 0
    while parts:
        part = parts.pop()
        if part == "..":
            place = place.rpartition("/")[0] if place != top else top
            continue
        step = f"{place}/{part}"
        try:
            target = os.readlink(step)
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENOTDIR) and ".." not in parts:
                return "/".join([step, *reversed(parts)])  # nothing is below it, so no link either
            place = step
            continue
        links += 1
        if links > 40:
            raise EmupmemError(
                f"{name}: too many symbolic links", "links there lead in a circle (ls -l shows them)"
            )
        if target.startswith("/"):
            place = top
        parts += _parts(target)
    return place or "/"


class Machine(Host):
    """The files and programs of one machine, below `root`."""

    # The lock, while we hold it (programs that we start hold it too).
    held: int | None = None

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)
        self.live = self.root.resolve() == Path("/")

    # Files -----------------------------------------------------------------------------------

    def path(self, name: str | Path) -> Path:
        """Where the file `name` (absolute, as the machine itself sees it) really is.

        Symbolic links are followed inside the tree, as chroot would: an absolute link in a tree
        never leads to a file of the machine that we run on. Raises EmupmemError for a loop.
        """
        return Path(self._place(str(name)))

    def _place(self, name: str) -> str:
        """`path` as a string: hundreds of names are looked up for one answer, and a Path costs more than that."""
        return _resolved(str(self.root).rstrip("/"), name)

    def read(self, name: str) -> bytes | None:
        try:
            return read_plain(self._place(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be read: {exc.strerror}", read_hint(exc)) from exc

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            with self.path(name).open("rb") as file:
                yield file
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be read: {exc.strerror}", sudo_hint(exc)) from exc

    def peek(self, name: str) -> str:
        try:
            return read_plain(self._place(name)).decode("utf-8", "replace").strip("\n\0")
        except (OSError, EmupmemError):  # the latter for links in a circle
            return ""

    def exists(self, name: str) -> bool:
        return os.path.exists(self._place(name))  # (Path.exists raises where a folder is closed to us)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._place(folder)))
        except OSError:
            return []

    def modified(self, name: str) -> float | None:
        try:
            return os.stat(self._place(name)).st_mtime
        except OSError:
            return None

    def link_target(self, name: str) -> str:
        place = self.path(name.rpartition("/")[0]) / name.rpartition("/")[2]
        return str(place.readlink()) if place.is_symlink() else ""

    def is_link(self, name: str) -> bool:
        return (self.path(name.rpartition("/")[0]) / name.rpartition("/")[2]).is_symlink()

    # Devices and mounted folders -----------------------------------------------------------------

    def block_number(self, name: str) -> str:
        try:
            info = os.stat(self._place(name))
        except OSError:
            return ""
        if not stat.S_ISBLK(info.st_mode):
            return ""
        return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"

    def real(self, name: str) -> str:
        return self._place(name).removeprefix(str(self.root).rstrip("/")) or "/"

    def loose(self, name: str) -> bool:
        try:
            info = os.stat(self._place(name))
        except OSError:
            return False
        return info.st_uid not in (0, os.geteuid()) or bool(info.st_mode & 0o022)

    def entry_kind(self, name: str) -> str:
        try:
            mode = os.stat(self._place(name)).st_mode
        except OSError:
            return "missing"
        tests = (
            ("file", stat.S_ISREG),
            ("folder", stat.S_ISDIR),
            ("block", stat.S_ISBLK),
            ("character", stat.S_ISCHR),
        )
        return next((word for word, test in tests if test(mode)), "other")

    def file_system(self, name: str) -> str:
        try:
            number = os.stat(self._place(name)).st_dev
        except OSError:
            return ""
        return f"{os.major(number)}:{os.minor(number)}"

    def file_size(self, name: str) -> int | None:
        try:
            return os.stat(self._place(name)).st_size
        except OSError:
            return None

    def room(self, folder: str) -> int:
        try:
            info = os.statvfs(self._place(folder))
        except OSError:
            return 0
        return info.f_bavail * info.f_frsize

    def block_size(self, folder: str) -> int:
        try:
            return os.statvfs(self._place(folder)).f_bsize
        except OSError:
            return 0

    def folder_state(self, name: str) -> str:
        place = self.path(name)
        if not place.exists():
            return "missing"
        if not place.is_dir():
            return "no folder"
        try:
            return "full" if any(place.iterdir()) else "empty"
        except OSError:
            return "full"

    # Programs --------------------------------------------------------------------------------

    def find(self, program: str) -> str | None:
        for folder in PATH.split(":"):
            candidate = Path(folder) / program
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return str(candidate)
        return None

    def run(self, command: Command, timeout: float = 60, language: str = "C") -> Completed:
        """Run a program to its end in a session of its own, so that no Ctrl-C hits it half way.

        No shell, the fixed environment but for `language`, no standard input. Past `timeout` seconds, or where
        it prints without end, the whole session is killed. Raises EmupmemError when it is missing, cannot start
        or was killed so.

        While we hold the lock the program holds it too: if we are killed and it goes on, nobody else begins.
        """
        began = time.monotonic()
        try:
            done = self._run(command, timeout, language)
        except EmupmemError as exc:
            log.failed(self, command.argv, exc.message)
            raise
        log.ran(self, command.argv, done.status, time.monotonic() - began)
        return done

    def _run(self, command: Command, timeout: float, language: str) -> Completed:
        name = command.argv[0]
        program = name if name.startswith("/") else self.find(name)
        if program is None:
            raise EmupmemError(f"{name} is not installed")
        try:
            child = subprocess.Popen(
                [program, *command.argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT if language == "C" else {**QUIET, "PATH": PATH, "LANG": language},
                cwd="/",
                start_new_session=True,
                pass_fds=() if self.held is None else (self.held,),
            )
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be started: {exc.strerror}") from exc
        try:
            out, err = listen(child, timeout, command.why or Path(name).name)
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            end_session(child)
            raise EmupmemError(f"{name} did not finish within {timeout:g} seconds and was ended") from None
        except OverflowError:
            end_session(child)
            raise EmupmemError(f"{name} printed more than {MOST_OUTPUT >> 20} MiB and was ended") from None
        finally:
            for pipe in (child.stdout, child.stderr):
                assert pipe is not None
                pipe.close()
        return Completed(child.returncode, out, err)

    def output(self, *argv: str, timeout: float = 30) -> Completed | None:
        said = {} if self.answers is None else self.answers
        if argv not in said:
            try:
                said[argv] = self.run(Command(argv), timeout)
            except EmupmemError:
                said[argv] = None
        return said[argv]

    def made(self, argv: Sequence[str], given: Mapping[str, bytes], result: str) -> tuple[Completed, bytes]:
        return make_aside(self.run, argv, given, result)

    # What the kernel shows ----------------------------------------------------------------------

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0

    @property
    def architecture(self) -> str:
        return platform.machine()

    def nodes(self) -> tuple[NodeRange, ...]:
        return read_nodes(self)

    def regions(self) -> tuple[Region, ...]:
        return read_regions(self)

    def kernel_banner(self, image: str) -> str:
        return read_kernel_banner(self, image)


@contextlib.contextmanager
def asked_once(machine: Host) -> Iterator[None]:
    """For what changes nothing: in here no program is asked the same again."""
    if machine.answers is not None:  # it is so already
        yield
        return
    machine.answers = {}
    try:
        yield
    finally:
        machine.answers = None
