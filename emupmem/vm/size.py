# SPDX-License-Identifier: Apache-2.0
"""How large a device becomes, and what QEMU or the guest would fail on. Pure.

QEMU puts the label area at the end of what is behind a vNVDIMM; the rest, cut down to a multiple of the
alignment, is the guest's region (hw/mem/nvdimm.c, nvdimm_prepare_memory_region). Linux makes namespaces for
fsdax and devdax only in regions that begin at a multiple of 16 MiB, in pieces of 16 MiB
(drivers/nvdimm, memremap_compat_align).
"""

from __future__ import annotations

from emupmem.model import KIB, MIB, EmupmemError
from emupmem.units import human, multiples_near
from emupmem.vm.wish import Backend, Backing, DeviceOptions, DeviceWish, GuestDevice

ALIGN = 2 * MIB
"""Linux maps persistent memory in pieces of 2 MiB; a guest leaves an uneven rest unused, or refuses it."""

REGION_STEP = 16 * MIB
"""Where a region is to be divided by labels, it and the regions after it begin at multiples of this."""

LABEL_LEAST = 128 * KIB
"""What QEMU and the NVDIMM label specification ask for at least."""

READONLY_SINCE = (6, 0)
FIXED = (Backing.DEVDAX, Backing.BLOCK)
"""Kinds whose size is given; a part of them can be taken."""


def choose_size(backend: Backend, asked: int | None, label: int = 0, align: int = 0) -> int:
    """Bytes behind the device: as asked, or all of the backend. Raises EmupmemError where they do not fit.

    With a label area what is asked for is the guest's region, rounded up, and the area comes on top of it.
    """
    total = _with_label(backend, asked, label, align) if asked is not None else None
    there = backend.size
    if there is None:
        if total is None:
            raise EmupmemError(
                f"{backend.path} does not exist: give its size with --pmem", "give --pmem SIZE"
            )
        if backend.room is not None and backend.room < total:
            raise EmupmemError(
                f"there are {human(backend.room)} free for {backend.path}, {human(total)} are needed",
                "a guest that writes to a file without room is killed",
            )
        return total
    if backend.kind in FIXED:
        if total is None:
            return _part(backend, there, label)
        if total > there:
            above = f" and {human(total - (asked or 0))} for the label area" if label else ""
            raise EmupmemError(f"{backend.path} has {human(there)}, you asked for {human(asked or 0)}{above}")
        return total
    if asked is not None and there not in (asked, total):
        raise EmupmemError(
            f"{backend.path} is there already and has {human(there)} ({there} bytes), you asked for {human(asked)}"
            + (f", which needs {total} bytes with its label area" if label else ""),
            "leave --pmem away to take it as it is, or name another file: what is there is never resized",
        )
    return there


def _with_label(backend: Backend, asked: int, label: int, align: int = 0) -> int:
    """What `asked` bytes of region and their label area need: whole steps, so that the next device fits as well."""
    if not label:
        return asked
    piece = max(ALIGN, backend.align)
    return _up(asked, max(REGION_STEP, piece, align)) + _up(label, piece)


def _part(backend: Backend, there: int, label: int) -> int:
    """All of a device, or the most of it that leaves a region of whole steps beside the label area."""
    if not label:
        return there
    piece = max(ALIGN, backend.align)
    region = (there - _up(label, piece)) // max(REGION_STEP, piece) * max(REGION_STEP, piece)
    return region + _up(label, piece) if region > 0 else there


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def alignment(wish: DeviceWish, options: DeviceOptions) -> int:
    """What `align=` of the backend has to be, in bytes; 0 where QEMU's own is right."""
    backend = wish.backend
    if backend.kind is Backing.RAM:
        return 0
    asked = options.align or (backend.align if backend.align > 4 * KIB else 0)
    return max(asked, REGION_STEP) if wish.label and not backend.old_labels and _is_laid_out(wish) else asked


def _is_laid_out(wish: DeviceWish) -> bool:
    """Whether the region is of whole steps but for less than a piece: then nothing is lost by aligning it.

    Another file may hold labels of before, which QEMU would look for elsewhere.
    """
    return (wish.size - wish.label) % REGION_STEP < ALIGN


def region(wish: DeviceWish, options: DeviceOptions) -> int:
    """Bytes that the guest sees of a device."""
    own = ALIGN if wish.backend.kind is Backing.RAM else 4 * KIB
    step = alignment(wish, options) or own
    return (wish.size - wish.label) // step * step


