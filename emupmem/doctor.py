"""Everything that decides whether persistent memory will work here, before and after: one finding each.

`look` sees a machine (the live one, or one that `collect` put into an archive); every judgement is a
pure function of what was seen. A finding is `ok`, `note` (good to know), `warn` (will bite), `stop`
(apply would refuse) or `fail` (what was asked for is not there), with the evidence and one thing to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from emupmem.blocks import Mounted, mounts
from emupmem.boot import detect, obstacles
from emupmem.boot import efi as boot_efi
from emupmem.boot import entry as boot_entry
from emupmem.boot import kernel as boot_kernel
from emupmem.boot import loader as boot_loader
from emupmem.boot.foreign import Refused
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import environment, trial
from emupmem.boot.grub import menu as grub_menu
from emupmem.boot.grub.environment import GENERATORS, GRUB_DEFAULT
from emupmem.kernel.cmdline import is_cut, kaslr_avoided, mangled, memmap_region_count, parse_command_line
from emupmem.model import (
    LOW_LIMIT,
    MAX_MEMMAP_REGIONS,
    MIB,
    CommandLine,
    EmupmemError,
    Kind,
    NodeRange,
    Request,
    Span,
)
from emupmem.planner import kernels, plan, survey
from emupmem.planner.situation import Situation
from emupmem.system.backups import BACKUPS
from emupmem.system.machine import Machine
from emupmem.units import human, tight
from emupmem.verifier import observe

if TYPE_CHECKING:
    from emupmem.editor.defaults import Effective
    from emupmem.verifier.observation import Verdict

EFI_LOADER = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
EFI_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
EFIVARS = "/sys/firmware/efi/efivars"
SECURE_BOOT = f"{EFIVARS}/SecureBoot-{EFI_GLOBAL}"
LOCKDOWN = "/sys/kernel/security/lockdown"

NEEDED = {"mkfs.ext4": "e2fsprogs", "blkid": "util-linux", "wipefs": "util-linux", "systemctl": "systemd"}
"""Programs that `mount` and `apply --mount` run, and the package that holds each."""

WANTED = {
    "mkfs.xfs": "xfsprogs",
    "kexec": "kexec-tools",
    "ndctl": "ndctl",
    "qemu-system-x86_64": "qemu-system-x86",
    "ipmctl": "ipmctl",
}
"""Programs that some commands or people use."""

TOOLS = (*GENERATORS, "grub-editenv", "grub2-editenv", *NEEDED, *WANTED)

MENU_COPIES = 3
"""grub-mkconfig writes a second menu beside the first, and we keep a copy of the old one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: what was looked at, how it is, what was seen, what to do."""

    name: str
    status: str  # ok | note | warn | stop | fail
    evidence: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class EarlyMount(Finding):
    """Something is mounted from the initramfs that needs the drivers there."""


def good(findings: Sequence[Finding]) -> bool:
    """Whether nothing stands in the way and nothing is broken."""
    return not any(f.status in ("stop", "fail") for f in findings)


# Looking ---------------------------------------------------------------------------------------------


@dataclass
class _Eye:
    """What several findings need, seen once."""

    machine: Machine
    wait: float
    effective: Mapping[str, Effective] | None = None
    defaults_problem: EmupmemError | None = None
    line: CommandLine = field(default_factory=lambda: parse_command_line(""))
    found: survey.Survey | None = None
    map_problem: EmupmemError | None = None
    target: boot_kernel.Target | None = None
    config: str = ""
    mounts: tuple[Mounted, ...] = ()
    loader: boot_loader.Loader | None = None
    entry: boot_entry.BootEntry | None = None

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


def look(machine: Machine, wait: float = 0) -> tuple[Finding, ...]:
    """All findings of a machine, in the order of the boot. Needs no root and changes nothing.

    `wait` is how many seconds devices may take to appear.
    """
    eye = _open(machine, wait)
    refused = _refusals(machine)
    steps: list[Callable[[_Eye], Finding | list[Finding] | None]] = [
        lambda e: rights(e.machine.is_root),
        lambda e: refused("processor", ("processor",), e.machine.architecture),
        lambda e: refused("host", ("wsl", "container", "xen"), "", _host(e.machine)),
        _memory_map,
        _numa,
        _real_pmem,
        lambda e: refused("loader", ("grub", "loader", "menus", "copies"), _loader(e.machine)),
        lambda e: firmware(
            e.machine.exists("/sys/firmware/efi"), _secure_boot(e.machine), _is_uki(e.machine)
        ),
        lambda e: lockdown(e.machine.peek(LOCKDOWN)),
        lambda e: refused("kernel", ("kernel",), _kernel(e)),
        lambda e: refused("modules", ("modules",), "", _modules(e)),
        lambda e: built_in(e.config),
        _initramfs,
        _randomisation,
        _variables,
        _sources,
        _boots,
        lambda e: words(e.line),
        lambda e: regions(e.line),
        lambda e: _grubenv(e) if e.loader is None else None,
        _room,
        lambda e: _generator(e.machine) if e.loader is None else None,
        lambda e: tools({t: e.machine.find(t) is not None for t in (*NEEDED, *WANTED)}, _has_type_7(e)),
        _hibernation,
        _plan,
        _ladder,
    ]
    findings: list[Finding] = []
    for step in steps:
        made = step(eye)
        findings += made if isinstance(made, list) else [made] if made is not None else []
    return tuple(findings)


def _open(machine: Machine, wait: float) -> _Eye:
    from emupmem.boot import prepare
    from emupmem.editor import defaults

    eye = _Eye(machine, wait, mounts=mounts(machine), loader=detect.of(machine))
    eye.target = obstacles.target(machine)
    if eye.target is not None:
        eye.config = machine.kernel_config(eye.target.release)[1]
    boots: CommandLine | None = None
    try:
        if eye.loader is None:
            grub_defaults.read_defaults(machine)
            eye.effective = defaults.effective(
                grub_defaults.grub_texts(machine), sh=grub_defaults.judge(machine)
            )
        boots = prepare.next_line(machine)
    except EmupmemError as exc:
        eye.defaults_problem = exc
    if eye.loader is None:
        eye.entry = grub_menu.default_entry(obstacles.menu(machine), environment.grubenv(machine))
    eye.line = boots if boots is not None else eye.booted
    try:
        eye.found = survey.of_machine(machine, boots=boots)
    except EmupmemError as exc:
        eye.map_problem = exc
    return eye


def _refusals(machine: Machine) -> Callable[..., Finding]:
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
        return refusal(name, errors, warnings, otherwise or Finding(name, "ok", seen), machine.is_root)

    return judge


def refusal(
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


def rights(is_root: bool) -> Finding | None:
    """Said only where something may stay unseen."""
    if is_root:
        return None
    return Finding("rights", "note", "not root: some things cannot be seen", "sudo emupmem doctor sees all")


def _host(machine: Machine) -> Finding:
    done = machine.output("systemd-detect-virt", "--vm")
    kind = done.stdout.decode("utf-8", "replace").strip() if done is not None else ""
    return host(kind or machine.peek("/sys/hypervisor/type"), done is not None)


def host(hypervisor: str, told: bool) -> Finding:
    """A virtual machine is as good as metal; only its memory ends with it."""
    if hypervisor and hypervisor != "none":
        return Finding(
            "host",
            "note",
            f"a virtual machine ({hypervisor}): the content of its memory ends with it, not with a reboot of it",
            "for memory that outlives it: a vNVDIMM (emupmem qemu)",
        )
    if not told:
        return Finding("host", "ok", "no container, WSL or Xen; whether it is a virtual machine was not told")
    return Finding("host", "ok", "metal: no container, no hypervisor")


def _memory_map(eye: _Eye) -> Finding:
    if eye.found is None:
        problem = eye.map_problem or EmupmemError("no memory map")
        return Finding("memory-map", "stop", problem.message, problem.hint)
    return memory_map(eye.found)


def memory_map(found: survey.Survey) -> Finding:
    """The firmware's map, where it was read, what contradicts it."""
    ram = found.situation.firmware.ram
    high = sum(max(0, s.end - max(s.start, LOW_LIMIT)) for s in ram)
    seen = f"{human(sum(s.size for s in ram))} of RAM, {human(high)} at or above 4 GiB, from {found.source}"
    if found.notes:
        return Finding("memory-map", "note", f"{seen}; {'; '.join(found.notes)}")
    return Finding("memory-map", "ok", seen)


