# SPDX-License-Identifier: Apache-2.0
"""The archive: what is in it, what is not, what another machine makes of it, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import emupmem
import emupmem.system.machine
import emupmem.system.streams
from emupmem.boot import prepare
from emupmem.doctor import finding
from emupmem.kernel.cmdline import parse_command_line
from emupmem.model import GIB, EmupmemError, NodeRange, Request
from emupmem.parser.bootlog import kernel_release, parse_boot_log
from emupmem.parser.sources import parse_iomem
from emupmem.planner import survey
from emupmem.planner.plan import plan
from emupmem.report import archive as report_archive
from emupmem.report import collected, gather
from emupmem.report.archive import Archive, pack, unpack
from emupmem.report.collected import Collected
from emupmem.report.masking import Masker
from emupmem.system.machine import Machine
from tests import examples
from tests.boot import test_loader
from tests.cli.runner import Run
from tests.cli.test_cli import reboot
from tests.fake import LOG, RELEASE, FakeMachine, build, put, running, script

UUID = "3f1b7d52-9c0e-4a5d-8a77-0123456789ab"
SECRETS = {
    "host": "thinkbox",
    "domain": "corp.example.net",
    "uuid": UUID,
    "fat": "A1B2-C3D4",
    "partuuid": "9f8e7d6c-02",
    "mac": "52:54:00:ab:cd:ef",
    "ipv4": "192.168.17.23",
    "ipv6": "fd00:1234::17",
    "user": "mallory",
    "serial": "S21HNX0H123456",
    "usb": "0123ABCD4567",
    "hash": "grub.pbkdf2.sha512.10000.ABCDEF0123",
    "plain": "hunter22",
    "boss": "gatekeeper",
    "machine-id": "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    "dmi": "ACME Thunder 9000",
    "disk": "ata-ACME_SSD_77ZZ88YY",
}
EXTRA_LOG = f"""\
systemd[1]: Hostname set to <{SECRETS["host"]}.{SECRETS["domain"]}>.
DMI: {SECRETS["dmi"]}/Board, BIOS 1.2 01/01/2024
DMI: Memory slots populated: 2/4
usb 1-1: SerialNumber: {SECRETS["usb"]}
usb 1-2: New USB device strings: Mfr=1, Product=2, SerialNumber=3
nvme nvme0: serial number: {SECRETS["serial"]}
e1000e 0000:00:1f.6 eth0: (PCI Express:2.5GT/s:Width x1) {SECRETS["mac"]}
IP-Config: device=eth0, ipaddr={SECRETS["ipv4"]}, mask=255.255.255.0, gw={SECRETS["ipv6"]}
EXT4-fs (dm-1): mounted filesystem {UUID} r/w with ordered data mode
systemd[1]: Mounting /home/{SECRETS["user"]}/data...
sd 0:0:0:0: [sda] Attached SCSI disk
"""
CMDLINE = (
    f"BOOT_IMAGE=/boot/vmlinuz-{RELEASE} root=UUID={UUID} ro quiet resume=/dev/mapper/{SECRETS['host']}--vg-swap "
    f"resume=PARTUUID={SECRETS['partuuid']} ip={SECRETS['ipv4']}::10.1.1.1:255.255.255.0:{SECRETS['host']}:eth0:off "
    f"systemd.machine_id={SECRETS['machine-id']} rd.password={SECRETS['plain']} memmap=1G!4G crashkernel=256M"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine with a secret in every place."""
    defaults = f"""\
GRUB_DEFAULT=0
GRUB_CMDLINE_LINUX_DEFAULT="quiet resume=UUID={UUID}"
GRUB_CMDLINE_LINUX="cryptdevice=/dev/disk/by-id/{SECRETS["disk"]}:root"
"""
    machine = build(tmp_path / "machine", defaults.encode())
    menu = machine.root / "boot/grub/grub.cfg"
    menu.write_text(
        menu.read_text()
        + f'set superusers="{SECRETS["boss"]}"\n'
        + f"password_pbkdf2 {SECRETS['boss']} {SECRETS['hash']}\npassword guest {SECRETS['plain']}\n"
        + f"search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt2 {SECRETS['fat']}\n"
        + f"menuentry 'Old' --users {SECRETS['boss']} $menuentry_id_option 'gnulinux-simple-{SECRETS['fat']}' {{\n}}\n"
    )
    put(machine, "/log", LOG.replace("builder@example", f"{SECRETS['user']}@{SECRETS['host']}") + EXTRA_LOG)
    put(machine, "/proc/version", LOG.partition("\n")[0].replace("builder@example", f"x@{SECRETS['host']}"))
    put(machine, "/proc/cmdline", CMDLINE + "\n")
    put(machine, "/proc/sys/kernel/hostname", SECRETS["host"] + "\n")
    put(machine, "/proc/sys/kernel/domainname", SECRETS["domain"] + "\n")
    put(
        machine,
        "/etc/passwd",
        f"{SECRETS['user']}:x:1000:1000::/home/{SECRETS['user']}:/bin/sh\nroot:x:0:0::/root:\n",
    )
    put(machine, "/etc/fstab", f"UUID={UUID} / ext4 defaults 0 1\n/dev/pmem0 /mnt ext4 dax,nofail 0 0\n")
    put(
        machine,
        "/proc/self/mountinfo",
        "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 30 0:99 / /nfs rw - nfs fileserver:/x rw\n",
    )
    put(machine, "/etc/modprobe.d/a.conf", "# mine\noptions wifi key=abcdef\nblacklist nd_pmem\n")
    put(
        machine,
        f"/lib/modules/{RELEASE}/modules.dep",
        "kernel/nd_e820.ko:\nkernel/fs/secretfs.ko:\nkernel/nd_pmem.ko:\n",
    )
    put(machine, "/proc/iomem", "00000000-bfffffff : System RAM\n100000000-53fffffff : System RAM\n")
    put(machine, "/proc/modules", "nd_pmem 24576 0 - Live 0xffffffffc0000000\n")
    for number, (start, end) in enumerate((("0x0", "0xbfffffff"), ("0x100000000", "0x53fffffff"))):
        for key, value in (("start", start), ("end", end), ("type", "System RAM")):
            put(machine, f"/sys/firmware/memmap/{number}/{key}", value + "\n")
    running(monkeypatch.setattr, machine)
    return machine


