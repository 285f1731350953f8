# SPDX-License-Identifier: Apache-2.0
"""Everything that decides whether persistent memory will work here, before and after: one finding each.

`look` sees a machine (the live one, or one that `collect` put into an archive); every judgement is a
pure function of what was seen. A finding is `ok`, `note` (good to know), `warn` (will bite), `stop`
(apply would refuse) or `fail` (what was asked for is not there), with the evidence and one thing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emupmem.boot import detect, loader, obstacles, prepare
from emupmem.boot.efi import secure_boot
from emupmem.boot.foreign import Refused
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import environment, menu
from emupmem.boot.grub.checks import readable_menu
from emupmem.device.blocks import mounts
from emupmem.doctor.boot import (
    firmware,
    is_uki,
    look_at_boots,
    look_at_generator,
    look_at_grubenv,
    look_at_loader,
    look_at_room,
    look_at_sources,
    look_at_unit,
    look_at_variables,
    regions_finding,
    words,
)
from emupmem.doctor.finding import Eye, Finding, refusal_finding
from emupmem.doctor.host import (
    LOCKDOWN,
    NEEDED,
    WANTED,
    has_type_7,
    lockdown,
    look_at_hibernation,
    look_at_host,
    look_at_kdump,
    look_at_memory_map,
    look_at_numa,
    look_at_real_pmem,
    rights,
    tools,
)
from emupmem.doctor.kernel import (
    built_in,
    look_at_initramfs,
    look_at_kernel,
    look_at_modules,
    look_at_randomisation,
)
from emupmem.editor import defaults
from emupmem.kernel.cmdline import half_written
from emupmem.model import CommandLine, EmupmemError, Request
from emupmem.planner import plan, survey
from emupmem.system.host import Host
from emupmem.units import human, tight
from emupmem.verifier import observe
from emupmem.verifier.ladder import verdict_of
from emupmem.verifier.observation import Verdict


def findings_of(machine: Host, wait: float = 0) -> tuple[Finding, ...]:
    """All findings of a machine, in the order of the boot. Needs no root and changes nothing.

    `wait` is how many seconds devices may take to appear.
    """
    eye = _open(machine, wait)
    refused = _refusals(machine)
    steps: list[Callable[[Eye], Finding | list[Finding] | None]] = [
        lambda e: rights(e.machine.is_root),
        lambda e: refused("processor", ("processor",), e.machine.architecture),
        lambda e: refused("host", ("wsl", "container", "xen"), "", look_at_host(e.machine)),
        look_at_memory_map,
        look_at_numa,
        look_at_real_pmem,
        lambda e: refused(
            "loader", ("grub", "loader", "images", "menus", "copies"), look_at_loader(e.machine)
        ),
        lambda e: firmware(e.machine.exists("/sys/firmware/efi"), secure_boot(e.machine), is_uki(e.machine)),
        lambda e: lockdown(e.machine.peek(LOCKDOWN)),
        lambda e: refused("kernel", ("kernel",), look_at_kernel(e)),
        lambda e: refused("modules", ("modules",), "", look_at_modules(e)),
        lambda e: built_in(e.config),
        look_at_initramfs,
        look_at_randomisation,
        look_at_variables,
        look_at_sources,
        look_at_boots,
        lambda e: words(e.line),
        lambda e: regions_finding(e.line),
        lambda e: look_at_grubenv(e) if e.by_grub else None,
        look_at_room,
        lambda e: look_at_generator(e.machine) if e.by_grub else None,
        lambda e: tools({t: e.machine.find(t) is not None for t in (*NEEDED, *WANTED)}, has_type_7(e)),
        look_at_hibernation,
        lambda e: look_at_unit(e.machine),
        look_at_kdump,
        _plan,
        _ladder,
    ]
    findings: list[Finding] = []
    for step in steps:
        made = step(eye)
        findings += made if isinstance(made, list) else [made] if made is not None else []
    return tuple(findings)


def _open(machine: Host, wait: float) -> Eye:
    eye = Eye(machine, wait, mounts=mounts(machine), loader=detect.of(machine))
    eye.target = obstacles.target(machine)
    if eye.target is not None:
        eye.config = machine.kernel_config(eye.target.release)[1]
    boots: CommandLine | None = None
    try:
        if eye.by_grub:
            grub_defaults.read_defaults(machine)
            eye.effective = defaults.effective(
                grub_defaults.grub_texts(machine), sh=grub_defaults.judge_of(machine)
            )
        boots = prepare.next_line(machine)
    except EmupmemError as exc:
        eye.defaults_problem = exc
    if eye.by_grub:
        eye.entry = menu.default_entry(readable_menu(machine), environment.grubenv(machine))
    eye.line = boots if boots is not None else eye.booted
    try:
        eye.found = survey.of_machine(machine, boots=boots)
    except EmupmemError as exc:
        eye.map_problem = exc
    return eye


def _refusals(machine: Host) -> Callable[..., Finding]:
    """What `apply` itself says, several of its checks in one finding."""
    checks = obstacles.checks(machine)

    def judge(name: str, which: Sequence[str], seen: str, otherwise: Finding | None = None) -> Finding:
        warnings: list[str] = []
        errors: list[EmupmemError] = []
        for check in (checks[w] for w in which if w in checks):
            try:
                warnings += check(machine)
            except EmupmemError as exc:
                errors.append(exc)
        return refusal_finding(
            name, errors, warnings, otherwise or Finding(name, "ok", seen), machine.is_root
        )

    return judge


# What apply would do, and the ladder -----------------------------------------------------------------


def _plan(eye: Eye) -> Finding | None:
    """A rehearsal of apply, up to the new text; nothing is written."""
    if eye.found is None or eye.situation is None:
        return None
    items = [i for v in (eye.effective or {}).values() for i in v.items]
    items = items or [i.text for i in eye.line.reservations]
    if items and not half_written(eye.line):
        return Finding("plan", "ok", f"memmap={','.join(items)} is set up already")
    made = None
    try:
        made = plan.plan(eye.situation, Request())
        if not eye.by_grub:
            eye.loader.refuse(eye.machine)
        if eye.machine.live and (eye.effective is not None or not eye.by_grub):
            request = Request(made.reservations[0].size)
            prepare.prepare_apply(eye.machine, eye.found, request, loader.Options())
    except Refused as exc:
        seen = f"{made.memmap} would leave {human(made.ram_left)} of RAM" if made else exc.message
        return Finding("plan", "stop", seen, exc.for_words(made.memmap).hint if made else exc.hint)
    except EmupmemError as exc:
        return Finding("plan", "stop", exc.message, exc.hint)
    size = tight(made.reservations[0].size)
    seen = f"{made.memmap} would leave {human(made.ram_left)} of RAM"
    return Finding("plan", "ok", seen, f"sudo emupmem apply --size {size}")


def _ladder(eye: Eye) -> Finding:
    return ladder_finding(verdict_of(observe.observe(eye.machine, eye.wait)))


def ladder_finding(verdict: Verdict) -> Finding:
    """The rungs of verify in one line."""
    bad = next((c for c in verdict.checks if c.status in ("fail", "pending")), None)
    if bad is not None:
        status = "fail" if bad.status == "fail" else "note"
        return Finding("ladder", status, f"{bad.name}: {bad.found}", bad.hint)
    unseen = [c.name for c in verdict.checks if c.status == "skipped"]
    more = f" (not seen: {', '.join(unseen)})" if unseen else ""
    if verdict.nothing_reserved:
        return Finding("ladder", "ok", f"{verdict.nothing}{more}")
    devices = ", ".join(d.dev for d in verdict.devices)
    what = f"{devices} · emulated, volatile" if devices else "no device was seen"
    tried = next((c for c in verdict.checks if c.name == "trial"), None)
    if tried is not None:
        return Finding("ladder", "note", f"{what}{more}; {tried.found}", tried.hint)
    return Finding("ladder", "ok", f"{what}{more}")
