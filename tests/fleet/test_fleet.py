# SPDX-License-Identifier: Apache-2.0
"""The collection on played machines, with the real Ansible and the real GRUB. Each test leaves them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.build import OLDEST
from tests.fleet.hosts import Fleet
from tests.scenario.machine import Scenario, lacking, lacking_disk
from tests.scenario.test_grub import BOOKWORM

pytestmark = pytest.mark.scenario

SMALL = ((0x0, 0x9FBFF, "usable"), (0x100000, 0xBFFFFFFF, "usable"), (0x100000000, 0x11FFFFFFF, "usable"))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two hosts: one with 20 GiB and, for trials, a /boot that GRUB can write; one too small for what is asked."""
    if why := lacking() or lacking_disk("ext4"):
        pytest.skip(f"no scenarios: {why}")
    with ExitStack() as stack:
        big = replace(BOOKWORM, disks=[("/boot", "ext4", 64 << 20)])
        hosts = {
            "big": stack.enter_context(Scenario(big)),
            "small": stack.enter_context(Scenario(replace(BOOKWORM, hostname="small", e820=SMALL))),
        }
        for machine in hosts.values():
            machine.must("mkdir", "-p", "/boot/grub")
            machine.must("grub-editenv", "/boot/grub/grubenv", "create")
            machine.must("update-grub2")
        yield stack.enter_context(Fleet(hosts, tmp_path_factory.mktemp("fleet")))


def reservation(**options: Any) -> list[dict[str, Any]]:
    return [{"name": "it", "emupmem.emupmem.reservation": options}]


def test_there_and_back(fleet: Fleet) -> None:
    before = fleet.hosts["big"].snapshot()
    shown = fleet.play(reservation(size="2G"), "--check", "--diff").of("it")
    assert (shown["big"]["changed"], shown["big"]["reboot_required"]) == (True, True), shown
    assert "+GRUB_CMDLINE_LINUX" in shown["big"]["diff"]["prepared"]
    assert shown["small"]["_kind"] == "failed"
    assert "the largest" in shown["small"]["msg"]
    assert fleet.hosts["big"].snapshot() == before

    large = fleet.play(reservation(size="16G", min_free="1G"), "--check").of("it")["big"]
    assert large["warnings"] == ["less than a quarter of the RAM stays for the system"]
    for words in ((), ("--check",)):
        tried = fleet.play(reservation(size="2G", trial=True, mount=["/mnt/p"]), *words).of("it")["big"]
        assert "--mount is permanent" in tried["msg"], "checked as it would be done"
    done = fleet.play(reservation(size="2G")).of("it")["big"]
    assert (done["changed"], done["memmap"], done["reboot_required"]) == (True, "memmap=2G!4G", True)
    assert fleet.play(reservation(size="2G"), "--check").of("it")["big"]["changed"] is False
    assert fleet.play(reservation(size="2G", trial=True)).of("it")["big"]["changed"] is False

    kept = fleet.play(reservation(size="2G", mount=["/mnt/p"], keep=["/var/lib/p.img"])).of("it")["big"]
    assert "/var/lib is on overlay" in kept["msg"], "the option comes to the program"

    seen = fleet.play([{"name": "it", "emupmem.emupmem.verify": {}}]).of("it")
    assert seen["big"]["msg"].startswith("booted: ")
    assert (seen["small"]["_kind"], seen["small"]["msg"]) == ("failed", "nothing is reserved")

    back = fleet.play(reservation(state="absent")).of("it")
    assert (back["big"]["changed"], back["small"]["changed"]) == (True, False)
    assert fleet.hosts["big"].read("/etc/default/grub") == before["/etc/default/grub"].data.decode()


def test_a_trial_that_is_taken_away(fleet: Fleet) -> None:
    tried = fleet.play(reservation(size="2G", trial=True)).of("it")["big"]
    assert tried["_kind"] == "ok", tried["msg"]
    assert tried["reboot_required"] is True
    kept = fleet.play(reservation(state="confirmed")).of("it")
    assert "this boot is not the trial" in kept["big"]["msg"]
    assert "there is no trial to confirm" in kept["small"]["msg"]
    gone = fleet.play(reservation(state="abandoned")).of("it")
    assert {h: (r["changed"], r["trial"]) for h, r in gone.items()} == {
        "big": (True, "waiting"),
        "small": (False, "none"),
    }


