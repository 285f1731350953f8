# SPDX-License-Identifier: Apache-2.0
"""From a pmem device to a folder: what may be done with a device (pure), and doing it through `Machine`.

A file system is made on a blank device only, unless --force says otherwise of one of our own; what
is mounted is never formatted, and no disk that is not persistent memory is ever touched.
"""

from __future__ import annotations

import dataclasses
import time

from emupmem.device import keep, unit
from emupmem.device.blocks import Mounted, data_of, devices, mounts
from emupmem.device.boot_unit import boot_mount_of, mount_at_boot, write_unit
from emupmem.device.decide import (
    MKFS_SECONDS,
    MountOutcome,
    MountRequest,
    MountSteps,
    check_dir,
    check_mode,
    choose_pmem,
    decide,
    default_dir,
    folder_of,
    mounted_here,
    refuse_device,
)
from emupmem.device.proof import mount_rungs, see_mount
from emupmem.kernel.release import kernel_version
from emupmem.model import UNCHANGED, Command, EmupmemError
from emupmem.record import record
from emupmem.system import accounts, files, lock, processes
from emupmem.system.distribution import install_hint
from emupmem.system.lock import interrupts
from emupmem.system.machine import Machine

# Doing ---------------------------------------------------------------------------------------------------


@record
class Prepared:
    """A request that was found good: the steps, and the ids and the mode that its words mean."""

    steps: MountSteps
    owner: tuple[int, int] | None
    mode: int | None


def prepare(machine: Machine, request: MountRequest) -> Prepared:
    """Look at the device and decide, changing nothing. Raises EmupmemError for every refusal."""
    owner = accounts.find_account(machine, request.owner) if request.owner else None
    mode = check_mode(request.mode)
    if request.dir is not None:
        check_dir(request.dir)
    number = machine.block_number(request.device) if request.device else ""
    if request.device is not None and not request.device.startswith("/"):
        raise EmupmemError(f"{request.device} is not absolute", f"did you mean /dev/{request.device}?")
    device = choose_pmem(devices(machine), request, number)
    request = dataclasses.replace(request, dir=check_dir(request.dir or default_dir(device)))
    name = request.dir or ""
    kernel = kernel_version(machine.peek("/proc/sys/kernel/osrelease"))
    all_mounts = mounts(machine)
    holds = ""
    if mounted_here(device, request, all_mounts, name) is None:
        refuse_device(device)  # each with its own words, before the kernel's EBUSY
        with lock.hold_device(machine, device.dev):
            holds = data_of(machine, device)
    steps = decide(device, request, all_mounts, holds, folder_of(machine, name), kernel)
    missing = [c.argv[0] for c in steps.commands if machine.find(c.argv[0]) is None]
    if missing:
        raise EmupmemError(f"{missing[0]} is not installed", install_hint(machine, missing[0]))
    return Prepared(steps, owner, mode)


def carry_out_mount(machine: Machine, prepared: Prepared, at_boot: bool = False) -> MountOutcome:
    """Make, mount, give to the owner, prove. Raises EmupmemError, which says how far it came.

    A proof that fails is in the outcome: nothing is undone.
    """
    steps = prepared.steps
    if at_boot and steps.kept and steps.fs == "ext4" and steps.commands:
        _check_ext4(machine, steps)
    if steps.make:
        files.make_folders(machine, steps.dir)
        if machine.real(steps.dir) != steps.dir or machine.folder_state(steps.dir) != "empty":
            raise EmupmemError(f"{steps.dir} changed while it was made", "look at it and try again")
    for command in steps.commands:
        done = machine.run(command, MKFS_SECONDS)
        if done.status:
            failure = EmupmemError(
                f"{command.argv[0]} failed with status {done.status}: {done.last_words}",
                _mount_hint(steps, command),
            )
            failure.changed = steps.commands[0].argv[0] != "mount"  # a file system was made, or begun
            raise failure
    device = steps.device
    changed = bool(steps.commands)
    if prepared.owner is not None or prepared.mode is not None:
        changed |= files.set_mount_owner(machine, steps.dir, device.number, prepared.owner, prepared.mode)
    seen = see_mount(machine, device, steps.dir, steps.fs, mounts(machine), False)
    return MountOutcome(steps, changed, seen, mount_rungs((seen,)))