def whole(archive: Archive) -> str:
    data = gzip.decompress(pack(archive)).decode("utf-8", "replace")
    return data.replace("\\u", " ")


# Writing ---------------------------------------------------------------------------------------------


def test_no_secret_survives(here: FakeMachine) -> None:
    made = gather.gather_machine(here)
    text = whole(made.archive).lower()
    left = {kind: s for kind, s in SECRETS.items() if s.lower() in text}
    assert left == {}
    for other in ("fileserver", "abcdef", "secretfs", "thinkbox", "sda1 / ext4 defaults"):
        assert other not in text
    kinds = {"uuid", "mac", "ipv4", "ipv6", "host", "user", "serial", "password", "dmi", "id", "builder"}
    assert kinds <= set(made.values)


def test_the_same_value_has_the_same_mask_everywhere(here: FakeMachine) -> None:
    archive = gather.gather_machine(here).archive
    defaults = archive.members["tree/etc/default/grub"].decode()
    log = archive.members["commands/dmesg"].decode()
    cmdline = archive.members["tree/proc/cmdline"].decode()
    uuid = re.search(r"resume=UUID=([0-9a-f-]{36})", defaults)
    assert uuid is not None
    assert f"root=UUID={uuid[1]} ro" in cmdline
    assert f"mounted filesystem {uuid[1]} " in log
    assert uuid[1] in json.dumps(archive.facts["sourced"])


def test_what_planning_needs_stays(here: FakeMachine) -> None:
    archive = gather.gather_machine(here).archive
    line = parse_command_line(archive.members["tree/proc/cmdline"].decode())
    assert [i.text for i in line.reservations] == ["1G!4G"]
    assert line.crashkernel == ("256M",)
    assert parse_boot_log(archive.members["commands/dmesg"]).firmware == parse_boot_log(LOG).firmware
    machine = Collected(archive)
    assert machine.firmware_entries() == here.firmware_entries()
    assert machine.peek("/etc/modprobe.d/a.conf").splitlines()[2:] == ["blacklist nd_pmem"], (
        "the line number stays"
    )
    assert machine.peek("/proc/modules") == "nd_pmem"


def test_the_archive_is_deterministic(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "room", lambda folder: 1 << 30)  # other programs write to this disk
    first, second = (pack(gather.gather_machine(here).archive) for _ in range(2))
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        names = tar.getnames()
        infos = tar.getmembers()
    assert names[0] == "emupmem.json"
    assert names[1:] == sorted(names[1:])
    assert {(i.mode, i.mtime, i.uid, i.gid, i.uname) for i in infos} == {(0o600, 0, 0, 0, "")}


