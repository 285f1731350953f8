# SPDX-License-Identifier: Apache-2.0
"""The doctor: each judgement by itself, then what it says of machines in a folder."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from emupmem.boot import efi as boot_efi
from emupmem.boot import kernel as boot_kernel
from emupmem.boot import obstacles
from emupmem.boot.grub import menu
from emupmem.device.blocks import Mounted, mount_of, stack
from emupmem.doctor import boot as doctor_boot
from emupmem.doctor import finding as doctor_finding
from emupmem.doctor import host, look
from emupmem.doctor import kernel as doctor_kernel
from emupmem.doctor.finding import Finding
from emupmem.editor.defaults import Effective
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import (
    GIB,
    MIB,
    Check,
    Device,
    EmupmemError,
    FirmwareMap,
    KernelRelease,
    Kind,
    MapEntry,
    ModuleState,
    Presence,
)
from emupmem.planner import survey
from emupmem.planner.situation import Situation
from emupmem.verifier.observation import Verdict
from tests import fake
from tests.boot import test_loader, test_trial
from tests.cli.runner import Run
from tests.cli.test_cli import reboot
from tests.fake import LOG, RELEASE, FakeMachine, put, script

FIRMWARE = FirmwareMap((MapEntry(0, 3 * GIB, Kind.RAM), MapEntry(4 * GIB, 20 * GIB, Kind.RAM)))
SITUATION = Situation(FIRMWARE)
PLAIN = parse_command_line("ro quiet")
ROOT = Mounted("8:1", "/", "/", "ext4", "/dev/sda1", ("rw",))


def is_(found: Finding | None, status: str, words: str = "", fix: str = "") -> None:
    assert found is not None
    assert found.status == status, found
    assert words in found.evidence, found
    assert fix in found.fix, found


# Judgements ----------------------------------------------------------------------------------------


def test_an_obstacle_stops_and_says_all_reasons() -> None:
    fine = Finding("loader", "ok", "GRUB")
    errors = [EmupmemError("no GRUB"), EmupmemError("two menus", "move one")]
    is_(
        doctor_finding.refusal_finding("loader", errors, [], fine, True),
        "stop",
        "no GRUB; two menus",
        "move one",
    )
    is_(doctor_finding.refusal_finding("loader", [], ["not told"], fine, True), "warn", "not told")
    is_(doctor_finding.refusal_finding("loader", [], ["not told"], fine, False), "note", "not told", "sudo")
    assert doctor_finding.refusal_finding("loader", [], [], fine, True) == fine


def test_rights_are_mentioned_only_where_they_lack() -> None:
    assert host.rights(True) is None
    is_(host.rights(False), "note", "not root", "sudo emupmem doctor")


@pytest.mark.parametrize(
    ("kind", "told", "status", "words"),
    [
        ("kvm", True, "note", "virtual machine (kvm)"),
        ("xen", False, "note", "virtual machine (xen)"),
        ("none", True, "ok", "no hypervisor"),
        ("", False, "ok", "cannot determine whether"),
    ],
)
def test_host(kind: str, told: bool, status: str, words: str) -> None:
    is_(host.host(kind, told), status, words)


def test_memory_map() -> None:
    found = survey.Survey(SITUATION, "dmesg, agrees with /sys/firmware/memmap")
    is_(host.memory_map(found), "ok", "19 GiB of RAM, 16 GiB at or above 4 GiB, from dmesg, agrees with")
    is_(host.memory_map(replace(found, notes=("iomem says no",))), "note", "iomem says no")


def test_nodes_and_real_memory_are_mentioned_where_they_matter() -> None:
    assert host.numa([0]) is None
    is_(host.numa([0, 1]), "note", "nodes 0, 1", "--numa-node")
    assert host.real_pmem(False) is None
    is_(host.real_pmem(True), "note", "need not begin at /dev/pmem0")


def test_firmware() -> None:
    is_(doctor_boot.firmware(False, None, False), "ok", "BIOS")
    is_(doctor_boot.firmware(True, True, False), "ok", "Secure Boot on: memmap= is not restricted")
    is_(doctor_boot.firmware(True, False, False), "ok", "Secure Boot off")
    is_(doctor_boot.firmware(True, None, False), "ok", "Secure Boot not told")
    is_(doctor_boot.firmware(True, True, True), "ok", "Secure Boot on; a unified kernel image started")


def test_lockdown() -> None:
    assert host.lockdown("") is None
    assert host.lockdown("[none] integrity confidentiality") is None
    is_(host.lockdown("none [integrity] confidentiality"), "ok", "integrity: memmap= is not restricted")


def test_modules() -> None:
    names = ("nd_e820", "nd_pmem", "libnvdimm")
    for state in (Presence.LOADED, Presence.BUILT_IN, Presence.AVAILABLE):
        is_(doctor_kernel.modules([ModuleState(n, state) for n in names]), "ok", f"nd_e820 {state}")
    is_(
        doctor_kernel.modules(
            [ModuleState("nd_e820", Presence.AVAILABLE), ModuleState("nd_pmem", Presence.MISSING)]
        ),
        "warn",
        "",
        "linux-modules-extra",
    )
    blocked = [ModuleState("nd_e820", Presence.BLOCKED, "/etc/modprobe.d/x.conf:3")]
    is_(
        doctor_kernel.modules(blocked),
        "warn",
        "nd_e820 blocked",
        "take nd_e820 out of /etc/modprobe.d/x.conf:3",
    )
    is_(doctor_kernel.modules([ModuleState("nd_e820", Presence.UNKNOWN)]), "note")


@pytest.mark.parametrize(
    ("line", "fstab", "status", "words"),
    [
        ("root=/dev/sda1", "", "ok", "need not have the drivers"),
        ("root=/dev/pmem0", "", "warn", "root=/dev/pmem0: the drivers must be in the initramfs"),
        ("resume=/dev/pmem0", "", "warn", "resume=/dev/pmem0"),
        ("", "/dev/pmem0 /usr ext4 ro,nofail 0 0\n", "warn", "/etc/fstab:1 mounts /dev/pmem0 at /usr from"),
        ("", "\n/dev/pmem0 /a ext4 dax,x-initrd.mount 0 0\n", "warn", "/etc/fstab:2 mounts"),
        ("", "/dev/pmem0 /mnt ext4 dax 0 0\n", "warn", "without nofail"),
        ("", "/dev/pmem0 /mnt ext4 dax,nofail 0 0\n", "ok", ""),
        ("", "/dev/pmem0 /mnt ext4 noauto 0 0\n", "ok", ""),
        ("", "# /dev/pmem0 /mnt ext4 dax 0 0\nshort\n", "ok", ""),
    ],
)
def test_the_initramfs_matters_only_to_what_is_mounted_from_it(
    line: str, fstab: str, status: str, words: str
) -> None:
    is_(doctor_kernel.initramfs(parse_command_line(line), fstab, ""), status, words)


def test_crypttab_counts_as_well() -> None:
    is_(doctor_kernel.initramfs(PLAIN, "", "secret /dev/pmem0 none luks\n"), "warn", "/etc/crypttab:1")


def kernel(text: str) -> KernelRelease:
    major, minor, stable = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?", text).groups()  # type: ignore[union-attr]
    return KernelRelease(int(major), int(minor), int(stable) if stable else None, f"Linux {text}")


@pytest.mark.parametrize("efi", [True, False, None])
@pytest.mark.parametrize(
    ("release", "bad"),
    [
        ("5.10.200", False),
        ("6.1.80", False),
        ("6.1.81", True),
        ("6.1.92", True),
        ("6.1.93", False),
        ("6.1", None),
        ("6.6.32", True),
        ("6.6.33", False),
        ("6.7.5", True),
        ("6.8", True),
        ("6.9.4", False),
        ("6.12.5", False),
        ("7.2.12", False),
    ],
)
def test_randomisation_matrix(efi: bool | None, release: str, bad: bool | None) -> None:
    situation = replace(SITUATION, efi=efi, kernel=kernel(release), command_line=PLAIN)
    found = doctor_kernel.randomisation_finding(situation, True)
    if efi is False or bad is False or (bad is None and efi is None):
        is_(found, "ok", f"Linux {release}")
    else:
        is_(found, "warn", "", "--nokaslr")
    is_(
        doctor_kernel.randomisation_finding(
            replace(situation, command_line=parse_command_line("nokaslr")), True
        ),
        "ok",
        "nokaslr",
    )
    is_(doctor_kernel.randomisation_finding(situation, False), "ok", "built without it")


def test_randomisation_of_an_unknown_kernel() -> None:
    situation = replace(SITUATION, efi=True)
    is_(
        doctor_kernel.randomisation_finding(situation, None),
        "warn",
        "the exact version of this kernel is unknown",
        "--nokaslr",
    )
    is_(doctor_kernel.randomisation_finding(replace(SITUATION, efi=False), None), "ok", "started by BIOS")


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("", "ok", "0 of 4"),
        ("memmap=1G!4G", "ok", "1 of 4"),
        ("memmap=1G!4G,1G!5G memmap=64K$1M", "ok", "3 of 4"),
        ("memmap=1G!4G,1G!5G,1G!6G,1G!7G", "note", "one more device is refused"),
        ("memmap=1G!4G memmap=1G!5G memmap=1G!6G memmap=1G!7G memmap=1G!8G", "warn", "put into the fifth"),
        ("memmap=1G!4G,1G!5G,1G!6G,1G!7G,1G!8G", "note", "5 of 4"),
        ("memmap=1K$1M,1K$2M,1K$3M,1K$4M", "stop", "none of them ours"),
        ("memmap=1K$1M,1K$2M,1K$3M,1K$4M nokaslr", "ok", "4 memmap ranges; with nokaslr"),
        ("memmap=1G@4G memmap=16G", "ok", "0 of 4"),
    ],
)
def test_regions(line: str, status: str, words: str) -> None:
    is_(doctor_boot.regions_finding(parse_command_line(line)), status, words)


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("ro quiet", "ok", "nothing on it takes memory"),
        ("mem=8G crashkernel=512M", "note", "mem=8G crashkernel=512M: every plan counts these in"),
        ("hugepagesz=1G hugepages=4", "note", "hugepages"),
        ("memmap=64K$1M", "note", "memmap=64K$1M"),
        (r"memmap=4G\!12G", "warn", r"memmap=4G\!12G is read as a memory limit"),
        ("memmap=1.5G!4G", "warn", "memory limit"),
        ("memmap=exactmap memmap=1G@0", "stop", "exactmap"),
        ("x" * 2100, "warn", "2047 bytes"),
    ],
)
def test_words(line: str, status: str, words: str) -> None:
    is_(doctor_boot.words(parse_command_line(line)), status, words)


def test_variables_say_who_has_the_last_word() -> None:
    name = "GRUB_CMDLINE_LINUX_DEFAULT"
    is_(doctor_boot.variable(name, Effective(None, "", ())), "ok", "assigned nowhere")
    seen = Effective("quiet", "/etc/default/grub", (), name, "\n" * 5 + f"{name}=quiet\n")
    is_(doctor_boot.variable(name, seen), "ok", '"quiet", last word in /etc/default/grub:6')
    seen = Effective("", "/etc/default/grub.d/50-cloud.cfg", (), name, f"\n{name}=\n")
    is_(doctor_boot.variable(name, seen), "note", "grub.d/50-cloud.cfg:2: it comes after /etc/default/grub")


def test_grubenv() -> None:
    name = "/boot/grub/grubenv"
    is_(doctor_boot.grubenv_finding(name, "", "", ""), "ok", f"GRUB can write {name}")
    is_(
        doctor_boot.grubenv_finding(name, "it lies on btrfs", "", ""),
        "note",
        "no trial boots: it lies on btrfs",
        "without --trial",
    )
    is_(
        doctor_boot.grubenv_finding(name, "there is none", "create it", ""),
        "note",
        "no trial boots",
        "create it",
    )
    is_(
        doctor_boot.grubenv_finding(name, "", "", "trial"),
        "note",
        "takes the entry “trial”, once",
        f"grub-editenv {name} unset",
    )
    stuck = doctor_boot.grubenv_finding("/boot/grub2/grubenv", "it lies on btrfs", "", "trial")
    is_(stuck, "warn", "it lies on btrfs: it stays chosen", "grub2-editenv")


def test_what_boots_and_whether_the_menu_is_as_the_defaults() -> None:
    cfg = "menuentry 'Debian' {\n linux /boot/vmlinuz-1 root=UUID=0 ro a b $vt_handoff\n}\n"
    (entry,) = menu.entries(cfg)
    is_(
        doctor_boot.boots(entry, "/g.cfg", ["a", "b"], "", "update-grub2"),
        "ok",
        "“Debian” (/g.cfg:2): root=UUID=0 ro a b",
    )
    is_(
        doctor_boot.boots(entry, "/g.cfg", ["b", "a"], "", "update-grub2"),
        "warn",
        "it lacks a",
        "sudo update-grub2",
    )
    is_(
        doctor_boot.boots(entry, "/g.cfg", ["c"], "", ""),
        "warn",
        "older than the defaults: it lacks c",
        "update-grub",
    )
    is_(doctor_boot.boots(entry, "/g.cfg", ["c"], "x", ""), "note", "chosen for one start: “Debian”")


def test_a_command_line_that_is_compiled_in() -> None:
    assert doctor_kernel.built_in('CONFIG_CMDLINE=""\nCONFIG_CMDLINE_BOOL=y\n') is None
    assert doctor_kernel.built_in('CONFIG_CMDLINE="quiet"\n# CONFIG_CMDLINE_BOOL is not set\n') is None
    is_(
        doctor_kernel.built_in('CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="quiet"\n'),
        "note",
        "built-in command line: quiet",
    )
    taken = 'CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="memmap=1M$5G"\n'
    is_(doctor_kernel.built_in(taken), "warn", "does not keep clear of that memmap=", "--nokaslr")


def test_what_is_really_in_the_initramfs(here: FakeMachine) -> None:
    put(here, "/etc/fstab", "/dev/pmem0 /usr ext4 ro,nofail 0 0\n")
    is_(by_name(look.findings_of(here))["initramfs"], "warn", "must be in it", "volatile")
    put(here, f"/boot/initrd.img-{RELEASE}", "")
    script(here, "lsinitramfs", "#!/bin/sh\n[ -e ${0%/*}/..$1 ] && echo usr/lib/modules/x/nd_e820.ko.xz\n")
    found = by_name(look.findings_of(here))["initramfs"]
    is_(found, "warn", f"/boot/initrd.img-{RELEASE} lacks nd_pmem, libnvdimm", "add nd_pmem, libnvdimm to it")
    script(here, "lsinitramfs", "#!/bin/sh\nfor m in nd_e820 nd_pmem libnvdimm; do echo a/$m.ko; done\n")
    is_(
        by_name(look.findings_of(here))["initramfs"],
        "warn",
        f"and /boot/initrd.img-{RELEASE} has them",
        "volatile",
    )


def test_a_kernel_that_listens_to_no_boot_loader(here: FakeMachine) -> None:
    config = here.root / f"boot/config-{RELEASE}"
    config.write_text(config.read_text() + "CONFIG_CMDLINE_OVERRIDE=y\n")
    is_(by_name(look.findings_of(here))["kernel"], "stop", "takes nothing from a boot loader")
    with pytest.raises(EmupmemError, match="CONFIG_CMDLINE_OVERRIDE"):
        obstacles.refuse_machine(here)


def test_every_trouble_has_a_way_out(here: FakeMachine) -> None:
    put(here, "/boot/grub/grub.cfg", "")
    put(here, "/etc/fstab", "/dev/pmem0 /mnt ext4 dax 0 0\n")
    put(here, "/proc/swaps", "")
    troubles = [f for f in look.findings_of(here) if f.status in ("warn", "stop", "fail")]
    assert len(troubles) >= 3
    assert [f.name for f in troubles if not f.fix] == []


def test_the_mount_of_a_path() -> None:
    boot, over = replace(ROOT, dir="/boot", number="8:2"), replace(ROOT, dir="/boot", number="8:3")
    assert mount_of([ROOT, boot], "/boot/grub/grubenv") is boot
    assert mount_of([boot, ROOT], "/boot") is boot
    assert mount_of([boot, ROOT], "/bootleg") is ROOT
    assert mount_of([ROOT, boot, over], "/boot/grub") is over, "the last one hides the others"
    assert mount_of([], "/boot") is None


def test_room() -> None:
    is_(doctor_boot.room([("/boot", GIB, False), ("/", GIB, False)], MIB), "ok", "/boot 1 GiB, / 1 GiB free")
    is_(doctor_boot.room([("/boot", 0, False), ("/", GIB, False)], MIB), "warn", "/boot 0", "make room")
    is_(doctor_boot.room([("/boot", GIB, True)], MIB), "stop", "mounted read-only: /boot", "remount,rw /boot")


def test_programs() -> None:
    is_(doctor_boot.generator_finding("update-grub2", "grub-editenv"), "ok", "update-grub2 makes the menu")
    is_(doctor_boot.generator_finding("update-grub2", ""), "note", "no trial boots", "grub-common")
    is_(doctor_boot.generator_finding("", ""), "stop", "grub.cfg cannot be generated", "grub2-common")
    every = dict.fromkeys((*host.NEEDED, *host.WANTED), True)
    is_(host.tools(every, True), "ok")
    is_(host.tools(every | {"ipmctl": False}, False), "ok")
    is_(host.tools(every | {"ipmctl": False}, True), "note", "ipmctl")
    is_(host.tools(every | {"ndctl": False}, False), "note", "missing, optional: ndctl (ndctl)")
    is_(
        host.tools(every | {"mkfs.ext4": False}, False),
        "warn",
        "mkfs.ext4 (e2fsprogs)",
        "mount needs mkfs.ext4",
    )
    is_(host.tools({}, False), "warn", "has none")


def test_the_crash_kernel_does_not_want_our_device(here: FakeMachine) -> None:
    """Fedora's default names no memmap; that of others is told by what is there."""
    here.root_user = True
    put(here, "/etc/sysconfig/kdump", 'KDUMP_COMMANDLINE=""\nKDUMP_COMMANDLINE_REMOVE="hugepages quiet"\n')
    assert "kdump" not in {f.name for f in look.findings_of(here)}
    put(here, "/proc/cmdline", here.peek("/proc/cmdline") + " crashkernel=256M")
    found = {f.name: f for f in look.findings_of(here)}
    is_(
        found["kdump"],
        "note",
        "/etc/sysconfig/kdump does not take memmap= off",
        'KDUMP_COMMANDLINE_REMOVE="hugepages quiet memmap", then sudo kdumpctl restart',
    )
    put(here, "/etc/sysconfig/kdump", 'KDUMP_COMMANDLINE="root=/dev/vda1"\n')
    assert "kdump" not in {f.name for f in look.findings_of(here)}


