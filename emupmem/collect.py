"""One archive with all that planning and diagnosing need, without secrets; and a machine read from it.

Writing: `gather` looks at a machine, `mask` takes the secrets out (pure), `pack` makes the bytes (pure:
same input, same bytes). Reading: `unpack` judges every member of an archive that may be hostile (pure),
`Collected` is the machine in it: its files are looked up in memory, nothing is written anywhere, no
program is run, and whatever the archive does not hold is simply not there.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import ipaddress
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from emupmem import __version__, doctor, tarball
from emupmem.blocks import mounts
from emupmem.boot import efi, foreign, loader, obstacles, rpm_ostree
from emupmem.boot import kernel as boot_kernel
from emupmem.boot.bls import entries, files, sources
from emupmem.boot.grub import defaults, environment, menu
from emupmem.boot.grub.environment import GRUB_CFGS, GRUB_DEFAULT
from emupmem.model import MIB, Command, EmupmemError, NodeRange
from emupmem.parser.bootlog import parse_boot_log
from emupmem.planner import survey
from emupmem.system.backups import BACKUPS
from emupmem.system.machine import Machine
from emupmem.system.programs import Completed
from emupmem.system.sysfs import Region
from emupmem.unit import FILE as UNIT_FILE

if TYPE_CHECKING:
    from emupmem.editor.shell import Judge, Sourced

FORMAT = 1
"""The version of the archive's layout: a reader refuses one that it does not know."""

MARKER = "emupmem.json"
DOCTOR = "doctor.json"
TREE, COMMANDS = "tree", "commands"

LARGEST_FILE = 16 * MIB
"""What is longer is cut at its end when it is written, and refused when it is read."""

LARGEST_ARCHIVE = 128 * MIB
MOST_MEMBERS = 20_000

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
    "/proc/xen/capabilities",
    "/sys/hypervisor/type",
    "/sys/hypervisor/guest_type",
    "/sys/firmware/efi/fw_platform_size",
    "/sys/kernel/security/lockdown",
    "/sys/power/state",
    "/sys/power/disk",
    "/etc/os-release",
    efi.LOADER_INFO,
    efi.STUB_INFO,
    doctor.SECURE_BOOT,
    GRUB_DEFAULT,
    UNIT_FILE,
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
    *(f"{folder}/EFI" for folder in files.BOOT_FOLDERS),
    *(f"/sys/module/{m}" for m in boot_kernel.MODULES),
)
"""Names of which it matters only whether they are there."""

_ND = ("devtype", "modalias", "mode", "size", "resource", "provider", "numa_node", "target_node", "state")
_ND_MORE = ("align", "holder", "holder_class", "nstype", "force_raw", "mappings", "read_only", "sector_size")
_DRIVERS = re.compile(r"/(?:nd_|libnvdimm|dax|dax_|device_dax|ramdax)\w*\.ko")


@dataclass(frozen=True, slots=True)
class Archive:
    """What an archive holds: `facts` of the marker, and the content of each other member by its name."""

    facts: Mapping[str, Any]
    members: Mapping[str, bytes]


# Gathering -------------------------------------------------------------------------------------------


@dataclass
class _Basket:
    machine: Machine
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

    def text(self, name: str, text: str) -> None:
        self.put(TREE + name, text.encode("utf-8", "surrogateescape"))


