# SPDX-License-Identifier: Apache-2.0
"""How far NUMA nodes are from each other, as the firmware's table SLIT has it and the kernel shows it."""

from __future__ import annotations

from emupmem.record import record

ITSELF = 10
"""The distance of a node to itself (ACPI specification); 20 is twice as far."""


@record
class NodeDistances:
    """How far a node is from each: (node, distance). `processors` is whether it has any."""

    node: int
    processors: bool
    to: tuple[tuple[int, int], ...]