def test_what_a_crash_kernel_can_spare() -> None:
    """Seen with Debian 13: of 192 MiB, 128 MiB for a device of 8 GiB leave too little, and nothing is dumped."""
    removes = 'KDUMP_COMMANDLINE_REMOVE="quiet{}"\n'
    is_(host.kdump(removes.format(" memmap"), 0, 0), "ok", "does not get memmap=")
    is_(host.kdump(removes.format(""), 8 * MIB, 192 * MIB), "note", "8 MiB of the 192 MiB that are set aside")
    is_(host.kdump(removes.format(""), 128 * MIB, 192 * MIB), "warn", "128 MiB of the 192 MiB")
    is_(host.kdump_tools("", (), 128 * MIB, 192 * MIB), "warn", "does not keep nd_e820 from it")


APPENDED = 'KDUMP_CMDLINE_APPEND="nr_cpus=1 {}"\n'
DEBIAN_KDUMP = """USE_KDUMP=1
#KDUMP_CMDLINE=""
#KDUMP_CMDLINE_APPEND="reset_devices systemd.unit=kdump-tools-dump.service nr_cpus=1 irqpoll usbcore.nousb"
"""
"""What counts of kdump-tools' own settings."""


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("", f'KDUMP_CMDLINE_APPEND="{host.KDUMP_TOOLS_APPENDS} module_blacklist=nd_e820"'),
        (APPENDED.format("quiet"), 'KDUMP_CMDLINE_APPEND="nr_cpus=1 quiet module_blacklist=nd_e820"'),
        (
            APPENDED.format("module_blacklist=nd_e820 module_blacklist=a,b quiet"),
            'KDUMP_CMDLINE_APPEND="nr_cpus=1 quiet module_blacklist=a,b,nd_e820"',
        ),
        (APPENDED.format("module_blacklist=nd_e820"), ""),
        (APPENDED.format("module_blacklist=a,nd_e820,b quiet"), ""),
        # its map still has the range
        ("KDUMP_CMDLINE=$(sed 's/memmap=[^ ]*//' /proc/cmdline)\n", host.kdump_tools_line("")),
    ],
)
def test_debians_crash_kernel(here: FakeMachine, more: str, line: str) -> None:
    put(here, "/etc/default/kdump-tools", DEBIAN_KDUMP + more)
    assert "kdump" not in {f.name for f in look.findings_of(here)}, "nothing is set aside for it"
    put(here, "/proc/cmdline", "ro crashkernel=256M memmap=1G!4G\n")
    found = {f.name: f for f in look.findings_of(here)}["kdump"]
    assert found.fix == (f"there {line}, then sudo kdump-config reload" if line else "")
    assert (found.status, host.kdump_tools_line(DEBIAN_KDUMP + more)) == ("note" if line else "ok", line)
    running = host.kdump_tools_line(DEBIAN_KDUMP, ["ro", "module_blacklist=nouveau"])
    assert running.endswith('usbcore.nousb module_blacklist=nouveau,nd_e820"')
    # as its own script reads it
    shell = '. /dev/stdin; printf %s "$KDUMP_CMDLINE_APPEND"'
    text = f"{DEBIAN_KDUMP}{more}{line}\n".encode()
    words = subprocess.run(["sh", "-c", shell], input=text, capture_output=True, check=True).stdout
    assert "nd_e820" in words.decode().rpartition("module_blacklist=")[2].split()[0].split(",")