def gather(machine: Machine, findings: Sequence[doctor.Finding]) -> Archive:
    """Look at a machine: all that planning and diagnosing need, secrets still in it. Needs no root."""
    basket = _Basket(machine)
    kernel = obstacles.target(machine)
    for name in _FILES:
        basket.file(name)
    for folder, ext in (("/etc/default/grub.d", ".cfg"),):
        for name in machine.names(folder):
            if name.endswith(ext):
                basket.file(f"{folder}/{name}")
    for name in environment.grub_cfgs(machine):
        basket.file(name)
    basket.file(environment.grubenv_name(machine))
    for name in (*files.entry_files(machine), *sources.source_files(machine)):
        basket.file(name)
    for name in (efi.SELECTED, *map(efi.efi_variable, ("LoaderEntryDefault", "LoaderEntryLastBooted"))):
        if text := efi.efi_text(machine, name):
            basket.text(name, text)  # as plain text, so that the masks see it
    for name in files.unified_images(machine):
        basket.text(f"{files.BOOT_FOLDERS[0]}/EFI/Linux/{name}", "")
    kind = obstacles.container(machine)
    if kind:
        basket.text("/run/systemd/container", kind)
    _gather_kernel(basket, kernel)
    _gather_memory(basket)
    _gather_devices(basket)
    _gather_mounts(basket)
    images = {e.kernel for e in menu.entries(obstacles.menu(machine))}
    images |= {"/boot" + i for i in images} | ({kernel.image} if kernel is not None else set())
    facts: dict[str, Any] = {
        "format": FORMAT,
        "emupmem": __version__,
        "root": machine.is_root,
        "architecture": machine.architecture,
        "there": sorted(n for n in (*_THERE, *images) if machine.exists(n)),
        "modified": {n: machine.modified(n) for n in (*GRUB_CFGS, *sources.SOURCES) if machine.exists(n)},
        "banners": {kernel.image: machine.kernel_banner(kernel.image)} if kernel is not None else {},
        "nodes": [asdict(n) for n in machine.nodes()],
        "regions": [asdict(r) for r in machine.regions()],
        "room": {n: machine.room(n) for n in ("/boot", "/", BACKUPS.rpartition("/")[0], "/var")},
        "tools": _versions(machine),
        "outputs": _outputs(basket, any(isinstance(f, doctor.EarlyMount) for f in findings)),
        "sourced": _sourced(machine),
        "unreadable": sorted(basket.unreadable),
        "cut": sorted(basket.cut),
    }
    shown = {"ok": doctor.good(findings), "findings": [asdict(f) for f in findings]}
    basket.put(DOCTOR, _json(shown))
    return Archive(facts, basket.members)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


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


def _gather_mounts(basket: _Basket) -> None:
    """What / and /boot lie on, and what is mounted of persistent memory; nothing of other mounts."""
    machine = basket.machine
    found = mounts(machine)
    paths = (environment.grubenv_name(machine), "/boot", "/", "/var/backups", "/etc/default")
    needed = {m.dir for p in paths if (m := doctor.mounted_for(machine.real(p), found)) is not None}
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


def _versions(machine: Machine) -> dict[str, str]:
    """The first line of what each installed program says of its version."""
    found = {}
    for name in (*doctor.TOOLS, *loader.PROGRAMS, *foreign.LIMINE_TOOLS):
        path = machine.find(name)
        if path is None:
            continue
        # These would set to work, or have no such option.
        quiet = name.startswith("update-grub") or name in ("ipmctl", "grubby", "sdbootutil")
        done = None if quiet else machine.output(name, VERSIONS.get(name, "--version"), timeout=5)
        said = (done.stdout or done.stderr) if done is not None else b""
        found[name] = said.decode("utf-8", "replace").partition("\n")[0][:200]
    return found


def _outputs(basket: _Basket, needs_drivers: bool) -> dict[str, dict[str, Any]]:
    """Run what tells of this boot; the journal only where dmesg no longer has the map."""
    found: dict[str, dict[str, Any]] = {}
    complete = False
    lists = doctor.listing(basket.machine) if needs_drivers else ()
    for argv in (DMESG, JOURNAL, *PROGRAMS, *((lists,) if lists else ())):
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


def _sourced(machine: Machine) -> dict[str, Any]:
    """What sh makes of GRUB's defaults here: a reader elsewhere must not run them."""
    try:
        seen = defaults.judge(machine)([text for _, text in defaults.grub_texts(machine)])
    except EmupmemError as exc:
        return {"error": exc.message, "hint": exc.hint}
    values = [dict(v) for v in seen.values]
    return {
        "values": values,
        "complaints": [list(c) for c in seen.complaints],
        "failed": seen.failed,
        "unread": seen.unread,
    }


def of_machine(machine: Machine) -> Masked:
    """All of it: look, let the doctor look, mask."""
    return mask(gather(machine, doctor.look(machine)), *secrets(machine))


# Masking -----------------------------------------------------------------------------------------------

_COMMON = """
acpi amd64 arch begin bios blacklist block boot bss btrfs builtin bus cmdline code command config
console cpu crash crashkernel data dax debian default dep dev device devices disk dmesg driver e820
efi end entry error etc ext4 extended false fedora file firmware fs gap generic gnu grub home host
hugepages hypervisor image img info initramfs initrd insmod install intel io kernel ko kvm legacy
level lib line linux linux16 linuxefi loader localdomain localhost log low lvm mapper mem memmap
memory menu menuentry mnt mode module modules mount name namespace nd no nokaslr non none normal
null nvs off ok on options password pci persistent pmem pram proc quiet raid ram range recovery
region release reserved ro rodata root run rw saved search serial server set single size soft splash
start state storage submenu sys system tables test tmpfs true type ubuntu unknown unusable update
usable user usr uuid var version vfat vm vmlinuz volatile x86 x86_64 xen xfs yes zfs
"""
COMMON = frozenset(_COMMON.split())
"""Words that the texts are made of: a name that is one of them tells nothing, and is left."""

_UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_RULES: tuple[tuple[str, str], ...] = (
    ("password", r"^[^\S\n]*password_pbkdf2[^\S\n]+(\S+)[^\S\n]+(\S+)"),
    ("password", r"^[^\S\n]*password[^\S\n]+(\S+)[^\S\n]+(\S+)"),
    ("password", r"()(grub\.pbkdf2\.[\w.]+)"),
    (
        "password",
        r"""((?:^|(?<=[\s"']))(?!CONFIG_)[\w.-]{0,40}(?:passw(?:or)?d|passphrase|secret|token|psk)\w{0,20}=)([^\s"']+)""",
    ),
    ("key", r"""((?:^|(?<=[\s"']))(?!CONFIG_)[\w.-]{0,40}key(?:file)?=)([^\s"']+)"""),
    ("key", r"""((?:^|(?<=[\s"']))systemd\.set_credential(?:_binary)?=)([^\s"']+)"""),
    ("address", r"""((?:^|(?<=[\s"']))[\w.-]{1,40}=(?:[\w;,=-]{0,80}[;,=])?[\w+-]{2,20}://)([^\s"']+)"""),
    ("password", r"""(\w://)([^\s/@"']+:[^\s/@"']+)(?=@)"""),
    ("network", r"""(?i)(\bssid\b["']?[\s:=]{1,3}["']?)([^\s"',]+)"""),
    ("label", r"""(\bLABEL=["']?)([^\s"',\\]+)"""),
    ("label", r"""(\bdevice label )(\S+)(?= devid)"""),
    ("label", r"""(\bby-(?:label|partlabel)/)([^\s"',\\]+)"""),
    ("device", r"""(\busb [\d.-]+: (?:Product|Manufacturer): )([^\n]+)"""),
    ("device", r"""(\binput: )([^\n]+?)(?= as /devices/)"""),
    ("device", r"""(\bHID v[\d.]+ \w+ \[)([^\]\n]+)"""),
    (
        "user",
        r"""((?<!\w)\d\w{0,20}!\d\w{0,20}"? "?[^\s"]+"? "?(?:ext4|xfs|-)"? "?)([A-Za-z_][\w.-]*(?::[\w.-]+)?)""",
    ),
    ("address", r"""((?:^|(?<=[\s"']))(?:netroot|nfsroot|iscsi_\w+|rd\.iscsi\.\w+)=)([^\s"']+)"""),
    ("address", r"""((?:^|(?<=[\s"']))root=(?:nfs4?|iscsi|nbd|sshfs):)([^\s"']+)"""),
    ("user", r"""(superusers=["']?)([^"'\n]+)"""),
    ("user", r"""(--users[ =]["']?)(\w[^"'\s]*)"""),
    ("user", r"""(\bacct=["']?)([A-Za-z][\w.-]*)"""),
    ("user", r"""((?:/var)?/home/|/run/media/|/Users/)([^/\s"':,;]+)"""),
    ("host", r"""(\bhostname=|\bhost=(?=[\w.-]+, domain=))([A-Za-z][\w.-]*)"""),
    ("host", r"""(\bip=[^\s:]*:[^\s:]*:[^\s:]*:[^\s:]*:)([A-Za-z][\w.-]*)"""),
    ("host", r"""(, (?:nis-)?domain=)([A-Za-z][\w.-]*)"""),
    ("host", r"""([Hh]ostname (?:set )?to <)([^<>\s]+)"""),
    ("builder", r"""(Linux version \S+ \()([^\s()]+@[^\s()]+)"""),
    ("dmi", r"""(\bDMI: (?!Memory slots))([^\n]+)"""),
    (
        "serial",
        r"""(?i)(\b(?:serial[ _-]?(?:number|no\.?|num)|iserial|service tag|asset tag|s/n)"?\s*[:=]\s*"?)"""
        r"""([^\s,"']{4,})""",
    ),
    ("uuid", r"""(UUID=["']?)([0-9A-Fa-f][0-9A-Fa-f-]{3,})"""),
    ("uuid", r"""(\bby-(?:uuid|partuuid)/)([^\s"',\\]+)"""),
    ("serial", r"""(\bby-id/)([^\s"',\\]+)"""),
    ("uuid", r"""^((?>[^\n]*?--fs-uuid\b)[^\n]*[^\S\n])([0-9A-Fa-f][0-9A-Fa-f-]{7,})(?=[^\S\n]*$)"""),
)
"""(kind, what stands before the secret and the secret): what is a secret for the place where it stands."""

