# SPDX-License-Identifier: Apache-2.0
"""Trial boots by systemd-boot on a machine in a folder (real: tests/vm/test_vm_loader.py)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from emupmem.boot import change, detect, systemd_boot, trial
from emupmem.boot import efi as boot_efi
from emupmem.boot.bls import entries
from emupmem.boot.bls import text as bls_text
from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_abandon, prepare_confirm, prepare_trial
from emupmem.boot.transaction import carry_out_change
from emupmem.model import GIB, EmupmemError, Request
from tests.boot.test_loader import (
    ENTRY,
    ID,
    ROOT,
    apply,
    content,
    efi,
    lines,
    opensuse,
    program,
    remove,
    survey_of,
)
from tests.boot.test_loader import systemd_boot as build
from tests.fake import RELEASE, FakeMachine, put, script

pytestmark = pytest.mark.slow  # the inner loop has each loader in test_loader.py

ENTRIES = "/boot/efi/loader/entries"
FILE = f"{ENTRIES}/emupmem-trial.conf"

# bootctl(1): the name goes into LoaderEntryOneShot, an empty one deletes the variable. A variable is there as a
# whole or not at all, and nothing of it waits in memory (efivarfs): so it is renamed here.
BOOTCTL = f"""
import os, pathlib, sys
if sys.argv[1] != "set-oneshot" or (pathlib.Path(ROOT) / "fail").exists():
    sys.exit("Failed to update EFI variable: No space left on device")
file = pathlib.Path(ROOT) / "{boot_efi.ONE_SHOT.lstrip("/")}"
if sys.argv[2]:
    fresh = pathlib.Path(ROOT) / "var/variable"
    fresh.parent.mkdir(exist_ok=True)
    with fresh.open("wb") as new:
        new.write(bytes((7, 0, 0, 0)) + (sys.argv[2] + chr(0)).encode("utf-16-le"))
        new.flush()
        os.fsync(new.fileno())
    fresh.rename(file)
else:
    file.unlink()