def test_soft_reserved_memory_is_nothing_to_a_crash_kernel(here: FakeMachine) -> None:
    put(here, "/etc/default/kdump-tools", DEBIAN_KDUMP)
    put(here, "/proc/cmdline", "ro crashkernel=256M memmap=1G%4G-1+0xefffffff\n")
    is_({f.name: f for f in look.findings_of(here)}["kdump"], "ok", "has no RAM there")


def test_hibernation() -> None:
    is_(host.hibernation(False, "", 0, GIB, True), "ok", "does not hibernate")
    is_(host.hibernation(True, "", GIB, 16 * GIB, True), "ok", "not set up")
    is_(host.hibernation(True, "", 8 * GIB, 16 * GIB, False), "note", "not in the image", "umount")
    is_(host.hibernation(True, "resume=/dev/sda2", GIB, 16 * GIB, True), "warn", "resume=/dev/sda2")


def test_the_ladder_in_one_line() -> None:
    ok = Check("configured", "ok")
    device = Check("device", "ok")
    is_(look.ladder_finding(Verdict((ok,), ())), "ok", "nothing is reserved")
    is_(
        look.ladder_finding(Verdict((ok, Check("booted", "pending", "", "not yet", "reboot")), ())),
        "note",
        "booted: not yet",
        "reboot",
    )
    is_(
        look.ladder_finding(Verdict((ok, Check("dax", "fail", "", "off", "repair")), ())),
        "fail",
        "dax: off",
        "repair",
    )
    seen = Verdict((ok, device, Check("iomem", "skipped")), (Device("/dev/pmem0", 4 * GIB, GIB),))
    is_(look.ladder_finding(seen), "ok", "/dev/pmem0 · emulated, volatile (not seen: iomem)")


