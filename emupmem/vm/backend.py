# SPDX-License-Identifier: Apache-2.0
"""Looks at what shall be behind a virtual NVDIMM, makes the file that is missing, and asks QEMU what it can."""

from __future__ import annotations

import re

from emupmem.device import dax
from emupmem.device.blocks import Mounted, Pmem, devices, mounts
from emupmem.model import Command, EmupmemError
from emupmem.system import files, lock, processes
from emupmem.system.files import kernel_folder, refuse_kernel_folder
from emupmem.system.machine import Machine
from emupmem.vm.arguments import NOT_RAW, Backend, Kind, parse_version

IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
MEMORY = Backend(Kind.RAM)
PROGRAM = "qemu-system-x86_64"
NAME = "{}{}.img"
"""The file in a folder that was given: the virtual machine's name and which device of it. The next start finds it."""


def program(machine: Machine, name: str) -> str:
    """Where QEMU lies. Raises EmupmemError where it is missing."""
    found = name if "/" in name and machine.exists(name) else machine.find(name)
    if found is None:
        raise EmupmemError(f"{name} is not installed", "apt-get install qemu-system-x86, or --qemu PROGRAM")
    return found


def version(machine: Machine, qemu: str) -> tuple[int, int]:
    """(7, 2) of the QEMU that is installed. Raises EmupmemError."""
    done = machine.run(Command((qemu, "--version"), "ask QEMU for its version"))
    return parse_version(done.stdout.decode("utf-8", "replace"))


def knows(machine: Machine, qemu: str, option: str) -> bool:
    """Whether this QEMU has an option, by its own help."""
    done = machine.run(Command((qemu, "-help"), "ask QEMU what it knows"))
    return f"\n{option} " in done.stdout.decode("utf-8", "replace")


def has_libpmem(machine: Machine, qemu: str) -> bool:
    """Whether this QEMU was built with libpmem: without it `pmem=on` is an error and no start.

    Asked by a start that cannot succeed: objects are made before the device that does not exist.
    """
    with files.scratch_file(machine, 4096) as name:
        made = f"memory-backend-file,id=probe,mem-path={name.replace(',', ',,')},size=4096,share=on,pmem=on"
        none = ("-machine", "none", "-nodefaults", "-display", "none")
        argv = (qemu, *none, "-object", made, "-device", "emupmem-no-such-device")
        done = machine.run(Command(argv, "ask QEMU for libpmem"))
    said = done.stderr.decode("utf-8", "replace")
    return "emupmem-no-such-device" in said and "libpmem" not in said


def look(machine: Machine, name: str, shared: bool = False, inside: str = "vnvdimm0.img") -> Backend:
    """What is there under an absolute name, as far as this user may see. A folder means the file `inside` it.

    Raises EmupmemError for what cannot be behind a device: a disk that is mounted, a file that another
    program has mapped (unless `shared`), an image that is not raw, no device at all.
    """
    state = machine.entry_kind(name)
    if state == "folder":
        name = f"{name.rstrip('/')}/{inside}"
        state = machine.entry_kind(name)
    if state not in ("file", "missing", "character", "block"):
        raise EmupmemError(f"{name} is neither a file nor a device that can be behind an NVDIMM")
    if state != "missing" and not shared:
        holders = processes.processes_mapping(machine, name)
        if holders:
            raise EmupmemError(
                f"{name} is in use by {', '.join(holders)}",
                "two virtual machines would write over each other; name another file, or --shared-backend",
            )
    if state == "character":
        return _devdax(machine, name)
    if state == "block":
        return _block(machine, name)
    return _file(machine, name, state == "file")


def file_inside(guest: str, number: int) -> str:
    """The name of the file in a folder for the n-th device of a virtual machine of that name."""
    plain = re.sub(r"[^\w.-]", "_", guest).lstrip(".")[:64]
    return NAME.format(f"{plain}-vnvdimm" if plain else "vnvdimm", number)


