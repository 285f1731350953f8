# SPDX-License-Identifier: Apache-2.0
"""Where in a sentence the commands are that people copy: a line is not broken inside one.

Nothing marks them: they are told by the program's name and what follows it, and end where the sentence goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

OWN = (
    "suggest|apply|remove|verify|mount|umount|save|restore|confirm|abandon|doctor|collect|bench|"
    "namespaces|qemu|nvdimm|demo|completion|help"
)
"""The commands of emupmem."""

_PROGRAMS = (
    "apt|bootctl|cat|cd|cp|cxl|daxctl|dd|dmesg|dnf|dracut|efibootmgr|findmnt|fuser|grep|grubby|ipmctl|"
    r"journalctl|kexec|ls|lsblk|make|mkdir|mkfs\.\w+|modprobe|mount|mv|ndctl|numactl|pacman|"
    "proxmox-boot-tool|qemu-img|rm|rpm-ostree|sed|systemctl|truncate|udevadm|umount|uname|wipefs|zcat|"
    "zfs|zypper"
)
_FIRST = (
    "add|clean|convert|create-namespace|create-region|destroy-namespace|disable-region|enable-namespace|"
    "enable-region|get|install|kargs|list|reconfigure-device|refresh|restart|set-default|show|status|"
    "stop|unshare"
)
"""What follows such a program, apart from options and paths, where it is run and not told of."""

_PROSE = (
    "adds|again|and|answered|as|at|because|before|begins|brings|but|by|cancels|chooses|deletes|divides|"
    "does|done|drops|ends|failed|fails|finishes|first|for|forgets|from|gives|has|if|in|into|is|it|keeps|"
    "lists|makes|may|measures|names|needs|now|of|on|once|or|plans|proves|puts|removes|repairs|saves|sees|"
    "sets|shows|so|takes|tells|than|that|the|then|there|undoes|until|what|when|where|which|while|why|"
    "with|without|works|writes"
)
"""Words that are no part of a command: with them the sentence goes on."""

_BEGIN = re.compile(
    r"(?<![\w/.=-])(?:"
    r"sudo(?= \S)"
    r"|echo(?= \S+ >)"
    rf"|emupmem(?= (?:-|(?:{OWN})(?![\w-])))"
    rf"|(?:{_PROGRAMS})(?= (?:[-/<>|]|\S*[=*]|\S+ [>|]|(?:{_FIRST})(?![\w-])))"
    r")(?![\w/.-])"
)
_QUOTED = r"""'[^']*'|"[^"]*\""""
_WORD = re.compile(rf"(?:{_QUOTED}|\S)+")
_GOES_ON = re.compile(rf"\(|(?:{_PROSE})[.,;:)]*$")


def commands_in(text: str) -> Iterator[tuple[int, int]]:
    """The (start, end) of each command in a line."""
    at = 0
    while begin := _BEGIN.search(text, at):
        at = _end(text, begin.start())
        yield begin.start(), at


def _end(text: str, start: int) -> int:
    """Where the command ends that begins there."""
    end = start
    while word := _WORD.match(text, end + (end > start)):
        bare = re.sub(_QUOTED, "''", word[0])
        if end > start and _GOES_ON.match(bare):
            break
        end = word.end()
        if bare.endswith((",", ";", ":", ".")) or bare.count(")") > bare.count("("):
            break
    return end