def test_a_trial_is_told() -> None:
    tried = Check("trial", "ok", "", "this boot is the trial of memmap=1G!4G", "sudo emupmem confirm")
    is_(
        look.ladder_finding(Verdict((tried, Check("device", "ok")), ())),
        "note",
        "this boot is the trial of memmap=1G!4G",
        "emupmem confirm",
    )


def test_stop_and_fail_are_not_good() -> None:
    for status, good in (("ok", True), ("note", True), ("warn", True), ("stop", False), ("fail", False)):
        assert doctor_finding.good([Finding("x", "ok", ""), Finding("y", status, "")]) is good


# Machines in a folder --------------------------------------------------------------------------------


def by_name(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in findings}


def test_a_good_machine(here: FakeMachine) -> None:
    for name in host.TOOLS:
        if not (here.root / "sbin" / name).exists():
            script(here, name, "#!/bin/sh\n")
    modules = "kernel/drivers/nvdimm/{}.ko.xz:\n"
    put(here, f"/lib/modules/{RELEASE}/modules.dep", "".join(modules.format(m) for m in boot_kernel.MODULES))
    test_trial.prepare(here)
    findings = look.findings_of(here)
    assert {f.status for f in findings} == {"ok"}, [f for f in findings if f.status != "ok"]
    found = by_name(findings)
    assert len(found) == len(findings), "names are unique"
    assert found["kernel"].evidence.startswith(f"{RELEASE} (Linux 6.12.5) boots by default")
    assert found["modules"].evidence == "nd_e820 available, nd_pmem available, libnvdimm available"
    assert found["plan"].evidence == "memmap=8G!4G would leave 11.8 GiB of RAM"
    assert found["plan"].fix == "sudo emupmem apply --size 8G"
    assert found["GRUB_CMDLINE_LINUX"].evidence == '"", last word in /etc/default/grub:7'


