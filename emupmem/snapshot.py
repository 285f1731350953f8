"""Keeps the content of a device as a sparse raw image, and brings it back.

The image is a plain copy of the device, holes where it is zero, so QEMU can use it as it is. Its
checksum is a list of CRC-32, one for each 256 KiB, hashed with SHA-256: it tells damage, not malice,
and costs little beside the copying, in threads, because zlib gives the interpreter's lock away. It travels
with the image in the extended attribute `user.emupmem`, else in a file beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import mmap
import os
import stat
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

from emupmem.blocks import Pmem, devices, mounted_at, mounts
from emupmem.model import KIB, MIB, Busy, EmupmemError
from emupmem.system.files import refuse_kernel_folder
from emupmem.system.machine import Machine
from emupmem.units import human

CHUNK = 256 * KIB
"""What is copied and summed at once: it stays in the processor's cache from one to the other."""
TASK = 4 * MIB
"""What a thread does before it is given more."""
HEAD = MIB
"""Where every file system has its superblock."""
BLOCK = 4 * KIB
FLUSH = 32 * MIB
WORKERS = min(4, os.cpu_count() or 1)
ATTRIBUTE = "user.emupmem"
SIDECAR = ".emupmem"
FORMAT = "crc32-256k-sha256"
_ZERO_CHUNK, _ZERO_BLOCK = bytes(CHUNK), bytes(BLOCK)

# include/uapi/linux/fs.h
FIFREEZE, FITHAW, BLKGETSIZE64 = 0xC0045877, 0xC0045878, 0x80081272

Progress = Callable[[str, int, int], None]
"""Told what is being done, bytes done and bytes in all; an exception from it stops the work safely."""

Opener = Callable[[str, int], int]
"""Opens a device for exclusive use: name, flags -> descriptor. Tests put regular files here."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was saved or restored: bytes, seconds; `checksum` is empty where it was not verified."""

    file: str
    device: str
    size: int
    allocated: int
    seconds: float
    checksum: str


def silent(what: str, done: int, size: int) -> None:
    """The progress of nobody."""


