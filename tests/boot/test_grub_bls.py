# SPDX-License-Identifier: Apache-2.0
"""GRUB with entries of the Boot Loader Specification: whose they are, trees, trials (grubby: see test_loader.py)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from emupmem.boot import detect, obstacles, prepare, trial
from emupmem.boot.grub_bls import TRIAL_ID
from emupmem.boot.loader import Options
from emupmem.boot.transaction import carry_out_change
from emupmem.doctor import look
from emupmem.model import GIB, EmupmemError, Request
from emupmem.system.machine import Machine
from tests import fake
from tests.boot import generators
from tests.boot.test_generators import changed, tree
from tests.boot.test_loader import (
    FEDORA,
    ID,
    OTHER,
    ROOT,
    apply,
    content,
    fedora,
    lines,
    remove,
    rhel8_uefi,
    survey_of,
)
from tests.cli.runner import Run
from tests.cli.test_cli import log as log  # the fixture
from tests.fake import RELEASE, FakeMachine, put, script

pytestmark = pytest.mark.slow  # the inner loop has each loader in test_loader.py

ENTRIES = "/boot/loader/entries"
TRIAL = f"{ENTRIES}/emupmem-trial.conf"
GRUBENV = "/boot/grub2/grubenv"
NEW = "7.1.0-3"
CFG = """load_env
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
else
   set default="${saved_entry}"