def test_nothing_is_changed(here: FakeMachine) -> None:
    before = {p: p.read_bytes() for p in here.root.rglob("*") if p.is_file()}
    look.findings_of(here)
    assert before == {p: p.read_bytes() for p in here.root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("BOOT_IMAGE=/vmlinuz ro", "ok", "GRUB, which systemd-boot started, /boot/grub/grub.cfg"),
        ("ro quiet", "stop", "from systemd-boot"),
    ],
)
def test_systemd_boot_with_and_without_a_grub_behind_it(
    here: FakeMachine, line: str, status: str, words: str
) -> None:
    name = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
    put(here, name, b"\x06\0\0\0" + "systemd-boot".encode("utf-16-le"))
    put(here, "/proc/cmdline", line)
    is_(by_name(look.findings_of(here))["loader"], status, words)


@pytest.mark.parametrize(
    ("name", "text", "finding", "words"),
    [
        ("/run/systemd/container", "docker", "host", "this is a container (docker)"),
        ("/proc/version", "Linux version 5.15.90.1-microsoft-standard-WSL2 (x@y)", "host", "WSL"),
        ("/proc/xen/capabilities", "control_d\n", "host", "Xen dom0"),
        ("/run/ostree-booted", "", "loader", "ostree"),
        ("/proc/cmdline", "ro quiet", "loader", "no BOOT_IMAGE="),
        ("/boot/grub2/grub.cfg", "menu", "loader", "two boot menus"),
        ("/boot/grub/grub.cfg", "blscfg\n", "loader", "BLS"),
        (f"/boot/config-{RELEASE}", "CONFIG_FS_DAX=y\n", "kernel", "built without CONFIG_X86_PMEM_LEGACY"),
        (f"/lib/modules/{RELEASE}/modules.dep", "", "modules", "no module nd_e820 installed"),
        ("/etc/default/grub", 'GRUB_CMDLINE_LINUX="a\n', "defaults", "sh cannot read this file"),
        ("/proc/self/mountinfo", "30 1 8:1 / / ro - ext4 /dev/sda1 ro\n", "room", "mounted read-only"),
        (
            "/etc/default/grub.d/zzz.cfg",
            'GRUB_CMDLINE_LINUX="b"\n',
            "plan",
            "overrides GRUB_CMDLINE_LINUX",
        ),
        (
            "/etc/default/grub.d/zzz.cfg",
            'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX '
            + "memmap="
            + ",".join(rf"1K\\\$0x{n}00" for n in (1, 2, 3, 4))
            + '"\n',
            "plan",
            "",
        ),
        (
            "/log",
            LOG.replace("0x000000053fffffff", "0x0000000100000fff"),
            "plan",
            "no room for a reservation",
        ),
        ("/log", "no map\n", "memory-map", "map"),
    ],
)
def test_what_apply_refuses_is_a_stop(
    here: FakeMachine, run: Run, name: str, text: str | bytes, finding: str, words: str
) -> None:
    put(here, name, text)
    found = by_name(look.findings_of(here))[finding]
    is_(found, "stop", words)
    done = run("doctor", "--json")
    assert done.status == 3
    assert done.json["ok"] is False
    if finding != "room":  # this folder can be written to
        assert run("apply", "--size", "1G", "--yes").status == 1, "and apply does refuse"