_MAC = r"(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2}:){5,19}[0-9a-fA-F]{2}(?![0-9a-fA-F:])"
_IPV6 = r"(?<![\w:.])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,8}(?![\w:.])"
_IPV4 = r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"
_KEPT = r"memmap=[^\s\"']*"
"""Never touched: what planning is about."""


class Masker:
    """Takes secrets out of texts: the same value is the same mask in all of them.

    `hosts` and `users` are names that are known; what else is a secret is learned from where it stands,
    once from all texts (`learn`), and then taken out everywhere (`mask`).
    """

    def __init__(
        self, hosts: Iterable[str] = (), users: Iterable[str] = (), releases: Iterable[str] = ()
    ) -> None:
        self.masks: dict[tuple[str, str], str] = {}
        self.made: set[str] = set()
        self.words: dict[str, str] = {}
        self.users = {u for u in users if self._tells(u)}
        self.releases = tuple(releases)
        for host in hosts:
            for name in (host, host.partition(".")[0]):
                self._learn_host(name)

    @staticmethod
    def _tells(name: str) -> bool:
        """Whether a name could tell who somebody is."""
        return len(name) > 1 and name.lower() not in COMMON and not re.fullmatch(r"[\W\d_]+", name)

    def _learn_host(self, name: str) -> None:
        if self._tells(name):
            self.words[name] = "host"
            if "-" in name:
                self.words[name.replace("-", "--")] = "host"  # as in the names of logical volumes

    def learn(self, text: str) -> None:
        """Note secrets that may stand in other places of other texts as well."""
        for kind, pattern in _RULES:
            for found in _pattern(pattern).finditer(text):
                value = found[2]
                if kind == "host" and "domain=)" not in pattern:
                    self._learn_host(value)
                    self._learn_host(value.partition(".")[0])
                elif kind == "user":
                    self.users |= {u for u in re.split(r"[\s,;|&]+", value) if self._tells(u)}
                elif kind == "password" and pattern.startswith("^"):
                    self.users |= {u for u in (found[1],) if self._tells(u)}
                if kind in ("uuid", "serial") and len(value) >= 8 and re.search(r"\d", value):
                    self.words.setdefault(value, kind)
        self.releases += tuple(re.findall(r"Linux version (\S+)", text))

    def mask(self, text: str) -> tuple[str, Counter[str]]:
        """(the text without secrets, how many of each kind were taken out)."""
        count: Counter[str] = Counter()
        out = []
        last = 0
        for kept in _pattern(_KEPT).finditer(text):
            out += [self._mask(text[last : kept.start()], count), kept[0]]
            last = kept.end()
        out.append(self._mask(text[last:], count))
        return "".join(out), count

    def _mask(self, text: str, count: Counter[str]) -> str:
        for kind, pattern in _RULES:
            text = _pattern(pattern).sub(lambda m, kind=kind: self._by_rule(kind, m, count), text)  # type: ignore[misc]
        text = self._by_word(text, count)
        text = _pattern(_UUID).sub(lambda m: self._new("uuid", m[0], count), text)
        text = _pattern(r"(?<![0-9A-Za-z])[0-9a-f]{32}(?![0-9A-Za-z])").sub(
            lambda m: self._new("id", m[0], count), text
        )
        text = _pattern(_MAC).sub(lambda m: self._new("mac", m[0], count), text)
        text = _pattern(_IPV6).sub(lambda m: self._address(m[0], count), text)
        return _pattern(_IPV4).sub(lambda m: self._address(m[0], count), text)

    def _by_rule(self, kind: str, found: re.Match[str], count: Counter[str]) -> str:
        before, value = found[1], found[2]
        if kind == "password" and found[0].lstrip().startswith("password"):
            user = self._name(before, count) if not before.endswith("=") else before
            if not before.endswith("="):
                head = found[0][: found.start(1) - found.start(0)]
                gap = found[0][found.end(1) - found.start(0) : found.start(2) - found.start(0)]
                return head + user + gap + self._new(kind, value, count)
        if kind == "user":
            parts = re.split(r"([\s,;|&]+)", value)
            return before + "".join(p if i % 2 else self._name(p, count) for i, p in enumerate(parts))
        if kind == "host":
            return before + (self._new(kind, value, count) if self._tells(value) else value)
        return before + self._new(kind, value, count)

    def _name(self, user: str, count: Counter[str]) -> str:
        return self._new("user", user, count) if self._tells(user) else user

    def _by_word(self, text: str, count: Counter[str]) -> str:
        """Learned words wherever they stand, and users where they are a part of a path."""
        if self.words:
            text = self._words_pattern.sub(lambda m: self._word(m[0], count), text)
        if self.users:
            names = "|".join(re.escape(u) for u in sorted(self.users, key=lambda u: (-len(u), u)))
            text = _pattern(rf"(?<=/)(?:{names})(?=[/\s\"',:;]|$)").sub(
                lambda m: self._new("user", m[0], count), text
            )
        return text

    @property
    def _words_pattern(self) -> re.Pattern[str]:
        longest = sorted(self.words, key=lambda w: (-len(w), w))
        return _pattern(
            rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, longest))})(?![A-Za-z0-9])", re.IGNORECASE
        )

    def _word(self, value: str, count: Counter[str]) -> str:
        kind = self.words.get(value) or next(
            (k for w, k in self.words.items() if w.lower() == value.lower()), "host"
        )
        return self._new(kind, value.replace("--", "-") if kind == "host" else value, count)

    def _address(self, value: str, count: Counter[str]) -> str:
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            return value
        dull = address.is_loopback or address.is_unspecified or value.startswith(("0.", "255."))
        if dull or any(r.startswith(value) for r in self.releases):
            return value
        return self._new("ipv4" if address.version == 4 else "ipv6", value, count)

    def _new(self, kind: str, value: str, count: Counter[str]) -> str:
        """The mask of a value, of a form that reads as what it stands for."""
        if value in self.made:
            return value  # one rule after another
        count[kind] += 1
        key = (kind, value.lower())
        if key not in self.masks:
            number = sum(1 for k, _ in self.masks if k == kind) + 1
            form = _FORMS.get(kind)
            self.masks[key] = form(number) if form is not None else f"{kind}-{number}"
            self.made.add(self.masks[key])
        return self.masks[key]


