# SPDX-License-Identifier: Apache-2.0
"""`--far`: which node that is, what is said of it, and where there is none."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from emupmem.kernel.distance import NodeDistances
from emupmem.model import GIB, EmupmemError, NodeRange, Request
from emupmem.planner.plan import offers, plan, rejected, satisfied
from emupmem.planner.situation import Situation
from emupmem.report import collected, gather
from emupmem.report.archive import pack, unpack
from emupmem.system.sysfs import node_numbers, read_node_distances
from tests.cli.runner import Run
from tests.fake import LOG, FakeMachine, put
from tests.planner.test_soft import TWO, situation

NODE = "/sys/devices/system/node"
SRAT = """ACPI: SRAT: Node 0 PXM 0 [mem 0x00000000-0x2ffffffff]
ACPI: SRAT: Node 1 PXM 1 [mem 0x300000000-0x53fffffff]
"""
FAR = Request(size=GIB, far=True)


def distances(*rows: tuple[int, ...], processors: tuple[int, ...] = (0,)) -> tuple[NodeDistances, ...]:
    return tuple(NodeDistances(n, n in processors, tuple(enumerate(row))) for n, row in enumerate(rows))


def machine_of(
    nodes: tuple[NodeRange, ...], *rows: tuple[int, ...], processors: tuple[int, ...] = (0,)
) -> Situation:
    return replace(situation(nodes=nodes), distances=distances(*rows, processors=processors))


THREE = (*TWO[:1], NodeRange(1, 12 * GIB, 16 * GIB), NodeRange(2, 16 * GIB, 21 * GIB))


@pytest.mark.parametrize(
    ("there", "memmap"),
    [
        (machine_of(TWO, (10, 21), (21, 10), processors=(0, 1)), "memmap=1G!12G"),
        (machine_of(TWO, (10, 17), (17, 10), processors=(1,)), "memmap=1G!4G"),  # seen from node 1
        (machine_of(THREE, (10, 20, 30), (20, 10, 40), (30, 40, 10)), "memmap=1G!16G"),
        (machine_of(THREE, (10, 30, 20), (30, 10, 40), (20, 40, 10)), "memmap=1G!12G"),
        # as far as each other: the one without processors, else the first
        (machine_of(THREE, (10, 20, 20), (20, 10, 20), (20, 20, 10), processors=(0, 1)), "memmap=1G!16G"),
        (machine_of(THREE, (10, 20, 20), (20, 10, 20), (20, 20, 10)), "memmap=1G!12G"),
        # room for memory to be plugged in is no memory
        (machine_of((*TWO, NodeRange(2, 64 * GIB, 128 * GIB)), (10, 20), (20, 10)), "memmap=1G!12G"),
        # a node without memory is none to reserve on
        (machine_of(TWO, (10, 20, 90), (20, 10, 90), (90, 90, 10)), "memmap=1G!12G"),
    ],
)
def test_the_farthest_node_with_memory(there: Situation, memmap: str) -> None:
    made = plan(there, FAR)
    assert made.memmap == memmap
    (told,) = (w for w in made.warnings if "distance" in w)
    assert f"node {made.reservations[0].numa_node} is at distance" in told
    assert "emupmem bench" in told
    assert satisfied(there, FAR, made.reservations)
    assert not satisfied(
        there, FAR, plan(there, Request(size=GIB, offset=5 * GIB)).reservations
    ) or memmap.endswith("!4G")
    on = {n.node: n for n in there.nodes}[made.reservations[0].numa_node or 0]
    assert max(o.at_most for o in offers(there, FAR)) <= on.end - on.start
    assert rejected(there, FAR, made)


@pytest.mark.parametrize(
    ("there", "message", "hint"),
    [
        (
            machine_of(TWO[:1], (10,)),
            "has one NUMA node: .* no slowness to be had in software",
            "leave --far away",
        ),
        (situation(nodes=TWO[:1]), "has one NUMA node", "leave --far away"),
        (situation(nodes=TWO), "is not known here", "emupmem collect"),
        (situation(), "is not known here", "--numa-node N"),
        (machine_of(TWO, (10,)), "how far node 1 is is not known", "--numa-node 1"),
        (machine_of(TWO, (10, 10), (10, 10)), "all memory of this machine is equally near", "--numa-node N"),
    ],
)
def test_where_there_is_none(there: Situation, message: str, hint: str) -> None:
    for ask in (
        lambda: plan(there, FAR),
        lambda: satisfied(there, FAR, plan(there, Request(size=GIB)).reservations),
    ):
        with pytest.raises(EmupmemError, match=message) as caught:
            ask()
        assert hint in caught.value.hint


def test_a_far_node_without_room_is_said_to_be_far() -> None:
    low = (NodeRange(0, 3 * GIB, 21 * GIB), NodeRange(1, 0, 3 * GIB))
    with pytest.raises(EmupmemError, match="no usable range has room for 1 GiB on NUMA node 1") as caught:
        plan(machine_of(low, (10, 20), (20, 10)), FAR)
    assert caught.value.hint == "nothing above 4 GiB is free on node 1; omit --far"


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", (0,)), ("0-2,5", (0, 1, 2, 5)), ("", ()), ("0-", ()), ("x", ())]
)
def test_lists_of_nodes(here: FakeMachine, text: str, numbers: tuple[int, ...]) -> None:
    put(here, f"{NODE}/has_cpu", f"{text}\n")
    assert node_numbers(here, "has_cpu") == numbers


def two_nodes(machine: FakeMachine) -> None:
    put(machine, "/log", LOG.replace("NX (Ex", f"{SRAT}NX (Ex"))
    put(machine, f"{NODE}/has_cpu", "0\n")
    put(machine, f"{NODE}/node0/distance", "10 28\n")
    put(machine, f"{NODE}/node1/distance", "28 10\n")


def test_suggest_and_apply_take_it(run: Run, here: FakeMachine) -> None:
    two_nodes(here)
    shown = run("suggest", "--size", "1G", "--far")
    assert "sudo emupmem apply --size 1G --far" in shown.out
    assert "node 1 is at distance 28 from node 0 (itself: 10)" in shown.out + shown.err
    plans = [run("suggest", "--size", "1G", "--far", "--json").json["plan"]]
    data = io.BytesIO(pack(gather.gather_machine(here).archive))
    plans.append({"memmap": plan(collected.plan_from(unpack(data, "a"), "a").situation, FAR).memmap})
    assert {p["memmap"] for p in plans} == {"memmap=1G!12G"}
    assert run("apply", "--size", "1G", "--far", "--yes", "--json").json["memmap"] == "memmap=1G!12G"
    again = run("apply", "--size", "1G", "--far", "--check", "--json")
    assert (again.status, again.json["would_change"]) == (0, False)


def test_what_is_refused_on_the_command_line(run: Run, here: FakeMachine) -> None:
    two_nodes(here)
    both = run("apply", "--size", "1G", "--far", "--numa-node", "1")
    assert (both.status, both.err.splitlines()[0]) == (2, "emupmem: --far and --numa-node exclude each other")
    put(here, f"{NODE}/node1/distance", "rubbish\n")
    refused = run("apply", "--size", "1G", "--far", "--yes")
    assert (refused.status, refused.err.splitlines()) == (
        1,
        [
            "emupmem: how far node 1 is is not known: the running system has no memory of it",
            "         name it: --numa-node 1",
        ],
    )


def test_a_broken_table_is_no_table(here: FakeMachine) -> None:
    two_nodes(here)
    assert [d.node for d in read_node_distances(here)] == [0, 1]
    put(here, f"{NODE}/node0/distance", "10\n")
    put(here, f"{NODE}/node1/distance", "10 x\n")
    assert read_node_distances(here) == ()
