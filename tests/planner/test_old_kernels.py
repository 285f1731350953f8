# SPDX-License-Identifier: Apache-2.0
"""Kernels that read `memmap=512M!4G` as "all memory is 512 MiB" get no plan, by every way to one."""

from __future__ import annotations

from pathlib import Path

import pytest

import emupmem.system.machine
from emupmem.boot import obstacles
from emupmem.model import EmupmemError, Request
from emupmem.parser.bootlog import kernel_release, parse_boot_log
from emupmem.planner.kernels import kernel_problem
from emupmem.planner.plan import plan
from emupmem.planner.survey import Survey, for_kernel, of_log, of_machine
from tests.cli.runner import Run
from tests.fake import LOG, RELEASE, build, put

EL7 = "3.10.0-{} (mockbuild@h) (gcc version 4.8.5 20150623 (Red Hat 4.8.5-44) (GCC) ) #1 SMP"
LIMITED = (
    "2.4.20-31.9smp (b@h) #1 SMP",
    "2.6.32-754.el6.x86_64 (b@h) #1 SMP",
    "3.2.0-4-amd64 (b@h) #1 SMP Debian 3.2.68-1",
    "3.12.49-11-default (geeko@buildhost) #1 SMP",
    "3.13.0-57-generic (b@h) #95-Ubuntu SMP",
    "3.19.5 (u@h) #4 SMP",
    "4.0.9-200.fc21.x86_64 (b@h) #1 SMP",
    EL7.format("123.el7.x86_64"),
    EL7.format("327.36.1.el7.x86_64"),
    EL7.format("427.el7.x86_64"),
    EL7.format("1160.vz7.1.x86_64"),  # nobody has looked
    "3.10.105-1.el7.elrepo.x86_64 (b@h) #1 SMP",
)
I386 = (
    "5.10.0-9-686-pae (d@d) (gcc-10 (Debian 10.2.1-6) 10.2.1) #1 SMP",
    "4.19.0-18-686 (d@d) #1 SMP",
    "4.15.0-20-generic-pae (b@h) #1 SMP",
    "4.8.6-300.fc25.i686 (b@h) #1 SMP",
    "4.8.6-300.fc25.i686+PAE (b@h) #1 SMP",
    "6.1.0 (d@d) (i686-linux-gnu-gcc-12 (Debian 12.2.0-14) 12.2.0) #1 SMP",
)
GOOD = (
    "4.1.0 (b@h) #1 SMP",
    "4.1.12-124.48.2.el7uek.x86_64 (b@h) #2 SMP",
    "4.4.0-210-generic (b@h) #242-Ubuntu SMP",
    "6.12.0-1-amd64 (b@h) (x86_64-linux-gnu-gcc-14 (Debian 14.2.0-8)) #1 SMP",
    "5.14.0-386.el9.x86_64 (b@h) #1 SMP",
    "5.4.0-486-generic (b@h) #1-Ubuntu SMP",
    "7.2.0-rc1 (b@h) (x86_64-linux-musl-gcc (GCC) 9.4.0) #1 SMP",
    "10.0.0 (b@h) #1 SMP",
)
HIGHMEM = ("3152MB HIGHMEM available.", "887MB LOWMEM available.")


def log_of(banner: str) -> str:
    return f"Linux version {banner}\n{LOG.partition(chr(10))[2]}"


def planned(text: str) -> tuple[Survey, tuple[str, ...]]:
    found = for_kernel(of_log(text, "boot.log"), None)
    return found, plan(found.situation, Request(size=1 << 29)).warnings


@pytest.mark.parametrize("banner", LIMITED)
def test_kernels_that_would_take_it_for_a_limit_are_refused(banner: str) -> None:
    with pytest.raises(
        EmupmemError, match="does not know memmap=SIZE!OFFSET: it takes SIZE as a limit"
    ) as caught:
        planned(log_of(banner))
    assert "4.1" in caught.value.hint
    with pytest.raises(EmupmemError, match="as a limit"):  # whoever asks the planner itself
        plan(of_log(log_of(banner), "boot.log").situation, Request(size=1 << 29))


@pytest.mark.parametrize("banner", GOOD)
def test_kernels_that_know_it(banner: str) -> None:
    found, warnings = planned(log_of(banner))
    assert not found.notes
    assert not [w for w in warnings if "4.1" in w and "older" in w]


