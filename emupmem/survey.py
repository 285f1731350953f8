"""Looks at a machine through `Machine` and makes the values that the pure stages work on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emupmem import grubcfg
from emupmem.boot.grub import environment
from emupmem.boot.grub.environment import GRUB_DEFAULT, GRUB_DROPINS
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import (
    BootLog,
    CommandLine,
    EmupmemError,
    FirmwareMap,
    IomemLine,
    KernelRelease,
    Kind,
    Loss,
    MapEntry,
    Span,
)
from emupmem.parser.bootlog import Source, kernel_release, parse_boot_log
from emupmem.parser.sources import parse_iomem, parse_sysfs_memmap
from emupmem.planner.kernels import KERNEL_NEEDED, kernel_problem
from emupmem.planner.places import disagreements, high_losses
from emupmem.planner.situation import Situation
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.system.sysfs import Region
from emupmem.units import span_text

if TYPE_CHECKING:
    from emupmem.editor.shell import Judge
    from emupmem.verifier.observation import Observation, SeenMount, SeenRegion, SeenTrial

# editor (augeas, sh) and verifier are imported where they are needed: suggest --from needs neither.

SOURCES = ("auto", "dmesg", "journal", "sysfs")
SYSFS = "/sys/firmware/memmap"
_MOST_NOTES = 8

WSL = re.compile(r"microsoft.*wsl|wsl2", re.IGNORECASE)
"""What the version of a kernel that Windows starts looks like."""
ELSEWHERE = "to try persistent memory there, give a virtual machine a vNVDIMM instead"


@dataclass(frozen=True, slots=True)
class Survey:
    """A situation to plan in, where its map came from, and what a person should know of that.

    `plan_refused` is why a plan for this system would be worth nothing, as far as its log shows; `apply_refused`
    is why apply does not change that machine, as far as that was asked; `reserved` are the `memmap=…!…` items
    that the next boot has anyway: a plan takes their place.
    """

    situation: Situation
    source: str
    notes: tuple[str, ...] = ()
    plan_refused: EmupmemError | None = None
    apply_refused: EmupmemError | None = None
    reserved: tuple[str, ...] = ()


class NoMap(EmupmemError):
    """No source gives a firmware map that can be trusted."""


def of_log(source: Source, name: str) -> Survey:
    """What a log alone tells, nothing of the machine that we run on. Raises NoMap."""
    log = parse_boot_log(source, name)
    if log.firmware is None:
        problem = log.problem or EmupmemError(f"{name}: no firmware map in it")
        raise NoMap(problem.message, problem.hint)
    _refuse_unplaced(log)
    line = without_reservations(log.command_line) if log.command_line else None
    release = kernel_release(log.linux_version) if log.linux_version else None
    vetoes = (("the kernel's modified map", _ram(log.modified)),) if log.modified else ()
    situation = Situation(log.firmware, vetoes, log.nodes, line, log.efi, release, losses=_losses(log))
    notes = (*log.warnings, *_veto_notes(situation))
    return Survey(situation, name, notes, refusal(log), reserved=_reserved(log.command_line))


def of_machine(machine: Machine, source: str = "auto", boots: CommandLine | None = None) -> Survey:
    """What the running machine tells, from the first source that can be trusted.

    Every other readable source has a veto: a place must be RAM for all of them. `boots` are the
    words that the next boot will have beside ours; without it those of this boot.
    Raises NoMap where no source can be trusted, EmupmemError where the named one cannot be read.
    """
    logs = _logs(machine, source)
    broken: list[str] = []
    unseen: list[tuple[str, str]] = []
    maps: list[tuple[str, FirmwareMap]] = [(n, log.firmware) for n, log in logs if log.firmware is not None]
    if source in ("auto", "sysfs"):
        entries = machine.firmware_entries()
        try:
            if entries:
                maps.append((SYSFS, parse_sysfs_memmap(entries)))
        except EmupmemError as exc:
            broken.append(exc.message)
    if not maps:
        raise _no_map(source, logs)
    for _, log in logs:
        _refuse_unplaced(log)
    name, firmware = maps[0]
    vetoes = [(other, found.ram) for other, found in maps[1:]]
    vetoes += [(f"the kernel's modified map ({n})", _ram(log.modified)) for n, log in logs if log.modified]
    iomem = _iomem(machine, unseen)
    if iomem:
        usable = [
            Span(x.start, x.end) for x in iomem if x.name in ("System RAM", "Persistent Memory (legacy)")
        ]
        vetoes.append(("/proc/iomem", tuple(usable)))
    nodes = next((log.nodes for _, log in logs if log.nodes), ()) or machine.nodes()
    next_line = boots or parse_command_line(machine.peek("/proc/cmdline"))
    line = without_reservations(next_line)
    banner = machine.peek("/proc/version")
    release = kernel_release(banner, machine.peek("/proc/version_signature")) if banner else None
    situation = Situation(
        firmware,
        tuple(vetoes),
        nodes,
        line,
        machine.exists("/sys/firmware/efi"),
        release,
        machine.huge_page_bytes(),
        tuple(loss for _, log in logs for loss in _losses(log)),
    )
    notes = [*broken, *(why for _, why in unseen if machine.is_root)]
    notes += [
        f"{n}: {log.problem.message}" for n, log in logs if log.problem is not None and source == "auto"
    ]
    notes += [f"{n}: {warning}" for n, log in logs if log.firmware is not None for warning in log.warnings]
    agreeing = [other for other, found in maps[1:] if found.ram == firmware.ram]
    shown = name + (f", agrees with {' and '.join(agreeing)}" if agreeing else "")
    refused = next((why for _, log in logs if (why := refusal(log)) is not None), None)
    all_notes = (*notes, *_veto_notes(situation))
    return Survey(situation, shown, all_notes, refused, reserved=_reserved(next_line))


def _logs(machine: Machine, source: str) -> list[tuple[str, BootLog]]:
    """The boot logs that can be read and were asked for; the journal only where dmesg does not serve."""
    found: list[tuple[str, BootLog]] = []
    for name, argv in (
        ("dmesg", ("dmesg",)),
        ("journal", ("journalctl", "-k", "-b", "0", "-o", "cat", "--no-pager")),
    ):
        if source not in ("auto", name) or any(log.firmware is not None for _, log in found):
            continue
        done = machine.output(*argv)
        if done is not None and done.status == 0 and done.stdout:
            found.append((name, parse_boot_log(done.stdout, name)))
        elif source == name:
            why = done.last_words if done is not None else f"{argv[0]} is not installed"
            raise EmupmemError(f"{name} cannot be read: {why}", "run it with sudo, or leave --source away")
    return found


def _no_map(source: str, logs: Sequence[tuple[str, BootLog]]) -> NoMap:
    for name, log in logs:
        if log.problem is not None:
            return NoMap(f"{name}: {log.problem.message}", log.problem.hint)
    what = SYSFS if source == "sysfs" else "the firmware's memory map"
    return NoMap(f"{what} cannot be read here", "run it with sudo, or give a saved log: --from FILE")


def _ram(entries: Sequence[MapEntry] | None) -> tuple[Span, ...]:
    """RAM of a map, what is reserved already counted as RAM."""
    return tuple(e.span for e in entries or () if e.kind in (Kind.RAM, Kind.PRAM))


def _reserved(line: CommandLine | None) -> tuple[str, ...]:
    return tuple(i.text for i in line.reservations) if line is not None else ()


def refusal(log: BootLog) -> EmupmemError | None:
    """Why a plan for the system of a log would be worth nothing, None where nothing in the log says so."""
    if WSL.search(log.linux_version):
        return EmupmemError("the log is of WSL: Windows starts its kernel, not GRUB", ELSEWHERE)
    if log.xen:
        return EmupmemError("the log is of a Xen dom0 or PV guest: its memory map is Xen's", ELSEWHERE)
    if log.i386:
        return EmupmemError("the log is of a 32-bit kernel, which has no /dev/pmem", KERNEL_NEEDED)
    return None


def for_kernel(found: Survey, kernel: KernelRelease | None) -> Survey:
    """The survey for the kernel that will boot, that of the survey itself where it is None.

    Raises EmupmemError where a reservation would be worth nothing or do harm: see refusal and kernel_problem.
    """
    if kernel is not None:
        found = replace(found, situation=replace(found.situation, kernel=kernel))
    problem = found.plan_refused or kernel_problem(found.situation.kernel)
    if problem is not None:
        raise problem
    if found.situation.kernel is None:
        return replace(
            found, notes=(*found.notes, "the version of the kernel is not known here: " + KERNEL_NEEDED)
        )
    return found


def _losses(log: BootLog) -> tuple[Loss, ...]:
    """What the kernel took by itself: a `%` item of its command line is the planner's to know, by the word."""
    items = log.command_line.items if log.command_line is not None else ()
    asked = {(i.start, i.start + i.size) for i in items if i.op == "%"}
    return tuple(x for x in log.losses if (x.start, x.end) not in asked)