def _numa(eye: _Eye) -> Finding | None:
    return numa(eye.found.situation.nodes) if eye.found is not None else None


def numa(nodes: Sequence[NodeRange]) -> Finding | None:
    """Said only where there are several: a device lies on one of them."""
    numbers = sorted({n.node for n in nodes})
    if len(numbers) < 2:
        return None
    listed = ", ".join(map(str, numbers))
    return Finding("numa", "note", f"memory on nodes {listed}: a device lies on one", "apply --numa-node N")


def _has_type_7(eye: _Eye) -> bool:
    return eye.found is not None and any(e.kind is Kind.PMEM for e in eye.found.situation.firmware.entries)


def _real_pmem(eye: _Eye) -> Finding | None:
    return real_pmem(_has_type_7(eye))


def real_pmem(there: bool) -> Finding | None:
    """Real persistent memory takes the first device numbers."""
    if not there:
        return None
    return Finding(
        "real-pmem",
        "note",
        "there is real persistent memory (type 7): the emulated devices need not begin at /dev/pmem0",
        "emupmem verify tells which is which",
    )


# Boot loader and firmware --------------------------------------------------------------------------


def _loader(machine: Machine) -> str:
    other = detect.of(machine)
    name = boot_efi.loader_name(machine)
    if other is None:
        shown = name if "grub" in name.lower() else f"GRUB, which {name} started" if name else "GRUB"
        return f"{shown}, {environment.grub_cfg(machine)}"
    try:
        standing = other.standing(machine)
    except EmupmemError as exc:
        return f"{name or other.title}: {exc.message}"
    count = sum(1 for e in standing.entries if e.ours)
    return (
        f"{name or other.title}, {count} entr{'ies' if count != 1 else 'y'} of this system in {standing.menu}"
    )