def padding(wish: DeviceWish, options: DeviceOptions) -> int:
    """Address space that QEMU may need to align a device, beside the 1 GiB that a slot brings."""
    align = alignment(wish, options)
    own = 1024 * MIB if options.device is GuestDevice.NVDIMM else ALIGN
    return align if align > own else 0


def check_wish(wish: DeviceWish, options: DeviceOptions, version: tuple[int, int]) -> None:
    """Refuse what QEMU or the guest would fail on, in clear words. Raises EmupmemError."""
    step = max(ALIGN, wish.backend.align)
    if wish.size < step or wish.size % step:
        why = (
            f"{wish.backend.path} maps in pieces of {human(step)}"
            if wish.backend.align > ALIGN
            else "Linux maps it so"
        )
        raise EmupmemError(
            f"{human(wish.size)} ({wish.size} bytes) is not a multiple of {human(step)}: {why}",
            f"take {multiples_near(wish.size, step)}",
        )
    if wish.label:
        _check_label(wish, options)
    if options.align:
        _check_align(wish, options)
    if options.readonly:
        _check_readonly(wish, options, version)
    if options.device is GuestDevice.VIRTIO and options.persistence is not None:
        raise EmupmemError("virtio-pmem knows no nvdimm-persistence", "--device nvdimm does")
    if options.device is GuestDevice.VIRTIO and wish.node is not None:
        raise EmupmemError("virtio-pmem belongs to no NUMA node", "--device nvdimm can")


def _check_label(wish: DeviceWish, options: DeviceOptions) -> None:
    if options.device is GuestDevice.VIRTIO:
        raise EmupmemError("virtio-pmem has no labels", "--device nvdimm has")
    if wish.label < LABEL_LEAST or wish.label % (4 * KIB):
        raise EmupmemError(
            f"a label area of {wish.label} bytes: at least 128 KiB and a multiple of 4 KiB are needed",
            "--label 128K serves",
        )
    if wish.label + ALIGN > wish.size:
        raise EmupmemError(
            f"a label area of {human(wish.label)} leaves nothing of {human(wish.size)}", "--pmem with more"
        )


def _check_align(wish: DeviceWish, options: DeviceOptions) -> None:
    backend, align = wish.backend, options.align
    if align & (align - 1) or align < 4 * KIB:
        raise EmupmemError(
            f"--align {align} is not a power of two of at least 4 KiB", "--align 2M serves most"
        )
    if backend.kind is Backing.RAM:
        raise EmupmemError(
            "--align belongs to a file or a device: QEMU aligns its own memory to 2 MiB",
            "omit it, or give --backend PATH",
        )
    if align < backend.align:
        raise EmupmemError(
            f"--align {human(align)} is less than the {human(backend.align)} of {backend.path}"
        )
    seen = wish.size - wish.label
    if align > seen:
        raise EmupmemError(
            f"--align {human(align)} is more than the {human(seen)} of the device",
            f"{human(align)} is the least size for it",
        )
    if not wish.label and seen % align:
        raise EmupmemError(
            f"{human(seen)} is not a multiple of --align {human(align)}",
            f"the guest would have {human(seen // align * align)}: give that as the size, or leave --align away",
        )


def _check_readonly(wish: DeviceWish, options: DeviceOptions, version: tuple[int, int]) -> None:
    if wish.backend.kind is Backing.RAM:
        raise EmupmemError("a read-only device needs a file", "--backend names it")
    if options.device is GuestDevice.VIRTIO:
        raise EmupmemError("virtio-pmem cannot be read-only", "--device nvdimm can")
    if version < READONLY_SINCE:
        raise EmupmemError(f"QEMU {version[0]}.{version[1]} has no read-only NVDIMMs", "6.0 and newer have")
    if wish.backend.size is None:
        raise EmupmemError(f"{wish.backend.path} is not there: there is nothing to read")


def label_note(wish: DeviceWish, options: DeviceOptions) -> str:
    """What the guest has of a device with a label area, in a sentence."""
    seen = region(wish, options)
    what = f"the guest sees a region of {human(seen)}"
    if seen % REGION_STEP:
        below = seen // REGION_STEP * REGION_STEP
        fit = [_with_label(wish.backend, size, wish.label) for size in (below, below + REGION_STEP) if size]
        return (
            f"{what} ({seen} bytes) of {wish.backend.path}, not a multiple of {human(REGION_STEP)}: ndctl makes no "
            f"fsdax or devdax there; a file of {' or '.join(map(str, fit))} bytes would do"
        )
    return what