def open_device(name: str, flags: int) -> int:
    """Open a block device past the page cache; with O_EXCL only if nobody else has claimed it.

    What programs store through DAX never passes the page cache of the block device: an old page
    there would be saved in place of the truth.
    """
    try:
        return os.open(name, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(f"{name} is in use", "mounted elsewhere, or swap, LVM or a loop device") from exc
        hint = "run it with sudo" if exc.errno in (errno.EACCES, errno.EPERM) else ""
        raise EmupmemError(f"{name} cannot be opened: {exc.strerror}", hint) from exc


# Which device ------------------------------------------------------------------------------------


def _ours(machine: Machine) -> tuple[Pmem, ...]:
    return tuple(d for d in devices(machine) if d.item is not None)


def choose(machine: Machine, name: str | None) -> Pmem:
    """The device of that name, or the only one there is. Raises EmupmemError for any other disk."""
    ours = _ours(machine)
    if name is None:
        if len(ours) == 1:
            return ours[0]
        if ours:
            listed = ", ".join(d.dev for d in ours)
            raise EmupmemError(f"there are {len(ours)} devices: {listed}", "name the one you mean")
        raise EmupmemError(
            "there is no device of emulated persistent memory", "sudo emupmem verify tells why"
        )
    absolute = str(Path(name).absolute())
    for device in ours:
        if machine.path(absolute) == machine.path(device.dev):
            return device
    if not machine.exists(absolute):
        raise EmupmemError(f"{name} does not exist", _which(ours))
    raise EmupmemError(f"{name} is not a device that memmap= made: it is left alone", _which(ours))


def _which(ours: Sequence[Pmem]) -> str:
    if ours:
        return f"the devices of this machine: {', '.join(d.dev for d in ours)}"
    return "there is none; sudo emupmem verify tells why"


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
    device = choose(machine, source)
    where = mounted_at(machine, device)
    if where:
        raise EmupmemError(
            f"{device.dev} is mounted on {where}", f"save {where} instead: it is frozen meanwhile"
        )
    return device, ""


# Save -----------------------------------------------------------------------------------------------


def save(
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
    with _opened(opener, device.dev, os.O_RDONLY | (0 if where else os.O_EXCL)) as disk:
        size = _size(disk)
        with _fresh(path) as (fresh, image), _failures(f"{target} cannot be written"):
            # Frozen for the copy only: to reach the disk may take much longer.
            with frozen(str(machine.path(where))) if where else contextlib.nullcontext():
                _require_room(image, disk, size, progress)
                os.ftruncate(image, size)
                sums = _copy(disk, image, size, progress)
            checksum = _digest(size, sums)
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
def _opened(opener: Opener, name: str, flags: int) -> Iterator[int]:
    descriptor = opener(name, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn the system's errors into words."""
    try:
        yield
    except OSError as exc:
        hints = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
        raise EmupmemError(f"{what}: {exc.strerror}", hints.get(exc.errno or 0, "")) from exc


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside the target, locked, readable by its owner only; gone again unless renamed."""
    fresh = path.with_name(f".{path.name}.emupmem-new")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with _failures(f"{path} cannot be written"):
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
    buffers = _Buffers()

    def used(at: int) -> int:
        length = min(CHUNK, size - at)
        with buffers.one() as buffer:
            _read(disk, buffer.view[:length], at)
            return sum(end - start for start, end in buffer.pieces(length))

    needed = sum(_each(size, used, progress, "counting"))
    needed += needed // 256 + MIB  # what the file system writes beside it
    if needed > free:
        raise EmupmemError(
            f"the image needs {human(needed)} and there are {human(free)}", "choose a file on another disk"
        )


def _copy(disk: int, image: int, size: int, progress: Progress) -> list[int]:
    """Copy what is not zero; gives the CRC of each chunk."""
    buffers = _Buffers()

    def one(at: int) -> int:
        length = min(CHUNK, size - at)
        with buffers.one() as buffer:
            _read(disk, buffer.view[:length], at)
            for start, end in buffer.pieces(length):
                _write(image, buffer.view[start:end], at + start)
            crc = buffer.crc(length)
        if (at + CHUNK) % FLUSH == 0:
            # Writing begins now, not at the end; and the cache keeps what it had.
            os.posix_fadvise(image, at + CHUNK - FLUSH, FLUSH, os.POSIX_FADV_DONTNEED)
        return crc

    return list(_each(size, one, progress, "saving"))


def _finish(path: Path, fresh: Path, image: int, checksum: str) -> None:
    """Onto the disk, then the checksum, then the name: no crash gives a mixture."""
    sidecar = path.with_name(path.name + SIDECAR)
    inside = _attach(image, checksum)
    os.fsync(image)
    if not inside:
        # Both sums are good until the rename is: the content tells which of the two images it is.
        write_sidecar(sidecar, (*read_sidecar(sidecar), checksum))
    fresh.rename(path)
    _sync_folder(path.parent)
    if inside:
        sidecar.unlink(missing_ok=True)
    else:
        write_sidecar(sidecar, (checksum,))


def _attach(image: int, checksum: str) -> bool:
    """Put the checksum into the file's attributes; False where the file system has none for users."""
    try:
        os.setxattr(image, ATTRIBUTE, checksum.encode())
    except OSError as exc:
        if exc.errno in (errno.ENOTSUP, errno.EPERM, errno.ENOSPC):
            return False
        raise
    return True


def write_sidecar(path: Path, sums: Sequence[str]) -> None:
    """Keep checksums in a file of their own, replaced as a whole; the last two at most."""
    fresh = path.with_name(f".{path.name}-sum")  # not the name of the new image
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, "".join(f"{one}\n" for one in sums[-2:]).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.rename(path)
    _sync_folder(path.parent)


def read_sidecar(path: Path) -> tuple[str, ...]:
    """The checksums beside an image; none where there is no such file."""
    try:
        return tuple(path.read_text("ascii", "replace").split("\n")[:-1])
    except OSError:
        return ()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Frozen ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(where: str) -> Iterator[None]:
    """Hold a mounted file system still. A guard process thaws it if we are killed meanwhile."""
    with _failures(f"{where} cannot be frozen"):
        folder = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        guard = _Guard(folder)
        try:
            _freeze(folder, where)
            try:
                yield
            finally:
                with _failures(f"{where} cannot be thawed (fsfreeze -u {where})"):
                    fcntl.ioctl(folder, FITHAW, 0)
        finally:
            guard.dismiss()
    finally:
        os.close(folder)


def _freeze(folder: int, where: str) -> None:
    try:
        fcntl.ioctl(folder, FIFREEZE, 0)
    except OSError as exc:
        busy = exc.errno == errno.EBUSY
        hint = "somebody else has frozen it" if busy else f"umount {where} and save the device"
        raise EmupmemError(f"{where} cannot be frozen: {exc.strerror}", hint) from exc


class _Guard:
    """A child that waits for our end: told to go it goes, else (we were killed) it thaws first."""

    def __init__(self, folder: int) -> None:
        ours, self.pipe = os.pipe()
        # No thread of ours is running yet, so a plain fork is safe.
        self.child = os.fork()
        if self.child == 0:
            self._watch(ours, folder)
        os.close(ours)

    def _watch(self, pipe: int, folder: int) -> None:
        try:
            os.close(self.pipe)
            os.setsid()
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("-1000")
            if os.read(pipe, 1) == b"":
                fcntl.ioctl(folder, FITHAW, 0)
        finally:
            os._exit(0)

    def dismiss(self) -> None:
        """Send the child away."""
        with contextlib.suppress(OSError):  # somebody killed it
            os.write(self.pipe, b"x")
        os.close(self.pipe)
        os.waitpid(self.child, 0)


# Restore --------------------------------------------------------------------------------------------


def restore(
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
    device = choose(machine, name)
    where = mounted_at(machine, device)
    if where:
        raise EmupmemError(f"{device.dev} is mounted on {where}", f"umount {where}")
    with _image(file) as image, _opened(opener, device.dev, os.O_RDWR | os.O_EXCL) as disk:
        size = _size(disk)
        info = os.fstat(image)
        if info.st_size != size:
            raise EmupmemError(
                f"{file} has {human(info.st_size)} ({info.st_size} bytes), {device.dev} {human(size)} ({size})",
                "an image fits only a device of its own size; nothing was written",
            )
        known = _known(Path(file), image)
        with _failures(f"{file} cannot be read"):
            sums = list(_each(size, _reader(image, size), progress, "checking"))
        checksum = _digest(size, sums)
        if checksum not in known and not force:
            raise _unverified(file, known)
        _put_back(device.dev, image, disk, size, sums, progress)
    verified = checksum if checksum in known else ""
    return Snapshot(file, device.dev, size, info.st_blocks * 512, time.monotonic() - begun, verified)


def is_blank(machine: Machine, name: str | None, opener: Opener = open_device) -> bool:
    """Whether a device is zero from end to end: nothing on it could be lost."""
    buffer = _Buffer()
    with _opened(opener, choose(machine, name).dev, os.O_RDONLY) as disk:
        size = _size(disk)
        for at in range(0, size, CHUNK):
            length = min(CHUNK, size - at)
            _read(disk, buffer.view[:length], at)
            if buffer.crc(length) != zero_crc(length):
                return False
    return True


@contextlib.contextmanager
def _image(file: str) -> Iterator[int]:
    with _failures(f"{file} cannot be read"):
        image = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(image).st_mode
        if not stat.S_ISREG(mode):
            raise EmupmemError(f"{file} is {_kind(mode)}, not an image", "emupmem save makes one")
        yield image
    finally:
        os.close(image)


def _known(path: Path, image: int) -> tuple[str, ...]:
    """The checksums that the image may have: its own, or those beside it."""
    try:
        return (os.getxattr(image, ATTRIBUTE).decode("ascii", "replace"),)
    except OSError:
        return read_sidecar(path.with_name(path.name + SIDECAR))


def _unverified(file: str, known: Sequence[str]) -> EmupmemError:
    if known:
        return EmupmemError(
            f"{file} is not what was saved: its checksum differs; nothing was written",
            "damaged, or changed since, as a disk of QEMU is; --force restores it as it is",
        )
    return EmupmemError(
        f"{file} has no checksum; nothing was written",
        "a copy may have lost it (cp --preserve=xattr keeps it); --force restores it unchecked",
    )


def _reader(image: int, size: int) -> Callable[[int], int]:
    """Gives the CRC of the chunk at an offset; a chunk that is all hole is not read."""
    buffers = _Buffers()

    def one(at: int) -> int:
        length = min(CHUNK, size - at)
        if _next_data(image, at) >= at + length:
            return zero_crc(length)
        with buffers.one() as buffer:
            _read(image, buffer.view[:length], at)
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
    buffers = _Buffers()

    def one(at: int) -> int:
        length = min(CHUNK, size - at)
        with buffers.one() as buffer:
            view, crc = _ZERO.view[:length], zero_crc(length)
            if _next_data(image, at) < at + length:
                view = buffer.view[:length]
                _read(image, view, at)
                crc = buffer.crc(length)
            if crc != sums[at // CHUNK]:
                raise EmupmemError("the image changed while it was read")
            _write(disk, view, at)
        return 0

    head = range(0, min(HEAD, size), CHUNK)
    try:
        for at in head:
            _write(disk, _ZERO.view[: min(CHUNK, size - at)], at)
        os.fsync(disk)
        for _ in _each(size, one, progress, "restoring", HEAD):
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


# Chunks ---------------------------------------------------------------------------------------------


class _Buffer:
    """Room for a chunk, aligned to pages as O_DIRECT wants it; compared and summed without a copy."""

    def __init__(self) -> None:
        self.room = bytearray(CHUNK + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.room))
        self.start = -address % mmap.PAGESIZE
        self.view = memoryview(self.room)[self.start : self.start + CHUNK]

    def is_zero(self, length: int) -> bool:
        """Whether a whole chunk is zero; a shorter one is looked at block by block."""
        return length == CHUNK and self.room.startswith(_ZERO_CHUNK, self.start)

    def crc(self, length: int) -> int:
        """CRC-32 of the first bytes."""
        return zero_crc(length) if self.is_zero(length) else zlib.crc32(self.view[:length])

    def pieces(self, length: int) -> Iterator[tuple[int, int]]:
        """The runs of blocks that are not zero: offsets in the chunk."""
        if self.is_zero(length):
            return
        begun = -1
        for at in range(0, length, BLOCK):
            # startswith compares without a copy, and ends at the first byte that differs
            whole = length - at >= BLOCK
            if whole and self.room.startswith(_ZERO_BLOCK, self.start + at):
                if begun >= 0:
                    yield begun, at
                begun = -1
            elif begun < 0:
                begun = at
        if begun >= 0:
            yield begun, length


_ZERO = _Buffer()


@functools.cache
def zero_crc(length: int) -> int:
    """The CRC of that many zeros."""
    return zlib.crc32(bytes(length))


class _Buffers:
    """One buffer for each worker, and one for who directs them."""

    def __init__(self) -> None:
        self.free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(WORKERS + 1):
            self.free.put(_Buffer())

    @contextlib.contextmanager
    def one(self) -> Iterator[_Buffer]:
        """Borrow one."""
        buffer = self.free.get()
        try:
            yield buffer
        finally:
            self.free.put(buffer)


def _each(
    size: int, work: Callable[[int], int], progress: Progress, what: str, start: int = 0
) -> Iterator[int]:
    """Do the work for each chunk in a few threads: results in order, never far ahead of `progress`."""
    pending: deque[Future[list[int]]] = deque()
    todo = iter(range(start, size, TASK))
    done = start

    def task(begin: int) -> list[int]:
        return [work(at) for at in range(begin, min(begin + TASK, size), CHUNK)]

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            while True:
                pending.extend(pool.submit(task, at) for at in islice(todo, 2 * WORKERS - len(pending)))
                if not pending:
                    return
                yield from pending.popleft().result()
                done = min(done + TASK, size)
                progress(what, done, size)
        finally:
            for future in pending:
                future.cancel()


def _read(descriptor: int, view: memoryview, at: int) -> None:
    """Fill `view` from an offset on, whole."""
    while view:
        got = os.preadv(descriptor, [view], at)
        if got == 0:
            raise OSError(errno.EIO, "it ends too early")
        view, at = view[got:], at + got


def _write(descriptor: int, view: memoryview, at: int) -> None:
    while view:
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


def _size(descriptor: int) -> int:
    """Bytes of a block device (or of what stands for one)."""
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        found: int = struct.unpack("Q", fcntl.ioctl(descriptor, BLKGETSIZE64, bytes(8)))[0]
        return found
    return os.fstat(descriptor).st_size


def _digest(size: int, sums: Sequence[int]) -> str:
    """The checksum of it all, with its size."""
    packed = struct.pack(f"<{len(sums)}I", *sums)
    return f"{FORMAT}:{size}:{hashlib.sha256(packed).hexdigest()}"
