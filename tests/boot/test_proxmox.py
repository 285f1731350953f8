# SPDX-License-Identifier: Apache-2.0
"""Proxmox with systemd-boot: one line is changed, proxmox-boot-tool writes the entries, every partition is read again.

Whole trees are compared, the partitions among them. The programs are stand-ins (see generators.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import detect, loader, obstacles, prepare, proxmox_boot_tool
from emupmem.boot.loader import Owned
from emupmem.boot.partitions import PartitionState, read_partitions
from emupmem.boot.proxmox_boot_tool import ProxmoxBootTool
from emupmem.doctor import look
from emupmem.model import GIB, EmupmemError, Request
from emupmem.system.machine import Machine
from emupmem.verifier import ladder, observe
from tests import fake
from tests.boot import generators
from tests.boot.test_generators import changed, tree
from tests.boot.test_loader import (
    PROXMOX_LINE,
    apply,
    boots_by_default,
    is_changed_by,
    proxmox,
    remove,
    survey_of,
)
from tests.cli.runner import Run
from tests.cli.test_cli import log as log  # the fixture
from tests.fake import RELEASE, FakeMachine, put
from tests.scenario import kernel

CMDLINE, LIST = "/etc/kernel/cmdline", "/etc/kernel/proxmox-boot-uuids"
pytestmark = pytest.mark.slow  # the inner loop has each loader in test_loader.py

LINE = f"{PROXMOX_LINE} memmap=1G!4G"
OLD, NEW = "6.8.12-1-pve", "7.1.0-3-pve"
ESPS = ("esps/a", "esps/b")


def entry(machine: Machine, esp: str, release: str) -> str:
    """The words of an entry."""
    text = machine.peek(f"/{esp}/loader/entries/proxmox-{release}.conf")
    return next((x.removeprefix("options  ") for x in text.splitlines() if x.startswith("options ")), "")


def updates(machine: FakeMachine, *releases: str) -> None:
    """A kernel update: the kernel's package runs the hooks in /etc/kernel/postinst.d, which refresh runs as well."""
    for release in releases:
        put(machine, f"/boot/vmlinuz-{release}", kernel.image(release))
        put(machine, f"/boot/initrd.img-{release}", f"initrd of {release}\n")
    put(machine, "/packages", " ".join([machine.peek("/packages"), *releases]) + "\n")
    done = machine.output("proxmox-boot-tool", "refresh")
    assert done is not None
    assert done.status == 0, done


