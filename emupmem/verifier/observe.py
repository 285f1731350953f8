# SPDX-License-Identifier: Apache-2.0
"""Looking at a machine: what the ladder of checks is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from emupmem.boot import detect, trial
from emupmem.boot.kernel import module_states
from emupmem.device import proof, unit
from emupmem.device.boot_unit import recorded_kinds
from emupmem.device.proof import SeenMount
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import BootLog, CommandLine, DeviceKind, EmupmemError, FirmwareMap
from emupmem.parser.bootlog import parse_boot_log
from emupmem.parser.sources import parse_sysfs_memmap
from emupmem.planner.survey import read_iomem
from emupmem.system.host import Host
from emupmem.system.lock import wait_for
from emupmem.system.sysfs import Region, read_dax_devices, read_memory_blocks
from emupmem.verifier.ladder import complete
from emupmem.verifier.observation import Observation, SeenRegion, SeenSoft, SeenTrial

# Observation --------------------------------------------------------------------------------------


def observe(machine: Host, wait: float) -> Observation:
    """Everything that verify judges, after waiting up to `wait` seconds for the devices to appear."""
    unseen: list[tuple[str, str]] = []
    cmdline = parse_command_line(machine.peek("/proc/cmdline"))
    next_start = detect.of(machine).next_start(machine, unseen)
    release = machine.peek("/proc/sys/kernel/osrelease")
    made = frozenset(
        start for (start, _), kind in recorded_kinds(machine).items() if kind is DeviceKind.DEVDAX
    )
    seen = Observation(next_start.configured, next_start.where, cmdline, devdax=made)
    if cmdline.reservations:
        if machine.live and wait:
            machine.settle()
        wait_for(
            lambda: complete(replace(seen, regions=_regions(machine), soft=_soft(machine, cmdline, release))),
            wait,
        )
    return Observation(
        configured=next_start.configured,
        variable=next_start.where,
        command_line=cmdline,
        recovery=next_start.recovery,
        entries=next_start.entries,
        whole=next_start.whole,
        menu=next_start.menu,
        menu_is_newer=_is_newer(machine, next_start.files),
        log=_this_boot(machine, unseen) if cmdline.reservations else None,
        firmware=_firmware(machine, unseen),
        iomem=read_iomem(machine, unseen),
        regions=_regions(machine),
        modules=module_states(machine, release, cmdline),
        unseen=tuple(unseen),
        mounts=_mounts(machine, wait),
        trial=_trial(machine),
        soft=_soft(machine, cmdline, release),
        devdax=made,
    )


def _soft(machine: Host, line: CommandLine, release: str) -> tuple[SeenSoft, ...]:
    """The reservations of soft reserved memory, with their devices and what the unit makes of them."""
    if not line.soft:
        return ()
    kinds, devices = recorded_kinds(machine), read_dax_devices(machine)
    found = []
    for item in line.soft:
        kind = kinds.get((item.start, item.size))
        device = next((d for d in devices if d.start == item.start), None)
        if device is None:  # addresses are shown to root only: by size and order
            hidden = [d for d in devices if d.start is None and d.size == item.size]
            at = [i for i in line.soft if i.size == item.size].index(item)
            device = hidden[at] if at < len(hidden) else None
        made = SeenSoft(
            item,
            kind,
            device,
            device is not None and machine.exists(f"/dev/{device.name}"),
            read_memory_blocks(machine, item.span),
            _node_total(machine, device.node) if device is not None else 0,
            _tiers(machine),
            module_states(machine, release, line, kind or DeviceKind.DAX),
        )
        found.append(made)
    return tuple(found)


def _node_total(machine: Host, node: int | None) -> int:
    """Bytes of memory that a node has now."""
    found = re.search(r"MemTotal:\s+(\d+) kB", machine.peek(f"/sys/devices/system/node/node{node}/meminfo"))
    return int(found[1]) * 1024 if found else 0


def _tiers(machine: Host) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The memory tiers with their nodes, fastest first."""
    base = "/sys/devices/virtual/memory_tiering"
    names = [n for n in machine.names(base) if re.fullmatch(r"memory_tier\d+", n)]
    names.sort(key=lambda n: int(n.removeprefix("memory_tier")))
    return tuple((n, _numbers(machine.peek(f"{base}/{n}/nodelist"))) for n in names)


def _numbers(text: str) -> tuple[int, ...]:
    """A list of the kernel's, such as `0-1,3`."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _trial(machine: Host) -> SeenTrial | None:
    found = trial.state(machine)
    if found is None:
        return None
    how = (found.chosen, found.running, found.started_since, found.why, found.kexec, found.again)
    return SeenTrial(found.words, *how)


def _mounts(machine: Host, wait: float) -> tuple[SeenMount, ...]:
    """The mounts of our devices and of the boot unit; while that is at work we wait."""
    data = machine.read(unit.FILE)
    text = data.decode("utf-8", "replace") if data is not None and machine.is_link(unit.LINK) else ""
    try:
        wanted = unit.read_all(text) if text else ()
    except EmupmemError:
        wanted = ()  # not ours, or edited: what is mounted is judged all the same
    if wanted and wait and machine.live:
        wait_for(lambda: not _activating(machine, unit.NAME), wait, unit.NAME)
    return proof.look_at_mounts(machine, [m for m in wanted if isinstance(m, unit.BootMount)])


def _activating(machine: Host, name: str) -> bool:
    done = machine.output("systemctl", "show", "-P", "ActiveState", name)
    return done is not None and done.stdout.strip() == b"activating"


def _regions(machine: Host) -> tuple[SeenRegion, ...]:
    return tuple(_seen(r) for r in machine.regions())


def _seen(r: Region) -> SeenRegion:
    return SeenRegion(
        r.name,
        r.size,
        r.start,
        r.block,
        r.block_size,
        r.dax,
        r.numa_node,
        r.provider,
        r.mode,
        r.claim,
        r.char,
    )


def _firmware(machine: Host, unseen: list[tuple[str, str]]) -> FirmwareMap | None:
    entries = machine.firmware_entries()
    try:
        return parse_sysfs_memmap(entries) if entries else None
    except EmupmemError as exc:
        unseen.append(("firmware", exc.message))
        return None


def _is_newer(machine: Host, files: Sequence[str]) -> bool | None:
    """Whether the boot menu, or an entry of it, was written after this boot; None where that cannot be told."""
    booted = re.search(r"^btime (\d+)", machine.peek("/proc/stat"), re.MULTILINE)
    written = [when for f in files if (when := machine.modified(f)) is not None]
    return None if booted is None or not written else max(written) > int(booted[1])


def _this_boot(machine: Host, unseen: list[tuple[str, str]]) -> BootLog | None:
    """This boot's log from dmesg or the journal, whichever still has the `user:` map."""
    last: BootLog | None = None
    why = "the kernel's log could not be read"
    for argv in (("dmesg",), ("journalctl", "-k", "-b", "0", "-o", "cat", "--no-pager")):
        done = machine.output(*argv) if machine.running else None
        if done is None or done.status:
            why = done.last_words if done is not None and done.last_words else why
            continue
        log = parse_boot_log(done.stdout, argv[0])
        if log.user is not None:
            return log
        last = last or (log if log.firmware or log.symptoms else None)
    if last is None:
        unseen.append(("kernel-map", why + ("" if machine.is_root else " (root may)")))
    return last