def _file(machine: Machine, name: str, there: bool) -> Backend:
    folder = name.rpartition("/")[0] or "/"
    _refuse_kernel_folder(machine, name, there)
    if machine.entry_kind(folder) != "folder":
        raise EmupmemError(f"{folder} is not a folder", "make it first")
    size = machine.file_size(name) if there else None
    room = None if there else machine.room(folder)
    if there and not size:
        raise EmupmemError(f"{name} is empty", "remove it: a new file of the right size is made then")
    if there and (form := _form(machine, name)):
        raise EmupmemError(
            f"{name} is a disk image of the form {form}: the guest would write over it",
            f"qemu-img convert -O raw {name} NEW makes a raw one; -drive is for disks",
        )
    on = _mount_of(machine, folder)
    if on is not None and on.fs in IN_MEMORY:
        pages = machine.block_size(folder) if on.fs == "hugetlbfs" else 0
        return Backend(Kind.VOLATILE_FILE, name, size, align=pages, room=room)
    below = next((d for d in devices(machine) if on is not None and d.number == on.number), None)
    if below is None:
        return Backend(Kind.FILE, name, size, room=room)
    direct, sync = _proof(name if there else folder, there)
    if not direct:
        return Backend(Kind.FILE, name, size, emulated=_emulated(below), room=room)
    return Backend(Kind.DAX_FILE, name, size, sync, _emulated(below), room=room)


def _refuse_kernel_folder(machine: Machine, name: str, there: bool) -> None:
    """Raise EmupmemError for a file among the devices of /dev, or in /proc or /sys; huge pages may be there."""
    real = machine.real(name)
    on = _mount_of(machine, real.rpartition("/")[0] or "/")
    if on is not None and on.fs == "hugetlbfs":
        return
    if there and kernel_folder(real):
        raise EmupmemError(
            f"{name} is a regular file in {kernel_folder(real)}, not a device",
            f"it may be there by mistake: look at it, then rm {real}, and give a device or a file elsewhere",
        )
    refuse_kernel_folder(name, real)


def _form(machine: Machine, name: str) -> str:
    try:
        with machine.open(name) as stream:
            start = stream.read(8)
    except EmupmemError:
        return ""  # not ours to read, but whoever starts QEMU may
    return next((form for mark, form in NOT_RAW.items() if start.startswith(mark)), "")


def _proof(name: str, there: bool) -> tuple[bool, bool]:
    """Whether a file (or a new one in a folder) is mapped directly, and with MAP_SYNC."""
    try:
        if there:
            direct = bool(dax.is_dax_file(name))
            return direct, direct and dax.maps_sync(name)
    except OSError:
        return False, False  # not ours to open: nothing is promised then
    proof = dax.prove(name)
    return bool(proof.dax_file), bool(proof.map_sync)


def _mount_of(machine: Machine, folder: str) -> Mounted | None:
    number = machine.file_system(folder)
    return next((m for m in reversed(mounts(machine)) if m.number == number), None)


def _emulated(device: Pmem) -> bool:
    return device.item is not None or device.provider in ("e820", "ramdax")


def _devdax(machine: Machine, name: str) -> Backend:
    base = f"/sys/bus/dax/devices/{name.rpartition('/')[2]}"
    size = machine.peek(f"{base}/size")
    if not size.isdigit():
        raise EmupmemError(f"{name} is not a DAX device", "as /dev/dax0.0")
    align = machine.peek(f"{base}/align")
    provider = next((r.provider for r in machine.regions() if r.name in machine.path(base).parts), "")
    return Backend(
        Kind.DEVDAX,
        name,
        int(size),
        True,
        provider in ("e820", "ramdax"),
        int(align) if align.isdigit() else 0,
    )


def _block(machine: Machine, name: str) -> Backend:
    number = machine.block_number(name)
    device = next((d for d in devices(machine) if d.number == number), None)
    if device is None:
        raise EmupmemError(
            f"{name} is not persistent memory: emupmem gives no other disk to a virtual machine",
            "QEMU's -drive is for disks",
        )
    where = next((m.dir for m in mounts(machine) if m.number == number), "")
    if where:
        raise EmupmemError(
            f"{name} is mounted on {where}: guest and host would destroy its file system",
            f"give a file on it: --backend {where}",
        )
    with lock.hold_device(machine, name):
        pass
    return Backend(Kind.BLOCK, name, device.size, emulated=_emulated(device))
