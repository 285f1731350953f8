# SPDX-License-Identifier: Apache-2.0
"""mount, umount, the boot unit and verify's upper rungs on a machine in a folder: every refusal, every exit status.

The folder's mkfs, mount and umount only write down that they were called; what real kernels do is
proven in tests/vm/test_vm_mount.py.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest

import emupmem
import emupmem.system.machine
from emupmem.device import dax, decide, unit
from emupmem.device.blocks import Mounted, Pmem, devices, mounts, parse_blkid, parse_mountinfo
from emupmem.device.dax import DaxProof
from emupmem.device.decide import Folder, MountRequest
from emupmem.device.proof import SeenMount, mount_rungs, see_mount
from emupmem.kernel import release
from emupmem.model import GIB, MIB, Busy, EmupmemError
from emupmem.system import files, lock, processes
from emupmem.system.programs import Completed
from tests.cli.runner import Done, Run
from tests.device.pmem import (
    GOOD,
    PmemMachine,
    add_device,
    device_stand_ins,
    holds,
    mounted,
    pmem_machine,
    reserve,
)
from tests.fake import LOG, RELEASE, FakeMachine, build, menu, put, running, script

EMPTY = Folder("/mnt/pmem0", "empty")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PmemMachine:
    """A machine with one blank emulated device and a proof that succeeds."""
    machine = pmem_machine(tmp_path / "machine")
    running(monkeypatch.setattr, machine)
    device_stand_ins(monkeypatch.setattr)
    monkeypatch.setattr(dax, "prove_dax", lambda folder: GOOD)
    monkeypatch.setattr(unit, "SECONDS", 0.3)
    return machine


def calls(machine: FakeMachine) -> list[str]:
    found = machine.peek("/calls").splitlines()
    return [c for c in found if not c.startswith("systemctl")]


# mount ----------------------------------------------------------------------------------------------------


def test_a_blank_device_becomes_a_mounted_file_system(run: Run, here: PmemMachine) -> None:
    done = run("mount", "--owner", "dev", "--mode", "0750")
    assert (done.status, done.err) == (0, "")
    assert calls(here) == [
        "mkfs.ext4 -q -b 4096 -m 0 -E stride=512,stripe_width=512 /dev/pmem0",
        "mount -t ext4 -o dax=always /dev/pmem0 /mnt/pmem0",
    ]
    assert here.owned == ("/mnt/pmem0", "259:0", (1000, 1001), 0o750)
    assert "✓ huge-pages   2 faults for 4 MiB: 2 MiB each" in done.out
    assert "emulated, volatile" in done.out


def test_json_and_again(run: Run, here: PmemMachine) -> None:
    first = run("mount", "/dev/pmem0", "/mnt/a", "--fs", "xfs", "--json").json
    proof = {"dax_file": True, "map_sync": True, "huge_pages": True}
    assert first == {"device": "/dev/pmem0", "dir": "/mnt/a", "fs": "xfs", **proof, "changed": True}
    count = len(calls(here))
    again = run("mount", "/dev/pmem0", "/mnt/a", "--json")
    assert (again.status, again.json) == (0, first | {"changed": False})
    assert len(calls(here)) == count
    assert "Already set up" in run("mount", "/dev/pmem0", "/mnt/a").out


def test_dry_run_changes_nothing(run: Run, here: PmemMachine) -> None:
    done = run("mount", "--dry-run", "--fs", "xfs", "--owner", "dev")
    assert done.out.splitlines() == [
        "mkfs.xfs -q -d su=2m,sw=1 /dev/pmem0",
        "mkdir -p /mnt/pmem0",
        "mount -t xfs -o dax=always /dev/pmem0 /mnt/pmem0",
        "chown dev /mnt/pmem0",
    ]
    assert calls(here) == []
    assert not here.exists("/mnt/pmem0")


def test_an_older_kernel_gets_older_options(run: Run, here: PmemMachine) -> None:
    put(here, "/proc/sys/kernel/osrelease", "5.4.0-1-amd64")
    done = run("mount", "--dry-run", "--fs", "xfs")
    assert "mkfs.xfs -q -m reflink=0 -d su=2m,sw=1 /dev/pmem0" in done.out
    assert "mount -t xfs -o dax /dev/pmem0" in done.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("/dev/sda",), "/dev/sda is not persistent memory: emupmem never touches another disk"),
        (("/dev/pmem7",), "/dev/pmem7 is not a block device"),
        (("pmem0",), "did you mean /dev/pmem0?"),
        (("/dev/pmem0", "mnt"), "mnt is not absolute"),
        (("/dev/pmem0", "/"), "/ belongs to the system"),
        (("/dev/pmem0", "/etc/x"), "/etc/x belongs to the system"),
        (("/dev/pmem0", "/home"), "/home belongs to the system"),
        (("/dev/pmem0", "/mnt/../etc"), "is not a plain name"),
        (("/dev/pmem0", "/mnt//x"), "is not a plain name"),
        (("/dev/pmem0", "/mnt/a\nb"), "is not a name for a folder"),
        (("/dev/pmem0", "/mnt/full"), "/mnt/full is not empty: what is in it would be hidden"),
        (("/dev/pmem0", "/mnt/file"), "/mnt/file is there and is not a folder"),
        (("/dev/pmem0", "/mnt/link"), "/mnt/link leads to /srv/there by a symbolic link"),
        (("/dev/pmem0", "/mnt/open/x"), "/mnt/open can be changed by others than root"),
        (("/dev/pmem0", "/mnt/taken"), "/mnt/taken is a mount point already (/dev/sdb1)"),
        (("--owner", "nobody-here"), "there is no user nobody-here"),
        (("--owner", "dev:nobody-here"), "there is no group nobody-here"),
        (("--owner", ":users"), "is not USER or USER:GROUP"),
        (("--mode", "rwx"), "is not a mode"),
        (("--mode", "99999"), "is not a mode"),
    ],
)
def test_refusals(run: Run, here: PmemMachine, argv: tuple[str, ...], words: str) -> None:
    put(here, "/dev/sda", "")
    put(here, "/sys/class/block/sda/dev", "8:0")
    put(here, "/mnt/full/file", "")
    put(here, "/mnt/file", "")
    (here.root / "mnt/link").symlink_to("/srv/there")
    (here.root / "mnt/open").mkdir(mode=0o777)
    (here.root / "mnt/open").chmod(0o777)
    mounted(here, "sdb1", "/mnt/taken")
    done = run("mount", *argv)
    assert done.status == (2 if "--mode" in argv else 1)
    assert words in done.err, done.err
    assert calls(here) == []
    assert run("mount", *argv, "--force").status == done.status
    assert calls(here) == []


def block(machine: FakeMachine) -> str:
    return "/sys/devices/platform/e820_pmem/ndbus0/region0/namespace0.0/block/pmem0"


def test_devices_that_are_not_free(run: Run, here: PmemMachine) -> None:
    def refused(words: str) -> None:
        for more in ((), ("--force",)):
            done = run("mount", *more)
            assert done.status == 1
            assert words in done.err, done.err
            assert calls(here) == []

    here.claimed = True
    refused("/dev/pmem0 is in use")
    here.claimed = False
    put(here, f"{block(here)}/queue/dax", "0")
    refused("/dev/pmem0 has no DAX (queue/dax is 0)")
    put(here, f"{block(here)}/queue/dax", "1")
    put(here, f"{block(here)}/ro", "1")
    refused("/dev/pmem0 is read-only")
    put(here, f"{block(here)}/ro", "0")
    put(here, f"{block(here)}/holders/dm-0", "")
    refused("/dev/pmem0 is a part of dm-0")
    (here.root / block(here).lstrip("/") / "holders/dm-0").unlink()
    put(here, f"{block(here)}/pmem0p1/dev", "259:9")
    refused("/dev/pmem0 has partitions")


def test_a_partition_is_refused(run: Run, here: PmemMachine) -> None:
    put(here, f"{block(here)}/pmem0p1/dev", "259:9")
    put(here, "/sys/class/block/pmem0p1/dev", "259:9")
    put(here, "/dev/pmem0p1", "")
    done = run("mount", "/dev/pmem0p1")
    assert (done.status, calls(here)) == (1, [])
    assert "/dev/pmem0p1 is a partition" in done.err
    assert "the whole device: /dev/pmem0" in done.err


@pytest.mark.parametrize(
    ("output", "status", "words"),
    [
        ("TYPE=swap\\n", 0, "/dev/pmem0 holds swap"),
        ("PTTYPE=gpt\\n", 0, "/dev/pmem0 holds gpt partition table"),
        ("", 0, "/dev/pmem0 holds something that blkid knows"),
        ("", 8, "/dev/pmem0 holds several signatures at once"),
    ],
)
def test_a_foreign_signature_needs_force(
    run: Run, here: PmemMachine, output: str, status: int, words: str
) -> None:
    holds(here, output, status)
    done = run("mount", "--json")
    assert done.status == 1
    assert words in done.json["error"]
    assert "--force destroys that and makes a new ext4" in done.err
    assert calls(here) == []
    assert run("mount", "--force").status == 0
    assert calls(here)[0] == "mkfs.ext4 -q -F -b 4096 -m 0 -E stride=512,stripe_width=512 /dev/pmem0"


def test_what_only_wipefs_sees_counts(run: Run, here: PmemMachine) -> None:
    script(here, "wipefs", "#!/bin/sh\necho 0x438 something\n")
    assert "holds a signature that wipefs knows" in run("mount").err
    script(here, "wipefs", "#!/bin/sh\nexit 1\n")
    assert "wipefs failed with status 1" in run("mount").err
    holds(here, "", 4)
    assert "blkid failed with status 4" in run("mount").err
    assert calls(here) == []


def test_the_file_system_that_is_there_is_kept(run: Run, here: PmemMachine) -> None:
    holds(here, "TYPE=xfs\\n")
    done = run("mount")
    assert (done.status, calls(here)) == (0, ["mount -t xfs -o dax=always /dev/pmem0 /mnt/pmem0"])
    assert "The xfs that was on /dev/pmem0 is kept." in done.out


def test_another_file_system_than_asked_needs_force(run: Run, here: PmemMachine) -> None:
    holds(here, "TYPE=xfs\\n")
    done = run("mount", "--fs", "ext4")
    assert (done.status, calls(here)) == (1, [])
    assert "holds xfs" in done.err


@pytest.mark.parametrize("at", [0, 5 * MIB, GIB - 1], ids=["beginning", "middle", "end"])
def test_data_of_an_nvdimm_needs_no_signature_to_stay(run: Run, here: PmemMachine, at: int) -> None:
    reserve(here, "quiet")
    disk = here.root / "dev/pmem0"
    os.truncate(disk, GIB)
    assert run("mount", "/dev/pmem0", "--dry-run").status == 0, "it is zero"
    with disk.open("r+b") as file:
        step = GIB // 1000
        file.seek(at // step * step if at < GIB - MIB else at)
        file.write(b"x")
    for more in ((), ("--force",)):
        done = run("mount", "/dev/pmem0", *more)
        assert (done.status, calls(here)) == (1, [])
        assert "/dev/pmem0 holds data without a signature and is not one of emupmem's devices" in done.err
        assert "mkfs.ext4 /dev/pmem0 does" in done.err


def test_what_is_not_ours_is_never_overwritten(run: Run, here: PmemMachine) -> None:
    reserve(here, "quiet")
    assert "no emulated persistent memory is there" in run("mount").err
    holds(here, "TYPE=ext4\\n")
    for more in (("--fs", "xfs"), ("--force",)):
        done = run("mount", "/dev/pmem0", *more)
        assert (done.status, calls(here)) == (1, [])
        assert "is not one of emupmem's devices" in done.err
    holds(here, "", 2)
    assert "a line in /etc/fstab serves it" in run("mount", "/dev/pmem0", "--at-boot").err
    assert calls(here) == []
    assert run("mount", "/dev/pmem0").status == 0, "blank persistent memory, named by the user"


def test_a_real_device_with_the_file_system_that_is_asked_for_is_mounted_as_it_is(
    run: Run, here: PmemMachine
) -> None:
    reserve(here, "quiet")
    holds(here, "TYPE=ext4\\n")
    assert run("mount", "/dev/pmem0").status == 0
    assert not any("mkfs" in c for c in calls(here))


def test_with_several_devices_one_must_be_named(run: Run, here: PmemMachine) -> None:
    add_device(here, 1, 5 * GIB)
    reserve(here, "memmap=1G!4G,1G!5G")
    done = run("mount")
    assert (done.status, calls(here)) == (1, [])
    assert "there are 2 emulated devices: /dev/pmem0 (1 GiB), /dev/pmem1 (1 GiB)" in done.err


def test_a_mounted_device_is_left_alone(run: Run, here: PmemMachine) -> None:
    mounted(here, "pmem0", "/mnt/pmem0")
    for argv, words in (
        (("/dev/pmem0", "/mnt/b"), "/dev/pmem0 is mounted at /mnt/pmem0 already"),
        (("--force",), "a mounted file system is never recreated"),
        (("--fs", "xfs"), "is mounted at /mnt/pmem0 with ext4, not xfs"),
    ):
        done = run("mount", *argv)
        assert (done.status, calls(here)) == (1, [])
        assert words in done.err
        assert "emupmem umount /mnt/pmem0 first" in done.err


def test_a_mount_without_dax_is_not_as_asked(run: Run, here: PmemMachine) -> None:
    mounted(here, "pmem0", "/mnt/pmem0", options="relatime")
    done = run("mount")
    assert (done.status, calls(here)) == (1, [])
    assert "is mounted at /mnt/pmem0 without DAX" in done.err


def test_small_devices(run: Run, here: PmemMachine) -> None:
    put(here, "/sys/devices/platform/e820_pmem/ndbus0/region0/size", str(256 * MIB))
    put(here, f"{block(here)}/size", str(256 * MIB // 512))
    reserve(here, "memmap=256M!4G")
    done = run("mount", "--fs", "xfs")
    assert (done.status, calls(here)) == (1, [])
    assert "/dev/pmem0 has 256 MiB: mkfs.xfs makes nothing under 300 MiB" in done.err
    assert "--fs ext4" in done.err
    assert run("mount").status == 0


@pytest.mark.parametrize(("mib", "layout"), [(300, "su=2m,sw=1,agcount=4"), (1024, "su=2m,sw=1")])
def test_xfs_on_less_than_a_gigabyte_has_room_for_its_log(
    run: Run, here: PmemMachine, mib: int, layout: str
) -> None:
    put(here, "/sys/devices/platform/e820_pmem/ndbus0/region0/size", str(mib * MIB))
    put(here, f"{block(here)}/size", str(mib * MIB // 512))
    reserve(here, f"memmap={mib}M!4G")
    assert f"mkfs.xfs -q -d {layout} /dev/pmem0\n" in run("mount", "--fs", "xfs", "--dry-run").out


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "log stripe unit adjusted\nLog size must be at least 64MB.\nUsage: mkfs.xfs\n\t\t[-V]\n",
            "Log size must be",
        ),
        (
            "mount: /x: wrong fs type.\n       dmesg(1) may have more information after it.\n",
            "mount: /x: wrong",
        ),
        ("UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY.\n\t(i.e., without -a or -p options)\n", "UNEXPECTED"),
        ("one\ntwo\n\n", "two"),
        ("usage: thing\n -x\n", "-x"),
        ("", ""),
    ],
)
def test_the_reason_is_what_a_program_says_before_its_habits(said: str, reason: str) -> None:
    assert Completed(1, b"progress\n" if said else b"", said.encode()).last_words.startswith(reason)
    assert Completed(1, said.encode(), b"").last_words.startswith(reason)


def test_wrong_usage_and_no_root(run: Run, here: PmemMachine) -> None:
    assert run("mount", "--fs", "btrfs").status == 2
    here.root_user = False
    for argv in (("mount",), ("umount", "/mnt/pmem0"), ("boot-mount", "1G!4G", "/mnt/x", "ext4", "-", "-")):
        done = run(*argv)
        assert done.status == 1
        assert f"sudo emupmem {argv[0]}" in done.err


def test_tools_that_are_missing_or_fail(run: Run, here: PmemMachine) -> None:
    script(here, "mkfs.ext4", "#!/bin/sh\necho no luck >&2\nexit 1\n")
    assert run("mount", "--json").json["changed"] is True, "nobody knows how far it came"
    done = run("mount")
    assert done.status == 1
    assert "mkfs.ext4 failed with status 1: no luck" in done.err
    assert "/dev/pmem0 is not mounted" in done.err
    assert calls(here) == []
    (here.root / "sbin/mkfs.ext4").unlink()
    done = run("mount")
    assert "mkfs.ext4 is not installed" in done.err
    assert "apt-get install e2fsprogs" in done.err
    holds(here, "TYPE=ext4\\n")
    script(here, "mount", "#!/bin/sh\necho wrong fs type >&2\nexit 32\n")
    assert run("mount", "--json").json["changed"] is False
    script(here, "mkfs.ext4", "#!/bin/sh\n")
    assert run("mount", "--force", "--json").json["changed"] is True
    done = run("mount")
    assert done.status == 1
    assert "mount failed with status 32: wrong fs type" in done.err
    assert "--force makes a new one (and destroys it)" in done.err


@pytest.mark.parametrize(
    ("proof", "words"),
    [
        (DaxProof(False, False, 1024), "✗ dax-file     a new file in /mnt/pmem0 has no DAX"),
        (DaxProof(True, False, 2), "✗ map-sync     the kernel refuses MAP_SYNC"),
        (DaxProof(True, True, 1024), "✗ huge-pages   1024 faults for 4 MiB: 4 KiB each"),
        (DaxProof(True, True, 1024, aligned=False), "the kernel chose a crooked address"),
    ],
)
def test_a_failed_proof_is_told_and_nothing_is_undone(
    run: Run, here: PmemMachine, monkeypatch: pytest.MonkeyPatch, proof: DaxProof, words: str
) -> None:
    monkeypatch.setattr(dax, "prove_dax", lambda folder: proof)
    done = run("mount")
    assert done.status == 3
    assert words in done.out
    assert "→" in done.out, "and what to do"
    assert not any(c.startswith("umount") for c in calls(here))
    assert run("mount", "--json").json["huge_pages"] is (proof.faults == 2)


def test_no_huge_pages_in_this_kernel_is_an_answer(
    run: Run, here: PmemMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dax, "prove_dax", lambda folder: DaxProof(True, True, 1024))
    put(here, f"/boot/config-{RELEASE}", "CONFIG_FS_DAX=y\n# CONFIG_FS_DAX_PMD is not set\n")
    done = run("mount")
    assert done.status == 0
    assert "- huge-pages   not supported: this kernel is built without CONFIG_FS_DAX_PMD" in done.out


def test_the_proof_of_an_ordinary_folder_fails_honestly(tmp_path: Path) -> None:
    found = dax.prove_dax(str(tmp_path))
    assert (found.dax_file, found.map_sync) == (False, False) or found.dax_file is None
    assert dax.prove_dax(str(tmp_path / "missing")).why.startswith("no probe file in")
    assert list(tmp_path.iterdir()) == [], "nothing stays"


# umount ---------------------------------------------------------------------------------------------------


def test_umount(run: Run, here: PmemMachine) -> None:
    mounted(here, "pmem0", "/mnt/pmem0")
    done = run("umount", "/mnt/pmem0/", "--json")
    assert done.json == {"device": "/dev/pmem0", "dir": "/mnt/pmem0", "changed": True}
    assert calls(here) == ["umount /mnt/pmem0"]


def test_umount_refuses(run: Run, here: PmemMachine) -> None:
    mounted(here, "sdb1", "/mnt/disk")
    mounted(here, "pmem0", "/mnt/pmem0")
    assert "nothing is mounted at /mnt/x" in run("umount", "/mnt/x").err
    assert "/mnt/disk is not persistent memory: /dev/sdb1" in run("umount", "/mnt/disk").err
    assert calls(here) == []
    script(here, "umount", "#!/bin/sh\necho target is busy >&2\nexit 32\n")
    done = run("umount", "/mnt/pmem0")
    assert done.status == 1
    assert "/mnt/pmem0 is in use by python3 (process 42)" in done.err
    mounted(here, "sdb1", "/mnt/pmem0/inner")
    assert "in use by the mount /mnt/pmem0/inner, python3" in run("umount", "/mnt/pmem0").err


def test_umount_tries_again_where_nobody_is_there_any_more(
    run: Run, here: PmemMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(here, "pmem0", "/mnt/pmem0")
    monkeypatch.setattr(processes, "processes_using", lambda *_: [])
    monkeypatch.setattr("emupmem.device.mount.UMOUNT_PAUSE", 0)
    busy = f"#!/bin/sh\necho x >> '{here.root}/tries'\n[ $(wc -l < '{here.root}/tries') -ge 3 ] || exit 32\n"
    script(here, "umount", busy)
    assert run("umount", "/mnt/pmem0").status == 0
    assert here.peek("/tries").count("x") == 3
    script(here, "umount", f"#!/bin/sh\necho x >> '{here.root}/tries'\necho no luck >&2\nexit 32\n")
    done = run("umount", "/mnt/pmem0")
    assert "umount failed with status 32: no luck" in done.err
    assert here.peek("/tries").count("x") == 13


def test_who_holds_a_device_is_found_on_this_machine(tmp_path: Path) -> None:
    """By the real /proc: this process has a file of its folder's device open."""
    import os

    with (tmp_path / "open").open("w") as file:
        info = os.fstat(file.fileno())
        number = f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}"
        found = processes.processes_using(emupmem.system.machine.Machine(), number)
    assert any(f"(process {os.getpid()})" in who for who in found)


