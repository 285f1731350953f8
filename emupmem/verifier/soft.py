# SPDX-License-Identifier: Apache-2.0
"""The rungs of soft reserved memory: its device, the driver that has it, and memory that is online. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emupmem.device.soft import DRIVER_OF
from emupmem.kernel.cmdline import WITHOUT_KMEM
from emupmem.model import Check, Device, DeviceKind, ModuleState, Presence
from emupmem.units import human, span_text
from emupmem.verifier.observation import Observation, SeenSoft

SOFT_RUNGS = ("dax-device", "driver", "online", "tier")
AGAIN = (
    "sudo systemctl restart emupmem.service sets it up again; journalctl -b -u emupmem.service tells why not"
)


def soft_rungs(seen: Observation) -> list[tuple[str, Callable[[], Check]]]:
    """The rungs of this machine's soft reserved memory in order; the last two where it is memory."""
    if not seen.command_line.soft:
        return []
    rungs: list[tuple[str, Callable[[], Check]]] = [
        (SOFT_RUNGS[0], lambda: _dax_device(seen.soft)),
        (SOFT_RUNGS[1], lambda: _driver(seen)),
    ]
    memory = [s for s in seen.soft if s.kind is DeviceKind.MEMORY]
    if memory:
        rungs += [(SOFT_RUNGS[2], lambda: _online(seen, memory)), (SOFT_RUNGS[3], lambda: _tier(memory))]
    return rungs


def soft_complete(seen: Observation) -> bool:
    """Whether all of it is as it is to be: what --wait waits for."""
    return all(check().status == "ok" for name, check in soft_rungs(seen) if name != SOFT_RUNGS[3])


def soft_devices(seen: Observation) -> tuple[Device, ...]:
    """The devices that it became."""
    return tuple(
        Device(f"/dev/{s.device.name}", s.device.start, s.device.size, s.device.node)
        for s in seen.soft
        if s.device is not None
    )


def _dax_device(soft: Sequence[SeenSoft]) -> Check:
    name = SOFT_RUNGS[0]
    expected = ", ".join(
        f"a device of {human(s.item.size)} at {span_text(s.item.span.start, s.item.span.end)}" for s in soft
    )
    found = []
    for one in soft:
        device = one.device
        if device is None:
            return Check(name, "fail", expected, *_no_device(one))
        if device.size != one.item.size:
            what = f"{device.name} has {human(device.size)} instead of {human(one.item.size)}"
            return Check(
                name, "fail", expected, what, "sudo dmesg | grep -iE 'hmem|dax' shows why the range was cut"
            )
        node = f", node {device.node}" if device.node is not None and device.node >= 0 else ""
        align = f", aligned to {human(device.align)}" if device.align else ""
        unseen = "" if device.start is not None else " (its address is shown to root only)"
        found.append(f"{device.name}, {human(device.size)}{align}{node}{unseen}")
    return Check(name, "ok", expected, "; ".join(found) + " · emulated, volatile")


def _no_device(one: SeenSoft) -> tuple[str, str]:
    """What is found in place of a device, and what to do."""
    for module in one.modules:
        hint = f"install the package that holds {module.name}, or another kernel"
        if problem := driver_problem(module, hint):
            return problem
        if module.presence is Presence.AVAILABLE and module.name == "dax_hmem":
            return "no device; the driver dax_hmem is not loaded", "sudo modprobe dax_hmem"
    return "no device; the kernel made none of the range", "sudo dmesg | grep -iE 'hmem|dax' shows why"


def driver_problem(module: ModuleState, hint: str) -> tuple[str, str] | None:
    """Why there is no device for want of a driver, and what to do (`hint`, where this kernel has none); else None."""
    if module.presence is Presence.BLOCKED:
        return (
            f"no device; the driver {module.name} is not loaded (blacklisted in {module.where})",
            f"remove that line, or: sudo modprobe {module.name}",
        )
    if module.presence is Presence.MISSING:
        return f"no device; this kernel has no module {module.name}", hint
    return None


