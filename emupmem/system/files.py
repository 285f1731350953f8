# SPDX-License-Identifier: Apache-2.0
"""Writing files, each of them whole at every moment."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from emupmem.model import UNCHANGED, EmupmemError
from emupmem.system import log
from emupmem.system.errors import sudo_hint, write_hint
from emupmem.system.machine import Machine


def kernel_folder(real: str) -> str:
    """The folder of `KERNEL_FOLDERS` that a name without links is in, empty where it is elsewhere.

    In /dev a mistyped device would become a regular file in RAM, and stand in the way of the device itself;
    /dev/shm is for files.
    """
    if real.startswith("/dev/shm/"):  # noqa: S108 (only compared)
        return ""
    return next((t for t in KERNEL_FOLDERS if real == t or real.startswith(f"{t}/")), "")


KERNEL_FOLDERS = ("/dev", "/proc", "/sys")
"""What lies there is made by the kernel or udev, not by us."""


def replace_file(machine: Machine, name: str, data: bytes, mode: int = 0o644) -> None:
    """Put `data` into a file so that at every moment the old or the new content is whole there.

    A new file beside the old one, fsync, rename, fsync of the folder. Mode, owner and extended
    attributes (ACLs and SELinux label are such) are the old file's (`mode` where there is none); a
    symbolic link stays one.
    Raises EmupmemError; the old file is then untouched and nothing is left beside it.
    """
    target = machine.path(name)
    fresh = fresh_name(target)
    try:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()  # of a run that was killed; the lock keeps others away
        write_like(fresh, data, target, mode)
        fresh.rename(target)
        sync_folder(target.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise EmupmemError(
            f"{name} cannot be written: {exc.strerror}", write_hint(exc), state=UNCHANGED
        ) from exc
    log.file(machine, "wrote", name)


def discard_file(machine: Machine, name: str) -> None:
    """Take one of our own small files away, if it can be."""
    with contextlib.suppress(OSError):
        machine.path(name).unlink()
        log.file(machine, "deleted", name)


def sync_written(machine: Machine, name: str) -> None:
    """Have a file that another program wrote safely on the disk. Raises EmupmemError."""
    target = machine.path(name)
    try:
        sync_file(target)
        sync_folder(target.parent)
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be synced: {exc.strerror}") from exc
    log.file(machine, "synced", name)


def install_file(machine: Machine, name: str, text: str | bytes, mode: int = 0o644) -> None:
    """Write a small file whole or not at all (with `mode` where it is new), with the folders above it."""
    try:
        make_synced_folder(machine.path(name).parent, 0o755)
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be written: {exc.strerror}", write_hint(exc)) from exc
    replace_file(machine, name, text if isinstance(text, bytes) else text.encode(), mode)


def make_link(machine: Machine, name: str, target: str) -> None:
    """Make a symbolic link; one that is there already is replaced. Raises EmupmemError."""
    place = machine.path(name.rpartition("/")[0]) / name.rpartition("/")[2]
    try:
        make_synced_folder(place.parent, 0o755)
        place.unlink(missing_ok=True)
        place.symlink_to(target)
        sync_folder(place.parent)
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be linked: {exc.strerror}", write_hint(exc)) from exc
    log.file(machine, f"linked to {target}", name)


def delete_file(machine: Machine, name: str) -> None:
    """Take a file or a link away (never what a link leads to). Raises EmupmemError."""
    place = machine.path(name.rpartition("/")[0]) / name.rpartition("/")[2]
    try:
        place.unlink(missing_ok=True)
        if place.parent.is_dir():
            sync_folder(place.parent)
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be removed: {exc.strerror}", write_hint(exc)) from exc
    log.file(machine, "deleted", name)


def drop_folder(machine: Machine, name: str) -> None:
    """Take a folder away if it is empty."""
    with contextlib.suppress(OSError):
        machine.path(name).rmdir()
        log.file(machine, "deleted", name)
        sync_folder(machine.path(name).parent)


def write_sysfs(machine: Machine, name: str, text: str) -> None:
    """Write a word to a file of sysfs, in one piece and in place. Raises EmupmemError."""
    try:
        descriptor = os.open(machine.path(name), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"{text}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise EmupmemError(f"{text!r} cannot be written to {name}: {exc.strerror}", sudo_hint(exc)) from exc
    log.file(machine, f"wrote {text!r} to", name)


@contextlib.contextmanager
def scratch_file(machine: Machine, size: int) -> Iterator[str]:
    """A file of zeros that is gone afterwards."""
    with tempfile.NamedTemporaryFile(prefix="emupmem-") as file:
        file.truncate(size)
        file.flush()
        yield file.name


def make_sparse_file(machine: Machine, name: str, size: int) -> None:
    """Make a file of `size` bytes of holes, readable by its owner only; never one that is there.

    Raises EmupmemError.
    """
    place = machine.path(name)
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
        raise EmupmemError(f"{name} cannot be made: {exc.strerror}", sudo_hint(exc)) from exc
    log.file(machine, "made, sparse", name)


def make_folders(machine: Machine, name: str) -> None:
    """Make a folder and those above it, mode 0755. Raises EmupmemError."""
    try:
        for parent in [*reversed(Path(name).parents), Path(name)]:
            if not machine.path(parent).exists():
                machine.path(parent).mkdir(mode=0o755)
                log.file(machine, "made the folder", str(parent))
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be made: {exc.strerror}", write_hint(exc)) from exc


def set_mount_owner(
    machine: Machine, name: str, number: str, owner: tuple[int, int] | None, mode: int | None
) -> bool:
    """Set owner and mode of the top folder of a mounted device; whether anything was changed.

    Only if the folder lies on that device. Raises EmupmemError.
    """
    try:
        descriptor = os.open(machine.path(name), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
            if owned or moded:
                log.file(machine, "set owner and mode of", name)
            return owned or moded
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise EmupmemError(f"the owner of {name} cannot be set: {exc.strerror}", sudo_hint(exc)) from exc


def write_like(fresh: Path, data: bytes, model: Path, mode: int = 0o644) -> None:
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
            # In a plain tree without root, attributes that only root may set cannot be kept; and where a file
            # system has none (FAT), the label that is read there is the kernel's own (SELinux).
            if exc.errno != errno.EOPNOTSUPP and (exc.errno != errno.EPERM or os.geteuid() == 0):
                raise


def fresh_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.emupmem-new")


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_synced_folder(folder: Path, mode: int) -> None:
    """Make a folder and those above it, so that a power cut does not lose their names."""
    for path in [p for p in (*reversed(folder.parents), folder) if not p.exists()]:
        path.mkdir(mode=mode if path == folder else 0o755, exist_ok=True)
        log.place("made the folder", path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_kernel_folder(name: str, real: str) -> None:
    """Raise EmupmemError for a file to be made in such a folder; `real` is the name once links are followed."""
    top = kernel_folder(real)
    if top:
        where = f" ({real})" if real != name else ""
        raise EmupmemError(
            f"{name}{where}: emupmem makes no files in {top}",
            "give a file in another folder, or the right name of a device: ls /dev/pmem* /dev/dax* shows them",
        )


def is_folder(place: Path) -> bool:
    """Whether a name that a person gave leads to a folder. Raises EmupmemError where that may not be seen."""
    try:
        return stat.S_ISDIR(place.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:
        raise EmupmemError(f"{place} cannot be read: {exc.strerror}", sudo_hint(exc)) from exc