# At every boot -------------------------------------------------------------------------------------------


def unit_text(machine: FakeMachine) -> str:
    return machine.peek(unit.FILE)


def test_mount_at_boot_writes_and_enables_the_unit(run: Run, here: PmemMachine) -> None:
    done = run("mount", "--at-boot", "--owner", "dev:users")
    assert done.status == 0
    assert '"1G!4G" "/mnt/pmem0" "ext4" "dev:users" "-"' in unit_text(here)
    assert (here.root / unit.LINK.lstrip("/")).readlink() == Path(unit.FILE)
    assert "systemctl daemon-reload" in here.peek("/calls")
    assert run("mount", "--at-boot", "--owner", "dev:users", "--json").json["changed"] is False
    assert "mounted again at the next boot" in run("umount", "/mnt/pmem0").out


def test_the_unit_starts_only_what_root_alone_can_change(run: Run, here: PmemMachine) -> None:
    (here.root / "usr/local/bin").chmod(0o777)
    done = run("mount", "--at-boot")
    assert (done.status, calls(here)) == (1, []), "refused before anything is done"
    assert "which others than root can change" in done.err
    (here.root / "usr/local/bin").chmod(0o755)
    (here.root / "usr/local/bin/emupmem").unlink()
    assert "emupmem is not installed for the machine" in run("mount", "--at-boot").err