def test_without_root_it_says_what_is_missing(
    here: FakeMachine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.root_user = False
    real = here.read

    def closed(name: str) -> bytes | None:
        if name.endswith("grub.cfg"):
            raise EmupmemError(f"{name} cannot be read: Permission denied", "run it with sudo")
        return real(name)

    monkeypatch.setattr(here, "read", closed)
    file = str(tmp_path / "a.tar.gz")
    done = run("collect", file)
    assert done.status == 0
    assert "! /boot/grub/grub.cfg could not be read" in done.err
    assert "! not root" in done.err
    machine = Collected(unpack(io.BytesIO(Path(file).read_bytes()), file))
    assert machine.exists("/boot/grub/grub.cfg")
    with pytest.raises(EmupmemError, match="could not be read where the archive was made"):
        machine.read("/boot/grub/grub.cfg")
    found = {
        f.name: f for f in collected.doctor_from(unpack(io.BytesIO(Path(file).read_bytes()), file), file)
    }
    assert found["kernel"].status == "note"


def test_a_journal_where_dmesg_has_lost_the_map(here: FakeMachine) -> None:
    put(here, "/journal", (here.root / "log").read_bytes())
    put(here, "/log", "late line\n")
    script(here, "journalctl", f"#!/bin/sh\ncat '{here.root}/journal'\n")
    archive = gather.gather_machine(here).archive
    assert parse_boot_log(archive.members["commands/journalctl"]).firmware is not None
    assert collected.plan_from(archive, "a").source.startswith("a: journal")


# The command --------------------------------------------------------------------------------------


def test_collect_writes_one_private_file(here: FakeMachine, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.tar.gz"
    done = run("collect", str(file), "--json")
    assert done.status == 0
    assert done.json["written"] is True
    assert set(done.json) == {"file", "written", "files", "masked", "unreadable"}
    assert all(set(f) == {"name", "size", "masked"} for f in done.json["files"])
    assert file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.tar.gz"]


def test_list_writes_nothing_and_counts(here: FakeMachine, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.tar.gz"
    done = run("collect", "--list", str(file))
    assert done.status == 0
    assert not file.exists()
    assert re.search(r"tree/proc/cmdline  \(masked: .*1 × uuid", done.out) or "× uuid" in done.out
    assert "would be written" in done.out
    found = run("collect", "--list", str(file), "--json").json
    assert found["written"] is False
    assert found["masked"]["password"] >= 2


def test_collect_never_goes_over_a_file(here: FakeMachine, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.tar.gz"
    file.write_text("mine")
    done = run("collect", str(file), "--json")
    assert done.status == 1
    assert done.json["error"] == f"{file} is there already; --force replaces it"
    assert file.read_text() == "mine"
    assert run("collect", str(file), "--force").status == 0
    assert file.read_bytes()[:2] == b"\x1f\x8b"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        (".", 1, "is a folder"),
        ("link", 1, "is not a regular file"),
        (
            "missing/a.tar.gz",
            1,
            "cannot be written: No such file or directory\n         the folder is not there: make it",
        ),
        ("-", 2, "not to standard output"),
    ],
)
def test_places_that_are_refused(
    here: FakeMachine, run: Run, tmp_path: Path, name: str, status: int, words: str
) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    for extra in ((), ("--force",)):
        done = run("collect", name if name == "-" else f"{tmp_path}/{name}", *extra)
        assert done.status == status
        assert words in done.err
    assert (tmp_path / "target").read_text() == "mine"


# On another machine ----------------------------------------------------------------------------------


def test_by_its_type_an_archive_cannot_be_written_to() -> None:
    assert not issubclass(Collected, Machine)
    assert not {"path", "root", "run"} & set(dir(Collected))


@pytest.fixture
def elsewhere(
    here: FakeMachine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Any, Any]:
    """The archive's name, the plan and the doctor's word there; from now on this machine must not be looked at."""
    file = str(tmp_path / "a.tar.gz")
    run("collect", file)
    planned = run("suggest", "--json").json
    findings = run("doctor", "--json").json

    def never(*args: object, **more: object) -> None:
        raise AssertionError("looked at this machine")

    monkeypatch.undo()
    for name in (
        "run",
        "find",
        "names",
        "peek",
        "read",
        "exists",
        "real",
        "room",
        "modified",
        "nodes",
        "regions",
    ):
        monkeypatch.setattr(emupmem.system.machine.Machine, name, never)
    for name in ("platform.machine", "platform.release", "subprocess.Popen", "os.statvfs", "os.geteuid"):
        monkeypatch.setattr(name, never)
    return file, planned, findings


def test_the_plan_is_the_same_elsewhere_and_nothing_leaks(elsewhere: tuple[str, Any, Any], run: Run) -> None:
    file, planned, _ = elsewhere
    done = run("suggest", "--from", file, "--json")
    assert done.status == 0, done.err
    found = done.json
    assert found.pop("source") == f"{file}: {planned.pop('source')}"
    assert found == planned


def test_the_doctor_says_the_same_elsewhere_and_nothing_leaks(
    elsewhere: tuple[str, Any, Any], run: Run
) -> None:
    file, _, findings = elsewhere
    done = run("doctor", "--from", file, "--json")
    there = {f["name"]: (f["status"], f["fix"]) for f in findings["findings"]}
    found = {f["name"]: (f["status"], f["fix"]) for f in done.json["findings"]}
    assert found == there
    assert done.json["ok"] is findings["ok"]


def test_suggest_from_standard_input(here: FakeMachine, run: Run, tmp_path: Path) -> None:
    run("collect", str(tmp_path / "a"))
    done = run("suggest", "--from", "-", "--json", stdin=(tmp_path / "a").read_bytes())
    assert done.json["source"].startswith("standard input: dmesg")
    assert done.json["plan"]["memmap"] == "memmap=8G!4G"


def test_a_reserved_machine_and_its_devices(here: FakeMachine, tmp_path: Path) -> None:
    put(here, "/etc/default/grub", 'GRUB_CMDLINE_LINUX="memmap=1G!4G"\n')
    assert here.output("update-grub2") is not None
    reboot(here)
    archive = unpack(io.BytesIO(pack(gather.gather_machine(here).archive)), "a")
    found = {f.name: f for f in collected.doctor_from(archive, "a")}
    assert found["ladder"].evidence == "/dev/pmem0 · emulated, volatile"
    assert archive.members["tree/sys/bus/nd/devices/region0/resource"] == b"0x100000000"


def test_nodes_and_vetoes_travel(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "nodes", lambda: (NodeRange(0, 0, 12 * GIB), NodeRange(1, 12 * GIB, 21 * GIB)))
    put(here, "/proc/iomem", "00000000-bfffffff : System RAM\n180000000-53fffffff : System RAM\n")
    archive = unpack(io.BytesIO(pack(gather.gather_machine(here).archive)), "a")
    there, found = survey.of_machine(here), collected.plan_from(archive, "a")
    assert found.situation.nodes == here.nodes()
    assert found.situation.vetoes == there.situation.vetoes
    asked = Request(4 * GIB, numa_node=1)
    assert plan(found.situation, asked).reservations == plan(there.situation, asked).reservations


def test_an_archive_never_reaches_a_shell(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = gather.gather_machine(here).archive
    monkeypatch.setattr("emupmem.editor.shell.run_sh", lambda *a, **k: pytest.fail("sh was started"))
    members = {**archive.members, "tree/etc/default/grub": b"kill -9 -1\n"}
    collected.plan_from(Archive(archive.facts, members), "a")
    collected.doctor_from(Archive(archive.facts, members), "a")


def test_programs_and_files_that_are_not_in_it(here: FakeMachine) -> None:
    machine = Collected(gather.gather_machine(here).archive)
    assert machine.output("reboot") is None
    assert machine.read("/etc/shadow") is None
    assert machine.names("/root") == []
    assert not machine.exists("/etc/passwd")
    assert machine.file_size("/etc/default/grub") is None, "what is not looked up in memory is not there"


# Hostile archives ---------------------------------------------------------------------------------


FACTS = {
    "format": 1,
    "root": True,
    "architecture": "x86_64",
    "there": [],
    "modified": {},
    "banners": {},
    "nodes": [],
    "regions": [],
    "room": {},
    "tools": {},
    "outputs": {},
    "sourced": {"values": [], "complaints": [], "failed": ""},
    "unreadable": [],
}


def tar_of(*members: tuple[str | tarfile.TarInfo, bytes], facts: Any = FACTS) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        first = [("emupmem.json", json.dumps(facts).encode())] if facts is not None else []
        for name, data in (*first, *members):
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo("tree/etc/default/grub")
    info.type, info.linkname = kind, target
    return info


def test_the_smallest_archive_is_read() -> None:
    archive = unpack(io.BytesIO(tar_of(("tree/proc/cmdline", b"ro"))), "a")
    assert archive.members == {"tree/proc/cmdline": b"ro"}


def refused(data: bytes) -> str:
    with pytest.raises(EmupmemError) as caught:
        unpack(io.BytesIO(data), "a.tar.gz")
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/etc/passwd", "leads elsewhere"),
        ("tree/../../etc/passwd", "leads elsewhere"),
        ("tree//etc", "leads elsewhere"),
        ("tree/./etc", "leads elsewhere"),
        ("other/file", "does not belong"),
        ("tree", "does not belong"),
        ("doctor.json/x", "does not belong"),
        ("emupmem.json/x", "does not belong"),
        ("tree/sys/firmware/memmap/\u00b2/start", "does not belong"),
        ("tree/" + "x" * 300, "does not belong"),
        ("\x1b[31mred", "does not belong"),
    ],
)
def test_names_that_are_refused(name: str, words: str) -> None:
    message = refused(tar_of((name, b"x")))
    assert words in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE],
)
def test_links_devices_and_folders_are_refused(kind: bytes) -> None:
    assert "is not a regular file" in refused(tar_of((special(kind), b"")))


