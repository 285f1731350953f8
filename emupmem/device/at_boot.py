# SPDX-License-Identifier: Apache-2.0
"""What that unit runs."""

from __future__ import annotations

from collections.abc import Sequence

from emupmem.device import devdax, keep, soft, unit
from emupmem.device.blocks import Pmem, devices
from emupmem.device.decide import MountOutcome, MountRequest, Tell
from emupmem.device.mount import carry_out_mount, prepare
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import DeviceKind, EmupmemError
from emupmem.system import lock
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.units import human

VOLATILE = "emulated, volatile: its content does not survive a power cycle"


# At every boot -------------------------------------------------------------------------------------------


def boot(machine: Machine, wanted: Sequence[unit.AtBoot], say: Tell) -> int:
    """What the unit runs: mount and set up what can be, a line for each.

    0 if all is well, 1 if something failed, `unit.SOME_FAILED` if so and the content of a mount is kept.
    """
    well = True
    for one in sorted(wanted, key=_turn):
        try:
            say(_boot_one(machine, one) if isinstance(one, unit.BootMount) else _set_up(machine, one))
        except EmupmemError as exc:
            well = False
            hint = f"; {exc.hint}" if exc.hint else ""
            say(f"emupmem: {one.failed}: {exc.message}{hint}")
    if well:
        soft.serve_others(machine, [one for one in wanted if isinstance(one, unit.BootDevice)])
        return 0
    kept = (m for m in wanted if isinstance(m, unit.BootMount) and m.keep)
    return unit.SOME_FAILED if any(keep.belongs(machine, m) for m in kept) else 1


def _turn(one: unit.AtBoot) -> int:
    """DAX devices come before memory: once kmem is loaded, it takes what has no driver yet."""
    return 1 if isinstance(one, unit.BootDevice) and one.kind is DeviceKind.MEMORY else 0


def _is_reserved(machine: Machine, wanted: unit.AtBoot) -> bool:
    """Whether this boot reserves the range. Raises EmupmemError where it reserves another in its place."""
    is_soft = isinstance(wanted, unit.BootDevice) and wanted.kind.soft
    items = parse_command_line(machine.peek("/proc/cmdline")).reservations
    if any((i.start, i.size, i.soft) == (wanted.start, wanted.size, is_soft) for i in items):
        return True
    ends = wanted.start + wanted.size
    other = next((i for i in items if i.start < ends and wanted.start < i.start + i.size), None)
    if other is not None:
        asked = f"--as {wanted.kind}" if isinstance(wanted, unit.BootDevice) else "--mount …"
        raise EmupmemError(
            f"this boot reserves memmap={other.text} where it was memmap={wanted.range}",
            f"sudo emupmem apply --replace --size … {asked} makes the two agree",
        )
    return False


def _set_up(machine: Machine, wanted: unit.BootDevice) -> str:
    if not _is_reserved(machine, wanted):
        return f"this boot does not reserve memmap={wanted.range}: no {wanted.kind} to set up"
    make = soft.set_up if wanted.kind.soft else devdax.make_devdax
    return lock.wait_for_lock(machine, lambda: make(machine, wanted), unit.SECONDS)


def _boot_one(machine: Machine, wanted: unit.BootMount) -> str:
    if not _is_reserved(machine, wanted):
        # After `remove`, in a rescue entry, or before the first reboot: nothing is wrong.
        return f"this boot does not reserve memmap={wanted.range}: nothing to mount at {wanted.dir}"
    device = _wait_for_device(machine, wanted)
    request = MountRequest(device.dev, wanted.dir, wanted.fs, wanted.owner, wanted.mode)
    brought, missed = False, ""

    def work() -> MountOutcome:
        nonlocal brought, missed
        if wanted.keep and not keep.belongs(machine, wanted):
            # What the memory still holds after a warm restart is no save: the image counts.
            missed = missed or keep.look_for_missed(machine, wanted)
            brought = keep.bring_back(machine, wanted, device.dev)
        outcome = carry_out_mount(machine, prepare(machine, request), at_boot=True)
        if wanted.keep:
            keep.remember(machine, wanted)
        return outcome

    # udev or another emupmem may hold what we need for a moment
    outcome = lock.wait_for_lock(machine, work, unit.SECONDS)
    if not outcome.ok:
        broken = next(c for c in outcome.rungs if c.status == "fail")
        raise EmupmemError(f"it is mounted, but {broken.name}: {broken.found}", broken.hint)
    kept = "kept from before this start" if outcome.steps.kept else "newly created"
    if brought:
        kept = f"brought back from {wanted.keep}"
    if missed:
        kept += f" ({missed})"
    fate = f"saved to {wanted.keep} at an orderly shutdown only" if wanted.keep else VOLATILE
    return f"{device.dev} is mounted at {wanted.dir} · {outcome.steps.fs}, {kept} · {fate}"


def _wait_for_device(machine: Machine, wanted: unit.BootMount) -> Pmem:
    def found() -> Pmem | None:
        ready = (d for d in devices(machine) if d.start == wanted.start and machine.block_number(d.dev))
        return next(ready, None)

    wait_for(lambda: found() is not None, unit.SECONDS)
    machine.settle()  # udev has the device open while it looks at it
    device = found()
    if device is None:
        raise EmupmemError(
            f"no device for memmap={wanted.range} appeared within {unit.SECONDS} seconds",
            "sudo emupmem verify shows why",
        )
    if device.size != wanted.size:
        raise EmupmemError(
            f"{device.dev} has {human(device.size)} instead of {human(wanted.size)}",
            "a mode of its own takes a part of it (sudo emupmem nvdimm show): sudo ndctl destroy-namespace -f, or a "
            "cold start, makes it plain again",
        )
    return device