def _secure_boot(machine: Machine) -> bool | None:
    """The last byte of the UEFI variable (four bytes of attributes come first)."""
    try:
        data = machine.read(SECURE_BOOT)
    except EmupmemError:
        return None
    return data[4] == 1 if data is not None and len(data) > 4 else None


def _is_uki(machine: Machine) -> bool:
    return machine.exists(boot_efi.STUB_INFO)


def firmware(efi: bool, secure: bool | None, uki: bool) -> Finding:
    """BIOS or UEFI, Secure Boot, a unified kernel image."""
    if not efi:
        return Finding("firmware", "ok", "BIOS")
    state = {True: "on", False: "off", None: "not told"}[secure]
    seen = f"UEFI, Secure Boot {state}"
    if uki:
        # systemd-stub(7): with Secure Boot a .cmdline section in the image wins over what is passed to it.
        return Finding(
            "firmware",
            "warn",
            f"{seen}; a unified kernel image started this kernel: its command line is built into it",
            "build memmap= into the image, or start an ordinary kernel from GRUB",
        )
    return Finding("firmware", "ok", f"{seen}: memmap= is not restricted by it" if secure else seen)


def lockdown(text: str) -> Finding | None:
    """`none [integrity] confidentiality`; the chosen one is in brackets. No reason for it covers memmap=."""
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None or chosen[1] == "none":
        return None
    return Finding("lockdown", "ok", f"{chosen[1]}: memmap= is not restricted by it, hibernation is")


# The kernel ------------------------------------------------------------------------------------------


def _kernel(eye: _Eye) -> str:
    if eye.target is None:
        return ""
    known = f" ({eye.target.version.text})" if eye.target.version is not None else ""
    name = eye.machine.kernel_config(eye.target.release)[0]
    options = ", ".join(o.removeprefix("CONFIG_") for o in boot_kernel.OPTIONS)
    return f"{eye.target.release}{known} boots by default; {options} are on ({name})"


def _modules(eye: _Eye) -> Finding:
    if eye.target is None:
        return Finding("modules", "note", "which kernel boots by default is not known")
    return modules(boot_kernel.module_states(eye.machine, eye.target.release, eye.line))