def test_what_is_there_twice_is_refused() -> None:
    assert "is in it twice" in refused(tar_of(("tree/a", b"1"), ("tree/a", b"2")))
    assert "is in it twice" in refused(tar_of(("tree/a", b"1"), ("emupmem.json", b"{}")))


def test_sizes_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "larger than 16 MiB" in refused(tar_of(("tree/a", bytes(report_archive.LARGEST_FILE + 1))))
    monkeypatch.setattr(report_archive, "MOST_MEMBERS", 3)
    assert "more than 3 members" in refused(tar_of(*((f"tree/{n}", b"") for n in range(4))))


def test_a_bomb_is_refused_before_it_fills_the_memory() -> None:
    bomb = io.BytesIO()
    with tarfile.open(fileobj=bomb, mode="w:gz") as tar:
        marker = json.dumps(FACTS).encode()
        info = tarfile.TarInfo("emupmem.json")
        info.size = len(marker)
        tar.addfile(info, io.BytesIO(marker))
    whole_tar = gzip.decompress(bomb.getvalue()).rstrip(b"\0")
    whole_tar += bytes(-len(whole_tar) % 512)
    zeros = gzip.compress(bytes(report_archive.LARGEST_ARCHIVE + (1 << 20)), compresslevel=1)
    data = gzip.compress(whole_tar) + zeros
    assert len(data) < 2 << 20
    assert "larger than 128 MiB once unpacked" in refused(data)