_FORMS: dict[str, Callable[[int], str]] = {
    "uuid": lambda n: f"00000000-0000-0000-0000-{n:012x}",
    "id": lambda n: f"{n:032x}",
    "mac": lambda n: f"02:00:00:00:{n >> 8 & 255:02x}:{n & 255:02x}",
    "ipv4": lambda n: f"0.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}",
    "ipv6": lambda n: f"100::{n:x}",
}
_PATTERNS: dict[tuple[str, int], re.Pattern[str]] = {}


def _pattern(text: str, flags: int = 0) -> re.Pattern[str]:
    key = (text, flags)
    if key not in _PATTERNS:
        _PATTERNS[key] = re.compile(text, re.MULTILINE | flags)
    return _PATTERNS[key]


@dataclass(frozen=True, slots=True)
class Masked:
    """An archive without secrets; how many places of each kind were masked in each member, and how many values."""

    archive: Archive
    places: Mapping[str, Mapping[str, int]]
    values: Mapping[str, int]


def secrets(machine: Machine) -> tuple[set[str], set[str]]:
    """(host names, user names) that a machine goes by. System accounts are no secret."""
    hosts = {machine.peek(n).strip() for n in ("/proc/sys/kernel/hostname", "/etc/hostname")}
    hosts |= {machine.peek("/proc/sys/kernel/domainname").strip()}
    users = set()
    for line in machine.peek("/etc/passwd").splitlines():
        fields = line.split(":")
        if len(fields) > 5 and fields[2].isdigit() and 1000 <= int(fields[2]) < 65534:
            users |= {fields[0], fields[5].rstrip("/").rpartition("/")[2]}
    return {h for h in hosts if re.fullmatch(r"[\w.-]+", h)}, users


def mask(archive: Archive, hosts: Iterable[str] = (), users: Iterable[str] = ()) -> Masked:
    """Take the secrets out of every text of an archive, names of members included. Pure."""
    texts = {n: d.decode("utf-8", "surrogateescape") for n, d in archive.members.items()}
    masker = Masker(hosts, users, [texts.get(f"{TREE}/proc/sys/kernel/osrelease", "").strip()])
    for text in (*texts.values(), *_strings({key: archive.facts[key] for key in _TOLD})):
        masker.learn(text)
    places: dict[str, Mapping[str, int]] = {}
    members: dict[str, bytes] = {}
    for name, text in sorted(texts.items()):
        total: Counter[str] = Counter()
        if name == DOCTOR:
            data = _json(_masked_leaves(masker, json.loads(text), total))
        else:
            masked, total = masker.mask(text)
            data = masked.encode("utf-8", "surrogateescape")
        shown = _masked_name(masker, name)
        members[shown] = data
        if total:
            places[shown] = dict(sorted(total.items()))
    told: Counter[str] = Counter()
    facts = {k: _masked_fact(masker, k, v, told) for k, v in archive.facts.items()}
    if told:
        places[MARKER] = dict(sorted(told.items()))
    values = dict(sorted(Counter(kind for kind, _ in masker.masks).items()))
    return Masked(Archive({**facts, "masked": values}, members), places, values)


