# SPDX-License-Identifier: Apache-2.0
"""What makes a machine one that apply must not touch, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable

from emupmem.boot import detect, foreign, loader
from emupmem.boot import kernel as boot_kernel
from emupmem.boot.foreign import Refused
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import GRUB_DEFAULT
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError, Plan, Presence
from emupmem.planner import survey
from emupmem.planner.kernels import kernel_problem
from emupmem.planner.survey import ELSEWHERE, WSL
from emupmem.system.machine import Machine


def refuse(machine: Machine) -> tuple[str, ...]:
    """Raise EmupmemError for the first obstacle; give warnings for what could not be told.

    On the running machine everything counts; of a tree only what the tree shows, and what it does
    not show is a warning.
    """
    return tuple(warning for check in checks(machine).values() for warning in check(machine))


def first(machine: Machine) -> EmupmemError | None:
    """Why apply would refuse, None where it would not."""
    try:
        refuse(machine)
    except EmupmemError as exc:
        return exc
    return None


def for_plan(refused: Refused, make: Callable[[], Plan], extra: tuple[str, ...] = ()) -> Refused:
    """The refusal with the words of a plan in the other tool's own way; as it is where there is no plan."""
    try:
        return refused.for_words(" ".join([make().memmap, *extra]))
    except EmupmemError:
        return refused


def checks(machine: Machine) -> dict[str, Check]:
    """The checks that make sense here, by name, in order: each gives warnings or raises EmupmemError."""
    host: dict[str, Check] = {
        "processor": _refuse_processor,
        "wsl": _refuse_wsl,
        "container": _refuse_container,
        "xen": _refuse_xen,
    }
    other = detect.of(machine)
    if other is not None:
        own: dict[str, Check] = {"loader": lambda m: _refuse_other(m, other)}
    else:
        own = {"grub": _refuse_no_grub}
        own |= (
            {"loader": _refuse_loader, "menus": _refuse_two_menus, "copies": _copies}
            if machine.running
            else {}
        )
    return {
        **(host if machine.running else {}),
        **own,
        "kernel": _refuse_kernel,
        "modules": _refuse_modules,
    }


Check = Callable[[Machine], tuple[str, ...]]


def _refuse_processor(machine: Machine) -> tuple[str, ...]:
    if machine.architecture not in ("x86_64", "AMD64"):
        raise EmupmemError(
            f"this machine is {machine.architecture}: memmap=SIZE!OFFSET exists on x86-64 only", ELSEWHERE
        )
    return ()


def _refuse_wsl(machine: Machine) -> tuple[str, ...]:
    version = machine.peek("/proc/version")
    if WSL.search(version) or machine.exists("/proc/sys/fs/binfmt_misc/WSLInterop"):
        raise EmupmemError("this is WSL: Windows starts its kernel, not GRUB", ELSEWHERE)
    return ()


def _refuse_container(machine: Machine) -> tuple[str, ...]:
    kind = container(machine)
    if kind:
        raise EmupmemError(
            f"this is a container ({kind}): the boot configuration here starts nothing",
            "run emupmem on the machine itself; a container is given the device or the mount",
        )
    return ()


def _refuse_xen(machine: Machine) -> tuple[str, ...]:
    if "control_d" in machine.peek("/proc/xen/capabilities"):
        raise EmupmemError("this is a Xen dom0: Xen, not Linux, owns the memory map", ELSEWHERE)
    if machine.peek("/sys/hypervisor/guest_type") == "PV":
        raise EmupmemError("this is a Xen PV guest: its memory map is Xen's", ELSEWHERE)
    return ()


def container(machine: Machine) -> str:
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


def _refuse_other(machine: Machine, other: loader.Loader) -> tuple[str, ...]:
    """What stands in the way of another loader than GRUB with grub-mkconfig."""
    other.refuse(machine)
    try:
        other.standing(machine)
    except EmupmemError:
        if machine.running and not machine.is_root:
            return ()  # a dry run without root
        raise
    return ()


