# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong in a change, /etc and /boot are as they were: names, kinds, modes, owners, contents, links.

The worlds and the stand-ins of the loaders' programs are those of tests/boot/test_loader.py.
"""

from __future__ import annotations

import errno
import itertools
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import emupmem
import emupmem.boot.grub.environment
import emupmem.system.backups
import emupmem.system.files
from emupmem.boot import loader, prepare, systemd_boot, transaction
from emupmem.boot.grub import environment
from emupmem.model import GIB, EmupmemError, Request
from tests import fake
from tests.boot import test_loader
from tests.boot.test_loader import (
    BASIC,
    FEDORA,
    ID,
    MACHINES,
    ROOT,
    fedora,
    opensuse,
    program,
    rhel8_uefi,
    survey_of,
)
from tests.fake import RELEASE, FakeMachine, put

FAILURES = ("start", "half", "end", "wrong", "interrupt")
WORLDS = {n: build for n, (build, _) in MACHINES.items() if n.startswith(("grub-bls", "sdbootutil"))}
WORLDS["sdbootutil-add-all"] = WORLDS.pop("sdbootutil-old")


def tree(machine: FakeMachine) -> dict[str, tuple[object, ...]]:
    """All of /etc and /boot."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (p for top in ("etc", "boot") for p in (machine.root / top).rglob("*")):
        info = path.lstat()
        content: object = None
        if stat.S_ISLNK(info.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        found[str(path.relative_to(machine.root))] = (info.st_mode, info.st_uid, info.st_gid, content)
    return found


def apply(machine: FakeMachine, size: int = GIB, *, replace: bool = False, nokaslr: bool = False) -> None:
    options = loader.Options(replace=replace, nokaslr=nokaslr)
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(size), options)
    transaction.carry_out_change(machine, prepared)


def remove(machine: FakeMachine) -> None:
    transaction.carry_out_change(machine, prepare.prepare_remove(machine))


def replace(machine: FakeMachine) -> None:
    apply(machine, 2 * GIB, replace=True)


@pytest.fixture(params=[n if n in BASIC else pytest.param(n, marks=pytest.mark.slow) for n in WORLDS])
def here(request: pytest.FixtureRequest, tmp_path: Path) -> FakeMachine:
    machine = WORLDS[request.param](tmp_path)
    for name in machine.names("/boot/loader/entries"):
        (machine.root / "boot/loader/entries" / name).chmod(0o600)
    return machine


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_failure_nothing_is_changed(here: FakeMachine, failure: str) -> None:
    steps: tuple[Callable[[FakeMachine], None], ...] = (apply, replace, remove)
    for step in steps:
        before, record = tree(here), here.peek("/var/backups/emupmem/words")
        put(here, "/fail", failure)
        if failure == "wrong" and step is remove:
            continue
        with pytest.raises(EmupmemError) as caught:
            step(here)
        assert "the old configuration is back" in caught.value.hint
        assert tree(here) == before
        assert here.peek("/var/backups/emupmem/words") == record
        (here.root / "fail").unlink()
        step(here)