def _refuse_unplaced(log: BootLog) -> None:
    """Raise NoMap where RAM was lost and nothing says which: any place may be in it."""
    if log.unplaced:
        raise NoMap(
            f'the kernel lost RAM, and the log does not say which: "{log.unplaced}"',
            "give the whole log, not through grep or head: sudo dmesg > FILE, or journalctl -k -b -o cat > FILE",
        )


def _veto_notes(situation: Situation) -> list[str]:
    """Say what the kernel took of the RAM of the map, and what another source does not call RAM.

    Only at or above 4 GiB, and of other sources from 2 MiB on.
    """
    lost = [
        f"the kernel took {span_text(x.start, x.end)} away: {x.why}"
        for x in high_losses(situation)[:_MOST_NOTES]
    ]
    return lost + [
        f"{name} does not call {span_text(s.start, s.end)} RAM: nothing is planned there"
        for name, spans in disagreements(situation)
        for s in spans[:3]
    ]


def without_reservations(line: CommandLine, keep: Sequence[str] = ()) -> CommandLine:
    """The command line without its `memmap=…!…` items, but for those in `keep`."""
    return replace(line, items=tuple(i for i in line.items if i.op != "!" or i.text in keep))


# What will boot ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """The kernel that boots by default: its release, image path, and version as far as it can be told."""

    release: str
    image: str
    version: KernelRelease | None

    @property
    def kernel(self) -> KernelRelease | None:
        """The version, of the release alone where there is no banner."""
        return self.version or kernel_release(self.release)


