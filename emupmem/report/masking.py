# SPDX-License-Identifier: Apache-2.0
"""What must not leave a machine with a report: names, addresses, keys."""

from __future__ import annotations

import ipaddress
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from emupmem.record import record
from emupmem.report.archive import DOCTOR, MARKER, TREE, Archive, as_json
from emupmem.system.host import Host

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

_PLACE = r"(?:\[[^\]\s]*\]|[^\s:\[]*)"
"""An address of `ip=`: one of IPv6 stands in brackets."""

_QUOTE = r"""(?:\\?["'])?"""
_QUOTED = r"""(?!\\?["'])(?:(?<=")[^"\n]+?(?=\\?")|(?<=')[^'\n]+?(?=\\?')"""
_VALUE = rf"""{_QUOTED}|[^\s"']+)"""
"""A value behind `_QUOTE`: to the closing quote if there is one, else a word. JSON escapes a quote."""
_LABEL = rf"""{_QUOTED}|(?:[^\s"',\\]|\\x[0-9a-f]{{2}}|\\[0-7]{{3}})+)"""
"""The same, of words in which udev and fstab write a blank as `\\x20` and `\\040`."""
_NAMED = (
    r"(?!CONFIG_)(?:[\w.-]{0,40}(?:passw(?:or)?d|passphrase|secret|token|psk)[\w-]{0,20}"
    r"|(?:[\w.-]{0,40}[_.-])?(?:pass|pwd|pw|rootpw))"
)
"""Names of passwords."""
_WORD = r"""(?:"[^"\n]*"|'[^'\n]*'|\S+)"""

_UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_RULES: tuple[tuple[str, str], ...] = (
    ("password", r"^[^\S\n]*password_pbkdf2[^\S\n]+(\S+)[^\S\n]+(\S+)"),
    ("password", rf"^[^\S\n]*password[^\S\n]+(\S+)[^\S\n]+({_WORD})"),
    ("password", r"()(grub\.pbkdf2\.[\w.]+)"),
    ("password", rf"""((?<=\s"){_NAMED}=)([^"\\\n]+)(?=")"""),
    ("password", rf"""((?:^|(?<=[\s"',;&/])){_NAMED}={_QUOTE})({_VALUE})"""),
    ("key", rf"""((?:^|(?<=[\s"']))(?!CONFIG_)[\w.-]{{0,40}}key(?:file)?={_QUOTE})({_VALUE})"""),
    ("key", rf"""((?:^|(?<=[\s"']))systemd\.set_credential(?:_binary)?={_QUOTE})({_VALUE})"""),
    ("address", r"""((?:^|(?<=[\s"']))[\w.-]{1,40}=(?:[\w;,=-]{0,80}[;,=])?[\w+-]{2,20}://)([^\s"']+)"""),
    ("password", r"""(\w://)([^\s/@"']+:[^\s/@"']+)(?=@)"""),
    ("network", rf"""(?i)(\bssid\b["']?[\s:=]{{1,3}}{_QUOTE})({_QUOTED}|[^\s"',]+))"""),
    ("label", rf"""(\bLABEL={_QUOTE})({_LABEL})"""),
    ("label", r"""(\bdevice label )(\S+)(?= devid)"""),
    ("label", rf"""(\bby-(?:label|partlabel)/)({_LABEL})"""),
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
    ("host", rf"""(\bip={_PLACE}:{_PLACE}:{_PLACE}:[^\s:]*:)([A-Za-z][\w.-]*)"""),
    ("host", r"""(, (?:nis-)?domain=)([A-Za-z][\w.-]*)"""),
    ("host", r"""([Hh]ostname (?:set )?to <)([^<>\s]+)"""),
    ("builder", r"""(Linux version \S+ \()([^\s()]+@[^\s()]+)"""),
    ("dmi", r"""(\bDMI: (?!Memory slots))([^\n]+)"""),
    (
        "serial",
        r"""(?i)(\b(?:serial[ _-]?(?:number|no\.?|num)|iserial|service tag|asset tag|s/n)"?\s*[:=]\s*"?)"""
        r"""([^\s,"']{4,})""",
    ),
    ("uuid", r"""((?i:uuid)=["']?)([0-9A-Fa-f][0-9A-Fa-f:-]{3,})"""),
    ("uuid", r"""(\blvmid/)([\w/-]+)"""),
    ("mac", r"""(\bifname=[\w.-]+:)((?:[0-9a-fA-F]{2}:){5,19}[0-9a-fA-F]{2})(?![\w:])"""),
    ("mac", r"""(?i)(\bBOOTIF=(?:01-)?)((?:[0-9a-f]{2}-){5}[0-9a-f]{2})(?![\w-])"""),
    ("mac", r"""(?i)(\b(?:en|wl)x)([0-9a-f]{12})(?![0-9a-z])"""),
    ("uuid", r"""(\bby-(?:uuid|partuuid)/)([^\s"',\\]+)"""),
    ("serial", r"""(\bby-id/)([^\s"',\\]+)"""),
    ("uuid", r"""^((?>[^\n]*?--fs-uuid\b)[^\n]*[^\S\n])([0-9A-Fa-f][0-9A-Fa-f-]{7,})(?=[^\S\n]*$)"""),
)
"""(kind, what stands before the secret and the secret): what is a secret for the place where it stands."""

_MAC = (
    r"(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2}:){5,19}[0-9a-fA-F]{2}(?![0-9a-fA-F:])"
    r"|(?<![\w-])(?:[0-9a-fA-F]{2}-){5,19}[0-9a-fA-F]{2}(?![\w-])"
)
_IPV6 = (
    r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,8}"
    r"(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w:]|\.\d)|[0-9a-fA-F]{0,4}(?![\w:.]))"
)
"""Also with a dotted tail, as Python 3.13 prints what embeds an IPv4 address: `::ffff:192.0.2.1`."""
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
        self.users: set[str] = set()
        self.releases = tuple(releases)
        self.know(hosts, users)

    def know(self, hosts: Iterable[str], users: Iterable[str]) -> None:
        """Add names of hosts and users to those that are taken out."""
        self.users |= {u for u in users if self._tells(u)}
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
        if found.end(1) < found.start(2):  # GRUB's `password bob secret`
            head = found[0][: found.start(1) - found.start(0)]
            gap = found[0][found.end(1) - found.start(0) : found.start(2) - found.start(0)]
            return head + self._name(before, count) + gap + self._new(kind, value, count)
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
        # An IPv6 address not by its own words: they differ before and after Python 3.13.
        here = int(address) <= 1 if address.version == 6 else address.is_loopback
        dull = here or value.startswith(("0.", "255."))
        if dull or any(r.startswith(value) for r in self.releases):
            return value
        return self._new("ipv4" if address.version == 4 else "ipv6", value, count)

    def _new(self, kind: str, value: str, count: Counter[str]) -> str:
        """The mask of a value, of a form that reads as what it stands for."""
        if value in self.made:
            return value  # one rule after another
        count[kind] += 1
        key = (kind, re.sub(r"[:-]", "", value.lower()) if kind == "mac" else value.lower())
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


@record
class Masked:
    """An archive without secrets; how many places of each kind were masked in each member, and how many values."""

    archive: Archive
    places: Mapping[str, Mapping[str, int]]
    values: Mapping[str, int]


def secrets(machine: Host) -> tuple[set[str], set[str]]:
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
            data = as_json(_masked_leaves(masker, json.loads(text), total))
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
