# SPDX-License-Identifier: Apache-2.0
"""What becomes of memory that is given back to the system: a node, and with luck a tier of its own. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from emupmem.model import LOW_LIMIT, DeviceKind, Reservation
from emupmem.planner.places import Place, intersect, union_of
from emupmem.planner.situation import Situation
from emupmem.units import human, tight


def node_warnings(situation: Situation, chosen: Sequence[Reservation]) -> list[str]:
    """What a person should know who wants memory of its own kind: where it will be a part of a node's memory.

    A node that has any other memory keeps the tier of that (mm/memory-tiers.c).
    """
    if not chosen or chosen[0].kind is not DeviceKind.MEMORY:
        return []
    nodes = nodes_with_ram(situation)
    if len(nodes) < 2:
        seen = "this machine has one NUMA node" if nodes else "the NUMA nodes are not known here"
        return [f"{seen}: with one node the memory joins that of node 0 and is no tier of its own"]
    told = []
    for node in sorted({r.numa_node for r in chosen if r.numa_node is not None}):
        ram, rest = _rest(situation, chosen, node)
        if rest:
            told.append(
                f"node {node} keeps {human(rest)} of its {human(ram)}: the memory joins that, and is a tier of its "
                f"own only where all of a node is reserved{_whole(situation, node, ram)}"
            )
    return told


def nodes_with_ram(situation: Situation) -> list[int]:
    """The nodes that have RAM: one may be told of that has only room for memory to be plugged in."""
    return [n for n in sorted({n.node for n in situation.nodes}) if ram_of_node(situation, n)]


def ram_of_node(situation: Situation, node: int) -> list[Place]:
    """The RAM of a node, in its pieces."""
    own = union_of((n.start, n.end) for n in situation.nodes if n.node == node)
    return list(intersect(((s.start, s.end, 0, None) for s in situation.firmware.ram), own))


def _rest(situation: Situation, chosen: Sequence[Reservation], node: int) -> tuple[int, int]:
    """(RAM of a node in bytes, what of it is neither chosen nor reserved already)."""
    places = ram_of_node(situation, node)
    line = situation.command_line
    kept = [(i.start, i.start + i.size) for i in line.reservations] if line is not None else []
    gone = list(intersect(places, union_of([*kept, *((r.start, r.end) for r in chosen)])))
    ram, taken = (sum(p[1] - p[0] for p in found) for found in (places, gone))
    return ram, ram - taken


def _whole(situation: Situation, node: int, ram: int) -> str:
    """How to ask for all of a node, empty where it cannot be had in one piece."""
    places = ram_of_node(situation, node)
    step = situation.steps(DeviceKind.MEMORY)[-1]
    whole = len(places) == 1 and places[0][0] >= LOW_LIMIT and not places[0][0] % step and not ram % step
    return f" (--numa-node {node} --size {tight(ram)})" if whole else ""
