# SPDX-License-Identifier: Apache-2.0
"""Regions, namespaces and goals on a machine in a folder: ndctl and ipmctl are stand-ins that print files.

What they print has the form of the real ones; the real ndctl is in test_vm_nvdimm.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emupmem.model import GIB, MIB, EmupmemError
from emupmem.nvdimm import create as nvdimm_create
from emupmem.nvdimm import goal, ipmctl, show
from emupmem.nvdimm import view as nvdimm_view
from emupmem.nvdimm.wish import NamespaceWish, check_options
from tests.cli.runner import Run
from tests.fake import FakeMachine, build, put, running, script
from tests.nvdimm.test_ipmctl import REAL_NOTHING, REAL_VERSION

NDCTL = """#!/bin/sh
case "$1" in
  list) cat ROOT/buses; exit ;;
esac
echo "ndctl $*" >> ROOT/ran
if [ -e ROOT/fails ]; then cat ROOT/fails >&2; exit 240; fi
[ ! -e ROOT/then ] || cp ROOT/then ROOT/buses
[ ! -e ROOT/made ] || cat ROOT/made
"""

IPMCTL = """#!/bin/sh
case "$*" in
  version) cat ROOT/ipmctl/version; exit ;;
  create*) echo "ipmctl $*" >> ROOT/ran; cp ROOT/ipmctl/goal.set ROOT/ipmctl/goal; cat ROOT/ipmctl/create; exit ;;
  *-dimm*) cat ROOT/ipmctl/dimm ;;
  *-region*) cat ROOT/ipmctl/region ;;
  *-goal*) cat ROOT/ipmctl/goal ;;
esac
[ ! -e ROOT/ipmctl/status ] || exit "$(cat ROOT/ipmctl/status)"
"""

NO_GOAL = "There are no goal configs defined in the system.\n"
NO_REGION = "There are no Regions defined in the system.\n"
DIMM = """---DimmID=0x{0:04x}---
   Capacity=135744782336 B
   HealthState={1}
   LockState=Disabled
   DimmHandle=0x{0:04x}
   SocketID=0x{2:04x}
   MemoryCapacity={3} B
   AppDirectCapacity={4} B
"""
SET = """<?xml version="1.0"?>
 <RegionList><Region>
   <SocketID>0x0000</SocketID><PersistentMemoryType>AppDirect</PersistentMemoryType>
   <Capacity>270582939648 B</Capacity><FreeCapacity>0 B</FreeCapacity>
   <DimmID>0x0001, 0x0011</DimmID><ISetID>0xb8c12120c7bd1110</ISetID>
 </Region></RegionList>
"""
GOAL = """
 SocketID | DimmID | MemorySize  | AppDirect1Size | AppDirect2Size
===================================================================
 0x0000   | 0x0001 | 0.000 GiB   | 126.000 GiB    | 0.000 GiB
 0x0000   | 0x0011 | 0.000 GiB   | 126.000 GiB    | 0.000 GiB