def modules(states: Sequence[tuple[str, str]]) -> Finding:
    """The driver chain of the kernel that will boot."""
    seen = ", ".join(f"{name} {state}" for name, state in states)
    for name, state in states:
        if state.startswith("blocked"):
            where = state.removeprefix("blocked by ")
            return Finding(
                "modules", "warn", seen, f"take {name} out of {where}, or the device will not appear"
            )
        if state == "missing" and name != "libnvdimm":
            package = "install the package that holds it (linux-modules-extra on Ubuntu)"
            return Finding("modules", "warn", seen, package)
    return Finding("modules", "note" if any(s == "unknown" for _, s in states) else "ok", seen)


def built_in(config: str) -> Finding | None:
    """Words that are compiled in come first, and the randomisation does not see a memmap= among them (kaslr.c)."""
    found = re.search(r'^CONFIG_CMDLINE="(.+)"', config, re.MULTILINE)
    if found is None or not re.search(r"^CONFIG_CMDLINE_BOOL=y", config, re.MULTILINE):
        return None
    seen = f"the kernel has a command line of its own: {found[1]}"
    if parse_command_line(found[1]).items:
        why = f"{seen}: its randomisation does not keep clear of that memmap="
        return Finding("built-in", "warn", why, "sudo emupmem apply --nokaslr …")
    return Finding("built-in", "note", seen)


def listing(machine: Machine) -> tuple[str, ...]:
    """What lists the initramfs of the kernel that boots; empty where that cannot be told."""
    kernel = obstacles.target(machine)
    release = kernel.release if kernel is not None else ""
    images = (f"/boot/initrd.img-{release}", f"/boot/initramfs-{release}.img", f"/boot/initrd-{release}")
    image = next((i for i in images if release and machine.exists(i)), "")
    program = next((p for p in ("lsinitramfs", "lsinitrd") if machine.find(p)), "")
    return (program, image) if program and image else ()


def _initramfs(eye: _Eye) -> Finding:
    found = initramfs(eye.line, eye.machine.peek("/etc/fstab"), eye.machine.peek("/etc/crypttab"))
    argv = listing(eye.machine) if isinstance(found, EarlyMount) else ()
    done = eye.machine.output(*argv) if argv else None
    if done is None or done.status or eye.target is None:
        return found
    states = dict(boot_kernel.module_states(eye.machine, eye.target.release, eye.line))
    return inside(found, argv[-1], done.stdout.decode("utf-8", "replace"), states)


def inside(found: Finding, image: str, listed: str, states: Mapping[str, str]) -> Finding:
    """The finding with what is really in the initramfs."""
    lacks = [m for m in boot_kernel.MODULES if states.get(m) != "built in" and f"/{m}.ko" not in listed]
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
        "need not have the drivers: nothing on the way to / lies on the device, and udev loads them later",
    )


def _randomisation(eye: _Eye) -> Finding | None:
    if eye.situation is None:
        return None
    found = re.search(r"^(?:# )?CONFIG_RANDOMIZE_BASE(=y| is not set)", eye.config, re.MULTILINE)
    built = found[1] == "=y" if found is not None else None
    return randomisation(replace(eye.situation, command_line=eye.line), built)


def randomisation(situation: Situation, built: bool | None) -> Finding:
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


# The command line ----------------------------------------------------------------------------------


def _sources(eye: _Eye) -> list[Finding]:
    """Where another loader's entries take their words from."""
    if eye.loader is None:
        return []
    try:
        standing = eye.loader.standing(eye.machine)
    except EmupmemError as exc:
        return [Finding("source", "note", exc.message, exc.hint)]
    line = standing.default.text if standing.default is not None else ""
    return [Finding("source", "ok", f'"{line}" boots by default; new kernels take {standing.where}')]


def _variables(eye: _Eye) -> list[Finding]:
    if eye.loader is not None:
        return []
    if eye.effective is None:
        problem = eye.defaults_problem
        if problem is None or not eye.machine.exists(GRUB_DEFAULT):
            return []  # there are none, and the loader's line says so
        return [Finding("defaults", "stop", problem.message, problem.hint)]
    return [variable(name, seen) for name, seen in eye.effective.items()]


def variable(name: str, seen: Effective) -> Finding:
    """What a GRUB variable is in the end, and the assignment that decides."""
    if not seen.filename:
        return Finding(name, "ok", "assigned nowhere")
    where = f"{seen.filename}:{seen.line}" if seen.line else seen.filename
    value = f'"{seen.value or ""}", last word in {where}'
    if seen.filename != GRUB_DEFAULT:
        return Finding(name, "note", f"{value}: it comes after {GRUB_DEFAULT}")
    return Finding(name, "ok", value)


