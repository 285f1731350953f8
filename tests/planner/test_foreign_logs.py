# SPDX-License-Identifier: Apache-2.0
"""Logs of systems whose memory or boot is not their own: no plan, as on the live system."""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.boot import obstacles
from emupmem.model import EmupmemError, Request
from emupmem.parser.bootlog import parse_boot_log
from emupmem.planner.plan import plan
from emupmem.planner.survey import NoMap, for_kernel, of_log, of_machine
from tests.cli.runner import Run
from tests.fake import LOG, FakeMachine, build, put

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


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP", "AMD SEV-SNP"),
        ("AMD Memory Encryption Features active: SEV SEV-ES SEV-SNP", "AMD SEV-SNP"),
        ("Memory Encryption Features active: Intel TDX", "Intel TDX"),
        ("tdx: Guest detected", "Intel TDX"),
        ("[    0.000000] tdx: Guest detected", "Intel TDX"),
        ("Memory Encryption Features active: AMD SME", ""),
        ("Memory Encryption Features active: AMD SEV SEV-ES", ""),
        ("virt/tdx: BIOS enabled: private KeyID range [16, 32)", ""),
    ],
)
def test_confidential_guests(line: str, kind: str) -> None:
    if kind:
        refused(f"{LOG}{line}\n", rf"the log is of a confidential guest \({kind}\)")
    else:
        assert for_kernel(of_log(f"{LOG}{line}\n", "boot.log"), None).plan_refused is None


def test_kdump_kernels() -> None:
    log = LOG.replace("ro quiet", "ro quiet irqpoll nr_cpus=1 elfcorehdr=0x6b000000")
    with pytest.raises(EmupmemError, match="the log is of a kdump kernel"):
        for_kernel(of_log(log, "boot.log"), None)


def test_another_processor() -> None:
    log = "Booting Linux on physical CPU 0x0000000000 [0x410fd083]\nLinux version 6.1.0-18-arm64 (a@b) (gcc-12)\n"
    with pytest.raises(NoMap, match=r"another processor \(arm64\)"):
        of_log(log, "boot.log")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "/proc/cpuinfo",
            "processor : 0\nflags\t\t: fpu tdx_guest nx\n",
            r"this is a confidential guest \(Intel TDX",
        ),
        ("/dev/sev-guest", "", r"this is a confidential guest \(AMD SEV-SNP"),
        ("/proc/cmdline", "BOOT_IMAGE=/v ro elfcorehdr=0x6b000000\n", "this is a kdump kernel"),
        ("/log", f"{LOG}tdx: Guest detected\n", r"confidential guest \(Intel TDX"),
    ],
)
def test_the_running_one_as_its_log(tmp_path: Path, file: str, text: str, words: str) -> None:
    machine = build(tmp_path)
    put(machine, file, text)
    with pytest.raises(EmupmemError, match=words):
        obstacles.planned_for(machine, of_machine(machine))


@pytest.mark.parametrize(
    ("kind", "told"), [("208", True), ("209", True), ("114", False), ("", False), ("x", False)]
)
def test_a_map_that_another_kernel_handed_on(tmp_path: Path, kind: str, told: bool) -> None:
    """0xD is kexec, 0x7 is GRUB: what a real kernel says after each is seen in tests/vm/test_vm_trial.py."""
    machine = build(tmp_path)
    put(machine, "/proc/sys/kernel/bootloader_type", f"{kind}\n")
    assert any("started by kexec" in note for note in of_machine(machine).notes) is told


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mem=8G", "mem=8G: all RAM above 8 GiB"),
        ("memmap=8G", "memmap=8G: all RAM above 8 GiB"),
        ("crashkernel=0400M", "crashkernel=0400M: 256 MiB"),
        ("crashkernel=1G@8G", "crashkernel=1G@8G: 1 GiB at 0x200000000"),
        ("hugepagesz=1G hugepages=2", "hugepagesz=1G hugepages=2: 2 GiB"),
        ("efi_fake_mem=1G@8G", "efi_fake_mem=: 0x200000000-0x23fffffff"),
        ("memmap=1G$6G", "memmap=1G$6G: 0x180000000-0x1bfffffff"),
        ("memmap=64K$0x18690000 crashkernel=0", "memmap=64K$0x18690000: 0x018690000-0x01869ffff"),
        ("memmap=4G!4G", None),
        ("ro quiet", None),
    ],
)
def test_what_other_words_take_is_said(run: Run, words: str, said: str | None) -> None:
    log = LOG.replace("ro quiet", f"ro quiet {words}").encode()
    shown = run("suggest", "--from", "-", stdin=log).out.splitlines()
    found = [line for line in shown if "taken already" in line]
    assert found == ([f"  taken already:  {said}"] if said else [])
    assert run("suggest", "--from", "-", "--json", stdin=log).json["taken"] == ([said] if said else [])


def test_huge_pages_that_were_set_later_are_said(run: Run, here: FakeMachine) -> None:
    put(here, "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "512\n")
    assert "  taken already:  huge pages that this machine has now: 1 GiB" in run("suggest").out