fi
insmod blscfg
blscfg
"""

# After grub2-editenv of GRUB 2.06 (util/grub-editenv.c): a block of 1024 bytes, # to its end, written in place.
EDITENV = rf"""#!/bin/sh
file="$1" verb="$2" name="${{3%%=*}}" value="${{3#*=}}" fill={"#" * 1024}
text="$(sed '1d; s/#*$//' "$file" | grep -v "^$name=" | grep .)"
[ "$verb" = set ] && text="${{text:+$text
}}$name=$value"
text="# GRUB Environment Block
${{text:+$text
}}"
while [ ${{#fill}} -gt $((1024 - ${{#text}})) ]; do fill=${{fill#?}}; done
printf %s "$text$fill" > "$file"
"""


def env(machine: Machine, **variables: str) -> None:
    text = "# GRUB Environment Block\n" + "".join(f"{k}={v}\n" for k, v in variables.items())
    put(machine, GRUBENV, text + "#" * (1024 - len(text)))


def knows_trials(root: Path, options: str = ROOT) -> FakeMachine:
    """Fedora as Anaconda leaves it: /boot on ext4, a saved entry, a menu that clears a choice for one start."""
    machine = fedora(root, options)
    put(machine, "/etc/machine-id", f"{ID}\n")
    put(machine, "/etc/os-release", 'NAME="Fedora Linux"\nID=fedora\n')
    put(machine, "/boot/grub2/grub.cfg", CFG)
    put(machine, f"/boot/vmlinuz-{RELEASE}", "")
    more = {"kernelopts": ROOT} if "$" in options else {}
    env(machine, saved_entry=f"{ID}-{RELEASE}", **more)
    put(
        machine,
        "/proc/self/mountinfo",
        "22 1 8:2 / /boot rw - ext4 /dev/vda2 rw\n23 1 8:3 / / rw - btrfs /dev/vda3 rw\n",
    )
    script(machine, "grub2-editenv", EDITENV)
    return machine


def begin(machine: FakeMachine, **options: bool) -> None:
    prepared = prepare.prepare_trial(machine, survey_of(machine), Request(GIB), Options(**options))  # type: ignore[arg-type]
    if prepared.needed:
        carry_out_change(machine, prepared)


def starts(machine: FakeMachine) -> None:
    """The machine starts its trial: GRUB clears the choice first."""
    env(machine, saved_entry=f"{ID}-{RELEASE}")
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=(hd0,gpt2)/vmlinuz-{RELEASE} {ROOT} memmap=1G!4G\n")
    put(machine, "/proc/stat", "cpu 0\nbtime 4000000000\n")


# Whose entries ---------------------------------------------------------------------------------------


def test_another_installation_that_shares_boot_is_named_and_left_alone(tmp_path: Path, run: Run) -> None:
    machine = fedora(tmp_path)
    put(machine, "/etc/machine-id", f"{ID}\n")
    other = FEDORA.replace("OPTIONS", "root=UUID=1 ro quiet")
    put(machine, f"{ENTRIES}/{OTHER}-{RELEASE}.conf", other)
    before = content(machine)
    said = f"{ENTRIES}/{OTHER}-{RELEASE}.conf starts another system, and grubby would change it as well"
    for do in (apply, obstacles.refuse_machine):
        with pytest.raises(EmupmemError) as caught:
            do(machine)
        assert caught.value.message == said
        assert "sudo grubby --update-kernel=/boot/vmlinuz-" in caught.value.hint
    assert content(machine) == before
    (machine.root / f"{ENTRIES[1:]}/{OTHER}-{RELEASE}.conf").unlink()
    apply(machine)
    assert all("memmap=1G!4G" in line for line in lines(machine).values())


def test_an_image_built_elsewhere_is_known_by_its_root(tmp_path: Path) -> None:
    """Its first entries have the id of the machine that built it."""
    machine = fedora(tmp_path)
    put(machine, "/etc/machine-id", f"{OTHER}\n")
    apply(machine)
    assert all("memmap=1G!4G" in line for line in lines(machine).values())


@pytest.mark.parametrize("root", [True, False])
def test_suggest_does_not_send_to_an_apply_that_refuses(
    root: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """The checks before a change know nothing of words that grubby would change."""
    machine = fedora(tmp_path, f"{ROOT} a=b&c")
    machine.root_user = root
    fake.running(monkeypatch.setattr, machine)
    done = run("suggest", "--size", "1G")
    assert done.status == 0, done
    assert "emupmem apply refuses here: the boot entries have the word a=b&c" in done.out
    assert "sudo emupmem apply" not in done.out
    assert "a=b&c" in run("suggest", "--size", "1G", "--json").json["refused"]["message"]
    assert "a=b&c" in run("apply", "--size", "1G", "--yes").err or not root


def test_a_grubenv_that_the_bios_grub_does_not_reach_is_refused(tmp_path: Path) -> None:
    """RHEL 8: the package for UEFI links it into the EFI system partition; grubby reports success all the same."""
    machine = rhel8_uefi(tmp_path)
    (machine.root / "sys/firmware/efi/fw_platform_size").unlink()
    (machine.root / "sys/firmware/efi").rmdir()
    (machine.root / "etc/grub2-efi.cfg").unlink()
    put(machine, "/boot/grub2/grub.cfg", "insmod blscfg\nblscfg\n")
    before = tree(machine)
    for do in (apply, obstacles.refuse_machine):
        with pytest.raises(EmupmemError, match="GRUB does not follow it onto another partition") as caught:
            do(machine)
        assert (
            "sudo cp --remove-destination /boot/efi/EFI/redhat/grubenv /boot/grub2/grubenv"
            in caught.value.hint
        )
    assert tree(machine) == before
    data = (machine.root / "boot/efi/EFI/redhat/grubenv").read_bytes()
    (machine.root / "boot/grub2/grubenv").unlink()
    put(machine, "/boot/grub2/grubenv", data)
    apply(machine)
    assert all("memmap=1G!4G" in line for line in lines(machine).values())


# What new kernels take -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (True, "new kernels take /etc/kernel/cmdline"),
        (False, "new kernels take the command line of the boot that runs (/proc/cmdline)"),
    ],
)
def test_the_doctor_names_the_true_source(there: bool, said: str, tmp_path: Path) -> None:
    machine = fedora(tmp_path)
    script(machine, "kernel-install", "#!/bin/sh\n")
    if not there:
        (machine.root / "etc/kernel/cmdline").unlink()
    found = {f.name: f for f in look.findings_of(machine)}
    assert said in found["source"].evidence


def updates(machine: FakeMachine, verb: str = "add", release: str = NEW) -> str:
    """A kernel comes or goes as its package's script does it; the new entry's words."""
    done = machine.output("grub-install-kernel", verb, release)
    assert done is not None
    assert done.status == 0, done
    found = re.search(r"^options (.*)$", machine.peek(f"{ENTRIES}/{ID}-{release}.conf"), re.MULTILINE)
    return found[1] if found is not None else ""


@pytest.mark.parametrize("loud", [False, True])
@pytest.mark.parametrize("there", [True, False])
def test_a_new_kernel_carries_it_and_after_remove_none_does(loud: bool, there: bool, tmp_path: Path) -> None:
    """Without /etc/kernel/cmdline a new kernel would take the words of the boot that runs."""
    machine = fedora(tmp_path, quiet=not loud)
    put(machine, "/etc/machine-id", f"{ID}\n")
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=(hd0,gpt2)/vmlinuz-{RELEASE} {ROOT}\n")
    script(machine, "grub-install-kernel", f"#!/bin/bash\n{generators.GRUB_INSTALL}")
    os.utime(machine.root / "etc/default/grub", (1e9, 1e9))
    if not there:
        (machine.root / "etc/kernel/cmdline").unlink()
    before = tree(machine)
    apply(machine)
    assert updates(machine) == f"{ROOT} memmap=1G!4G"
    apply(machine, 2 * GIB, replace=True)
    assert updates(machine, release="7.2") == f"{ROOT} memmap=2G!4G"
    # The reservation is booted while it is given back.
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=(hd0,gpt2)/vmlinuz-{NEW} {ROOT} memmap=2G!4G\n")
    remove(machine)
    assert updates(machine, release="7.3") == ROOT
    for release in (NEW, "7.2", "7.3"):
        updates(machine, "remove", release)
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=(hd0,gpt2)/vmlinuz-{RELEASE} {ROOT}\n")
    assert changed(before, tree(machine)) <= ({"etc/kernel/cmdline", "etc/kernel"} if not there else set())


@pytest.mark.parametrize("failure", ["start", "half", "end", "wrong", "interrupt"])
@pytest.mark.parametrize("there", [True, False])
def test_after_a_rollback_a_new_kernel_does_not(failure: str, there: bool, tmp_path: Path) -> None:
    machine = fedora(tmp_path)
    put(machine, "/etc/machine-id", f"{ID}\n")
    script(machine, "grub-install-kernel", f"#!/bin/bash\n{generators.GRUB_INSTALL}")
    os.utime(machine.root / "etc/default/grub", (1e9, 1e9))
    if not there:
        (machine.root / "etc/kernel/cmdline").unlink()
    before = tree(machine)
    put(machine, "/fail", failure)
    with pytest.raises(EmupmemError):
        apply(machine)
    left = tree(machine)
    assert {n for n in changed(before, left) if "/sed" not in n} == set()
    assert "memmap" not in updates(machine)
    assert "mkconfig" not in updates(machine), "/etc/default/grub is not newer than before"


# A tree ----------------------------------------------------------------------------------------------


def test_a_tree_is_edited_without_grubby(tmp_path: Path, run: Run, log: str) -> None:
    machine = fedora(tmp_path)
    put(machine, "/etc/machine-id", f"{ID}\n")
    before = tree(machine)
    done = run("apply", "--size", "1G", "--yes", "--root", str(machine.root), "--from", log)
    assert done.status == 0, done
    entries = {f"{ENTRIES[1:]}/{ID}-{r}.conf" for r in (RELEASE, "0-rescue")}
    assert changed(before, tree(machine)) == {"etc/default/grub", "etc/kernel/cmdline", *entries}
    assert machine.peek(f"{ENTRIES}/{ID}-{RELEASE}.conf").count(f"options {ROOT} memmap=1G!4G\n") == 1
    assert "On that machine: reboot" in done.out
    assert run("remove", "--yes", "--root", str(machine.root)).status == 0
    assert tree(machine) == before


@pytest.mark.parametrize("verb", ["apply", "remove"])
def test_a_tree_whose_words_are_in_grubenv_names_grubby(
    tmp_path: Path, run: Run, log: str, verb: str
) -> None:
    machine = rhel8_uefi(tmp_path)
    before = tree(machine)
    more = ("--size", "1G", "--from", log) if verb == "apply" else ()
    done = run(verb, *more, "--yes", "--root", str(machine.root))
    assert done.status == 1
    way = {"apply": "--args='memmap=1G!4G'", "remove": "--remove-args='memmap="}[verb]
    assert f"on that machine: sudo grubby --update-kernel=ALL {way}" in done.err
    assert tree(machine) == before


# A trial ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ROOT, "$kernelopts $tuned_params"])
def test_one_clone_of_the_default_entry_is_chosen_once(options: str, tmp_path: Path) -> None:
    machine = knows_trials(tmp_path, options)
    before = tree(machine)
    begin(machine)
    assert changed(before, tree(machine)) == {TRIAL[1:], GRUBENV[1:]}
    assert f"next_entry={TRIAL_ID}\n" in machine.peek(GRUBENV)
    assert f"linux /vmlinuz-{RELEASE}\n" in machine.peek(TRIAL)
    assert f"options {options} memmap=1G!4G\n" in machine.peek(TRIAL)
    seen = trial.state(machine)
    assert seen is not None
    assert seen.chosen
    made = tree(machine)
    begin(machine)
    assert tree(machine) == made
    carry_out_change(machine, prepare.prepare_abandon(machine))
    after = tree(machine)
    assert changed(before, after) <= {GRUBENV[1:]}
    assert "next_entry" not in machine.peek(GRUBENV)


def test_a_trial_that_runs_is_confirmed(tmp_path: Path) -> None:
    machine = knows_trials(tmp_path)
    begin(machine)
    starts(machine)
    seen = trial.state(machine)
    assert seen is not None
    assert seen.running
    carry_out_change(machine, prepare.prepare_confirm(machine))
    assert not machine.exists(TRIAL)
    assert all("memmap=1G!4G" in line for line in lines(machine).values())
    remove(machine)
    assert not any("memmap" in line for line in lines(machine).values())


@pytest.mark.parametrize("failure", ["start", "half", "end"])
def test_a_confirm_that_fails_leaves_the_trial(failure: str, tmp_path: Path) -> None:
    machine = knows_trials(tmp_path)
    begin(machine)
    starts(machine)
    before = tree(machine)
    put(machine, "/fail", failure)
    with pytest.raises(EmupmemError, match="grubby failed"):
        carry_out_change(machine, prepare.prepare_confirm(machine))
    assert {n for n in changed(before, tree(machine)) if "/sed" not in n} == set()
    (machine.root / "fail").unlink()
    carry_out_change(machine, prepare.prepare_confirm(machine))
    assert not machine.exists(TRIAL)
    assert all("memmap=1G!4G" in line for line in lines(machine).values())


def test_a_new_kernel_does_not_take_the_words_of_the_trial(tmp_path: Path) -> None:
    machine = knows_trials(tmp_path)
    script(machine, "kernel-install", "#!/bin/sh\n")
    (machine.root / "etc/kernel/cmdline").unlink()
    before = tree(machine)
    begin(machine)
    assert machine.peek("/etc/kernel/cmdline") == ROOT
    carry_out_change(machine, prepare.prepare_abandon(machine))
    assert changed(before, tree(machine)) <= {GRUBENV[1:]}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (env, "no entry is saved as the default"),
        (lambda m: env(m, saved_entry="0"), "no entry is saved as the default"),
        (lambda m: put(m, "/boot/grub2/grub.cfg", "blscfg\n"), "the menu does not clear next_entry"),
        (lambda m: put(m, "/proc/self/mountinfo", "22 1 0:2 / / rw - btrfs /dev/vda2 rw\n"), "is on btrfs"),
        (
            lambda m: put(m, "/etc/os-release", "ID=debian\n"),
            f"takes the default {ID}-{RELEASE} for a number",
        ),
    ],
)
def test_a_trial_is_refused_where_grub_could_not_forget_it(spoil: object, said: str, tmp_path: Path) -> None:
    machine = knows_trials(tmp_path)
    spoil(machine)  # type: ignore[operator]
    before = tree(machine)
    with pytest.raises(EmupmemError, match=said):
        begin(machine)
    assert tree(machine) == before


def test_somebody_elses_choice_comes_back_where_a_trial_fails(tmp_path: Path) -> None:
    machine = knows_trials(tmp_path)
    env(machine, saved_entry=f"{ID}-{RELEASE}", next_entry=f"{ID}-0-rescue")
    before = tree(machine)
    script(machine, "grub2-editenv", "#!/bin/sh\nexit 1\n")
    with pytest.raises(EmupmemError, match="cannot be written"):
        begin(machine)
    assert tree(machine) | {"sbin/grub2-editenv": ("", 0, b"")} == before | {
        "sbin/grub2-editenv": ("", 0, b"")
    }


def test_the_loader_is_found_as_before(tmp_path: Path) -> None:
    machine = knows_trials(tmp_path)
    assert detect.of(machine).title == "GRUB with BLS entries"
