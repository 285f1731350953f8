# SPDX-License-Identifier: Apache-2.0
"""Content kept on purpose: saved at an orderly shutdown, brought back at the next start.

RAM forgets at every power cycle, so the content of a device that shall be kept lives in an image (see
`image`) on a disk. The unit saves it when it is stopped and brings it back before it mounts. A device
whose image could not be brought back is never saved over that image, and no other image is saved over that
somebody put in its place: a note under /run tells which devices hold what belongs to their image in this boot,
and which image that was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from emupmem.device.blocks import Pmem, devices, mount_of, mounts, signature
from emupmem.device.unit import UNSAVED, BootMount
from emupmem.model import Command, EmupmemError
from emupmem.system import files, processes
from emupmem.system.backups import stamp
from emupmem.system.files import refuse_kernel_folder
from emupmem.system.host import Host
from emupmem.system.machine import Machine
from emupmem.units import human

NOTES = "/run/emupmem"
VOLATILE = ("tmpfs", "ramfs", "devtmpfs", "overlay")
NO_IMAGE = "none"
UMOUNT_SECONDS = 60
BOOT_ID = "/proc/sys/kernel/random/boot_id"

Tell = Callable[[str], None]


def check_image(machine: Host, file: str, size: int, folder: str) -> None:
    """Refuse an image file that could not keep `size` bytes of the device mounted at `folder`.

    Raises EmupmemError. Of a tree only the name is judged.
    """
    if not file.startswith("/") or {"", ".", ".."} & set(file[1:].split("/")):
        raise EmupmemError(f"{file} is not a plain absolute name", "as in /var/lib/emupmem/pmem0.img")
    refuse_kernel_folder(file, machine.real(file))
    if file.startswith(f"{folder}/"):
        raise EmupmemError(f"{file} is on the device it would back up", "keep it on a disk")
    if not machine.live:
        return
    parent = file.rpartition("/")[0] or "/"
    if machine.folder_state(parent) not in ("empty", "full"):
        raise EmupmemError(f"{parent} is not a folder", f"sudo mkdir -p {parent}")
    if machine.real(file) != file:
        raise EmupmemError(f"{file} leads to {machine.real(file)} by a symbolic link", "name that instead")
    loose = machine.loose_parent(file)
    if loose:
        raise EmupmemError(
            f"{loose} can be changed by others than root, and the file is written as root",
            "choose a folder that only root can change, as /var/lib/emupmem",
        )
    on = mount_of(mounts(machine), parent)
    if on is not None and (on.fs in VOLATILE or "/dev/pmem" in on.source):
        raise EmupmemError(
            f"{parent} is on {on.fs} ({on.source}), which forgets as well", "keep it on a disk"
        )
    there = machine.file_size(file)
    if there is not None and there != size:
        raise EmupmemError(
            f"{file} is there already and has {human(there)}, the device {human(size)}",
            "an image fits only a device of the same size: give another name",
        )
    room = machine.room(parent)
    if room < size:
        raise EmupmemError(
            f"{parent} has {human(room)} free: a full device needs {human(size)} in addition to the last image",
            "choose a folder on another disk",
        )


def note(wanted: BootMount) -> str:
    """Where it is noted that the device holds what belongs to its image."""
    return _note_of(wanted.range)


def _note_of(range_: str) -> str:
    return f"{NOTES}/kept.{range_.replace('!', '-')}"


def belongs(machine: Host, wanted: BootMount) -> bool:
    """Whether the content of the device belongs to its image in this boot."""
    return _noted(machine, note(wanted))[0] == wanted.keep


def _noted(machine: Host, name: str) -> tuple[str, str]:
    """What a note names, and which image that was then (`NO_IMAGE`: none was there)."""
    keep, between, which = machine.peek(name).rpartition("\n")
    return (keep, which) if between else (which, "")  # a version before this one wrote the name only


def _which(machine: Host, file: str) -> str:
    """What tells an image from another one that somebody put in its place."""
    size = machine.file_size(file)
    return NO_IMAGE if size is None else f"{size} {machine.modified(file)}"


def _write_note(machine: Machine, name: str, file: str) -> None:
    files.install_file(machine, name, f"{file}\n{_which(machine, file)}\n")


def saved_by_hand(machine: Machine, file: str, dev: str) -> None:
    """An image of a device was written: where it is the one that is kept of it, that is the one to replace."""
    device = next((d for d in devices(machine) if d.dev == dev and d.item is not None), None)
    if device is not None and device.item is not None:
        name = _note_of(device.item.text)
        if _noted(machine, name)[0] == file:
            with contextlib.suppress(EmupmemError):  # it is saved; the next save goes beside it then
                _write_note(machine, name, file)


def remember(machine: Machine, wanted: BootMount) -> None:
    """From now on the content of the device belongs to its image: it is saved at shutdown."""
    if not belongs(machine, wanted):  # else the note tells which image was there when it began
        _write_note(machine, note(wanted), wanted.keep)
    with contextlib.suppress(EmupmemError):  # without room for that the content is there all the same
        files.install_file(machine, unsaved(wanted), machine.peek(BOOT_ID) + "\n")


def unsaved(wanted: BootMount) -> str:
    """Where the boot is noted, on the disk, whose content is still to be saved. It goes with the save."""
    return f"{wanted.keep}{UNSAVED}"


def look_for_missed(machine: Machine, wanted: BootMount) -> str:
    """What to tell of the last shutdown, if it did not save: a power cut, or a program that could not start.

    To be asked before the content is brought back; it is noted for verify. Empty where all is well.
    """
    boot = machine.peek(unsaved(wanted))
    due, saved = machine.modified(unsaved(wanted)), machine.modified(wanted.keep)
    if not boot or boot == machine.peek(BOOT_ID) or (due and saved and saved > due):
        return ""
    when = datetime.fromtimestamp(saved, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if saved else ""
    last = f"what is there was saved {when}" if when else "it was never saved before"
    missed = f"the last shutdown did not save it: {last}"
    with contextlib.suppress(EmupmemError):
        files.install_file(machine, missed_note(wanted), missed)
    return missed


def missed_note(wanted: BootMount) -> str:
    """Where it is noted for this boot that the shutdown before it did not save."""
    return f"{NOTES}/missed.{wanted.range.replace('!', '-')}"


def bring_back(machine: Machine, wanted: BootMount, dev: str) -> bool:
    """Write the image onto the device, if there is one; whether there was. Raises EmupmemError.

    The image is checked as a whole before the first byte is written.
    """
    if machine.file_size(wanted.keep) is None:
        return False
    from emupmem.device import image  # threads and maps: apply and verify need none of it

    image.restore_image(machine, wanted.keep, dev)
    return True


def save_all(machine: Machine, wanted: Sequence[BootMount], say: Tell) -> bool:
    """What the unit runs when it is stopped: save each device that belongs to its image; whether all is well."""
    well = True
    for mount in wanted:
        if not mount.keep:
            continue
        try:
            say(_save(machine, mount))
        except EmupmemError as exc:
            well = False
            hint = f"; {exc.hint}" if exc.hint else ""
            say(f"emupmem: {mount.dir} is not saved: {exc.message}{hint}; {mount.keep} stays as it was")
    return well


def _save(machine: Machine, wanted: BootMount) -> str:
    if not belongs(machine, wanted):
        return f"{wanted.dir} is not saved: it was neither brought back nor made in this boot"
    device = next((d for d in devices(machine) if d.start == wanted.start and d.whole), None)
    if device is None:
        raise EmupmemError(f"the device of memmap={wanted.range} is not there")
    where = _reached_at(machine, device)
    covered = next((m.dir for m in mounts(machine) if m.number == device.number and m.root == "/"), "")
    if covered and not where:  # by another file system: a shutdown ends that one as well
        machine.output("umount", covered, timeout=UMOUNT_SECONDS)
        where = _reached_at(machine, device)
    if where and not _is_shared(machine, device):
        # Unmounted, nothing can be written after it was saved. Where somebody still holds it, it is frozen.
        machine.output("umount", where, timeout=UMOUNT_SECONDS)
        where = _reached_at(machine, device)
    if not where and not signature(machine, device.dev):
        return f"{wanted.dir} is not saved: {device.dev} is blank, and {wanted.keep} stays as it was"
    from emupmem.device import image

    held = f" (still mounted at {where}, frozen while it was saved)" if where else ""
    if _noted(machine, note(wanted))[1] not in (now := _which(machine, wanted.keep), "") and now != NO_IMAGE:
        # Two contents: neither is thrown away, and the next start brings back what lies there.
        beside = f"{wanted.keep}.{stamp()}"
        image.save_image(machine, beside, where or device.dev)
        machine.run(Command(("sync", "-f", beside), "have the image on the disk"))
        return (
            f"{device.dev} saved to {beside}{held}, since {wanted.keep} is another image than at the start: that "
            "stays, and is brought back at the next boot"
        )
    done = image.save_image(machine, wanted.keep, where or device.dev)
    with contextlib.suppress(EmupmemError):
        _write_note(machine, note(wanted), wanted.keep)
    machine.run(Command(("sync", "-f", wanted.keep), "have the image on the disk"))
    with contextlib.suppress(EmupmemError):  # the image is newer than the note then, and that counts
        files.delete_file(machine, unsaved(wanted))
    return (
        f"{device.dev} saved to {wanted.keep}{held} · {human(done.allocated)} on disk, {done.seconds:.1f} s"
    )


def _reached_at(machine: Host, device: Pmem) -> str:
    """A folder where the whole file system of a device is seen: nothing else is mounted over it; empty without."""
    top = {m.dir: m for m in mounts(machine)}
    return next((m.dir for m in top.values() if m.number == device.number and m.root == "/"), "")


def _is_shared(machine: Machine, device: Pmem) -> bool:
    """Whether it stays mounted when one mount goes: bound to other places, or in a container's mount namespace.

    Then it can be frozen as long as it is mounted here, and not be opened alone afterwards.
    """
    own = [m for m in mounts(machine) if m.number == device.number]
    return len(own) > 1 or bool(processes.mounted_elsewhere(machine, device.number))
