# SPDX-License-Identifier: Apache-2.0
"""Plan + Observation -> the ladder of checks from the GRUB file to a device with DAX. Pure.

Each rung says what was expected, what was found and what to do; the first rung that breaks
explains the ones above it, which are then skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from emupmem.boot import entry as boot_entry
from emupmem.device.nature import EMULATED
from emupmem.device.proof import MOUNT_RUNGS, explained, left_over, mount_rungs
from emupmem.model import Check, Device, FirmwareMap, Kind, MemmapItem, ModuleState, Presence
from emupmem.units import human, span_text
from emupmem.verifier.observation import Observation, SeenRegion, SeenTrial, Verdict
from emupmem.verifier.soft import AGAIN, driver_problem, soft_complete, soft_devices, soft_rungs

LEGACY = "Persistent Memory (legacy)"
KERNEL_PARTS = ("Kernel code", "Kernel rodata", "Kernel data", "Kernel bss")


def verdict_of(seen: Observation) -> Verdict:
    """Climb the ladder. A machine where nothing is reserved nor configured has two good rungs."""
    if seen.trial is not None:
        first = _trial(seen.trial)
        if not seen.trial.running:
            return Verdict((first,), ())
        booted = tuple(i.text for i in seen.command_line.reservations)
        # What boots is the trial entry: below it the ladder is as if that were configured.
        tried = replace(seen, trial=None, configured=booted, recovery=booted, entries=None, tries=True)
        judged = verdict_of(tried)
        rest = tuple(c for c in judged.checks if c.name not in ("configured", "generated"))
        return Verdict((first, *rest), judged.devices)
    wanted = seen.configured
    booted = tuple(i.text for i in seen.command_line.reservations)
    if not booted and not wanted:
        # An unreadable GRUB default is not "nothing configured".
        found = "nothing is reserved" if wanted is not None else seen.why_unseen("configured")
        first = Check("configured", "ok" if wanted is not None else "skipped", "", found)
        rungs = [first, _generated(seen, ()), Check("booted", "ok", "", "no memmap= on /proc/cmdline")]
        rungs += [left_over(m) for m in seen.mounts[:1]]
        return Verdict(tuple(rungs), ())
    items = seen.command_line.reservations
    pmem = seen.command_line.pmem
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("configured", lambda: _configured(seen)),
        ("generated", lambda: _generated(seen, wanted if wanted is not None else booted)),
        ("booted", lambda: _booted(seen, booted)),
    ]
    if wanted or wanted is None:
        steps += [
            ("kernel-map", lambda: _kernel_map(seen, items)),
            ("iomem", lambda: _iomem(seen, items)),
        ]
        if pmem or not items:
            steps += [("device", lambda: _device(seen, pmem)), ("dax", lambda: _dax(seen, pmem))]
        steps += soft_rungs(seen)
    checks: list[Check] = []
    broken = ""
    for name, step in steps:
        check = explained(name, broken) if broken else step()
        checks.append(check)
        if check.status in ("fail", "pending"):
            broken = name
    if seen.mounts and (wanted or wanted is None):
        if broken:
            checks += [explained(name, broken) for name in MOUNT_RUNGS]
        else:
            checks += mount_rungs(seen.mounts)
    return Verdict(tuple(checks), (*_devices(seen, pmem), *soft_devices(seen)))


def complete(seen: Observation) -> bool:
    """Whether every reserved range has its device: what --wait waits for."""
    for item in seen.command_line.pmem:
        region = _region_of(seen, item)
        if region is None or not (region.char or (region.block and item.start not in seen.devdax)):
            return False
    return soft_complete(seen)


def _trial(seen: SeenTrial) -> Check:
    words = " ".join(seen.words)
    if seen.running:
        back = "a restart goes back" if seen.kexec else "sudo emupmem abandon cancels it"
        found = f"this boot is the trial of {words}; nothing is permanent"
        if seen.again:
            found += "; the next start is this trial as well, until it is confirmed or abandoned"
        elif seen.chosen:
            found += "; the next start is chosen to be one as well (GRUB did not clear that, or apply was run again)"
        return Check("trial", "ok", words, found, f"sudo emupmem confirm makes it permanent; {back}")
    if seen.chosen and not seen.why:
        return Check("trial", "pending", words, f"the next start tries {words}", "reboot")
    hint = "sudo emupmem abandon takes the entry away; apply --trial tries again"
    if seen.started_since:
        found = f"the machine came back without {words}: {seen.why}"
        if seen.again:
            hint = (
                "the next start tries it once more: sudo emupmem abandon first makes a deployment without it"
            )
        return Check("trial", "fail", words, found, hint)
    why = seen.why or "it is no longer chosen for the next start"
    return Check("trial", "fail", words, f"the trial of {words} will not come: {why}", hint)


def _words(items: Iterable[str]) -> str:
    listed = ",".join(items)
    return f"memmap={listed}" if listed else "no reservation"


def _configured(seen: Observation) -> Check:
    booted = tuple(i.text for i in seen.command_line.reservations)
    if seen.configured is None:
        return Check("configured", "skipped", _words(booted), seen.why_unseen("configured"))
    if not seen.configured:
        # Either removed and not rebooted yet, or typed at the boot prompt: both are true to say.
        return Check("configured", "ok", "", "nothing is reserved for the next boot")
    return Check("configured", "ok", "", f"{_words(seen.configured)} in {seen.variable}")


def _generated(seen: Observation, wanted: Sequence[str]) -> Check:
    if seen.entries is None:
        return Check("generated", "skipped", _words(wanted), seen.why_unseen("generated"))
    ours = [e for e in seen.entries if e.ours]
    wrong = boot_entry.problems(seen.entries, wanted, seen.recovery)
    if not wrong and not seen.whole:
        wrong = [(None, "it is not written to its end")]
    if wrong:
        entry, why = wrong[0]
        where = f"{seen.menu}:{entry.line} “{entry.title}”: " if entry else f"{seen.menu}: "
        hint = "sudo emupmem apply again: it finishes what was begun" if wanted else "sudo emupmem remove"
        return Check("generated", "fail", _words(wanted), where + why, hint)
    carry = sum(1 for e in ours if e.command_line.reservations)
    found = f"{carry} of {len(ours)} entries" if wanted else f"none of {len(ours)} entries reserves memory"
    return Check("generated", "ok", _words(wanted), found)


def _booted(seen: Observation, booted: Sequence[str]) -> Check:
    wanted = seen.configured
    if wanted is None or tuple(booted) == tuple(wanted):
        return Check("booted", "ok", _words(booted), f"/proc/cmdline has {_words(booted)}")
    found = f"/proc/cmdline has {_words(booted)}"
    if seen.menu_is_newer is False:
        hint = (
            "the machine was started since, by another entry or boot loader: choose the normal entry in "
            "the boot menu, or start it again"
        )
        return Check("booted", "fail", _words(wanted), found, hint)
    what = "" if wanted else ": the memory is given back then"
    return Check("booted", "pending", _words(wanted), found, f"reboot{what}")


def _kernel_map(seen: Observation, items: Sequence[MemmapItem]) -> Check:
    """The kernel's own words: `user: … persistent (type 12)` for each item, whole and over RAM, or `soft reserved`."""
    expected = "; ".join(f"{span_text(i.start, i.start + i.size)} {_map_kind(i).value}" for i in items)
    nothing = _over_nothing(seen.firmware, items)
    if nothing:
        return Check("kernel-map", "fail", expected, nothing, "sudo emupmem apply --replace plans it again")
    if seen.log is not None and seen.log.symptoms:
        return Check(
            "kernel-map", "fail", expected, seen.log.symptoms[0], _symptom_hint(seen.log.symptoms[0])
        )
    if seen.log is None or seen.log.user is None:
        why = seen.why_unseen("kernel-map") if seen.log is None else "the log of this boot no longer has it"
        return Check("kernel-map", "skipped", expected, why)
    for item in items:
        kind, span = _map_kind(item), item.span
        pieces = [e.span for e in seen.log.user if e.kind is kind]
        inside = [p for p in pieces if p.start < span.end and span.start < p.end]
        if inside != [span]:
            what = "soft reserved" if item.soft else "persistent"
            found = "; ".join(span_text(p.start, p.end) for p in inside) or f"no {what} range there"
            hint = "the range is not one piece of RAM: sudo emupmem apply --replace plans it again"
            return Check("kernel-map", "fail", expected, found, hint)
    return Check("kernel-map", "ok", expected, expected)


