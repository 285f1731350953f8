# SPDX-License-Identifier: Apache-2.0
"""The module `namespace` on played machines: one with NVDIMMs by a stand-in for ndctl; one without, by the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emupmem.model import MIB
from emupmem.nvdimm.view import BUS
from tests.fleet.hosts import Fleet
from tests.nvdimm.test_nvdimm import region, space
from tests.scenario.machine import Scenario, lacking
from tests.scenario.test_grub import BOOKWORM

pytestmark = pytest.mark.scenario(seconds=25)

# After ndctl 76: it does what it is told, whatever is lost. The kernel's part of it: files of sysfs, devices.
NDCTL = f"""#!/usr/bin/python3
import json, pathlib, sys
STATE, RAN, BUS = pathlib.Path("/var/lib/ndctl"), pathlib.Path("/var/lib/ndctl-ran"), pathlib.Path("{BUS}")
command, *words = sys.argv[1:]
buses = json.loads(STATE.read_text())
regions = {{r["dev"]: r for b in buses for r in b["regions"]}}

def given(option):
    return words[words.index(option) + 1] if option in words else ""

def make(there, name, size):
    mode, number = given("-m"), name[9:].removesuffix(".0")
    device = f"dax{{name[9:]}}" if mode == "devdax" else f"pmem{{number}}" + ("s" if mode == "sector" else "")
    one = {{"dev": name, "mode": mode, "size": size - (2 << 20), "map": given("-M") or "dev"}}
    one |= {{"chardev" if mode == "devdax" else "blockdev": device}}
    one |= {{"name": given("-n")}} if given("-n") else {{}}
    there["namespaces"].append(one)
    (BUS / name).mkdir(exist_ok=True)
    (BUS / name / "size").write_text(f"{{size}}\\n")
    pathlib.Path("/dev", device).touch()
    return one

if command == "list":
    print(json.dumps(buses))
    sys.exit()
with RAN.open("a") as ran:
    print(command, *words, file=ran)
if command == "create-namespace" and given("-r"):
    there, size = regions[given("-r")], int(given("-s"))
    taken = {{n["dev"] for n in there["namespaces"]}}
    number = next(n for n in range(9) if f"namespace{{there['dev'][6:]}}.{{n}}" not in taken)
    print(json.dumps(make(there, f"namespace{{there['dev'][6:]}}.{{number}}", size)))
    there["max_available_extent"] -= size
else:
    name = given("-e") or words[-1]
    there = next(r for r in regions.values() if name in [n["dev"] for n in r["namespaces"]])
    there["namespaces"] = [n for n in there["namespaces"] if n["dev"] != name]
    if command == "create-namespace":
        print(json.dumps(make(there, name, there["size"])))
    else:
        there["max_available_extent"] += int((BUS / name / "size").read_text())
STATE.write_text(json.dumps(buses))
if given("-n") == "half":
    sys.exit("half way")
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """`with`: a region of 512 MiB with labels, and one without, whose raw namespace holds ext4."""
    if why := lacking():
        pytest.skip(f"no scenarios: {why}")
    one = region("region0", free=512 * MIB, dimms=("nmem0",)) | {"namespaces": []}
    whole = region("region1", space("namespace1.0", "raw", 512 * MIB), dimms=("nmem1",))
    files = {
        "/var/lib/ndctl": json.dumps([{"provider": "ACPI.NFIT", "dev": "ndbus0", "regions": [one, whole]}]),
        "/var/lib/ndctl-ran": "",
        f"{BUS}/region0/nstype": "5\n",
        f"{BUS}/region1/nstype": "4\n",
        f"{BUS}/namespace1.0/size": f"{512 * MIB}\n",
        "/dev/pmem1": "",
    }
    host = replace(BOOKWORM, files={**BOOKWORM.files, **files}, programs={"ndctl": NDCTL})
    with ExitStack() as stack:
        hosts = {
            name: stack.enter_context(Scenario(h)) for name, h in (("with", host), ("without", BOOKWORM))
        }
        yield stack.enter_context(Fleet(hosts, tmp_path))