_TOLD = ("sourced", "outputs", "banners", "tools")
"""The facts that hold texts of the machine."""

_NAMES = ("there", "unreadable", "cut", "modified", "banners")
"""The facts that hold names of files."""


def _masked_fact(masker: Masker, key: str, fact: Any, count: Counter[str]) -> Any:
    if isinstance(fact, list):
        return [_masked_name(masker, n) for n in fact] if key in _NAMES else fact
    if key in _TOLD:
        fact = {k: _masked_leaves(masker, v, count) for k, v in fact.items()}
    return {_masked_name(masker, k): v for k, v in fact.items()} if key in _NAMES else fact


def _masked_name(masker: Masker, name: str) -> str:
    """A name of a file without secrets. Most names are fixed, and a host may be called like a part of one."""
    at = re.match(
        rf"(?:{TREE})?(?:/boot/(?!grub)|/etc/default/grub\.d/|/.*modprobe\.d/|(?:/usr)?/lib/modules/)", name
    )
    if at is None:
        return name
    free, slash, fixed = name[at.end() :].partition("/")
    return at[0] + masker.mask(free)[0] + slash + (fixed if "/modules/" in at[0] else masker.mask(fixed)[0])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield key
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _masked_leaves(masker: Masker, value: Any, count: Counter[str]) -> Any:
    if isinstance(value, str):
        text, found = masker.mask(value)
        count.update(found)
        return text
    if isinstance(value, Mapping):
        return {k: _masked_leaves(masker, v, count) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_masked_leaves(masker, v, count) for v in value]
    return value


# Writing and reading -------------------------------------------------------------------------------


def pack(archive: Archive) -> bytes:
    """The bytes of an archive: the marker first, then the members by name; no time, no owner."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in ((MARKER, _json(archive.facts)), *sorted(archive.members.items())):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class _Bounded:
    """A stream that ends in an error where it gives more than an archive may hold."""

    def __init__(self, stream: BinaryIO, most: int, name: str) -> None:
        self.stream, self.left, self.name_shown = stream, most, name

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise EmupmemError(f"{self.name_shown}: larger than {LARGEST_ARCHIVE // MIB} MiB once unpacked")
        return data


def unpack(stream: BinaryIO, name: str) -> Archive:
    """Read an archive that anybody may have made: one of ours, or EmupmemError. Nothing is written. Pure."""
    members: dict[str, bytes] = {}
    facts: Mapping[str, Any] | None = None
    try:
        with gzip.GzipFile(fileobj=stream, mode="rb") as packed:
            bounded = _Bounded(packed, LARGEST_ARCHIVE, name)  # type: ignore[arg-type]
            for info, content in tarball.members(bounded.read):
                if facts is None and info.name != MARKER:
                    raise _not_ours(name)
                _refuse_member(info, name, members)
                data = content()
                if facts is None:
                    facts = _facts(data, name)
                else:
                    members[info.name] = data
            while bounded.read(MIB):
                pass  # to the checksum at the end
    except tarball.BadTarError as exc:
        raise _not_ours(name) if facts is None else _damaged(name, exc) from exc
    except (EOFError, zlib.error, OSError) as exc:
        raise _damaged(name, exc) from exc
    if facts is None:
        raise _not_ours(name)
    return Archive(facts, members)


def _not_ours(name: str) -> EmupmemError:
    return EmupmemError(
        f"{name}: compressed, and no archive of emupmem collect",
        f"if it is a log: zcat {name} | emupmem suggest --from -",
    )


def _damaged(name: str, exc: BaseException) -> EmupmemError:
    why = " ".join(str(exc).split())[:100]
    return EmupmemError(f"{name}: the archive is damaged" + (f": {why}" if why else ""), "copy it once more")


def _refuse_member(info: tarball.Member, name: str, members: Mapping[str, bytes]) -> None:
    """Raise EmupmemError for a member that `pack` would not have written."""
    shown = ascii(info.name)[1:-1][:80]
    parts = info.name.split("/")
    if not info.plain:
        raise EmupmemError(f"{name}: {shown} is no plain file")
    if info.name.startswith("/") or ".." in parts or "" in parts or "." in parts or "\0" in info.name:
        raise EmupmemError(f"{name}: a member's name leads elsewhere: {shown}")
    if info.size > LARGEST_FILE:
        raise EmupmemError(f"{name}: {shown} is larger than {LARGEST_FILE // MIB} MiB")
    if len(members) >= MOST_MEMBERS:
        raise EmupmemError(f"{name}: more than {MOST_MEMBERS} members")
    if info.name in members or (members and info.name == MARKER):
        raise EmupmemError(f"{name}: {shown} is in it twice")
    strange = not info.name.isascii() and info.name.startswith((f"{TREE}/sys/", f"{TREE}/proc/"))
    if strange or any(len(p) > 255 for p in parts):
        raise EmupmemError(f"{name}: {shown} does not belong into such an archive")
    if parts[0] not in (MARKER, DOCTOR, TREE, COMMANDS) or (len(parts) > 1) != (parts[0] in (TREE, COMMANDS)):
        raise EmupmemError(f"{name}: {shown} does not belong into such an archive")


def _facts(data: bytes, name: str) -> Mapping[str, Any]:
    """The marker, every value of the type that it has to have."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        raise _not_ours(name) from None
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise _not_ours(name)
    if facts["format"] != FORMAT:
        raise EmupmemError(
            f"{name}: archive format {facts['format']}; this emupmem reads format {FORMAT}",
            "use the emupmem that wrote it, or a newer one",
        )
    problem = _wrong_fact(facts)
    if problem:
        raise EmupmemError(f"{name}: {MARKER} is not as emupmem writes it: {problem}")
    return facts