def _map_kind(item: MemmapItem) -> Kind:
    """What the kernel's map calls the range of an item."""
    return Kind.SOFT_RESERVED if item.soft else Kind.PRAM


def _over_nothing(firmware: FirmwareMap | None, items: Sequence[MemmapItem]) -> str:
    """The kernel makes a device over anything, even over no RAM at all; only the firmware's map tells."""
    if firmware is None:
        return ""
    for item in items:
        end = item.start + item.size
        if not any(s.start <= item.start and end <= s.end for s in firmware.ram):
            what = (
                "a part of it is"
                if any(s.start < end and item.start < s.end for s in firmware.ram)
                else "it is"
            )
            return f"{span_text(item.start, end)}: {what} not RAM in the firmware's map"
    return ""


def _symptom_hint(line: str) -> str:
    if "not marked as" in line:
        return (
            "the kernel was placed inside the range: add nokaslr (sudo emupmem apply --replace --nokaslr …)"
        )
    if "misaligned" in line or "error -95" in line:
        return (
            "the range was cut or is not aligned: look at iomem; sudo emupmem apply --replace plans it again"
        )
    return "sudo emupmem apply --replace plans it again"


def _iomem(seen: Observation, items: Sequence[MemmapItem]) -> Check:
    # Soft reserved memory has a line of its own up to Linux 6.x only, and its devices below that.
    pmem = not all(i.soft for i in items)
    expected = f"{LEGACY}, whole, the kernel outside" if pmem else "the kernel outside the range"
    if seen.iomem is None:
        return Check("iomem", "skipped", expected, seen.why_unseen("iomem"))
    parts = [line for line in seen.iomem if line.name in KERNEL_PARTS]
    for item in items:
        start, end = item.start, item.start + item.size
        inside = [
            line for line in seen.iomem if line.name == LEGACY and line.start < end and start < line.end
        ]
        kernel = next((p for p in parts if p.start < end and start < p.end), None)
        if kernel is not None:
            found = (
                f"the kernel sits inside the range: {kernel.name} at {span_text(kernel.start, kernel.end)}"
            )
            hint = "add nokaslr (sudo emupmem apply --replace --nokaslr …), or install a newer kernel"
            return Check("iomem", "fail", expected, found, hint)
        if not item.soft and [(line.start, line.end) for line in inside] != [(start, end)]:
            found = (
                "; ".join(span_text(x.start, x.end) for x in inside) or f"nothing at {span_text(start, end)}"
            )
            return Check(
                "iomem",
                "fail",
                f"{LEGACY} {span_text(start, end)}",
                found,
                "sudo emupmem apply --replace plans it again",
            )
    return Check("iomem", "ok", expected, expected)


