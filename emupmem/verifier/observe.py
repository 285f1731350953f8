# SPDX-License-Identifier: Apache-2.0
"""Looking at a machine: what the ladder of checks is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from emupmem.boot import detect, trial
from emupmem.boot.kernel import module_states
from emupmem.device import proof, unit
from emupmem.device.proof import SeenMount
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import BootLog, EmupmemError, FirmwareMap
from emupmem.parser.bootlog import parse_boot_log
from emupmem.parser.sources import parse_sysfs_memmap
from emupmem.planner.survey import read_iomem
from emupmem.system.host import Host
from emupmem.system.lock import wait_for
from emupmem.system.sysfs import Region
from emupmem.verifier.ladder import complete
from emupmem.verifier.observation import Observation, SeenRegion, SeenTrial

# Observation --------------------------------------------------------------------------------------


def observe(machine: Host, wait: float) -> Observation:
    """Everything that verify judges, after waiting up to `wait` seconds for the devices to appear."""
    unseen: list[tuple[str, str]] = []
    cmdline = parse_command_line(machine.peek("/proc/cmdline"))
    next_start = detect.of(machine).next_start(machine, unseen)
    release = machine.peek("/proc/sys/kernel/osrelease")
    seen = Observation(next_start.configured, next_start.where, cmdline)
    if cmdline.reservations:
        if machine.live and wait:
            machine.settle()
        wait_for(lambda: complete(replace(seen, regions=_regions(machine))), wait)
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
    )


def _trial(machine: Host) -> SeenTrial | None:
    found = trial.state(machine)
    if found is None:
        return None
    return SeenTrial(found.words, found.chosen, found.running, found.started_since, found.why, found.kexec)


def _mounts(machine: Host, wait: float) -> tuple[SeenMount, ...]:
    """The mounts of our devices and of the boot unit; while that is at work we wait."""
    data = machine.read(unit.FILE)
    text = data.decode("utf-8", "replace") if data is not None and machine.is_link(unit.LINK) else ""
    try:
        wanted = unit.read_unit(text) if text else ()
    except EmupmemError:
        wanted = ()  # not ours, or edited: what is mounted is judged all the same
    if wanted and wait and machine.live:
        wait_for(lambda: not _activating(machine, unit.NAME), wait, unit.NAME)
    return proof.look_at_mounts(machine, wanted)


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
