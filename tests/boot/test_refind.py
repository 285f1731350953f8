# SPDX-License-Identifier: Apache-2.0
"""rEFInd: refind_linux.conf is changed, and what else there may be is left alone (mkrlconf itself: tests/scenario)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import detect, obstacles, prepare
from emupmem.boot.loader import Options, Owned
from emupmem.boot.refind import OPTIONS, Refind
from emupmem.boot.transaction import carry_out_change
from emupmem.doctor import look
from emupmem.model import GIB, EmupmemError, Request
from emupmem.report import collected, gather
from tests import fake
from tests.boot import test_loader
from tests.boot.test_generators import changed, tree
from tests.boot.test_loader import EFI_NAME, ROOT, apply, efi, is_changed_by, remove, survey_of, without_grub
from tests.cli.runner import Run
from tests.cli.test_cli import log as log  # the fixture
from tests.fake import RELEASE, FakeMachine, put

TEXT = f'''"Boot with standard options"  "{ROOT}"
"Boot to single-user mode"    "{ROOT} single"
"Boot with minimal options"   "ro root=UUID=0"

# the other system
"Other"\t"root=UUID=1 rw"
'''
STOCK = """timeout 20
#menuentry "Arch" {
#    options "root=x"
#}
menuentry Ubuntu {
    loader /EFI/ubuntu/grubx64.efi
    disabled
    options "root=x"
}
menuentry Windows {
    loader \\EFI\\Microsoft\\Boot\\bootmgfw.efi
}
include themes/mine/theme.conf
"""


def refind(root: Path, text: str = TEXT) -> FakeMachine:
    """A machine that rEFInd starts, as refind-install and mkrlconf leave it."""
    machine = fake.build(root)
    without_grub(machine)
    efi(machine, "LoaderInfo", "rEFInd 0.14.2")
    put(machine, "/proc/cmdline", f"{ROOT} initrd=boot\\initrd.img-{RELEASE}\n")
    put(machine, OPTIONS, text)
    put(machine, "/boot/efi/EFI/refind/refind.conf", STOCK)
    put(machine, "/boot/efi/EFI/refind/themes/mine/theme.conf", "banner x.png\n")
    put(machine, f"/boot/vmlinuz-{RELEASE}", "")
    return machine


def test_one_file_changes_and_all_lines_of_this_system_carry_it(tmp_path: Path) -> None:
    machine = refind(tmp_path)
    is_changed_by(Refind, machine)
    before = tree(machine)
    outcome = apply(machine)
    assert outcome is not None
    assert outcome.entries == 3
    assert changed(before, tree(machine)) == {OPTIONS[1:]}
    text = machine.peek(OPTIONS)
    assert f'standard options"  "{ROOT} memmap=1G!4G"\n' in text
    assert 'minimal options"   "ro root=UUID=0 memmap=1G!4G"\n' in text
    assert text.endswith('"Other"\t"root=UUID=1 rw"')
    remove(machine)
    assert tree(machine) == before


@pytest.mark.parametrize(
    "check",
    [
        test_loader.test_apply_and_remove_leave_all_other_words_alone,
        test_loader.test_replace_add_and_a_different_size,
        test_loader.test_nokaslr_comes_and_goes_with_the_reservation,
        test_loader.test_a_dry_run_changes_nothing,
    ],
)
def test_it_is_a_loader_like_the_others(check: Callable[[FakeMachine], None], tmp_path: Path) -> None:
    check(refind(tmp_path))


def stanza(machine: FakeMachine) -> None:
    put(machine, "/boot/efi/EFI/refind/refind.conf", STOCK.replace("    disabled\n", ""))


def included(machine: FakeMachine) -> None:
    text = f'menuentry "Mine" {{\n  loader /vmlinuz\n  initrd /initrd\n  options "{ROOT}"\n}}\n'
    put(machine, "/boot/efi/EFI/refind/themes/mine/theme.conf", text)


def behind_a_submenu(machine: FakeMachine) -> None:
    text = f"""menuentry "Mine" {{
  loader /vmlinuz
  submenuentry "single" {{
    add_options "single"
    disabled
  }}
  initrd /initrd
  options "{ROOT}"
}}
"""
    put(machine, "/boot/efi/EFI/refind/refind.conf", text)


def in_capitals(machine: FakeMachine) -> None:
    text = f'MenuEntry "Mine" {{\n  Loader /vmlinuz\n  Options "{ROOT}"\n}}\n'
    put(machine, "/boot/efi/EFI/refind/refind.conf", text)


def in_the_default_folder(machine: FakeMachine) -> None:
    text = f'menuentry "Mine" {{\n  loader /vmlinuz\n  options "{ROOT}"\n}}\n'
    put(machine, "/boot/efi/EFI/BOOT/refind.conf", text)


def nameless(machine: FakeMachine) -> None:
    (machine.root / f"sys/firmware/efi/efivars/LoaderInfo-{EFI_NAME}").unlink()


@pytest.mark.parametrize(
    "spoil", [stanza, included, behind_a_submenu, in_capitals, in_the_default_folder, nameless]
)
def test_where_the_words_may_come_from_elsewhere_it_is_left_alone(
    spoil: Callable[[FakeMachine], None], tmp_path: Path
) -> None:
    machine = refind(tmp_path)
    spoil(machine)
    assert isinstance(detect.of(machine), Owned)


@pytest.mark.parametrize(
    "line", ["Boot root=UUID=0", '"Boot" root=UUID=0', f'"a" "{ROOT} x=""b"""', '"a" "b" "c"']
)
def test_other_lines_are_refused(line: str, tmp_path: Path) -> None:
    machine = refind(tmp_path, f"{TEXT}{line}\n")
    before = tree(machine)
    for do in (apply, obstacles.refuse_machine):
        with pytest.raises(
            EmupmemError, match=r"refind_linux\.conf:7 is not a title and options in double quotes"
        ):
            do(machine)
    assert tree(machine) == before