def test_the_efi_partition_is_looked_at_where_the_entries_lie_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = test_loader.systemd_boot(tmp_path)
    fake.running(monkeypatch.setattr, machine)
    for state, status, words in (("rw", "ok", "/boot/efi "), ("ro", "stop", "mounted read-only: /boot/efi")):
        mounts = "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        put(
            machine,
            "/proc/self/mountinfo",
            f"{mounts}31 30 8:2 / /boot/efi {state} - vfat /dev/sda2 {state}\n",
        )
        is_(by_name(look.findings_of(machine))["room"], status, words)


def test_another_processor_stops(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    is_(by_name(look.findings_of(here))["processor"], "stop", "this machine is aarch64")


def test_without_a_generator_apply_would_refuse(here: FakeMachine) -> None:
    (here.root / "sbin/update-grub2").unlink()
    is_(by_name(look.findings_of(here))["generator"], "stop", "grub.cfg cannot be generated")


def test_the_drivers_of_the_kernel_that_boots_are_blocked(here: FakeMachine) -> None:
    put(here, "/etc/modprobe.d/x.conf", "# x\nblacklist nd_e820\n")
    is_(by_name(look.findings_of(here))["modules"], "warn", "nd_e820 blocked by /etc/modprobe.d/x.conf:2")


def test_efi_with_a_kernel_that_may_land_anywhere(here: FakeMachine) -> None:
    banner = LOG.partition("\n")[0].replace("6.12.5-1", "6.7.9-1").replace("6.12.0", "6.7.0")
    put(here, "/proc/version", banner.replace("6.7.0-1-amd64", RELEASE).replace("6.12.0", "6.7.0"))
    put(here, "/sys/firmware/efi/fw_platform_size", "64")
    put(here, boot_efi.SECURE_BOOT, b"\6\0\0\0\1")
    put(here, "/proc/sys/kernel/osrelease", RELEASE)
    found = by_name(look.findings_of(here))
    is_(found["firmware"], "ok", "UEFI, Secure Boot on")
    # The running kernel is not the one that boots: of that one the version is unknown.
    is_(found["randomisation"], "warn", "", "--nokaslr")


def test_grubenv_on_encrypted_lvm_on_raid(here: FakeMachine) -> None:
    test_trial.prepare(here)
    put(here, "/proc/self/mountinfo", "30 1 253:1 / / rw - ext4 /dev/mapper/vg-root rw\n")
    base = "/sys/dev/block"
    put(here, f"{base}/253:1/dm/uuid", "LVM-abc\n")
    put(here, f"{base}/253:1/slaves/dm-0/dev", "253:0\n")
    put(here, f"{base}/253:0/dm/uuid", "CRYPT-LUKS2-abc\n")
    put(here, f"{base}/253:0/slaves/md0/dev", "9:0\n")
    put(here, f"{base}/9:0/md/level", "raid1\n")
    assert stack(here, "253:1") == ("LVM", "encrypted", "RAID")
    is_(
        by_name(look.findings_of(here))["grubenv"],
        "note",
        "(LVM, encrypted, RAID), which GRUB is not sure to write to",
    )


def test_a_stack_that_bites_its_tail_ends(here: FakeMachine) -> None:
    put(here, "/sys/dev/block/9:0/md/level", "raid1\n")
    put(here, "/sys/dev/block/9:0/slaves/md0/dev", "9:0\n")
    assert stack(here, "9:0") == ("RAID",)


def test_hibernation_on_a_machine(here: FakeMachine) -> None:
    put(here, "/sys/power/state", "freeze mem disk\n")
    put(here, "/sys/power/disk", "[platform] shutdown reboot\n")
    put(here, "/proc/meminfo", "MemTotal:       20000000 kB\n")
    put(here, "/proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 9000000 0 -2\n")
    is_(by_name(look.findings_of(here))["hibernation"], "note", "8.5 GiB of swap")
    put(here, "/proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 9000000 0 -2\n")
    is_(by_name(look.findings_of(here))["hibernation"], "ok", "not set up")
    put(here, "/sys/power/disk", "[disabled]\n")
    is_(by_name(look.findings_of(here))["hibernation"], "ok", "does not hibernate")


def test_without_root_what_is_unseen_is_said(here: FakeMachine) -> None:
    here.root_user = False
    script(here, "dmesg", "#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
    for number, (start, end) in enumerate((("0x0", "0xbfffffff"), ("0x100000000", "0x53fffffff"))):
        for key, value in (("start", start), ("end", end), ("type", "System RAM")):
            put(here, f"/sys/firmware/memmap/{number}/{key}", value)
    found = by_name(look.findings_of(here))
    is_(found["rights"], "note")
    is_(found["memory-map"], "ok", "/sys/firmware/memmap")
    assert doctor_finding.good(tuple(found.values()))


def test_before_and_after_the_reboot(here: FakeMachine, run: Run) -> None:
    run("apply", "--size", "1G", "--yes")
    found = by_name(look.findings_of(here))
    is_(found["ladder"], "note", "booted:", "reboot")
    is_(found["plan"], "ok", "memmap=1G!4G is set up already")
    is_(found["regions"], "ok", "1 of 4")
    reboot(here)
    found = by_name(look.findings_of(here))
    is_(found["ladder"], "ok", "/dev/pmem0 · emulated, volatile")
    done = run("doctor")
    assert done.status == 0
    assert "✓ ok   ladder" in done.out
    dax = here.path("/sys/class/block/pmem0/queue/dax")
    dax.write_text("0\n")
    assert by_name(look.findings_of(here))["ladder"].status == "fail"
    assert run("doctor").status == 3


# The command ---------------------------------------------------------------------------------------


def test_json_has_the_documented_shape(here: FakeMachine, run: Run) -> None:
    done = run("doctor", "--json")
    assert done.status == 0
    assert set(done.json) == {"ok", "findings"}
    assert done.json["ok"] is True
    assert all(set(f) == {"name", "status", "evidence", "fix"} for f in done.json["findings"])
    assert done.err == ""


def test_one_line_each_and_plain_when_piped(here: FakeMachine, run: Run) -> None:
    done = run("doctor")
    lines = [line for line in done.out.splitlines() if "→" not in line]
    assert len(lines) == len(look.findings_of(here))
    assert "\x1b" not in done.out
    assert "✓ ok   processor" in done.out
    assert re.search(r"! warn tools .*\n +→ emupmem mount needs mkfs.ext4", done.out)


def test_a_log_is_not_enough(run: Run, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    done = run("doctor", "--from", str(tmp_path / "log"), "--json")
    assert done.status == 1
    assert done.json["error"].endswith(
        "no archive of emupmem collect; emupmem suggest --from plans from a log"
    )
    assert done.json["findings"] == []
    assert run("doctor", "--from", str(tmp_path / "none")).status == 1