def _boots(eye: _Eye) -> Finding | None:
    if eye.loader is not None:
        return None  # `source` says it
    machine, name = eye.machine, environment.grub_cfg(eye.machine)
    if eye.entry is None:
        seen = f"which entry of {name} boots next cannot be told"
        return Finding(
            "boots",
            "note",
            seen,
            "sudo emupmem doctor sees more" if not machine.is_root else "GRUB_DEFAULT=0",
        )
    values = [v.value or "" for v in (eye.effective or {}).values()]
    wanted = grub_menu.split_words(grub_menu.kernel_text(" ".join(values)))
    made = environment.generator(machine)
    return boots(
        eye.entry,
        name,
        wanted,
        environment.grubenv(machine).get(trial.NEXT, ""),
        made.argv[0] if made else "",
    )


def boots(
    entry: boot_entry.BootEntry, name: str, wanted: Sequence[str], once: str, generator: str
) -> Finding:
    """What GRUB will really start, and whether the menu says what its defaults ask for (`wanted`, in order)."""
    seen = f"“{entry.title}” ({name}:{entry.line}): {entry.text}"
    if once:
        return Finding("boots", "note", f"chosen for one start: {seen}")
    left = iter(entry.words)
    lacks = next((w for w in wanted if w not in left), "")
    if lacks:
        seen += f"; the menu is older than the defaults: it lacks {lacks}"
        return Finding("boots", "warn", seen, f"sudo {generator or 'update-grub'}")
    return Finding("boots", "ok", seen)


def words(line: CommandLine) -> Finding:
    """Words of the command line that take memory, or that the kernel reads otherwise than they look."""
    name = "command-line"
    if wrong := mangled(line):
        seen = f"memmap={wrong} is read as a memory limit, not as a reservation"
        return Finding(name, "warn", seen, f"take it out of {GRUB_DEFAULT}; emupmem apply writes it right")
    if any(i.op == "exactmap" for i in line.items):
        seen = "memmap=exactmap replaces the firmware's map by one made by hand"
        return Finding(name, "stop", seen, "remove it first; emupmem plans on what the firmware says")
    if is_cut(line.text):
        return Finding(name, "warn", "longer than the 2047 bytes that the kernel reads", "shorten it")
    taking = [f"memmap={i.text}" for i in line.items]
    taking += [f"mem={tight(size)}" for size in line.mem_limits]
    taking += [f"crashkernel={value}" for value in line.crashkernel]
    taking += [line.hugepages_text] if line.hugepages else []
    if taking:
        return Finding(name, "note", f"{' '.join(taking)}: every plan counts these in")
    return Finding(name, "ok", "nothing on it takes memory")


def regions(line: CommandLine) -> Finding:
    """How many of the kernel's four slots for avoided ranges are in use (kaslr.c)."""
    name, most = "regions", MAX_MEMMAP_REGIONS
    count = memmap_region_count(line)
    foreign = memmap_region_count(survey.without_reservations(line))
    seen = f"{count} of {most} memmap ranges that the kernel's randomisation keeps clear of are in use"
    if line.nokaslr:
        return Finding(name, "ok", f"{count} memmap ranges; with nokaslr any number will do")
    if foreign >= most:
        return Finding(
            name, "stop", f"{seen}, none of them ours: there is no room for one more", "add nokaslr"
        )
    avoided, gives_up = kaslr_avoided(line)
    spans = [Span(i.start, i.start + i.size) for i in line.items if i.op in ("!", "#", "$") and i.start]
    if count > most and not gives_up and any(s not in avoided for s in spans):
        return Finding(
            name, "warn", f"{seen}: the kernel may be put into the fifth", "one memmap= list, or nokaslr"
        )
    if count >= most:
        return Finding(name, "note", f"{seen}: one more device is refused", "nokaslr lifts that")
    return Finding(name, "ok", seen)


# GRUB's environment, room, programs ---------------------------------------------------------------


def mounted_for(path: str, found: Sequence[Mounted]) -> Mounted | None:
    """The mount that a path lies on; of several at one place the last one counts."""
    over = [m for m in found if m.dir in ("/", path) or path.startswith(m.dir + "/")]
    return sorted(over, key=lambda m: len(m.dir.rstrip("/")))[-1] if over else None