"""


def knows_trials(root: Path) -> FakeMachine:
    """A machine that systemd-boot starts, and that knows a choice for one start."""
    made = build(root)
    put(made, f"/boot/efi/{ID}/{RELEASE}/linux", "")
    program(made, "bootctl", BOOTCTL)
    put(made, systemd_boot.FEATURES, b"\x06\0\0\0\xff\x7f\0\0\0\0\0\0")
    return made


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return knows_trials(tmp_path)


def begin(machine: FakeMachine, **options: bool) -> change.Change:
    prepared = prepare_trial(machine, survey_of(machine), Request(GIB), Options(**options))  # type: ignore[arg-type]
    if prepared.needed:
        carry_out_change(machine, prepared)
    return prepared


def starts(machine: FakeMachine, words: str = "memmap=1G!4G") -> None:
    """The machine is started: the loader forgets the choice first."""
    (machine.root / boot_efi.ONE_SHOT.lstrip("/")).unlink(missing_ok=True)
    put(machine, "/proc/cmdline", f"initrd=\\x {ROOT} systemd.machine_id={ID} {words}\n")
    put(machine, "/proc/stat", "cpu 0\nbtime 4000000000\n")


def test_one_extra_entry_is_chosen_once_and_all_else_stays(machine: FakeMachine) -> None:
    before = content(machine)
    made = begin(machine, nokaslr=True)
    after = content(machine)
    assert made.tries == "memmap=1G!4G"
    assert after.keys() - before.keys() == {FILE.lstrip("/")}
    assert before.items() <= after.items()
    text = after[FILE.lstrip("/")].decode()
    default = before[f"{ENTRIES}/{ID}-{RELEASE}.conf".lstrip("/")].decode()
    assert bls_text.options(text) == f"{bls_text.options(default)} memmap=1G!4G nokaslr"
    assert bls_text.value(text, "title") == "Trial of emupmem: memmap=1G!4G nokaslr"
    assert bls_text.value(text, "sort-key") > "zz", "the last one: the first boots by default"
    for key in ("linux", "initrd", "machine-id"):
        assert bls_text.value(text, key) == bls_text.value(default, key)
    state = trial.state(machine)
    assert state is not None
    assert (state.words, state.chosen, state.running) == (("memmap=1G!4G", "nokaslr"), True, False)
    assert not any("memmap" in line for line in lines(machine).values())
    assert not begin(machine, nokaslr=True).needed


def test_a_trial_that_failed_can_be_tried_again_or_abandoned(machine: FakeMachine) -> None:
    before = content(machine)
    begin(machine)
    starts(machine, "")
    state = trial.state(machine)
    assert state is not None
    assert (state.chosen, state.running, state.started_since) == (False, False, True)
    with pytest.raises(EmupmemError, match="this boot is not the trial"):
        prepare_confirm(machine)
    assert begin(machine).needed, "the entry is as it was, but not chosen"
    assert entries.trial_chosen(machine)
    carry_out_change(machine, prepare_abandon(machine))
    assert content(machine) == before
    assert not entries.trial_chosen(machine)
    with pytest.raises(EmupmemError, match="no trial to abandon"):
        prepare_abandon(machine)
    with pytest.raises(EmupmemError, match="no trial to confirm"):
        prepare_confirm(machine)


def test_confirm_makes_it_permanent(machine: FakeMachine) -> None:
    begin(machine, nokaslr=True)
    starts(machine, "memmap=1G!4G nokaslr")
    state = trial.state(machine)
    assert state is not None
    assert state.running
    carry_out_change(machine, prepare_confirm(machine))
    assert not machine.exists(FILE)
    mine = [line for name, line in lines(machine).items() if "(other)" not in name]
    assert len(mine) == 2
    assert all(line.endswith("memmap=1G!4G nokaslr") for line in mine)
    assert b"memmap=1G!4G nokaslr" in (machine.root / "etc/kernel/cmdline").read_bytes()
    remove(machine)
    assert not any("memmap" in line or "nokaslr" in line for line in lines(machine).values())


@pytest.mark.parametrize("end", [apply, remove])
def test_apply_and_remove_take_the_trial_away(machine: FakeMachine, end: object) -> None:
    begin(machine)
    assert callable(end)
    end(machine)
    assert not machine.exists(FILE)
    assert not entries.trial_chosen(machine)


def test_new_kernels_do_not_take_the_words_of_the_trial(machine: FakeMachine) -> None:
    (machine.root / "etc/kernel/cmdline").unlink()
    begin(machine)
    assert (machine.root / "etc/kernel/cmdline").read_text() == f"{ROOT}\n"
    starts(machine)
    carry_out_change(machine, prepare_abandon(machine))
    assert machine.exists("/etc/kernel/cmdline"), (
        "while the trial runs kernel-install would read /proc/cmdline"
    )
    assert not machine.exists(FILE)


def test_without_a_cmdline_file_an_abandoned_trial_leaves_none(machine: FakeMachine) -> None:
    (machine.root / "etc/kernel/cmdline").unlink()
    before = content(machine)
    begin(machine)
    starts(machine, "")
    carry_out_change(machine, prepare_abandon(machine))
    assert content(machine) == before


def test_a_choice_that_cannot_be_made_is_rolled_back(machine: FakeMachine) -> None:
    (machine.root / "etc/kernel/cmdline").unlink()
    before = content(machine)
    put(machine, "/fail", "")
    with pytest.raises(
        EmupmemError, match="bootctl failed with status 1: Failed to update EFI variable"
    ) as told:
        begin(machine)
    assert "the old configuration is back" in told.value.hint
    assert content(machine) == before


def test_what_goes_wrong_after_the_choice_takes_it_back(machine: FakeMachine) -> None:
    before = content(machine)
    torn = f"(pathlib.Path(ROOT) / '{ENTRIES.lstrip('/')}/{ID}-6.1.0-9.conf').unlink(missing_ok=True)\n"
    program(machine, "bootctl", BOOTCTL + torn)
    with pytest.raises(EmupmemError, match="entries are gone"):
        begin(machine)
    assert not entries.trial_chosen(machine)
    assert FILE.lstrip("/") not in content(machine)
    assert content(machine).items() <= before.items()


def test_where_the_loader_cannot_forget_it_a_trial_is_refused(machine: FakeMachine) -> None:
    put(machine, systemd_boot.FEATURES, b"\x06\0\0\0\xf7\x7f\0\0\0\0\0\0")
    with pytest.raises(EmupmemError, match="does not say that it knows a choice for one start"):
        begin(machine)


def test_without_bootctl_a_trial_is_refused(machine: FakeMachine) -> None:
    (machine.root / "sbin/bootctl").unlink()
    with pytest.raises(EmupmemError, match="bootctl is not installed"):
        begin(machine)


def test_an_entry_that_could_become_the_default_is_refused(machine: FakeMachine) -> None:
    put(machine, f"{ENTRIES}/{ID}-{RELEASE}.conf", ENTRY.replace("sort-key   debian\n", ""))
    with pytest.raises(EmupmemError, match="has no sort-key"):
        begin(machine)


def test_somebody_elses_choice_is_told(machine: FakeMachine) -> None:
    efi(machine, "LoaderEntryOneShot", "windows.conf\0")
    prepared = prepare_trial(machine, survey_of(machine), Request(GIB), Options())
    assert prepared.warnings[-1:] == (
        "the next start was chosen to be “windows.conf”: the trial takes its place",
    )


def test_an_entry_whose_kernel_is_gone_is_told(machine: FakeMachine) -> None:
    kernel = put(machine, f"/boot/efi/{ID}/{RELEASE}/linux", "")
    begin(machine)
    kernel.unlink()
    state = trial.state(machine)
    assert state is not None
    assert not state.chosen
    assert "was its kernel removed?" in state.why


def test_a_trial_is_for_a_first_reservation(machine: FakeMachine) -> None:
    apply(machine)
    with pytest.raises(EmupmemError, match="memmap=1G!4G is reserved already"):
        begin(machine)


def test_sdbootutil_has_no_trial(tmp_path: Path) -> None:
    other = opensuse(tmp_path)
    program(other, "bootctl", BOOTCTL)
    with pytest.raises(EmupmemError, match="a trial is not known for sdbootutil"):
        begin(other)


def test_the_trial_is_no_entry_that_a_change_is_about(machine: FakeMachine) -> None:
    begin(machine)
    other = detect.of(machine)
    assert all("trial" not in e.ids[0] for e in other.standing(machine).entries)
    script(machine, "kernel-install", "#!/bin/sh\nexit 1\n")
    assert os.path.basename(FILE) in machine.names(ENTRIES)  # noqa: PTH119


def test_somebody_elses_choice_is_back_where_the_trial_is_not_made(machine: FakeMachine) -> None:
    machine.output("bootctl", "set-oneshot", "windows.conf")
    prepared = prepare_trial(machine, survey_of(machine), Request(GIB), Options())

    def stop(step: str) -> None:
        if step == "chosen":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(EmupmemError, match="stopped by SIGTERM"):
        carry_out_change(machine, prepared, stop)
    assert boot_efi.one_shot(machine) == "windows.conf"


def test_a_word_that_the_default_has_already_is_no_obstacle(machine: FakeMachine) -> None:
    for name in machine.names("/boot/efi/loader/entries"):
        path = machine.root / "boot/efi/loader/entries" / name
        path.write_text(path.read_text().replace(" quiet", " quiet nokaslr"))
    begin(machine, nokaslr=True)
    state = trial.state(machine)
    assert state is not None
    assert state.words == ("memmap=1G!4G", "nokaslr")