def test_apply_with_mount(run: Run, here: PmemMachine) -> None:
    reserve(here, "quiet")
    for word in ("--dry-run", "--check"):
        shown = run("apply", "--size", "1G", "--mount", "/mnt/pmem0", word)
        assert "+WantedBy=multi-user.target" in shown.out
        assert not here.exists(unit.FILE)
    done = run(
        "apply", "--size", "1G", "--mount", "/mnt/pmem0", "--owner", "dev", "--fs", "xfs", "--yes", "--json"
    )
    assert done.status == 0
    mounts = [
        {
            "start": 4 * GIB,
            "size": GIB,
            "dir": "/mnt/pmem0",
            "fs": "xfs",
            "owner": "dev",
            "mode": "",
            "keep": "",
        }
    ]
    assert done.json["mounts"] == mounts
    assert here.is_link(unit.LINK)
    assert "memmap=1G!4G" in menu(here)
    again = run(
        "apply", "--size", "1G", "--mount", "/mnt/pmem0", "--owner", "dev", "--fs", "xfs", "--yes", "--json"
    )
    assert again.json["changed"] is False
    plain = run("apply", "--size", "1G", "--yes", "--json").json
    assert (plain["changed"], plain["mounts"]) == (False, mounts), "without --mount the unit stays"
    reserve(here, "memmap=1G!4G quiet")
    assert run("remove", "--yes").status == 0
    assert not here.exists(unit.FILE)
    assert not here.is_link(unit.LINK)
    assert "memmap" not in menu(here)


