# SPDX-License-Identifier: Apache-2.0
"""Logs of systems whose memory or boot is not their own: no plan, as on the live system."""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.boot import obstacles
from emupmem.model import EmupmemError, Request
from emupmem.parser.bootlog import parse_boot_log
from emupmem.planner.plan import plan
from emupmem.planner.survey import for_kernel, of_log, of_machine
from tests.fake import LOG, build, put

XEN_MAP = LOG.replace("BIOS-e820:", "Xen:")
WSL = LOG.replace("6.12.0-1-amd64", "5.15.153.1-microsoft-standard-WSL2")


def refused(text: str, words: str) -> None:
    with pytest.raises(EmupmemError, match=words) as caught:
        for_kernel(of_log(text, "boot.log"), None)
    assert "vNVDIMM" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        XEN_MAP,
        XEN_MAP.partition("\n")[2],
        LOG + "Hypervisor detected: Xen PV\n",
        LOG + "[    0.017155] Booting paravirtualized kernel on Xen\n",
        LOG + "Booting paravirtualized kernel on Xen PV\n",
        LOG + "Booting kernel on Xen PV\n",
        LOG + "Booting paravirtualized kernel with PVH extensions on Xen\n",
        LOG + '{"pri":6,"msg":"Booting paravirtualized kernel on Xen"}\n',
    ],
)
def test_xen_dom0_and_pv_guests(text: str) -> None:
    refused(text, "dom0 or PV guest: its memory map is Xen's")


@pytest.mark.parametrize(
    "line",
    [
        "Hypervisor detected: Xen HVM",
        "Hypervisor detected: Xen PVH",
        "Booting paravirtualized kernel on Xen HVM",
        "Booting kernel on Xen PVH",
        "Booting paravirtualized kernel on KVM",
        "Booting paravirtualized kernel on bare hardware",
        "Xen version 4.17.",
        "Hypervisor detected: Microsoft Hyper-V",
    ],
)
def test_ordinary_guests_are_planned(line: str) -> None:
    assert not parse_boot_log(f"{LOG}{line}\n").xen
    found = for_kernel(of_log(f"{LOG}{line}\n", "boot.log"), None)
    assert plan(found.situation, Request(size=1 << 30)).memmap == "memmap=1G!4G"


def test_wsl() -> None:
    refused(WSL, "the log is of WSL")
    refused(WSL.replace("-standard-WSL2", "-WSL2-stable"), "the log is of WSL")


def test_the_running_machine_and_an_archive_are_judged_before_a_plan(tmp_path: Path) -> None:
    machine = build(tmp_path)
    found = of_machine(machine)
    assert obstacles.planned_for(machine, found).plan_refused is None
    put(machine, "/log", XEN_MAP)
    with pytest.raises(EmupmemError, match="memory map is Xen's"):
        obstacles.planned_for(machine, of_machine(machine))
    put(machine, "/log", LOG)
    put(machine, "/proc/xen/capabilities", "control_d\n")
    with pytest.raises(EmupmemError, match="this is a Xen dom0"):
        obstacles.planned_for(machine, found)
    put(machine, "/proc/xen/capabilities", "\n")
    put(machine, "/proc/version", WSL.partition("\n")[0])
    with pytest.raises(EmupmemError, match="this is WSL"):
        obstacles.planned_for(machine, found)


def test_a_tree_is_judged_by_the_log(tmp_path: Path) -> None:
    from emupmem.system.machine import Machine

    tree = Machine(build(tmp_path).root)
    with pytest.raises(EmupmemError, match="memory map is Xen's"):
        obstacles.planned_for(tree, of_log(XEN_MAP, "boot.log"))
