# SPDX-License-Identifier: Apache-2.0
"""Content kept over restarts: what is refused, what a boot brings back, what a shutdown saves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from emupmem.device import image as device_image
from emupmem.device import keep, proof, unit
from emupmem.device.unit import BootMount
from emupmem.model import GIB, MIB, EmupmemError
from emupmem.system import files, processes
from tests.cli.runner import Run
from tests.device.pmem import PmemMachine, holds, mounted
from tests.device.test_mount import calls, rebooted, unit_text
from tests.device.test_mount import here as here  # the fixture
from tests.fake import put, script

FILE = "/keep/pmem0.img"
WANTED = BootMount(4 * GIB, GIB, "/mnt/pmem0", "ext4", "dev", "", FILE)


@pytest.fixture
def kept(here: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> PmemMachine:
    """The machine of test_mount with a folder for images; saving and restoring are written down."""
    (here.root / "keep").mkdir()
    monkeypatch.setattr(here, "loose_parent", lambda name: "")
    monkeypatch.setattr(here, "room", lambda folder: 2 * GIB)
    script(here, "sync", "#!/bin/sh\n")

    def log(what: str) -> Any:
        def call(machine: object, *words: object) -> device_image.Snapshot:
            with (here.root / "calls").open("a") as file:
                print(what, *words, file=file)
            return device_image.Snapshot(FILE, "/dev/pmem0", GIB, MIB, 1.0, "sum")

        return call

    monkeypatch.setattr(device_image, "save_image", log("save"))
    monkeypatch.setattr(device_image, "restore_image", log("restore"))
    return here


def boot(run: Run, command: str = "boot-mount") -> Any:
    return run(command, "1G!4G", "/mnt/pmem0", "ext4", "dev", "-", FILE)


def image(machine: PmemMachine, size: int = GIB) -> Path:
    path = put(machine, FILE, b"")
    os.truncate(path, size)
    return path


# What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pmem0.img", "is not a plain absolute name"),
        ("/keep/../pmem0.img", "is not a plain absolute name"),
        ("/keep/", "is not a plain absolute name"),
        ("/mnt/pmem0/image", "is on the device it would back up"),
        ("/nowhere/image", "/nowhere is not a folder"),
        ("/link/image", "leads to /keep/image by a symbolic link"),
        ("/run/image", "is on tmpfs (tmpfs), which forgets as well"),
    ],
)
def test_files_that_keep_nothing(run: Run, kept: PmemMachine, file: str, words: str) -> None:
    (kept.root / "link").symlink_to("/keep")
    (kept.root / "run").mkdir(exist_ok=True)
    with (kept.root / "proc/self/mountinfo").open("a") as mountinfo:
        mountinfo.write("31 30 0:22 / /run rw - tmpfs tmpfs rw\n")
    with pytest.raises(EmupmemError) as caught:
        keep.check_image(kept, file, GIB, "/mnt/pmem0")
    assert words in caught.value.message
    done = run("apply", "--size", "1G", "--mount", "/mnt/pmem0", "--keep", file, "--yes")
    assert done.status == 1
    assert words in done.err
    assert not kept.exists(unit.FILE)


def test_a_folder_that_others_can_change(kept: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "loose_parent", lambda name: "/home/dev")
    with pytest.raises(EmupmemError, match="/home/dev can be changed by others than root"):
        keep.check_image(kept, FILE, GIB, "/mnt/pmem0")


def test_no_room_and_an_image_of_another_size(kept: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    image(kept, 2 * GIB)
    with pytest.raises(EmupmemError, match="is there already and has 2 GiB, the device 1 GiB"):
        keep.check_image(kept, FILE, GIB, "/mnt/pmem0")
    image(kept)
    keep.check_image(kept, FILE, GIB, "/mnt/pmem0")
    monkeypatch.setattr(kept, "room", lambda folder: GIB - 1)
    with pytest.raises(EmupmemError, match="a full device needs 1 GiB in addition to the last image"):
        keep.check_image(kept, FILE, GIB, "/mnt/pmem0")


def test_wrong_usage(run: Run, kept: PmemMachine) -> None:
    assert run("apply", "--size", "1G", "--keep", FILE).status == 2
    assert run("apply", "--size", "1G", "--mount", "/mnt/a", "--keep", FILE, "--keep", "/keep/b").status == 2
    assert run("mount", "--keep", FILE).status == 2
    assert calls(kept) == []


# The unit ------------------------------------------------------------------------------------------------


def test_the_unit_saves_when_it_is_stopped(run: Run, kept: PmemMachine) -> None:
    done = run("apply", "--size", "1G", "--mount", "/mnt/pmem0", "--keep", FILE, "--yes", "--json")
    assert done.status == 0, done.err
    assert done.json["mounts"][0]["keep"] == FILE
    text = unit_text(kept)
    words = f'"1G!4G" "/mnt/pmem0" "ext4" "-" "-" "{FILE}"'
    assert f"boot-mount \\\n    {words}\n" in text
    assert f"ExecStop=/usr/local/bin/emupmem boot-save \\\n    {words}\n" in text
    for line in (
        'RequiresMountsFor="/keep"',
        "Before=systemd-user-sessions.service",
        "SuccessExitStatus=3",
        "TimeoutStartSec=320",
        "TimeoutStopSec=320",
    ):
        assert f"\n{line}\n" in text
    assert unit.read_unit(text) == (BootMount(4 * GIB, GIB, "/mnt/pmem0", "ext4", "", "", FILE),)


def test_without_keep_the_unit_has_nothing_of_it() -> None:
    text = unit.unit_text([BootMount(4 * GIB, GIB, "/mnt/pmem0", "ext4")], "/usr/local/bin/emupmem")
    for word in ("ExecStop", "SuccessExitStatus", "RequiresMountsFor", "@"):
        assert word not in text


# At boot -------------------------------------------------------------------------------------------------


def test_the_first_boot_makes_a_file_system_and_notes_that_it_is_to_be_kept(
    run: Run, kept: PmemMachine
) -> None:
    done = boot(run)
    assert done.status == 0
    assert f"newly created · saved to {FILE} at an orderly shutdown only" in done.out
    assert not any(c.startswith("restore") for c in calls(kept))
    assert keep.belongs(kept, WANTED)


def test_a_later_boot_brings_the_image_back_whatever_the_memory_holds(run: Run, kept: PmemMachine) -> None:
    image(kept)
    holds(kept, "TYPE=ext4\\n")
    done = boot(run)
    assert done.status == 0
    assert f"brought back from {FILE}" in done.out
    assert [c.split()[0] for c in calls(kept)] == ["restore", "e2fsck", "mount"]
    assert boot(run).status == 0, "and once more, as systemctl start does: nothing is brought back over it"
    assert len([c for c in calls(kept) if c.startswith("restore")]) == 1


def test_an_image_that_cannot_be_brought_back_is_never_saved_over(
    run: Run, kept: PmemMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(kept)

    def damaged(*words: object) -> None:
        raise EmupmemError("its checksum differs")

    monkeypatch.setattr(device_image, "restore_image", damaged)
    done = boot(run)
    assert done.status == 1
    assert "emupmem: /mnt/pmem0 is not mounted: its checksum differs" in done.out
    assert calls(kept) == []
    # somebody mounts something else there by hand
    mounted(kept, "pmem0", "/mnt/pmem0")
    done = boot(run, "boot-save")
    assert done.status == 0
    assert "is not saved: it was neither brought back nor made in this boot" in done.out
    assert calls(kept) == []


def test_where_one_failed_and_another_is_kept_the_unit_stays_active(run: Run, kept: PmemMachine) -> None:
    put(kept, "/proc/cmdline", "BOOT_IMAGE=/x memmap=1G!4G,1G!5G")
    words = ("1G!5G", "/mnt/b", "ext4", "-", "-", "-", "1G!4G", "/mnt/pmem0", "ext4", "-", "-", FILE)
    done = run("boot-mount", *words)
    assert done.status == unit.SOME_FAILED
    assert "/mnt/b is not mounted" in done.out
    assert "/dev/pmem0 is mounted at /mnt/pmem0" in done.out


# At shutdown ------------------------------------------------------------------------------------------------


def test_it_is_unmounted_and_saved(run: Run, kept: PmemMachine) -> None:
    boot(run)
    holds(kept, "TYPE=ext4\\n")
    root = "30 1 8:1 / / rw - ext4 /dev/sda1 rw"
    script(
        kept,
        "umount",
        f"#!/bin/sh\necho umount >> '{kept.root}/calls'\necho '{root}' > '{kept.root}/proc/self/mountinfo'\n",
    )
    done = boot(run, "boot-save")
    assert done.status == 0
    assert f"/dev/pmem0 saved to {FILE} · 1 MiB on disk" in done.out
    assert calls(kept)[-2:] == ["umount", f"save {FILE} /dev/pmem0"]


def test_where_somebody_holds_it_it_is_frozen(run: Run, kept: PmemMachine) -> None:
    boot(run)
    holds(kept, "TYPE=ext4\\n")
    done = boot(run, "boot-save")
    assert done.status == 0
    assert "still mounted at /mnt/pmem0, frozen while it was saved" in done.out
    assert calls(kept)[-1] == f"save {FILE} /mnt/pmem0"


SHARED = {
    "a container's": ("/proc/777/mountinfo", "50 1 259:0 / /data rw - ext4 /dev/pmem0 rw\n"),
    "a file of it": ("/proc/self/mountinfo", "50 1 259:0 /db /srv/db rw - ext4 /dev/pmem0 rw\n"),
}


@pytest.mark.parametrize("who", SHARED)
def test_what_stays_mounted_elsewhere_is_frozen_and_not_unmounted(
    run: Run, kept: PmemMachine, who: str
) -> None:
    """Without this mount it could neither be frozen nor be opened alone."""
    boot(run)
    holds(kept, "TYPE=ext4\\n")
    file, line = SHARED[who]
    put(kept, file, line + kept.peek(file) + "\n")
    done = boot(run, "boot-save")
    assert done.status == 0, done.out
    assert calls(kept)[-1] == f"save {FILE} /mnt/pmem0"
    assert not any(c.startswith("umount") for c in calls(kept))


def test_processes_that_see_the_same_mounts_are_nobody_else(run: Run, kept: PmemMachine) -> None:
    boot(run)
    for pid in ("self", "777"):
        (kept.root / f"proc/{pid}/ns").mkdir(parents=True)
        (kept.root / f"proc/{pid}/ns/mnt").symlink_to("mnt:[1]")
    put(kept, "/proc/777/mountinfo", kept.peek("/proc/self/mountinfo"))
    assert processes.mounted_elsewhere(kept, "259:0") == ""
    boot(run, "boot-save")
    assert "umount /mnt/pmem0" in calls(kept)


@pytest.mark.parametrize(
    ("group", "stays"), [("master:1", False), ("shared:1", False), ("master:7", True), ("", True)]
)
def test_a_service_whose_mounts_come_from_here_is_nobody_else(
    run: Run, kept: PmemMachine, group: str, stays: bool
) -> None:
    """As systemd-udevd has it: its copy of the mount goes with ours."""
    boot(run)
    holds(kept, "TYPE=ext4\\n")
    own = kept.peek("/proc/self/mountinfo").replace("/mnt/pmem0 rw -", "/mnt/pmem0 rw shared:1 -")
    assert "shared:1" in own
    put(kept, "/proc/self/mountinfo", own + "\n")
    put(kept, "/proc/300/comm", "systemd-udevd")
    put(
        kept,
        "/proc/300/mountinfo",
        f"70 1 259:0 / /mnt/pmem0 rw {group} - ext4 /dev/pmem0 rw\n".replace("  ", " "),
    )
    assert bool(processes.mounted_elsewhere(kept, "259:0")) is stays
    boot(run, "boot-save")
    assert ("umount /mnt/pmem0" in calls(kept)) is not stays


def test_what_is_mounted_over_it_is_taken_away_first(run: Run, kept: PmemMachine) -> None:
    boot(run)
    holds(kept, "TYPE=ext4\\n")
    under = kept.peek("/proc/self/mountinfo")
    put(kept, "/proc/self/mountinfo", f"{under}\n60 40 0:50 / /mnt/pmem0 rw - tmpfs tmpfs rw\n")
    info, log = kept.root / "proc/self/mountinfo", kept.root / "calls"
    script(kept, "umount", f"#!/bin/sh\necho umount >> '{log}'\nsed -i '$d' '{info}'\n")
    done = boot(run, "boot-save")
    assert done.status == 0, done.out
    assert calls(kept)[-3:] == ["umount", "umount", f"save {FILE} /dev/pmem0"]


def test_a_blank_device_is_not_saved_over_an_image(run: Run, kept: PmemMachine) -> None:
    keep.remember(kept, WANTED)
    image(kept)
    done = boot(run, "boot-save")
    assert done.status == 0
    assert f"/dev/pmem0 is blank, and {FILE} stays as it was" in done.out
    assert not any(c.startswith("save") for c in calls(kept))


def test_a_save_that_fails_is_told(run: Run, kept: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    boot(run)
    holds(kept, "TYPE=ext4\\n")

    def full(*words: object) -> None:
        raise EmupmemError("the image needs 1 GiB and there are 2 MiB")

    monkeypatch.setattr(device_image, "save_image", full)
    done = boot(run, "boot-save")
    assert done.status == 1
    assert f"/mnt/pmem0 is not saved: the image needs 1 GiB and there are 2 MiB; {FILE} stays" in done.out


# mount and remove -----------------------------------------------------------------------------------------


def test_mount_keeps_from_now_on(run: Run, kept: PmemMachine) -> None:
    argv = ("mount", "/dev/pmem0", "/mnt/pmem0", "--at-boot", "--keep", FILE)
    assert run(*argv).status == 0
    assert keep.belongs(kept, BootMount(4 * GIB, GIB, "/mnt/pmem0", "ext4", keep=FILE))
    assert "systemctl start emupmem.service" in kept.peek("/calls")
    image(kept)
    assert run(*argv).status == 0, "asked again, with the image of a shutdown there: as it is"


def test_mount_does_not_guess_which_content_counts(run: Run, kept: PmemMachine) -> None:
    image(kept)
    done = run("mount", "/dev/pmem0", "/mnt/pmem0", "--at-boot", "--keep", FILE)
    assert done.status == 1
    assert "would be saved over it" in done.err
    assert calls(kept) == []
    assert not kept.exists(unit.FILE)


def test_remove_says_what_will_not_be_saved_any_more(run: Run, kept: PmemMachine) -> None:
    run("apply", "--size", "1G", "--mount", "/mnt/pmem0", "--keep", FILE, "--yes")
    mounted(kept, "pmem0", "/mnt/pmem0")
    done = run("remove", "--yes")
    assert done.status == 0
    assert f"is not saved to {FILE} any more: emupmem save {FILE} /mnt/pmem0" in done.err
    assert not kept.exists(unit.FILE)


OTHERWISE = {
    "another size": ("--replace", "--size", "512M"),
    "another place": ("--replace", "--size", "1G", "--offset", "8G", "--mount", "/mnt/pmem0", "--keep", FILE),
    "another file": ("--size", "1G", "--mount", "/mnt/pmem0", "--keep", "/keep/new.img"),
    "not kept": ("--size", "1G", "--mount", "/mnt/pmem0"),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_so_does_an_apply_that_ends_it(run: Run, kept: PmemMachine, how: str) -> None:
    run("apply", "--size", "1G", "--mount", "/mnt/pmem0", "--keep", FILE, "--yes")
    mounted(kept, "pmem0", "/mnt/pmem0")
    same = run("apply", "--size", "1G", "--mount", "/mnt/pmem0", "--keep", FILE, "--yes")
    assert "any more" not in same.err
    done = run("apply", *OTHERWISE[how], "--yes")
    assert done.status == 0, done.err
    assert f"is not saved to {FILE} any more: emupmem save {FILE} /mnt/pmem0" in done.err


def test_a_second_mount_at_boot_leaves_what_the_first_one_recorded(run: Run, kept: PmemMachine) -> None:
    argv = ("mount", "/dev/pmem0", "/mnt/pmem0", "--at-boot")
    assert run(*argv, "--keep", FILE, "--mode", "0700").status == 0
    before = unit_text(kept)
    done = run(*argv)
    assert done.status == 0, done.err
    assert unit_text(kept) == before
    assert run(*argv, "--mode", "0750").status == 0
    (mount,) = unit.read_unit(unit_text(kept))
    assert (mount.keep, mount.mode) == (FILE, "0750")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (FILE, FILE, f"two devices cannot both be kept in {FILE}"),
        (FILE, f"{FILE}.unsaved", f"two devices cannot both be kept in {FILE}"),
        (f"{FILE}.emupmem", FILE, f"two devices cannot both be kept in {FILE}"),
        (
            "/mnt/b/a.img",
            "",
            "/mnt/b/a.img would be on the device that is mounted at /mnt/b, which forgets as well",
        ),
    ],
)
def test_no_image_is_of_two_devices_or_on_one_of_them(
    run: Run, kept: PmemMachine, first: str, second: str, words: str
) -> None:
    (kept.root / "mnt/b").mkdir(parents=True)
    other = ("--keep", second) if second else ()
    argv = ("--mount", "/mnt/a", "--keep", first, "--mount", "/mnt/b", *other)
    done = run("apply", "--size", "512M", "--count", "2", *argv, "--yes")
    assert done.status == 1
    assert words in done.err
    assert not kept.exists(unit.FILE)


def test_verify_says_how_long_it_lasts(run: Run, kept: PmemMachine) -> None:
    rebooted(run, kept)
    run("mount", "--at-boot", "--keep", FILE)
    assert f"at every boot · saved to {FILE} at an orderly shutdown only" in run("verify").out


# A save that did not run, and one that will not ----------------------------------------------------------------


def next_boot(machine: PmemMachine, number: int) -> None:
    """The disk as it is, nothing mounted, nothing under /run."""
    put(machine, keep.BOOT_ID, f"boot-{number}\n")
    put(machine, "/proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    for note in (machine.root / "run/emupmem").glob("*"):
        note.unlink()


def test_a_shutdown_that_did_not_save_is_told_by_the_next_boot_and_verify(
    run: Run, kept: PmemMachine
) -> None:
    rebooted(run, kept)
    run("mount", "--at-boot", "--keep", FILE)
    next_boot(kept, 1)
    os.utime(image(kept), (1_700_000_000, 1_700_000_000))
    assert "did not save" not in boot(run).out, "no boot before this one has noted anything"
    next_boot(kept, 2)
    told = "the last shutdown did not save it: what is there was saved 2023-11-14 22:13:20 UTC"
    assert f"brought back from {FILE} ({told})" in boot(run).out
    assert f"at an orderly shutdown only; {told}" in run("verify").out
    boot(run)
    assert told in run("verify").out, "the unit started again does not change what happened"


def test_nothing_is_told_after_a_save(run: Run, kept: PmemMachine) -> None:
    next_boot(kept, 1)
    boot(run)
    assert kept.exists(f"{FILE}.unsaved")
    holds(kept, "TYPE=ext4\\n")
    boot(run, "boot-save")
    assert not kept.exists(f"{FILE}.unsaved")
    image(kept)
    next_boot(kept, 2)
    assert "did not save" not in boot(run).out


def test_an_image_that_is_newer_than_the_note_was_saved(run: Run, kept: PmemMachine) -> None:
    """The note could not be taken away, or somebody saved by hand."""
    next_boot(kept, 1)
    boot(run)
    os.utime(kept.root / "keep/pmem0.img.unsaved", (1_700_000_000, 1_700_000_000))
    image(kept)
    next_boot(kept, 2)
    assert "did not save" not in boot(run).out


def test_what_was_never_saved_is_told(run: Run, kept: PmemMachine) -> None:
    next_boot(kept, 1)
    boot(run)
    next_boot(kept, 2)
    done = boot(run)
    assert "(the last shutdown did not save it: it was never saved before)" in done.out


def test_no_room_for_the_note_is_no_reason_not_to_mount(
    run: Run, kept: PmemMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.install_file

    def install(machine: PmemMachine, name: str, text: str) -> None:
        if name.endswith(".unsaved") or "missed" in name:
            raise EmupmemError("No space left on device")
        real(machine, name, text)

    monkeypatch.setattr(files, "install_file", install)
    assert boot(run).status == 0


BROKEN = """#!/bin/sh
echo "Traceback (most recent call last):" >&2
echo "ModuleNotFoundError: No module named 'emupmem'" >&2
exit 1
"""


def test_a_program_that_no_longer_starts_is_told_before_it_does_not_save(run: Run, kept: PmemMachine) -> None:
    """What an upgrade of the system makes of a virtual environment."""
    rebooted(run, kept)
    run("mount", "--at-boot", "--keep", FILE)
    assert run("verify").status == 0
    script(kept, "../usr/local/bin/emupmem", BROKEN)
    done = run("verify")
    assert done.status == 3
    why = "/usr/local/bin/emupmem does not start: ModuleNotFoundError: No module named 'emupmem'"
    assert f"✗ mounted      the next shutdown will not save /mnt/pmem0: {why}" in done.out
    assert "sudo emupmem save FILE /mnt/pmem0 saves it now" in done.out
    (unit_finding,) = [f for f in run("doctor", "--json").json["findings"] if f["name"] == "unit"]
    assert unit_finding["status"] == "fail"
    assert unit_finding["evidence"].startswith(f"{why}: nothing is mounted at a boot")
    (kept.root / "usr/local/bin/emupmem").unlink()
    assert "/usr/local/bin/emupmem is not there" in run("verify").out


def test_the_archive_says_the_same_of_the_unit(run: Run, kept: PmemMachine, tmp_path: Path) -> None:
    rebooted(run, kept)
    run("mount", "--at-boot", "--keep", FILE)
    for text, status in (("#!/bin/sh\necho emupmem 1\n", "ok"), (BROKEN, "fail"), ("", "fail")):
        script(kept, "../usr/local/bin/emupmem", text)
        if not text:
            (kept.root / "usr/local/bin/emupmem").unlink()
        file = tmp_path / f"{status}{len(text)}.tar.gz"
        assert run("collect", str(file)).status == 0
        here = [f for f in run("doctor", "--json").json["findings"] if f["name"] == "unit"]
        there = [
            f for f in run("doctor", "--json", "--from", str(file)).json["findings"] if f["name"] == "unit"
        ]
        assert [f["status"] for f in here] == [status]
        assert here == there


def unmounted(machine: PmemMachine) -> None:
    put(machine, "/proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    holds(machine, "TYPE=ext4\\n")


def test_verify_says_that_the_next_shutdown_does_not_save_what_was_not_brought_back(
    run: Run, kept: PmemMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebooted(run, kept)
    run("mount", "--at-boot", "--keep", FILE)
    assert "saved to /keep/pmem0.img" in run("verify").out
    next_boot(kept, 2)
    image(kept)

    def damaged(*words: object) -> None:
        raise EmupmemError("its checksum differs")

    monkeypatch.setattr(device_image, "restore_image", damaged)
    assert boot(run).status == 1
    assert run("mount", "/dev/pmem0", "/mnt/pmem0").status == 0
    done = run("verify")
    assert done.status == 3
    assert f"the next shutdown will not save /mnt/pmem0: {proof.NOT_BACK}" in done.out
    hint = "sudo emupmem mount /dev/pmem0 /mnt/pmem0 --at-boot --keep /keep/pmem0.img"
    assert f"with /keep/pmem0.img moved away, {hint} begins anew" in done.out
    (kept.root / FILE.lstrip("/")).unlink()  # as the hint says
    assert run(*hint.split()[2:]).status == 0
    assert "will not save" not in run("verify").out


def test_another_folder_does_not_end_the_keeping(run: Run, kept: PmemMachine) -> None:
    run("mount", "/dev/pmem0", "/mnt/a", "--at-boot", "--keep", FILE, "--mode", "0700")
    unmounted(kept)
    assert run("mount", "/dev/pmem0", "/mnt/b", "--at-boot").status == 0
    (there,) = unit.read_unit(unit_text(kept))
    assert (there.dir, there.mode, there.keep) == ("/mnt/b", "0700", FILE)
    assert "ExecStop" in unit_text(kept)


@pytest.mark.parametrize("before", ["none", "an older one"])
def test_an_image_that_was_put_there_since_is_not_saved_over(
    run: Run, kept: PmemMachine, before: str
) -> None:
    """As on a disk that is mounted by hand after the start: neither content is thrown away."""
    if before != "none":
        os.utime(image(kept), (1_700_000_000, 1_700_000_000))
    assert boot(run).status == 0
    os.utime(image(kept), (1_600_000_000, 1_600_000_000))
    mounted(kept, "pmem0", "/mnt/pmem0")
    done = boot(run, "boot-save")
    assert done.status == 0
    assert "since /keep/pmem0.img is another image than at the start: that stays" in done.out
    assert boot(run).status == 0, "the unit is started again in the same boot"
    assert "another image" in boot(run, "boot-save").out
    saved = [c for c in calls(kept) if c.startswith("save ")]
    assert all(c.split()[1].startswith(f"{FILE}.20") for c in saved), saved


def test_an_image_that_was_saved_by_hand_meanwhile_is_ours(run: Run, kept: PmemMachine) -> None:
    assert boot(run).status == 0
    mounted(kept, "pmem0", "/mnt/pmem0")
    os.utime(image(kept), (1_600_000_000, 1_600_000_000))  # what the stand-in for saving does not do
    assert run("save", FILE, "/mnt/pmem0").status == 0
    assert "another image" not in boot(run, "boot-save").out
    (kept.root / FILE.lstrip("/")).unlink()
    assert "saved to /keep/pmem0.img" in boot(run, "boot-save").out, "where none is left, one is made"
