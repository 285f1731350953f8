# SPDX-License-Identifier: Apache-2.0
"""Pop!_OS: kernelstub writes the entries of systemd-boot from /etc/kernelstub/configuration, at each kernel update.

That file and the entries are changed here, each by rename, and kernelstub is asked what it reads there. Its own
`-a` and `-d` come to the same words, but not as safely (kernelstub 3.1.4): every run copies kernel and initrd over
those that boot now, in place, which nothing could put back; `-d` puts all other options in an order of chance, and of
two `console=` the last one counts; and it ends with 0 where it found no kernel and did nothing. So no kernel is
touched, and a tree can be changed as well: there is nothing more to run in it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from emupmem.boot.bls import text as bls_text
from emupmem.boot.entry import joined
from emupmem.boot.foreign import KERNELSTUB_CONFIG
from emupmem.boot.loader import Loader, Standing, Steps, Wanted
from emupmem.boot.systemd_boot import SystemdBoot
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import EmupmemError, FileEdit
from emupmem.record import record
from emupmem.system.host import Host

_SHOW = ("kernelstub", "--print-config", "--log-file", "/dev/null")
"""Prints what it reads, and ends before it writes anything."""

_SHOWN = re.compile(r"^[ \t]*Kernel Boot Options:\.*(.*)$", re.MULTILINE)
_KEY = re.compile(r'"kernel_options"\s*:\s*')


@record
class _Settings:
    """The configuration: its text, what JSON makes of it, and `options`, a string or a list by its version."""

    text: str
    whole: dict[str, Any]
    options: str | list[str]

    @property
    def line(self) -> str:
        return self.options if isinstance(self.options, str) else " ".join(self.options)


class Kernelstub(SystemdBoot):
    """systemd-boot with entries of kernelstub's. Pop's recovery (boot=casper) is another system and stays."""

    title = "kernelstub"

    def standing(self, machine: Host) -> Standing:
        line = parse_command_line(_settings(machine).line)
        items = tuple(i.text for i in line.reservations)
        return dataclasses.replace(super().standing(machine), items=items, where=KERNELSTUB_CONFIG)

    def sources(self, machine: Host) -> tuple[str, ...]:
        return (KERNELSTUB_CONFIG,)

    def new_kernels_take(self, machine: Host, now: Standing) -> str:
        return now.where

    def seen(self, machine: Host, name: str) -> str:
        return f"{super().seen(machine, name)}, by {self.title}"

    def refuse_trial(self, machine: Host) -> None:
        Loader.refuse_trial(self, machine)

    def new_kernels(self, machine: Host, wanted: Wanted) -> list[FileEdit]:
        now = _settings(machine)
        changed = _reworked(now.options, wanted.items, wanted.add, wanted.drop)
        line = changed if isinstance(changed, str) else " ".join(changed)
        bls_text.prove_words(now.line, line, wanted.items, wanted.add, wanted.drop)
        after = _with_options(now, changed).encode("utf-8", "surrogateescape")
        return [FileEdit(KERNELSTUB_CONFIG, machine.read(KERNELSTUB_CONFIG), after)]

    def prove(self, machine: Host, before: Standing, steps: Steps) -> int:
        count = super().prove(machine, before, steps)
        if machine.live:
            self._ask(machine)
        return count

    def _ask(self, machine: Host) -> None:
        """Raise EmupmemError unless kernelstub reads the same words from its configuration."""
        done = machine.output(*_SHOW)
        if done is None or done.status:
            said = f": {done.last_words}" if done is not None else ""
            raise EmupmemError(f"kernelstub cannot read its configuration{said}")
        found = _SHOWN.search((done.stdout + done.stderr).decode("utf-8", "surrogateescape"))
        words = parse_command_line(found[1]).words if found is not None else ()
        if words != parse_command_line(_settings(machine).line).words:
            raise EmupmemError(f"kernelstub reads other words there: {joined(words) or 'none'}")


def _settings(machine: Host) -> _Settings:
    """What kernelstub is configured to. Raises EmupmemError for what it would not read either."""
    text = machine.text(KERNELSTUB_CONFIG)
    try:
        whole = json.loads(text)
        options = whole["user"]["kernel_options"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise _unreadable() from exc
    if isinstance(options, str):
        return _Settings(text, whole, options)
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise _unreadable()
    return _Settings(text, whole, options)


def _unreadable() -> EmupmemError:
    return EmupmemError(
        f"{KERNELSTUB_CONFIG} has no kernel_options of the user's: kernelstub could not use it",
        "look at it; without that file, sudo kernelstub --loader --manage-only makes a new one",
    )


def _reworked(
    options: str | list[str], items: Sequence[str], extra: Sequence[str], drop: Sequence[str]
) -> str | list[str]:
    """The options with our items exactly `items`; all others as they are, where they are."""
    if isinstance(options, str):
        return bls_text.reworked(options, items, extra, drop)
    left, kept = tuple(items), []
    for option in options:
        ours = parse_command_line(option).reservations
        new = bls_text.reworked(option, left, (), drop) if ours else "" if option in drop else option
        left = () if ours else left
        kept += [new] if new or not option else []
    there = parse_command_line(" ".join(kept)).words
    kept += [f"memmap={','.join(left)}"] if left else []
    return [*kept, *(w for w in dict.fromkeys(extra) if w not in there)]


def _with_options(now: _Settings, options: str | list[str]) -> str:
    """The text of the configuration with other options, every other byte as it was where that can be done."""
    wanted = {**now.whole, "user": {**now.whole["user"], "kernel_options": options}}
    if wanted == now.whole:
        return now.text
    for found in _KEY.finditer(now.text):
        try:
            _, end = json.JSONDecoder().raw_decode(now.text, found.end())
            head, body, rest = now.text[: found.end()], now.text[found.end() : end], now.text[end:]
            changed = head + _in_the_style_of(body, options) + rest
            if json.loads(changed) == wanted:
                return changed
        except ValueError:
            continue
    return json.dumps(wanted, indent=2)  # as kernelstub itself writes it


def _in_the_style_of(body: str, options: str | list[str]) -> str:
    """The options as JSON, on one line or on several with the indent that they have."""
    if "\n" not in body:
        return json.dumps(options)
    indent = body.rpartition("\n")[2].rstrip("]")
    return json.dumps(options, indent=2).replace("\n", f"\n{indent}")
