# SPDX-License-Identifier: Apache-2.0
"""Keeps the content of a device as a sparse raw image, and brings it back.

The image is a plain copy of the device, holes where it is zero, so QEMU can use it as it is. Its
checksum is a list of CRC-32, one for each 256 KiB, hashed with SHA-256: it tells damage, not malice,
and costs little beside the copying, in threads, because zlib gives the interpreter's lock away. It travels
with the image in the extended attribute `user.emupmem`, else in a file beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from emupmem.device.blocks import Pmem, devices, mounted_at, mounts
from emupmem.device.checksum import (
    attach_checksum,
    digest_of,
    known_checksum,
    read_sidecar,
    unverified_error,
    write_sidecar,
)
from emupmem.device.chunks import (
    CHUNK,
    FLUSH,
    HEAD,
    ZERO,
    Buffer,
    Buffers,
    Opener,
    Progress,
    in_parallel,
    open_device,
    opened_file,
    read_piece,
    silent,
    size_of_open,
    write_piece,
    zero_crc,
)
from emupmem.device.freeze import frozen
from emupmem.device.unit import SIDECAR
from emupmem.model import MIB, Busy, EmupmemError
from emupmem.record import record
from emupmem.system import log
from emupmem.system.errors import os_failures
from emupmem.system.files import refuse_kernel_folder, sync_folder
from emupmem.system.machine import Machine
from emupmem.units import human


@record
class Snapshot:
    """What was saved or restored: bytes, seconds; `checksum` is empty where it was not verified."""

    file: str
    device: str
    size: int
    allocated: int
    seconds: float
    checksum: str


# Which device ------------------------------------------------------------------------------------


def _ours(machine: Machine) -> tuple[Pmem, ...]:
    return tuple(d for d in devices(machine) if d.item is not None)


def choose_device(machine: Machine, name: str | None) -> Pmem:
    """The device of that name, or the only one there is. Raises EmupmemError for any other disk."""
    ours = _ours(machine)
    if name is None:
        if len(ours) == 1:
            return ours[0]
        if ours:
            listed = ", ".join(d.dev for d in ours)
            raise EmupmemError(f"there are {len(ours)} devices: {listed}", "name the one you mean")
        raise EmupmemError(
            "there is no device of emulated persistent memory", "sudo emupmem verify shows why"
        )
    absolute = str(Path(name).absolute())
    for device in ours:
        if machine.path(absolute) == machine.path(device.dev):
            return device
    if not machine.exists(absolute):
        raise EmupmemError(f"{name} does not exist", _which(ours))
    if absolute.startswith("/dev/dax"):
        raise EmupmemError(
            f"{name} is a DAX device: only the content of pmem devices is saved and restored", _which(ours)
        )
    raise EmupmemError(f"{name} is not a device that memmap= made: it is left alone", _which(ours))


def _which(ours: Sequence[Pmem]) -> str:
    if ours:
        return f"the devices of this machine: {', '.join(d.dev for d in ours)}"
    return "there is none; sudo emupmem verify shows why"


def _source(machine: Machine, source: str | None) -> tuple[Pmem, str]:
    """The device to save, and the mount point to freeze, empty where it is not mounted."""
    if source is not None and machine.path(Path(source).absolute()).is_dir():
        where = machine.real(str(Path(source).absolute()))
        found = [m for m in mounts(machine) if m.dir == where]
        for device in _ours(machine):
            if found and found[-1].number == device.number:
                return device, where
        what = "is not a device that memmap= made" if found else "is not a mount point"
        raise EmupmemError(f"{source} {what}", _which(_ours(machine)))
    device = choose_device(machine, source)
    where = mounted_at(machine, device)
    if where:
        raise EmupmemError(
            f"{device.dev} is mounted on {where}", f"save {where} instead: it is frozen while it is saved"
        )
    return device, ""


# Save -----------------------------------------------------------------------------------------------


def save_image(
    machine: Machine,
    target: str,
    source: str | None = None,
    progress: Progress = silent,
    opener: Opener = open_device,
) -> Snapshot:
    """Copy a device, or the one behind a mount point, into a sparse image with a checksum.

    A mounted file system is frozen for the time of the copy, and thawed whatever happens. At every
    moment `target` is the old image, whole, or the new one. Raises EmupmemError.
    """
    begun = time.monotonic()
    device, where = _source(machine, source)
    path = _target(target)
    if where and _same_disk(path.parent, machine.path(where)):
        raise EmupmemError(f"{target} is on the file system that is to be saved", "save it elsewhere")
    with opened_file(opener, device.dev, os.O_RDONLY | (0 if where else os.O_EXCL)) as disk:
        size = size_of_open(disk)
        with _fresh(path) as (fresh, image), os_failures(f"{target} cannot be written"):
            # Frozen for the copy only: to reach the disk may take much longer.
            with frozen(str(machine.path(where))) if where else contextlib.nullcontext():
                _require_room(image, disk, size, progress)
                os.ftruncate(image, size)
                sums = _copy(disk, image, size, progress)
            checksum = digest_of(size, sums)
            progress("to the disk", size, size)
            _finish(path, fresh, image, checksum)
            allocated = os.fstat(image).st_blocks * 512
    return Snapshot(str(path), device.dev, size, allocated, time.monotonic() - begun, checksum)


def _same_disk(one: Path, other: Path) -> bool:
    """Whether two folders are on one file system: what is frozen could not be written to."""
    return one.stat().st_dev == other.stat().st_dev


def _target(name: str) -> Path:
    """Where the image shall be: a regular file, or nothing yet, in a folder that is there."""
    path = Path(name).absolute().parent.resolve() / Path(name).name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        refuse_kernel_folder(name, str(path))
        if not path.parent.is_dir():
            raise EmupmemError(f"{path.parent} is not a folder") from None
        return path
    except OSError as exc:
        raise EmupmemError(f"{name} cannot be written: {exc.strerror}") from exc
    if not stat.S_ISREG(mode):
        raise EmupmemError(f"{name} is {_kind(mode)}", "give the name of a file: it is replaced as a whole")
    refuse_kernel_folder(name, str(path))
    return path


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISBLK, "a disk"))
    return next((word for test, word in kinds if test(mode)), "not a regular file")


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside the target, locked, readable by its owner only; gone again unless renamed."""
    fresh = path.with_name(f".{path.name}.emupmem-new")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os_failures(f"{path} cannot be written"):
        image = os.open(fresh, flags, 0o600)
    try:
        _claim(path, fresh, image)
        try:
            yield fresh, image
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
    finally:
        os.close(image)