def _mount_hint(steps: MountSteps, command: Command) -> str:
    if command.argv[0] != "mount":
        return f"{steps.device.dev} is not mounted"
    if steps.kept:
        return (
            f"the {steps.fs} that is on {steps.device.dev} cannot be mounted with DAX; "
            f"sudo emupmem mount {steps.device.dev} {steps.dir} --force makes a new one (and destroys it)"
        )
    return "sudo dmesg | tail shows why"


def _check_ext4(machine: Machine, steps: MountSteps) -> None:
    """What RAM kept over a warm restart may be damaged; e2fsck repairs what is safe and refuses the rest."""
    done = machine.output("e2fsck", "-p", steps.device.dev, timeout=MKFS_SECONDS)
    if done is not None and done.status >= 4:
        raise EmupmemError(
            f"the ext4 that was on {steps.device.dev} before this start is damaged: {done.last_words}",
            f"sudo emupmem mount {steps.device.dev} {steps.dir} --force makes a new one (and destroys it)",
        )


UMOUNT_TRIES, UMOUNT_PAUSE = 10, 0.3
"""Busy, but nobody has it open: seen once, with XFS on 7.2 that had just been made. It is tried again for a while."""


def unmount_device(machine: Machine, name: str) -> Mounted:
    """Unmount persistent memory. Raises EmupmemError for other mounts, and when busy with who holds it."""
    folder = check_dir(name)
    all_mounts = mounts(machine)
    top = next((m for m in reversed(all_mounts) if m.dir == folder), None)
    if top is None:
        raise EmupmemError(f"nothing is mounted at {folder}", "emupmem verify shows what is")
    if top.number not in {d.number for d in devices(machine)}:
        raise EmupmemError(f"{folder} is not persistent memory: {top.source}", "umount is for other mounts")
    above = sorted(m.dir for m in all_mounts if m.dir.startswith(f"{folder}/"))
    for left in reversed(range(UMOUNT_TRIES)):
        done = machine.run(Command(("umount", folder), "unmount it"))
        if not done.status:
            return top
        holders = [f"the mount {d}" for d in above] + processes.processes_using(machine, top.number)
        if holders:
            listed = ", ".join(holders[:8]) + (f" and {len(holders) - 8} more" if len(holders) > 8 else "")
            raise EmupmemError(
                f"{folder} is in use by {listed}", "end these, then try again", state=UNCHANGED
            )
        if left:
            time.sleep(UMOUNT_PAUSE)
    raise EmupmemError(f"umount failed with status {done.status}: {done.last_words}")


def mount_device(
    machine: Machine, request: MountRequest, boots: bool
) -> tuple[MountOutcome, unit.UnitChange | None]:
    """The whole of the mount command; `boots` installs the unit as well. Raises EmupmemError."""
    with lock.change_lock(machine), interrupts() as stop:
        prepared = prepare(machine, request)
        if boots:
            mount_at_boot(machine, prepared.steps, request)  # refuses before anything is done
        if request.keep:
            _refuse_keep(machine, prepared.steps, request)
        stop.check()  # from here on to the end: it takes a moment, and half of it serves nobody
        outcome = carry_out_mount(machine, prepared)
        change = mount_at_boot(machine, prepared.steps, request) if boots else None
        if change is not None and change.needed:
            write_unit(machine, change)
        if request.keep:
            keep.remember(machine, boot_mount_of(prepared.steps, request))
    if request.keep and machine.live:
        # Only an active unit saves when it is stopped. It finds all as it should be.
        done = machine.run(Command(("systemctl", "start", unit.NAME), "have it active"), MKFS_SECONDS)
        if done.status:
            raise EmupmemError(
                f"{unit.NAME} does not start: {done.last_words}", f"journalctl -b -u {unit.NAME}"
            )
    return outcome, change


def _refuse_keep(machine: Machine, steps: MountSteps, request: MountRequest) -> None:
    """Two contents and one image: which of them counts must not be guessed. Raises EmupmemError."""
    if machine.file_size(request.keep) is None or keep.belongs(machine, boot_mount_of(steps, request)):
        return
    raise EmupmemError(
        f"{request.keep} is there already, and what {steps.device.dev} holds now would be saved over it",
        f"sudo emupmem restore {request.keep} {steps.device.dev} brings it back, then mv it away; or give "
        "another name",
    )