def test_apply_with_mount_changes_the_unit_alone(run: Run, here: PmemMachine) -> None:
    reserve(here, "quiet")
    run("apply", "--size", "1G", "--yes")
    before = menu(here)
    done = run("apply", "--size", "1G", "--mount", "/mnt/pmem0", "--yes")
    assert done.status == 0
    assert f"✓ {unit.FILE} written: mounts /mnt/pmem0 at every boot" in done.out
    assert "update-grub2 ·" not in done.out
    assert menu(here) == before


def test_several_devices_and_a_replaced_one(run: Run, here: PmemMachine) -> None:
    reserve(here, "quiet")
    two = ("--count", "2", "--mount", "/mnt/a", "--mount", "/mnt/b", "--yes", "--json")
    found = run("apply", "--size", "1G", *two).json["mounts"]
    assert [(m["start"], m["dir"]) for m in found] == [(4 * GIB, "/mnt/a"), (5 * GIB, "/mnt/b")]
    assert [m.dir for m in unit.read_unit(unit_text(here))] == ["/mnt/a", "/mnt/b"]
    run("remove", "1G!5G", "--yes")
    assert [m.dir for m in unit.read_unit(unit_text(here))] == ["/mnt/a"]
    run("apply", "--size", "2G", "--replace", "--yes")
    assert not here.exists(unit.FILE), "its range is no longer reserved"


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (("--mount", "/etc/x"), 1, "belongs to the system"),
        (("--mount", "/mnt/full"), 1, "is not empty"),
        (("--mount", "/mnt/x", "--owner", "nobody-here"), 1, "there is no user nobody-here"),
        (("--mount", "/mnt/x", "--mode", "8"), 2, "is not a mode"),
        (("--mount", "/mnt/x", "--mount", "/mnt/y"), 1, "--mount is given 2 times for 1 device"),
        (("--count", "2", "--mount", "/mnt/x", "--mount", "/mnt/x"), 1, "two devices cannot both"),
        (("--owner", "dev"), 2, "belong to --mount"),
        (("--fs", "xfs"), 2, "belong to --mount"),
        (("--mount", "/mnt/x", "--fs", "zfs"), 2, "zfs"),
    ],
)
def test_apply_refuses_before_anything_is_done(
    run: Run, here: PmemMachine, argv: tuple[str, ...], status: int, words: str
) -> None:
    reserve(here, "quiet")
    put(here, "/mnt/full/file", "")
    before = here.peek("/etc/default/grub")
    done = run("apply", "--size", "1G", *argv, "--yes")
    assert done.status == status
    assert words in done.err, done.err
    assert here.peek("/etc/default/grub") == before
    assert not here.exists(unit.FILE)
    small = run("apply", "--size", "128M", "--mount", "/mnt/x", "--fs", "xfs", "--yes")
    assert "mkfs.xfs makes nothing under 300 MiB" in small.err


