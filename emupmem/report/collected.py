# SPDX-License-Identifier: Apache-2.0
"""The machine that an archive was made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from emupmem.boot import detect, obstacles, prepare
from emupmem.doctor import finding, look
from emupmem.editor.shell import Judge, Sourced
from emupmem.model import EmupmemError, NodeRange
from emupmem.planner import survey
from emupmem.report.archive import TREE, Archive, damaged_archive, sourced_of
from emupmem.system.host import Host
from emupmem.system.pe import PeFile, told_pe
from emupmem.system.programs import Completed
from emupmem.system.sysfs import Region

# The machine in an archive --------------------------------------------------------------------------


class Collected(Host):
    """The machine that an archive was made of.

    No file of this machine is looked at and no program is run: what the archive does not tell is not there.
    """

    def __init__(self, archive: Archive) -> None:
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

    def find(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self.facts["tools"] else None

    def output(self, *argv: str, timeout: float = 30) -> Completed | None:
        known = self.facts["outputs"].get(" ".join(argv))
        if known is None:
            return None  # it was not run where the archive was made
        data = self.members.get(known["member"], b"")
        return Completed(known["status"], data, b"" if data else known["said"].encode())

    def nodes(self) -> tuple[NodeRange, ...]:
        return tuple(NodeRange(**n) for n in self.facts["nodes"])

    def regions(self) -> tuple[Region, ...]:
        return tuple(Region(**r) for r in self.facts["regions"])

    def pe_file(self, name: str) -> PeFile | None:
        return told_pe(self.peek(name))

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
        seen = sourced_of(fact)
        if isinstance(seen, EmupmemError):
            raise seen
        if not seen.failed and len(seen.values) != len(texts):
            raise EmupmemError("the archive does not say what GRUB's defaults evaluate to")
        return seen

    return judge


@contextlib.contextmanager
def _judging(name: str) -> Iterator[None]:
    """What is in an archive may be anything: texts that no kernel writes must not look like our mistake."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as exc:
        raise damaged_archive(name, exc) from exc


def plan_from(archive: Archive, name: str, source: str = "auto") -> survey.Survey:
    """What an archive tells the planner, as `survey.of_machine` would on that machine. Raises EmupmemError."""
    machine = Collected(archive)
    with _judging(name):
        refused, loader = obstacles.first(machine), detect.title_of(machine)
        try:
            boots = prepare.next_line(machine)
        except EmupmemError:
            boots = None  # not known: that boot's own command line serves
        found = obstacles.planned_for(machine, survey.of_machine(machine, source, boots))
    return replace(found, source=f"{name}: {found.source}", apply_refused=refused, loader=loader)


def doctor_from(archive: Archive, name: str) -> tuple[finding.Finding, ...]:
    """The doctor's findings for the machine in an archive. Raises EmupmemError."""
    with _judging(name):
        return look.findings_of(Collected(archive))
