# SPDX-License-Identifier: Apache-2.0
"""Findings about the kernel that will boot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from emupmem.boot import kernel as boot_kernel
from emupmem.boot import obstacles
from emupmem.device import boot_unit
from emupmem.doctor.finding import EarlyMount, Eye, Finding
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import MAX_MEMMAP_REGIONS, CommandLine, DeviceKind, ModuleState, Presence
from emupmem.planner import kernels
from emupmem.planner.situation import Situation
from emupmem.system.host import Host

# The kernel ------------------------------------------------------------------------------------------


def look_at_kernel(eye: Eye) -> str:
    if eye.target is None:
        return ""
    known = f" ({eye.target.version.text})" if eye.target.version is not None else ""
    name = eye.machine.kernel_config(eye.target.release)[0]
    options = ", ".join(o.removeprefix("CONFIG_") for o in boot_kernel.OPTIONS)
    return f"{eye.target.release}{known} boots by default; {options} are on ({name})"


def look_at_modules(eye: Eye) -> Finding:
    if eye.target is None:
        return Finding("modules", "note", "which kernel boots by default is not known")
    known = boot_unit.recorded_kinds(eye.machine)
    kinds = [DeviceKind.PMEM] if eye.line.pmem or not eye.line.soft else []
    kinds += [DeviceKind.DEVDAX] if DeviceKind.DEVDAX in known.values() else []
    kinds += [DeviceKind.DAX, DeviceKind.MEMORY] if eye.line.soft else []
    for kind in dict.fromkeys(known.values()) if eye.line.soft else ():
        why, word = boot_kernel.kmem_is_first(eye.machine, eye.target.release, eye.line, kind)
        if why:
            return Finding("modules", "warn", why, f"add {word} to the kernel command line")
    states = (
        s for k in kinds for s in boot_kernel.module_states(eye.machine, eye.target.release, eye.line, k)
    )
    return modules(tuple(dict.fromkeys(states)))


def modules(states: Sequence[ModuleState]) -> Finding:
    """The driver chain of the kernel that will boot."""
    seen = ", ".join(m.text for m in states)
    for module in states:
        if module.presence is Presence.BLOCKED:
            fix = f"take {module.name} out of {module.where}, or the device will not appear"
            return Finding("modules", "warn", seen, fix)
        if module.presence is Presence.MISSING and module.name != "libnvdimm":
            package = "install the package that holds it (linux-modules-extra on Ubuntu)"
            return Finding("modules", "warn", seen, package)
    unknown = any(m.presence is Presence.UNKNOWN for m in states)
    return Finding("modules", "note" if unknown else "ok", seen)


def built_in(config: str) -> Finding | None:
    """Words that are compiled in come first, and the randomisation does not see a memmap= among them (kaslr.c)."""
    found = re.search(r'^CONFIG_CMDLINE="(.+)"', config, re.MULTILINE)
    if found is None or not re.search(r"^CONFIG_CMDLINE_BOOL=y", config, re.MULTILINE):
        return None
    seen = f"the kernel has a built-in command line: {found[1]}"
    if parse_command_line(found[1]).items:
        why = f"{seen}: its randomisation does not keep clear of that memmap="
        return Finding("built-in", "warn", why, "sudo emupmem apply --nokaslr …")
    return Finding("built-in", "note", seen)


def listing(machine: Host) -> tuple[str, ...]:
    """What lists the initramfs of the kernel that boots; empty where that cannot be told."""
    kernel = obstacles.target(machine)
    release = kernel.release if kernel is not None else ""
    images = (f"/boot/initrd.img-{release}", f"/boot/initramfs-{release}.img", f"/boot/initrd-{release}")
    image = next((i for i in images if release and machine.exists(i)), "")
    program = next((p for p in ("lsinitramfs", "lsinitrd") if machine.find(p)), "")
    return (program, image) if program and image else ()


def look_at_initramfs(eye: Eye) -> Finding:
    found = initramfs(eye.line, eye.machine.peek("/etc/fstab"), eye.machine.peek("/etc/crypttab"))
    argv = listing(eye.machine) if isinstance(found, EarlyMount) else ()
    done = eye.machine.output(*argv) if argv else None
    if done is None or done.status or eye.target is None:
        return found
    states = boot_kernel.module_states(eye.machine, eye.target.release, eye.line)
    return inside(found, argv[-1], done.stdout.decode("utf-8", "replace"), states)


def inside(found: Finding, image: str, listed: str, states: Sequence[ModuleState]) -> Finding:
    """The finding with what is really in the initramfs."""
    built_in = {m.name for m in states if m.presence is Presence.BUILT_IN}
    lacks = [m for m in boot_kernel.MODULES if m not in built_in and f"/{m}.ko" not in listed]
    if not lacks:
        return replace(found, evidence=f"{found.evidence}, and {image} has them")
    add = f"add {', '.join(lacks)} to it (/etc/initramfs-tools/modules, or dracut --add-drivers)"
    return replace(
        found, evidence=f"{found.evidence}; {image} lacks {', '.join(lacks)}", fix=f"{add}; {found.fix}"
    )


def initramfs(line: CommandLine, fstab: str, crypttab: str) -> Finding:
    """The drivers are needed in the initramfs only by what is mounted from there; and fstab is no place for us."""
    root = next((w for w in line.words if re.match(r"(root|resume)=/dev/pmem", w)), "")
    early = "the content is volatile: keep the system elsewhere"
    if root:
        return EarlyMount("initramfs", "warn", f"{root}: the drivers must be in the initramfs", early)
    for name, text in (("/etc/fstab", fstab), ("/etc/crypttab", crypttab)):
        for number, raw in enumerate(text.splitlines(), 1):
            fields = raw.split("#")[0].split()
            if len(fields) < 2 or not any(f.startswith("/dev/pmem") for f in fields[:2]):
                continue
            where = f"{name}:{number}"
            options = fields[3].split(",") if len(fields) > 3 else []
            if fields[1] in ("/", "/usr") or "x-initrd.mount" in options:
                seen = (
                    f"{where} mounts {fields[0]} at {fields[1]} from the initramfs: the drivers must be in it"
                )
                return EarlyMount("initramfs", "warn", seen, early)
            if "nofail" not in options and "noauto" not in options:
                seen = f"{where} has {fields[0]} without nofail: a blank device stops the next boot"
                return Finding(
                    "initramfs", "warn", seen, "take the line out; emupmem mount --at-boot does it safely"
                )
    return Finding(
        "initramfs",
        "ok",
        "need not have the drivers: nothing that is needed for / is on the device, and udev loads them later",
    )


def look_at_randomisation(eye: Eye) -> Finding | None:
    if eye.situation is None:
        return None
    found = re.search(r"^(?:# )?CONFIG_RANDOMIZE_BASE(=y| is not set)", eye.config, re.MULTILINE)
    built = found[1] == "=y" if found is not None else None
    return randomisation_finding(replace(eye.situation, command_line=eye.line), built)


def randomisation_finding(situation: Situation, built: bool | None) -> Finding:
    """Whether the kernel may place itself inside a reservation; `built` None: its configuration is unknown."""
    name = "randomisation"
    kernel = situation.kernel.text if situation.kernel is not None else "a kernel of unknown version"
    start = {True: "started by UEFI", False: "started by BIOS", None: "started by UEFI or BIOS"}[
        situation.efi
    ]
    if situation.command_line is not None and situation.command_line.nokaslr:
        return Finding(name, "ok", "nokaslr is on the command line: the kernel stays at its place")
    if built is False:
        return Finding(name, "ok", f"{kernel} is built without it (RANDOMIZE_BASE)")
    add, warnings = kernels.randomisation(situation)
    if add:
        return Finding(name, "warn", warnings[0], "sudo emupmem apply --nokaslr …, or a newer kernel")
    if warnings:
        return Finding(name, "warn", warnings[0], "if it is one of these: sudo emupmem apply --nokaslr …")
    return Finding(name, "ok", f"{kernel}, {start}: keeps clear of up to {MAX_MEMMAP_REGIONS} ranges")