def test_after_remove_all_is_as_it_was_before_apply(here: FakeMachine) -> None:
    before = tree(here)
    apply(here, nokaslr=True)
    replace(here)
    assert "memmap=2G!4G" in (here.root / "etc/kernel/cmdline").read_text()
    assert "root=" in (here.root / "etc/kernel/cmdline").read_text(), "a kernel without it does not boot"
    remove(here)
    assert tree(here) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["systemd-boot", "grub-bls-without-cmdline", "grub-bls-rhel8-uefi", "sdbootutil"]
)
def test_a_disk_that_is_full_from_some_write_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = emupmem.system.files.write_like
    for most in itertools.count():
        machine = MACHINES[name][0](tmp_path / str(most))
        before, left = tree(machine), [most]

        def full(*given: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(emupmem.system.files, "write_like", full)
        monkeypatch.setattr(emupmem.system.backups, "write_like", full)
        monkeypatch.setattr(emupmem.boot.grub.environment, "write_like", full)
        try:
            apply(machine)
        except EmupmemError as exc:
            assert "nothing" in exc.hint, most
            assert tree(machine) == before, most
        else:
            break
        finally:
            monkeypatch.undo()
    assert most > 5


def test_links_stay_links(tmp_path: Path) -> None:
    """sed -i puts a file in the place of a link, grub2-editenv writes through it."""
    machine = rhel8_uefi(tmp_path)
    program(machine, "grubby", test_loader.GRUBBY, QUIET=False, OLD=True)
    defaults = machine.root / "etc/default/grub"
    defaults.write_bytes(defaults.read_bytes().replace(b'LINUX=""', b'LINUX="quiet"'))
    defaults.rename(machine.root / "etc/grub-defaults")
    defaults.symlink_to("../grub-defaults")
    before = tree(machine)
    put(machine, "/fail", "end")
    with pytest.raises(EmupmemError):
        apply(machine)
    assert tree(machine) == before


# RHEL 8 -----------------------------------------------------------------------------------------------


def test_the_menu_in_the_efi_system_partition(tmp_path: Path) -> None:
    machine = rhel8_uefi(tmp_path)
    assert environment.grub_cfg(machine) == "/boot/efi/EFI/redhat/grub.cfg"
    assert environment.grubenv_name(machine) == "/boot/efi/EFI/redhat/grubenv"
    apply(machine)
    assert f"kernelopts={ROOT} memmap=1G!4G\n" in machine.peek("/boot/efi/EFI/redhat/grubenv") + "\n"
    assert machine.is_link("/boot/grub2/grubenv")


def test_a_stub_in_the_efi_system_partition_is_no_menu(tmp_path: Path) -> None:
    """RHEL 9, Fedora 34 and later, Debian: it leads to the menu."""
    machine = fedora(tmp_path)
    stub = "search --no-floppy --fs-uuid --set=dev X\nset prefix=($dev)/grub2\nexport $prefix\n"
    put(machine, "/boot/efi/EFI/fedora/grub.cfg", f"{stub}configfile $prefix/grub.cfg\n")
    put(machine, "/sys/firmware/efi/fw_platform_size", "64\n")
    (machine.root / "etc/grub2-efi.cfg").symlink_to("../boot/grub2/grub.cfg")
    assert environment.grub_cfg(machine) == "/boot/grub2/grub.cfg"
    assert environment.grub_cfgs(machine) == ["/boot/grub2/grub.cfg"]
    (machine.root / "boot/grub2/grub.cfg").unlink()
    assert environment.grub_cfg(machine) == "/boot/grub/grub.cfg", "a stub alone is none either"


def test_the_menu_of_another_system_is_not_ours(tmp_path: Path) -> None:
    machine = fake.build(tmp_path)
    put(machine, "/boot/efi/EFI/redhat/grub.cfg", "blscfg\n")
    put(machine, "/sys/firmware/efi/fw_platform_size", "64\n")
    assert environment.grub_cfg(machine) == "/boot/grub/grub.cfg"


def test_a_menu_of_bios_times_is_not_the_one_that_uefi_started(tmp_path: Path) -> None:
    machine = rhel8_uefi(tmp_path)
    put(machine, "/boot/grub2/grub.cfg", "blscfg\n")
    assert environment.grub_cfg(machine) == "/boot/efi/EFI/redhat/grub.cfg"
    (machine.root / "sys/firmware/efi/fw_platform_size").unlink()
    (machine.root / "sys/firmware/efi").rmdir()
    assert environment.grub_cfg(machine) == "/boot/grub2/grub.cfg"


@pytest.mark.parametrize("step", [apply, remove])
def test_a_variable_that_is_not_set_stops_before_anything_runs(
    step: Callable[[FakeMachine], None], tmp_path: Path
) -> None:
    machine = fedora(tmp_path, "$kernelopts $tuned_params")
    if step is remove:
        put(machine, f"/boot/loader/entries/{ID}-0.conf", FEDORA.replace("OPTIONS", f"{ROOT} memmap=1G!4G"))
    program(machine, "grubby", "raise SystemExit('never')")
    before = tree(machine)
    with pytest.raises(
        EmupmemError, match=r"takes its words from \$kernelopts, which /boot/grub2/grubenv does not set"
    ):
        step(machine)
    assert tree(machine) == before


@pytest.mark.parametrize("options", ["", f"options {ROOT}\noptions quiet2"])
def test_entries_that_grubby_cannot_change(tmp_path: Path, options: str) -> None:
    machine = test_loader.fedora_without_cmdline(tmp_path)
    text = FEDORA.replace("options OPTIONS", options)
    put(machine, f"/boot/loader/entries/{ID}-0-rescue.conf", text)
    before = tree(machine)
    with pytest.raises(EmupmemError, match="not as planned"):
        apply(machine)
    assert tree(machine) == before


# Snapshots ------------------------------------------------------------------------------------------


def with_a_snapshot(machine: FakeMachine, number: int = 6) -> None:
    """snapper made one: its entry is a copy, with the words of the moment."""
    folder = machine.root / "boot/efi/loader/entries"
    text = (folder / f"opensuse-{RELEASE}-5.conf").read_text()
    (folder / f"opensuse-{RELEASE}-{number}.conf").write_text(text.replace("/5/", f"/{number}/"))


def test_after_a_snapshot_a_change_is_possible(tmp_path: Path) -> None:
    machine = opensuse(tmp_path)
    apply(machine)
    with_a_snapshot(machine)
    replace(machine)
    assert [i.text for i in prepare.next_line(machine).reservations] == ["2G!4G"]
    with_a_snapshot(machine, 7)
    prepared = prepare.prepare_remove(machine)
    assert "3 entries of other snapshots keep their words" in prepared.warnings
    transaction.carry_out_change(machine, prepared)
    assert not prepare.next_line(machine).reservations
    assert "memmap=1G!4G" in machine.peek(f"/boot/efi/loader/entries/opensuse-{RELEASE}-6.conf")


def test_the_snapshot_that_runs_is_the_one_that_is_mounted(tmp_path: Path) -> None:
    machine = opensuse(tmp_path)
    put(machine, "/proc/cmdline", ROOT)
    put(
        machine,
        "/proc/self/mountinfo",
        "23 1 0:25 / / rw - rootfs none rw\n64 23 0:35 /@/.snapshots/5/snapshot / rw,noatime - btrfs /dev/vda2 rw\n",
    )
    entries = systemd_boot.SdBootUtil().standing(machine).entries
    assert [e.ids[0] for e in entries if e.ours] == [f"opensuse-{RELEASE}-5"]


@pytest.mark.parametrize("file", ["loader.conf", "cmdline", "fstab"])
def test_the_snapshot_of_a_tree(tmp_path: Path, file: str) -> None:
    machine = opensuse(tmp_path)
    machine.live = False
    (machine.root / "etc/kernel/cmdline").unlink()
    names = {
        "loader.conf": ("/boot/efi/loader/loader.conf", f"timeout 5\ndefault opensuse-{RELEASE}-4.conf\n"),
        "cmdline": ("/etc/kernel/cmdline", f"{ROOT} rootflags=subvol=@/.snapshots/4/snapshot\n"),
        "fstab": ("/etc/fstab", "UUID=0 / btrfs defaults,subvol=@/.snapshots/4/snapshot 0 0\n"),
    }
    put(machine, *names[file])
    entries = systemd_boot.SystemdBoot().standing(machine).entries
    assert [e.ids[0] for e in entries if e.ours] == [f"opensuse-{RELEASE}-4"]
