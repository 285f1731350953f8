# SPDX-License-Identifier: Apache-2.0
"""The proof that a mounted file system or a device really is DAX: what the kernel does, not what an option says.

Impure by nature: it makes a nameless file in the mount, asks the kernel about it, maps it and
counts page faults. It needs no root: whoever may write there can prove it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import secrets
from collections.abc import Iterator

from emupmem.model import EmupmemError
from emupmem.record import record

HUGE = 2 << 20
PAGE = 4096
PROBE = 2 * HUGE
"""Bytes of the probe file: two huge pages, so that one fault more or less does not decide."""

STATX_ATTR_DAX = 0x00200000  # include/uapi/linux/stat.h, since Linux 5.8
MAP_SHARED_VALIDATE, MAP_SYNC = 0x03, 0x80000
_AT_EMPTY_PATH = 0x1000
_STATX_SIZE, _ATTRIBUTES, _ATTRIBUTES_MASK = 256, 8, 56  # struct statx: its size and two offsets in it


@record
class DaxProof:
    """What was seen of one mount; None stands for "could not be seen", `why` says why.

    `faults` is the number of minor faults that writing one byte to each page of `PROBE` bytes took:
    one for each 2 MiB where huge pages serve them, 512 where small ones do. `aligned` tells whether
    the kernel gave the mapping an address at which huge pages are possible.
    """

    dax_file: bool | None = None
    map_sync: bool | None = None
    faults: int | None = None
    aligned: bool = True
    why: str = ""

    @property
    def huge_pages(self) -> bool | None:
        """Whether huge pages serve the faults; a few small faults are the interpreter's own."""
        return None if self.faults is None else self.faults < PROBE // PAGE // 8


def prove_dax(folder: str) -> DaxProof:
    """Prove a mounted folder with one nameless file. Never raises: what fails is in `why`."""
    try:
        with _probe_file(folder) as file:
            dax = is_dax_file(f"/proc/self/fd/{file}")
            try:
                os.posix_fallocate(file, 0, PROBE)
            except OSError as exc:
                why = f"no room for a probe of {PROBE >> 20} MiB: {exc.strerror}"
                return DaxProof(dax, None, None, True, why)
            sync = _maps_sync(file)
            faults, aligned = _huge_faults(file)
            return DaxProof(dax, sync, faults, aligned)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EPERM):
            return DaxProof(why=f"only root and the owner of {folder} may write there")
        return DaxProof(why=f"no probe file in {folder}: {exc.strerror}")


def is_dax_file(path: str) -> bool | None:
    """Whether the kernel maps this file directly (statx STATX_ATTR_DAX); None where it cannot say (before 5.8).

    Raises OSError.
    """
    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if statx is None:
        return None
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if statx(descriptor, b"", _AT_EMPTY_PATH, 0, buffer):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
    finally:
        os.close(descriptor)
    attributes, mask = (
        int.from_bytes(buffer.raw[at : at + 8], "little") for at in (_ATTRIBUTES, _ATTRIBUTES_MASK)
    )
    return bool(attributes & STATX_ATTR_DAX) if mask & STATX_ATTR_DAX else None


def maps_sync(path: str) -> bool:
    """Whether a file can be mapped with MAP_SYNC, so that flushing CPU caches makes writes durable.

    The file must hold at least a page. Raises OSError where it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _maps_sync(descriptor)
    finally:
        os.close(descriptor)


def _maps_sync(descriptor: int) -> bool:
    try:
        mmap.mmap(descriptor, PAGE, flags=MAP_SHARED_VALIDATE | MAP_SYNC).close()
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def _huge_faults(descriptor: int) -> tuple[int, bool]:
    """(minor faults, whether the address allows huge pages) of writing to each page of the probe file."""
    with mmap.mmap(-1, PROBE) as rehearsal:
        _touch(rehearsal)  # whatever the interpreter needs for this is in memory afterwards
    with mmap.mmap(descriptor, PROBE, flags=mmap.MAP_SHARED) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        aligned = ctypes.addressof(first) % HUGE == 0
        del first
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _touch(mapping)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, aligned


def _touch(mapping: mmap.mmap) -> None:
    for at in range(0, PROBE, PAGE):
        mapping[at] = 1


@contextlib.contextmanager
def _probe_file(folder: str) -> Iterator[int]:
    """A file in `folder` that has no name: it is gone whatever happens to us."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        # ext2 has no O_TMPFILE: a private name, taken away at once.
        name = f"{folder}/.emupmem-probe-{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600)
        os.unlink(name)  # noqa: PTH108
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def prove_device(path: str) -> None:
    """Store through one mapping of a DAX device and read it through another. Raises EmupmemError.

    Only for a device that nobody uses yet: what is at its beginning is put back, but was another for a moment.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with mmap.mmap(descriptor, HUGE) as one, mmap.mmap(descriptor, HUGE) as other:
                before, pattern = one[:8], bytes(255 - b for b in one[:8])
                one[:8] = pattern
                seen, one[:8] = other[:8], before
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as exc:
        raise EmupmemError(f"{path} cannot be mapped: {exc}", "sudo dmesg may show why") from exc
    if seen != pattern:
        raise EmupmemError(f"{path} does not hold what is stored in it", "sudo dmesg may show why")
