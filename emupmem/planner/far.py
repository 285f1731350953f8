# SPDX-License-Identifier: Apache-2.0
"""Which node is far from the processors: what `--far` asks for. Pure."""

from __future__ import annotations

from dataclasses import replace

from emupmem.kernel.distance import ITSELF
from emupmem.model import EmupmemError, Request
from emupmem.planner.nodes import nodes_with_ram
from emupmem.planner.situation import Situation
from emupmem.record import record


@record
class _Far:
    """The farthest node with memory, how far it is, and from where: the first node with processors."""

    node: int
    distance: int
    home: int


def with_node(situation: Situation, request: Request) -> Request:
    """The request with the node that `far` stands for. Raises EmupmemError where no node is farther than others."""
    if not request.far or request.numa_node is not None:
        return request
    return replace(request, numa_node=_farthest(situation).node)


def far_warnings(situation: Situation, request: Request) -> list[str]:
    """What a person should know who asked for a far node."""
    if not request.far:
        return []
    far = _farthest(situation)
    return [
        f"node {far.node} is at distance {far.distance} from node {far.home} (itself: {ITSELF}), says the firmware: "
        f"what that costs is measured by numactl --cpunodebind={far.home} emupmem bench"
    ]


def _farthest(situation: Situation) -> _Far:
    with_memory = set(nodes_with_ram(situation))
    known = {d.node: d for d in situation.distances}
    if not known and len(with_memory) != 1:
        raise EmupmemError(
            "how far the NUMA nodes are from each other is not known here (a log does not tell it)",
            "an archive of emupmem collect has it; or name a node: --numa-node N",
        )
    if len(with_memory | set(known)) == 1:
        raise EmupmemError(
            "this machine has one NUMA node: there is no far memory, and no slowness to be had in software",
            "leave --far away; slower memory needs a second node, or CXL memory",
        )
    hidden = sorted(with_memory - set(known))
    if hidden:
        raise EmupmemError(
            f"how far node {hidden[0]} is is not known: the running system has no memory of it",
            f"name it: --numa-node {hidden[0]}",
        )
    home = next((d for d in situation.distances if d.processors), situation.distances[0])
    away = [
        (distance, not known[n].processors, -n) for n, distance in home.to if n in with_memory - {home.node}
    ]
    distance, _, minus = max(away, default=(ITSELF, False, 0))
    if distance <= ITSELF:
        raise EmupmemError(
            "the firmware says that all memory of this machine is equally near",
            "leave --far away, or name a node: --numa-node N",
        )
    return _Far(-minus, distance, home.node)
