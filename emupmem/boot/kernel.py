# SPDX-License-Identifier: Apache-2.0
"""The kernel that will boot: its version, its configuration, its modules."""

from __future__ import annotations

import re

from emupmem.boot import entry as boot_entry
from emupmem.kernel.cmdline import WITHOUT_KMEM
from emupmem.model import CommandLine, DeviceKind, KernelRelease, ModuleState, Presence
from emupmem.parser.bootlog import kernel_release
from emupmem.record import record
from emupmem.system.host import Host

# What will boot ------------------------------------------------------------------------------


@record
class Target:
    """The kernel that boots by default: its release, image path, and version as far as it can be told."""

    release: str
    image: str
    version: KernelRelease | None

    @property
    def kernel(self) -> KernelRelease | None:
        """The version, of the release alone where there is no banner."""
        return self.version or kernel_release(self.release)


def kernel_of(machine: Host, entry: boot_entry.BootEntry) -> Target:
    """The kernel that an entry starts."""
    # With a /boot or an ESP of its own the loader's paths begin below it.
    folders = ("", "/boot", "/efi", "/boot/efi")
    places = [f"{folder}{entry.kernel}" for folder in folders] if entry.kernel else []
    image = next((p for p in places if machine.exists(p)), entry.kernel)
    banner = machine.kernel_banner(image)
    # The image first: Arch's kernels are called vmlinuz-linux, whatever their release.
    release = banner.split()[2] if banner else entry.release
    running = machine.peek("/proc/version") if machine.running else ""
    if running.startswith(f"Linux version {release} "):
        return Target(release, image, kernel_release(running, machine.peek("/proc/version_signature")))
    return Target(release, image, kernel_release(banner) if banner else None)


MODULES = ("nd_e820", "nd_pmem", "libnvdimm")
"""The drivers between a reserved range and its block device (a file system needs no module for DAX)."""

OPTIONS = {
    "CONFIG_X86_PMEM_LEGACY": ("ym", "makes a device of the reserved range"),
    "CONFIG_BLK_DEV_PMEM": ("ym", "makes /dev/pmem0"),
    "CONFIG_FS_DAX": ("y", "lets file systems map it directly"),
}

_DEVDAX_OPTIONS = {
    **OPTIONS,
    "CONFIG_NVDIMM_DAX": ("y", "knows the mode devdax"),
    "CONFIG_DEV_DAX": ("ym", "makes /dev/dax0.0"),
    "CONFIG_DEV_DAX_PMEM": ("ym", "makes it of persistent memory"),
}
_SOFT_OPTIONS = {
    "CONFIG_EFI_SOFT_RESERVE": ("y", "knows soft reserved memory"),
    "CONFIG_DEV_DAX_HMEM": ("ym", "makes a device of it"),
    "CONFIG_DEV_DAX": ("ym", "makes /dev/dax0.0"),
}
_MEMORY_OPTIONS = {
    **_SOFT_OPTIONS,
    "CONFIG_DEV_DAX_KMEM": ("ym", "makes memory of the device"),
    "CONFIG_MEMORY_HOTPLUG": ("y", "takes memory while it runs"),
}
OPTIONS_OF = {
    DeviceKind.PMEM: OPTIONS,
    DeviceKind.DEVDAX: _DEVDAX_OPTIONS,
    DeviceKind.DAX: _SOFT_OPTIONS,
    DeviceKind.MEMORY: _MEMORY_OPTIONS,
}
MODULES_OF = {
    DeviceKind.PMEM: MODULES,
    DeviceKind.DEVDAX: (*MODULES, "device_dax", "dax_pmem"),
    DeviceKind.DAX: ("dax_hmem", "device_dax"),
    DeviceKind.MEMORY: ("dax_hmem", "kmem"),
}