_REGION: dict[str, Any] = {
    **dict.fromkeys(("name", "provider", "block", "mode", "driver"), str),
    **dict.fromkeys(("size", "block_size"), int),
    **dict.fromkeys(("start", "numa_node", "dax"), int | None),
}


def _wrong_fact(facts: Mapping[str, Any]) -> str:
    """The first fact that is missing or of another type, empty where all are well."""
    types: dict[str, type] = {
        "root": bool,
        "architecture": str,
        "there": list,
        "modified": dict,
        "banners": dict,
        "nodes": list,
        "regions": list,
        "room": dict,
        "tools": dict,
        "outputs": dict,
        "sourced": dict,
        "unreadable": list,
    }
    for key, kind in types.items():
        if not isinstance(facts.get(key), kind):
            return key
    try:
        [NodeRange(**n) for n in facts["nodes"]]
        if any(
            not isinstance(getattr(Region(**r), k), t) for r in facts["regions"] for k, t in _REGION.items()
        ):
            return "regions"
        numbers = [v for n in facts["nodes"] for v in n.values()]
        numbers += facts["room"].values()
        words = [*facts["there"], *facts["unreadable"], *facts["banners"].values(), *facts["tools"].values()]
        words += [o[k] for o in facts["outputs"].values() for k in ("member", "said")]
        numbers += [o["status"] for o in facts["outputs"].values()]
        times = [v for v in facts["modified"].values() if v is not None]
        _sourced_of(facts["sourced"])
    except (TypeError, KeyError, AttributeError, ValueError):
        return "a value"
    if not all(type(n) is int for n in numbers) or not all(isinstance(w, str) for w in words):
        return "a value"
    return "" if all(isinstance(t, int | float) for t in times) else "modified"


def _sourced_of(fact: Mapping[str, Any]) -> Sourced | EmupmemError:
    """What sh said there, as the editor knows it. Raises ValueError and its like for other shapes."""
    from emupmem.editor.shell import Sourced
    from emupmem.editor.text import VARIABLES

    if "error" in fact:
        return EmupmemError(str(fact["error"]), str(fact.get("hint", "")))
    values = tuple({v: None if row[v] is None else str(row[v]) for v in VARIABLES} for row in fact["values"])
    complaints = tuple((int(i), int(line), str(why)) for i, line, why in fact["complaints"])
    return Sourced(values, {}, complaints, str(fact["failed"]), bool(fact.get("unread")))


# The machine in an archive --------------------------------------------------------------------------