def grubenv_name(machine: Machine) -> str:
    return environment.grubenv_name(machine)


def _grubenv(eye: _Eye) -> Finding:
    try:
        why, fix = trial.obstacle(eye.machine)
    except EmupmemError as exc:
        return Finding("grubenv", "note", exc.message, "sudo emupmem doctor sees more")
    return grubenv(grubenv_name(eye.machine), why, fix, environment.grubenv(eye.machine).get(trial.NEXT, ""))


def grubenv(name: str, why: str, fix: str, once: str) -> Finding:
    """Whether GRUB itself can forget a choice for one start: a trial boot falls back by that."""
    edit = "grub2-editenv" if "/grub2/" in name else "grub-editenv"
    if once:
        seen = f"the next boot takes the entry “{once}”, once"
        return Finding(
            "grubenv",
            "warn" if why else "note",
            f"{seen}; but {why}: it stays chosen" if why else seen,
            f"sudo {edit} {name} unset {trial.NEXT} takes that back",
        )
    if why:
        return Finding("grubenv", "note", f"no trial boots: {why}", fix or "apply without --trial")
    return Finding("grubenv", "ok", f"GRUB can write {name}: a trial boot ends by itself")


def _room(eye: _Eye) -> Finding:
    places: list[tuple[str, int, bool]] = []
    for folder in ("/boot", "/", BACKUPS.rpartition("/")[0]):
        there = folder
        while there != "/" and not eye.machine.exists(there):
            there = there.rpartition("/")[0] or "/"
        place = mounted_for(eye.machine.real(there), eye.mounts)
        places.append((folder, eye.machine.room(there), place is not None and "ro" in place.options))
    menu = len(obstacles.menu(eye.machine).encode("utf-8", "surrogateescape"))
    return room(places, MENU_COPIES * menu + MIB)


def room(places: Sequence[tuple[str, int, bool]], needed: int) -> Finding:
    """(folder, free bytes, mounted read-only) of what apply writes to; `needed` bytes in each."""
    closed = [folder for folder, _, read_only in places if read_only]
    if closed:
        seen = f"mounted read-only: {', '.join(closed)}"
        return Finding("room", "stop", seen, f"mount -o remount,rw {closed[0]}")
    seen = ", ".join(f"{folder} {human(free)}" for folder, free, _ in places)
    if any(free < needed for _, free, _ in places):
        return Finding("room", "warn", f"{seen} free; apply writes up to {human(needed)}", "make room first")
    return Finding("room", "ok", f"{seen} free")


def _generator(machine: Machine) -> Finding:
    found = environment.generator(machine)
    edit = next((p for p in ("grub-editenv", "grub2-editenv") if machine.find(p)), "")
    return generator(" ".join(found.argv) if found is not None else "", edit)


def generator(command: str, edit: str) -> Finding:
    """Without the program that makes grub.cfg apply refuses; without grub-editenv only a trial."""
    if not command:
        seen = f"none of {', '.join(GENERATORS)} is installed: nothing could make grub.cfg"
        return Finding("generator", "stop", seen, "install grub2-common (grub2-tools on Fedora)")
    if not edit:
        return Finding(
            "generator", "note", f"{command}; no grub-editenv: no trial boots", "install grub-common"
        )
    return Finding("generator", "ok", f"{command} makes the menu, {edit} chooses trial boots")


def tools(found: Mapping[str, bool], real_pmem: bool) -> Finding:
    """Programs of other commands: needed by mount, or good to have."""
    lacks = [t for t in NEEDED if not found.get(t)]
    could = [t for t in WANTED if not found.get(t) and (t != "ipmctl" or real_pmem)]
    has = [t for t, there in found.items() if there]
    seen = f"has {', '.join(has)}" if has else "has none"
    packages = {**NEEDED, **WANTED}
    missing = ", ".join(f"{t} ({packages[t]})" for t in (*lacks, *could))
    if lacks:
        return Finding(
            "tools", "warn", f"{seen}; missing: {missing}", f"emupmem mount needs {', '.join(lacks)}"
        )
    if could:
        return Finding("tools", "note", f"{seen}; missing, optional: {missing}")
    return Finding("tools", "ok", seen)