def _claim(path: Path, fresh: Path, image: int) -> None:
    """Make sure that the new file is ours alone: not another run's, nor a trap in an open folder."""
    try:
        fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = fresh.lstat()
    except OSError:
        raise Busy(f"another emupmem is saving to {path}", "wait until it has finished") from None
    info = os.fstat(image)
    same = (there.st_dev, there.st_ino) == (info.st_dev, info.st_ino)
    if not same or not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or info.st_uid != os.geteuid():
        raise EmupmemError(f"{fresh} is in the way", "remove it")
    os.ftruncate(image, 0)  # what a run that was killed left
    os.fchmod(image, 0o600)


def _require_room(image: int, disk: int, size: int, progress: Progress) -> None:
    """Refuse before anything is written where the image cannot fit."""
    room = os.fstatvfs(image)
    free = room.f_bavail * room.f_frsize
    if free >= size + size // 256:
        return
    # Only now is it worth a look at how much of the device is in use.
    buffers = Buffers()

    def used(at: int) -> int:
        length = min(CHUNK, size - at)
        with buffers.one() as buffer:
            read_piece(disk, buffer.view[:length], at)
            return sum(end - start for start, end in buffer.pieces(length))

    needed = sum(in_parallel(size, used, progress, "counting"))
    needed += needed // 256 + MIB  # what the file system writes beside it
    if needed > free:
        raise EmupmemError(
            f"the image needs {human(needed)} and there are {human(free)}", "choose a file on another disk"
        )


def _copy(disk: int, image: int, size: int, progress: Progress) -> list[int]:
    """Copy what is not zero; gives the CRC of each chunk."""
    buffers = Buffers()

    def one(at: int) -> int:
        length = min(CHUNK, size - at)
        with buffers.one() as buffer:
            read_piece(disk, buffer.view[:length], at)
            for start, end in buffer.pieces(length):
                write_piece(image, buffer.view[start:end], at + start)
            crc = buffer.crc(length)
        if (at + CHUNK) % FLUSH == 0:
            # Writing begins now, not at the end; and the cache keeps what it had.
            os.posix_fadvise(image, at + CHUNK - FLUSH, FLUSH, os.POSIX_FADV_DONTNEED)
        return crc

    return list(in_parallel(size, one, progress, "saving"))


def _finish(path: Path, fresh: Path, image: int, checksum: str) -> None:
    """Onto the disk, then the checksum, then the name: no crash gives a mixture."""
    sidecar = path.with_name(path.name + SIDECAR)
    inside = attach_checksum(image, checksum)
    os.fsync(image)
    if not inside:
        # Both sums are good until the rename is: the content tells which of the two images it is.
        write_sidecar(sidecar, (*read_sidecar(sidecar), checksum))
    fresh.rename(path)
    sync_folder(path.parent)
    log.place("wrote", path)
    if inside:
        sidecar.unlink(missing_ok=True)
    else:
        write_sidecar(sidecar, (checksum,))