SRAT = """[    0.004000] ACPI: SRAT: Node 0 PXM 0 [mem 0x00000000-0x2ffffffff]
[    0.004000] ACPI: SRAT: Node 1 PXM 1 [mem 0x300000000-0x53fffffff]
"""
DMESG = "/var/lib/scenario/dmesg"
NODE = "/sys/devices/system/node"


def test_far_memory(fleet: Fleet) -> None:
    """The node is the host's own to choose; where there is none it says so."""
    distances = {"big": ("10 28", "28 10"), "small": ("10",)}
    logs = {name: machine.read(DMESG) for name, machine in fleet.hosts.items()}
    for name, rows in distances.items():
        fleet.hosts[name].write(f"{NODE}/has_cpu", "0\n")
        for number, row in enumerate(rows):
            fleet.hosts[name].write(f"{NODE}/node{number}/distance", f"{row}\n")
    fleet.hosts["big"].write(DMESG, logs["big"] + SRAT)
    planned = fleet.play([{"name": "it", "emupmem.emupmem.emupmem_info": {"size": "1G", "far": True}}])
    assert planned.of("it")["big"]["plan"]["memmap"] == "memmap=1G!12G", planned.text
    assert "one NUMA node" in planned.of("it")["small"]["error"]
    role = {"emupmem_size": "1G", "emupmem_far": True, "emupmem_reboot": False, "emupmem_trial": False}
    told = fleet.play([], roles=[{"role": "emupmem.emupmem.emupmem", "vars": role}])
    reserved = told.of("Reserve the memory")
    assert reserved["big"]["memmap"] == "memmap=1G!12G", told.text
    assert "this machine has one NUMA node" in reserved["small"]["msg"]
    both = fleet.play(reservation(size="1G", far=True, numa_node=1)).of("it")["big"]
    assert both["msg"] == "--far and --numa-node exclude each other"
    assert fleet.play(reservation(size="1G", far=True)).of("it")["big"]["changed"] is False
    assert fleet.play(reservation(state="absent")).of("it")["big"]["changed"] is True
    for name, machine in fleet.hosts.items():
        machine.write(DMESG, logs[name])
        machine.must("rm", "-r", NODE)


def test_what_a_play_is_told(fleet: Fleet) -> None:
    fleet.unreachable.add("small")
    told = fleet.play(reservation(size="1 GB")).of("it")
    fleet.unreachable.clear()
    assert told["small"]["_kind"] == "unreachable"
    assert "1 GB" in told["big"]["msg"]
    missing = fleet.play(reservation(size="2G", program="/opt/none/emupmem")).of("it")["big"]
    assert "/opt/none/emupmem" in missing["msg"]
    fleet.hosts["big"].write("/usr/local/bin/old", "#!/bin/sh\necho '{\"changed\": false}'\n", 0o755)
    old = fleet.play(reservation(state="absent", program="/usr/local/bin/old")).of("it")["big"]
    assert "too old for this collection" in old["msg"]


def test_the_table_with_an_older_ansible(fleet: Fleet, tmp_path: Path) -> None:
    older = Fleet(fleet.hosts, tmp_path, OLDEST)
    with older:
        archives = tmp_path / "archives"
        told = older.run(
            "emupmem.emupmem.plan", "-e", "emupmem_size=2G", "-e", f"emupmem_archives={archives}"
        )
        rows = told.of("One table of all hosts")["localhost"]["msg"]
        row = next(r for r in rows if r.startswith("big"))
        assert row.split()[:5] == ["big", "20", "GiB", "memmap=2G!4G", "GRUB"], row
        assert "the largest" in next(r for r in rows if r.startswith("small"))
        assert sorted(f.name for f in archives.iterdir()) == ["big.tar.gz", "small.tar.gz"]