class Collected(Machine):
    """The machine that an archive was made of.

    Its root lies below a file, so that whatever is not looked up here is not there; no program is run.
    """

    def __init__(self, archive: Archive) -> None:
        super().__init__("/dev/null/archive")
        self.facts = archive.facts
        self.members = archive.members
        self.replay = _replay(archive.facts["sourced"])

    @property
    def running(self) -> bool:
        return True

    @property
    def is_root(self) -> bool:
        return bool(self.facts["root"])

    @property
    def architecture(self) -> str:
        return str(self.facts["architecture"])

    @cached_property
    def _folders(self) -> dict[str, set[str]]:
        """The names in each folder."""
        found: dict[str, set[str]] = {}
        for name in (
            *(n.removeprefix(TREE) for n in self.members if n.startswith(TREE)),
            *self.facts["there"],
        ):
            parent = name
            while parent != "/" and parent:
                parent, _, base = parent.rpartition("/")
                parent = parent or "/"
                found.setdefault(parent, set()).add(base)
        return found

    def path(self, name: str | Path) -> Path:
        return self.root / str(name).lstrip("/")

    def real(self, name: str) -> str:
        return name

    def read(self, name: str) -> bytes | None:
        if name in self.facts["unreadable"]:
            raise EmupmemError(
                f"{name} could not be read where the archive was made", "sudo emupmem collect takes it along"
            )
        return self.members.get(TREE + name)

    def peek(self, name: str) -> str:
        return self.members.get(TREE + name, b"").decode("utf-8", "replace").strip("\n\0")

    def exists(self, name: str) -> bool:
        there = TREE + name in self.members or name in self.facts["unreadable"]
        return there or name in self._folders or name in self.facts["there"]

    def names(self, folder: str) -> list[str]:
        return sorted(self._folders.get(folder, ()))

    def modified(self, name: str) -> float | None:
        found = self.facts["modified"].get(name)
        return None if found is None else float(found)

    def room(self, folder: str) -> int:
        return int(self.facts["room"].get(folder, 0))

    def is_link(self, name: str) -> bool:
        return False

    def find(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self.facts["tools"] else None

    def run(self, command: Command, timeout: float = 60, language: str = "C") -> Completed:
        known = self.facts["outputs"].get(" ".join(command.argv))
        if known is None:
            raise EmupmemError(f"{command.argv[0]} was not run where the archive was made")
        data = self.members.get(known["member"], b"")
        return Completed(known["status"], data, b"" if data else known["said"].encode())

    def nodes(self) -> tuple[NodeRange, ...]:
        return tuple(NodeRange(**n) for n in self.facts["nodes"])

    def regions(self) -> tuple[Region, ...]:
        return tuple(Region(**r) for r in self.facts["regions"])

    def settle(self) -> None:
        pass

    def kernel_banner(self, image: str) -> str:
        return str(self.facts["banners"].get(image, ""))

    def kernel_config(self, release: str) -> tuple[str, str]:
        name, text = super().kernel_config(release)
        if not text and release == self.peek("/proc/sys/kernel/osrelease"):
            text = self.peek("/proc/config")
            name = "/proc/config.gz" if text else ""
        return name, text


def _replay(fact: Mapping[str, Any]) -> Judge:
    """A judge that repeats what sh said there. The texts of an archive are never given to a shell."""

    def judge(texts: Sequence[bytes]) -> Sourced:
        seen = _sourced_of(fact)
        if isinstance(seen, EmupmemError):
            raise seen
        if not seen.failed and len(seen.values) != len(texts):
            raise EmupmemError("the archive does not tell what GRUB's defaults come to")
        return seen

    return judge


@contextlib.contextmanager
def _judging(name: str) -> Iterator[None]:
    """What is in an archive may be anything: texts that no kernel writes must not look like our mistake."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as exc:
        raise _damaged(name, exc) from exc


def plan_from(archive: Archive, name: str, source: str = "auto") -> survey.Survey:
    """What an archive tells the planner, as `survey.of_machine` would on that machine. Raises EmupmemError."""
    from emupmem.boot import obstacles
    from emupmem.boot.grub import defaults

    machine = Collected(archive)
    with _judging(name):
        refused = obstacles.first(machine)
        try:
            boots = defaults.effective_line(machine, defaults.read_defaults(machine))
        except EmupmemError:
            boots = None  # no GRUB there: that boot's own command line serves
        found = obstacles.planned_for(machine, survey.of_machine(machine, source, boots))
    return replace(found, source=f"{name}: {found.source}", apply_refused=refused)


def doctor_from(archive: Archive, name: str) -> tuple[doctor.Finding, ...]:
    """The doctor's findings for the machine in an archive. Raises EmupmemError."""
    with _judging(name):
        return doctor.look(Collected(archive))