@pytest.mark.parametrize("build_", ["514.el7.x86_64", "693.rt56.617.el7.x86_64", "1160.119.1.el7.x86_64"])
def test_the_backport_of_rhel_7_is_planned_with_a_warning(build_: str) -> None:
    _, warnings = planned(log_of(EL7.format(build_)))
    assert "by a backport only" in warnings[0]


@pytest.mark.parametrize("banner", I386)
def test_32_bit_kernels_are_refused(banner: str) -> None:
    with pytest.raises(EmupmemError, match="32-bit kernel"):
        planned(log_of(banner))


@pytest.mark.parametrize(
    "line", [*HIGHMEM, "Notice: NX (Execute Disable) protection cannot be enabled: non-PAE kernel!"]
)
def test_32_bit_kernels_show_in_their_log(line: str) -> None:
    text = LOG + f"[    0.000000] {line}\n"
    assert parse_boot_log(text).i386
    with pytest.raises(EmupmemError, match="32-bit kernel"):
        planned(text)
    with pytest.raises(EmupmemError, match="32-bit kernel"):  # a log without its first line
        planned(text.partition("\n")[2])


def test_a_log_without_a_version_is_planned_with_a_warning() -> None:
    found, _ = planned(LOG.partition("\n")[2])
    assert found.notes == (
        "the version of the kernel is not known here: memmap=SIZE!OFFSET needs a 64-bit kernel, Linux 4.1 or later "
        "(on RHEL 7: 3.10.0-514.el7 or later)",
    )


OLD_MAP = """ BIOS-e820: 0000000000000000 - 000000000009f800 (usable)
 BIOS-e820: 0000000000100000 - 00000000bf800000 (usable)
 BIOS-e820: 0000000100000000 - 0000000240000000 (usable)
"""


def test_the_words_of_the_map_tell_an_old_kernel_where_no_banner_does(tmp_path: Path) -> None:
    with pytest.raises(EmupmemError, match=r"the kernel of this log \(before 3.5, .* does not know memmap="):
        planned(OLD_MAP)
    found, _ = planned("Linux version 4.19.0 (b@h) #1 SMP\n" + OLD_MAP)  # the banner knows better
    assert all("is not known" not in note for note in found.notes)
    # the kernel that will boot knows it: its own log would have other words, but the map is the same
    assert obstacles.planned_for(build(tmp_path), of_log(OLD_MAP, "boot.log")).plan_refused is None


# Every way to a plan ---------------------------------------------------------------------------------


def test_suggest_and_apply_to_a_tree_refuse(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(log_of(LIMITED[4]))
    done = run("suggest", "--from", str(log))
    assert (done.status, "as a limit" in done.out + done.err) == (1, True)
    put(
        emupmem.system.machine.Machine(tmp_path / "tree"),
        "/etc/default/grub",
        'GRUB_CMDLINE_LINUX="memmap=1G!4G"\n',
    )
    argv = ("apply", "--size", "1G", "--root", str(tmp_path / "tree"), "--from", str(log), "--yes")
    done = run(*argv)  # although nothing would change
    assert (done.status, "as a limit" in done.out + done.err) == (1, True)


def test_the_kernel_that_will_boot_counts_not_the_one_of_the_log(tmp_path: Path) -> None:
    machine = build(tmp_path)
    found = obstacles.planned_for(machine, of_log(log_of(LIMITED[4]), "boot.log"))
    assert found.situation.kernel is not None
    assert found.situation.kernel.release == RELEASE


def test_a_default_entry_with_an_old_kernel_is_refused(tmp_path: Path) -> None:
    machine = build(tmp_path)
    cfg = machine.root / "boot/grub/grub.cfg"
    cfg.write_text(cfg.read_text().replace(RELEASE, "3.16.0-4-amd64"))
    with pytest.raises(EmupmemError, match=r"the kernel that boots by default: Linux 3\.16"):
        obstacles.refuse_machine(machine)
    with pytest.raises(EmupmemError, match="as a limit"):
        obstacles.planned_for(machine, of_machine(machine))


def test_a_release_alone_is_enough() -> None:
    assert kernel_problem(kernel_release("3.16.0-4-amd64")) is not None
    assert kernel_problem(kernel_release("5.10.0-9-686-pae")) is not None
    assert kernel_problem(kernel_release("6.8.0-60-generic")) is None
    assert kernel_problem(None) is None
