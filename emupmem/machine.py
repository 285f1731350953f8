"""The one impure module: every open, subprocess, rename, /proc and /sys of the program is here.

A `Machine` is a root directory. `/` is the machine we run on; any other directory is a tree of
another machine, where symbolic links are resolved inside the tree and nothing is executed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import io
import os
import platform
import re
import selectors
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

from emupmem import grubcfg
from emupmem.model import UNCHANGED, Busy, Command, EmupmemError, NodeRange

if TYPE_CHECKING:
    from emupmem.editor.shell import Judge

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
QUIET = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
"""LVM, which GRUB's scripts ask, would complain about the lock that it is given."""

ENVIRONMENT = {**QUIET, "PATH": PATH, "LC_ALL": "C", "LANG": "C"}
"""What every program is started with: nothing of the caller's environment reaches them."""

BACKUPS = "/var/backups/emupmem"
GRUB_DEFAULT = "/etc/default/grub"
GRUB_DROPINS = "/etc/default/grub.d"
GRUB_CFGS = ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg")
GRUBENVS = ("/boot/grub2/grubenv", "/boot/grub/grubenv")
ESP_FOLDERS = "/boot/efi/EFI"
ESP_MARKS = ("/etc/grub2-efi.cfg", "/boot/grub2/grubenv")
"""Links of Red Hat's packages: where they lead into the EFI system partition, the menu is there too."""
KERNEL_FOLDERS = ("/dev", "/proc", "/sys")
"""What lies there is made by the kernel or udev, not by us."""

GZIP = b"\x1f\x8b"
MOST_OUTPUT = 512 << 20
"""Bytes that a program may print before it is ended: more than any log of a boot."""

GENERATORS = ("update-grub2", "update-grub", "grub2-mkconfig", "grub-mkconfig")


