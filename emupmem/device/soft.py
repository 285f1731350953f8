# SPDX-License-Identifier: Apache-2.0
"""Soft reserved memory at every boot: a DAX device, or memory of the system by the kmem driver.

The kernel makes a device of the dax bus of each range (dax_hmem) and gives it to kmem by itself since Linux 6.3,
to device_dax before (drivers/dax/hmem/hmem.c, dax_match_type of drivers/dax/bus.c). What kmem takes comes online at
once as ordinary memory where auto_online_blocks says so, and may never go offline again: `WITHOUT_KMEM` on the command
line keeps kmem away until this is at work. All is done through sysfs, which is the same on all kernels; daxctl writes
the same files, and what it does by itself differs from version to version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from emupmem.device import unit
from emupmem.kernel.cmdline import WITHOUT_KMEM, parse_command_line
from emupmem.model import DaxDevice, DeviceKind, EmupmemError, MemoryBlock, Span
from emupmem.system.files import write_sysfs
from emupmem.system.host import Host
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.system.sysfs import read_dax_devices, read_memory_blocks
from emupmem.units import human

DRIVER_OF = {DeviceKind.DAX: "device_dax", DeviceKind.MEMORY: "kmem"}
_DRIVERS = "/sys/bus/dax/drivers"
_BLOCKS = "/sys/devices/system/memory"
_POLICY = f"{_BLOCKS}/auto_online_blocks"


def set_up(machine: Machine, wanted: unit.BootDevice) -> str:
    """Give the device of the range the driver of its kind, and take memory online; what was done.

    Raises EmupmemError.
    """
    driver = DRIVER_OF[wanted.kind]
    _load(machine, "dax_hmem")
    device = _wait_for_dax(machine, wanted)
    span = Span(wanted.start, wanted.start + wanted.size)
    with _all_movable(machine) if wanted.kind is DeviceKind.MEMORY else nullcontext():
        _load(machine, driver)  # kmem takes what has no driver yet
        device = dax_device_of(machine, wanted.start) or device
        if device.driver != driver:
            _rebind(machine, device, driver, span)
    node = f", node {device.node}" if device.node is not None and device.node >= 0 else ""
    if wanted.kind is DeviceKind.DAX:
        return f"/dev/{device.name} is ready · {human(device.size)}{node} · emulated, volatile"
    blocks = take_online(machine, span)
    size = sum(b.span.size for b in blocks)
    return f"{human(size)} of {device.name} is memory of the system{node}, movable"


def serve_others(machine: Machine, ours: Sequence[unit.BootDevice]) -> None:
    """Let kmem have the devices that are not ours, such as CXL memory, where our word has kept it away from them."""
    if WITHOUT_KMEM not in parse_command_line(machine.peek("/proc/cmdline")).words:
        return
    starts = {one.start for one in ours}
    if any(not d.driver and d.start not in starts for d in read_dax_devices(machine)):
        _load(machine, DRIVER_OF[DeviceKind.MEMORY])


def _load(machine: Machine, module: str) -> None:
    """Load a module by its name, which a blacklist does not prevent; where there is none, a later step tells."""
    machine.output("modprobe", "-q", module)


@contextmanager
def _all_movable(machine: Machine) -> Iterator[None]:
    """New memory comes online as movable meanwhile, whatever the policy of this machine is."""
    policy = machine.peek(_POLICY)
    if policy in ("", "online_movable"):
        yield
        return
    write_sysfs(machine, _POLICY, "online_movable")
    try:
        yield
    finally:
        write_sysfs(machine, _POLICY, policy)


def dax_device_of(machine: Host, start: int) -> DaxDevice | None:
    """The device of the dax bus that begins at an address, None where there is none."""
    return next((d for d in read_dax_devices(machine) if d.start == start), None)


def take_online(machine: Machine, span: Span) -> tuple[MemoryBlock, ...]:
    """Have all memory of a range online and movable; the blocks of it. Raises EmupmemError."""
    for block in read_memory_blocks(machine, span):
        state = block.state
        if state == "online" and "Movable" not in block.zones.split()[:1]:
            _write_state(machine, block, "offline")  # the kernel or udev took it as ordinary memory
            state = next(b.state for b in read_memory_blocks(machine, block.span))
        if state == "offline":
            _write_state(machine, block, "online_movable")
    blocks = read_memory_blocks(machine, span)
    if not blocks:
        raise EmupmemError("kmem made no memory of it", "sudo dmesg | grep -i kmem shows why")
    return blocks


def _wait_for_dax(machine: Machine, wanted: unit.BootDevice) -> DaxDevice:
    wait_for(lambda: dax_device_of(machine, wanted.start) is not None, unit.SECONDS)
    machine.settle()
    device = dax_device_of(machine, wanted.start)
    if device is None:
        raise EmupmemError(
            f"no device for memmap={wanted.range} appeared within {unit.SECONDS} seconds",
            "sudo emupmem verify shows why",
        )
    return device


def _rebind(machine: Machine, device: DaxDevice, driver: str, span: Span) -> None:
    """Give a device another driver; memory of kmem goes offline first, or it would be lost until the next boot."""
    if not machine.exists(f"{_DRIVERS}/{driver}"):
        raise EmupmemError(
            f"this kernel has no driver {driver}", f"sudo modprobe {driver} tells more; sudo emupmem verify"
        )
    if device.driver == DRIVER_OF[DeviceKind.MEMORY]:
        for block in read_memory_blocks(machine, span):
            if block.state == "online":
                _write_state(machine, block, "offline")
    if device.driver:
        write_sysfs(machine, f"{_DRIVERS}/{device.driver}/unbind", device.name)
    write_sysfs(machine, f"{_DRIVERS}/{driver}/new_id", device.name)
    now = dax_device_of(machine, span.start)
    if now is None or now.driver != driver:
        raise EmupmemError(
            f"{driver} does not take {device.name}", "sudo dmesg | grep -E 'dax|kmem' shows why"
        )


def _write_state(machine: Machine, block: MemoryBlock, state: str) -> None:
    try:
        write_sysfs(machine, f"{_BLOCKS}/{block.name}/state", state)
    except EmupmemError as exc:
        raise EmupmemError(
            f"{block.name} does not become {state}: {exc.message}",
            "programs or the kernel use it: a restart with the unit enabled sets it up before they do",
        ) from exc