def test_one_line_and_the_entries_on_both_partitions_change(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    before = tree(machine)
    outcome = apply(machine)
    assert outcome is not None
    assert outcome.entries == 4
    assert machine.read(CMDLINE) == f"{LINE}\n".encode()
    names = {f"{esp}/loader/entries/proxmox-{r}.conf" for esp in ESPS for r in (RELEASE, OLD)}
    assert changed(before, tree(machine)) == {CMDLINE[1:], *names}
    assert all(entry(machine, esp, r) == LINE for esp in ESPS for r in (RELEASE, OLD))
    made = tree(machine)
    updates(machine)
    assert tree(machine) == made, "its own run writes the same bytes"
    remove(machine)
    assert tree(machine) == before


@pytest.mark.parametrize("cmdline", [f"{PROXMOX_LINE}\n", None])
def test_a_new_kernel_gets_it_and_after_remove_none_does(cmdline: str | None, tmp_path: Path) -> None:
    machine, other = (proxmox(tmp_path / n, cmdline) for n in "ab")
    apply(machine, nokaslr=True)
    apply(machine, 2 * GIB, replace=True)
    updates(machine, NEW)
    assert [entry(machine, esp, NEW) for esp in ESPS] == [f"{PROXMOX_LINE} memmap=2G!4G nokaslr"] * 2
    boots_by_default(machine, NEW)
    remove(machine)
    updates(other, NEW)
    assert tree(machine) == tree(other)
    updates(machine, "7.2.0-1-pve")
    assert not any(b"memmap" in data for n, (_, _, data) in tree(machine).items() if not n.startswith("sbin"))


def test_while_this_boot_has_it_the_line_stays_after_remove(tmp_path: Path) -> None:
    """Without the file its next run would take the reservation from the boot that runs."""
    machine = proxmox(tmp_path, None)
    apply(machine)
    put(machine, "/proc/cmdline", f"initrd=\\EFI\\proxmox\\x {LINE}\n")
    remove(machine)
    assert machine.read(CMDLINE) == f"{PROXMOX_LINE}\n".encode()
    updates(machine, NEW)
    assert entry(machine, "esps/a", NEW) == PROXMOX_LINE


def test_words_that_only_the_boot_has_are_known_and_go(tmp_path: Path) -> None:
    machine = proxmox(tmp_path, None)
    put(machine, "/proc/cmdline", f"initrd=\\EFI\\proxmox\\x {LINE}\n")
    updates(machine)
    assert prepare.prepare_remove(machine).before.items == ("1G!4G",)
    remove(machine)
    assert machine.read(CMDLINE) == f"{PROXMOX_LINE}\n".encode()
    assert entry(machine, "esps/b", RELEASE) == PROXMOX_LINE


@pytest.mark.parametrize(
    "text",
    [
        PROXMOX_LINE,
        f"{PROXMOX_LINE} \t\n",
        f"  {PROXMOX_LINE}\nmemmap=9G!9G\n\n# mine\n",
        f'{PROXMOX_LINE} x="a b" memmap=64K#0x1000\nroot=/dev/sdz',
        f"{PROXMOX_LINE} \xff\n",
    ],
)
def test_every_other_byte_stays_and_only_the_first_line_counts(text: str, tmp_path: Path) -> None:
    machine = proxmox(tmp_path, text)
    before = tree(machine)
    apply(machine)
    assert (machine.read(CMDLINE) or b"").partition(b"\n")[2] == text.encode().partition(b"\n")[2]
    assert "memmap=1G!4G" in entry(machine, "esps/b", RELEASE)
    remove(machine)
    assert tree(machine) == before


def test_a_first_line_without_a_root_is_refused(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    put(machine, CMDLINE, f"# the words\n{PROXMOX_LINE}\n")
    with pytest.raises(EmupmemError, match="the first line of /etc/kernel/cmdline has no root=") as caught:
        obstacles.refuse_machine(machine)
    assert "on its first line" in caught.value.hint


@pytest.mark.parametrize("failure", ["start", "half", "end", "wrong", "skip", "interrupt"])
@pytest.mark.parametrize("verb", ["apply", "remove"])
@pytest.mark.parametrize("cmdline", [f"{PROXMOX_LINE}\n", None])
def test_a_refresh_that_fails_once_leaves_nothing(
    cmdline: str | None, verb: str, failure: str, tmp_path: Path
) -> None:
    machine = proxmox(tmp_path, cmdline)
    if verb == "remove":
        apply(machine)
    before = tree(machine)
    put(machine, "/fail", f"{failure} once")
    if (failure, verb) == ("wrong", "remove"):
        return  # there is no memmap= to write wrongly
    with pytest.raises(EmupmemError) as caught:
        {"apply": apply, "remove": remove}[verb](machine)
    assert "the old configuration is back, nothing is changed" in caught.value.hint
    assert tree(machine) == before


def test_a_refresh_that_goes_on_failing_is_told_with_the_partitions(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    put(machine, "/fail", "half")
    with pytest.raises(EmupmemError, match="No space left on device") as caught:
        apply(machine)
    assert "not all could be put back: proxmox-boot-tool failed" in caught.value.hint
    put(machine, "/fail", "wrong")
    with pytest.raises(EmupmemError, match="not as planned") as caught:
        apply(machine)
    assert machine.read(CMDLINE) == f"{PROXMOX_LINE}\n".encode()


def test_where_the_partitions_cannot_be_read_again_refresh_is_run_once_more(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    before = tree(machine)
    tool = machine.root / "sbin/proxmox-boot-tool"
    tool.rename(machine.root / "sbin/real")
    fake.script(
        machine, "proxmox-boot-tool", '#!/bin/sh\nrm -f "${0%/*}/unshare"\nexec "${0%/*}/real" "$@"\n'
    )
    with pytest.raises(EmupmemError, match="cannot be looked at") as caught:
        apply(machine)
    assert "not all could be put back: the partitions of" in caught.value.hint
    (machine.root / "sbin/real").rename(tool)
    fake.script(machine, "unshare", generators.UNSHARE)
    assert tree(machine) == before


def test_a_partition_that_refresh_passes_over_is_the_end_of_it(tmp_path: Path) -> None:
    """proxmox-boot-tool ends with 0 all the same."""
    machine = proxmox(tmp_path)
    put(machine, "/fail", "skip")
    with pytest.raises(EmupmemError, match=f"5678-EF01/proxmox-{RELEASE}: it has no reservation instead of"):
        apply(machine)
    assert machine.read(CMDLINE) == f"{PROXMOX_LINE}\n".encode()


def lacks(machine: Machine) -> None:
    put(machine, LIST, "1234-ABCD\n9999-9999\nno uuid\n../1234-ABCD\n5678-EF01")


def broken(machine: Machine) -> None:
    (machine.root / "esps/b").rename(machine.root / "esps/c")


def grub(machine: Machine) -> None:
    put(machine, "/esps/b/EFI/proxmox/grubx64.efi", "MZ")
    put(machine, "/esps/b/grub/grub.cfg", "")


def bare(machine: Machine) -> None:
    (machine.root / "esps/b/loader/loader.conf").unlink()


def test_a_partition_without_entries_is_said_and_gets_them(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    for name in machine.names("/esps/b/loader/entries"):
        (machine.root / "esps/b/loader/entries" / name).unlink()
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    assert any("5678-EF01 has no entries yet" in w for w in prepared.warnings)
    apply(machine)
    assert entry(machine, "esps/b", OLD) == LINE
    remove(machine)
    assert entry(machine, "esps/b", OLD) == PROXMOX_LINE


@pytest.mark.parametrize(
    ("make", "state", "said"),
    [
        (lacks, PartitionState.MISSING, "9999-9999 is not here: proxmox-boot-tool passes over it"),
        (broken, PartitionState.UNREADABLE, "5678-EF01 cannot be looked at: mount: /mnt: wrong fs type"),
        (grub, PartitionState.GRUB, "GRUB starts from 5678-EF01, with the words of /etc/default/grub"),
        (bare, PartitionState.UNPREPARED, "5678-EF01 is not set up for systemd-boot"),
    ],
)
def test_what_proxmox_boot_tool_passes_over_is_said(
    make: Callable[[Machine], None], state: PartitionState, said: str, tmp_path: Path
) -> None:
    machine = proxmox(tmp_path)
    make(machine)
    assert read_partitions(machine)[1].state is state
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    assert any(said in w for w in prepared.warnings)
    assert said in detect.of(machine).seen(machine, "systemd-boot")
    before = tree(machine)
    apply(machine)
    assert entry(machine, "esps/a", RELEASE) == LINE
    assert "memmap" not in "".join(entry(machine, e, RELEASE) for e in ("esps/b", "esps/c"))
    remove(machine)
    assert {n for n in changed(before, tree(machine)) if not n.endswith("grub/made")} == set()


def test_lines_of_the_list_are_read_as_it_reads_them(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    lacks(machine)
    found = {p.uuid: p.state for p in read_partitions(machine)}
    gone = dict.fromkeys(("9999-9999", "no uuid", "../1234-ABCD"), PartitionState.MISSING)
    assert found == {"1234-ABCD": PartitionState.SYSTEMD_BOOT, **gone}, (
        "a last line without its end does not count"
    )


def test_after_a_partition_of_grubs_it_takes_all_for_such(tmp_path: Path) -> None:
    """A variable is never reset: those behind it are passed over, and the change is taken back."""
    machine = proxmox(tmp_path)
    put(machine, "/esps/a/EFI/proxmox/grubx64.efi", "MZ")
    before = tree(machine)
    with pytest.raises(EmupmemError, match=r"5678-EF01/proxmox-.* it has no reservation instead of"):
        apply(machine)
    assert tree(machine) == before


def test_without_one_for_systemd_boot_it_is_refused(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    put(machine, LIST, "9999-9999\n")
    with pytest.raises(EmupmemError, match="there are no entries of proxmox-boot-tool on the partitions"):
        apply(machine)
    (machine.root / "sbin/unshare").unlink()
    with pytest.raises(EmupmemError, match=r"the partitions of .* cannot be looked at"):
        apply(machine)


def test_a_partition_that_is_mounted_is_read_where_it_is(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    put(machine, "/mounts", "/dev/disk/by-uuid/5678-EF01 /esps/b\n")
    before = read_partitions(machine)
    assert [p.state for p in before] == [PartitionState.SYSTEMD_BOOT] * 2
    (machine.root / "mounts").unlink()
    assert read_partitions(machine) == before


def test_an_old_kernel_may_go_with_the_refresh(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    updates(machine, "6.17.2-1-pve", NEW)
    put(machine, "/proc/sys/kernel/osrelease", NEW)
    assert entry(machine, "esps/a", RELEASE), "it ran when the last kernel came"
    apply(machine)
    assert not entry(machine, "esps/a", RELEASE)
    assert entry(machine, "esps/a", NEW) == LINE


def test_words_that_the_entries_do_not_have_yet_come_with_the_refresh(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    put(machine, CMDLINE, f"{PROXMOX_LINE} mine=1\n")
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    assert any(
        "has other words than /etc/kernel/cmdline: the refresh takes those" in w for w in prepared.warnings
    )
    apply(machine)
    assert entry(machine, "esps/b", OLD) == f"{PROXMOX_LINE} mine=1 memmap=1G!4G"
    remove(machine)
    assert entry(machine, "esps/b", OLD) == f"{PROXMOX_LINE} mine=1"


@pytest.mark.parametrize("text", ["", "title x\nversion 1\noptions "])
def test_an_entry_that_a_killed_run_tore_is_written_again(text: str, tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    before = tree(machine)
    put(machine, f"/esps/b/loader/entries/proxmox-{OLD}.conf", text)
    apply(machine)
    put(machine, f"/esps/b/loader/entries/proxmox-{OLD}.conf", text)
    apply(machine)
    assert entry(machine, "esps/b", OLD) == LINE
    put(machine, f"/esps/b/loader/entries/proxmox-{OLD}.conf", text)
    remove(machine)
    assert tree(machine) == before


def test_a_pinned_kernel_is_the_one_that_boots(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    put(machine, "/etc/kernel/proxmox-boot-pin", f"{OLD}\n")
    updates(machine)
    target = obstacles.target(machine)
    assert target is not None
    assert target.release == OLD


def test_without_its_program_its_machine_is_left_alone(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    (machine.root / "sbin/proxmox-boot-tool").unlink()
    assert isinstance(detect.of(machine), Owned)


def test_without_root_the_line_is_known_and_the_entries_are_not(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    apply(machine)
    machine.root_user = False
    assert [i.text for i in prepare.next_line(machine).reservations] == ["1G!4G"]
    checks = {c.name: c for c in ladder.verdict_of(observe.observe(machine, 0)).checks}
    assert checks["configured"].status in ("ok", "pending")
    assert checks["generated"].status == "skipped"
    assert "only root" in checks["generated"].found
    with pytest.raises(EmupmemError) as caught:
        prepare.prepare_remove(machine)
    assert caught.value.hint == "run it with sudo"


def test_a_line_copied_from_a_boot_of_grubs_does_not_make_it_grubs(tmp_path: Path) -> None:
    machine = proxmox(tmp_path)
    line = f"BOOT_IMAGE=/vmlinuz {PROXMOX_LINE}"
    put(machine, CMDLINE, f"{line}\n")
    updates(machine)
    put(machine, "/proc/cmdline", f"{line}\n")
    is_changed_by(ProxmoxBootTool, machine)


def test_all_commands_speak_of_proxmox_boot_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    machine = proxmox(tmp_path / "machine")
    fake.running(monkeypatch.setattr, machine)
    for root in (False, True):
        machine.root_user = root
        assert "sudo emupmem apply --size 1G" in run("suggest", "--size", "1G").out
    found = {f.name: f for f in look.findings_of(machine)}
    assert (
        found["loader"].evidence
        == f"systemd-boot 252.12-1, 4 entries of this system in {proxmox_boot_tool.MENU}, "
        "by proxmox-boot-tool"
    )
    assert f"new kernels take {CMDLINE}" in found["source"].evidence
    assert (
        "a trial is not known for proxmox-boot-tool" in run("apply", "--size", "1G", "--yes", "--trial").err
    )
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert "proxmox-boot-tool refresh" in done.out + done.err
    assert f"memmap=1G!4G in {CMDLINE}" in run("verify", "--wait", "0").out
    machine.root_user = False
    done = run("verify", "--wait", "0")
    assert "not seen: generated" in done.out + done.err
    machine.root_user = True
    assert run("remove", "--yes").status == 0


def test_of_a_tree_the_line_is_changed_and_the_refresh_named(tmp_path: Path, run: Run, log: str) -> None:
    machine = proxmox(tmp_path / "tree")
    (machine.root / "usr/sbin").mkdir(parents=True)
    (machine.root / "sbin/proxmox-boot-tool").rename(machine.root / "usr/sbin/proxmox-boot-tool")
    before = tree(machine)
    for _ in range(2):
        done = run("apply", "--size", "1G", "--yes", "--root", str(machine.root), "--from", log)
        assert done.status == 0, done
        assert changed(before, tree(machine)) == {CMDLINE[1:]}
        assert machine.read(CMDLINE) == f"{LINE}\n".encode()
    assert "where GRUB starts that machine" in done.out + done.err
    done = run("remove", "--yes", "--root", str(machine.root))
    assert done.status == 0, done
    assert "proxmox-boot-tool refresh" in done.out + done.err
    assert tree(machine) == before