def with_header(name: str, kind: bytes, size: int, content: bytes, times: int = 1) -> bytes:
    """A small archive with a header of that kind, or many, before its last member; no tool would write it."""
    first, last = (
        gzip.decompress(tar_of(*m, facts=f)).rstrip(b"\0")
        for m, f in (((), FACTS), ([("tree/a", b"")], None))
    )
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    odd = header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    parts = (first + bytes(-len(first) % 512), odd * times, last + bytes(-len(last) % 512), bytes(1024))
    return gzip.compress(b"".join(parts), 1)


@pytest.mark.parametrize(
    ("kind", "content"), [(b"L", b"a\0"), (b"x", b"10 a=bcde\n"), (b"g", b"10 a=bcde\n")]
)
def test_a_chain_of_headers_is_refused_and_no_crash(kind: bytes, content: bytes) -> None:
    assert refused(with_header("tree/b", kind, len(content), content, times=2000))


def test_a_header_of_digits_does_not_take_hours() -> None:
    """The pattern that CVE-2024-6232 is about takes the square of the length."""
    assert "damaged" in refused(with_header("tree/b", b"x", 400_000, b"1" * 400_000))


def test_a_broken_header_does_not_end_the_archive_in_silence() -> None:
    assert "a header is not understood" in refused(with_header("tree/b", b"x", 10, b"0 a=bcdef\n"))
    good = gzip.decompress(tar_of(("tree/a", b"text")))
    at = good.index(b"tree/a")
    for broken in (good[:at] + b"T" + good[at + 1 :], good[: at + 512], good[: at + 1024]):
        assert "damaged" in refused(gzip.compress(broken))


def test_long_and_foreign_names_are_read() -> None:
    names = ["tree/" + "n" * 120, "tree/" + "d" * 90 + "/" + "f" * 90, "tree/boot/Käse", "tree/boot/\udcff"]
    members = {n: n.encode("utf-8", "surrogateescape") for n in names}
    assert unpack(io.BytesIO(pack(Archive(FACTS, members))), "a").members == members


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (None, "no archive of emupmem collect"),
        ([], "no archive of emupmem collect"),
        ({"format": "1"}, "no archive of emupmem collect"),
        ({"format": 2}, "archive format 2; this emupmem reads format 1"),
        ({"format": 1}, "not as emupmem writes it: root"),
        ({**FACTS, "nodes": [{"node": 0}]}, "a value"),
        ({**FACTS, "nodes": [{"node": "0", "start": 0, "end": 1}]}, "a value"),
        ({**FACTS, "regions": [{"name": "region0"}]}, "a value"),
        ({**FACTS, "room": {"/": "much"}}, "a value"),
        ({**FACTS, "there": [1]}, "a value"),
        ({**FACTS, "modified": {"/boot/grub/grub.cfg": "late"}}, "modified"),
        ({**FACTS, "outputs": {"dmesg": {}}}, "a value"),
        ({**FACTS, "sourced": {"values": [{}], "complaints": [], "failed": ""}}, "a value"),
        ({**FACTS, "sourced": {}}, "a value"),
    ],
)
def test_markers_that_are_refused(facts: Any, words: str) -> None:
    assert words in refused(tar_of(("tree/a", b""), facts=facts))