def _region_of(seen: Observation, item: MemmapItem) -> SeenRegion | None:
    """The region of an item by its address, or by its size where addresses are not shown to us."""
    for region in seen.regions:
        if region.start == item.start:
            return region
    mine = [r for r in seen.regions if r.provider in ("", *EMULATED)]
    hidden = [r for r in mine if r.start is None and r.size == item.size]
    same = [i for i in seen.command_line.pmem if i.size == item.size]
    at = same.index(item)
    return hidden[at] if at < len(hidden) else None


def _device(seen: Observation, items: Sequence[MemmapItem]) -> Check:
    expected = ", ".join(
        f"a device of {human(i.size)} at {span_text(i.start, i.start + i.size)}" for i in items
    )
    found = []
    for item in items:
        region = _region_of(seen, item)
        if region is None:
            what, hint = _no_region(seen)
            return Check("device", "fail", expected, what, hint)
        if region.size != item.size:
            what = f"{region.name} has {human(region.size)} instead of {human(item.size)}"
            return Check("device", "fail", expected, what, "the range was cut: look at the kernel's log")
        if not region.block and not region.char:
            what, hint = _no_block(seen, region)
            return Check("device", "fail", expected, what, hint)
        # An info block takes a part of the range; the kernel has found that it fits.
        if region.block_size != item.size and not (region.claim and 0 < region.block_size < item.size):
            mode = f" (mode {region.mode})" if region.mode else ""
            what = f"/dev/{region.block} has {human(region.block_size)} instead of {human(item.size)}{mode}"
            hint = "an old info block changed its mode: ndctl destroy-namespace -f, or start the machine cold"
            return Check("device", "fail", expected, what, hint)
        node = f", node {region.numa_node}" if region.numa_node is not None and region.numa_node >= 0 else ""
        unseen = "" if region.start is not None else " (its address is shown to root only)"
        shape = _shape(region)
        found.append(f"/dev/{region.block or region.char}, {human(region.size)}{shape}{node}{unseen}")
    return Check("device", "ok", expected, "; ".join(found) + " · emulated, volatile")


