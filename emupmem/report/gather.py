# SPDX-License-Identifier: Apache-2.0
"""One archive with all that planning and diagnosing need, without secrets; and a machine read from it.

Writing: `gather` looks at a machine, `mask` takes the secrets out (pure), `pack` makes the bytes (pure:
same input, same bytes). Reading: `unpack` judges every member of an archive that may be hostile (pure),
`Collected` is the machine in it: its files are looked up in memory, nothing is written anywhere, no
program is run, and whatever the archive does not hold is simply not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from emupmem import __version__
from emupmem.boot import addon, efi, foreign, loader, obstacles, owner, partitions, rpm_ostree, signing
from emupmem.boot import images as boot_images
from emupmem.boot import kernel as boot_kernel
from emupmem.boot.bls import entries, files, sources
from emupmem.boot.grub import defaults, environment, menu
from emupmem.boot.grub.checks import readable_menu
from emupmem.boot.grub.environment import GRUB_CFGS, GRUB_DEFAULT
from emupmem.device import installed
from emupmem.device.blocks import mount_of, mounts
from emupmem.device.unit import FILE as UNIT_FILE
from emupmem.doctor import finding, host, look
from emupmem.doctor import kernel as doctor_kernel
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError
from emupmem.parser.bootlog import parse_boot_log
from emupmem.report.archive import COMMANDS, DOCTOR, FORMAT, LARGEST_FILE, TREE, Archive, as_json
from emupmem.report.masking import Masked, mask, secrets
from emupmem.system.backups import BACKUPS
from emupmem.system.host import Host
from emupmem.system.sysfs import read_memory_blocks

DMESG = ("dmesg",)
JOURNAL = ("journalctl", "-k", "-b", "0", "-o", "cat", "--no-pager")
PROGRAMS = (
    ("systemd-detect-virt", "--vm"),
    ("systemd-detect-virt", "--container"),
    entries.BOOTCTL_LIST,
    rpm_ostree.KARGS,
)
"""What is run on the machine and answered from the archive later, beside its log."""

VERSIONS = {"mkfs.ext4": "-V", "mkfs.xfs": "-V", "blkid": "-V", "wipefs": "-V", "grub-mkconfig": "-V"}
"""How programs tell their version; the others know --version."""

_FILES = (
    "/proc/iomem",
    "/proc/cmdline",
    "/proc/version",
    "/proc/version_signature",
    "/proc/meminfo",
    "/proc/swaps",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/bootloader_type",
    "/proc/xen/capabilities",
    "/sys/hypervisor/type",
    "/sys/hypervisor/guest_type",
    "/sys/firmware/efi/fw_platform_size",
    "/sys/kernel/security/lockdown",
    "/sys/power/state",
    "/sys/power/disk",
    "/etc/os-release",
    "/etc/sysconfig/kdump",
    "/etc/default/kdump-tools",
    efi.LOADER_INFO,
    efi.STUB_INFO,
    efi.SECURE_BOOT,
    GRUB_DEFAULT,
    UNIT_FILE,
    *(f"{folder}/kernel/install.conf" for folder in sources.CONFIG_FOLDERS),
    foreign.PROXMOX_ESPS,
    foreign.LIMINE_DEFAULTS,
    foreign.LIMINE_TOOL_CONFIG,
    *foreign.LIMINE_CONFIGS,
    *foreign.REFIND_CONFIGS,
    *(f"{folder}/loader/loader.conf" for folder in files.BOOT_FOLDERS),
)
_THERE = (
    "/sys/firmware/efi",
    "/run/ostree-booted",
    "/proc/sys/fs/binfmt_misc/WSLInterop",
    "/var/backups",
    *foreign.SIGNS,
    addon.STUB,
    *(name for pair in signing.KEYS for name in pair),
    *(f"{folder}/EFI" for folder in files.BOOT_FOLDERS),
    *dict.fromkeys(f"/sys/module/{m}" for names in boot_kernel.MODULES_OF.values() for m in names),
)
"""Names of which it matters only whether they are there."""

_ND = ("devtype", "modalias", "mode", "size", "resource", "provider", "numa_node", "target_node", "state")
_ND_MORE = ("align", "holder", "holder_class", "nstype", "force_raw", "mappings", "read_only", "sector_size")
_SILENT = ("ipmctl", "grubby", "sdbootutil", "kernelstub", "sdboot-manage", "proxmox-boot-tool")
"""Programs that would set to work when asked for their version, or have no such option."""

_NODES = "/sys/devices/system/node"
MOST_BLOCKS = 512
"""Memory blocks of a range that are taken along."""

_DRIVERS = re.compile(r"/(?:nd_|libnvdimm|dax|dax_|device_dax|ramdax|kmem)\w*\.ko")


# Gathering -------------------------------------------------------------------------------------------


@dataclass
class _Basket:
    machine: Host
    members: dict[str, bytes] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def put(self, name: str, data: bytes) -> None:
        if len(data) > LARGEST_FILE:
            self.cut.append(name)
        self.members[name] = data[:LARGEST_FILE]

    def file(self, name: str, keep: Callable[[str], str] | None = None) -> None:
        """Take a file of the machine; `keep` makes of each line what is taken of it, so that line numbers stay."""
        try:
            data = self.machine.read(name)
        except EmupmemError:
            self.unreadable.append(name)
            return
        if data is not None and keep is not None:
            text = data.decode("utf-8", "surrogateescape")
            data = "".join(keep(line) + "\n" for line in text.splitlines()).encode("utf-8", "surrogateescape")
        if data is not None:
            self.put(TREE + name, data)

    def program(self, name: str) -> None:
        """Take the texts of a PE file: a whole image is a hundred megabytes."""
        try:
            found = self.machine.pe_file(name)
        except EmupmemError:
            self.unreadable.append(name)
            return
        self.text(name, found.shown if found is not None else "")

    def text(self, name: str, text: str) -> None:
        self.put(TREE + name, text.encode("utf-8", "surrogateescape"))


def gather(machine: Host, findings: Sequence[finding.Finding]) -> Archive:
    """Look at a machine: all that planning and diagnosing need, secrets still in it. Needs no root."""
    basket = _Basket(machine)
    kernel = obstacles.target(machine)
    for name in _FILES:
        basket.file(name)
    for folder, ext in (("/etc/default/grub.d", ".cfg"), (sources.MKINITCPIO_PRESETS, ".preset")):
        for name in machine.names(folder):
            if name.endswith(ext):
                basket.file(f"{folder}/{name}")
    for name in environment.grub_cfgs(machine):
        basket.file(name)
    basket.file(environment.grubenv_name(machine))
    for name in (*files.entry_files(machine), *sources.source_files(machine), *owner.limine_layers(machine)):
        basket.file(name)
    for name in (
        efi.SELECTED,
        efi.STUB_IMAGE,
        efi.LOADER_IMAGE,
        *map(efi.efi_variable, ("LoaderEntryDefault", "LoaderEntryLastBooted")),
    ):
        if text := efi.efi_text(machine, name):
            basket.text(name, text)  # as plain text, so that the masks see it
    for name in boot_images.program_files(machine):
        basket.program(name)
    kind = obstacles.container(machine)
    if kind:
        basket.text("/run/systemd/container", kind)
    _gather_kernel(basket, kernel)
    _gather_memory(basket)
    _gather_devices(basket)
    _gather_nodes(basket)
    _gather_soft(basket)
    _gather_mounts(basket)
    images = {e.kernel for e in menu.entries(readable_menu(machine))}
    images |= {"/boot" + i for i in images} | ({kernel.image} if kernel is not None else set())
    starts = installed.present_program(machine)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "emupmem": __version__,
        "root": machine.is_root,
        "architecture": machine.architecture,
        "there": sorted(n for n in (*_THERE, *images, starts) if machine.exists(n)),
        "modified": {n: machine.modified(n) for n in (*GRUB_CFGS, *sources.SOURCES) if machine.exists(n)},
        "banners": {kernel.image: machine.kernel_banner(kernel.image)} if kernel is not None else {},
        "nodes": [asdict(n) for n in machine.nodes()],
        "regions": [asdict(r) for r in machine.regions()],
        "room": {n: machine.room(n) for n in ("/boot", "/", BACKUPS.rpartition("/")[0], "/var")},
        "tools": _versions(machine),
        "outputs": _outputs(basket, any(isinstance(f, finding.EarlyMount) for f in findings)),
        "sourced": _sourced(machine),
        "unreadable": sorted(basket.unreadable),
        "cut": sorted(basket.cut),
    }
    shown = {"ok": finding.good(findings), "findings": [asdict(f) for f in findings]}
    basket.put(DOCTOR, as_json(shown))
    return Archive(facts, basket.members)


def _gather_kernel(basket: _Basket, kernel: boot_kernel.Target | None) -> None:
    """The configuration of the kernel that boots, its drivers, and what blocks them."""
    machine = basket.machine
    running = machine.peek("/proc/sys/kernel/osrelease")
    releases = dict.fromkeys(r for r in (kernel.release if kernel is not None else "", running) if r)
    for release in releases:
        name, text = machine.kernel_config(release)
        if name and (kernel is None or release == kernel.release):
            basket.text("/proc/config" if name == "/proc/config.gz" else name, text)
        for base in (f"/lib/modules/{release}", f"/usr/lib/modules/{release}"):
            if machine.exists(base):
                for list_name in ("modules.dep", "modules.builtin"):
                    basket.file(f"{base}/{list_name}", lambda line: line if _DRIVERS.search(line) else "#")
                break
    basket.file("/proc/modules", lambda line: line.partition(" ")[0])
    for folder in ("/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d"):
        for name in machine.names(folder):
            if name.endswith(".conf"):
                # Line numbers stay: they are what people are told.
                basket.file(
                    f"{folder}/{name}",
                    lambda line: line if re.match(r"\s*(blacklist|install)\s", line) else "#",
                )


def _gather_memory(basket: _Basket) -> None:
    machine = basket.machine
    for number, *values in machine.firmware_entries():
        for name, value in zip(("start", "end", "type"), values, strict=True):
            basket.text(f"/sys/firmware/memmap/{number}/{name}", value)
    for name in machine.names("/sys/kernel/mm/hugepages"):
        basket.file(f"/sys/kernel/mm/hugepages/{name}/nr_hugepages")
    booted = re.search(r"^btime \d+", machine.peek("/proc/stat"), re.MULTILINE)
    if booted is not None:
        basket.text("/proc/stat", booted[0] + "\n")


def _gather_devices(basket: _Basket) -> None:
    machine, bus = basket.machine, "/sys/bus/nd/devices"
    for name in machine.names(bus):
        for attribute in (*_ND, *_ND_MORE):
            value = machine.peek(f"{bus}/{name}/{attribute}")
            if value:
                basket.text(f"{bus}/{name}/{attribute}", value)


def _gather_nodes(basket: _Basket) -> None:
    """How far the NUMA nodes are from each other."""
    machine = basket.machine
    nodes = [n for n in machine.names(_NODES) if re.fullmatch(r"node\d{1,4}", n)]
    for name in (f"{_NODES}/has_cpu", *(f"{_NODES}/{n}/distance" for n in nodes)):
        if value := machine.peek(name):
            basket.text(name, value)


def _gather_soft(basket: _Basket) -> None:
    """What became of soft reserved memory: its devices and their drivers, its blocks, its nodes, the tiers."""
    machine = basket.machine
    line = parse_command_line(machine.peek("/proc/cmdline"))
    if not line.soft:
        return
    bus, memory = "/sys/bus/dax", "/sys/devices/system/memory"
    wanted = [f"{memory}/block_size_bytes", f"{memory}/auto_online_blocks"]
    for device in machine.names(f"{bus}/devices"):
        wanted += [f"{bus}/devices/{device}/{n}" for n in ("resource", "size", "align", "target_node")]
        drivers = [
            d for d in machine.names(f"{bus}/drivers") if machine.exists(f"{bus}/drivers/{d}/{device}")
        ]
        for there in (*(f"{bus}/drivers/{d}/{device}" for d in drivers), f"/dev/{device}"):
            if machine.exists(there):
                basket.text(there, "")
    for item in line.soft:
        for block in read_memory_blocks(machine, item.span)[:MOST_BLOCKS]:
            wanted += [f"{memory}/{block.name}/{n}" for n in ("state", "valid_zones")]
    tiers = "/sys/devices/virtual/memory_tiering"
    wanted += [f"{_NODES}/{n}/meminfo" for n in machine.names(_NODES) if re.fullmatch(r"node\d+", n)]
    wanted += [f"{tiers}/{n}/nodelist" for n in machine.names(tiers)]
    for name in wanted:
        if value := machine.peek(name):
            basket.text(name, value)


def _gather_mounts(basket: _Basket) -> None:
    """What / and /boot lie on, and what is mounted of persistent memory; nothing of other mounts."""
    machine = basket.machine
    found = mounts(machine)
    paths = (environment.grubenv_name(machine), "/boot", "/", "/var/backups", "/etc/default")
    needed = {m.dir for p in paths if (m := mount_of(found, machine.real(p))) is not None}
    wanted = [m for m in found if m.dir in needed or m.source.startswith("/dev/pmem")]
    folders = {m.dir for m in wanted}

    def keep(line: str) -> bool:
        words = line.split(" ")
        return len(words) > 4 and words[4] in folders

    lines = [line for line in machine.peek("/proc/self/mountinfo").splitlines() if keep(line)]
    basket.text("/proc/self/mountinfo", "".join(f"{line}\n" for line in lines))
    for one in wanted:
        _gather_stack(basket, one.number)
    for name in ("/etc/fstab", "/etc/crypttab"):
        basket.file(name, lambda line: line if "/dev/pmem" in line else "#")


def _gather_stack(basket: _Basket, number: str, depth: int = 8) -> None:
    """Of what a block device is made: kinds only, no identifiers."""
    machine, here = basket.machine, f"/sys/dev/block/{number}"
    # As `blocks.stack` asks: a partition's are above it, and become its own here.
    mapped = next((p for p in (f"{here}/dm", f"{here}/../dm") if machine.exists(p)), "")
    if mapped:
        basket.text(f"{here}/dm/uuid", f"{machine.peek(f'{mapped}/uuid').partition('-')[0]}-")
    level = machine.peek(f"{here}/md/level") or machine.peek(f"{here}/../md/level")
    if level:
        basket.text(f"{here}/md/level", level)
    for below in machine.names(f"{here}/slaves") if depth else ():
        under = machine.peek(f"{here}/slaves/{below}/dev")
        basket.text(f"{here}/slaves/{below}/dev", under)
        _gather_stack(basket, under, depth - 1)


def _versions(machine: Host) -> dict[str, str]:
    """The first line of what each installed program says of its version."""
    found = {}
    for name in (*host.TOOLS, *loader.PROGRAMS, *foreign.LIMINE_TOOLS):
        path = machine.find(name)
        if path is None:
            continue
        quiet = name.startswith("update-grub") or name in _SILENT
        done = None if quiet else machine.output(name, VERSIONS.get(name, "--version"), timeout=5)
        said = (done.stdout or done.stderr) if done is not None else b""
        found[name] = said.decode("utf-8", "replace").partition("\n")[0][:200]
    return found


def _outputs(basket: _Basket, needs_drivers: bool) -> dict[str, dict[str, Any]]:
    """Run what tells of this boot; the journal only where dmesg no longer has the map."""
    found: dict[str, dict[str, Any]] = {}
    complete = False
    lists = doctor_kernel.listing(basket.machine) if needs_drivers else ()
    starts = installed.present_program(basket.machine)
    more = (*((lists,) if lists else ()), *((installed.version_call(starts),) if starts else ()))
    by_proxmox = basket.machine.is_root and basket.machine.exists(foreign.PROXMOX_ESPS)
    more += (partitions.LOOK,) if by_proxmox else ()
    for argv in (DMESG, JOURNAL, *PROGRAMS, *more):
        if argv == JOURNAL and complete:
            continue
        done = basket.machine.output(*argv)
        if done is None:
            continue
        name = f"{COMMANDS}/{'-'.join(w.strip('-') for w in argv[:2] if w != '-k').replace('/', '-')}"
        said = done.stdout
        if argv == lists:  # of an initramfs only its drivers
            said = b"\n".join(x for x in said.splitlines() if _DRIVERS.search(x.decode("utf-8", "replace")))
        basket.put(name, said)
        found[" ".join(argv)] = {"member": name, "status": done.status, "said": done.last_words[:200]}
        complete = complete or parse_boot_log(done.stdout).firmware is not None
    return found


def _sourced(machine: Host) -> dict[str, Any]:
    """What sh makes of GRUB's defaults here: a reader elsewhere must not run them."""
    try:
        seen = defaults.judge_of(machine)([text for _, text in defaults.grub_texts(machine)])
    except EmupmemError as exc:
        return {"error": exc.message, "hint": exc.hint}
    values = [dict(v) for v in seen.values]
    return {
        "values": values,
        "complaints": [list(c) for c in seen.complaints],
        "failed": seen.failed,
        "unread": seen.unread,
    }


def gather_machine(machine: Host) -> Masked:
    """All of it: look, let the doctor look, mask."""
    return mask(gather(machine, look.findings_of(machine)), *secrets(machine))
