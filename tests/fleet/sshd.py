# SPDX-License-Identifier: Apache-2.0
"""A guest that Ansible reaches by ssh, as any other machine: Debian's own sshd on QEMU's user network.

The images have neither sshd nor a network. What `openssh-server` needs beside what the image has is brought as
unpacked packages, from the mirror that the image came from; the guest starts it at every boot by a unit.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.fleet import mirror
from tests.vm import image
from tests.vm.machine import MIB, Content, Image, run

# No iproute2 there: the address by the calls that it makes. QEMU's user network is always the same.
ADDRESS = """
import fcntl, os, socket, struct, time
while not (cards := [n for n in os.listdir("/sys/class/net") if n != "lo"]):
    time.sleep(0.1)
name = cards[0].encode()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    def address(call, text):
        fcntl.ioctl(s, call, struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(text)))
    address(0x8916, "10.0.2.15")  # SIOCSIFADDR
    address(0x891C, "255.255.255.0")  # SIOCSIFNETMASK
    fcntl.ioctl(s, 0x8914, struct.pack("16sH", name, 0x43))  # SIOCSIFFLAGS: up, broadcast, running
"""

UNIT = """[Unit]
Description=sshd, for Ansible
After=systemd-udev-trigger.service

[Service]
Type=notify
ExecStartPre=/usr/bin/python3 -ISs /etc/ssh/address.py
ExecStart=/usr/sbin/sshd -D -e -f /etc/ssh/ansible.conf
RuntimeDirectory=sshd
KillMode=process