def test_what_is_no_archive(run: Run, tmp_path: Path) -> None:
    log = gzip.compress(LOG.encode())
    assert "no archive of emupmem collect" in refused(log)
    (tmp_path / "log.gz").write_bytes(log)
    done = run("suggest", "--from", str(tmp_path / "log.gz"))
    assert done.status == 1
    assert "zcat" in done.err
    assert "no archive" in refused(b"\x1f\x8b") or "damaged" in refused(b"\x1f\x8b")
    good = tar_of(("tree/a", bytes(range(256)) * 400))
    for end in (20, len(good) // 2, len(good) - 4):
        assert refused(good[:end])
    assert refused(good[:40] + bytes(40) + good[80:])


def test_numbers_that_are_none_are_damage_not_a_crash(here: FakeMachine) -> None:
    archive = gather.gather_machine(here).archive
    members = {**archive.members, "tree/proc/meminfo": b"MemTotal: " + b"9" * 5000 + b" kB\n"}
    members["tree/sys/power/state"] = b"disk"
    with pytest.raises(EmupmemError, match="the archive is damaged"):
        collected.doctor_from(Archive(archive.facts, members), "a")


@examples(60)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_read_or_refused(noise: bytes, at: int) -> None:
    good = tar_of(("tree/a", b"text"))
    at = min(at, len(good))
    for data in (b"\x1f\x8b" + noise, good[:at] + noise + good[at + len(noise) :]):
        try:
            unpack(io.BytesIO(data), "a")
        except EmupmemError as exc:
            assert "\n" not in exc.message


def test_a_pipe_that_begins_with_a_single_byte_is_still_an_archive() -> None:
    data = tar_of(("tree/a", b"text"))
    reader, writer = os.pipe()
    os.write(writer, data[:1])  # as a slow program would

    def rest() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(data[1:])

    later = threading.Timer(0.2, rest)
    later.start()
    with emupmem.system.streams.given_file(f"/dev/fd/{reader}", print) as stream:
        assert emupmem.system.streams.is_gzip(stream)
        assert unpack(stream, "a").members == {"tree/a": b"text"}
    later.join()
    os.close(reader)


# Masking -------------------------------------------------------------------------------------------

hexes = st.text("0123456789abcdef", min_size=1, max_size=12)
uuids = st.uuids().map(str)
macs = st.lists(st.integers(0, 255), min_size=6, max_size=6).map(lambda b: ":".join(f"{x:02x}" for x in b))
ipv4s = st.ip_addresses(v=4).map(str).filter(lambda a: not a.startswith(("0.", "255.", "127.")))
ipv6s = st.ip_addresses(v=6).map(str).filter(lambda a: a not in ("::", "::1"))
names = st.from_regex(r"[a-z]{3,8}-?[a-z]{2,5}[0-9]{1,2}z", fullmatch=True)


@pytest.mark.slow
@examples(150)
@given(uuids, macs, ipv4s, ipv6s, names, names, st.integers(4, 60), st.integers(1, 40))
def test_masked_texts_keep_the_map_and_lose_the_secrets(
    uuid: str, mac: str, v4: str, v6: str, host: str, user: str, start: int, size: int
) -> None:
    line = f"BOOT_IMAGE=/vmlinuz root=UUID={uuid} ip={v4}::::{host}:eth0 memmap={size}G!{start}G,2M!3G hugepages=4"
    log = LOG.replace("root=UUID=0 ro quiet", line) + (
        f"eth0: {mac}\nfrom {v4} [{v6}] to {host}.lan\nmount /home/{user}/x on {host}--vg\n{uuid.upper()}\n"
    )
    masker = Masker([host], [user])
    masker.learn(log)
    masked, count = masker.mask(log)
    low = masked.lower()
    assert [s for s in (uuid, mac, host, f"/{user}/") if s in low] == []
    assert not re.search(rf"(?<![\w.]){re.escape(v4)}(?![\w.])", masked)
    assert f"[{v6}]" not in masked
    assert count.total() >= 8
    before, after = parse_boot_log(log), parse_boot_log(masked)
    assert before.firmware == after.firmware
    assert before.command_line is not None
    assert after.command_line is not None
    assert before.command_line.items == after.command_line.items
    assert before.command_line.hugepages == after.command_line.hugepages
    assert kernel_release(before.linux_version) == kernel_release(after.linux_version)
    assert masker.mask(log)[0] == masked, "the same again"


@pytest.mark.parametrize(
    "text",
    [
        LOG.replace("(builder@example) ", ""),
        "00000000-0009ffff : System RAM\n  01000000-02ffffff : Kernel code\n",
        "pci 0000:00:1f.2: [8086:2922] type 00 class 0x010601",
        "sd 0:0:0:0: [sda] Attached",
        "usb 1-2: New USB device strings: Mfr=1, Product=2, SerialNumber=3",
        "serial8250: ttyS0 at I/O 0x3f8 (irq = 4, base_baud = 115200) is a 16550A",
        "rtc_cmos 00:00: setting system clock to 2024-05-04T12:22:28 UTC (1714825348)",
        "CONFIG_SECRETMEM=y\nCONFIG_KEY_PASSWORD=m\n",
        "memmap=16G!4G,1G#12G crashkernel=1G-4G:192M,4G-:256M@16M mem=8G",
        "loopback 127.0.0.1 and ::1, mask 255.255.255.0",
        "set root='hd0,gpt2'\nif [ x$feature_platform_search_hint = xy ]; then\n",
    ],
)
def test_what_is_no_secret_is_left(text: str) -> None:
    masker = Masker(["localhost", "debian", "linux"], ["root", "user"])
    masker.learn(text)
    assert masker.mask(text) == (text, {})


def test_a_version_of_four_numbers_is_no_address() -> None:
    banner = "Linux version 5.15.146.1-microsoft (a@b) #1"
    masker = Masker(releases=["5.15.146.1-microsoft"])
    masker.learn(banner)
    assert "5.15.146.1-microsoft" in masker.mask(banner + " 10.1.2.3")[0]
    assert masker.mask("10.1.2.3")[0] == "0.0.0.1"


@pytest.mark.parametrize(
    "address", ["::ffff:192.0.2.1", "::ffff:0.0.0.0", "64:ff9b::192.0.2.33", "2001:db8:1:2:3:4:192.0.2.7"]
)
@pytest.mark.parametrize("around", ["to %s", "[%s]:22", "%s.", "%s, port 22"])
def test_an_ipv6_address_with_a_dotted_tail_is_one_secret(address: str, around: str) -> None:
    """As Python 3.13 prints those that embed an IPv4 address."""
    masked, count = Masker().mask(around % address)
    assert masked == around % "100::1"
    assert count == {"ipv6": 1}


def test_iomem_reads_the_same() -> None:
    text = "00001000-0009ffff : System RAM\n100000000-53fffffff : Persistent Memory (legacy)\n"
    masker = Masker(["0009ffffx", "thinkbox"], ["legacy"])
    assert parse_iomem(masker.mask(text)[0]) == parse_iomem(text)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("ro rd.luks.key=/etc/keys/root.key:UUID=12 quiet", "ro rd.luks.key=key-1 quiet"),
        ("cryptkey=rootfs:/key luks.keyfile=x", "cryptkey=key-1 luks.keyfile=key-2"),
        ("systemd.set_credential=passwd.plaintext:hunter2", "systemd.set_credential=key-1"),
        ("netroot=iscsi:bob:hunter2@10.0.0.1::3260::iqn.x", "netroot=address-1"),
        ("inst.ks=http://bob:hunter2@files.lan/ks.cfg ro", "inst.ks=http://address-1 ro"),
        ("ds=nocloud-net;s=http://10.0.0.1/seed/", "ds=nocloud-net;s=http://address-1"),
        ("see https://bob:hunter2@files.lan/x", "see https://password-1@files.lan/x"),
        ("wlan0: SSID='Home of Bob' x", "wlan0: SSID='network-1' x"),
        ('wlan0: ssid "Bob\'s home" x', 'wlan0: ssid "network-1" x'),
        ("brcmfmac: join ssid HomeNet,", "brcmfmac: join ssid network-1,"),
        ("root=LABEL=bobs-root ro", "root=LABEL=label-1 ro"),
        ('LABEL="Bobs disk" TYPE="ext4"', 'LABEL="label-1" TYPE="ext4"'),
        ("LABEL=Bobs\\040disk / by-label/Bobs\\x20disk", "LABEL=label-1 / by-label/label-2"),
        ("BTRFS: device label bobs-disk devid 1", "BTRFS: device label label-1 devid 1"),
        ("usb 1-1: Product: Bob's iPhone", "usb 1-1: Product: device-1"),
        ("input: Bob's Keyboard as /devices/pci0", "input: device-1 as /devices/pci0"),
        (
            "hid-generic 0003: input: USB HID v1.11 Mouse [Bob's Mouse] on",
            "hid-generic 0003: input: USB HID v1.11 Mouse [device-1] on",
        ),
        (
            "ExecStart=/e boot 1G!4G /mnt/x ext4 bob 0755 -",
            "ExecStart=/e boot 1G!4G /mnt/x ext4 user-1 0755 -",
        ),
        ("    1G!4G /mnt/x ext4 bob:dev - -", "    1G!4G /mnt/x ext4 user-1 - -"),
        (
            "cifsroot=//nas/x,username=x,password=hunter2 ro",
            "cifsroot=//nas/x,username=x,password=password-1 ro",
        ),
        ("passwd/root-password=hunter3 quiet", "passwd/root-password=password-1 quiet"),
        ("passwd/user-password-crypted=$6$abc$def", "passwd/user-password-crypted=password-1"),
        (
            "luks_pass=a rd.vnc.pwd=b rootpw=c pw=d",
            "luks_pass=password-1 rd.vnc.pwd=password-2 rootpw=password-3 pw=password-4",
        ),
        ("iommu.passthrough=1 bypass=2 compass=3", "iommu.passthrough=1 bypass=2 compass=3"),
        ('password="two words" ro', 'password="password-1" ro'),
        ("a.passphrase='it is' rd.luks.key=\"a b\"", "a.passphrase='password-1' rd.luks.key=\"key-1\""),
        (r'"line": "psk=\"two words\" ro"', r'"line": "psk=\"password-1\" ro"'),
        ('ro "wifi.psk=two words" quiet', 'ro "wifi.psk=password-1" quiet'),
        ('GRUB_CMDLINE_LINUX="pw=two ro"', 'GRUB_CMDLINE_LINUX="pw=password-1 ro"'),
        ('password="open ro', 'password="password-1 ro'),
        ('password="" ro x="y"', 'password="" ro x="y"'),
        (r'"LABEL=\"\" Zq7"', r'"LABEL=\"\" Zq7"'),
        (r'"psk=\"\" x"', r'"psk=\"\" x"'),
        (r'ssid="Zq7\secret', 'ssid="network-1'),
        ('password bob "two words"', "password user-1 password-1"),
        ("BOOTIF=01-52-54-00-ab-cd-ef ro", "BOOTIF=01-02:00:00:00:00:01 ro"),
        ("ifname=eth0:52:54:00:12:34:56 ro", "ifname=eth0:02:00:00:00:00:01 ro"),
        ("enx00e04c680001 is 00:e0:4c:68:00:01", "enx02:00:00:00:00:01 is 02:00:00:00:00:01"),
        ("ip=[2001:db8::2]::[2001:db8::1]:64:web1:eth0:none", "ip=[100::1]::[100::2]:64:host-1:eth0:none"),
        (
            "rd.md.uuid=a1b2c3d4:e5f60718:293a4b5c:6d7e8f90 ro",
            "rd.md.uuid=00000000-0000-0000-0000-000000000001 ro",
        ),
        (
            "set root='lvmid/QeTqCd-abcd-1234/XyZ012-ab'",
            "set root='lvmid/00000000-0000-0000-0000-000000000001'",
        ),
        (
            "rd.luks.uuid=luks-3f1b7d52-9c0e-4a5d-8a77-0123456789ab",
            "rd.luks.uuid=luks-00000000-0000-0000-0000-000000000001",
        ),
    ],
)
def test_secrets_by_the_place_where_they_stand(text: str, masked: str) -> None:
    masker = Masker()
    masker.learn(text)
    assert masker.mask(text)[0] == masked


