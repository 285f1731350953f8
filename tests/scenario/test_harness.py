# SPDX-License-Identifier: Apache-2.0
"""The harness itself: what a test says is what is seen, and this host is out of reach."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import PROJECT
from tests.scenario import inside, kernel, machine, tree
from tests.scenario.machine import Host, Node, Play, Scenario, diff, lacking_disk

pytestmark = pytest.mark.scenario

RELEASE = "6.1.0-13-amd64"
HOST = Host("grub", "BOOT_IMAGE=/boot/vmlinuz root=UUID=0 ro", RELEASE, files=kernel.files(RELEASE))


def test_what_is_said_is_what_is_seen(play: Play) -> None:
    host = replace(
        HOST,
        efi={"LoaderInfo": "systemd-boot 257.8", "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": b"\1"},
        os_release="ID=fedora\n",
        machine_id="f" * 32,
        hostname="laptop",
        meminfo="MemTotal: 1 kB\n",
        files={"/etc/kernel/cmdline": "quiet\n", "/run/x": b"\xff"},
        links={"/boot/vmlinuz": "vmlinuz-1"},
        removed=("rpm",),
    )
    here = play(host)
    assert here.read("/proc/cmdline") == f"{host.cmdline}\n"
    assert here.read("/proc/version").startswith(f"Linux version {RELEASE} ")
    assert here.must("uname", "-r") == here.read("/proc/sys/kernel/osrelease") == f"{RELEASE}\n"
    assert here.must("hostname") == "laptop\n"
    assert "100000000-53fffffff : System RAM" in here.read("/proc/iomem")
    assert here.read("/proc/meminfo") == "MemTotal: 1 kB\n"
    assert "BIOS-e820: [mem 0x0000000100000000-0x000000053fffffff] usable" in here.must("dmesg")
    assert here.read("/sys/firmware/memmap/4/end") == "0x53fffffff\n"
    loader = f"/sys/firmware/efi/efivars/LoaderInfo-{machine.LOADER_GUID}"
    seen = here.snapshot(["/sys/firmware/efi/efivars", "/boot", "/run/x"])
    assert seen[loader].data == b"\x06\0\0\0" + "systemd-boot 257.8\0".encode("utf-16-le")
    assert [n.data for p, n in seen.items() if "SecureBoot" in p] == [b"\x06\0\0\0\1"]
    assert (seen["/boot/vmlinuz"].kind, seen["/boot/vmlinuz"].data) == ("link", b"vmlinuz-1")
    assert seen["/run/x"].data == b"\xff"
    assert (here.read("/etc/os-release"), here.read("/etc/machine-id")) == ("ID=fedora\n", "f" * 32 + "\n")
    assert here.run("sh", "-c", "command -v rpm").status != 0
    assert here.run("sh", "-c", "command -v grub-mkconfig").status == 0
    assert here.must("awk", "NR > 2 {print $1}", "/proc/net/dev") == "lo:\n"


def test_a_bios_machine_has_no_efi(play: Play) -> None:
    assert not play(HOST).snapshot(["/sys/firmware/efi"])


def test_an_unknown_program_to_remove_is_an_error() -> None:
    if why := machine.lacking():
        pytest.skip(f"no scenarios: {why}")
    with (
        pytest.raises(RuntimeError, match="has no no-such to remove"),
        Scenario(replace(HOST, removed=("no-such",))),
    ):
        pass


def test_a_boot_is_seen(play: Play) -> None:
    here = play(HOST)
    here.write("/boot/grub/grub.cfg", "# made before the boot\n")
    here.boot("quiet memmap=1G!4G")
    assert here.read("/proc/cmdline") == "quiet memmap=1G!4G\n"
    assert "Command line: quiet memmap=1G!4G\n" in here.must("dmesg")
    booted = int(here.must("awk", "/^btime/ {print $2}", "/proc/stat"))
    assert booted > int(here.must("stat", "-c", "%Y", "/boot/grub/grub.cfg"))


HARM = """
rm -rf --one-file-system /etc /boot /usr/share/doc
echo x >/sys/x; echo 1 >/proc/sys/vm/drop_caches; echo b >/proc/sysrq-trigger
chmod 000 /dev/null; hostname x
mount -t tmpfs x /mnt; mount -t sysfs x /mnt; mount --bind / /mnt
mknod /dev/sda b 8 0; mknod /root/sda b 254 0; cat /root/sda
touch /opt/project/emupmem/x; rm -f /opt/project/emupmem/model.py
echo x >/proc/1/root/x; chroot /proc/1/root touch /y
kill -9 -1
"""


@pytest.fixture
def this_host() -> Iterator[None]:
    """All that is watched of this host stays as it is."""

    def look() -> tuple[object, ...]:
        files = inside.snapshot(["/etc", "/boot", str(PROJECT / "emupmem"), "/sys/firmware/efi"])
        lists = [sorted(Path(p).iterdir()) for p in ("/", "/sys", "/dev", "/mnt", "/root", tree_of(HOST))]
        own = {n: v for n, v in files.items() if "__pycache__" not in n and n != "/etc/mtab"}
        return (
            Path("/proc/self/mountinfo").read_text(),
            own,
            lists,
            os.uname(),
            Path("/dev/null").stat().st_mode,
        )

    before = look()
    yield
    assert look() == before


def tree_of(host: Host) -> str:
    return "/" if machine.lacking() else str(tree.tree(host.tree))


@pytest.mark.usefixtures("this_host")
def test_this_host_is_out_of_reach(play: Play) -> None:
    here = play(HOST)
    done = here.run("sh", "-c", HARM)
    assert "kill: No such process" in done.stderr, "it sees no others than process 1, which it cannot kill"
    for refused in (
        "/proc/sys/vm/drop_caches",
        "hostname:",
        "/mnt:",
        "mknod: /dev/sda",
        "/opt/project/emupmem/x",
    ):
        assert refused in done.stderr, done.stderr
    seen = here.snapshot(["/etc", "/root", "/dev/sda", "/x", "/y"])
    assert set(seen) == {"/root", "/root/.bashrc", "/root/.profile", "/x", "/y"}, "its own files are its own"


@pytest.mark.usefixtures("this_host")
def test_one_scenario_leaves_nothing_to_the_next(play: Play) -> None:
    play(HOST).write("/etc/x", "y")
    assert not play(HOST).snapshot(["/etc/x"])


def running(word: str) -> bool:
    """Whether a program with such a word on its command line runs on this host."""
    found = [p for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.name != str(os.getpid())]
    for path in found:
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def gone(word: str) -> bool:
    end = time.monotonic() + 5
    while running(word):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_nothing_outlives_a_scenario() -> None:
    if why := machine.lacking():
        pytest.skip(f"no scenarios: {why}")
    with Scenario(HOST) as here:
        here.must("sh", "-c", "setsid sleep 98765.1 >/dev/null 2>&1 &")
        while here.processes() != ["sleep 98765.1"]:  # setsid is between fork and exec, the shell dies
            time.sleep(0.05)
    assert not running("98765.1"), "it ended before we went on"


def test_nothing_outlives_the_test_that_is_killed(tmp_path: Path) -> None:
    if why := machine.lacking():
        pytest.skip(f"no scenarios: {why}")
    code = (
        "from tests.scenario.test_harness import HOST, Scenario\n"
        "with Scenario(HOST) as here: here.run('sleep', '98765.2')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT) as process:
        while not running("98765.2"):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert gone("98765.2")


def test_what_takes_too_long_is_ended(play: Play) -> None:
    here = play(HOST)
    with pytest.raises(TimeoutError, match=r"sh ran for more than 0\.3 seconds\nbegun"):
        here.run("sh", "-c", "echo begun; setsid sleep 98 & sleep 99", timeout=0.3)
    assert here.processes() == []
    assert here.must("echo", "on") == "on\n"


def test_a_program_that_is_missing_and_one_that_fails(play: Play) -> None:
    here = play(HOST)
    with pytest.raises(FileNotFoundError):
        here.run("/no/such")
    with pytest.raises(FileNotFoundError):
        here.read("/no/such")
    with pytest.raises(AssertionError, match="exit status 3\nout\nerr"):
        here.must("sh", "-c", "echo out; echo err >&2; exit 3")


def test_a_difference_is_named(play: Play) -> None:
    here = play(HOST)
    before = here.snapshot(["/etc"])
    here.must(
        "sh", "-c", "cd /etc; echo 1 >new; rm fstab; chmod 600 passwd; chown 3:4 group; ln -sf x os-release"
    )
    found = diff(before, here.snapshot(["/etc"]))
    assert found == {
        "/etc/fstab": "gone",
        "/etc/group": "owner: 0 -> 3; group: 0 -> 4",
        "/etc/new": "new",
        "/etc/os-release": "data: b'../usr/lib/os-release' -> b'x'",
        "/etc/passwd": "mode: 420 -> 384",
    }
    assert before["/etc"] == Node("folder", 0o755, 0, 0)


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_a_disk_of_its_own(kind: str, play: Play) -> None:
    if why := lacking_disk(kind):
        pytest.skip(f"no scenarios with {kind}: {why}")
    name = f"{kind}{os.getpid()}"
    with Scenario(replace(HOST, hostname=name, disks=[("/disk", kind, 256 << 20)])) as here:
        assert f" /disk {kind} " in here.read("/proc/mounts")
        if kind == "btrfs":
            here.must("btrfs", "subvolume", "create", "/disk/1")
            here.must("btrfs", "subvolume", "snapshot", "/disk/1", "/disk/2")
        assert behind_loops(name)
    assert not behind_loops(name)


def behind_loops(name: str) -> list[str]:
    """The files of a machine's disks that loop devices of this host lead to."""
    texts = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            texts.append(path.read_text())
    return [text for text in texts if name in text]


def test_why_none_can_be_played_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "mmdebstrap" else name)
    if os.geteuid() == 0:
        assert tree.lacking() == "mmdebstrap not installed (make deps)"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert tree.lacking() == "a scenario needs root: files of many owners, mounts and namespaces"