[Install]
WantedBy=multi-user.target
"""

# What takes long with an emulated processor and is not what is tested is chosen short.
SETTINGS = """HostKey /etc/ssh/host
AuthorizedKeysFile /etc/ssh/authorized
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
LoginGraceTime 0
UsePAM no
UseDNS no
PrintMotd no
Subsystem sftp /usr/lib/openssh/sftp-server
"""

# The images have no logind, through which `shutdown -r 0` goes, as Ansible calls it.
SHUTDOWN = """#!/bin/sh
[ "$1 $2" = "-r 0" ] && exec systemctl --no-block reboot
"""

START = """
cp -r --preserve=mode,links /job/ssh/root/usr /job/ssh/root/etc /
mkdir -p /etc/ssh
cp /job/ssh/keys/* /etc/ssh/
chmod 600 /etc/ssh/host
chmod 755 /etc/ssh/shutdown
mv -f /etc/ssh/shutdown /usr/sbin/shutdown
grep -q ^sshd: /etc/passwd || useradd --system --no-create-home --home-dir /run/sshd --shell /usr/sbin/nologin sshd
systemctl enable -q ansible-sshd.service
systemctl start ansible-sshd.service
"""
"""For the first script of a guest: from then on, and after every restart, it can be reached."""

# A script has something done from outside, and goes on when that is over, in this boot or in the next one.
ASK = """
ask() { echo; echo "ANSIBLE $1"; answered "$1"; }
answered() {
    { set +x; } 2> /dev/null
    echo; echo "AWAITS $1"
    until [ -e "/run/answered-$1" ]; do echo waiting; sleep 1; done
    set -x
}
"""


class Reached:
    """What makes one guest reachable: `arguments` for QEMU, `files` for the job, a line for the inventory."""

    def __init__(self, made: Image, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        keys = folder / "keys"
        keys.mkdir()
        for name in ("host", "user"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(keys / name)])
        self.port = _free_port()
        self.files: dict[str, Content] = {
            "ssh/root": server(made),
            "ssh/keys/host": (keys / "host").read_text(),
            "ssh/keys/authorized": (keys / "user.pub").read_text(),
            "ssh/keys/ansible.conf": SETTINGS,
            "ssh/keys/address.py": ADDRESS,
            "ssh/keys/shutdown": SHUTDOWN,
        }
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(keys / 'host.pub').read_text()}")
        forward = f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"
        self.arguments = ["-netdev", forward, "-device", "virtio-net-pci,netdev=net0,romfile="]

    def inventory(self, name: str) -> str:
        """The host in an inventory, as people write it."""
        return (
            f"{name} ansible_host=127.0.0.1 ansible_port={self.port} ansible_user=root "
            f"ansible_ssh_private_key_file={self.folder}/keys/user ansible_python_interpreter=/usr/bin/python3 "
            f'ansible_ssh_common_args="{" ".join(self._options())}"\n'
        )

    def answer(self, name: str) -> None:
        """Let the script go on that asked."""
        options = [
            *self._options(),
            "-oBatchMode=yes",
            "-i",
            str(self.folder / "keys/user"),
            "-p",
            str(self.port),
        ]
        run(["ssh", *options, "root@127.0.0.1", f"touch /run/answered-{name}"])

    def _options(self) -> list[str]:
        return [f"-oUserKnownHostsFile={self.folder}/known", f"-oControlPath={self.folder}/%C"]


class Outside:
    """What is done from outside while scripts run, by the name they `ask` for; it listens to a guest (`live`).

    What goes wrong there is raised here: a guest that waits for an answer says so every second.
    """

    def __init__(self, reached: Reached, work: Mapping[str, Callable[[], None]]) -> None:
        self.reached, self.left = reached, dict(work)
        self.said = ""
        self.error: BaseException | None = None

    def __call__(self, text: str) -> None:
        self.said += text
        for name in re.findall(r"^ANSIBLE (\w+)\r?$", self.said, re.MULTILINE):
            if work := self.left.pop(name, None):
                threading.Thread(target=self._do, args=(name, work), daemon=True).start()
        for name in re.findall(r"^AWAITS (\w+)\r?$", self.said, re.MULTILINE):
            assert name not in self.left, f"the script that should have asked for it failed:\n{self.said}"
        if self.error:
            raise self.error

    def _do(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
            self.reached.answer(name)
        except BaseException as exc:
            self.error = exc


def server(made: Image) -> Path:
    """Return a folder with sshd, and with all that this image lacks of what it needs, from the cache or the mirror."""
    with tempfile.TemporaryDirectory() as name:
        status = Path(name) / "status"
        offset = MIB + (0 if made.firmware == "bios" else image._efi_size(made.firmware))
        run(["debugfs", "-R", f"dump /var/lib/dpkg/status {status}", f"{made.disk}?offset={offset}"])
        there = hashlib.sha256(status.read_bytes() + UNIT.encode()).hexdigest()[:12]
        place = image.cache() / "sshd" / f"{made.suite}-{there}"
        place.parent.mkdir(parents=True, exist_ok=True)
        with image._lock(place.parent / "lock"):
            if not place.is_dir():
                unfinished = place.with_suffix(".new")
                shutil.rmtree(unfinished, ignore_errors=True)
                _download(made.suite, status, Path(name), unfinished)
                unfinished.rename(place)
    return place


def _download(suite: str, status: Path, work: Path, target: Path) -> None:
    archives = mirror.download(suite, status, ["openssh-server"], work)
    unpacked = work / "unpacked"
    for archive in archives:
        run(["dpkg-deb", "-x", str(archive), str(unpacked)])
    # Only what runs. Packages of Debian 12 have libraries in /lib, which is a link there.
    libraries = "lib/x86_64-linux-gnu"
    for name in ("usr/sbin/sshd", "usr/lib/openssh", f"usr/{libraries}", libraries):
        there, here = unpacked / name, target / "usr" / name.removeprefix("usr/")
        if there.is_dir():
            shutil.copytree(there, here, symlinks=True, dirs_exist_ok=True)
        elif there.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there, here)
    (target / "etc/systemd/system").mkdir(parents=True)
    (target / "etc/systemd/system/ansible-sshd.service").write_text(UNIT)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def lacking() -> str:
    """What keeps guests from being reached here, in one line; empty where nothing does."""
    missing = [n for n in ("ssh", "ssh-keygen") if shutil.which(n) is None]
    return f"{' and '.join(missing)} not installed (make deps)" if missing else mirror.lacking()
