# SPDX-License-Identifier: Apache-2.0
"""A boot entry, whatever the loader; and what is wrong with entries after a change."""

from __future__ import annotations

from collections.abc import Sequence

from emupmem.kernel.cmdline import COMMAND_LINE_MAX, is_cut, mangled, parse_command_line
from emupmem.model import CommandLine
from emupmem.record import record


@record
class BootEntry:
    """One `linux` line: the kernel's path, its words after GRUB's unquoting, where it stands.

    `path` is the entry's place in the menu as GRUB's `default` names it: titles or ids, outermost
    first; `index` the same as numbers. `ours` tells lines written by the distribution's own
    10_linux-like scripts from entries for other systems (os-prober, custom files). `version` is the
    kernel's release where the entry tells it.
    """

    titles: tuple[str, ...]
    ids: tuple[str, ...]
    index: tuple[int, ...]
    kernel: str
    words: tuple[str, ...]
    line: int
    recovery: bool
    ours: bool
    version: str = ""

    @property
    def title(self) -> str:
        return self.titles[-1] if self.titles else ""

    @property
    def text(self) -> str:
        """The command line as GRUB hands it to the kernel, without BOOT_IMAGE=."""
        return joined(self.words)

    @property
    def command_line(self) -> CommandLine:
        """The words as the kernel will read them."""
        return parse_command_line(self.text)

    @property
    def release(self) -> str:
        """The kernel release, as the entry or the file name tells it: `6.1.0-32-amd64` of vmlinuz-6.1.0-32-amd64."""
        if self.version:
            return self.version
        name = self.kernel.rpartition("/")[2]
        if "-" in name:
            return name.partition("-")[2]
        parts = self.kernel.split("/")  # /usr/lib/modules/RELEASE/vmlinuz
        return parts[-2] if len(parts) > 2 and parts[-3] == "modules" else ""


def joined(words: Sequence[str]) -> str:
    return " ".join(_requote(w) for w in words)


def _requote(word: str) -> str:
    """A word as GRUB hands it to the kernel (grub_create_loader_cmdline, grub-core/lib/cmdline.c)."""
    escaped = "".join("\\" + c if c in "\\'\"" else c for c in word)
    return f'"{escaped}"' if " " in word else escaped


def problems(
    found: Sequence[BootEntry], normal: Sequence[str], recovery: Sequence[str]
) -> list[tuple[BootEntry | None, str]]:
    """What is wrong with a generated menu whose normal and recovery entries should reserve these items.

    Items are texts like `1G!4G`; entries must have exactly them, read by the kernel's rules.
    """
    ours = [e for e in found if e.ours]
    if not any(not e.recovery for e in ours):
        return [(None, "there is no normal Linux entry in it")]
    wrong: list[tuple[BootEntry | None, str]] = []
    for entry in ours:
        want = list(recovery if entry.recovery else normal)
        line = entry.command_line
        have = [i.text for i in line.reservations]
        if item := mangled(line):
            wrong.append((entry, f"memmap={item} would reach the kernel as a memory limit"))
        elif have != want:
            wrong.append((entry, f"it has {_list(have)} instead of {_list(want)}"))
        elif too_long(entry):
            wrong.append((entry, TOO_LONG))
    return wrong


TOO_LONG = f"the command line is longer than the {COMMAND_LINE_MAX} bytes that the kernel reads"


def too_long(entry: BootEntry) -> bool:
    """Whether the last words of an entry do not reach the kernel: `BOOT_IMAGE=…`, which GRUB puts first, counts.

    Measured: GRUB 2.06 hands over lines of 2044 to 2047 bytes whole.
    """
    return is_cut(" ".join(("BOOT_IMAGE=" + _requote(entry.kernel), entry.text)))


def _list(items: Sequence[str]) -> str:
    return f"memmap={','.join(items)}" if items else "no reservation"