def test_a_unit_of_somebody_else_is_not_overwritten(run: Run, here: PmemMachine) -> None:
    reserve(here, "quiet")
    put(here, unit.FILE, "[Service]\nExecStart=/bin/true\n")
    done = run("apply", "--size", "1G", "--mount", "/mnt/x", "--yes")
    assert done.status == 1
    assert "is not one of emupmem's" in done.err
    assert run("apply", "--size", "1G", "--yes").status == 0
    assert run("remove", "--yes").status == 0
    assert "/bin/true" in unit_text(here)


def test_a_unit_that_cannot_be_taken_away_does_not_stop_remove(
    run: Run, here: PmemMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve(here, "quiet")
    run("apply", "--size", "1G", "--mount", "/mnt/x", "--yes")

    def refuse(machine: PmemMachine, name: str) -> None:
        raise EmupmemError(f"{name} cannot be removed")

    with monkeypatch.context() as patch:
        patch.setattr(files, "delete_file", refuse)
        done = run("remove", "--yes")
    assert done.status == 0
    assert "cannot be removed: it does nothing without a reservation" in done.err
    assert "memmap" not in menu(here)
    assert run("remove", "--yes").status == 0
    assert not here.exists(unit.FILE)


def test_a_unit_that_cannot_be_written_is_told(run: Run, here: PmemMachine) -> None:
    reserve(here, "quiet")
    put(here, "/etc/systemd", "not a folder")
    done = run("apply", "--size", "1G", "--mount", "/mnt/x", "--yes")
    assert done.status == 1
    assert "the reservation itself is in force; the same command again finishes it" in done.err
    assert "memmap=1G!4G" in menu(here)


def test_the_tree_of_another_machine(run: Run, here: PmemMachine, tmp_path: Path) -> None:
    other = build(tmp_path / "other")
    put(other, "/etc/passwd", "ann:x:1:1::/:/bin/sh\n")
    (other.root / "mnt").mkdir()
    argv = ("apply", "--root", str(other.root), "--from", "-", "--size", "1G", "--mount", "/mnt/p", "--yes")
    assert run(*argv, "--owner", "dev", stdin=LOG.encode()).status == 1, (
        "a user of this machine, not of that one"
    )
    assert run(*argv, "--owner", "ann", stdin=LOG.encode()).status == 0
    assert '"/mnt/p" "ext4" "ann"' in unit_text(other)
    assert other.is_link(unit.LINK)
    assert run("remove", "--root", str(other.root), "--yes").status == 0
    assert not other.exists(unit.FILE)


def boot(run: Run, folder: str = "/mnt/pmem0", where: str = "1G!4G") -> Done:
    return run("boot-mount", where, folder, "ext4", "dev", "-", "-")


def test_boot_mounts(run: Run, here: PmemMachine) -> None:
    done = boot(run)
    assert done.status == 0
    assert "/dev/pmem0 is mounted at /mnt/pmem0 · ext4, newly created · emulated, volatile" in done.out
    assert here.owned[2] == (1000, 1001)


def held(machine: PmemMachine, pid: int) -> int:
    """Somebody else's hold of the lock of all changes, in the name of a process."""
    put(machine, "/var/backups/emupmem/lock", f"{pid}\n")
    descriptor = os.open(machine.path("/var/backups/emupmem/lock"), os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@pytest.mark.parametrize("killed", [False, True])
def test_boot_waits_for_whoever_has_the_lock(
    run: Run, here: PmemMachine, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    monkeypatch.setattr(unit, "SECONDS", 10)
    if killed:  # a number that no process has: what the killed run had started goes on
        pid = 1 << 23
        said = rf"a program started by a killed emupmem \(PID {pid}\) is still running"
    else:
        pid, said = os.getpid(), "another emupmem is at work"
    descriptor = held(here, pid)
    with pytest.raises(Busy, match=said), lock.change_lock(here):
        pass
    free = threading.Timer(0.3, os.close, [descriptor])
    free.start()
    done = boot(run)
    free.join()
    assert done.status == 0, done.out
    assert "/dev/pmem0 is mounted at /mnt/pmem0" in done.out


def test_boot_waits_for_a_device_that_is_in_use_for_a_moment(
    run: Run, here: PmemMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit, "SECONDS", 10)
    here.claimed = True
    free = threading.Timer(0.3, setattr, [here, "claimed", False])
    free.start()
    assert boot(run).status == 0
    free.join()


def test_boot_keeps_what_survived_a_warm_restart_if_it_is_whole(run: Run, here: PmemMachine) -> None:
    holds(here, "TYPE=ext4\\n")
    done = boot(run)
    assert "ext4, kept from before this start" in done.out
    assert calls(here)[0] == "e2fsck -p /dev/pmem0"
    put(here, "/proc/self/mountinfo", "")
    script(here, "e2fsck", "#!/bin/sh\necho UNEXPECTED INCONSISTENCY\nexit 4\n")
    done = boot(run)
    assert done.status == 1
    assert "before this start is damaged: UNEXPECTED INCONSISTENCY" in done.out


def test_boot_without_the_reservation_is_quiet(run: Run, here: PmemMachine) -> None:
    for words in ("quiet", "memmap=1G!8G", "memmap=1G$4G"):
        reserve(here, words)
        done = boot(run)
        assert (done.status, done.err, calls(here)) == (0, "", [])
        assert "this boot does not reserve memmap=1G!4G: nothing to mount at /mnt/pmem0" in done.out


@pytest.mark.parametrize("item", ["2G!4G", "512M!4G", "1G!4608M", "1G!3584M"])
def test_boot_with_another_size_in_that_place_fails_with_a_line(
    run: Run, here: PmemMachine, item: str
) -> None:
    reserve(here, f"memmap={item}")
    done = boot(run)
    assert (done.status, calls(here)) == (1, [])
    assert (
        f"/mnt/pmem0 is not mounted: this boot reserves memmap={item} where it was memmap=1G!4G" in done.out
    )


def test_boot_says_what_is_wrong_and_goes_on_with_the_next(run: Run, here: PmemMachine) -> None:
    reserve(here, "memmap=1G!4G,1G!5G")
    done = run(
        "boot-mount", "1G!5G", "/mnt/b", "ext4", "-", "-", "-", "1G!4G", "/mnt/a", "ext4", "-", "-", "-"
    )
    assert done.status == 1
    assert "emupmem: /mnt/b is not mounted: no device for memmap=1G!5G appeared" in done.out
    assert "/dev/pmem0 is mounted at /mnt/a" in done.out
    put(here, "/proc/self/mountinfo", "")
    put(here, f"{block(here)}/size", str(512 * MIB // 512))
    assert "/dev/pmem0 has 512 MiB instead of 1 GiB" in boot(run).out
    put(here, f"{block(here)}/size", str(GIB // 512))
    holds(here, "TYPE=swap\\n")
    done = boot(run)
    assert (done.status, "holds swap" in done.out) == (1, True)
    assert not any("mkfs" in c and "pmem0 " in c for c in calls(here)[2:])


@pytest.mark.parametrize(
    "words", [("1G!4G",), ("1G@4G", "/mnt/x", "ext4", "-", "-", "-"), ("x", "/", "y", "-", "-", "-")]
)
def test_boot_with_wrong_words(run: Run, here: PmemMachine, words: tuple[str, ...]) -> None:
    assert run("boot-mount", *words).status == 1
    assert calls(here) == []


# verify ----------------------------------------------------------------------------------------------------

SEEN = SeenMount("/dev/pmem0", "/mnt/p", "ext4", "ext4", "/mnt/p", ("rw", "dax=always"), True, True, 2, True)


def rungs(**changes: Any) -> dict[str, tuple[str, str, str]]:
    checks = mount_rungs((dataclasses.replace(SEEN, **changes),))
    return {c.name: (c.status, c.found, c.hint) for c in checks}


def test_the_mount_of_another_device_is_not_called_volatile(here: PmemMachine) -> None:
    mounted(here, "pmem0", "/mnt/p")
    all_mounts = mounts(here)

    def said() -> str:
        (device,) = devices(here)
        rungs = mount_rungs((see_mount(here, device, "/mnt/p", "", all_mounts, False),))
        return next(c.found for c in rungs if c.name == "mounted")

    assert said().endswith("emulated, volatile")
    reserve(here, "quiet")
    bus = "/sys/devices/platform/e820_pmem/ndbus0"
    put(here, f"{bus}/region0/persistence_domain", "cpu_cache\n")
    for provider, flags, words in (
        ("ACPI.NFIT", "fpu", "NVDIMM · persistence domain cpu_cache"),
        ("ACPI.NFIT", "fpu hypervisor", "virtual NVDIMM, kept by what the host has behind it"),
        ("CXL", "fpu", "CXL memory"),
        ("virtio-pmem", "fpu hypervisor", "virtio-pmem, kept by what the host has behind it"),
        ("e820", "fpu", "marked as persistent by the firmware"),
    ):
        put(here, f"{bus}/provider", f"{provider}\n")
        put(here, "/proc/cpuinfo", f"flags\t\t: {flags}\n")
        assert words in said()
        assert "volatile" not in said()


def test_five_good_rungs() -> None:
    assert [s for s, _, _ in rungs().values()] == ["ok"] * 5
    assert rungs(at_boot=True)["mounted"][1] == "/mnt/p with dax=always, at every boot · emulated, volatile"


@pytest.mark.parametrize(
    ("changes", "rung", "status", "found"),
    [
        ({"device": ""}, "filesystem", "fail", "the device that /mnt/p is for is not there"),
        ({"fs": "", "at": ""}, "filesystem", "fail", "/dev/pmem0 is blank"),
        ({"fs": "swap", "at": ""}, "filesystem", "fail", "/dev/pmem0 holds swap"),
        ({"fs": None}, "filesystem", "skipped", "what /dev/pmem0 holds is shown to root only"),
        ({"at": ""}, "mounted", "fail", "/dev/pmem0 is not mounted"),
        ({"at": "/x"}, "mounted", "fail", "/dev/pmem0 is mounted at /x"),
        ({"options": ("rw",)}, "mounted", "fail", "/mnt/p without dax: rw"),
        (
            {"dax_file": False},
            "dax-file",
            "fail",
            "a new file in /mnt/p has no DAX, whatever the option says",
        ),
        ({"dax_file": None, "why": "no"}, "dax-file", "skipped", "no"),
        ({"map_sync": False}, "map-sync", "fail", "the kernel refuses MAP_SYNC"),
        ({"map_sync": None, "why": "no"}, "map-sync", "skipped", "no"),
        (
            {"map_sync": False, "asynchronous": True},
            "map-sync",
            "skipped",
            "virtio-pmem has none: what a program wrote is safe after msync or fsync, which the host carries out",
        ),
        ({"faults": 1024, "huge": False}, "huge-pages", "fail", "1024 faults for 4 MiB: 4 KiB each"),
        ({"faults": None, "why": "no"}, "huge-pages", "skipped", "no"),
    ],
)
def test_each_rung_that_breaks(changes: dict[str, Any], rung: str, status: str, found: str) -> None:
    made = rungs(**changes)
    assert made[rung][:2] == (status, found)
    names = list(made)
    if status == "fail":
        assert made[rung][2], "with what to do"
        after = [made[n] for n in names[names.index(rung) + 1 :]]
        assert all(a[:2] == ("skipped", f"explained by {rung}") for a in after)


def test_the_worst_mount_speaks() -> None:
    other = dataclasses.replace(SEEN, device="/dev/pmem1", dir="/mnt/q", at="")
    checks = mount_rungs((SEEN, other))
    assert [c.status for c in checks] == ["ok", "fail", "skipped", "skipped", "skipped"]
    assert "/dev/pmem1 is not mounted" in checks[1].found


def rebooted(run: Run, machine: FakeMachine) -> None:
    """Apply, and make the folder look as after the reboot; the rungs below are test_cli's business."""
    reserve(machine, "quiet")
    assert run("apply", "--size", "1G", "--yes").status == 0
    reserve(machine, "memmap=1G!4G")
    put(machine, "/proc/iomem", "100000000-13fffffff : Persistent Memory (legacy)\n")


def test_verify_says_the_five_rungs_of_the_unit_without_root_too(run: Run, here: PmemMachine) -> None:
    rebooted(run, here)
    run("mount", "--at-boot")
    named = [(c["name"], c["status"]) for c in run("verify", "--wait", "0", "--json").json["checks"]][7:]
    assert named == [(n, "ok") for n in ("filesystem", "mounted", "dax-file", "map-sync", "huge-pages")]
    put(here, "/sys/devices/platform/e820_pmem/ndbus0/region0/resource", "")
    here.root_user = False
    user = run("verify", "--wait", "0", "--json").json["checks"][7:]
    assert [c["status"] for c in user] == ["ok"] * 5, user


def test_verify_says_nothing_of_mounts_where_there_are_none(run: Run, here: PmemMachine) -> None:
    rebooted(run, here)
    assert len(run("verify", "--wait", "0", "--json").json["checks"]) == 7
    mounted(here, "pmem0", "/srv/p")
    checks = run("verify", "--wait", "0", "--json").json["checks"]
    assert [c["name"] for c in checks[7:]] == ["filesystem", "mounted", "dax-file", "map-sync", "huge-pages"]


def test_verify_of_a_unit_whose_reservation_is_gone(run: Run, here: PmemMachine) -> None:
    run("mount", "--at-boot")
    reserve(here, "quiet")
    put(here, "/proc/self/mountinfo", "")
    done = run("verify", "--json")
    assert done.status == 0
    left = done.json["checks"][-1]
    assert (left["name"], left["status"]) == ("filesystem", "skipped")
    assert "nothing is reserved for it" in left["found"]
    assert left["hint"] == "sudo emupmem remove deletes it"


# Pure pieces -----------------------------------------------------------------------------------------------


def test_mountinfo_is_decoded() -> None:
    text = (
        "36 35 259:0 / /mnt/a\\040b\\134c rw,noatime master:1 shared:2 - ext4 /dev/pmem0 rw,dax=always\n"
        "torn line\n37 35 0:5 /sub /x rw - tmpfs none rw\n"
    )
    first, second = parse_mountinfo(text)
    assert (first.dir, first.number, first.dax) == ("/mnt/a b\\c", "259:0", True)
    assert first.options == ("rw", "noatime", "dax=always")
    assert (second.root, second.fs, second.dax) == ("/sub", "tmpfs", False)


def test_a_bind_mount_of_a_part_is_not_what_is_asked() -> None:
    device = Pmem("/dev/pmem0", "259:0", GIB, 4 * GIB, True)
    part = Mounted("259:0", "/sub", "/mnt/pmem0", "ext4", "/dev/pmem0", ("dax=always",))
    with pytest.raises(EmupmemError, match="is mounted at /mnt/pmem0 already"):
        decide.decide(device, MountRequest(), (part,), "", EMPTY, (6, 12))


def test_kernel_versions() -> None:
    assert release.kernel_version("6.12.5-1-amd64") == (6, 12)
    assert release.kernel_version("unknown") == (99, 0)


def test_blkid_words() -> None:
    assert parse_blkid(Completed(0, b"DEVNAME=/dev/x\nTYPE=xfs\nUSAGE=filesystem\n", b"")) == "xfs"
    assert parse_blkid(Completed(2, b"", b"")) == ""


def test_the_hint_for_another_file_system_makes_the_right_one(run: Run, here: PmemMachine) -> None:
    rebooted(run, here)
    holds(here, "TYPE=ext4\\n")
    run("apply", "--size", "1G", "--mount", "/mnt/my disk", "--fs", "xfs", "--yes")
    hint = "sudo emupmem mount /dev/pmem0 '/mnt/my disk' --fs xfs --force"
    assert f"{hint} makes xfs (and destroys what is there)" in run("verify").out
    assert "✓ filesystem   xfs" in run(*shlex.split(hint)[2:]).out
    assert any(c.startswith("mkfs.xfs") for c in calls(here))
    put(here, "/proc/self/mountinfo", "")
    mounted(here, "pmem0", "/srv/db", fs="ext4")
    assert "sudo emupmem umount /srv/db first; " in run("verify").out
