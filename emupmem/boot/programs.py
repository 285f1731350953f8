# SPDX-License-Identifier: Apache-2.0
"""Which programs a machine has, a running one or a tree."""

from __future__ import annotations

from emupmem.system.host import Host

BIN_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def has_program(machine: Host, program: str) -> bool:
    """Whether a program is installed on the machine, or in the tree."""
    if machine.running:
        return machine.find(program) is not None
    return any(machine.exists(f"{folder}/{program}") for folder in BIN_FOLDERS)
