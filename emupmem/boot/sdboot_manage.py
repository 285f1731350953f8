# SPDX-License-Identifier: Apache-2.0
"""CachyOS: sdboot-manage writes the entries of systemd-boot from /etc/sdboot-manage.conf, a shell file.

Our words stand in two lines of their own at its end, or in a drop-in where others set the same variables, so that
all other bytes stay. sh has to read both texts, and may find no other difference. The entries are changed by rename
before `sdboot-manage gen` runs: without OVERWRITE_EXISTING it skips those that are there (sdboot-manage 20).
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from emupmem.boot.bls import text as bls_text
from emupmem.boot.bls.files import entry_files
from emupmem.boot.bls.sources import sdboot_manage_dropins
from emupmem.boot.foreign import SDBOOT_MANAGE_CONFIG, SDBOOT_MANAGE_DROPINS
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.loader import Loader, Standing, Steps, Wanted
from emupmem.boot.systemd_boot import SystemdBoot
from emupmem.editor.text import MARK, checked_text
from emupmem.kernel.cmdline import OUR_WORDS, parse_command_line
from emupmem.model import UNCHANGED, Command, EmupmemError, FileEdit
from emupmem.system.host import Host

NORMAL, FALLBACK = "LINUX_OPTIONS", "LINUX_FALLBACK_OPTIONS"
_BOTH = (NORMAL, FALLBACK)
_DROPIN = f"{SDBOOT_MANAGE_DROPINS[-1]}/zz-emupmem.conf"

_NAMES = "|".join(_BOTH)
_ASSIGNMENT = re.compile(
    rf"""^(?P<head>[ \t]*(?:export[ \t]+)?(?P<name>{_NAMES})(?P<more>\+?)=)
    (?P<quote>["']?)(?P<body>(?<=")(?:[^"\\`$\n]|\$(?:{_NAMES})\b|\$\{{(?:{_NAMES})\}})*(?=")
    |(?<=')[^'\n]*(?=')|(?<==)[^\s"'\\`$\#;&|()]*)(?P=quote)(?P<tail>[ \t]*(?:(?<=[ \t])\#.*)?)$""",
    re.MULTILINE | re.VERBOSE,
)
"""An assignment on one line, in one kind of quotes; of variables only these two in it."""

_GEN_ADDS = ("root=", "rootfstype=", "rootflags=", "rw", "ro", "resume=", "cryptdevice=", "rd.luks.", "zfs=")
"""What gen puts before the options by itself, by what it finds of the disks."""

_OWN = re.compile(rf'^{MARK}\n(?:({_NAMES})="\$\1 [^"\n]*"(?:\n|(?P<bare>\Z)))+', re.MULTILINE)

Texts = Mapping[str, str]
"""The files by name, in the order in which they are sourced; one character for each byte."""


class SdbootManage(SystemdBoot):
    """systemd-boot with entries of sdboot-manage's."""

    title = "sdboot-manage"

    def standing(self, machine: Host) -> Standing:
        texts = _texts(machine)
        items = tuple(i.text for i in parse_command_line(_values(texts)[NORMAL]).reservations)
        where = _DROPIN if _OWN.search(texts.get(_DROPIN, "")) else SDBOOT_MANAGE_CONFIG
        return dataclasses.replace(super().standing(machine), items=items, where=where)

    def sources(self, machine: Host) -> tuple[str, ...]:
        return tuple(n for n in (SDBOOT_MANAGE_CONFIG, _DROPIN) if machine.exists(n))

    def files(self, machine: Host) -> tuple[str, ...]:
        return (*super().files(machine), _DROPIN, *(f"{esp}/loader/loader.conf" for esp in _esps(machine)))

    def new_kernels_take(self, machine: Host, now: Standing) -> str:
        return now.where

    def seen(self, machine: Host, name: str) -> str:
        return f"{super().seen(machine, name)}, by {self.title}"

    def refuse_trial(self, machine: Host) -> None:
        Loader.refuse_trial(self, machine)

    def new_kernels(self, machine: Host, wanted: Wanted) -> list[FileEdit]:
        before = _texts(machine)
        after = _changed(before, wanted)
        if after != before:
            _prove(machine, before, after, wanted)
        return [
            FileEdit(name, machine.read(name), after[name].encode("latin-1") if name in after else None)
            for name in dict.fromkeys((*before, *after))
            if before.get(name) != after.get(name)
        ]

    def steps(self, machine: Host, wanted: Wanted) -> Steps:
        steps = super().steps(machine, wanted)
        if not steps.edits:
            return steps
        settings = _sourced(machine, _texts(machine))
        if settings.get("REMOVE_EXISTING", "yes").lower() == "yes":
            note = "sdboot-manage gen is not run, since REMOVE_EXISTING=yes lets it delete all entries first"
            return dataclasses.replace(steps, notes=(*steps.notes, note))
        if other := self._edited_entry(machine):
            note = f"sdboot-manage gen is not run: it would take words out of {other} that its settings do not have"
            return dataclasses.replace(steps, notes=(*steps.notes, note))
        owned = _written(machine, settings.get("KERNEL_PATTERN", "vmlinuz-*"))
        command = Command(("sdboot-manage", "gen"), "write the boot entries")
        return dataclasses.replace(steps, commands=(command,), owned=owned)

    def _edited_entry(self, machine: Host) -> str:
        """An entry with words that neither the settings have nor gen adds (root=, rw), empty where there is none."""
        values = [parse_command_line(v).words for v in _values(_texts(machine)).values()]
        for name in self._ours(machine):
            words = parse_command_line(bls_text.options(machine.text(name))).words
            own = [w for w in words if not w.startswith(_GEN_ADDS) and w not in OUR_WORDS]
            kept = bls_text.foreign_words(parse_command_line(" ".join(own)))
            if not any(all(w in value for w in kept) for value in values):
                return name
        return ""


def _esps(machine: Host) -> list[str]:
    """Where the partition with the entries is mounted."""
    return list(dict.fromkeys(n.partition("/loader/entries/")[0] for n in entry_files(machine)))


def _written(machine: Host, pattern: str) -> tuple[str, ...]:
    """The files that gen may write: the entries, those of kernels that have none yet, loader.conf."""
    names = list(entry_files(machine))
    for esp in _esps(machine):
        kernels = [n.replace("vmlinuz-", "") for n in machine.names(esp) if fnmatchcase(n, pattern)]
        names += [f"{esp}/loader/entries/{k}{end}.conf" for k in kernels for end in ("", "-fallback")]
        names.append(f"{esp}/loader/loader.conf")
    return tuple(dict.fromkeys(names))


# The settings as text ------------------------------------------------------------------------------------


def _texts(machine: Host) -> dict[str, str]:
    names = (SDBOOT_MANAGE_CONFIG, *sdboot_manage_dropins(machine))
    return {n: checked_text(machine.read(n) or b"", n) for n in names}


def _values(texts: Texts) -> dict[str, str]:
    """The two variables as their plain lines make them."""
    values = dict.fromkeys(_BOTH, "")
    for found in (f for text in texts.values() for f in _ASSIGNMENT.finditer(text)):
        body = found["body"]
        if found["quote"] == '"':
            body = re.sub(rf"\$\{{?({_NAMES})\}}?", lambda m: values[m[1]], body)
        values[found["name"]] = (values[found["name"]] if found["more"] else "") + body
    return values


def _changed(texts: Texts, wanted: Wanted) -> dict[str, str]:
    """The texts with exactly our items in both variables. As they are where all is so."""
    now = _values(texts)
    if all(bls_text.reworked(v, wanted.items, wanted.add, wanted.drop) == v for v in now.values()):
        return dict(texts)
    bare = {n: _without_ours(t, wanted.drop) if _is_etc(n) else t for n, t in texts.items()}
    left = _values(bare)
    lines = []
    for name in _BOTH:
        wish = parse_command_line(bls_text.reworked(now[name], (), wanted.add, wanted.drop)).words
        there = Counter(parse_command_line(left[name]).words)
        words = [f"memmap={','.join(wanted.items)}"] if wanted.items else []
        for word in wish:  # what a person added to our line stays, also a word that is there twice
            if there[word]:
                there[word] -= 1
            else:
                words.append(word)
        lines += [f'{name}="${name} {" ".join(words)}"'] if words else []
    others = any(_ASSIGNMENT.search(t) for n, t in bare.items() if n not in (SDBOOT_MANAGE_CONFIG, _DROPIN))
    place = _DROPIN if others else SDBOOT_MANAGE_CONFIG
    if lines:
        text = bare.get(place, "")
        block = "\n".join([MARK, *lines])
        # A missing last newline stays missing, so that taking it out gives the old bytes back.
        bare[place] = f"{text}{block}\n" if not text or text.endswith("\n") else f"{text}\n{block}"
    return {n: t for n, t in bare.items() if t or n != _DROPIN}


def _is_etc(name: str) -> bool:
    """Whether a file is the administrator's, and not the vendor's."""
    return name.startswith("/etc/")


def _without_ours(text: str, drop: Sequence[str]) -> str:
    """A text without our lines, without our items elsewhere, and without the words to drop."""
    while found := _OWN.search(text):
        start = found.start() - (1 if found["bare"] is not None and found.start() else 0)
        text = text[:start] + text[found.end() :]

    def without(found: re.Match[str]) -> str:
        body = bls_text.reworked(found["body"], (), (), drop)
        return f"{found['head']}{found['quote']}{body}{found['quote']}{found['tail']}"

    return _ASSIGNMENT.sub(without, text)


# sh, the judge -------------------------------------------------------------------------------------------


def _sourced(machine: Host, texts: Texts) -> dict[str, str]:
    """All variables as sh has them at the end. Raises EmupmemError where it does not get there."""
    seen = grub_defaults.judge_of(machine)([t.encode("latin-1") for t in texts.values()])
    if seen.failed:
        index, line, _ = next((c for c in seen.complaints if c[2] == seen.failed), (0, 0, ""))
        place = f"{list(texts)[index]}:{line}" if line else list(texts)[index]
        raise EmupmemError(f"{place}: sh cannot read this file: {seen.failed}", "repair that line first")
    return {name: _unquoted(value) for name, value in seen.rest.items()}


def _unquoted(value: str) -> str:
    try:
        return "".join(shlex.split(value))
    except ValueError:
        return value


def _prove(machine: Host, before: Texts, after: Texts, wanted: Wanted) -> None:
    """Raise EmupmemError unless sh reads the old texts as we do, and in the new ones nothing else is new."""
    old, new = _sourced(machine, before), _sourced(machine, after)
    plain = _values(before)
    for name in _BOTH:
        if old.get(name, "") != plain[name]:
            raise EmupmemError(
                f"{SDBOOT_MANAGE_CONFIG}: sh reads {name} as “{old.get(name, '')}”, "
                f"its plain lines say “{plain[name]}”",
                f'write it as {name}="…" on one line, or add the words by hand, then sudo sdboot-manage gen',
                state=UNCHANGED,
            )
        bls_text.prove_words(plain[name], new.get(name, ""), wanted.items, wanted.add, wanted.drop)
    other = next(
        (n for n in sorted(old.keys() | new.keys()) if n not in _BOTH and old.get(n) != new.get(n)), ""
    )
    # What differs from one reading to the next by itself ($RANDOM) is not the edit's.
    if other and _sourced(machine, before).get(other) == old.get(other):
        raise EmupmemError(f"{SDBOOT_MANAGE_CONFIG}: the edit would change {other} as well", state=UNCHANGED)