def target_kernel(machine: Machine, cfg: str) -> Target | None:
    """The kernel of the default entry of a grub.cfg, None where that cannot be told."""
    entry = grubcfg.default_entry(cfg, environment.grubenv(machine))
    if entry is None:
        entry = next((e for e in grubcfg.entries(cfg) if e.ours and not e.recovery), None)
    return kernel_of(machine, entry) if entry is not None else None


def kernel_of(machine: Machine, entry: grubcfg.BootEntry) -> Target:
    """The kernel that an entry starts."""
    # With a /boot or an ESP of its own the loader's paths begin below it.
    folders = ("", "/boot", "/efi", "/boot/efi")
    places = [f"{folder}{entry.kernel}" for folder in folders] if entry.kernel else []
    image = next((p for p in places if machine.exists(p)), entry.kernel)
    release = entry.release
    banner = machine.kernel_banner(image)
    if banner and not release:
        release = banner.split()[2]
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


def kernel_lacks(machine: Machine, release: str) -> tuple[str, list[str]]:
    """(configuration file, options that the kernel lacks); ("", []) where no configuration is kept."""
    name, text = machine.kernel_config(release)
    if not text:
        return "", []
    values = dict(re.findall(r"^(CONFIG_\w+)=(\w)", text, re.MULTILINE))
    return name, [f"{o} ({why})" for o, (good, why) in OPTIONS.items() if values.get(o, "n") not in good]


def module_states(machine: Machine, release: str, cmdline: CommandLine) -> tuple[tuple[str, str], ...]:
    """For each module of the driver chain: loaded, built in, available, missing, or blocked and where."""
    base = next(
        (b for b in (f"/lib/modules/{release}", f"/usr/lib/modules/{release}") if machine.exists(b)), ""
    )
    listed = machine.peek(f"{base}/modules.dep") if base else ""
    builtin = machine.peek(f"{base}/modules.builtin") if base else ""
    blocked = _blacklist(machine, cmdline)
    running = machine.running and machine.peek("/proc/sys/kernel/osrelease") == release
    return tuple(
        (
            n,
            "loaded"
            if running and machine.exists(f"/sys/module/{n}")
            else _module_state(n, listed, builtin, blocked, bool(base)),
        )
        for n in MODULES
    )


def _module_state(name: str, listed: str, builtin: str, blocked: dict[str, str], known: bool) -> str:
    if f"/{name}.ko" in builtin:
        return "built in"
    if name in blocked:
        return f"blocked by {blocked[name]}"
    if not known:
        return "unknown"
    return "available" if f"/{name}.ko" in listed else "missing"


def _blacklist(machine: Machine, cmdline: CommandLine) -> dict[str, str]:
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
    for word in cmdline.words:
        key, _, value = word.partition("=")
        if key in ("modprobe.blacklist", "module_blacklist", "rd.driver.blacklist"):
            for module in value.split(","):
                blocked.setdefault(module.replace("-", "_"), f"the kernel command line ({key}=)")
    return blocked


