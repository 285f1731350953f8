# SPDX-License-Identifier: Apache-2.0
"""What a kernel makes of a reservation: from which release on, and where KASLR may put the kernel."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emupmem.kernel.cmdline import WITHOUT_KMEM, kaslr_limit, memmap_region_count, parse_command_line
from emupmem.model import MAX_MEMMAP_REGIONS, DeviceKind, EmupmemError, KernelRelease, Reservation
from emupmem.planner.situation import Situation
from emupmem.units import tight

FIRST_EL7 = 514
"""The RHEL 7 kernel (3.10.0-514.el7, RHEL 7.3) from which on `memmap=SIZE!OFFSET` is known.

Its changelog brings the persistent types of e820 (ad5fb870c486, mainline 4.2, which builds on the `!` of
ec776ef6bbe1) with the internal build 3.10.0-427, between RHEL 7.2 (327) and 7.3 (514): the later one is safe.
"""


BEFORE_3_5 = KernelRelease(3, 4, None, "the kernel of this log (before 3.5, by the words of its memory map)")
"""A kernel that no banner names, but whose map has the words of its time."""


def kernel_problem(kernel: KernelRelease | None, kind: DeviceKind = DeviceKind.PMEM) -> EmupmemError | None:
    """Why a kernel must not be given a reservation of this kind, None where nothing is known against it.

    Before Linux 4.1 (ec776ef6bbe1) parse_memmap_one takes `memmap=SIZE!OFFSET` for `memmap=SIZE`: a limit for all
    memory. Soft reserved memory has a driver since Linux 5.5 (262b45ae3ab4, a6c7f4c6aea5).
    """
    if kernel is None:
        return None
    if kind.soft and (kernel.i386 or (kernel.major, kernel.minor) < (5, 5)):
        return EmupmemError(
            f"{kernel.text} makes no device of soft reserved memory",
            f"--as {kind} needs a 64-bit kernel, Linux 5.5 or later",
        )
    if kernel.i386:
        return EmupmemError(f"{kernel.text} is a 32-bit kernel, which has no /dev/pmem", KERNEL_NEEDED)
    if (kernel.major, kernel.minor) >= (4, 1) or _el7_build(kernel) >= FIRST_EL7:
        return None
    return EmupmemError(
        f"{kernel.text} does not know memmap=SIZE!OFFSET: it takes SIZE as a limit for all of its memory",
        KERNEL_NEEDED,
    )


KERNEL_NEEDED = (
    "memmap=SIZE!OFFSET needs a 64-bit kernel, Linux 4.1 or later (on RHEL 7: 3.10.0-514.el7 or later)"
)


def _el7_build(kernel: KernelRelease) -> int:
    """The build of a RHEL 7 kernel (and its rebuilds), 0 for all others."""
    found = re.match(r"3\.10\.0-(\d{1,6})\..*\bel7", kernel.release)
    return int(found[1]) if found else 0


def kernel_warnings(kernel: KernelRelease | None) -> list[str]:
    if kernel is None or (kernel.major, kernel.minor) >= (4, 1):
        return []
    return [
        f"{kernel.text} is older than Linux 4.1 and knows memmap=SIZE!OFFSET by a backport only: try it once first "
        "(apply --trial)"
    ]


def soft_kaslr(situation: Situation, chosen: Sequence[Reservation]) -> str:
    """Why the kernel may place itself inside soft reserved memory without nokaslr; empty where it cannot.

    kaslr.c does not keep clear of such a range. It takes its size for a limit of all memory, and stays below the
    smallest limit that it has read. After the fourth range it reads no further.
    """
    line = situation.command_line or parse_command_line("")
    starts = [i.start for i in line.soft] + [r.start for r in chosen if r.kind.soft]
    if line.nokaslr or not starts:
        return ""
    ranges = memmap_region_count(line) + sum(1 for r in chosen if not r.kind.soft)
    if ranges >= MAX_MEMMAP_REGIONS:
        return f"beside {ranges} other memmap= ranges the kernel may place itself inside soft reserved memory"
    limit = min(kaslr_limit(line), *(r.size for r in chosen if r.kind.soft), 1 << 64)
    if limit <= min(starts):
        return ""
    return (
        f"the kernel chooses its place at random below {tight(limit)}, and the soft reserved memory begins at "
        f"{tight(min(starts))}"
    )


def words_beside(reservations: Sequence[Reservation], nokaslr: bool) -> tuple[str, ...]:
    """The words that reservations need on the command line beside their memmap=; `nokaslr` says that of this one."""
    soft = any(r.kind.soft for r in reservations)
    return (*(("nokaslr",) if nokaslr else ()), *((WITHOUT_KMEM,) if soft else ()))


def randomisation(situation: Situation) -> tuple[bool, list[str]]:
    """Whether to propose nokaslr for what will boot, and what a person should know of it."""
    return kaslr(situation)


def kaslr(situation: Situation) -> tuple[bool, list[str]]:
    """Whether to propose nokaslr, and what to say (facts: a1b87d54f4e4, fixed by 15aa8fb852f9).

    EFI stubs that decompress the kernel themselves ignored memmap= when they randomised the
    kernel's place: 6.1.81-6.1.92 and 6.6.0 until 6.6.33 / 6.9.4.
    """
    line = situation.command_line
    if line is not None and line.nokaslr:
        return False, []
    kernel = situation.kernel
    if situation.efi is False:
        return False, []
    affected = None if kernel is None else _randomises_into(kernel)
    if affected is False:
        return False, []
    name = "this kernel" if kernel is None else kernel.text
    why = f"{name}, started by UEFI, may place itself inside the reservation at random"
    if affected and situation.efi:
        return True, [f"{why}: nokaslr prevents it (--nokaslr adds it), or install a newer kernel"]
    if affected is None and situation.efi:
        return False, [
            f"the exact version of {name} is unknown: Linux 6.1.81-6.1.92 and 6.6.0-6.9.3 started by UEFI "
            "may place themselves inside the reservation; if it is one of these, add --nokaslr"
        ]
    if affected and situation.efi is None:
        return False, [
            f"if it is started by UEFI, {name} may place itself inside the reservation: add --nokaslr"
        ]
    return False, []


def _randomises_into(kernel: KernelRelease) -> bool | None:
    """Whether this kernel's EFI stub ignores memmap=; None where the stable number decides and hides."""
    series, stable = (kernel.major, kernel.minor), kernel.stable
    first_bad = {(6, 1): 81}.get(series, 0)
    first_good = {(6, 1): 93, (6, 6): 33, (6, 9): 4}.get(series)
    if first_good is None:
        return series in ((6, 7), (6, 8))
    return None if stable is None else first_bad <= stable < first_good