A reboot is required to process new memory allocation goals.
"""


def space(name: str, /, mode: str = "fsdax", size: int = 62 * MIB, **more: Any) -> dict[str, Any]:
    number = name.removeprefix("namespace").removesuffix(".0")
    dev: dict[str, Any] = {"blockdev": f"pmem{number}{'s' if mode == 'sector' else ''}"}
    if mode == "devdax":
        dev = {"daxregion": {"align": 2 * MIB, "devices": [{"chardev": f"dax{name[9:]}", "mode": "devdax"}]}}
    return {"dev": name, "mode": mode, "size": size, **dev, **more}


def region(
    name: str,
    *spaces: dict[str, Any],
    free: int = 0,
    size: int = 512 * MIB,
    dimms: tuple[str, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    seed = {"dev": f"namespace{name[6:]}.9", "mode": "raw", "size": 0, "state": "disabled"}
    return {
        "dev": name,
        "size": size,
        "align": 16 * MIB,
        "available_size": free,
        "max_available_extent": free,
        "type": "pmem",
        "numa_node": int(name[6:]) % 2,
        "mappings": [{"dimm": d, "offset": 0, "length": size} for d in dimms],
        "capabilities": [
            {"mode": "sector", "sector_sizes": [512, 4096]},
            {"mode": "fsdax", "alignments": [4096, 2 * MIB]},
        ],
        "persistence_domain": "memory_controller",
        "namespaces": [*spaces, seed],
        **more,
    }


def buses(
    machine: FakeMachine, *regions: dict[str, Any], provider: str = "ACPI.NFIT", file: str = "buses"
) -> None:
    """Have ndctl tell of these regions, each with labels unless sysfs says other."""
    names = sorted({m["dimm"] for r in regions for m in r["mappings"]})
    dimms = [{"dev": n, "id": f"8680-{n}", "handle": int(n[4:]) * 16 + 1} for n in names]
    old = machine.root / file
    there = json.loads(old.read_text()) if old.exists() and provider != "ACPI.NFIT" else []
    bus = {"provider": provider, "dev": "ndbus0", "dimms": dimms, "regions": list(regions)}
    put(machine, f"/{file}", json.dumps([*there, bus]))
    for n in names:
        put(machine, f"{nvdimm_view.BUS}/{n}/commands", "get_size get_data set_data cmd_call \n")
    for r in regions:
        kind = machine.root / f"{nvdimm_view.BUS}/{r['dev']}/nstype".lstrip("/")
        if provider == "e820":
            start = (int(r["dev"][6:]) + 4) * GIB
            put(machine, f"{nvdimm_view.BUS}/{r['dev']}/size", str(r["size"]))
            put(machine, "/proc/cmdline", f"{machine.peek('/proc/cmdline')} memmap={r['size']}!{start}")
        if not kind.exists() or provider == "e820":
            put(machine, f"{nvdimm_view.BUS}/{r['dev']}/nstype", "4" if provider == "e820" else "5")
            put(machine, f"{nvdimm_view.BUS}/{r['dev']}/resource", hex((int(r["dev"][6:]) + 4) * GIB))


def labelless(machine: FakeMachine, name: str) -> None:
    put(machine, f"{nvdimm_view.BUS}/{name}/nstype", "4\n")


def block(machine: FakeMachine, name: str, number: str) -> None:
    put(machine, f"/sys/class/block/{name}/dev", number)


def nvdimm_machine(folder: Path) -> FakeMachine:
    """One region of 512 MiB on one module, with labels, empty."""
    made = build(folder)
    script(made, "ndctl", NDCTL.replace("ROOT", str(made.root)))
    for name in ("blkid", "wipefs"):
        script(
            made,
            name,
            f"#!/bin/sh\n[ ! -e '{made.root}/holds' ] || {{ cat '{made.root}/holds'; exit 0; }}\nexit 2\n",
        )
    script(made, "wipefs", "#!/bin/sh\n")
    put(made, "/proc/self/mountinfo", "21 1 254:1 / / rw shared:1 - ext4 /dev/vda1 rw\n")
    buses(made, region("region0", free=512 * MIB, dimms=("nmem0",)))
    return made


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """One region of 512 MiB on one module, with labels, empty."""
    return nvdimm_machine(tmp_path / "machine")


def optane(
    machine: FakeMachine, memory: int = 0, direct: int = 126 * GIB, version: str = "03.00.00.0468"
) -> None:
    """Two modules on socket 0, without a goal and without regions."""
    script(machine, "ipmctl", IPMCTL.replace("ROOT", str(machine.root)))
    put(
        machine,
        "/ipmctl/version",
        f"Intel(R) Optane(TM) Persistent Memory Command Line Interface Version {version}\n",
    )
    put(machine, "/ipmctl/dimm", "".join(DIMM.format(i, "Healthy", 0, memory, direct) for i in (1, 17)))
    put(machine, "/ipmctl/region", NO_REGION)
    put(machine, "/ipmctl/goal", NO_GOAL)
    put(machine, "/ipmctl/goal.set", GOAL)
    put(machine, "/ipmctl/create", GOAL)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(EmupmemError) as caught:
        call()
    return f"{caught.value.message} | {caught.value.hint}"


def create(machine: FakeMachine, **options: Any) -> nvdimm_create.NamespacePlan:
    return nvdimm_create.plan_create(machine, nvdimm_view.look_at_nvdimms(machine), NamespaceWish(**options))


def destroy(machine: FakeMachine, name: str) -> nvdimm_create.NamespacePlan:
    return nvdimm_create.plan_destroy(machine, nvdimm_view.look_at_nvdimms(machine), name)


def words(plan: nvdimm_create.NamespacePlan) -> list[str]:
    return [" ".join(c.argv) for c in plan.commands]


def ran(machine: FakeMachine) -> list[str]:
    log = machine.root / "ran"
    return log.read_text().splitlines() if log.exists() else []


# What is there -----------------------------------------------------------------------------------


def test_the_tree(machine: FakeMachine) -> None:
    buses(
        machine,
        region(
            "region0",
            space("namespace0.0", map="dev", align=2 * MIB),
            space("namespace0.1", "devdax", map="mem"),
            space("namespace0.2", "raw", state="disabled"),
            free=384 * MIB,
            dimms=("nmem0", "nmem1"),
        ),
    )
    buses(machine, region("region1", space("namespace1.0", size=GIB)), provider="e820")
    buses(machine, region("region2", free=GIB, size=GIB), provider="ramdax")
    block(machine, "pmem0", "259:0")
    put(machine, "/proc/self/mountinfo", "40 21 259:0 / /mnt/pmem0 rw - ext4 /dev/pmem0 rw,dax=always\n")
    optane(machine)
    view = nvdimm_view.look_at_nvdimms(machine)
    real, reserved, ramdax = view.regions
    assert [n.dev for n in real.namespaces] == ["/dev/pmem0", "/dev/dax0.1", ""], "no seed, in order"
    assert [n.align for n in real.namespaces] == [2 * MIB, 2 * MIB, 0]
    assert [(r.emulated, r.volatile, r.labelled) for r in view.regions] == [
        (False, False, True),
        (True, True, False),
        (True, True, True),
    ]
    assert [d.optane is not None for d in view.dimms] == [True, True]
    assert (reserved.free, ramdax.free) == (0, GIB)
    text = "\n".join(show.tree(view))
    assert (
        "region0  512 MiB · room for 384 MiB · ACPI.NFIT · node 0 · NVDIMM · persistence domain "
        "memory_controller" in text
    )
    assert "├─ nmem0  8680-nmem0 · Optane 0x0001, socket 0 · 126.4 GiB · Healthy" in text
    assert (
        "├─ namespace0.0  fsdax (map dev), 62 MiB\n│  └─ /dev/pmem0\n│     └─ /mnt/pmem0  ext4, DAX" in text
    )
    assert "└─ namespace0.2  raw, 62 MiB · disabled" in text
    assert (
        "region1  512 MiB · no labels: one namespace of all of it · e820 · node 1 · emulated, volatile"
        in text
    )


def test_what_is_said_of_each_kind(machine: FakeMachine) -> None:
    """Only what memmap= reserved (or ramdax divides) is emulated and volatile."""

    def said(provider: str) -> str:
        buses(machine, region("region1", space("namespace1.0", size=GIB)), file="again")
        text = (machine.root / "again").read_text().replace("ACPI.NFIT", provider)
        put(machine, "/buses", text)
        (found,) = nvdimm_view.look_at_nvdimms(machine).regions
        assert (found.emulated, found.volatile) == (("emulated" in found.nature),) * 2
        assert found.nature in show.tree(nvdimm_view.look_at_nvdimms(machine))[0]
        return found.nature

    put(machine, "/proc/cpuinfo", "flags\t\t: fpu sse2\n")
    assert said("ACPI.NFIT") == "NVDIMM · persistence domain memory_controller"
    assert said("CXL") == "CXL memory · persistence domain memory_controller"
    assert said("e820") == "marked as persistent by the firmware (type 12), not by memmap="
    put(machine, "/proc/cpuinfo", "flags\t\t: fpu sse2 hypervisor\n")
    assert said("ACPI.NFIT").startswith("virtual NVDIMM, kept by what the host has behind it")
    assert said("virtio-pmem") == "virtio-pmem, kept by what the host has behind it"
    assert said("ramdax") == "emulated, volatile"
    put(machine, f"{nvdimm_view.BUS}/region1/size", str(512 * MIB))
    put(machine, "/proc/cmdline", "quiet memmap=512M!5G")
    assert said("e820") == "emulated, volatile"


def test_bad_blocks_locked_modules_and_namespaces_without_size(machine: FakeMachine) -> None:
    disabled = space("namespace0.1", state="disabled")
    del disabled["size"]
    buses(machine, region("region0", space("namespace0.0"), disabled, dimms=("nmem0",)))
    listed = json.loads((machine.root / "buses").read_text())
    listed[0]["dimms"][0] |= {"security": "locked", "flag_failed_flush": True, "flag_smart_event": False}
    put(machine, "/buses", json.dumps(listed))
    put(machine, f"{nvdimm_view.BUS}/region0/badblocks", "8 1\n65536 16\n")
    put(machine, "/sys/class/block/pmem0/badblocks", "8 1\n")
    view = nvdimm_view.look_at_nvdimms(machine)
    text = "\n".join(show.tree(view))
    assert "17 bad blocks of 512 bytes" in text.splitlines()[0]
    assert "nmem0  8680-nmem0 · locked · failed: failed flush" in text
    assert "namespace0.0  fsdax, 62 MiB · 1 bad block of 512 bytes" in text
    assert "namespace0.1  fsdax, size unknown · disabled" in text
    optane(machine)
    assert "namespace0.1" in refused(lambda: goal.plan_goal(machine, asked("memory"))), (
        "it would be destroyed"
    )
    put(machine, "/ipmctl/dimm", DIMM.format(1, "Healthy", 0, 0, 0).replace("Disabled", "Unlocked, Frozen"))
    del listed[0]["dimms"][0]["security"]
    put(machine, "/buses", json.dumps(listed))
    assert "Healthy · unlocked, frozen" in "\n".join(show.tree(nvdimm_view.look_at_nvdimms(machine)))


def test_before_there_is_a_cxl_region(machine: FakeMachine) -> None:
    put(machine, "/buses", "[]")
    assert "nvdimm goal" in refused(lambda: create(machine))
    put(machine, "/sys/bus/cxl/devices/mem0/pmem/size", "0x10000000\n")
    put(machine, "/sys/bus/cxl/devices/mem1/pmem/size", "0x0\n")
    put(machine, "/sys/bus/cxl/devices/decoder0.0/cap_pmem", "0\n")
    put(machine, "/sys/bus/cxl/devices/decoder0.1/cap_pmem", "1\n")
    command = "sudo cxl create-region -t pmem -m -d decoder0.1 mem0"
    assert f"there is no region | {command}" in refused(lambda: create(machine))
    assert command in refused(lambda: create(machine, region="region0"))
    assert nvdimm_view.look_at_nvdimms(machine).warnings == (
        f"a CXL device has persistent capacity in no region: {command}",
    )
    put(machine, "/sys/bus/cxl/devices/pmem_region0/size", "0x10000000\n")
    assert nvdimm_view.look_at_nvdimms(machine).warnings == ()


def test_sockets(machine: FakeMachine) -> None:
    buses(
        machine, region("region0", free=GIB, dimms=("nmem0",)), region("region1", free=GIB, dimms=("nmem1",))
    )
    view = nvdimm_view.look_at_nvdimms(machine, 1)
    assert [(r.name, [d.name for d in view.dimms]) for r in view.regions] == [("region1", ["nmem1"])]
    assert "no persistent memory on socket 5 | there is something on 0, 1" in refused(
        lambda: nvdimm_view.look_at_nvdimms(machine, 5)
    )
    optane(machine)  # where ipmctl knows the modules, it tells the socket
    assert [r.name for r in nvdimm_view.look_at_nvdimms(machine, 0).regions] == ["region0", "region1"]


def test_nothing_there(machine: FakeMachine) -> None:
    put(machine, "/buses", "")
    assert show.tree(nvdimm_view.look_at_nvdimms(machine)) == ["There is no persistent memory."]
    assert "there is no region | on Optane modules: sudo emupmem nvdimm goal" in refused(
        lambda: create(machine)
    )


def test_ndctl_is_missing_or_talks_otherwise(machine: FakeMachine) -> None:
    for text in ("{not json", '[{"provider": "x", "regions": [{"size": 1}]}]', '["bus"]'):
        put(machine, "/buses", text)
        assert "in a form that emupmem does not know" in refused(lambda: nvdimm_view.look_at_nvdimms(machine))
    script(machine, "ndctl", "#!/bin/sh\necho 'no such bus' >&2\nexit 1\n")
    assert "ndctl list failed: no such bus" in refused(lambda: nvdimm_view.look_at_nvdimms(machine))
    (machine.root / "sbin/ndctl").unlink()
    assert "ndctl is not installed | apt-get install ndctl" in refused(
        lambda: nvdimm_view.look_at_nvdimms(machine)
    )


def test_an_ndctl_without_capabilities(machine: FakeMachine) -> None:
    text = NDCTL.replace("list)", "list) case $2 in *C*) echo usage >&2; exit 129 ;; esac;")
    script(machine, "ndctl", text.replace("ROOT", str(machine.root)))
    assert nvdimm_view.look_at_nvdimms(machine).regions


def test_an_ipmctl_without_modules_or_that_fails_is_no_obstacle_to_showing(machine: FakeMachine) -> None:
    optane(machine)
    put(machine, "/ipmctl/dimm", "No PMem modules in the system.\n")
    put(machine, "/ipmctl/status", "1")
    assert nvdimm_view.look_at_nvdimms(machine).warnings == ()
    put(machine, "/ipmctl/dimm", "\nError: GetMemoryResourcesInfo Failed\n")
    view = nvdimm_view.look_at_nvdimms(machine)
    assert view.regions
    assert view.warnings == ("ipmctl show failed: Error: GetMemoryResourcesInfo Failed",)


# Create ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", nvdimm_view.MODES)
def test_create_is_data(machine: FakeMachine, mode: str) -> None:
    plan = create(machine, size=64 * MIB, mode=mode)
    assert words(plan) == [f"ndctl create-namespace -r region0 -m {mode} -s {64 * MIB}"]
    assert plan.question == ""
    assert ran(machine) == []


def test_create_takes_all_that_is_free(machine: FakeMachine) -> None:
    buses(machine, region("region0", free=100 * MIB, dimms=("nmem0",)))
    assert words(create(machine, map="mem", align=4096)) == [
        f"ndctl create-namespace -r region0 -m fsdax -s {96 * MIB} -M mem -a 4096"
    ]


def test_create_chooses_a_real_region_with_room(machine: FakeMachine) -> None:
    buses(
        machine,
        region("region1", free=64 * MIB, dimms=("nmem0",)),
        region("region2", free=512 * MIB, dimms=("nmem1",)),
    )
    buses(machine, region("region0", free=GIB, size=GIB), provider="ramdax")
    assert create(machine, size=64 * MIB).region == "region1"
    assert create(machine, size=128 * MIB).region == "region2"
    assert create(machine, size=GIB).region == "region0"
    assert "no region has room for 2 GiB in one piece | the most is 1 GiB in region0" in refused(
        lambda: create(machine, size=2 * GIB)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region": "region7"}, "there is no region region7 | there is region0"),
        (
            {"size": 65 * MIB},
            "65M is not a multiple of 16 MiB, in which region0 is divided | --size 80M is the next",
        ),
        ({"size": 0, "region": "region0"}, "0 is not a multiple of 16 MiB"),
        ({"size": 511 * MIB}, "511M is not a multiple of 16 MiB, in which region0 is divided | --size 512M"),
        (
            {"size": 528 * MIB, "region": "region0"},
            "no room for 528 MiB in one piece | the largest that fits is 512M",
        ),
        ({"align": 16 * MIB}, "region0 cannot align to 16 MiB | it can 4K, 2M"),
        ({"align": GIB}, "region0 cannot align to 1 GiB"),
    ],
)
def test_create_refuses(machine: FakeMachine, options: dict[str, Any], message: str) -> None:
    assert message in refused(lambda: create(machine, **options))
    assert ran(machine) == []


def test_create_looks_at_the_region(machine: FakeMachine) -> None:
    buses(machine, region("region0", dimms=("nmem0",)))
    assert "region0 is full" in refused(lambda: create(machine, region="region0"))
    assert "no region has room for a namespace in one piece | all are full" in refused(
        lambda: create(machine)
    )
    buses(machine, region("region0", free=8 * MIB, dimms=("nmem0",)))
    assert "region0 has only 8 MiB left" in refused(lambda: create(machine, region="region0"))
    buses(machine, region("region0", free=GIB, state="disabled"))
    assert "region0 is disabled | sudo ndctl enable-region" in refused(
        lambda: create(machine, region="region0")
    )
    buses(machine, region("region0", free=GIB))
    put(machine, f"{nvdimm_view.BUS}/region0/resource", "0x11fe00000")
    assert "starts at 0x11fe00000, which is not a multiple of 16 MiB: no devdax there" in refused(
        lambda: create(machine, mode="devdax", size=64 * MIB)
    )
    assert create(machine, mode="sector", size=64 * MIB)
    buses(machine, region("region0", free=GIB), region("region1", free=GIB))
    assert create(machine, mode="devdax", size=64 * MIB).region == "region1"


def test_sizes_are_multiples_over_all_interleaved_modules(machine: FakeMachine) -> None:
    six = tuple(f"nmem{n}" for n in range(6))
    buses(machine, region("region0", free=96 * MIB * 10, size=GIB, dimms=six, align=96 * MIB))
    assert (
        "128M is not a multiple of 96 MiB, in which region0 is divided | --size 192M is the next"
        in refused(lambda: create(machine, size=128 * MIB))
    )
    buses(machine, region("region0", free=24 * MIB * 10, size=GIB, dimms=six, align=0))
    put(machine, f"{nvdimm_view.BUS}/region0/align", "0x0")
    assert "not a multiple of 12 MiB" in refused(lambda: create(machine, size=32 * MIB, align=2 * MIB))
    assert "fsdax needs at least 16 MiB" in refused(lambda: create(machine, size=12 * MIB, align=2 * MIB))
    assert create(machine, size=12 * MIB, mode="raw")


@pytest.mark.parametrize("mode", ["raw", "sector"])
def test_options_that_exclude_each_other(mode: str) -> None:
    assert f"--map belongs to fsdax and devdax | {mode} has no page map" in refused(
        lambda: check_options(mode, "mem", "")
    )
    assert "--align belongs to" in refused(lambda: check_options(mode, "", "2M"))
    assert check_options("fsdax", "dev", "2M") == 2 * MIB
    assert "an alignment of 0 is none" in refused(lambda: check_options("fsdax", "", "0"))
    assert "alignment 'x' is not a size" in refused(lambda: check_options("fsdax", "", "x"))


def test_without_labels_only_the_mode_changes(machine: FakeMachine) -> None:
    buses(machine, region("region0", space("namespace0.0", "raw", 512 * MIB), dimms=("nmem0",)))
    labelless(machine, "region0")
    assert "no region has labels: each is one namespace of all of it | --region region0" in refused(
        lambda: create(machine)
    )
    assert (
        "region0 has no labels: its one namespace always has its whole size"
        " | sudo emupmem nvdimm destroy namespace0.0 writes labels"
        in refused(lambda: create(machine, region="region0", size=64 * MIB))
    )
    plan = create(machine, region="region0", mode="devdax", map="dev")
    assert words(plan) == ["ndctl create-namespace -f -e namespace0.0 -m devdax -M dev"]
    assert plan.question == "All content of namespace0.0 (raw, 512 MiB) is lost. Make it devdax?"
    put(machine, "/holds", "TYPE=xfs\n")
    assert "/dev/pmem0 holds xfs, which another mode would destroy | sudo wipefs -a /dev/pmem0" in refused(
        lambda: create(machine, region="region0")
    )
    (machine.root / "holds").unlink()
    buses(machine, region("region0", space("namespace0.0", "raw", state="disabled"), dimms=("nmem0",)))
    assert "nobody can see what it holds | sudo ndctl enable-namespace namespace0.0" in refused(
        lambda: create(machine, region="region0")
    )
    buses(machine, region("region0", space("namespace0.0", "raw"), size=510 * MIB, dimms=("nmem0",)))
    assert "not a multiple of 16 MiB: ndctl cannot change its mode" in refused(
        lambda: create(machine, region="region0")
    )


def test_a_region_without_labels_and_without_a_namespace(machine: FakeMachine) -> None:
    buses(machine, region("region0", dimms=("nmem0",)))
    labelless(machine, "region0")
    said = "region0 has no labels and no namespace | sudo dmesg may show why"
    assert said in refused(lambda: create(machine, region="region0"))
    assert said in refused(lambda: create(machine, region="region0", size=64 * MIB))


def test_a_reserved_range_is_not_divided_here(machine: FakeMachine) -> None:
    put(machine, "/buses", "[]")
    buses(machine, region("region0", space("namespace0.0", size=GIB), size=GIB), provider="e820")
    assert "leave --size out; sudo emupmem namespaces divides the reserved range" in refused(
        lambda: create(machine, region="region0", size=64 * MIB)
    )
    assert create(machine, region="region0", mode="sector").takes
    block(machine, "pmem0", "259:0")
    put(machine, "/proc/self/mountinfo", "40 21 259:0 / /mnt rw - ext4 /dev/pmem0 rw\n")
    assert "/dev/pmem0 is mounted on /mnt" in refused(
        lambda: create(machine, region="region0", mode="sector")
    )


def test_create_tells_what_came_of_it(machine: FakeMachine) -> None:
    buses(machine, region("region0", space("namespace0.3", "sector"), dimms=("nmem0",)), file="then")
    put(machine, "/made", json.dumps({"dev": "namespace0.3", "size": "62.00 MiB (65.01 MB)"}))
    put(machine, "/dev/pmem0.3s", "")
    made = nvdimm_create.create_namespace(machine, create(machine, mode="sector"))
    assert (made.dev, made.mode) == ("/dev/pmem0.3s", "sector")
    assert nvdimm_create.remains(machine, made) == ""
    assert show.made_lines(made, "") == ["✓ namespace0.3 · sector, 62 MiB, /dev/pmem0.3s"]
    put(machine, "/holds", "TYPE=ext4\n")
    assert nvdimm_create.remains(machine, made) == "ext4"
    assert show.made_lines(made, "ext4")[1].startswith("It still holds ext4 of before: sudo wipefs -a")


def test_create_fails_in_ndctls_words(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = create(machine)
    put(
        machine,
        "/fails",
        "  Error: namespace1.0 misaligned to 16M\n\nfailed to create namespace: Invalid argument\n",
    )
    message = refused(lambda: nvdimm_create.create_namespace(machine, plan))
    assert message.startswith("ndctl create-namespace -r region0")
    assert "failed: namespace1.0 misaligned to 16M |" in message
    (machine.root / "fails").unlink()
    assert "ndctl made no namespace" in refused(lambda: nvdimm_create.create_namespace(machine, plan)), (
        "status 0 and nothing done"
    )
    buses(machine, region("region0", space("namespace0.0"), dimms=("nmem0",)), file="then")
    put(machine, "/made", json.dumps({"dev": "namespace0.0"}))
    monkeypatch.setattr(nvdimm_create, "wait_for", lambda ready, seconds: ready())
    assert "namespace0.0 was made, but has no device" in refused(
        lambda: nvdimm_create.create_namespace(machine, plan)
    )


def test_json_says_changed_where_something_was_made_before_it_failed(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(nvdimm_create, "wait_for", lambda ready, seconds: ready())
    put(machine, "/fails", "failed to create namespace: Invalid argument\n")
    assert run("create", "--json").json["changed"] is False
    (machine.root / "fails").unlink()
    buses(machine, region("region0", space("namespace0.0"), dimms=("nmem0",)), file="then")
    put(machine, "/made", json.dumps({"dev": "namespace0.0"}))
    done = run("create", "--json")
    assert "was made, but has no device" in done.err
    assert (done.status, done.json["changed"]) == (1, True)


# Destroy --------------------------------------------------------------------------------------------


def test_destroy_by_each_name(machine: FakeMachine) -> None:
    buses(machine, region("region0", space("namespace0.1", "sector"), dimms=("nmem0",)))
    for name in ("namespace0.1", "/dev/pmem0.1s", "pmem0.1s"):
        plan = destroy(machine, name)
        assert words(plan) == ["ndctl destroy-namespace -f namespace0.1"]
        assert plan.question == "All content of namespace0.1 (/dev/pmem0.1s), 62 MiB, is lost. Destroy it?"
    for name in ("namespace0.9", "pmem7", "/dev/vda", ""):
        assert f"there is no namespace {name} | there is namespace0.1" in refused(
            lambda name=name: destroy(machine, name)  # type: ignore[misc]
        )
    buses(machine, region("region0"))
    assert "there is none at all" in refused(lambda: destroy(machine, "namespace0.0"))


def test_destroy_looks_whether_it_is_gone(machine: FakeMachine) -> None:
    buses(machine, region("region0", space("namespace0.0"), dimms=("nmem0",)))
    plan = destroy(machine, "namespace0.0")
    assert "ndctl did not destroy namespace0.0" in refused(
        lambda: nvdimm_create.destroy_namespace(machine, plan)
    )
    buses(machine, region("region0", free=512 * MIB, dimms=("nmem0",)), file="then")
    assert nvdimm_create.destroy_namespace(machine, plan).name == "namespace0.0"


def test_destroy_without_labels_writes_them(machine: FakeMachine) -> None:
    two = ("nmem0", "nmem1")
    buses(machine, region("region0", space("namespace0.0", "raw"), dimms=two))
    labelless(machine, "region0")
    plan = destroy(machine, "namespace0.0")
    assert words(plan) == [
        "ndctl disable-region region0",
        "ndctl init-labels nmem0 nmem1",
        "ndctl enable-region region0",
    ]
    put(machine, "/fails", "no")
    assert "ndctl disable-region region0 failed" in refused(
        lambda: nvdimm_create.destroy_namespace(machine, plan)
    )
    assert ran(machine)[-1] == "ndctl enable-region region0", "not left disabled"
    put(machine, f"{nvdimm_view.BUS}/nmem1/commands", "get_size get_data")
    assert "has no labels and no room for them: it cannot be destroyed" in refused(
        lambda: destroy(machine, "namespace0.0")
    )


def test_labels_of_another_region_are_not_overwritten(machine: FakeMachine) -> None:
    buses(
        machine,
        region("region0", space("namespace0.0", "raw"), dimms=("nmem0",)),
        region("region1", space("namespace1.0"), dimms=("nmem0", "nmem1")),
    )
    labelless(machine, "region0")
    assert "it cannot be destroyed" in refused(lambda: destroy(machine, "namespace0.0"))


def test_a_reserved_range_cannot_be_destroyed(machine: FakeMachine) -> None:
    put(machine, "/buses", "[]")
    buses(machine, region("region0", space("namespace0.0", size=GIB), size=GIB), provider="e820")
    message = refused(lambda: destroy(machine, "namespace0.0"))
    assert (
        "which memmap= made and which has no labels: it cannot be destroyed | sudo emupmem remove" in message
    )
    assert ran(machine) == []


def test_what_is_used_is_not_destroyed(machine: FakeMachine) -> None:
    buses(
        machine,
        region(
            "region0", space("namespace0.0"), space("namespace0.1", "devdax"), space("namespace0.2", "sector")
        ),
    )
    block(machine, "pmem0", "259:0")
    put(machine, "/proc/self/mountinfo", "40 21 259:0 / /mnt rw - ext4 /dev/pmem0 rw\n")
    put(machine, "/proc/77/comm", "database")
    put(machine, "/proc/77/maps", "7f00-7f01 rw-s 00000000 103:00 12      /mnt/file\n")
    assert (
        "/dev/pmem0 is mounted on /mnt, in use by database (process 77) | sudo emupmem umount /mnt first"
        in refused(lambda: destroy(machine, "namespace0.0"))
    )
    put(machine, "/proc/self/mountinfo", "")
    put(machine, "/sys/class/block/pmem0/holders/dm-3/dev", "253:3")
    assert "/dev/pmem0 is a part of dm-3" in refused(lambda: destroy(machine, "namespace0.0"))
    put(machine, "/proc/swaps", "Filename Type Size\n/dev/pmem0.2s partition 16000\n")
    assert "/dev/pmem0.2s is swap space | sudo swapoff" in refused(lambda: destroy(machine, "namespace0.2"))
    assert destroy(machine, "namespace0.1")
    link = machine.root / "proc/77/fd/3"
    link.parent.mkdir()
    link.symlink_to("/dev/dax0.1")
    assert "/dev/dax0.1 is in use by database (process 77)" in refused(
        lambda: destroy(machine, "namespace0.1")
    )
    link.unlink()
    put(machine, "/proc/77/maps", "7f00-7f01 rw-s 00000000 00:05 99      /dev/dax0.1\n")
    assert "/dev/dax0.1 is in use by database (process 77)" in refused(
        lambda: destroy(machine, "namespace0.1")
    )


def test_ram_is_not_destroyed(machine: FakeMachine) -> None:
    one = space("namespace0.1", "devdax")
    one["daxregion"]["devices"][0]["mode"] = "system-ram"
    buses(machine, region("region0", one))
    message = refused(lambda: destroy(machine, "namespace0.1"))
    assert "in use as RAM (/dev/dax0.1) | daxctl reconfigure-device --mode=devdax dax0.1" in message


# The goal -------------------------------------------------------------------------------------------


def asked(
    mode: str = "appdirect", percent: int | None = None, socket: int | None = None
) -> ipmctl.WantedGoal:
    return ipmctl.wanted(mode, percent, socket)


def test_the_way_of_a_goal(machine: FakeMachine) -> None:
    """No regions, the goal, a reboot, regions: the same command tells each time where it is."""
    optane(machine, direct=0)
    put(machine, "/buses", "[]")
    plan = goal.plan_goal(machine, asked())
    assert (plan.state, plan.regions) == ("needed", ())
    assert plan.question == (
        "No region is there to lose. At the next boot the firmware reconfigures 2 modules. Set the goal?"
    )
    done = goal.set_goal(machine, plan)
    assert ran(machine) == ["ipmctl create -f -goal PersistentMemoryType=AppDirect"]
    assert done.state == "pending"
    assert "a reboot is required" in show.goal_lines(done)[0]
    again = goal.plan_goal(machine, asked())
    assert (again.state, len(again.goal)) == ("pending", 2)
    assert goal.set_goal(machine, again) == again
    assert len(ran(machine)) == 1
    optane(machine)  # the reboot
    put(machine, "/ipmctl/region", SET)
    buses(machine, region("region0", free=252 * GIB, size=252 * GIB, dimms=("nmem0", "nmem1")))
    there = goal.plan_goal(machine, asked())
    assert there.state == "regions"
    assert [" ".join(c.argv) for c in there.commands] == [
        f"ndctl create-namespace -r region0 -m fsdax -s {252 * GIB}"
    ]
    assert there.question == (
        "Nothing is lost. Make an fsdax namespace of all the room in region0 (252 GiB)?"
    )
    assert show.goal_lines(there) == [
        "✓ the modules are as requested: region0 (252 GiB)",
        "Next:  sudo emupmem nvdimm create",
    ]
    made = region("region0", space("namespace0.0", size=248 * GIB), size=252 * GIB, dimms=("nmem0", "nmem1"))
    buses(machine, made)
    last = goal.plan_goal(machine, asked())
    assert (last.state, last.commands) == ("done", ())
    assert show.goal_lines(last) == [
        "✓ the modules are as requested: region0 (252 GiB)",
        "  namespace0.0 (/dev/pmem0), fsdax",
    ]


def test_a_goal_makes_namespaces_only_where_none_is(machine: FakeMachine) -> None:
    """After a run that ended half way the same command makes the rest, and leaves other modules alone."""
    optane(machine)
    put(machine, "/ipmctl/region", SET)
    half = space("namespace0.0", size=GIB)
    buses(
        machine,
        region("region0", half, free=251 * GIB, size=252 * GIB, dimms=("nmem0",)),
        region("region1", free=252 * GIB, size=252 * GIB, dimms=("nmem1",)),
        region("region2", free=GIB, size=GIB, dimms=("nmem5",)),
        region("region3", free=GIB, size=GIB),
        region("region4", free=GIB, size=GIB, dimms=("nmem1",), state="disabled"),
    )
    assert [p.region for p in goal.plan_goal(machine, asked()).makes] == ["region1"]
    put(machine, f"{nvdimm_view.BUS}/region1/resource", "0x11fe00000")
    assert goal.plan_goal(machine, asked()).state == "done", "no fsdax at that address"
    put(machine, f"{nvdimm_view.BUS}/region1/resource", hex(GIB))
    assert goal.plan_goal(machine, asked()).state == "regions"
    labelless(machine, "region1")
    assert goal.plan_goal(machine, asked()).state == "done"


def test_memory_needs_no_region(machine: FakeMachine) -> None:
    optane(machine, memory=126 * GIB, direct=0)
    put(machine, "/buses", "[]")
    plan = goal.plan_goal(machine, asked("memory"))
    assert show.goal_lines(plan) == ["✓ the modules are RAM, as asked"]
    assert goal.plan_goal(machine, asked()).state == "needed"


def test_a_goal_deletes_no_namespace_that_was_not_named(machine: FakeMachine) -> None:
    optane(machine)
    put(machine, "/ipmctl/region", SET)
    mine = region("region0", space("namespace0.0"), space("namespace0.1", "devdax"), dimms=("nmem0", "nmem1"))
    buses(machine, mine, region("region1", space("namespace1.0"), dimms=("nmem5",)))
    buses(machine, region("region2", space("namespace2.0")), provider="e820")
    message = refused(lambda: goal.plan_goal(machine, asked("memory")))
    assert message == (
        "the goal would destroy namespace0.0 (/dev/pmem0), namespace0.1 (/dev/dax0.1), and emupmem deletes only"
        " what is named | sudo emupmem nvdimm destroy namespace0.0; sudo emupmem nvdimm destroy namespace0.1"
    )
    buses(machine, region("region0", free=GIB, dimms=("nmem0",)), region("region1", space("namespace1.0")))
    assert "destroy namespace1.0" in refused(lambda: goal.plan_goal(machine, asked("memory"))), "in doubt"
    buses(machine, region("region0", free=252 * GIB, size=252 * GIB, dimms=("nmem0", "nmem1")))
    assert goal.plan_goal(machine, asked("memory")).question.startswith(
        "This deletes region0 (252 GiB) and all content on it."
    )
    assert ran(machine) == []


def test_the_interleave_set_tells_too(machine: FakeMachine) -> None:
    optane(machine)
    put(machine, "/ipmctl/region", SET)
    signed = 0xB8C12120C7BD1110 - (1 << 64)  # as ndctl prints it
    buses(machine, region("region0", space("namespace0.0"), dimms=("nmem7",), iset_id=signed))
    assert "destroy namespace0.0" in refused(lambda: goal.plan_goal(machine, asked("memory")))


def test_goals_that_wait_or_failed(machine: FakeMachine) -> None:
    optane(machine, direct=0)
    put(machine, "/ipmctl/goal", GOAL)
    assert (
        "another goal waits for a reboot: 0 B RAM, 252 GiB App Direct | sudo ipmctl delete -goal drops it"
        in refused(lambda: goal.plan_goal(machine, asked("memory")))
    )
    put(
        machine,
        "/ipmctl/goal",
        "---DimmID=0x0001---\n   MemorySize=0 B\n   AppDirect1Size=126.000 GiB\n   Status=Failed - Bad request\n",
    )
    assert "the firmware did not take the goal of 0x0001: Failed - Bad request" in refused(
        lambda: goal.plan_goal(machine, asked())
    )


def test_a_goal_of_another_socket_does_not_count(machine: FakeMachine) -> None:
    """ipmctl before 03.00 shows the goals of all sockets, whichever is asked for."""
    optane(machine, direct=0)
    put(machine, "/buses", "[]")
    put(
        machine, "/ipmctl/dimm", "".join(DIMM.format(i, "Healthy", s, 0, 0) for i, s in ((1, 0), (0x1001, 1)))
    )
    put(machine, "/ipmctl/goal", GOAL)
    assert goal.plan_goal(machine, asked(socket=0)).state == "pending"
    for told in (GOAL, "---DimmID=0x0001---\n   MemorySize=0 B\n   AppDirect1Size=126.000 GiB\n"):
        put(machine, "/ipmctl/goal", told)
        plan = goal.plan_goal(machine, asked(socket=1))
        assert (plan.state, [d.id for d in plan.dimms]) == ("needed", ["0x1001"])
        put(machine, "/ipmctl/goal.set", told)
        assert "reports no goal" in refused(lambda p=plan: goal.set_goal(machine, p))  # type: ignore[misc]
    put(machine, "/ipmctl/region", SET)
    put(machine, "/ipmctl/goal", "There are no goal configs defined on the specified socket.\n")
    put(
        machine,
        "/ipmctl/dimm",
        "".join(DIMM.format(i, "Healthy", s, 0, 126 * GIB) for i, s in ((1, 0), (0x1001, 1))),
    )
    assert goal.plan_goal(machine, asked(socket=0)).state == "done"
    assert goal.plan_goal(machine, asked(socket=1)).state == "needed", "the set is of socket 0"


def test_the_ipmctl_of_debian_12_without_modules(machine: FakeMachine) -> None:
    optane(machine)
    text, status = REAL_NOTHING
    script(
        machine,
        "ipmctl",
        f"#!/bin/sh\n[ $1 != version ] || {{ echo '{REAL_VERSION}'; exit; }}\necho '{text}'\nexit {status}\n",
    )
    assert nvdimm_view.look_at_nvdimms(machine).warnings == ()
    assert "ipmctl finds no Optane modules on socket 0 |" in refused(
        lambda: goal.plan_goal(machine, asked(socket=0))
    )


def test_what_keeps_a_goal_from_being_set(machine: FakeMachine) -> None:
    assert "ipmctl is not installed" in refused(lambda: goal.plan_goal(machine, asked()))
    optane(machine, version="02.00.00.3809")
    assert "ipmctl 2.0.0.3809 writes goals that no firmware takes" in refused(
        lambda: goal.plan_goal(machine, asked())
    )
    optane(machine)
    put(machine, "/ipmctl/dimm", "No DIMMs in the system.\n")
    assert "ipmctl finds no Optane modules on socket 1 | other NVDIMMs" in refused(
        lambda: goal.plan_goal(machine, asked(socket=1))
    )
    put(machine, "/ipmctl/dimm", DIMM.format(1, "Non-functional", 0, 0, 0))
    assert "no module is in order: 0x0001 is Non-functional" in refused(
        lambda: goal.plan_goal(machine, asked())
    )
    put(
        machine, "/ipmctl/dimm", "The ipmctl command you have attempted to execute requires root privileges\n"
    )
    assert "ipmctl show failed: The ipmctl command" in refused(lambda: goal.plan_goal(machine, asked()))
    put(machine, "/ipmctl/dimm", '<?xml version="1.0"?>\n<DimmList>\n</DimmList>\n')
    assert "ipmctl finds no Optane modules |" in refused(lambda: goal.plan_goal(machine, asked()))
    put(machine, "/ipmctl/dimm", DIMM.format(1, "Healthy", 0, 0, 0))
    put(machine, "/ipmctl/goal", "Goals are shown in a new way\n")
    assert "-goal answered in a form that emupmem does not know" in refused(
        lambda: goal.plan_goal(machine, asked())
    )
    put(machine, "/ipmctl/dimm", "")
    put(machine, "/ipmctl/status", "3")
    assert "ipmctl show failed: status 3" in refused(lambda: goal.plan_goal(machine, asked()))
    (machine.root / "sbin/ndctl").unlink()
    assert "ndctl is not installed" in refused(lambda: goal.plan_goal(machine, asked()))


def test_ipmctl_refuses_the_goal(machine: FakeMachine) -> None:
    optane(machine, direct=0)
    plan = goal.plan_goal(machine, asked())
    put(machine, "/ipmctl/goal.set", NO_GOAL)
    put(
        machine,
        "/ipmctl/create",
        "Create region configuration goal failed: Error (118) - Platform does not.\n",
    )
    assert "ipmctl create failed: Create region configuration goal failed: Error (118)" in refused(
        lambda: goal.set_goal(machine, plan)
    )
    put(machine, "/ipmctl/create", GOAL)
    assert "ipmctl reports no goal after setting one" in refused(lambda: goal.set_goal(machine, plan))


def test_secured_modules_are_told(machine: FakeMachine) -> None:
    optane(machine, direct=0)
    text = DIMM.format(1, "Healthy", 0, 0, 0).replace("Disabled", "Locked")
    put(machine, "/ipmctl/dimm", text)
    (warning,) = goal.plan_goal(machine, asked()).warnings
    assert warning.startswith("0x0001 is Locked")


def test_an_old_ipmctl_is_asked_the_plain_way(machine: FakeMachine) -> None:
    optane(machine)
    old = IPMCTL.replace(
        'case "$*" in', 'case "$*" in\n *nvmxml*) echo "Syntax Error: Invalid token -o."; exit 1 ;;'
    )
    script(machine, "ipmctl", old.replace("ROOT", str(machine.root)))
    put(machine, "/ipmctl/dimm", "DimmID  Capacity   HealthState\n0x0001  126.4 GiB  Healthy\n")
    put(machine, "/buses", "[]")
    assert [d.id for d in goal.plan_goal(machine, asked()).dimms] == ["0x0001"]


# The commands ---------------------------------------------------------------------------------------


@pytest.fixture
def run(run: Run, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> Run:
    running(monkeypatch.setattr, machine)
    return functools.partial(run, "nvdimm")


@pytest.mark.parametrize(
    "argv",
    [
        ("create", "--mode", "raw", "--map", "mem"),
        ("create", "--mode", "sector", "--align", "2M"),
        ("create", "--mode", "memory"),
        ("create", "--size", "64MB"),
        ("create", "--map", "disk"),
        ("goal",),
        ("goal", "--mode", "memory", "--memory-percent", "50"),
        ("goal", "--mode", "appdirect", "--memory-percent", "100"),
        ("goal", "--mode", "appdirect", "--memory-percent", "101"),
        ("goal", "--mode", "appdirect", "--socket", "-1"),
        ("show", "--socket", "first"),
        ("destroy",),
    ],
)
def test_wrong_usage(machine: FakeMachine, run: Run, argv: tuple[str, ...]) -> None:
    assert run(*argv)[0] == 2
    assert ran(machine) == []


@pytest.mark.parametrize(
    "argv",
    [
        ("show",),
        ("goal", "--mode", "appdirect", "--yes"),
        ("create", "--yes"),
        ("destroy", "namespace0.0", "--yes"),
    ],
)
def test_without_root(machine: FakeMachine, run: Run, argv: tuple[str, ...]) -> None:
    machine.root_user = False
    status, out, err = run(*argv, "--json")
    assert status == 1
    assert "needs root" in err
    assert "sudo emupmem nvdimm" in json.loads(out)["error"]
    assert ran(machine) == []


def test_show(machine: FakeMachine, run: Run) -> None:
    status, out, _ = run("show")
    assert status == 0
    assert out.startswith("region0  512 MiB · room for 512 MiB")
    status, out, _ = run("show", "--json")
    assert json.loads(out)["regions"][0]["free"] == 512 * MIB


def test_create_and_destroy(machine: FakeMachine, run: Run) -> None:
    status, out, err = run("create", "--size", "64M", "--dry-run")
    assert (status, ran(machine)) == (0, [])
    assert f"ndctl create-namespace -r region0 -m fsdax -s {64 * MIB}" in err
    buses(machine, region("region0", space("namespace0.0"), free=448 * MIB, dimms=("nmem0",)), file="then")
    put(machine, "/made", json.dumps({"dev": "namespace0.0"}))
    put(machine, "/dev/pmem0", "")
    status, out, _ = run("create", "--size", "64M")
    assert status == 0
    assert out == "✓ namespace0.0 · fsdax, 62 MiB, /dev/pmem0\nNext:  sudo emupmem mount /dev/pmem0\n"

    status, out, err = run("destroy", "namespace0.0", "--json")
    assert status == 1
    assert "there is no terminal to ask on" in json.loads(out)["error"]
    assert len(ran(machine)) == 1
    assert run("destroy", "namespace0.0", "--dry-run")[0] == 0
    assert len(ran(machine)) == 1
    buses(machine, region("region0", free=512 * MIB, dimms=("nmem0",)), file="then")
    status, out, _ = run("destroy", "/dev/pmem0", "--yes", "--json")
    assert status == 0
    answer = json.loads(out)
    assert (answer["changed"], answer["device"]) == (True, "/dev/pmem0")
    assert answer["commands"] == [["ndctl", "destroy-namespace", "-f", "namespace0.0"]]


def test_goal(machine: FakeMachine, run: Run) -> None:
    optane(machine, direct=0)
    put(machine, "/buses", "[]")
    status, out, err = run("goal", "--mode", "appdirect", "--dry-run")
    assert (status, ran(machine)) == (0, [])
    assert "ipmctl create -f -goal PersistentMemoryType=AppDirect" in err
    assert "No region is there to lose." in err
    status, out, err = run("goal", "--mode", "appdirect")
    assert (status, ran(machine)) == (1, [])
    assert "there is no terminal to ask on" in err
    status, out, _ = run("goal", "--mode", "appdirect", "--yes", "--json")
    answer = json.loads(out)
    assert (status, answer["changed"], answer["state"], answer["reboot_required"]) == (
        0,
        True,
        "pending",
        True,
    )
    assert answer["commands"] == [["ipmctl", "create", "-f", "-goal", "PersistentMemoryType=AppDirect"]]
    status, out, _ = run("goal", "--mode", "appdirect", "--yes")
    assert (status, len(ran(machine))) == (3, 1), "a reboot is pending"
    assert "a reboot is required" in out

    # the reboot: the same command makes the namespace, once
    optane(machine)
    put(machine, "/ipmctl/region", SET)
    two = ("nmem0", "nmem1")
    buses(machine, region("region0", free=252 * GIB, size=252 * GIB, dimms=two))
    made = region("region0", space("namespace0.0", size=248 * GIB), size=252 * GIB, dimms=two)
    buses(machine, made, file="then")
    put(machine, "/made", json.dumps({"dev": "namespace0.0"}))
    put(machine, "/dev/pmem0", "")
    (machine.root / "ran").unlink()
    status, out, _ = run("goal", "--mode", "appdirect", "--no-namespaces")
    assert (status, ran(machine)) == (0, [])
    assert "Next:  sudo emupmem nvdimm create" in out
    assert run("goal", "--mode", "appdirect", "--dry-run")[0] == 0
    status, _, err = run("goal", "--mode", "appdirect")
    assert (status, ran(machine)) == (1, [])
    assert "there is no terminal to ask on" in err
    status, out, _ = run("goal", "--mode", "appdirect", "--yes")
    assert status == 0
    assert "✓ namespace0.0 · fsdax, 248 GiB, /dev/pmem0\nNext:  sudo emupmem mount /dev/pmem0\n" in out
    status, out, _ = run("goal", "--mode", "appdirect", "--yes", "--json")
    answer = json.loads(out)
    assert (status, answer["changed"], answer["state"], answer["namespaces"]) == (0, False, "done", [])
    assert ran(machine) == [f"ndctl create-namespace -r region0 -m fsdax -s {252 * GIB}"]


def test_namespaces_that_were_made_are_no_error(
    machine: FakeMachine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    optane(machine)
    put(machine, "/ipmctl/region", SET)
    two = ("nmem0", "nmem1")
    buses(machine, region("region0", free=252 * GIB, size=252 * GIB, dimms=two))
    made = region("region0", space("namespace0.0", size=248 * GIB), size=252 * GIB, dimms=two)
    buses(machine, made, file="then")
    put(machine, "/made", json.dumps({"dev": "namespace0.0"}))
    put(machine, "/dev/pmem0", "")
    look = goal.plan_goal

    def fails_afterwards(*words: Any) -> goal.GoalPlan:
        if (machine.root / "ran").exists():
            raise EmupmemError("ipmctl has gone", "look for it")
        return look(*words)

    monkeypatch.setattr(goal, "plan_goal", fails_afterwards)
    status, out, err = run("goal", "--mode", "appdirect", "--yes")
    assert status == 0
    assert "warning: ipmctl has gone; look for it" in err
    assert "✓ namespace0.0 · fsdax, 248 GiB, /dev/pmem0" in out


def test_an_error_is_one_line_and_json(machine: FakeMachine, run: Run) -> None:
    status, out, err = run("create", "--size", "65M", "--json")
    assert status == 1
    assert json.loads(out)["error"].startswith("65M is not a multiple of 16 MiB")
    assert [line.split(":")[0].strip() for line in err.splitlines()] == ["emupmem", "--size 80M is the next"]