MODES = {"pfn": "fsdax with a page map on it", "btt": "sector", "dax": "devdax"}


def _shape(region: SeenRegion) -> str:
    """What `nvdimm create` or ndctl made of a range that is one plain device otherwise."""
    return (
        f" ({MODES[region.claim]}, {human(region.block_size)} of it usable)" if region.claim in MODES else ""
    )


def _no_region(seen: Observation) -> tuple[str, str]:
    for module in seen.modules:
        if problem := driver_problem(module, _module_hint(module.name)):
            return problem
    for module in seen.modules:
        if module.presence is Presence.AVAILABLE:
            return f"no device; the driver {module.name} is not loaded", f"sudo modprobe {module.name}"
    return "no device; the kernel made no region of the range", "sudo dmesg | grep -E 'e820_pmem|nd_'"


def _no_block(seen: Observation, region: SeenRegion) -> tuple[str, str]:
    pmem = next((m for m in seen.modules if m.name == "nd_pmem"), ModuleState("nd_pmem", Presence.UNKNOWN))
    what = f"{region.name} has no block device"
    if pmem.presence is Presence.BLOCKED:
        return (
            f"{what}; nd_pmem is blacklisted in {pmem.where}",
            "remove that line, or: sudo modprobe nd_pmem",
        )
    if pmem.presence is Presence.MISSING:
        return f"{what}; this kernel has no module nd_pmem", _module_hint("nd_pmem")
    if pmem.presence is Presence.AVAILABLE:
        return f"{what}; nd_pmem is not loaded", "sudo modprobe nd_pmem"
    return (
        f"{what}; the driver nd_pmem refused it",
        "sudo dmesg | grep nd_pmem shows why; a stale info block is cured by a cold start",
    )


def _module_hint(name: str) -> str:
    return f"install the package that holds {name} (linux-modules-extra on Ubuntu), or another kernel"


def _dax(seen: Observation, items: Sequence[MemmapItem]) -> Check:
    expected = "DAX on (queue/dax is 1)"
    for item in items:
        region = _region_of(seen, item)
        if region is not None and item.start in seen.devdax and not region.char:
            return Check("dax", "fail", "devdax", f"/dev/{region.block} is no devdax device yet", AGAIN)
        if region is not None and region.claim in ("btt", "dax"):
            continue
        if region is None or region.dax is None:
            return Check("dax", "skipped", expected, "queue/dax could not be read")
        if not region.dax:
            hint = "the namespace is not in fsdax mode: sudo ndctl create-namespace -f -e namespace… -m fsdax"
            return Check("dax", "fail", expected, f"off on /dev/{region.block}", hint)
    claims = {region.claim for item in items if (region := _region_of(seen, item)) is not None}
    words = (
        *(("on",) if claims - {"btt", "dax"} else ()),
        *(("devdax: programs map the device itself",) if "dax" in claims else ()),
        *(("none: sector has no DAX",) if "btt" in claims else ()),
    )
    return Check("dax", "ok", expected, "; ".join(words))


def _devices(seen: Observation, items: Sequence[MemmapItem]) -> tuple[Device, ...]:
    found = []
    for item in items:
        region = _region_of(seen, item)
        if region is not None and (region.block or region.char):
            device = Device(
                f"/dev/{region.block or region.char}",
                region.start,
                region.block_size,
                region.numa_node,
                region.dax,
                region.mode,
            )
            found.append(device)
    return tuple(found)