def test_passwords_of_grub() -> None:
    text = (
        'set superusers="alice bob"\n  password_pbkdf2 alice grub.pbkdf2.sha512.1.AA\npassword bob pass1\n'
        '--users "bob"\n'
    )
    masker = Masker()
    masker.learn(text)
    masked = masker.mask(text)[0]
    assert masked == (
        'set superusers="user-1 user-2"\n  password_pbkdf2 user-1 password-1\npassword user-2 password-2\n'
        '--users "user-2"\n'
    )


@pytest.mark.slow
def test_masking_a_long_log_comes_to_its_end() -> None:
    """A mask that takes the square of the length would be at this for hours."""
    line = "[    1.0] usb 1-1: " + "0123456789abcdef:" * 6 + " host thinkbox 192.168.1.1 " + "x" * 60 + "\n"
    text = line * 10_000 + "a:" * 20_000 + "f" * 20_000 + "\n"
    masker = Masker(["thinkbox"], ["mallory"])
    masker.learn(text)
    masked, count = masker.mask(text)
    assert "thinkbox" not in masked
    assert count["host"] == 10_000


def test_what_is_too_long_is_cut_and_said(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "LARGEST_FILE", 1000)
    archive = gather.gather(here, [finding.Finding("x", "ok", "")])
    assert "commands/dmesg" in archive.facts["cut"]
    assert max(map(len, archive.members.values())) == 1000


@pytest.mark.slow
def test_masking_does_not_take_the_square_of_a_line() -> None:
    masker = Masker(["thinkbox"])
    line = "search " + "--fs-uuid " * 60_000
    text = f"{line}A1B2-C3D4\n{line}\n"
    masker.learn(text)
    assert masker.mask(text)[0] == text.replace("A1B2-C3D4", "00000000-0000-0000-0000-000000000001")


def test_what_another_loader_starts_next_counts_elsewhere_too(tmp_path: Path) -> None:
    """The entries of systemd-boot reserve, this boot does not yet."""
    machine = test_loader.systemd_boot(tmp_path)
    test_loader.apply(machine)
    archive = gather.gather_machine(machine).archive
    assert survey.of_machine(machine, boots=prepare.next_line(machine)).reserved == ("1G!4G",)
    assert collected.plan_from(archive, "a").reserved == ("1G!4G",)
