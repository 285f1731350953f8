# SPDX-License-Identifier: Apache-2.0
"""Looks at what shall be behind a virtual NVDIMM, makes the file that is missing, and asks QEMU what it can."""

from __future__ import annotations

import re
from dataclasses import replace

from emupmem.device import dax
from emupmem.device.blocks import Mounted, Pmem, devices, mounts, reserved_regions
from emupmem.model import MIB, Command, EmupmemError
from emupmem.system import files, lock, processes
from emupmem.system.distribution import install_hint
from emupmem.system.files import kernel_folder, refuse_kernel_folder
from emupmem.system.machine import Machine
from emupmem.vm.arguments import NOT_RAW, parse_version
from emupmem.vm.wish import Backend, Backing

IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
MEMORY = Backend(Backing.RAM)
PROGRAM = "qemu-system-x86_64"
NAME = "{}{}.img"
"""The file in a folder that was given: the virtual machine's name and which device of it. The next start finds it."""
MOST_CONFIG = MIB
INDEX = b"NAMESPACE_INDEX\0"


def qemu_program(machine: Machine, name: str) -> str:
    """Where QEMU lies. Raises EmupmemError where it is missing."""
    found = name if "/" in name and machine.exists(name) else machine.find(name)
    if found is None:
        fix = install_hint(machine, PROGRAM) if name == PROGRAM else f"emupmem serves {PROGRAM}"
        raise EmupmemError(f"{name} is not installed", f"{fix}, or --qemu PROGRAM")
    return found


def qemu_version(machine: Machine, qemu: str) -> tuple[int, int]:
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


def read_config(machine: Machine, name: str) -> str:
    """The text of a file for -readconfig. Raises EmupmemError where QEMU could not read it a second time."""
    if machine.entry_kind(name) != "file" or (machine.file_size(name) or 0) > MOST_CONFIG:
        raise EmupmemError(
            f"-readconfig {name} is not there, or no regular file of at most 1 MiB",
            "emupmem reads the guest's RAM and device names from it before QEMU does: give a regular file",
        )
    data = machine.read(name)
    return (data or b"").decode("utf-8", "replace")


def look_at_backend(
    machine: Machine, name: str, shared: bool = False, inside: str = "vnvdimm0.img"
) -> Backend:
    """What is there under an absolute name, as far as this user may see. A folder means the file `inside` it.

    Symbolic links are followed: what counts is where they lead. Raises EmupmemError for what cannot be behind a
    device: a disk that is mounted, a file that another program uses (unless `shared`), an image that is not raw,
    no device at all.
    """
    state = machine.entry_kind(name)
    if state == "folder":
        name = f"{name.rstrip('/')}/{inside}"
        state = machine.entry_kind(name)
    if state not in ("file", "missing", "character", "block"):
        raise EmupmemError(f"{name} is neither a file nor a device that can be behind an NVDIMM")
    if state != "missing":
        _refuse_used(machine, name, shared)
    found = {"character": _devdax, "block": _block}.get(state, _file)(machine, name)
    return replace(found, identity=same_for_all_names(machine, name))


def has_labels(machine: Machine, name: str, at: int) -> bool:
    """Whether a label area begins at a byte of a file (drivers/nvdimm/label.h: the signature of an index block)."""
    try:
        with machine.open(name) as stream:
            stream.seek(at)
            return stream.read(len(INDEX)) == INDEX
    except (EmupmemError, OSError, ValueError):
        return False


def same_for_all_names(machine: Machine, name: str) -> str:
    """A word that is the same for all names of one file or device, also of one that is not there yet."""
    return processes.identity(machine, name) or machine.real(name)


def _refuse_used(machine: Machine, name: str, shared: bool) -> None:
    """Raise EmupmemError where a program or the kernel itself has it in use."""
    by = processes.kernel_use(machine, name)
    if by is not None:
        raise EmupmemError(f"{name} is in use {by[0]}", by[1])
    holders = [] if shared else processes.processes_mapping(machine, name)
    if holders:
        raise EmupmemError(
            f"{name} is in use by {', '.join(holders)}",
            "two virtual machines would write over each other; name another file, or --shared-backend",
        )


def file_inside(guest: str, number: int) -> str:
    """The name of the file in a folder for the n-th device of a virtual machine of that name."""
    plain = re.sub(r"[^\w.-]", "_", guest).lstrip(".")[:64]
    return NAME.format(f"{plain}-vnvdimm" if plain else "vnvdimm", number)


def _file(machine: Machine, name: str) -> Backend:
    there = machine.entry_kind(name) == "file"
    _refuse_kernel_folder(machine, name, there)
    real = machine.real(name)
    folder = real.rpartition("/")[0] or "/"
    if machine.entry_kind(folder) != "folder":
        leads = f"{name} leads to {real}, and " if machine.is_link(name) else ""
        raise EmupmemError(f"{leads}{folder} is not a folder", "make it first")
    size = machine.file_size(name) if there else None
    room = None if there else machine.room(folder)
    if there and not size:
        raise EmupmemError(f"{name} is empty", "remove it: a new file of the right size is made then")
    if there and (form := _form(machine, name)):
        raise EmupmemError(
            f"{name} is a disk image of the form {form}: the guest would write over it",
            f"qemu-img convert -O raw {name} NEW makes a raw one; -drive is for disks",
        )
    # A file can be a mount of its own (mount --bind), so the file is asked where there is one.
    on = _mount_of(machine, real if there else folder)
    if on is not None and on.fs in IN_MEMORY:
        pages = machine.block_size(folder) if on.fs == "hugetlbfs" else 0
        return Backend(Backing.VOLATILE_FILE, name, size, align=pages, room=room)
    below = next((d for d in devices(machine) if on is not None and d.number == on.number), None)
    if below is None:
        return Backend(Backing.FILE, name, size, room=room)
    direct, sync = _proof(name if there else folder, there)
    if not direct:
        return Backend(Backing.FILE, name, size, emulated=_emulated(below), room=room)
    return Backend(Backing.DAX_FILE, name, size, sync, _emulated(below), room=room)


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
    proof = dax.prove_dax(name)
    return bool(proof.dax_file), bool(proof.map_sync)


def _mount_of(machine: Machine, name: str) -> Mounted | None:
    number = machine.file_system(name)
    return next((m for m in reversed(mounts(machine)) if m.number == number), None)


def _emulated(device: Pmem) -> bool:
    return device.item is not None or device.provider == "ramdax"


def _devdax(machine: Machine, name: str) -> Backend:
    # By its numbers: a name, or where a link leads, says nothing.
    base = f"/sys/dev/char/{processes.character_number(machine, name)}"
    size = machine.peek(f"{base}/size")
    if not size.isdigit() or not machine.exists(f"/sys/bus/dax/devices/{machine.path(base).name}"):
        raise EmupmemError(f"{name} is not a DAX device", "as /dev/dax0.0")
    align = machine.peek(f"{base}/align")
    region = next((r for r in machine.regions() if r.name in machine.path(base).parts), None)
    ours = region is not None and (region.provider == "ramdax" or region.name in reserved_regions(machine))
    return Backend(
        Backing.DEVDAX,
        name,
        int(size),
        True,
        ours,
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
    if elsewhere := processes.mounted_elsewhere(machine, number):
        raise EmupmemError(
            f"{name} is mounted {elsewhere}: guest and host would destroy its file system",
            "unmount it there, or give a file",
        )
    with lock.hold_device(machine, name):
        pass
    return Backend(Backing.BLOCK, name, device.size, emulated=_emulated(device))