def played(fleet: Fleet, *words: str, **options: Any) -> dict[str, Any]:
    """What the module says on `with`."""
    return fleet.play([{"name": "it", "emupmem.emupmem.namespace": options}], "--limit", "with", *words).of(
        "it"
    )["with"]


def ran(fleet: Fleet) -> list[str]:
    return fleet.hosts["with"].read("/var/lib/ndctl-ran").splitlines()


DB = {"name": "db", "mode": "devdax", "size": "64M"}


def test_it_is_made_once(fleet: Fleet) -> None:
    told = fleet.play([{"name": "it", "emupmem.emupmem.namespace": DB}], "--check", "--diff").of("it")
    assert "there is no region" in told["without"]["msg"]
    assert told["with"]["changed"] is True, told["with"]
    assert told["with"]["diff"] == {
        "before": {"namespace": None},
        "after": {"namespace": {**DB, "region": "region0"}},
    }
    assert ran(fleet) == []

    made = played(fleet, "--diff", **DB)
    assert (made["changed"], made["device"]) == (True, "/dev/dax0.0"), made
    assert made["diff"]["after"]["namespace"]["raw_size"] == 64 * MIB
    assert ran(fleet) == [f"create-namespace -r region0 -m devdax -s {64 * MIB} -n db"]
    for words in ((), ("--check", "--diff")):
        again = played(fleet, *words, **DB)
        assert (again["changed"], again["device"], "diff" in again) == (False, "/dev/dax0.0", False)
    other = played(fleet, name="db", force=True)
    assert "db is there, namespace0.0, but its mode is devdax; " in other["msg"], other
    rest = [played(fleet, region="region0", map="mem") for _ in range(2)]
    assert [(r["changed"], r["device"]) for r in rest] == [(True, "/dev/pmem0.1"), (False, "/dev/pmem0.1")], (
        rest
    )
    assert len(ran(fleet)) == 2


def test_nothing_is_lost_without_force(fleet: Fleet) -> None:
    made = [played(fleet, **DB), played(fleet, region="region0", map="mem")]
    assert [m["device"] for m in made] == ["/dev/dax0.0", "/dev/pmem0.1"], made
    before, machine = ran(fleet), fleet.hosts["with"]
    for words in ((), ("--check",)):
        whole = played(fleet, *words, region="region1", mode="devdax")
        assert (
            whole["msg"] == "all content of namespace1.0 (/dev/pmem1), raw, is lost by it: force allows that"
        )
        gone = played(fleet, *words, name="db", state="absent")
        assert (
            gone["msg"]
            == "all content of namespace0.0 (/dev/dax0.0), devdax, is lost by it: force allows that"
        )
    machine.must("truncate", "-s", "16M", "/dev/pmem1")
    machine.must("mkfs.ext4", "-q", "/dev/pmem1")
    assert "/dev/pmem1 holds ext4" in played(fleet, region="region1", mode="devdax", force=True)["msg"]
    machine.must("mkdir", "-p", "/sys/class/block/pmem0.1/holders/dm-0")
    used = played(fleet, name="/dev/pmem0.1", state="absent", force=True)
    assert "/dev/pmem0.1 is a part of dm-0" in used["msg"]
    assert ran(fleet) == before

    machine.must("wipefs", "-qa", "/dev/pmem1")
    changed = [played(fleet, region="region1", mode="devdax", force=True) for _ in range(2)]
    assert [(c["changed"], c["device"]) for c in changed] == [(True, "/dev/dax1.0"), (False, "/dev/dax1.0")]
    would = played(fleet, "--check", "--diff", name="db", state="absent", force=True)
    assert (would["changed"], would["diff"]["after"]["namespace"]) == (True, None)
    assert would["diff"]["before"]["namespace"]["alt_name"] == "db"
    twice = [played(fleet, name="db", state="absent", force=force) for force in (True, False)]
    assert [(t["changed"], t["would_change"]) for t in twice] == [(True, True), (False, False)], twice
    assert ran(fleet)[len(before) :] == [
        "create-namespace -f -e namespace1.0 -m devdax",
        "destroy-namespace -f namespace0.0",
    ]
    half = played(fleet, name="half", size="64M")
    assert (half["_kind"], half["changed"]) == ("failed", True), half
