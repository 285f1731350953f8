# SPDX-License-Identifier: Apache-2.0
"""The unit that mounts at every boot, for what was wished."""

from __future__ import annotations

from collections.abc import Sequence

from emupmem.device import keep as device_keep
from emupmem.device import unit
from emupmem.device.blocks import FILE_SYSTEMS, devices, mounts
from emupmem.device.decide import (
    MountRequest,
    MountSteps,
    check_dir,
    check_folder,
    check_fs,
    check_mode,
    folder_of,
)
from emupmem.device.installed import unit_program
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import DeviceKind, EmupmemError
from emupmem.record import record
from emupmem.system import accounts, files
from emupmem.system.distribution import install_hint
from emupmem.system.host import Host
from emupmem.system.machine import Machine
from emupmem.units import tight


def boot_mount_of(steps: MountSteps, request: MountRequest) -> unit.BootMount:
    item = steps.device.item
    assert item is not None  # at_boot has refused everything else
    return unit.BootMount(
        item.start, item.size, steps.dir, steps.fs, request.owner, request.mode, request.keep
    )


def _text(machine: Host) -> str | None:
    """The unit that is there, to be read."""
    data = machine.read(unit.FILE)
    return data.decode("utf-8", "replace") if data is not None else None


def is_at_boot(machine: Host, folder: str) -> bool:
    """Whether the unit mounts something at this folder."""
    try:
        text = _text(machine)
        return text is not None and any(m.dir == folder for m in unit.read_unit(text))
    except EmupmemError:
        return False


@record
class MountWish:
    """One --mount of apply: the folder, and what belongs to it."""

    dir: str
    fs: str = FILE_SYSTEMS[0]
    owner: str = ""
    mode: str = ""
    keep: str = ""


def check_wishes(machine: Host, wishes: Sequence[MountWish]) -> None:
    """Everything of --mount that can be judged before anything is changed. Raises EmupmemError."""
    for wish in wishes:
        name = check_dir(wish.dir)
        check_mode(wish.mode)
        if wish.owner:
            accounts.find_account(machine, wish.owner)
        tool = f"mkfs.{wish.fs}"
        if machine.live and machine.find(tool) is None:
            raise EmupmemError(f"{tool} is not installed", install_hint(machine, tool))
        # As before the reboot; a device of ours that is there already when apply runs again is as asked.
        ours = {d.number for d in devices(machine)} if machine.live else set()
        top = next((m for m in reversed(mounts(machine)) if m.dir == name), None) if machine.live else None
        if top is not None and top.number not in ours:
            raise EmupmemError(f"{name} is a mount point already ({top.source})", "choose another folder")
        if top is None:
            check_folder(name, folder_of(machine, name))
    if wishes:
        unit_program(machine)


def unit_change(
    machine: Host,
    reserved: Sequence[tuple[int, int]],
    wishes: Sequence[tuple[tuple[int, int], MountWish]] = (),
    soft: Sequence[tuple[int, int]] = (),
    devices: Sequence[unit.BootDevice] = (),
    plain: Sequence[tuple[int, int]] = (),
) -> unit.UnitChange:
    """The unit when `reserved` (pairs start, size) is what boots; `wishes` are added for their ranges.

    `soft` are the ranges of soft reserved memory that boot, `devices` are added for theirs; `plain` are to be no
    devdax devices any more.
    Raises EmupmemError; a unit that is not ours is an error only where something is asked of it.
    """
    data = machine.read(unit.FILE)
    before = data.decode("utf-8", "surrogateescape") if data is not None else None
    linked = machine.is_link(unit.LINK)
    asked = bool(wishes or devices)
    if before is None and not asked:
        return unit.UnitChange(None, None, linked)
    if not asked and not reserved and not soft and before is not None and before.startswith(unit.MARK):
        return unit.UnitChange(before, None, linked)  # whatever was edited in it
    new: list[unit.AtBoot] = list(devices)
    for (start, size), wish in wishes:
        check_fs(wish.fs, size, f"the device of {tight(size)}")
        name = check_dir(wish.dir)
        if wish.keep:
            device_keep.check_image(machine, wish.keep, size, name)
        new.append(unit.BootMount(start, size, name, wish.fs, wish.owner, wish.mode, wish.keep))
    if not new:
        try:
            present = unit.read_all(before or "")
        except EmupmemError:
            return unit.UnitChange(before, before, True)
        if all(unit.belongs_to(m, reserved, soft) and not unit.is_plain(m, plain) for m in present):
            return unit.UnitChange(before, before, True)  # nothing was asked of it
    return unit.changed(before, linked, reserved, unit_program(machine), new, soft, plain)


def write_unit(machine: Machine, change: unit.UnitChange) -> None:
    """Put the unit there and enable it, or take both away. Raises EmupmemError."""
    if change.after is not None:
        files.install_file(machine, unit.FILE, change.after)
        files.make_link(machine, unit.LINK, unit.FILE)
    else:
        files.delete_file(machine, unit.LINK)
        files.delete_file(machine, unit.FILE)
    if machine.live:
        machine.output("systemctl", "daemon-reload")


def mount_at_boot(machine: Host, steps: MountSteps, request: MountRequest) -> unit.UnitChange:
    """The unit that does the same at every boot. Raises EmupmemError for a device that is not ours.

    What the request leaves open stays as the unit has it: a second call does not end what the first began to keep.
    """
    item = steps.device.item
    if item is None:
        raise EmupmemError(
            f"{steps.device.dev} is not one of emupmem's devices",
            "its content stays: a line in /etc/fstab serves it",
        )
    if not steps.device.whole:
        raise EmupmemError(
            f"{steps.device.dev} is a part of what memmap={item.text} reserves",
            "at every boot only whole devices are mounted",
        )
    items = parse_command_line(machine.peek("/proc/cmdline")).pmem
    before = _recorded(machine, item.start, item.size)
    wish = MountWish(
        steps.dir,
        steps.fs,
        request.owner or (before.owner if before else ""),
        request.mode or (before.mode if before else ""),
        request.keep or (before.keep if before else ""),
    )
    configured = _configured(machine) or [(i.start, i.size) for i in items]
    soft = [span for span, kind in recorded_kinds(machine).items() if kind.soft]
    return unit_change(
        machine, [*configured, (item.start, item.size)], [((item.start, item.size), wish)], soft
    )


def _recorded(machine: Host, start: int, size: int) -> unit.BootMount | None:
    """How the unit mounts this range, at whatever folder."""
    text = _text(machine)
    there = unit.read_unit(text) if text is not None else ()
    return next((m for m in there if (m.start, m.size) == (start, size)), None)


def _configured(machine: Host) -> list[tuple[int, int]]:
    """Ranges that the present unit names: mount --at-boot takes none of them away."""
    text = _text(machine)
    return [(m.start, m.size) for m in unit.read_all(text)] if text is not None else []


def recorded_kinds(machine: Host) -> dict[tuple[int, int], DeviceKind]:
    """What the unit makes of ranges that it does not mount, by the range (start, size); none where it was edited."""
    text = _text(machine)
    try:
        found = unit.read_devices(text) if text is not None else ()
    except EmupmemError:
        return {}
    return {(d.start, d.size): d.kind for d in found}
