# SPDX-License-Identifier: Apache-2.0
"""A finding of the doctor's, and the facts that the findings share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from emupmem.boot import entry as boot_entry
from emupmem.boot import kernel as boot_kernel
from emupmem.boot import loader as boot_loader
from emupmem.boot.grub.loader import Grub
from emupmem.device.blocks import Mounted
from emupmem.editor.defaults import Effective
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import CommandLine, EmupmemError
from emupmem.planner import survey
from emupmem.planner.situation import Situation
from emupmem.record import record
from emupmem.system.host import Host


@record
class Finding:
    """One line of the doctor: what was looked at, how it is, what was seen, what to do."""

    name: str
    status: str  # ok | note | warn | stop | fail
    evidence: str
    fix: str = ""


@record
class EarlyMount(Finding):
    """Something is mounted from the initramfs that needs the drivers there."""


def good(findings: Sequence[Finding]) -> bool:
    """Whether nothing stands in the way and nothing is broken."""
    return not any(f.status in ("stop", "fail") for f in findings)


# Looking ---------------------------------------------------------------------------------------------


@dataclass
class Eye:
    """What several findings need, seen once."""

    machine: Host
    wait: float
    effective: Mapping[str, Effective] | None = None
    defaults_problem: EmupmemError | None = None
    line: CommandLine = field(default_factory=lambda: parse_command_line(""))
    found: survey.Survey | None = None
    map_problem: EmupmemError | None = None
    target: boot_kernel.Target | None = None
    config: str = ""
    mounts: tuple[Mounted, ...] = ()
    loader: boot_loader.Loader = field(default_factory=Grub)
    entry: boot_entry.BootEntry | None = None

    @property
    def by_grub(self) -> bool:
        """Whether GRUB's defaults and menu are what there is to look at."""
        return isinstance(self.loader, Grub)

    @property
    def booted(self) -> CommandLine:
        return parse_command_line(self.machine.peek("/proc/cmdline"))

    @property
    def situation(self) -> Situation | None:
        """What the planner knows, with the kernel that will boot in place of the running one."""
        if self.found is None:
            return None
        kernel = self.target.version if self.target is not None else self.found.situation.kernel
        return replace(self.found.situation, kernel=kernel)


def refusal_finding(
    name: str, errors: Sequence[EmupmemError], warnings: Sequence[str], otherwise: Finding, is_root: bool
) -> Finding:
    """Errors stop; warnings are worth a note where more rights would tell, else a warning."""
    if errors:
        fix = next((e.hint for e in errors if e.hint), "")
        return Finding(name, "stop", "; ".join(e.message for e in errors), fix)
    if warnings:
        status, fix = (
            ("warn", "emupmem suggest plans all the same; look at it by hand")
            if is_root
            else ("note", "sudo emupmem doctor sees more")
        )
        return Finding(name, status, "; ".join(warnings), fix)
    return otherwise