def test_a_nokaslr_that_a_person_wrote_into_one_line_stays(tmp_path: Path) -> None:
    text = f'"Boot" "{ROOT}"\n"kgdb" "{ROOT} nokaslr kgdboc=ttyS0"\n'
    machine = refind(tmp_path, text)
    wanted = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), Options(nokaslr=True))
    assert "an entry has nokaslr already: remove leaves it in all entries" in wanted.warnings
    carry_out_change(machine, wanted)
    assert machine.text(OPTIONS).count("nokaslr") == 2
    remove(machine)
    assert machine.text(OPTIONS) == text.replace(f'"{ROOT}"', f'"{ROOT} nokaslr"')


def test_a_first_line_of_another_system_is_told(tmp_path: Path) -> None:
    machine = refind(tmp_path)
    assert obstacles.refuse_machine(machine) == ()
    put(machine, OPTIONS, f'"New" "{ROOT} rootflags=subvol=@new"\n{TEXT}')
    (told,) = obstacles.refuse_machine(machine)
    assert "rEFInd starts “New”, the first line of /boot/refind_linux.conf" in told
    assert "choose this one in its menu" in told


def test_a_file_for_another_system_is_refused(tmp_path: Path) -> None:
    machine = refind(tmp_path, '"Other" "root=UUID=1"\n')
    with pytest.raises(EmupmemError, match=r"no line of /boot/refind_linux\.conf starts this system"):
        prepare.next_line(machine)


def test_a_tree(tmp_path: Path, run: Run, log: str) -> None:
    machine = refind(tmp_path / "tree")
    before = tree(machine)
    done = run("apply", "--size", "1G", "--yes", "--root", str(machine.root), "--from", log)
    assert done.status == 0, done
    assert changed(before, tree(machine)) == {OPTIONS[1:]}
    assert run("remove", "--yes", "--root", str(machine.root)).status == 0
    assert tree(machine) == before


def test_all_commands_speak_of_refind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    machine = refind(tmp_path / "machine")
    fake.running(monkeypatch.setattr, machine)
    assert "sudo emupmem apply --size 1G" in run("suggest", "--size", "1G").out
    for seen in (machine, collected.Collected(gather.gather_machine(machine).archive)):
        found = {f.name: f for f in look.findings_of(seen)}
        assert found["loader"].evidence.startswith(f"rEFInd 0.14.2, 3 entries of this system in {OPTIONS}")
        assert f"new kernels take {OPTIONS}" in found["source"].evidence
    assert "a trial is not known for rEFInd" in run("apply", "--size", "1G", "--yes", "--trial").err
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 0, done
    assert "press F2 twice" in done.out + done.err
    assert f"memmap=1G!4G in {OPTIONS}" in run("verify", "--wait", "0").out
    assert run("remove", "--yes").status == 0