def kernel_lacks(machine: Host, release: str, kind: DeviceKind = DeviceKind.PMEM) -> tuple[str, list[str]]:
    """(configuration file, options that the kernel lacks); ("", []) where no configuration is kept."""
    name, text = machine.kernel_config(release)
    if not text:
        return "", []
    values = dict(re.findall(r"^(CONFIG_\w+)=(\w)", text, re.MULTILINE))
    return name, [
        f"{o} ({why})" for o, (good, why) in OPTIONS_OF[kind].items() if values.get(o, "n") not in good
    ]


def module_states(
    machine: Host, release: str, cmdline: CommandLine, kind: DeviceKind = DeviceKind.PMEM
) -> tuple[ModuleState, ...]:
    """How the kernel of this release has each module of the driver chain."""
    base = next(
        (b for b in (f"/lib/modules/{release}", f"/usr/lib/modules/{release}") if machine.exists(b)), ""
    )
    listed = machine.peek(f"{base}/modules.dep") if base else ""
    builtin = machine.peek(f"{base}/modules.builtin") if base else ""
    blocked = _blacklist(machine, cmdline)
    running = machine.running and machine.peek("/proc/sys/kernel/osrelease") == release
    return tuple(
        ModuleState(n, Presence.LOADED)
        if running and machine.exists(f"/sys/module/{n}")
        else _module_state(n, listed, builtin, blocked, bool(base))
        for n in MODULES_OF[kind]
    )


def kmem_is_first(machine: Host, release: str, line: CommandLine, kind: DeviceKind) -> tuple[str, str]:
    """(why kmem has soft reserved memory before our unit is at work, the word that cures it); else two empty strings.

    A driver that is built in is not loaded, so no blacklist keeps it away (init/main.c, initcall_blacklisted;
    drivers/dax/kmem.c; drivers/base/memory.c and mm/memory_hotplug.c, setup_memhp_default_state).
    """
    built_in = re.search(r"^CONFIG_DEV_DAX_KMEM=y", machine.kernel_config(release)[1], re.MULTILINE)
    words = ("memhp_default_state=online_movable", "initcall_blacklist=dax_kmem_init")
    if built_in is None or not kind.soft or set(words) & set(line.words):
        return "", ""
    word = words[0] if kind is DeviceKind.MEMORY else words[1]
    return f"kmem is built into {release}: it takes the range before emupmem.service is at work", word


def _module_state(name: str, listed: str, builtin: str, blocked: dict[str, str], known: bool) -> ModuleState:
    if f"/{name}.ko" in builtin:
        return ModuleState(name, Presence.BUILT_IN)
    if name in blocked:
        return ModuleState(name, Presence.BLOCKED, blocked[name])
    if not known:
        return ModuleState(name, Presence.UNKNOWN)
    return ModuleState(name, Presence.AVAILABLE if f"/{name}.ko" in listed else Presence.MISSING)


def _blacklist(machine: Host, cmdline: CommandLine) -> dict[str, str]:
    """Modules that must not be loaded by themselves, and the place that says so."""
    blocked: dict[str, str] = {}
    for folder in ("/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d"):
        for name in machine.names(folder):
            if not name.endswith(".conf"):
                continue
            for number, line in enumerate(machine.peek(f"{folder}/{name}").splitlines(), 1):
                words = line.split("#")[0].split()
                off = (
                    len(words) > 2
                    and words[0] == "install"
                    and words[2] in ("/bin/false", "/bin/true", "false", "true")
                )
                if len(words) > 1 and (words[0] == "blacklist" or off):
                    blocked.setdefault(words[1].replace("-", "_"), f"{folder}/{name}:{number}")
    ours = WITHOUT_KMEM if cmdline.soft else ""  # emupmem.service loads kmem where it is wanted
    for word in cmdline.words:
        if word == ours:
            continue
        key, _, value = word.partition("=")
        if key in ("modprobe.blacklist", "module_blacklist", "rd.driver.blacklist"):
            for module in value.split(","):
                blocked.setdefault(module.replace("-", "_"), f"the kernel command line ({key}=)")
    return blocked
