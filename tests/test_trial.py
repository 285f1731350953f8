"""Trial boots on a machine in a folder: one extra entry, chosen once, nothing permanent (real: test_vm_trial.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem import change, trial
from emupmem.change import Change, Options, carry_out, prepare_abandon, prepare_confirm, prepare_trial
from emupmem.model import GIB, EmupmemError, Request
from tests.fake import GENERATOR, RELEASE, STOCK, FakeMachine, build, leftovers, menu, put, script
from tests.test_change import FOUND
from tests.test_cli import Run
from tests.test_cli import here as here  # the fixtures
from tests.test_cli import run as run

HEADER = """  echo 'load_env'
  echo 'if [ "${next_entry}" ] ; then'
  echo '   set default="${next_entry}"'
  echo '   set next_entry='
  echo '   save_env next_entry'
  echo 'fi'
"""
TRIAL = """  if [ -x "$root/etc/grub.d/42_emupmem_trial" ]; then
    echo '### BEGIN /etc/grub.d/42_emupmem_trial ###'
    "$root/etc/grub.d/42_emupmem_trial"
    echo '### END /etc/grub.d/42_emupmem_trial ###'
  fi
} > "$out.new"
"""
EDITENV = """#!/bin/sh
file=$1
if [ "$2" = set ]; then echo "$3" > "$file"; else : > "$file"; fi
"""


def prepare(machine: FakeMachine) -> FakeMachine:
    """Let GRUB in the folder know trials: the header that clears the choice, the script, grub-editenv."""
    text = GENERATOR.replace("  echo 'set default=\"0\"'\n", HEADER + "  echo 'set default=\"0\"'\n")
    script(machine, "update-grub2", text.replace('} > "$out.new"\n', TRIAL))
    script(machine, "grub-editenv", EDITENV)
    put(machine, "/proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    put(machine, "/boot/grub/grubenv", "# GRUB Environment Block\n")
    done = machine.output("update-grub2")
    assert done is not None
    assert not done.status
    return machine


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return prepare(build(tmp_path))


def begin(machine: FakeMachine, size: int = GIB, **options: bool) -> Change:
    prepared = prepare_trial(machine, FOUND, Request(size), Options(**options))  # type: ignore[arg-type]
    carry_out(machine, prepared)
    return prepared


def boots(machine: FakeMachine, words: str = "memmap=1G!4G", since: int = 4_000_000_000) -> None:
    """Let the machine have been started into this command line."""
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro {words} quiet splash\n")
    put(machine, "/proc/stat", f"cpu 0\nbtime {since}\n")
    put(machine, "/boot/grub/grubenv", "")


def test_one_extra_entry_and_nothing_permanent(machine: FakeMachine) -> None:
    before = menu(machine)
    made = begin(machine)
    assert (machine.root / "etc/default/grub").read_bytes() == STOCK
    text = menu(machine)
    assert text.startswith(before)
    added = text[len(before) :]
    assert added.count("memmap=1G!4G") == 2, "in the title and on the linux line"
    assert "menuentry 'Trial of emupmem: memmap=1G!4G' --id emupmem-trial {" in added
    assert f"linux	/boot/vmlinuz-{RELEASE} root=UUID=0 ro  quiet splash memmap=1G!4G" in added
    assert f"initrd	/boot/initrd.img-{RELEASE}" in added
    assert machine.grubenv()["next_entry"] == "emupmem-trial"
    assert os.access(machine.root / "etc/grub.d/42_emupmem_trial", os.X_OK)
    assert made.tries == "memmap=1G!4G"
    assert made.memmap == ""
    assert "42_emupmem_trial" in made.diff
    state = trial.state(machine)
    assert state is not None
    assert (state.words, state.chosen, state.running) == (("memmap=1G!4G",), True, False)


def test_nokaslr_is_tried_as_well(machine: FakeMachine) -> None:
    begin(machine, nokaslr=True)
    assert "splash memmap=1G!4G nokaslr\n" in menu(machine)
    boots(machine, "memmap=1G!4G nokaslr")
    carry_out(machine, prepare_confirm(machine))
    assert b'LINUX="memmap=1G!4G nokaslr"' in (machine.root / "etc/default/grub").read_bytes()


def test_confirm_makes_it_permanent_and_takes_the_entry_away(machine: FakeMachine) -> None:
    begin(machine)
    boots(machine)
    carry_out(machine, prepare_confirm(machine))
    assert (machine.root / "etc/default/grub").read_bytes() == STOCK.replace(
        b'LINUX=""', b'LINUX="memmap=1G!4G"'
    )
    assert "Trial" not in menu(machine)
    assert menu(machine).count("memmap=1G!4G") == 3
    assert not machine.exists(trial.SCRIPT)
    assert trial.state(machine) is None
    assert leftovers(machine) == ["grubenv"]


def test_abandon_takes_only_the_entry_away(machine: FakeMachine) -> None:
    before = menu(machine)
    begin(machine)
    carry_out(machine, prepare_abandon(machine))
    assert menu(machine) == before
    assert not machine.exists(trial.SCRIPT)
    assert "next_entry" not in machine.grubenv()
    with pytest.raises(EmupmemError, match="there is no trial to abandon"):
        prepare_abandon(machine)


def test_a_permanent_apply_ends_the_trial(machine: FakeMachine) -> None:
    begin(machine)
    carry_out(machine, change.prepare_apply(machine, FOUND, Request(GIB), Options()))
    assert not machine.exists(trial.SCRIPT)
    assert menu(machine).count("memmap=1G!4G") == 3
    assert "next_entry" not in machine.grubenv()


def test_a_trial_that_failed_can_be_tried_again(machine: FakeMachine) -> None:
    begin(machine)
    assert not prepare_trial(machine, FOUND, Request(GIB), Options()).needed
    boots(machine, "")
    assert prepare_trial(machine, FOUND, Request(GIB), Options()).needed
    put(machine, "/boot/grub/grub.cfg", menu(machine).replace("splash memmap", "splash panic=1 memmap"))
    begin(machine)
    assert machine.grubenv()["next_entry"] == "emupmem-trial"
    assert "panic=1" not in menu(machine)


def test_another_size_replaces_the_trial(machine: FakeMachine) -> None:
    begin(machine)
    begin(machine, 2 * GIB)
    assert menu(machine).count("memmap=2G!4G") == 2
    assert "memmap=1G!4G" not in menu(machine)


def test_what_is_reserved_already_is_not_tried(machine: FakeMachine) -> None:
    carry_out(machine, change.prepare_apply(machine, FOUND, Request(GIB), Options()))
    with pytest.raises(EmupmemError, match=r"memmap=1G!4G is reserved already"):
        prepare_trial(machine, FOUND, Request(GIB), Options())


def test_confirm_needs_the_trial_to_run(machine: FakeMachine) -> None:
    with pytest.raises(EmupmemError, match="there is no trial to confirm"):
        prepare_confirm(machine)
    begin(machine)
    with pytest.raises(EmupmemError, match="this boot is not the trial of memmap=1G!4G"):
        prepare_confirm(machine)


@pytest.mark.parametrize(
    ("mount", "link", "words"),
    [
        ("btrfs /dev/sda1 rw", "", "btrfs, which GRUB only reads"),
        ("zfs rpool/ROOT rw", "", "zfs, which GRUB only reads"),
        ("ext4 /dev/mapper/vg-root rw", "../../devices/virtual/block/dm-0", "LVM or LUKS"),
        ("ext4 /dev/md0 rw", "../../devices/virtual/block/md0", "a RAID"),
        ("ext4 /dev/md0p1 rw", "../../devices/virtual/block/md0/md0p1", "a RAID"),
        ("ext4 /dev/sda1 ro", "", "mounted read-only"),
    ],
)
def test_where_grub_cannot_forget_there_is_no_trial(
    machine: FakeMachine, mount: str, link: str, words: str
) -> None:
    before = menu(machine)
    fs, source, options = mount.split()
    put(machine, "/proc/self/mountinfo", f"30 1 8:1 / / {options} - {fs} {source} {options}\n")
    if link:
        place = machine.root / "sys/dev/block/8:1"
        place.parent.mkdir(parents=True)
        place.symlink_to(link)
    with pytest.raises(EmupmemError, match="GRUB cannot clear its choice") as caught:
        begin(machine)
    assert words in caught.value.message
    assert menu(machine) == before


def test_a_menu_that_does_not_clear_the_choice(machine: FakeMachine) -> None:
    put(machine, "/boot/grub/grub.cfg", menu(machine).replace("save_env next_entry", "true"))
    with pytest.raises(EmupmemError, match="the menu does not clear next_entry"):
        begin(machine)


def test_a_default_that_cannot_be_told(machine: FakeMachine) -> None:
    put(machine, "/boot/grub/grub.cfg", menu(machine).replace('set default="0"', 'set default="gone"'))
    with pytest.raises(EmupmemError, match="which entry boots by default cannot be told"):
        begin(machine)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: script(m, "grub-editenv", "#!/bin/sh\necho no room >&2\nexit 1\n"),
        lambda m: script(m, "grub-editenv", "#!/bin/sh\nexit 0\n"),
        lambda m: (m.root / "sbin/grub-editenv").unlink(),
        lambda m: script(m, "update-grub2", GENERATOR),  # runs no script of ours
        lambda m: script(m, "update-grub2", "#!/bin/sh\nexit 1\n"),
    ],
)
def test_what_fails_leaves_nothing(machine: FakeMachine, break_it: Callable[[FakeMachine], object]) -> None:
    before = menu(machine)
    break_it(machine)
    with pytest.raises(EmupmemError) as caught:
        begin(machine)
    assert "the old configuration is back" in caught.value.hint
    assert menu(machine) == before
    assert not machine.exists(trial.SCRIPT)
    assert "next_entry" not in machine.grubenv()


# The commands ------------------------------------------------------------------------------------------------


def rung(run: Run) -> tuple[int, dict[str, str]]:
    done = run("verify", "--wait", "0", "--json")
    return done.status, done.json["checks"][0]


def test_the_whole_way_by_commands(run: Run, here: FakeMachine) -> None:
    prepare(here)
    done = run("apply", "--size", "1G", "--trial", "--yes")
    assert done.status == 0, done.err
    assert "one extra entry carries memmap=1G!4G; the next start, and only that, takes it" in done.out
    assert "switch it off and on, and the old configuration is back" in done.out
    status, first = rung(run)
    assert (status, first["name"], first["status"]) == (3, "trial", "pending")
    assert run("confirm", "--yes").status == 1
    boots(here)
    put(here, "/proc/iomem", "100000000-13fffffff : Persistent Memory (legacy)\n")
    done = run("confirm", "--yes")
    assert done.status == 1
    assert "the trial is not good: device: no device" in done.err
    status, first = rung(run)
    assert (status, first["status"]) == (3, "ok")
    assert "this boot is the trial of memmap=1G!4G" in first["found"]
    assert run("abandon", "--yes").status == 0
    assert run("abandon", "--yes").status == 1


def test_a_machine_that_came_back_without_it(run: Run, here: FakeMachine) -> None:
    prepare(here)
    run("apply", "--size", "1G", "--trial", "--yes")
    boots(here, "")
    script(here, "journalctl", "#!/bin/sh\nexit 1\n")
    status, first = rung(run)
    assert (status, first["status"]) == (3, "fail")
    assert (
        "the machine came back without memmap=1G!4G: it hung, panicked or was switched off" in first["found"]
    )
    put(here, "/sys/fs/pstore/dmesg-efi-1", "<0>Kernel panic - not syncing: VFS: Unable to mount root fs\n")
    assert "Kernel panic - not syncing: VFS" in rung(run)[1]["found"]
    boots(here, "", since=0)
    assert "no longer chosen" in rung(run)[1]["found"]


def test_wrong_usage(run: Run, here: FakeMachine) -> None:
    prepare(here)
    assert run("apply", "--size", "1G", "--trial", "--mount", "/mnt/x").status == 2
    assert run("apply", "--size", "1G", "--trial=floppy").status == 2
    here.root_user = False
    assert run("confirm").status == 1
    assert run("abandon").status == 1


def kexec(run: Run, *words: str) -> list[list[str]]:
    done = run("apply", "--size", "1G", "--trial=kexec", "--dry-run", "--json", *words)
    assert done.status == 0, done.err
    commands: list[list[str]] = done.json["commands"]
    return commands


def test_kexec_goes_straight_into_it(run: Run, here: FakeMachine) -> None:
    put(here, f"/boot/vmlinuz-{RELEASE}", "")
    put(here, f"/boot/initrd.img-{RELEASE}", "")
    assert "kexec is not installed" in run("apply", "--size", "1G", "--trial=kexec", "--yes").err
    log = here.root / "calls"
    for name in ("kexec", "systemctl"):
        script(here, name, f"#!/bin/sh\necho {name} \"$@\" >> '{log}'\n")
    load, start = kexec(run)
    line = f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro quiet splash memmap=1G!4G emupmem.trial=kexec"
    kernel, initrd = f"/boot/vmlinuz-{RELEASE}", f"--initrd=/boot/initrd.img-{RELEASE}"
    assert load == ["kexec", "-a", "-l", kernel, initrd, f"--command-line={line}"]
    assert start == ["systemctl", "kexec"]
    before = menu(here)
    assert run("apply", "--size", "1G", "--trial=kexec").status == 1, "no terminal to ask on"
    assert not log.exists()
    assert run("apply", "--size", "1G", "--trial=kexec", "--yes").status == 0
    assert log.read_text().splitlines()[1] == "systemctl kexec"
    assert menu(here) == before
    boots(here, "memmap=1G!4G emupmem.trial=kexec")
    state = trial.state(here)
    assert state is not None
    assert state.running
    carry_out(here, prepare_confirm(here))
    assert b'LINUX="memmap=1G!4G"' in (here.root / "etc/default/grub").read_bytes()


def test_kexec_refusals(run: Run, here: FakeMachine) -> None:
    script(here, "kexec", "#!/bin/sh\nexit 5\n")
    words = ("apply", "--size", "1G", "--trial=kexec", "--yes")
    assert "which is not there" in run(*words).err
    put(here, f"/boot/vmlinuz-{RELEASE}", "")
    put(here, f"/boot/initrd.img-{RELEASE}", "")
    assert "kexec failed with status 5" in run(*words).err
    put(here, "/proc/sys/kernel/kexec_load_disabled", "1\n")
    assert "kexec is switched off" in run(*words).err
    put(here, "/sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    assert "the kernel is locked down" in run(*words).err
