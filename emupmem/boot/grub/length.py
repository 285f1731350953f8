# SPDX-License-Identifier: Apache-2.0
"""The kernel's limit for its command line, where no generator runs that would show the new lines: `--root`."""

from __future__ import annotations

from emupmem.boot.entry import TOO_LONG
from emupmem.boot.grub import environment, menu
from emupmem.boot.grub.defaults import effective_defaults, effective_line
from emupmem.editor.text import VARIABLES
from emupmem.kernel.cmdline import COMMAND_LINE_MAX
from emupmem.model import UNCHANGED, EmupmemError
from emupmem.system.host import Host

_LEAST = "BOOT_IMAGE=/vmlinuz root= ro "
"""What grub-mkconfig puts before the words of the defaults, at least."""


def refuse_too_long(machine: Host, before: bytes, after: bytes, own: bytes | bool | None) -> None:
    """Raise EmupmemError where the kernel would not read its line to the end.

    `before` and `after` are texts of /etc/default/grub, `own` is our drop-in as `effective_defaults` takes it.
    """
    values = effective_defaults(machine, after, own)
    line = " ".join(menu.kernel_text(values[v].value or "") for v in VARIABLES)
    grows = _bytes(line) - _bytes(effective_line(machine, before).text)
    entries = [e for e in menu.entries(machine.text(environment.grub_cfg(machine))) if e.ours]
    there = [_bytes(f"BOOT_IMAGE={e.kernel} {e.text}") + grows for e in entries]
    longest = max((_bytes(_LEAST + line), *there))
    if longest > COMMAND_LINE_MAX:
        raise EmupmemError(
            f"{TOO_LONG}: {longest} with the reservation",
            "remove words from GRUB's defaults first",
            state=UNCHANGED,
        )


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