def _refuse_no_grub(machine: Machine) -> tuple[str, ...]:
    if machine.read(GRUB_DEFAULT) is None:
        raise EmupmemError(
            f"there is no {GRUB_DEFAULT}: this machine is not started by a GRUB that grub-mkconfig sets up",
            "emupmem changes such machines only; emupmem suggest tells the value to add by hand",
        )
    name = environment.grub_cfg(machine)
    try:
        data = machine.read(name)
    except EmupmemError:
        if machine.running and not machine.is_root:
            return ()  # a dry run without root
        raise
    if data is None and machine.running:
        raise EmupmemError(
            f"there is no {name}: GRUB does not start this machine", "is another boot loader in use?"
        )
    return ()


def menu(machine: Machine) -> str:
    """The generated menu, empty where there is none or it is not ours to read."""
    try:
        data = machine.read(environment.grub_cfg(machine))
    except EmupmemError:
        return ""
    return (data or b"").decode("utf-8", "surrogateescape")


def _refuse_loader(machine: Machine) -> tuple[str, ...]:
    """The boot loader that started this kernel, by the mark that GRUB leaves (`owner` knows those of others)."""
    if "BOOT_IMAGE=" not in machine.peek("/proc/cmdline"):
        raise EmupmemError(
            "GRUB did not start this kernel (no BOOT_IMAGE= in /proc/cmdline): "
            "another boot loader, a unified kernel image or a direct start did",
            "what GRUB is told would not reach it; emupmem suggest tells the value to add by hand",
        )
    return ()


def _refuse_two_menus(machine: Machine) -> tuple[str, ...]:
    menus = environment.grub_cfgs(machine)
    if len(menus) > 1:
        raise EmupmemError(
            f"there are two boot menus, {' and '.join(menus)}: which one starts this machine cannot be told",
            "move the one that is not in use out of the way",
        )
    return ()


def _copies(machine: Machine) -> tuple[str, ...]:
    """Proxmox keeps copies of the menu, which its hook in grub-mkconfig makes (000_proxmox_boot_header)."""
    if not machine.exists(foreign.PROXMOX_ESPS):
        return ()
    return (
        "GRUB reads the copies of the menu that proxmox-boot-tool makes on other partitions: only the menu here "
        "is checked, emupmem verify proves it after the reboot",
    )


def target(machine: Machine) -> boot_kernel.Target | None:
    """The kernel that boots by default, None where that cannot be told."""
    other = detect.of(machine)
    if other is not None:
        try:
            default = other.standing(machine).default
        except EmupmemError:
            return None
        return boot_kernel.kernel_of(machine, default) if default is not None else None
    cfg = menu(machine)
    return boot_kernel.target_kernel(machine, cfg) if cfg else None


def planned_for(machine: Machine, found: survey.Survey) -> survey.Survey:
    """A survey for the kernel that boots by default on a machine or in a tree.

    Raises as survey.for_kernel does, and where the machine is WSL or Xen's.
    """
    if machine.running:
        _refuse_wsl(machine)
        _refuse_xen(machine)
    kernel = target(machine)
    return survey.for_kernel(found, kernel.kernel if kernel is not None else None)


def _refuse_kernel(machine: Machine) -> tuple[str, ...]:
    """The kernel that will boot must be able to make the device."""
    kernel = target(machine)
    if kernel is None:
        return ("which kernel boots by default cannot be told: its drivers are not checked",)
    problem = kernel_problem(kernel.kernel)
    if problem is not None:
        raise EmupmemError(f"the kernel that boots by default: {problem.message}", problem.hint)
    name, lacks = boot_kernel.kernel_lacks(machine, kernel.release)
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
        return (f"no configuration of kernel {kernel.release} is kept here: its drivers are not checked",)
    return ()


def _refuse_modules(machine: Machine) -> tuple[str, ...]:
    """And it must have the drivers; where its configuration is not kept, that cannot be told."""
    kernel = target(machine)
    if kernel is None or not boot_kernel.kernel_lacks(machine, kernel.release)[0]:
        return ()
    states = boot_kernel.module_states(machine, kernel.release, parse_command_line(""))
    missing = [m.name for m in states if m.presence is Presence.MISSING and m.name != "libnvdimm"]
    if missing and machine.running:
        raise EmupmemError(
            f"the kernel that boots by default, {kernel.release}, has no module {missing[0]} installed",
            "install the package that holds it (linux-modules-extra on Ubuntu)",
        )
    return ()