# GRUB defaults ----------------------------------------------------------------------------------


GRUB_MKCONFIGS = tuple(
    f"{folder}/{name}"
    for folder in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
    for name in ("grub-mkconfig", "grub2-mkconfig")
)


def reads_dropins(machine: Machine) -> bool:
    """Whether the machine's grub-mkconfig sources /etc/default/grub.d: Debian's family patches it so.

    By the program itself, else by /etc/os-release; where neither is there, it is taken to.
    """
    for name in GRUB_MKCONFIGS:
        program = _readable(machine, name)
        if program is not None:
            return b"default/grub.d" in program
    release = machine.peek("/etc/os-release")
    family = re.findall(r"^ID(?:_LIKE)?=[\"']?([^\"'\n]*)", release, re.MULTILINE)
    return not release or bool({"debian", "ubuntu"} & set(" ".join(family).split()))


def _readable(machine: Machine, name: str) -> bytes | None:
    try:
        return machine.read(name)
    except EmupmemError:
        return None


def grub_texts(machine: Machine) -> list[tuple[str, bytes]]:
    """The files that grub-mkconfig sources, in its order: (name, content)."""
    dropins = machine.names(GRUB_DROPINS) if reads_dropins(machine) else []
    names = [GRUB_DEFAULT, *(f"{GRUB_DROPINS}/{n}" for n in dropins if n.endswith(".cfg"))]
    return [(n, data) for n in names if (data := machine.read(n)) is not None]


# Observation --------------------------------------------------------------------------------------


def observe(machine: Machine, wait: float) -> Observation:
    """Everything that verify judges, after waiting up to `wait` seconds for the devices to appear."""
    from emupmem.verifier.ladder import complete
    from emupmem.verifier.observation import Observation

    unseen: list[tuple[str, str]] = []
    cmdline = parse_command_line(machine.peek("/proc/cmdline"))
    next_start = _next_start(machine, unseen)
    release = machine.peek("/proc/sys/kernel/osrelease")
    seen = Observation(next_start.configured, next_start.variable, cmdline)
    if cmdline.reservations:
        if machine.live and wait:
            machine.settle()
        wait_for(lambda: complete(replace(seen, regions=_regions(machine))), wait)
    return Observation(
        configured=next_start.configured,
        variable=next_start.variable,
        command_line=cmdline,
        recovery=next_start.recovery,
        entries=next_start.entries,
        whole=next_start.whole,
        menu=next_start.menu,
        menu_is_newer=_is_newer(machine, next_start.files),
        log=_this_boot(machine, unseen) if cmdline.reservations else None,
        firmware=_firmware(machine, unseen),
        iomem=_iomem(machine, unseen),
        regions=_regions(machine),
        modules=module_states(machine, release, cmdline),
        unseen=tuple(unseen),
        mounts=_mounts(machine, wait),
        trial=_trial(machine),
    )


@dataclass(frozen=True, slots=True)
class _NextStart:
    """How the next start is set up: what is configured, what was made of it, and the files of that."""

    configured: tuple[str, ...] | None
    recovery: tuple[str, ...]
    variable: str
    entries: tuple[grubcfg.BootEntry, ...] | None
    menu: str
    files: tuple[str, ...]
    whole: bool = True


def _next_start(machine: Machine, unseen: list[tuple[str, str]]) -> _NextStart:
    from emupmem import loader

    other = loader.of(machine)
    if other is None:
        configured, recovery, variable = _configured(machine, unseen)
        name = environment.grub_cfg(machine)
        cfg = _try_read(machine, name, "generated", unseen)
        entries = grubcfg.entries(cfg) if cfg is not None else None
        whole = cfg is None or grubcfg.whole(cfg)
        return _NextStart(configured, recovery, variable, entries, name, (name,), whole)
    try:
        standing = other.standing(machine)
    except EmupmemError as exc:
        unseen += [("configured", exc.message), ("generated", exc.message)]
        return _NextStart(None, (), other.title, None, other.title, ())
    # Not those on FAT where it can be avoided: their times have no zone.
    sources = [f for f in (loader.KERNEL_CMDLINE, GRUB_DEFAULT) if machine.exists(f)]
    files = tuple(sources or loader.entry_files(machine))
    return _NextStart(standing.items, standing.items, standing.where, standing.entries, standing.menu, files)


