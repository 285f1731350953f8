# SPDX-License-Identifier: Apache-2.0
"""What makes a machine one that apply must not touch, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from emupmem.boot import detect
from emupmem.boot import kernel as boot_kernel
from emupmem.boot.foreign import Refused
from emupmem.boot.loader import Check
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import DeviceKind, EmupmemError, Plan, Presence
from emupmem.planner import survey
from emupmem.planner.kernels import kernel_problem, words_beside
from emupmem.planner.survey import ELSEWHERE, WSL
from emupmem.system.host import Host


def refuse_machine(machine: Host, kind: DeviceKind = DeviceKind.PMEM) -> tuple[str, ...]:
    """Raise EmupmemError for the first obstacle; give warnings for what could not be told.

    On the running machine everything counts; of a tree only what the tree shows, and what it does
    not show is a warning.
    """
    return tuple(warning for check in checks(machine, kind).values() for warning in check(machine))


def first(machine: Host, kind: DeviceKind = DeviceKind.PMEM) -> EmupmemError | None:
    """Why apply would refuse, None where it would not."""
    try:
        refuse_machine(machine, kind)
    except EmupmemError as exc:
        return exc
    return None


def for_plan(refused: Refused, make: Callable[[], Plan], extra: tuple[str, ...] = ()) -> Refused:
    """The refusal with the words of a plan in the other tool's own way; as it is where there is no plan."""
    try:
        made = make()
        beside = words_beside(made.reservations, made.needs_nokaslr)
        return refused.for_words(" ".join(dict.fromkeys([made.memmap, *beside, *extra])))
    except EmupmemError:
        return refused


def checks(machine: Host, kind: DeviceKind = DeviceKind.PMEM) -> dict[str, Check]:
    """The checks that make sense here, by name, in order: each gives warnings or raises EmupmemError."""
    host: dict[str, Check] = {
        "processor": _refuse_processor,
        "wsl": _refuse_wsl,
        "container": _refuse_container,
        "xen": _refuse_xen,
    }
    return {
        **(host if machine.running else {}),
        **detect.of(machine).checks(machine),
        "kernel": partial(_refuse_kernel, kind=kind),
        "modules": partial(_refuse_modules, kind=kind),
    }


def _refuse_processor(machine: Host) -> tuple[str, ...]:
    if machine.architecture not in ("x86_64", "AMD64"):
        raise EmupmemError(
            f"this machine is {machine.architecture}: memmap=SIZE!OFFSET exists on x86-64 only", ELSEWHERE
        )
    return ()


def _refuse_wsl(machine: Host) -> tuple[str, ...]:
    version = machine.peek("/proc/version")
    if WSL.search(version) or machine.exists("/proc/sys/fs/binfmt_misc/WSLInterop"):
        raise EmupmemError("this is WSL: Windows starts its kernel, not GRUB", ELSEWHERE)
    return ()


def _refuse_container(machine: Host) -> tuple[str, ...]:
    kind = container(machine)
    if kind:
        raise EmupmemError(
            f"this is a container ({kind}): the boot configuration here starts nothing",
            "run emupmem on the machine itself; a container is given the device or the mount",
        )
    return ()


def _refuse_xen(machine: Host) -> tuple[str, ...]:
    if "control_d" in machine.peek("/proc/xen/capabilities"):
        raise EmupmemError("this is a Xen dom0: Xen, not Linux, owns the memory map", ELSEWHERE)
    if machine.peek("/sys/hypervisor/guest_type") == "PV":
        raise EmupmemError("this is a Xen PV guest: its memory map is Xen's", ELSEWHERE)
    return ()


def container(machine: Host) -> str:
    """The kind of container we are in, empty outside one."""
    kind = machine.peek("/run/systemd/container")
    if not kind:
        for mark, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
            if machine.exists(mark):
                return name
        found = re.search(r"(?:^|\0)container=([^\0]+)", machine.peek("/proc/1/environ"))
        kind = found[1] if found else ""
    if not kind:
        done = machine.output("systemd-detect-virt", "--container")
        if done is not None and done.status == 0:
            kind = done.stdout.decode().strip()
    return kind


def target(machine: Host) -> boot_kernel.Target | None:
    """The kernel that boots by default, None where that cannot be told."""
    entry = detect.of(machine).target(machine)
    return boot_kernel.kernel_of(machine, entry) if entry is not None else None


def planned_for(machine: Host, found: survey.Survey) -> survey.Survey:
    """A survey for the kernel that boots by default on a machine or in a tree.

    Raises as survey.for_kernel does, and where the machine is WSL or Xen's.
    """
    if machine.running:
        _refuse_wsl(machine)
        _refuse_xen(machine)
    kernel = target(machine)
    if kernel is not None and kernel.kernel is None:  # not the running one's, which says nothing of another
        found = replace(found, situation=replace(found.situation, kernel=None))
    return survey.for_kernel(found, kernel.kernel if kernel is not None else None)


def _refuse_kernel(machine: Host, kind: DeviceKind) -> tuple[str, ...]:
    """The kernel that will boot must be able to make the device."""
    kernel = target(machine)
    if kernel is None:
        return ("cannot determine which kernel boots by default: its drivers are not checked",)
    problem = kernel_problem(kernel.kernel, kind)
    if problem is not None:
        raise EmupmemError(f"the kernel that boots by default: {problem.message}", problem.hint)
    name, lacks = boot_kernel.kernel_lacks(machine, kernel.release, kind)
    if lacks:
        raise EmupmemError(
            f"the kernel that boots by default, {kernel.release}, is built without {lacks[0]} ({name})",
            "install a distribution's standard kernel",
        )
    if re.search(r"^CONFIG_CMDLINE_OVERRIDE=y", machine.kernel_config(kernel.release)[1], re.MULTILINE):
        raise EmupmemError(
            f"the kernel that boots by default, {kernel.release}, takes nothing from a boot loader "
            f"(CONFIG_CMDLINE_OVERRIDE, {name})",
            "install a distribution's standard kernel",
        )
    if not name:
        which = kernel.release or "the kernel that boots by default"
        return (f"no configuration of {which} is kept here: its drivers are not checked",)
    try:
        line = detect.of(machine).line(machine)
    except EmupmemError:
        line = parse_command_line("")
    why, word = boot_kernel.kmem_is_first(machine, kernel.release, line, kind)
    return (f"{why}; the kernel command line needs {word} as well",) if why else ()


def _refuse_modules(machine: Host, kind: DeviceKind) -> tuple[str, ...]:
    """And it must have the drivers; where its configuration is not kept, that cannot be told."""
    kernel = target(machine)
    if kernel is None or not boot_kernel.kernel_lacks(machine, kernel.release)[0]:
        return ()
    states = boot_kernel.module_states(machine, kernel.release, parse_command_line(""), kind)
    missing = [m.name for m in states if m.presence is Presence.MISSING and m.name != "libnvdimm"]
    if missing and machine.running:
        raise EmupmemError(
            f"the kernel that boots by default, {kernel.release}, has no module {missing[0]} installed",
            "install the package that holds it (linux-modules-extra on Ubuntu)",
        )
    return ()