def _again(seen: Observation) -> str:
    """What sets it up again: without our word kmem may take it before the unit is at work."""
    if WITHOUT_KMEM in seen.command_line.words:
        return AGAIN
    return (
        f"the next start needs {WITHOUT_KMEM}, or the kernel gives the range to kmem first: the same emupmem apply "
        "adds it"
    )


def _driver(seen: Observation) -> Check:
    name, soft = SOFT_RUNGS[1], seen.soft
    expected = ", ".join(DRIVER_OF[s.kind] if s.kind else "device_dax or kmem" for s in soft)
    found = []
    for one in soft:
        device = one.device
        assert device is not None  # the rung before
        wanted = (DRIVER_OF[one.kind],) if one.kind else tuple(DRIVER_OF.values())
        if seen.tries and not device.driver:
            found.append(f"{device.name} gets its driver by emupmem.service, after emupmem confirm")
            continue
        if device.driver not in wanted:
            what = f"{device.name} has {device.driver or 'no driver'}"
            hint = _again(seen) if one.kind else "sudo emupmem apply --replace --size … --as … chooses one"
            return Check(name, "fail", expected, what, hint)
        if device.driver == DRIVER_OF[DeviceKind.DAX] and not one.char:
            return Check(name, "fail", expected, f"/dev/{device.name} is not there", "sudo udevadm trigger")
        what = f"/dev/{device.name}" if device.driver == DRIVER_OF[DeviceKind.DAX] else device.name
        by = "" if one.kind else ", by the kernel's own choice (apply --as … --replace chooses)"
        found.append(f"{device.driver} has {what}{by}")
    return Check(name, "ok", expected, "; ".join(found))


def _online(seen: Observation, memory: Sequence[SeenSoft]) -> Check:
    name, expected = SOFT_RUNGS[2], "all of it online in the zone Movable"
    found = []
    for one in memory:
        if not one.blocks:
            return Check(
                name, "fail", expected, "no memory of it is there", "sudo dmesg | grep -i kmem shows why"
            )
        off = [b.name for b in one.blocks if b.state != "online"]
        fixed = [b.name for b in one.blocks if b.zones.split()[:1] != ["Movable"]]
        if off or fixed:
            what = (
                f"{len(off)} of {len(one.blocks)} blocks are offline, {off[0]} first"
                if off
                else f"{len(fixed)} of {len(one.blocks)} blocks are not movable, {fixed[0]} first"
            )
            return Check(name, "fail", expected, what, AGAIN if off else _again(seen))
        size = sum(b.span.size for b in one.blocks)
        total = f", which has {human(one.node_total)} in all" if one.node_total else ""
        node = f" in node {one.device.node}{total}" if one.device is not None else ""
        found.append(f"{len(one.blocks)} blocks, {human(size)}, movable,{node}")
    return Check(name, "ok", expected, "; ".join(found))


def _tier(memory: Sequence[SeenSoft]) -> Check:
    """Which tier it is in: never a failure, since where a node has other memory it cannot be otherwise."""
    name, found = SOFT_RUNGS[3], []
    for one in memory:
        node = one.device.node if one.device is not None else None
        mine = next((tier for tier, nodes in one.tiers if node in nodes), "")
        if not mine:
            return Check(name, "skipped", "", "this kernel shows no memory tiers (they came with Linux 6.1)")
        others = [f"node {n} in {tier}" for tier, nodes in one.tiers for n in nodes if tier != mine]
        same = [n for tier, nodes in one.tiers for n in nodes if tier == mine and n != node]
        if others:
            found.append(f"node {node} is in {mine}, {', '.join(others)}")
        else:
            beside = f" with node {same[0]}" if same else ""
            found.append(f"node {node} is in {mine}{beside}: no tier of its own")
    return Check(name, "ok", "", "; ".join(found))
