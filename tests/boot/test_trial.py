# SPDX-License-Identifier: Apache-2.0
"""Trial boots on a machine in a folder: one extra entry, chosen once, nothing permanent (real: test_vm_trial.py)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import prepare as boot_prepare
from emupmem.boot import trial
from emupmem.boot.change import Change
from emupmem.boot.grub import environment
from emupmem.boot.grub import trial as grub_trial
from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_abandon, prepare_confirm, prepare_trial
from emupmem.boot.transaction import carry_out_change
from emupmem.kernel.cmdline import COMMAND_LINE_MAX
from emupmem.model import GIB, EmupmemError, Request
from emupmem.verifier import ladder, observe
from tests.boot.test_change import FOUND
from tests.cli.runner import Run
from tests.fake import GENERATOR, RELEASE, STOCK, FakeMachine, build, leftovers, menu, put, script

HEADER = """  echo 'load_env'
  echo 'if [ "${next_entry}" ] ; then'
  echo '   set default="${next_entry}"'
  echo '   set next_entry='
  echo '   save_env next_entry'
  echo 'fi'
"""
TRIAL = """  if [ -x "$root/etc/grub.d/42_emupmem_trial" ]; then
    echo '### BEGIN /etc/grub.d/42_emupmem_trial ###'
    sed -e "s|\\$0|$root/etc/grub.d/42_emupmem_trial|" -e "/^for file/s|/boot/|$root&|g" \\
      "$root/etc/grub.d/42_emupmem_trial" | sh
    echo '### END /etc/grub.d/42_emupmem_trial ###'
  fi
} > "$out.new"
"""
EDITENV = f"""#!/bin/sh
file=$1 text='# GRUB Environment Block'
if [ "$2" = set ]; then text="$text
$3"; fi
fill={"#" * 1024}
text="$text
"
while [ ${{#text}} -gt 0 ] && [ ${{#fill}} -gt $((1024 - ${{#text}})) ]; do fill=${{fill#?}}; done
printf %s "$text$fill" > "$file"
"""


def env(text: str = "") -> str:
    """An environment block of GRUB's."""
    return f"# GRUB Environment Block\n{text}".ljust(1024, "#")


def prepare(machine: FakeMachine) -> FakeMachine:
    """Let GRUB in the folder know trials: the header that clears the choice, the script, grub-editenv."""
    text = GENERATOR.replace("  echo 'set default=\"0\"'\n", HEADER + "  echo 'set default=\"0\"'\n")
    script(machine, "update-grub2", text.replace('} > "$out.new"\n', TRIAL))
    script(machine, "grub-editenv", EDITENV)
    put(machine, "/proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    put(machine, "/boot/grub/grubenv", env())
    put(machine, f"/boot/vmlinuz-{RELEASE}", "")
    put(machine, f"/boot/initrd.img-{RELEASE}", "")
    done = machine.output("update-grub2")
    assert done is not None
    assert not done.status
    return machine


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return prepare(build(tmp_path))


def begin(machine: FakeMachine, size: int = GIB, **options: bool) -> Change:
    prepared = prepare_trial(machine, FOUND, Request(size), Options(**options))  # type: ignore[arg-type]
    carry_out_change(machine, prepared)
    return prepared


def boots(machine: FakeMachine, words: str = "memmap=1G!4G", since: int = 4_000_000_000) -> None:
    """Let the machine have been started into this command line."""
    put(machine, "/proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro {words} quiet splash\n")
    put(machine, "/proc/stat", f"cpu 0\nbtime {since}\n")
    put(machine, "/boot/grub/grubenv", env())


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
    assert environment.grubenv(machine)["next_entry"] == "emupmem-trial"
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
    carry_out_change(machine, prepare_confirm(machine))
    assert b'LINUX="memmap=1G!4G nokaslr"' in (machine.root / "etc/default/grub").read_bytes()


def test_confirm_makes_it_permanent_and_takes_the_entry_away(machine: FakeMachine) -> None:
    begin(machine)
    boots(machine)
    carry_out_change(machine, prepare_confirm(machine))
    assert (machine.root / "etc/default/grub").read_bytes() == STOCK.replace(
        b'LINUX=""', b'LINUX="memmap=1G!4G"'
    )
    assert "Trial" not in menu(machine)
    assert menu(machine).count("memmap=1G!4G") == 3
    assert not machine.exists(grub_trial.SCRIPT)
    assert trial.state(machine) is None
    assert leftovers(machine) == ["grubenv"]


def test_abandon_takes_only_the_entry_away(machine: FakeMachine) -> None:
    before = menu(machine)
    begin(machine)
    carry_out_change(machine, prepare_abandon(machine))
    assert menu(machine) == before
    assert not machine.exists(grub_trial.SCRIPT)
    assert "next_entry" not in environment.grubenv(machine)
    with pytest.raises(EmupmemError, match="there is no trial to abandon"):
        prepare_abandon(machine)


def test_an_entry_of_an_edited_script_is_abandoned_as_well(machine: FakeMachine) -> None:
    """It is in the menu, and whoever chooses it starts it."""
    before = menu(machine)
    begin(machine)
    put(machine, "/boot/grub/grubenv", env())
    made = (machine.root / "etc/grub.d/42_emupmem_trial").read_text()
    put(machine, grub_trial.SCRIPT, made.replace(grub_trial.MARK, "# mine:"))
    carry_out_change(machine, prepare_abandon(machine))
    assert not machine.exists(grub_trial.SCRIPT)
    assert menu(machine) == before


def test_a_permanent_apply_ends_the_trial(machine: FakeMachine) -> None:
    begin(machine)
    carry_out_change(machine, boot_prepare.prepare_apply(machine, FOUND, Request(GIB), Options()))
    assert not machine.exists(grub_trial.SCRIPT)
    assert menu(machine).count("memmap=1G!4G") == 3
    assert "next_entry" not in environment.grubenv(machine)


def test_a_trial_that_failed_can_be_tried_again(machine: FakeMachine) -> None:
    begin(machine)
    assert not prepare_trial(machine, FOUND, Request(GIB), Options()).needed
    boots(machine, "")
    assert prepare_trial(machine, FOUND, Request(GIB), Options()).needed
    put(machine, "/boot/grub/grub.cfg", menu(machine).replace("splash memmap", "splash panic=1 memmap"))
    begin(machine)
    assert environment.grubenv(machine)["next_entry"] == "emupmem-trial"
    assert "panic=1" not in menu(machine)


def test_another_size_replaces_the_trial(machine: FakeMachine) -> None:
    begin(machine)
    begin(machine, 2 * GIB)
    assert menu(machine).count("memmap=2G!4G") == 2
    assert "memmap=1G!4G" not in menu(machine)


def test_what_is_reserved_already_is_not_tried(machine: FakeMachine) -> None:
    carry_out_change(machine, boot_prepare.prepare_apply(machine, FOUND, Request(GIB), Options()))
    with pytest.raises(EmupmemError, match=r"memmap=1G!4G is reserved already"):
        prepare_trial(machine, FOUND, Request(GIB), Options())


def test_confirm_needs_the_trial_to_run(machine: FakeMachine) -> None:
    with pytest.raises(EmupmemError, match="there is no trial to confirm"):
        prepare_confirm(machine)
    begin(machine)
    with pytest.raises(EmupmemError, match="this boot is not the trial of memmap=1G!4G"):
        prepare_confirm(machine)


@pytest.mark.parametrize(
    ("mount", "link", "file", "words"),
    [
        ("btrfs /dev/sda1 rw", "sda/sda1", "", "btrfs, which GRUB only reads"),
        ("zfs rpool/ROOT rw", "sda/sda1", "", "zfs, which GRUB only reads"),
        ("ext4 /dev/mapper/vg-root rw", "dm-0", "dm-0/dm/uuid=LVM-abc", "/dev/mapper/vg-root (LVM)"),
        ("ext4 /dev/mapper/luks rw", "dm-0", "dm-0/dm/uuid=CRYPT-LUKS2-abc", "(encrypted)"),
        ("ext4 /dev/mapper/x rw", "dm-0", "dm-0/dm/name=x", "(mapped)"),
        ("ext4 /dev/md0 rw", "md0", "md0/md/level=raid1", "/dev/md0 (RAID)"),
        ("ext4 /dev/md0p1 rw", "md0/md0p1", "md0/md/level=raid1", "/dev/md0p1 (RAID)"),
        ("ext4 /dev/sda1 ro", "sda/sda1", "", "mounted read-only"),
    ],
)
def test_where_grub_cannot_forget_there_is_no_trial(
    machine: FakeMachine, mount: str, link: str, file: str, words: str
) -> None:
    before = menu(machine)
    fs, source, options = mount.split()
    put(machine, "/proc/self/mountinfo", f"30 1 8:1 / / {options} - {fs} {source} {options}\n")
    place = machine.root / "sys/dev/block/8:1"
    place.parent.mkdir(parents=True)
    (machine.root / "sys/devices/virtual/block" / link).mkdir(parents=True)
    place.symlink_to(f"../../devices/virtual/block/{link}")
    if file:
        name, _, text = file.partition("=")
        put(machine, f"/sys/devices/virtual/block/{name}", text)
    with pytest.raises(EmupmemError, match="GRUB cannot clear its choice") as caught:
        begin(machine)
    assert words in caught.value.message
    assert menu(machine) == before


@pytest.mark.parametrize("content", [None, "", "# GRUB Environment Block\n", "x" * 1024])
def test_without_an_environment_block_there_is_no_trial(machine: FakeMachine, content: str | None) -> None:
    place = machine.root / "boot/grub/grubenv"
    if content is None:
        place.unlink()
    else:
        place.write_text(content)
    before = menu(machine)
    with pytest.raises(EmupmemError, match="GRUB cannot clear its choice") as caught:
        begin(machine)
    assert "grub-editenv /boot/grub/grubenv create" in caught.value.hint
    assert menu(machine) == before


def test_a_link_to_an_environment_block_elsewhere_is_followed(machine: FakeMachine) -> None:
    put(
        machine,
        "/proc/self/mountinfo",
        "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 30 0:9 / /boot/efi rw - btrfs /dev/sdb rw\n",
    )
    begin(machine)
    put(machine, "/boot/efi/grubenv", env())
    (machine.root / "boot/grub/grubenv").unlink()
    (machine.root / "boot/grub/grubenv").symlink_to("../efi/grubenv")
    with pytest.raises(EmupmemError, match=r"/boot/grub/grubenv is on btrfs"):
        begin(machine, 2 * GIB)


ENTRY = """set default="{default}"
submenu 'Advanced' $menuentry_id_option 'gnulinux-advanced-x' {{
    menuentry 'Old' {users} $menuentry_id_option 'gnulinux-old' {{
        recordfail
        savedefault
        if [ "${{initrdfail}}" = 1 ]; then
          linux    /boot/vmlinuz-OLD root=UUID=0 ro quiet -- single
          initrd    /boot/microcode.img /boot/initrd.img-OLD
        else
          linux    /boot/vmlinuz-OLD root=PARTUUID=0 ro quiet panic=-1
        fi
        initrdfail
    }}
}}
"""


@pytest.mark.parametrize(
    ("default", "grubenv"),
    [
        ("gnulinux-advanced-x>gnulinux-old", {}),
        ("0>0", {}),
        ("Advanced>Old", {"next_entry": "another"}),
        ("${{saved_entry}}", {"saved_entry": "gnulinux-advanced-x>gnulinux-old"}),
    ],
)
def test_the_default_may_be_anywhere_in_the_menu(default: str, grubenv: dict[str, str]) -> None:
    cfg = ENTRY.format(default=default.format(), users="--class os --unrestricted")
    there = {"/boot/vmlinuz-OLD", "/boot/initrd.img-OLD"}
    text = grub_trial.script(
        cfg, grubenv, ["memmap=1G!4G", "nokaslr"], "GRUB_CMDLINE_LINUX", there.__contains__
    )
    assert "for file in /boot/vmlinuz-OLD /boot/initrd.img-OLD; do" in text
    assert "menuentry 'Trial of emupmem: memmap=1G!4G nokaslr' --unrestricted --id emupmem-trial {" in text
    assert grub_trial.read_script(text) == ("GRUB_CMDLINE_LINUX", ("memmap=1G!4G", "nokaslr"))
    # every kernel of the entry, before what is init's; nothing that would choose it again
    assert "root=UUID=0 ro quiet memmap=1G!4G nokaslr -- single\n" in text
    assert "root=PARTUUID=0 ro quiet panic=-1 memmap=1G!4G nokaslr\n" in text
    assert "savedefault" not in text
    assert "\n\tset initrdfail=1\n" in text
    assert "    initrdfail\n" not in text
    assert grub_trial.problem(text, ("memmap=1G!4G", "nokaslr")) == ""
    assert "should have memmap=2G!4G" in grub_trial.problem(text, ("memmap=2G!4G",))
    assert "more than once" in grub_trial.problem(text + text, ("memmap=1G!4G",))


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ("--users ann,bob", " --users=ann,bob "),
        ("--users=ann", " --users=ann "),
        ("--users ''", " --users= "),
        ("", "' --id"),
    ],
)
def test_who_may_start_the_default_may_start_the_trial(users: str, expected: str) -> None:
    cfg = ENTRY.format(default="0>0", users=users)
    text = grub_trial.script(cfg, {}, ["memmap=1G!4G"], "GRUB_CMDLINE_LINUX")
    assert expected in next(line for line in text.splitlines() if line.startswith("menuentry"))


def test_a_kernel_update_before_the_trial(machine: FakeMachine) -> None:
    begin(machine)
    for script_run in range(2):
        done = machine.output("update-grub2")
        assert done is not None
        assert ("Trial of emupmem" in menu(machine)) is (script_run == 0)
        state = trial.state(machine)
        assert state is not None
        assert state.chosen is (script_run == 0)
        (machine.root / f"boot/vmlinuz-{RELEASE}").unlink(missing_ok=True)
    assert state is not None
    assert "its entry is not in the menu any more" in state.why
    assert not state.started_since


def test_a_trial_that_would_not_fit_is_put_back(machine: FakeMachine) -> None:
    room = COMMAND_LINE_MAX - len(f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro quiet splash")
    for left, fits in ((len(" memmap=1G!4G"), True), (len(" memmap=1G!4G") - 1, False)):
        text = STOCK.replace(b'LINUX=""', b'LINUX="%s"' % (b"x" * (room - left - 1)))
        put(machine, "/etc/default/grub", text)
        assert machine.output("update-grub2") is not None
        if fits:
            begin(machine)
            continue
        with pytest.raises(EmupmemError, match="longer than the 2047 bytes") as caught:
            begin(machine)
        assert "the old configuration is back" in caught.value.hint


def test_the_variable_is_remembered_for_the_confirm(machine: FakeMachine) -> None:
    carry_out_change(
        machine, prepare_trial(machine, FOUND, Request(GIB), Options(variable="GRUB_CMDLINE_LINUX_DEFAULT"))
    )
    boots(machine)
    carry_out_change(machine, prepare_confirm(machine))
    assert b'DEFAULT="quiet splash memmap=1G!4G"' in (machine.root / "etc/default/grub").read_bytes()


def test_a_trial_where_a_drop_in_has_the_last_word(machine: FakeMachine) -> None:
    put(
        machine,
        "/etc/default/grub.d/50-cloudimg-settings.cfg",
        'GRUB_CMDLINE_LINUX_DEFAULT="console=ttyS0"\n',
    )
    assert machine.output("update-grub2") is not None
    options = Options(variable="GRUB_CMDLINE_LINUX_DEFAULT")
    carry_out_change(machine, prepare_trial(machine, FOUND, Request(GIB), options))
    boots(machine)
    carry_out_change(machine, prepare_confirm(machine))
    assert (machine.root / "etc/default/grub").read_bytes() == STOCK
    assert "console=ttyS0 memmap=1G!4G" in menu(machine)
    with pytest.raises(EmupmemError, match=r"memmap=1G!4G is reserved already"):
        prepare_trial(machine, FOUND, Request(GIB), options)


def test_somebody_elses_choice_is_told(machine: FakeMachine) -> None:
    put(machine, "/boot/grub/grubenv", env("next_entry=windows\n"))
    made = prepare_trial(machine, FOUND, Request(GIB), Options())
    assert "the next start was chosen to be “windows”: the trial takes its place" in made.warnings


def test_somebody_elses_choice_is_back_where_the_trial_is_not_made(machine: FakeMachine) -> None:
    put(machine, "/boot/grub/grubenv", env("next_entry=memtest\n"))
    prepared = prepare_trial(machine, FOUND, Request(GIB), Options())

    def stop(step: str) -> None:
        if step == "chosen":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(EmupmemError, match="stopped by SIGTERM") as caught:
        carry_out_change(machine, prepared, stop)
    assert "nothing is changed" in caught.value.hint
    assert environment.grubenv(machine)["next_entry"] == "memtest"


def test_a_trial_that_grub_did_not_forget(machine: FakeMachine) -> None:
    begin(machine)
    boots(machine)
    put(machine, "/boot/grub/grubenv", env("next_entry=emupmem-trial\n"))
    verdict = ladder.verdict_of(observe.observe(machine, 0))
    assert "the next start is chosen to be one as well" in verdict.checks[0].found


def test_a_menu_that_does_not_clear_the_choice(machine: FakeMachine) -> None:
    put(machine, "/boot/grub/grub.cfg", menu(machine).replace("save_env next_entry", "true"))
    with pytest.raises(EmupmemError, match="the menu does not clear next_entry"):
        begin(machine)


def test_a_default_that_cannot_be_told(machine: FakeMachine) -> None:
    put(machine, "/boot/grub/grub.cfg", menu(machine).replace('set default="0"', 'set default="gone"'))
    with pytest.raises(EmupmemError, match="cannot determine the default boot entry"):
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
    assert not machine.exists(grub_trial.SCRIPT)
    assert "next_entry" not in environment.grubenv(machine)


# The commands ------------------------------------------------------------------------------------------------


def rung(run: Run) -> tuple[int, dict[str, str]]:
    done = run("verify", "--wait", "0", "--json")
    return done.status, done.json["checks"][0]


def stage(run: Run, command: str) -> tuple[int, str]:
    done = run(command, "--yes", "--json")
    return done.status, done.json["trial"]


@pytest.mark.slow
def test_the_whole_way_by_commands(run: Run, here: FakeMachine) -> None:
    prepare(here)
    done = run("apply", "--size", "1G", "--trial", "--yes")
    assert done.status == 0, done.err
    assert "one extra entry carries memmap=1G!4G; the next start, and only that, takes it" in done.out
    assert "switch it off and on, and the old configuration is back" in done.out
    status, first = rung(run)
    assert (status, first["name"], first["status"]) == (3, "trial", "pending")
    assert stage(run, "confirm") == (1, "waiting")
    boots(here)
    put(here, "/proc/iomem", "100000000-13fffffff : Persistent Memory (legacy)\n")
    done = run("confirm", "--yes")
    assert done.status == 1
    assert stage(run, "confirm") == (1, "running")
    assert "the trial is not good: device: no device" in done.err
    status, first = rung(run)
    assert (status, first["status"]) == (3, "ok")
    assert "this boot is the trial of memmap=1G!4G" in first["found"]
    assert stage(run, "abandon") == (0, "running")
    assert stage(run, "abandon") == (1, "none")


def test_a_trial_that_waits_is_not_already_set_up(here: FakeMachine, run: Run) -> None:
    prepare(here)
    assert run("apply", "--size", "1G", "--trial", "--yes", "--json").json["reboot_required"] is True
    again = run("apply", "--size", "1G", "--trial", "--yes", "--json").json
    assert (again["changed"], again["would_change"], again["reboot_required"]) == (False, False, True)
    told = run("apply", "--size", "1G", "--trial", "--yes").out
    assert "The next start tries memmap=1G!4G already. Nothing was changed.\n" in told
    assert "Reboot, then:  sudo emupmem verify\n" in told


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
    old = put(here, "/var/lib/systemd/pstore/1/dmesg.txt", "Kernel panic - not syncing: long ago\n")
    os.utime(old, (1, 1))
    assert "its log was not kept" in rung(run)[1]["found"]
    put(
        here, "/var/lib/systemd/pstore/2/dmesg.txt", "<0>Kernel panic - not syncing: Attempted to kill init\n"
    )
    assert "Kernel panic - not syncing: Attempted" in rung(run)[1]["found"]
    put(here, "/sys/fs/pstore/dmesg-efi-1", "<0>Kernel panic - not syncing: VFS: Unable to mount root fs\n")
    assert "Kernel panic - not syncing: VFS" in rung(run)[1]["found"]
    boots(here, "", since=0)
    assert "no longer chosen" in rung(run)[1]["found"]
    assert stage(run, "confirm") == (1, "over")


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
    load, start = kexec(run, "--variable", "GRUB_CMDLINE_LINUX_DEFAULT")
    line = f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro quiet splash"
    line += " emupmem.trial=kexec,GRUB_CMDLINE_LINUX_DEFAULT memmap=1G!4G"
    kernel, initrd = f"/boot/vmlinuz-{RELEASE}", f"--initrd=/boot/initrd.img-{RELEASE}"
    assert load == ["kexec", "-a", "-l", kernel, initrd, f"--command-line={line}"]
    assert start == ["systemctl", "kexec"]
    before = menu(here)
    assert run("apply", "--size", "1G", "--trial=kexec").status == 1, "no terminal to ask on"
    assert run("apply", "--size", "1G", "--trial=kexec", "--check").status == 3
    assert not log.exists()
    assert run("apply", "--size", "1G", "--trial=kexec", "--yes").status == 0
    assert log.read_text().splitlines()[1] == "systemctl kexec"
    assert menu(here) == before
    # somebody else's words before the mark are not the trial's
    put(here, "/proc/cmdline", line.replace(" quiet", " memmap=64K$0x1000 nokaslr quiet") + "\n")
    state = trial.state(here)
    assert state is not None
    assert (state.running, state.kexec, state.words) == (True, True, ("memmap=1G!4G",))
    done = run("abandon", "--yes")
    assert (done.status, "nowhere on the disk: reboot goes back" in done.err) == (1, True)
    carry_out_change(here, prepare_confirm(here))
    assert b'DEFAULT="quiet splash memmap=1G!4G"' in (here.root / "etc/default/grub").read_bytes()


def test_kexec_refusals(run: Run, here: FakeMachine) -> None:
    log = here.root / "calls"
    script(here, "kexec", f"#!/bin/sh\necho \"$1\" >> '{log}'\nexit 5\n")
    words = ("apply", "--size", "1G", "--trial=kexec", "--yes")
    assert "which is not there" in run(*words).err
    put(here, f"/boot/vmlinuz-{RELEASE}", "")
    put(here, f"/boot/initrd.img-{RELEASE}", "")
    assert "kexec failed with status 5" in run(*words).err
    assert log.read_text().splitlines() == ["-a", "-u"], "what was loaded is not left to the next reboot"
    whole = menu(here)
    put(
        here,
        "/boot/grub/grub.cfg",
        whole.replace("initrd	", f"initrd	/boot/vmlinuz-{RELEASE} ").replace(
            "linux	/boot/vmlinuz-", "linux	/boot/../boot/vmlinuz-"
        ),
    )
    assert "the entry has 2 initial disks, and kexec takes one" in run(*words).err
    put(here, "/boot/grub/grub.cfg", whole.replace("quiet splash", "quiet splash " + "x" * 1950))
    assert "longer than the 2047 bytes" in run(*words).err
    put(here, "/boot/grub/grub.cfg", whole)
    put(here, "/boot/grub/grubenv", env("next_entry=emupmem-trial\n"))
    assert "chosen to be a trial already" in run(*words).err
    put(here, "/proc/sys/kernel/kexec_load_disabled", "1\n")
    assert "kexec is switched off" in run(*words).err
    put(here, "/sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    assert "the kernel is locked down" in run(*words).err


def test_kexec_starts_no_kernel_here_for_the_tree_of_another_machine(machine: FakeMachine) -> None:
    """kexec and systemctl would be those of this machine."""
    script(machine, "kexec", "#!/bin/sh\n")
    machine.live = False
    with pytest.raises(EmupmemError, match="a trial is for the running machine"):
        prepare_trial(machine, FOUND, Request(GIB), Options(), entry=False)


def test_where_another_tool_owns_the_entries_there_is_no_trial(machine: FakeMachine) -> None:
    put(machine, "/etc/NIXOS", "")
    with pytest.raises(EmupmemError, match="there is no trial to confirm"):
        prepare_confirm(machine)
    with pytest.raises(EmupmemError, match="there is no trial to abandon"):
        prepare_abandon(machine)