# Restore --------------------------------------------------------------------------------------------


def restore_image(
    machine: Machine,
    file: str,
    name: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    opener: Opener = open_device,
) -> Snapshot:
    """Put an image back onto a device: all of it is checked before the first byte is written.

    The first MiB, where every file system has its superblock, is zero until all the rest is there:
    a restore that was interrupted leaves no file system that looks whole. `force` takes an image
    without a checksum, or with a wrong one, as it is. Raises EmupmemError.
    """
    begun = time.monotonic()
    device = choose_device(machine, name)
    where = mounted_at(machine, device)
    if where:
        raise EmupmemError(f"{device.dev} is mounted on {where}", f"umount {where}")
    with _image(file) as image, opened_file(opener, device.dev, os.O_RDWR | os.O_EXCL) as disk:
        size = size_of_open(disk)
        info = os.fstat(image)
        if info.st_size != size:
            raise EmupmemError(
                f"{file} has {human(info.st_size)} ({info.st_size} bytes), {device.dev} {human(size)} ({size})",
                "an image fits only a device of the same size; nothing was written",
            )
        known = known_checksum(Path(file), image)
        with os_failures(f"{file} cannot be read"):
            sums = list(in_parallel(size, _reader(image, size), progress, "checking"))
        checksum = digest_of(size, sums)
        if checksum not in known and not force:
            raise unverified_error(file, known)
        _put_back(device.dev, image, disk, size, sums, progress)
    log.file(machine, "wrote", device.dev)
    verified = checksum if checksum in known else ""
    return Snapshot(file, device.dev, size, info.st_blocks * 512, time.monotonic() - begun, verified)


def is_blank(machine: Machine, name: str | None, opener: Opener = open_device) -> bool:
    """Whether a device is zero from end to end: nothing on it could be lost."""
    buffer = Buffer()
    with opened_file(opener, choose_device(machine, name).dev, os.O_RDONLY) as disk:
        size = size_of_open(disk)
        for at in range(0, size, CHUNK):
            length = min(CHUNK, size - at)
            read_piece(disk, buffer.view[:length], at)
            if buffer.crc(length) != zero_crc(length):
                return False
    return True


@contextlib.contextmanager
def _image(file: str) -> Iterator[int]:
    with os_failures(f"{file} cannot be read"):
        image = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(image).st_mode
        if not stat.S_ISREG(mode):
            raise EmupmemError(f"{file} is {_kind(mode)}, not an image", "emupmem save makes one")
        yield image
    finally:
        os.close(image)


def _reader(image: int, size: int) -> Callable[[int], int]:
    """Gives the CRC of the chunk at an offset; a chunk that is all hole is not read."""
    buffers = Buffers()

    def one(at: int) -> int:
        length = min(CHUNK, size - at)
        if _next_data(image, at) >= at + length:
            return zero_crc(length)
        with buffers.one() as buffer:
            read_piece(image, buffer.view[:length], at)
            return buffer.crc(length)

    return one


def _next_data(image: int, at: int) -> int:
    try:
        return os.lseek(image, at, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # only a hole from here to the end
            return 1 << 62
        return at


def _put_back(dev: str, image: int, disk: int, size: int, sums: Sequence[int], progress: Progress) -> None:
    """Write the whole device, zeros too; the first chunk is zero until all others are written."""
    buffers = Buffers()

    def one(at: int) -> int:
        length = min(CHUNK, size - at)
        with buffers.one() as buffer:
            view, crc = ZERO.view[:length], zero_crc(length)
            if _next_data(image, at) < at + length:
                view = buffer.view[:length]
                read_piece(image, view, at)
                crc = buffer.crc(length)
            if crc != sums[at // CHUNK]:
                raise EmupmemError("the image changed while it was read")
            write_piece(disk, view, at)
        return 0

    head = range(0, min(HEAD, size), CHUNK)
    try:
        for at in head:
            write_piece(disk, ZERO.view[: min(CHUNK, size - at)], at)
        os.fsync(disk)
        for _ in in_parallel(size, one, progress, "restoring", HEAD):
            pass
        os.fsync(disk)
        for at in head:
            one(at)
        os.fsync(disk)
    except (OSError, EmupmemError) as exc:
        why = exc.message if isinstance(exc, EmupmemError) else exc.strerror
        raise EmupmemError(
            f"{dev} was restored in part only: {why}", "its first MiB is empty now; restore it again"
        ) from exc
