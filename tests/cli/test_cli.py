# SPDX-License-Identifier: Apache-2.0
"""The commands as people call them: what is printed where, and every exit status."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import emupmem
import emupmem.system.machine
from emupmem.model import GIB, Presence
from tests.cli.runner import Run
from tests.fake import LOG, RELEASE, STOCK, FakeMachine, menu, put, script


@pytest.fixture
def log(tmp_path: Path) -> str:
    path = tmp_path / "boot.log"
    path.write_text(LOG)
    return str(path)


# suggest -------------------------------------------------------------------------------------------


def test_suggest_from_a_log(run: Run, log: str) -> None:
    done = run("suggest", "--size", "16G", "--from", log)
    assert done.status == 0
    assert "memmap=16G!4G      leaves 3.7 GiB of RAM after 256 MiB of page structs" in done.out
    assert "chosen: 16G at 4G" in done.out
    assert "Next:  sudo emupmem apply --size 16G" in done.out
    assert "'memmap=16G!4G'" in done.out, "quoted, so that bash does not eat the !"
    assert "\x1b" not in done.out, "plain when piped"
    assert done.err == ""


def test_suggest_from_standard_input(run: Run) -> None:
    done = run("suggest", "--from", "-", "--json", stdin=LOG.encode())
    assert done.json["plan"]["memmap"] == "memmap=8G!4G"
    assert done.json["source"] == "standard input"


def test_suggest_shows_what_the_log_has_reserved_and_how_to_replace_it(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "boot.log"
    log.write_text(LOG.replace("ro quiet", "ro memmap=4G!4G quiet"))
    done = run("suggest", "--from", str(log), "--size", "2G")
    assert done.status == 0
    assert (
        "memmap=4G!4G is reserved already: this plan would take its place (apply --add keeps both)"
        in done.err
    )
    assert "Next:  sudo emupmem apply --size 2G --replace   (on that machine)" in done.out
    done = run("suggest", "--from", str(log), "--size", "4G")
    assert done.out.endswith("\nNothing to do: memmap=4G!4G is set up already\n")
    assert "Next:" not in done.out
    plan = json.loads(run("suggest", "--json", "--from", str(log), "--size", "2G").out)["plan"]
    assert "memmap=4G!4G is reserved already" in plan["warnings"][0]


def test_suggest_on_a_machine_with_a_reservation(run: Run, here: FakeMachine) -> None:
    assert run("apply", "--size", "1G", "--yes").status == 0
    done = run("suggest", "--size", "2G")
    assert "Next:  sudo emupmem apply --size 2G --replace\n" in done.out
    assert "Nothing to do: memmap=1G!4G" in run("suggest", "--size", "1G").out


def test_suggest_json_has_the_documented_shape(run: Run, log: str) -> None:
    found = run("suggest", "--size", "16G", "--from", log, "--json").json
    assert found["source"] == log
    assert found["ranges"][-1] == {"start": 4 * GIB, "size": 17 * GIB, "type": "usable"}
    plan = found["plan"]
    assert plan["memmap"] == "memmap=16G!4G"
    assert plan["reservations"] == [{"start": 4 * GIB, "size": 16 * GIB, "align": GIB, "numa_node": None}]
    assert isinstance(plan["ram_left"], int)
    assert plan["warnings"] == ["less than a quarter of the RAM stays for the system"]
    assert {"start", "size", "reason"} == set(found["rejected"][0])
    assert "error" not in found


def test_suggest_that_cannot_be_served_is_an_error_if_a_size_was_asked_for(run: Run, log: str) -> None:
    done = run("suggest", "--size", "99G", "--from", log, "--json")
    assert done.status == 1
    assert done.json["plan"] is None
    assert done.json["error"] == "no usable range has room for 99 GiB; the largest size that fits is 17G"
    assert done.json["ranges"]
    assert "emupmem: no usable range has room for 99 GiB" in done.err


def test_a_machine_without_room_is_an_answer(run: Run) -> None:
    small = LOG.replace("0x000000053fffffff", "0x0000000100000fff")
    done = run("suggest", "--from", "-", "--json", stdin=small.encode())
    assert done.status == 0
    assert done.json["plan"] is None
    assert "no room" in done.json["error"]
    assert "no room" in run("suggest", "--from", "-", stdin=small.encode()).err


def test_a_map_that_cannot_be_trusted(run: Run) -> None:
    torn = LOG[LOG.index("BIOS-e820: [mem 0x0000000000100000") :]
    done = run("suggest", "--from", "-", "--json", stdin=torn.encode())
    assert done.status == 1
    assert done.json["ranges"] == []
    assert done.json["plan"] is None
    assert done.json["error"]


def test_with_from_nothing_of_this_machine_leaks(run: Run, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **more: object) -> None:
        raise AssertionError("looked at this machine")

    for name in ("firmware_entries", "nodes", "regions", "run", "peek", "read"):
        monkeypatch.setattr(emupmem.system.machine.Machine, name, never)
    assert run("suggest", "--from", log).status == 0


def test_suggest_on_the_machine(run: Run, here: FakeMachine) -> None:
    put(here, "/sys/firmware/memmap/0/start", "0x0")
    done = run("suggest", "--source", "dmesg", "--size", "1G")
    assert done.status == 0
    assert "from dmesg" in done.out


def memmap(machine: FakeMachine, *entries: tuple[int, int, str]) -> None:
    for number, (start, end, kind) in enumerate(entries):
        for field, value in (("start", hex(start)), ("end", hex(end - 1)), ("type", kind)):
            put(machine, f"/sys/firmware/memmap/{number}/{field}", value + "\n")


def test_without_dmesg_sysfs_serves(run: Run, here: FakeMachine) -> None:
    script(
        here,
        "dmesg",
        "#!/bin/sh\necho 'dmesg: read kernel buffer failed: Operation not permitted' >&2\nexit 1\n",
    )
    memmap(here, (0, 3 * GIB, "System RAM"), (4 * GIB, 21 * GIB, "System RAM"))
    done = run("suggest", "--json")
    assert done.status == 0
    assert done.json["source"] == "/sys/firmware/memmap"
    assert run("suggest", "--source", "dmesg").status == 1


def test_where_sources_differ_only_what_all_call_ram_is_planned(run: Run, here: FakeMachine) -> None:
    memmap(
        here, (0, 3 * GIB, "System RAM"), (4 * GIB, 6 * GIB, "Reserved"), (6 * GIB, 21 * GIB, "System RAM")
    )
    found = run("suggest", "--size", "1G", "--json").json
    assert found["plan"]["memmap"] == "memmap=1G!6G"
    assert "/sys/firmware/memmap does not call 0x100000000-0x17fffffff RAM" in " ".join(
        found["plan"]["warnings"]
    )


def test_with_root_the_place_must_be_ram_in_iomem_or_already_ours(run: Run, here: FakeMachine) -> None:
    put(
        here,
        "/proc/iomem",
        "00000000-bfffffff : System RAM\n100000000-13fffffff : Reserved\n140000000-53fffffff : System RAM\n",
    )
    assert run("suggest", "--size", "1G", "--json").json["plan"]["memmap"] == "memmap=1G!5G"
    put(
        here,
        "/proc/iomem",
        "00000000-bfffffff : System RAM\n100000000-13fffffff : Persistent Memory (legacy)\n"
        "140000000-53fffffff : System RAM\n",
    )
    assert run("suggest", "--size", "1G", "--json").json["plan"]["memmap"] == "memmap=1G!4G"


def test_a_broken_source_is_said_and_another_serves(run: Run, here: FakeMachine) -> None:
    memmap(here, (0, 3 * GIB, "System RAM"), (2 * GIB, 21 * GIB, "System RAM"))
    put(here, "/proc/iomem", "rubbish\n")
    found = run("suggest", "--size", "1G", "--json").json
    assert found["plan"]["memmap"] == "memmap=1G!4G"
    said = " ".join(found["plan"]["warnings"])
    assert "/sys/firmware/memmap/0 and 1 overlap" in said
    assert "/proc/iomem is not understood" in said


def test_no_source_at_all(run: Run, here: FakeMachine) -> None:
    (here.root / "sbin/dmesg").unlink()
    done = run("suggest", "--json")
    assert done.status == 1
    assert done.json["ranges"] == []
    assert "the firmware's memory map cannot be read here" in done.err


# usage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["suggest", "--size", "16GB"], "size '16GB' is in decimal units"),
        (["suggest", "--size", "lots"], "size 'lots' is not a size"),
        (["suggest", "--offset", "-1"], "offset '-1' is not a size"),
        (["suggest", "--count", "x"], "--count"),
        (["suggest", "--source", "tea"], "--source"),
        (["suggest", "--wrong"], "--wrong"),
        (["apply"], "--size"),
        (["apply", "--size", "1G", "--add", "--replace"], "exclude each other"),
        (["apply", "--size", "1G", "--variable", "PATH"], "--variable"),
        (["apply", "--size", "1G", "--from", "x"], "--from plans for another machine"),
        (["verify", "--wait", "-1"], "--wait"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(run: Run, argv: list[str], words: str) -> None:
    done = run(*argv)
    assert done.status == 2
    lines = done.err.splitlines()
    assert lines[0].startswith("emupmem: ")
    assert words in lines[0]
    assert len(lines) == 2
    assert done.out == ""


def test_a_size_that_no_machine_can_have_is_an_error(run: Run, log: str) -> None:
    done = run("suggest", "--size", "3M", "--from", log)
    assert done.status == 2
    assert done.err.splitlines()[0] == "emupmem: size 3M is not a multiple of 2 MiB"


def test_a_missing_log(run: Run) -> None:
    done = run("suggest", "--from", "/nowhere/boot.log")
    assert done.status == 1
    assert "/nowhere/boot.log cannot be read: No such file or directory" in done.err


def test_help_and_version(run: Run) -> None:
    assert run("--version").out.startswith("emupmem ")
    top = run("--help").out
    assert "3 not as planned" in " ".join(top.split())
    assert "volatile" in top
    for command in ("suggest", "apply", "verify", "remove"):
        assert command in top
        assert "Exit status" in run(command, "--help").out


def test_a_traceback_only_with_debug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMUPMEM_DEBUG", raising=False)
    assert "Traceback" not in run("suggest", "--from", "/nowhere").err
    monkeypatch.setenv("EMUPMEM_DEBUG", "1")
    assert "Traceback" in run("suggest", "--from", "/nowhere").err


# apply, remove ----------------------------------------------------------------------------------------


def default(machine: FakeMachine) -> bytes:
    return (machine.root / "etc/default/grub").read_bytes()


def test_apply_shows_writes_and_tells_what_to_do(run: Run, here: FakeMachine) -> None:
    done = run("apply", "--size", "16G", "--yes")
    assert done.status == 0
    assert '-GRUB_CMDLINE_LINUX=""\n+GRUB_CMDLINE_LINUX="memmap=16G!4G"\n' in done.out
    assert "then: update-grub2" in done.out
    assert "✓ update-grub2 · 3 entries carry memmap=16G!4G" in done.out
    assert "Reboot, then:  sudo emupmem verify" in done.out
    assert "If the machine does not come up" in done.out
    assert "less than a quarter" in done.err
    again = run("apply", "--size", "16G", "--yes")
    assert again.status == 0
    assert "Already set up: memmap=16G!4G" in again.out
    assert "Reboot" in again.out


def test_apply_json(run: Run, here: FakeMachine) -> None:
    found = run("apply", "--size", "1G", "--yes", "--json").json
    assert set(found) == {
        *("changed", "would_change", "memmap", "diff", "backup", "reboot_required", "warnings")
    }
    assert found["changed"] is True
    assert found["memmap"] == "memmap=1G!4G"
    assert found["diff"].startswith("--- /etc/default/grub\n")
    assert found["backup"].startswith("/var/backups/emupmem/grub.")
    assert found["reboot_required"] is True
    again = run("apply", "--size", "1G", "--yes", "--json").json
    assert (again["changed"], again["diff"], again["backup"]) == (False, "", "")
    gone = run("remove", "--yes", "--json").json
    assert (gone["changed"], gone["memmap"], gone["reboot_required"]) == (True, "", False)


def test_dry_run_and_check_change_nothing(run: Run, here: FakeMachine) -> None:
    for option, status in (("--dry-run", 0), ("--check", 3)):
        done = run("apply", "--size", "1G", option)
        assert done.status == status
        assert "+GRUB_CMDLINE_LINUX" in done.out
        assert default(here) == STOCK
        assert not (here.root / "var/backups").exists()
    run("apply", "--size", "1G", "--yes")
    assert run("apply", "--size", "1G", "--check").status == 0
    assert run("remove", "--dry-run").status == 0
    assert default(here) != STOCK


def test_without_a_terminal_it_does_not_ask_and_does_not_write(run: Run, here: FakeMachine) -> None:
    done = run("apply", "--size", "1G")
    assert done.status == 1
    assert "emupmem: there is no terminal to ask on\n         --yes" in done.err
    assert default(here) == STOCK


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("yes\n", 0), ("\n", 1), ("n\n", 1), ("", 1)])
def test_it_asks_once(run: Run, here: FakeMachine, answer: str, status: int) -> None:
    done = run("apply", "--size", "1G", stdin=answer.encode(), terminal=True)
    assert done.err.count("Apply? [y/N]") == 1
    assert done.status == status
    assert (default(here) == STOCK) is bool(status)


def test_root_is_needed_and_said_first(run: Run, here: FakeMachine) -> None:
    here.root_user = False
    for argv in (["apply", "--size", "1G", "--yes"], ["remove", "--yes"]):
        done = run(*argv)
        assert done.status == 1
        assert "needs root" in done.err
        assert f"sudo emupmem {' '.join(argv)}" in done.err
    assert run("apply", "--size", "1G", "--dry-run").status == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("/run/systemd/container", "lxc", "this is a container (lxc)"),
        ("/.dockerenv", "", "this is a container (docker)"),
        ("/proc/version", "Linux version 5.15.90.1-microsoft-standard-WSL2 (x@y)", "this is WSL"),
        ("/proc/xen/capabilities", "control_d\n", "this is a Xen dom0"),
        ("/sys/hypervisor/guest_type", "PV\n", "this is a Xen PV guest"),
        ("/run/ostree-booted", "", "this is an ostree system"),
        ("/proc/cmdline", "root=/dev/vda1 ro", "GRUB did not start this kernel"),
        ("/boot/grub/grub.cfg", "insmod blscfg\nblscfg\n", "/boot/loader/entries here (BLS)"),
        (
            f"/boot/config-{RELEASE}",
            "CONFIG_BLK_DEV_PMEM=m\nCONFIG_FS_DAX=y\n",
            "without CONFIG_X86_PMEM_LEGACY",
        ),
        (
            f"/boot/config-{RELEASE}",
            "CONFIG_X86_PMEM_LEGACY=m\nCONFIG_FS_DAX=y\n",
            "without CONFIG_BLK_DEV_PMEM",
        ),
        (
            f"/boot/config-{RELEASE}",
            "CONFIG_X86_PMEM_LEGACY=m\nCONFIG_BLK_DEV_PMEM=m\n# CONFIG_FS_DAX is not set\n",
            "without CONFIG_FS_DAX",
        ),
        (f"/lib/modules/{RELEASE}/modules.dep", "kernel/drivers/x.ko:\n", "has no module nd_e820 installed"),
    ],
)
def test_machines_that_are_refused(
    run: Run, here: FakeMachine, name: str, text: str | bytes, words: str
) -> None:
    put(here, name, text)
    before = menu(here)
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 1
    assert words in done.err
    assert default(here) == STOCK
    assert menu(here) == before


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ("systemd-boot 252", "no boot entries that start this system from systemd-boot"),
        ("rEFInd 0.14.2", "rEFInd starts this machine"),
    ],
)
def test_a_grub_that_is_left_over_is_not_touched(
    run: Run, here: FakeMachine, loader: str, words: str
) -> None:
    name = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
    put(here, "/proc/cmdline", "root=UUID=0 ro")
    test_machines_that_are_refused(run, here, name, b"\x06\0\0\0" + loader.encode("utf-16-le"), words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/etc/default/grub", "there is no /etc/default/grub"),
        ("/boot/grub/grub.cfg", "there is no /boot/grub/grub.cfg"),
    ],
)
def test_machines_without_grub_are_refused(run: Run, here: FakeMachine, name: str, words: str) -> None:
    (here.root / name.lstrip("/")).unlink()
    done = run("apply", "--size", "1G", "--yes")
    assert done.status == 1
    assert words in done.err


def test_other_architectures_are_refused(
    run: Run, here: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "this machine is aarch64" in run("apply", "--size", "1G", "--yes").err


# another machine's tree ---------------------------------------------------------------------------------


def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "etc/default").mkdir(parents=True)
    (root / "etc/default/grub").write_bytes(STOCK)
    return root


def test_a_tree_is_edited_and_nothing_is_run(run: Run, log: str, tmp_path: Path) -> None:
    root = tree(tmp_path)
    done = run("apply", "--size", "1G", "--root", str(root), "--from", log, "--yes", "--json")
    assert done.status == 0, done.err
    assert b"memmap=1G!4G" in (root / "etc/default/grub").read_bytes()
    assert (root / done.json["backup"].lstrip("/")).read_bytes() == STOCK
    assert done.json["reboot_required"] is True
    assert "cannot determine which kernel boots by default" in done.err
    assert run("remove", "--root", str(root), "--yes").status == 0
    assert (root / "etc/default/grub").read_bytes() == STOCK


@pytest.mark.parametrize(
    ("files", "command"),
    [
        ({}, "update-grub2"),
        ({"etc/os-release": "ID=debian\n"}, "update-grub2"),
        (
            {"etc/os-release": 'ID="opensuse-leap"\nID_LIKE="suse opensuse"\n'},
            "grub2-mkconfig -o /boot/grub2/grub.cfg",
        ),
        ({"etc/os-release": "ID=arch\n"}, "grub-mkconfig -o /boot/grub/grub.cfg"),
        ({"etc/os-release": "ID=odd\n", "usr/sbin/update-grub": ""}, "update-grub"),
        ({"etc/os-release": "ID=linuxmint\nID_LIKE=ubuntu\n"}, "update-grub2"),
        ({"etc/os-release": "ID=alpine\n"}, "grub-mkconfig -o /boot/grub/grub.cfg"),
        ({"etc/os-release": "ID=azurelinux\n"}, "grub2-mkconfig -o /boot/grub2/grub.cfg"),
    ],
)
def test_a_tree_tells_what_to_run(
    run: Run, log: str, tmp_path: Path, files: dict[str, str], command: str
) -> None:
    root = tree(tmp_path)
    for name, text in (files | ({"boot/grub2/grub.cfg": ""} if "grub2" in command else {})).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    done = run("apply", "--size", "1G", "--root", str(root), "--from", log, "--yes")
    assert f"On that machine: {command}, reboot, emupmem verify" in done.out, done.err


def test_an_absolute_link_in_a_tree_stays_in_the_tree(run: Run, log: str, tmp_path: Path) -> None:
    root = tree(tmp_path)
    outside = tmp_path / "outside"
    outside.write_bytes(STOCK)
    (root / str(outside).lstrip("/")).parent.mkdir(parents=True)
    (root / "etc/default/grub").rename(root / str(outside).lstrip("/"))
    (root / "etc/default/grub").symlink_to(outside)
    assert run("apply", "--size", "1G", "--root", str(root), "--from", log, "--yes").status == 0
    assert outside.read_bytes() == STOCK
    assert b"memmap=1G!4G" in (root / str(outside).lstrip("/")).read_bytes()


def test_a_tree_needs_a_log_and_a_log_a_tree(run: Run, log: str, tmp_path: Path) -> None:
    root = tree(tmp_path)
    assert run("apply", "--size", "1G", "--root", str(root)).status == 2
    assert run("apply", "--size", "1G", "--root", str(root / "nothing"), "--from", log).status == 1
    (root / "boot/grub").mkdir(parents=True)
    (root / "boot/grub/grub.cfg").write_text("blscfg\n")
    done = run("apply", "--size", "1G", "--root", str(root), "--from", log, "--yes")
    assert done.status == 1
    assert "there are no boot entries that start this system" in done.err


# verify -----------------------------------------------------------------------------------------------


def test_verify_of_nothing_is_as_planned_unless_required(run: Run, here: FakeMachine) -> None:
    done = run("verify", "--json")
    assert done.status == 0
    assert done.json["ok"] is True
    assert done.json["devices"] == []
    assert {"name", "status", "expected", "found", "hint"} == set(done.json["checks"][0])
    assert run("verify").out.endswith("Nothing is reserved.\n")
    assert run("verify", "--require").status == 3


def test_verify_does_not_say_of_the_next_start_what_it_has_not_seen(run: Run, here: FakeMachine) -> None:
    (here.root / "etc/default/grub").unlink()
    (here.root / "etc/default/grub").mkdir()
    done = run("verify")
    assert done.status == 0
    seen = "Nothing is reserved in this boot; what the next start reserves could not be seen.\n"
    assert done.out.endswith(seen), done
    assert "not seen: configured" in done.err
    assert seen.rstrip(".\n").lower() in " ".join(run("doctor").out.lower().split())


def test_verify_before_the_reboot_is_pending(run: Run, here: FakeMachine) -> None:
    run("apply", "--size", "1G", "--yes")
    done = run("verify", "--json")
    assert done.status == 3
    assert (done.json["ok"], done.json["pending"]) == (False, True)
    assert run("verify").out.endswith("Reboot pending.\n")


def reboot(machine: FakeMachine, size: int = GIB) -> None:
    """Make the folder look as after the reboot, device and all."""
    put(
        machine,
        "/proc/cmdline",
        f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID=0 ro memmap=1G!4G quiet splash\n",
    )
    user = [line.replace("BIOS-e820", "user") for line in LOG.splitlines() if "BIOS-e820" in line]
    user[-1:] = [
        "user: [mem 0x0000000100000000-0x000000013fffffff] persistent (type 12)",
        "user: [mem 0x0000000140000000-0x000000053fffffff] usable",
    ]
    put(machine, "/log", LOG + "\n".join(["user-defined physical RAM map:", *user, "DMI: none", ""]))
    put(
        machine,
        "/proc/iomem",
        "00000000-bfffffff : System RAM\n100000000-13fffffff : Persistent Memory (legacy)\n",
    )
    here = "/sys/devices/platform/e820_pmem/ndbus0"
    put(machine, f"{here}/provider", "e820\n")
    for name, value in (("size", size), ("resource", "0x100000000"), ("numa_node", 0)):
        put(machine, f"{here}/region0/{name}", f"{value}\n")
    put(machine, f"{here}/region0/namespace0.0/mode", "memory\n")
    put(machine, f"{here}/region0/namespace0.0/block/pmem0/size", f"{size // 512}\n")
    put(machine, f"{here}/region0/namespace0.0/block/pmem0/queue/dax", "1\n")
    for link, target in (
        ("/sys/bus/nd/devices/region0", f"{here}/region0"),
        ("/sys/class/block/pmem0", f"{here}/region0/namespace0.0/block/pmem0"),
    ):
        path = machine.root / link.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def test_verify_after_the_reboot(run: Run, here: FakeMachine) -> None:
    run("apply", "--size", "1G", "--yes")
    reboot(here)
    done = run("verify", "--json")
    assert [c["status"] for c in done.json["checks"]] == ["ok"] * 7, done.out
    assert done.status == 0
    assert done.json["devices"] == [{"dev": "/dev/pmem0", "start": 4 * GIB, "size": GIB}]
    assert "✓ device       /dev/pmem0, 1 GiB, node 0 · emulated, volatile" in run("verify").out


def test_verify_tells_the_rung_that_broke(run: Run, here: FakeMachine) -> None:
    run("apply", "--size", "1G", "--yes")
    reboot(here)
    (here.root / "sys/bus/nd/devices/region0").unlink()
    put(here, "/etc/modprobe.d/x.conf", "# no pmem\n\nblacklist nd_e820\n")
    done = run("verify", "--wait", "0.2")
    assert done.status == 3
    assert (
        "✗ device       no device; the driver nd_e820 is not loaded (blacklisted in /etc/modprobe.d/x.conf:3)"
        in done.out
    )
    assert "→ remove that line, or: sudo modprobe nd_e820" in done.out
    assert "- dax          explained by device" in done.out


def test_verify_waits_for_the_device(run: Run, here: FakeMachine) -> None:
    import threading

    run("apply", "--size", "1G", "--yes")
    reboot(here)
    link = here.root / "sys/bus/nd/devices/region0"
    target = link.readlink()
    link.unlink()
    threading.Timer(0.5, lambda: link.symlink_to(target)).start()
    assert run("verify", "--wait", "600").status == 0


# Odd corners -------------------------------------------------------------------------------------------


def test_two_menus_are_refused(run: Run, here: FakeMachine) -> None:
    put(here, "/boot/grub2/grub.cfg", menu(here))
    done = run("apply", "--size", "1G", "--dry-run")
    assert done.status == 1
    assert "two boot menus, /boot/grub/grub.cfg and /boot/grub2/grub.cfg" in done.err
    (here.root / "boot/grub2/grub.cfg").unlink()
    (here.root / "boot/grub2").rmdir()
    (here.root / "boot/grub2").symlink_to("grub")
    assert run("apply", "--size", "1G", "--dry-run").status == 0


def test_huge_pages_made_since_the_boot_count(run: Run, here: FakeMachine) -> None:
    put(here, "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "3\n")
    put(here, "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "512\n")
    without = run("suggest", "--size", "8G", "--from", str(here.root / "log"), "--json").json["plan"][
        "ram_left"
    ]
    left = run("suggest", "--size", "8G", "--json").json["plan"]["ram_left"]
    assert without - left == 4 * GIB


def test_a_log_from_a_pipe(run: Run) -> None:

    reader, writer = os.pipe()
    os.write(writer, LOG.encode())
    os.close(writer)
    done = run("suggest", "--json", "--from", f"/dev/fd/{reader}")
    os.close(reader)
    assert done.json["plan"]["memmap"] == "memmap=8G!4G"


def test_ctrl_c_is_an_error_with_a_line(run: Run, monkeypatch: pytest.MonkeyPatch, log: str) -> None:
    from emupmem.planner import plan as planner_plan

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planner_plan, "plan", interrupted)
    done = run("suggest", "--from", log)
    assert done.status == 1
    assert done.err.startswith("emupmem: stopped\n")


def test_a_commented_bls_setting_is_no_obstacle(run: Run, here: FakeMachine) -> None:
    put(here, "/etc/default/grub", b"#GRUB_ENABLE_BLSCFG=true\n" + STOCK)
    assert run("apply", "--size", "1G", "--dry-run").status == 0
    put(here, "/etc/default/grub", b'GRUB_ENABLE_BLSCFG="true"\n' + STOCK)
    assert "BLS" in run("apply", "--size", "1G", "--dry-run").err


def test_a_module_of_the_running_kernel_says_nothing_of_another(here: FakeMachine) -> None:
    from emupmem.boot.kernel import module_states
    from emupmem.kernel.cmdline import parse_command_line

    (here.root / "sys/module/nd_pmem").mkdir(parents=True)
    put(here, "/lib/modules/6.99/modules.dep", "")
    line = parse_command_line("")
    assert {m.name: m.presence for m in module_states(here, RELEASE, line)}["nd_pmem"] is Presence.LOADED
    assert {m.name: m.presence for m in module_states(here, "6.99", line)}["nd_pmem"] is Presence.MISSING


def test_verify_survives_a_rotten_sysfs(run: Run, here: FakeMachine) -> None:
    put(here, "/sys/firmware/memmap/0/start", "rubbish")
    assert run("verify").status == 0


def test_verify_sees_a_torn_menu(run: Run, here: FakeMachine) -> None:
    text = menu(here)
    put(here, "/boot/grub/grub.cfg", text[: text.rindex("### END")])
    done = run("verify", "--json")
    assert done.status == 3
    assert done.json["checks"][1]["status"] == "fail"
    assert "not written to its end" in done.json["checks"][1]["found"]


@pytest.mark.parametrize("argv", [(), ("namespaces",)])
def test_without_a_command_the_help_is_shown_as_it_is(argv: tuple[str, ...], run: Run) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("Usage: ")
    assert "\nCommands:\n" in err


def test_only_the_command_that_was_typed_is_built() -> None:
    from emupmem.cli import main as cli_main

    def names(*words: str) -> list[str]:
        program = cli_main.program_for(words)
        groups = [g.name or "" for g in program.registered_groups]
        return groups + [c.name or "" for c in program.registered_commands]

    everything = names()
    assert set(everything) == set(cli_main.COMMANDS)
    assert {"verify", "boot-mount", "namespaces"} <= set(everything)
    for name in everything:
        assert names("--debug", name, "--json") == [name]
    for words in (("--help",), ("verfy",), ("--version",)):
        assert names(*words) == everything, "help and corrections know them all"


def test_help_lists_what_the_commands_say_of_themselves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from emupmem.cli import main as cli_main

    listed = run("--help").out
    monkeypatch.setattr(cli_main.Place, "list_in", cli_main.Place.add_to)
    assert run("--help").out == listed
    assert not [line for line in listed.splitlines() if "boot-" in line]


def test_what_an_error_quotes_cannot_command_the_terminal(run: Run, tmp_path: Path) -> None:
    """A terminal obeys escapes: a foreign file must not clear the screen, or answer for the user."""
    (tmp_path / "etc/default").mkdir(parents=True)
    (tmp_path / "etc/default/grub").write_bytes(b"\x1b]0;owned\x07\xc2\x9b2J\nexit 3\n")
    (tmp_path / "log").write_text(LOG)
    done = run("apply", "--size", "1G", "--root", str(tmp_path), "--from", str(tmp_path / "log"), "--dry-run")
    assert done.status == 1
    assert "\\x07\\x9b2J: not found" in done.err
    assert not [c for c in done.err if not c.isprintable() and c != "\n"]