_HABITS = ("dmesg(1) may have more information", "(")
"""How lines begin that follow the reason."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended: exit status (negative: signal), what it printed."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """Its reason, for an error message: the last line of what it said (standard error first).

        What follows a reason as a habit does not count: the usage (mkfs.xfs), where to look for more
        (mount(8) since util-linux 2.39), a remark in brackets (e2fsck).
        """
        for stream in (self.stderr, self.stdout):
            text = stream.decode("utf-8", "replace")
            said = re.split(r"^usage:", text, maxsplit=1, flags=re.IGNORECASE | re.MULTILINE)[0]
            for part in (said, text):
                lines = [line.strip() for line in part.splitlines()]
                reasons = [n for n in lines if n and not n.startswith(_HABITS)]
                if reasons:
                    return reasons[-1]
        return ""


@dataclass(frozen=True, slots=True)
class Region:
    """A libnvdimm region: bytes; `start` None where the kernel hides it from us."""

    name: str
    size: int
    start: int | None
    provider: str
    numa_node: int | None
    block: str
    block_size: int
    dax: bool | None
    mode: str
    driver: str


class Machine:
    """The files and programs of one machine, below `root`."""

    held: int | None = None
    """The lock, while we hold it: programs that we start then hold it as well."""

    replay: Judge | None = None
    """What sh once made of this machine's GRUB defaults, where they are not to be sourced (an archive)."""

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)
        self.live = self.root.resolve() == Path("/")

    @property
    def running(self) -> bool:
        """Whether a running kernel is to be seen in it: the live machine, or what was collected of one."""
        return self.live

    # Files -----------------------------------------------------------------------------------

    def path(self, name: str | Path) -> Path:
        """Where the file `name` (absolute, as the machine itself sees it) really is.

        Symbolic links are followed inside the tree, as chroot would: an absolute link in a tree
        never leads to a file of the machine that we run on. Raises EmupmemError for a loop.
        """
        parts = [p for p in Path(name).parts if p.strip("/")]
        done: list[str] = []
        links = 0
        while parts:
            part = parts.pop(0)
            if part == "..":
                done = done[:-1]
                continue
            here = self.root.joinpath(*done, part)
            try:
                target = here.readlink()
            except OSError:
                done.append(part)
                continue
            links += 1
            if links > 40:
                raise EmupmemError(f"{name}: too many symbolic links")
            if target.is_absolute():
                done = []
            parts = [p for p in target.parts if p.strip("/")] + parts
        return self.root.joinpath(*done)

    def read(self, name: str) -> bytes | None:
        """Content of a file, None where it is not there. Raises EmupmemError where it may not be read."""
        try:
            return self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be read: {exc.strerror}", _sudo_hint(exc)) from exc

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to read from, for what may be large. Raises EmupmemError."""
        try:
            with self.path(name).open("rb") as file:
                yield file
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be read: {exc.strerror}", _sudo_hint(exc)) from exc

    def peek(self, name: str) -> str:
        """Text of a small file, empty where it is missing or not ours to read."""
        try:
            return self.path(name).read_bytes().decode("utf-8", "replace").strip("\n\0")
        except OSError:
            return ""

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name))  # noqa: PTH110 (Path.exists raises where a folder is closed to us)

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted; none where it cannot be read."""
        try:
            return sorted(p.name for p in self.path(folder).iterdir())
        except OSError:
            return []

    def modified(self, name: str) -> float | None:
        """When a file was last written (seconds of the epoch)."""
        try:
            return self.path(name).stat().st_mtime
        except OSError:
            return None

    def replace(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Put `data` into a file so that at every moment the old or the new content is whole there.

        A new file beside the old one, fsync, rename, fsync of the folder. Mode, owner and extended
        attributes (ACLs and SELinux label are such) are the old file's (`mode` where there is none); a
        symbolic link stays one.
        Raises EmupmemError; the old file is then untouched and nothing is left beside it.
        """
        target = self.path(name)
        fresh = _fresh(target)
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()  # of a run that was killed; the lock keeps others away
            _write_like(fresh, data, target, mode)
            fresh.rename(target)
            _sync_folder(target.parent)
        except OSError as exc:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise EmupmemError(
                f"{name} cannot be written: {exc.strerror}", _write_hint(exc), state=UNCHANGED
            ) from exc

    def forget(self, name: str) -> None:
        """Take one of our own small files away, if it can be."""
        with contextlib.suppress(OSError):
            self.path(name).unlink()

    def keep(self, name: str, stamp: str, data: bytes, suffix: str = "") -> str:
        """Keep `data` as the backup `NAME.STAMP` of file `name`; gives the backup's name.

        Only root may read the folder. Written and synced like every other file.
        """
        folder = self.path(BACKUPS)
        base = name.rpartition("/")[2]
        backup = f"{BACKUPS}/{base}.{stamp}{suffix}"
        try:
            _make_folder(folder, 0o700)
            fresh = folder / f".{base}.{stamp}{suffix}.new"
            _write_like(fresh, data, self.path(name))
            fresh.rename(folder / f"{base}.{stamp}{suffix}")
            _sync_folder(folder)
        except OSError as exc:
            with contextlib.suppress(OSError):
                (folder / f".{base}.{stamp}{suffix}.new").unlink()
            raise EmupmemError(
                f"the backup {backup} cannot be written: {exc.strerror}",
                _write_hint(exc),
                state=UNCHANGED,
            ) from exc
        return backup

    def set_aside(self, name: str) -> bool:
        """Copy a file beside itself before a program writes it in place, so that `put_back` needs no room.

        False where there is no file. Raises EmupmemError.
        """
        target = self.path(name)
        aside = _aside(target)
        made = _half(aside)
        try:
            if not target.exists():
                return False
            _write_like(made, target.read_bytes(), target)
            made = made.rename(aside)
            _sync_folder(aside.parent)
        except OSError as exc:
            with contextlib.suppress(OSError):
                made.unlink()
            raise EmupmemError(
                f"{name} cannot be copied before it is made anew: {exc.strerror}",
                _write_hint(exc),
                state=UNCHANGED,
            ) from exc
        return True

    def is_aside(self, name: str) -> bool:
        """Whether a run that was killed left such a copy."""
        return os.path.exists(_aside(self.path(name)))  # noqa: PTH110 (as in exists)

    def read_aside(self, name: str) -> bytes | None:
        """What that copy holds. Raises EmupmemError where it may not be read."""
        return self.read(str(_aside(Path(self.real(name)))))

    def litter(self, names: Sequence[str], cfg: str = "") -> list[Path]:
        """Half-written files that a killed run left beside `names`, the menu `cfg` if any, and the backups."""
        places = [self.path(n) for n in names]
        beside = [p for place in places for p in (_fresh(place), _half(_aside(place)))]
        if cfg:
            beside += [_half(_aside(self.path(cfg))), _fresh(self.path(self.grubenv_name()))]
        halves = [n for n in self.names(BACKUPS) if n.startswith(".") and n.endswith(".new")]
        return [p for p in beside if os.path.exists(p)] + [self.path(BACKUPS) / n for n in halves]  # noqa: PTH110

    def clear(self, litter: Sequence[Path]) -> None:
        """Take that away, as far as possible; the lock keeps others away."""
        for path in litter:
            with contextlib.suppress(OSError):
                path.unlink()

    def put_back(self, name: str) -> None:
        """Rename the copy that `set_aside` made over the file; where both are the same, drop the copy.

        Raises EmupmemError, also where the copy is gone.
        """
        target, aside = self.path(name), _aside(self.path(name))
        try:
            if target.exists() and _same(aside, target):
                aside.unlink()  # nothing to put back, and a file that nobody can write is no obstacle
            else:
                aside.rename(target)
            _sync_folder(target.parent)
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be put back: {exc.strerror}", _write_hint(exc)) from exc

    def sync(self, name: str) -> None:
        """Have a file that another program wrote safely on the disk. Raises EmupmemError."""
        target = self.path(name)
        try:
            _sync_file(target)
            _sync_folder(target.parent)
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be synced: {exc.strerror}") from exc

    def drop_aside(self, name: str) -> None:
        """Take the copy away again, all being well."""
        with contextlib.suppress(OSError):
            _aside(self.path(name)).unlink()

    def install(self, name: str, text: str | bytes, mode: int = 0o644) -> None:
        """Write a small file whole or not at all (with `mode` where it is new), with the folders above it."""
        try:
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be written: {exc.strerror}", _write_hint(exc)) from exc
        self.replace(name, text if isinstance(text, bytes) else text.encode(), mode)

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link; one that is there already is replaced. Raises EmupmemError."""
        place = self.path(name.rpartition("/")[0]) / name.rpartition("/")[2]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(target)
            _sync_folder(place.parent)
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be linked: {exc.strerror}", _write_hint(exc)) from exc

    def link_target(self, name: str) -> str:
        """Where a symbolic link leads, as it is written; empty for everything else."""
        place = self.path(name.rpartition("/")[0]) / name.rpartition("/")[2]
        return str(place.readlink()) if place.is_symlink() else ""

    def is_link(self, name: str) -> bool:
        return (self.path(name.rpartition("/")[0]) / name.rpartition("/")[2]).is_symlink()

    def delete(self, name: str) -> None:
        """Take a file or a link away (never what a link leads to). Raises EmupmemError."""
        place = self.path(name.rpartition("/")[0]) / name.rpartition("/")[2]
        try:
            place.unlink(missing_ok=True)
            if place.parent.is_dir():
                _sync_folder(place.parent)
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be removed: {exc.strerror}", _write_hint(exc)) from exc

    def drop_folder(self, name: str) -> None:
        """Take a folder away if it is empty."""
        with contextlib.suppress(OSError):
            self.path(name).rmdir()
            _sync_folder(self.path(name).parent)

    def poke(self, name: str, text: str) -> None:
        """Write a word to a file of sysfs, in one piece and in place. Raises EmupmemError."""
        try:
            descriptor = os.open(self.path(name), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, f"{text}\n".encode())
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise EmupmemError(
                f"{text!r} cannot be written to {name}: {exc.strerror}", _sudo_hint(exc)
            ) from exc

    # Devices and mounted folders -----------------------------------------------------------------

    def block_number(self, name: str) -> str:
        """`MAJOR:MINOR` of a block device, empty for everything else."""
        try:
            info = self.path(name).stat()
        except OSError:
            return ""
        if not stat.S_ISBLK(info.st_mode):
            return ""
        return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a block device alone: Busy while it is mounted or another driver has claimed it."""
        try:
            descriptor = os.open(self.path(name), os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise Busy(
                    f"{name} is in use", f"something holds it: lsblk {name} and cat /proc/swaps may tell"
                ) from exc
            raise EmupmemError(f"{name} cannot be opened: {exc.strerror}", _sudo_hint(exc)) from exc
        try:
            yield
        finally:
            os.close(descriptor)

    def real(self, name: str) -> str:
        """The name that an absolute path leads to once all symbolic links are followed."""
        return "/" + str(self.path(name).relative_to(self.root)).removeprefix(".")

    def loose_parent(self, name: str) -> str:
        """The first folder above `name` in which others than root could put something else; empty if none."""
        return next((str(p) for p in reversed(Path(name).parents) if self.loose(str(p))), "")

    def loose(self, name: str) -> bool:
        """Whether others than root (and ourselves) may change a file or what is in a folder."""
        try:
            info = self.path(name).stat()
        except OSError:
            return False
        return info.st_uid not in (0, os.geteuid()) or bool(info.st_mode & 0o022)

    def entry_kind(self, name: str) -> str:
        """`file`, `folder`, `block`, `character`, `other` or `missing`: what a name leads to."""
        try:
            mode = self.path(name).stat().st_mode
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
        """`MAJOR:MINOR` of the file system that a name lies on, empty where it is not there."""
        try:
            number = self.path(name).stat().st_dev
        except OSError:
            return ""
        return f"{os.major(number)}:{os.minor(number)}"

    def mapped_by(self, name: str) -> list[str]:
        """`NAME (process N)` of the processes that have a file mapped, as far as we may look."""
        try:
            info = self.path(name).stat()
        except OSError:
            return []
        mark = f" {os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x} {info.st_ino} "
        pids = sorted((n for n in self.names("/proc") if n.isdigit()), key=int)
        return [
            f"{self.peek(f'/proc/{p}/comm')} (process {p})"
            for p in pids
            if mark in self.peek(f"/proc/{p}/maps")
        ]

    @contextlib.contextmanager
    def scratch(self, size: int) -> Iterator[str]:
        """A file of zeros that is gone afterwards."""
        with tempfile.NamedTemporaryFile(prefix="emupmem-") as file:
            file.truncate(size)
            file.flush()
            yield file.name

    def make_sparse(self, name: str, size: int) -> None:
        """Make a file of `size` bytes of holes, readable by its owner only; never one that is there.

        Raises EmupmemError.
        """
        place = self.path(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(place, flags, 0o600)
            try:
                os.ftruncate(descriptor, size)
            except OSError:
                place.unlink()
                raise
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be made: {exc.strerror}", _sudo_hint(exc)) from exc

    def claim(self, name: str, shared: bool, write: bool = True) -> None:
        """Lock a file or a device until this process ends, and what it becomes by `become`.

        Raises EmupmemError where another has the lock, and where it may not be opened (to `write`).
        """
        try:
            # Inherited on purpose: it is the lock.
            descriptor = os.open(self.path(name), os.O_RDWR if write else os.O_RDONLY)
            os.set_inheritable(descriptor, True)
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise EmupmemError(
                f"{name} is in use by another virtual machine",
                "two would write over each other; --shared-backend on both allows it",
            ) from exc
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be opened: {exc.strerror}", _sudo_hint(exc)) from exc

    def become(self, argv: list[str]) -> NoReturn:
        """Become another program: its signals, its exit status, its terminal. Raises EmupmemError."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            os.execv(argv[0], argv)  # noqa: S606 (no shell on purpose)
        except OSError as exc:
            raise EmupmemError(f"{argv[0]} cannot be started: {exc.strerror}") from exc

    def file_size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        try:
            return self.path(name).stat().st_size
        except OSError:
            return None

    def room(self, folder: str) -> int:
        """Bytes that are free on the file system of a folder; 0 where that cannot be told."""
        try:
            info = os.statvfs(self.path(folder))
        except OSError:
            return 0
        return info.f_bavail * info.f_frsize

    def block_size(self, folder: str) -> int:
        """Bytes that the file system of a folder gives in one piece; 0 where that cannot be told."""
        try:
            return os.statvfs(self.path(folder)).f_bsize
        except OSError:
            return 0

    def folder_state(self, name: str) -> str:
        """`missing`, `empty`, `full`, or `no folder`."""
        place = self.path(name)
        if not place.exists():
            return "missing"
        if not place.is_dir():
            return "no folder"
        try:
            return "full" if any(place.iterdir()) else "empty"
        except OSError:
            return "full"

    def make_folder(self, name: str) -> None:
        """Make a folder and those above it, mode 0755. Raises EmupmemError."""
        try:
            for parent in [*reversed(Path(name).parents), Path(name)]:
                if not self.path(parent).exists():
                    self.path(parent).mkdir(mode=0o755)
        except OSError as exc:
            raise EmupmemError(f"{name} cannot be made: {exc.strerror}", _write_hint(exc)) from exc

    def own_mount(self, name: str, number: str, owner: tuple[int, int] | None, mode: int | None) -> bool:
        """Set owner and mode of the top folder of a mounted device; whether anything was changed.

        Only if the folder lies on that device. Raises EmupmemError.
        """
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                info = os.fstat(descriptor)
                if f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}" != number:
                    raise EmupmemError(f"{name} is not where the device is mounted")
                owned = owner is not None and (info.st_uid, info.st_gid) != owner
                if owner is not None and owned:
                    os.fchown(descriptor, *owner)
                moded = mode is not None and stat.S_IMODE(info.st_mode) != mode
                if mode is not None and moded:
                    os.fchmod(descriptor, mode)
                return owned or moded
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise EmupmemError(f"the owner of {name} cannot be set: {exc.strerror}", _sudo_hint(exc)) from exc

    def account(self, owner: str) -> tuple[int, int]:
        """(user id, group id) of `USER`, `USER:GROUP` or numbers; the user's own group if none is named.

        Raises EmupmemError for a name that the machine does not know.
        """
        user, colon, group = owner.partition(":")
        users = {f[0]: (int(f[2]), int(f[3])) for f in self._accounts("/etc/passwd", 7, user)}
        groups = {f[0]: int(f[2]) for f in self._accounts("/etc/group", 4, group)}
        if not user or (colon and not group):
            raise EmupmemError(f"{owner!r} is not USER or USER:GROUP")
        if user not in users and not user.isdecimal():
            raise EmupmemError(f"there is no user {user}", "getent passwd lists them")
        if group and group not in groups and not group.isdecimal():
            raise EmupmemError(f"there is no group {group}", "getent group lists them")
        uid, gid = users[user] if user in users else (int(user), int(user))
        return uid, (groups[group] if group in groups else int(group)) if group else gid

    def _accounts(self, file: str, fields: int, name: str) -> list[list[str]]:
        """Lines of a user or group file; on the running machine what other sources (LDAP) know of `name` too."""
        text = self.peek(file)
        if self.live and name:
            done = self.output("getent", file.rpartition("/")[2], "--", name)
            text += "\n" + (done.stdout.decode("utf-8", "replace") if done and not done.status else "")
        lines = [line.split(":") for line in text.splitlines()]
        return [
            f for f in lines if len(f) >= fields and f[2].isdecimal() and (fields < 7 or f[3].isdecimal())
        ]

    def users_of(self, number: str) -> list[str]:
        """`NAME (PID)` of the processes that have something of a mounted device open, mapped or as their folder."""
        major, _, minor = number.partition(":")
        device = os.makedev(int(major), int(minor))
        mapped = f" {int(major):02x}:{int(minor):02x} "
        found = []
        for pid in sorted((n for n in self.names("/proc") if n.isdigit()), key=int):
            here = f"/proc/{pid}"
            held = [f"{here}/cwd", f"{here}/root", *(f"{here}/fd/{n}" for n in self.names(f"{here}/fd"))]
            if any(_on_device(Path(p), device) for p in held) or mapped in self.peek(f"{here}/maps"):
                found.append(f"{self.peek(f'{here}/comm')} (process {pid})")
        return found

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the one lock of all that changes this machine; Busy when another holds it.

        Meanwhile the umask is the usual one, so that rights do not hang on who calls.
        """
        umask = os.umask(0o022)
        try:
            with self._alone():
                yield
        finally:
            os.umask(umask)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        folder = self.path(BACKUPS)
        try:
            _make_folder(folder, 0o700)
            descriptor = os.open(
                folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except OSError as exc:
            raise EmupmemError(
                f"{BACKUPS} cannot be written: {exc.strerror}", _write_hint(exc), state=UNCHANGED
            ) from exc
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise _locked(os.read(descriptor, 20).decode("ascii", "replace").strip()) from exc
            with contextlib.suppress(
                OSError
            ):  # a full disk must not stop a rollback; the number is a courtesy
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            self.held = descriptor
            yield
        finally:
            if self.held is not None:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # whatever a program left running
            self.held = None
            os.close(descriptor)

    # Programs --------------------------------------------------------------------------------

    def find(self, program: str) -> str | None:
        """Absolute path of a program on the fixed PATH, None where it is missing."""
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
            out, err = _listen(child, timeout)
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            _end(child)
            raise EmupmemError(f"{name} did not finish within {timeout:g} seconds and was ended") from None
        except OverflowError:
            _end(child)
            raise EmupmemError(f"{name} printed more than {MOST_OUTPUT >> 20} MiB and was ended") from None
        finally:
            for pipe in (child.stdout, child.stderr):
                assert pipe is not None
                pipe.close()
        return Completed(child.returncode, out, err)

    def output(self, *argv: str, timeout: float = 30) -> Completed | None:
        """Like run, for programs that may be missing or fail: None where they cannot be run."""
        try:
            return self.run(Command(argv), timeout)
        except EmupmemError:
            return None

    # What the kernel shows ----------------------------------------------------------------------

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0

    @property
    def architecture(self) -> str:
        return platform.machine()

    def firmware_entries(self) -> list[tuple[int, str, str, str]]:
        """(index, start, end, type) of /sys/firmware/memmap, as text."""
        folder = "/sys/firmware/memmap"
        return [
            (int(n), *(self.peek(f"{folder}/{n}/{field}") for field in ("start", "end", "type")))  # type: ignore[misc]
            for n in self.names(folder)
            if n.isdigit()
        ]

    def huge_page_bytes(self) -> int:
        """RAM that is kept as huge pages now, of all sizes, in bytes."""
        base = "/sys/kernel/mm/hugepages"
        sizes = [(n, found[1]) for n in self.names(base) if (found := re.fullmatch(r"hugepages-(\d+)kB", n))]
        return sum(
            (_number(self.peek(f"{base}/{n}/nr_hugepages")) or 0) * int(kib) * 1024 for n, kib in sizes
        )

    def nodes(self) -> tuple[NodeRange, ...]:
        """Memory ranges of the NUMA nodes by sysfs, each node's gaps filled where no other node lies in them.

        RAM that is reserved has no memory blocks; the gap it leaves inside a node is the node's.
        A single node has all the memory there is.
        """
        base = "/sys/devices/system/node"
        try:
            block = int(self.peek("/sys/devices/system/memory/block_size_bytes"), 16)
        except ValueError:
            return ()
        blocks: list[tuple[int, int]] = []
        nodes = [int(n[4:]) for n in self.names(base) if re.fullmatch(r"node\d+", n)]
        for node in nodes:
            numbers = [n[6:] for n in self.names(f"{base}/node{node}") if re.fullmatch(r"memory\d+", n)]
            blocks += [(int(n) * block, node) for n in numbers]
        if len(nodes) == 1:
            return (NodeRange(nodes[0], 0, 1 << 52),)
        regions = [(r.start, r.numa_node) for r in self.regions() if r.start is not None]
        blocks += [(start, node) for start, node in regions if node is not None]
        out: list[NodeRange] = []
        for start, node in sorted(blocks):
            if out and out[-1].node == node:
                out[-1] = NodeRange(node, out[-1].start, start + block)
            else:
                out.append(NodeRange(node, start, start + block))
        return tuple(out)

    def regions(self) -> tuple[Region, ...]:
        """The libnvdimm regions that carry persistent memory, with the block device of each."""
        bus = "/sys/bus/nd/devices"
        found = [self._region(bus, n) for n in self.names(bus) if re.fullmatch(r"region\d+", n)]
        return tuple(sorted(found, key=lambda r: (r.start is None, r.start, r.name)))

    def _region(self, bus: str, name: str) -> Region:
        here = f"{bus}/{name}"
        claims = [c for c in self.names(here) if re.fullmatch(r"(namespace|pfn|btt|dax)\d+\.\d+", c)]
        # The block device hangs on the namespace, or on the pfn or btt device that claimed it.
        owner = next((c for c in claims if self.names(f"{here}/{c}/block")), "")
        block = next(iter(self.names(f"{here}/{owner}/block")), "") if owner else ""
        namespace = owner or next((c for c in claims if c.startswith("namespace")), "")
        mode = self.peek(f"{here}/{namespace}/mode") if namespace else ""
        driver = (
            self.path(f"{here}/{namespace}/driver").name if self.exists(f"{here}/{namespace}/driver") else ""
        )
        provider = self.path(here).parent
        return Region(
            name,
            _number(self.peek(f"{here}/size")) or 0,
            _number(self.peek(f"{here}/resource")),
            _peek(provider / "provider"),
            _number(self.peek(f"{here}/numa_node")),
            block,
            (_number(self.peek(f"/sys/class/block/{block}/size")) or 0) * 512 if block else 0,
            {"1": True, "0": False}.get(self.peek(f"/sys/class/block/{block}/queue/dax")) if block else None,
            mode,
            driver,
        )

    def settle(self) -> None:
        """Wait until udev has nothing more to do, so that a healthy device is not reported missing."""
        self.output("udevadm", "settle", "--timeout=10")

    def kernel_banner(self, image: str) -> str:
        """The version text inside a kernel image (boot protocol header, offset 0x20e); empty if none.

        It tells the stable number that `uname -r` of a distribution hides.
        """
        try:
            with self.path(image).open("rb") as file:
                head = file.read(0x10000)
        except OSError:
            return ""
        if head[0x202:0x206] != b"HdrS":
            return ""
        start = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
        text = head[start : start + 512].split(b"\0")[0].decode("ascii", "replace")
        return f"Linux version {text}" if text else ""

    def kernel_config(self, release: str) -> tuple[str, str]:
        """(file, text) of the build configuration of a kernel; two empty strings where none is kept."""
        for name in (
            f"/boot/config-{release}",
            f"/usr/lib/modules/{release}/config",
            f"/lib/modules/{release}/config",
            f"/usr/lib/modules/{release}/build/.config",
        ):
            text = self.peek(name)
            if text:
                return name, text
        if self.live and release == platform.release():
            with contextlib.suppress(OSError, EOFError):
                return "/proc/config.gz", gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
        return "", ""

    def grub_cfg(self) -> str:
        """Where the generated menu lies (the first that exists, else Debian's place).

        Red Hat's family up to 8 has it in the EFI system partition, where others have a stub that leads to it.
        """
        here = next((name for name in GRUB_CFGS if self.exists(name)), "")
        # A menu of BIOS times may still be there: what UEFI started was not that one.
        own = self._esp_menu() if not here or self.exists("/sys/firmware/efi") else ""
        return own or here or GRUB_CFGS[0]

    def _esp_menu(self) -> str:
        """The menu in the EFI system partition that belongs to this system, empty where there is none."""
        names = [f"{ESP_FOLDERS}/{n}/grub.cfg" for n in self.names(ESP_FOLDERS)]
        folders = {self.real(m).rpartition("/")[0] for m in ESP_MARKS if self.exists(m)}
        full = [n for n in names if (text := self.peek(n)) and not grubcfg.is_stub(text)]
        own = [n for n in full if self.real(n).rpartition("/")[0] in folders]
        alone = len(full) == 1 and not any(self.exists(n) for n in GRUB_CFGS)
        return next(iter(own or (full if alone else [])), "")

    def grub_cfgs(self) -> list[str]:
        """The menus that lie here, one name for each file."""
        names = [n for n in (*GRUB_CFGS, self.grub_cfg()) if self.exists(n)]
        return list({self.path(name): name for name in reversed(names)}.values())

    def grubenv_name(self) -> str:
        """Where GRUB's environment block lies: next to the menu, else in one of its usual places."""
        beside = self.grub_cfg().rpartition("/")[0] + "/grubenv"
        return next((n for n in (beside, *GRUBENVS) if self.exists(n)), beside)

    def grubenv(self) -> dict[str, str]:
        """Variables of GRUB's environment block."""
        name = self.grubenv_name()
        if self.torn_grubenv():
            return _variables((self.read_aside(name) or b"").decode("utf-8", "replace"))
        return _variables(self.peek(name))

    def torn_grubenv(self) -> bool:
        """Whether a program that was killed left half an environment block, and the whole one is kept next to it."""
        name = self.grubenv_name()
        return self.is_aside(name) and not self.peek(name).startswith("# GRUB Environment Block")

    def set_grubenv(self, name: str, value: str) -> None:
        """Set or (with an empty value) unset a variable of GRUB's environment block. Raises EmupmemError."""
        file = self.grubenv_name()
        program = next((p for p in ("grub-editenv", "grub2-editenv") if self.find(p)), None)
        if program is None:
            raise EmupmemError("grub-editenv is not installed", "apt-get install grub-common")
        words = ("set", f"{name}={value}") if value else ("unset", name)
        # grub-editenv empties the file before it writes: it is given a copy, which then takes its place.
        target = self.path(file)
        fresh = _fresh(target)
        try:
            if target.exists():  # else it makes one
                _write_like(fresh, target.read_bytes(), target)
            done = self.run(Command((program, str(fresh), *words), "tell GRUB's next start"))
            if done.status or _variables(_peek(fresh)).get(name, "") != value:
                raise EmupmemError(f"{file} cannot be written: {done.last_words or 'it stays as it was'}")
            _sync_file(fresh)
            fresh.rename(target)
            _sync_folder(target.parent)
        except OSError as exc:
            raise EmupmemError(f"{file} cannot be written: {exc.strerror}", _write_hint(exc)) from exc
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()

    def generator(self) -> Command | None:
        """The program that makes grub.cfg from the defaults, None where there is none.

        grub-mkconfig is told to write the menu that lies here.
        """
        for name in GENERATORS:
            if self.find(name):
                argv = (name, "-o", self.grub_cfg()) if name.endswith("mkconfig") else (name,)
                return Command(argv, "make grub.cfg from /etc/default/grub")
        return None


class Interrupts:
    """Signals that ask us to stop, held back until a safe moment: `check()` raises then."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.caught = 0

    def check(self) -> None:
        """Raises EmupmemError if a signal came."""
        if self.caught:
            name, self.caught = signal.Signals(self.caught).name, 0
            raise EmupmemError(f"stopped by {name}", state=UNCHANGED)


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Hold back SIGINT, SIGTERM and SIGHUP while a change is under way."""
    state = Interrupts()

    def note(number: int, frame: FrameType | None) -> None:
        state.caught = number

    before = {number: signal.signal(number, note) for number in Interrupts.SIGNALS}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stamp() -> str:
    """This moment for the name of a backup: ISO 8601, UTC, microseconds so that two never meet."""
    now = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now // 1000 % 10**6:06d}Z"


def wait_for(ready: Callable[[], bool], seconds: float) -> bool:
    """Ask until it is so or the time is over."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
    return True


def _locked(who: str) -> Busy:
    """The error of who finds the lock taken by process `who`, or by what that one started."""
    if who.isdigit() and not _is_running(int(who)):
        return Busy(
            f"a program started by a killed emupmem (PID {who}) is still running",
            f"wait until it has finished; fuser {BACKUPS}/lock names it",
        )
    return Busy(
        f"another emupmem is at work{f' (process {who})' if who.isdigit() else ''}",
        "wait until it has finished",
    )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _listen(child: subprocess.Popen[bytes], timeout: float) -> tuple[bytes, bytes]:
    """What a program prints until it has ended: something that it left running may still have its pipes.

    Raises TimeoutExpired, and OverflowError where it prints without end.
    """
    end, size = time.monotonic() + timeout, 0
    parts: dict[object, list[bytes]] = {child.stdout: [], child.stderr: []}
    with selectors.DefaultSelector() as waiting:
        for pipe in parts:
            waiting.register(cast(BinaryIO, pipe), selectors.EVENT_READ)
        while waiting.get_map():
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(child.args, timeout)
            ready = waiting.select(min(left, 1))
            if not ready and child.poll() is not None:
                break
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                size += len(data)
                parts[key.fileobj].append(data)
                if not data:
                    waiting.unregister(key.fileobj)
                if size > MOST_OUTPUT:
                    raise OverflowError
    return b"".join(parts[child.stdout]), b"".join(parts[child.stderr])


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a program and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _write_like(fresh: Path, data: bytes, model: Path, mode: int = 0o644) -> None:
    """Create `fresh` with `data` and the mode, owner and attributes of `model`, safely on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    descriptor = os.open(fresh, flags, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        _copy_attributes(descriptor, model, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_attributes(descriptor: int, model: Path, mode: int) -> None:
    try:
        info = model.stat()
    except FileNotFoundError:
        os.fchmod(descriptor, mode)
        return
    ours = os.fstat(descriptor)
    if (ours.st_uid, ours.st_gid) != (info.st_uid, info.st_gid):
        os.fchown(descriptor, info.st_uid, info.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(info.st_mode))
    for name in os.listxattr(model):
        try:
            os.setxattr(descriptor, name, os.getxattr(model, name))
        except OSError as exc:
            # In a plain tree without root, attributes that only root may set cannot be kept.
            if exc.errno != errno.EPERM or os.geteuid() == 0:
                raise


def _on_device(path: Path, device: int) -> bool:
    try:
        return path.stat().st_dev == device
    except OSError:
        return False


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.emupmem-old")


def _same(one: Path, other: Path) -> bool:
    """Whether two files have the same content, mode and owner."""
    first, second = one.stat(), other.stat()
    rights = [(i.st_mode, i.st_uid, i.st_gid) for i in (first, second)]
    return rights[0] == rights[1] and one.read_bytes() == other.read_bytes()


def _half(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}.new")


def _fresh(target: Path) -> Path:
    return target.with_name(f".{target.name}.emupmem-new")


def _variables(text: str) -> dict[str, str]:
    """What an environment block of GRUB's says."""
    pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {key: value for key, eq, value in pairs if eq}


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _make_folder(folder: Path, mode: int) -> None:
    """Make a folder and those above it, so that a power cut does not lose their names."""
    for path in [p for p in (*reversed(folder.parents), folder) if not p.exists()]:
        path.mkdir(mode=mode if path == folder else 0o755, exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sudo_hint(exc: OSError) -> str:
    return "run it with sudo" if exc.errno in (errno.EACCES, errno.EPERM) and os.geteuid() else ""


def _write_hint(exc: OSError) -> str:
    hints = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EBUSY: "the file is a mount point of its own",
    }
    if exc.errno == errno.EPERM and os.geteuid() == 0:
        return "it may be immutable (lsattr shows i): chattr -i takes that away"
    return _sudo_hint(exc) or hints.get(exc.errno or 0, "")


def _peek(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def kernel_folder(real: str) -> str:
    """The folder of `KERNEL_FOLDERS` that a name without links is in, empty where it is elsewhere.

    In /dev a mistyped device would become a regular file in RAM, and stand in the way of the device itself;
    /dev/shm is for files.
    """
    if real.startswith("/dev/shm/"):  # noqa: S108 (only compared)
        return ""
    return next((t for t in KERNEL_FOLDERS if real == t or real.startswith(f"{t}/")), "")


def refuse_kernel_folder(name: str, real: str) -> None:
    """Raise EmupmemError for a file to be made in such a folder; `real` is the name once links are followed."""
    top = kernel_folder(real)
    if top:
        where = f" ({real})" if real != name else ""
        raise EmupmemError(
            f"{name}{where}: emupmem makes no files in {top}",
            "give a file in another folder, or the right name of a device: ls /dev/pmem* /dev/dax* shows them",
        )


def standard_streams() -> None:
    """Have descriptors 0 to 2 open: a file that we open must not become anybody's standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


class _Resumed(io.RawIOBase):
    """A stream that cannot go back, of which the first bytes are already read: here they come again."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self.head, self.stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.head or self.stream.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        self.head = b""
        return len(data)


def _with_a_head(stream: BinaryIO) -> BinaryIO:
    """The same content; of a pipe, whose writer may begin with a single byte, the first two are there."""
    if stream.seekable():
        return stream
    return io.BufferedReader(_Resumed(stream.read(len(GZIP)), stream), 1 << 16)


@contextlib.contextmanager
def given_file(name: str) -> Iterator[BinaryIO]:
    """A file that the user named, `-` for standard input; pipes such as bash's <( ) are files too.

    Raises EmupmemError.
    """
    if name == "-":
        yield _with_a_head(sys.stdin.buffer)
        return
    try:
        with Path(name).open("rb") as file:
            yield _with_a_head(file)
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be read: {exc.strerror}", _sudo_hint(exc)) from exc


def is_gzip(file: BinaryIO) -> bool:
    """Whether a stream of `given_file` begins as a gzip file does; nothing of it is consumed."""
    if isinstance(file, io.BufferedReader):
        return file.peek(2)[:2] == GZIP
    head = file.read(2)
    file.seek(-len(head), io.SEEK_CUR)
    return head == GZIP


def new_file(name: str, data: bytes, force: bool = False) -> None:
    """Write a file of the user's, whole or not at all, readable by its owner only.

    One that is there is refused, or with `force` replaced if it is a plain file. Raises EmupmemError.
    """
    target = Path(name)
    refuse_taken(name, force)
    # A name of its own and a rename only where something is replaced: a stick with FAT has no hard links.
    fresh = target.with_name(f".{target.name}.emupmem-new") if force else target
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if force:
            fresh.unlink(missing_ok=True)  # of a run that was killed
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                fresh.rename(target)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
        _sync_folder(target.parent)
    except FileExistsError as exc:
        raise EmupmemError(f"{name} is there already", "--force replaces it") from exc
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be written: {exc.strerror}", _sudo_hint(exc)) from exc


def refuse_taken(name: str, force: bool) -> None:
    """Raise EmupmemError where a new file of that name would go over something else."""
    target = Path(name)
    refuse_kernel_folder(name, os.path.realpath(name))
    if not target.name or target.is_dir():
        raise EmupmemError(f"{name} is a folder", "give the name of a file in it")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_file():
        raise EmupmemError(f"{name} is no plain file", "give another name")
    if not force:
        raise EmupmemError(f"{name} is there already", "--force replaces it")