def _hibernation(eye: _Eye) -> Finding | None:
    state = eye.machine.peek("/sys/power/state").split()
    if not state:
        return None
    disk = eye.machine.peek("/sys/power/disk")
    rows = [line.split() for line in eye.machine.peek("/proc/swaps").splitlines()[1:]]
    swap = sum(int(r[2]) for r in rows if len(r) > 2 and r[2].isdecimal() and "zram" not in r[0]) * 1024
    total = re.search(r"^MemTotal:\s+(\d+) kB", eye.machine.peek("/proc/meminfo"), re.MULTILINE)
    ram = int(total[1]) * 1024 if total is not None else 0
    resume = next((w for w in eye.line.words if w.startswith("resume=")), "")
    can = "disk" in state and "[disabled]" not in disk
    return hibernation(can, resume, swap, ram, bool(eye.booted.reservations or eye.line.reservations))


def hibernation(can: bool, resume: str, swap: int, ram: int, reserved: bool) -> Finding:
    """memmap= does not hinder it, but what a device holds is not in the image.

    The kernel's image has 2/5 of the RAM at most unless told otherwise (kernel/power/snapshot.c).
    """
    if not can:
        return Finding("hibernation", "ok", "this kernel does not hibernate")
    if not resume and (not ram or swap < ram * 2 // 5):
        return Finding("hibernation", "ok", f"not set up: no resume=, {human(swap)} of swap")
    seen = f"{resume or 'no resume='}, {human(swap)} of swap: the content of a device is not in the image"
    return Finding(
        "hibernation", "warn" if reserved else "note", seen, "umount the device before you hibernate"
    )


# What apply would do, and the ladder -----------------------------------------------------------------


def _plan(eye: _Eye) -> Finding | None:
    """A rehearsal of apply, up to the new text; nothing is written."""
    from emupmem.boot import change, prepare
    from emupmem.editor import text as editor_text

    if eye.found is None or eye.situation is None:
        return None
    items = [i for v in (eye.effective or {}).values() for i in v.items]
    items = items or [i.text for i in eye.line.reservations]
    if items:
        return Finding("plan", "ok", f"memmap={','.join(items)} is set up already")
    made = None
    try:
        made = plan.plan(eye.situation, Request())
        if eye.loader is not None:
            eye.loader.refuse(eye.machine)
        if eye.machine.live and (eye.effective is not None or eye.loader is not None):
            request = Request(made.reservations[0].size)
            prepare.prepare_apply(eye.machine, eye.found, request, change.Options(editor_text.LINUX))
    except Refused as exc:
        seen = f"{made.memmap} would leave {human(made.ram_left)} of RAM" if made else exc.message
        return Finding("plan", "stop", seen, exc.for_words(made.memmap).hint if made else exc.hint)
    except EmupmemError as exc:
        return Finding("plan", "stop", exc.message, exc.hint)
    size = tight(made.reservations[0].size)
    seen = f"{made.memmap} would leave {human(made.ram_left)} of RAM"
    return Finding("plan", "ok", seen, f"sudo emupmem apply --size {size}")


def _ladder(eye: _Eye) -> Finding:
    from emupmem.verifier.ladder import verify

    return ladder(verify(observe.observe(eye.machine, eye.wait)))


def ladder(verdict: Verdict) -> Finding:
    """The rungs of verify in one line."""
    bad = next((c for c in verdict.checks if c.status in ("fail", "pending")), None)
    if bad is not None:
        status = "fail" if bad.status == "fail" else "note"
        return Finding("ladder", status, f"{bad.name}: {bad.found}", bad.hint)
    unseen = [c.name for c in verdict.checks if c.status == "skipped"]
    more = f" (not seen: {', '.join(unseen)})" if unseen else ""
    if verdict.nothing_reserved:
        return Finding("ladder", "ok", f"nothing is reserved{more}")
    devices = ", ".join(d.dev for d in verdict.devices)
    what = f"{devices} · emulated, volatile" if devices else "no device was seen"
    tried = next((c for c in verdict.checks if c.name == "trial"), None)
    if tried is not None:
        return Finding("ladder", "note", f"{what}{more}; {tried.found}", tried.hint)
    return Finding("ladder", "ok", f"{what}{more}")