def _trial(machine: Machine) -> SeenTrial | None:
    from emupmem import trial
    from emupmem.verifier.observation import SeenTrial

    found = trial.state(machine)
    if found is None:
        return None
    return SeenTrial(found.words, found.chosen, found.running, found.started_since, found.why, found.kexec)


def _mounts(machine: Machine, wait: float) -> tuple[SeenMount, ...]:
    """The mounts of our devices and of the boot unit; while that is at work we wait."""
    from emupmem import mount, unit

    data = machine.read(unit.FILE)
    text = data.decode("utf-8", "replace") if data is not None and machine.is_link(unit.LINK) else ""
    try:
        wanted = unit.read(text) if text else ()
    except EmupmemError:
        wanted = ()  # not ours, or edited: what is mounted is judged all the same
    if wanted and wait and machine.live:
        wait_for(lambda: not _activating(machine, unit.NAME), wait)
    return mount.look(machine, wanted)


def _activating(machine: Machine, name: str) -> bool:
    done = machine.output("systemctl", "show", "-P", "ActiveState", name)
    return done is not None and done.stdout.strip() == b"activating"


def _regions(machine: Machine) -> tuple[SeenRegion, ...]:
    return tuple(_seen(r) for r in machine.regions())


def _seen(r: Region) -> SeenRegion:
    from emupmem.verifier.observation import SeenRegion

    return SeenRegion(r.name, r.size, r.start, r.block, r.block_size, r.dax, r.numa_node, r.provider, r.mode)


def _configured(
    machine: Machine, unseen: list[tuple[str, str]]
) -> tuple[tuple[str, ...] | None, tuple[str, ...], str]:
    """Our items in GRUB's defaults, drop-ins included: of normal entries, of recovery entries, and where."""
    from emupmem.editor import defaults
    from emupmem.editor import text as editor_text

    try:
        if machine.read(GRUB_DEFAULT) is None:
            raise EmupmemError(f"there is no {GRUB_DEFAULT}")
        values = defaults.effective(grub_texts(machine), sh=judge(machine))
    except EmupmemError as exc:
        unseen.append(("configured", exc.message))
        return None, (), editor_text.LINUX
    linux, default = values[editor_text.LINUX].items, values[editor_text.DEFAULT].items
    return (*linux, *default), linux, editor_text.DEFAULT if default and not linux else editor_text.LINUX


def judge(machine: Machine) -> Judge:
    """The sh that reads GRUB's defaults: for the tree of another machine it sees no programs and no files."""
    from emupmem.editor import shell

    if machine.replay is not None:
        return machine.replay
    return shell.judge(with_programs=machine.live)


def configured_items(machine: Machine, data: bytes) -> dict[str, tuple[str, ...]]:
    """Our items in a text of /etc/default/grub, for each variable that has any."""
    from emupmem.editor import defaults
    from emupmem.editor import text as editor_text

    found = defaults.read(data, GRUB_DEFAULT, sh=judge(machine))
    return {v: found.variable(v).items for v in editor_text.VARIABLES if found.variable(v).items}


def _firmware(machine: Machine, unseen: list[tuple[str, str]]) -> FirmwareMap | None:
    entries = machine.firmware_entries()
    try:
        return parse_sysfs_memmap(entries) if entries else None
    except EmupmemError as exc:
        unseen.append(("firmware", exc.message))
        return None


def _try_read(machine: Machine, name: str, what: str, unseen: list[tuple[str, str]]) -> str | None:
    try:
        data = machine.read(name)
    except EmupmemError as exc:
        unseen.append((what, exc.message))
        return None
    if data is None:
        unseen.append((what, f"there is no {name}"))
        return None
    return data.decode("utf-8", "surrogateescape")


def _is_newer(machine: Machine, files: Sequence[str]) -> bool | None:
    """Whether the boot menu, or an entry of it, was written after this boot; None where that cannot be told."""
    booted = re.search(r"^btime (\d+)", machine.peek("/proc/stat"), re.MULTILINE)
    written = [when for f in files if (when := machine.modified(f)) is not None]
    return None if booted is None or not written else max(written) > int(booted[1])


def _this_boot(machine: Machine, unseen: list[tuple[str, str]]) -> BootLog | None:
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


def _iomem(machine: Machine, unseen: list[tuple[str, str]]) -> tuple[IomemLine, ...] | None:
    try:
        lines = parse_iomem(machine.peek("/proc/iomem"))
    except EmupmemError as exc:
        unseen.append(("iomem", exc.message))
        return None
    if lines is None:
        unseen.append(("iomem", "/proc/iomem shows its addresses to root only"))
    return lines
