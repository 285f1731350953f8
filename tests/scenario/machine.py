# SPDX-License-Identifier: Apache-2.0
"""A whole machine, played without a virtual machine: real programs over a tree, in namespaces of its own.

`Host` says what the machine is, `Scenario` plays it. See `tests.scenario` for how to write one.

This host is out of reach: the root is an overlay whose upper layer is memory, the host's own root is unmounted
in the namespace, /sys is empty but for what the host is said to have, /dev has no disks, the network has no
devices, and process 1 has no rights over the kernel. It ends with the last descriptor that leads to it.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import PROJECT
from tests.scenario import inside, tree

LOADER_GUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""The vendor of the variables of systemd-boot and of those that follow it (LoaderInfo …)."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": "dumb"}
GIB = 1 << 30

E820 = (
    (0x0, 0x9FBFF, "usable"),
    (0x9FC00, 0x9FFFF, "reserved"),
    (0x100000, 0xBFFFFFFF, "usable"),
    (0xFEFFC000, 0xFEFFFFFF, "reserved"),
    (0x100000000, 0x53FFFFFFF, "usable"),
)
"""A machine with 20 GiB: (first byte, last byte, type) as the kernel prints them."""

IOMEM_NAMES = {"usable": "System RAM", "reserved": "Reserved"}
SYSFS_NAMES = {"usable": "System RAM", "reserved": "Reserved"}

Content = str | bytes


@dataclass(frozen=True, slots=True)
class Host:
    """What the machine is. Texts are as the machine shows them; None: made of the rest, as a kernel would.

    `cmdline` is this boot's, without its end of line; `efi` are the UEFI variables by name (a loader's, or with
    its vendor's GUID; a text becomes UTF-16 with a NUL, bytes are taken as they are, both after four bytes of
    attributes), None for a BIOS machine; `e820` are (first, last, type). `files` are put over the tree, with the
    folders above them; `programs` go to /usr/local/sbin, before all others; `removed` are programs that the
    machine does not have. `esp` is where the ESP lies, a folder that bootctl and kernel-install take for one.
    `disks` are file systems of their own, (place, type, bytes), on loop devices.
    """

    tree: str
    cmdline: str
    release: str
    efi: Mapping[str, Content] | None = None
    e820: Sequence[tuple[int, int, str]] = E820
    dmesg: Content | None = None
    version: str | None = None
    iomem: Content | None = None
    meminfo: Content | None = None
    os_release: str | None = None
    machine_id: str = "0123456789abcdef0123456789abcdef"
    hostname: str = "scenario"
    booted: int = 1_700_000_000
    root_fs: str = "ext4"
    root_device: str = "/dev/vda1"
    root_uuid: str = "e0b0eed5-0000-4000-8000-000000000001"
    esp: str = ""
    files: Mapping[str, Content] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[str, Content] = field(default_factory=dict)
    removed: Sequence[str] = ()
    disks: Sequence[tuple[str, str, int]] = ()


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended: its exit status (negative: the signal), what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The object it printed."""
        return json.loads(self.stdout)


@dataclass(frozen=True, slots=True)
class Node:
    """A file (`data` its content), a link (`data` its target), a folder, or something special."""

    kind: str
    mode: int
    owner: int
    group: int
    data: bytes = b""
    attributes: tuple[tuple[str, bytes], ...] = ()


World = Mapping[str, Node]
"""All that is below some folders, by path."""


class Scenario:
    """Play a host: `with Scenario(host) as scenario`. Needs root and what `lacking` asks for.

    Raises RuntimeError, with what was said, where the root cannot be made.
    """

    def __init__(self, host: Host) -> None:
        self.host = host

    def __enter__(self) -> Self:
        kinds = [f"--{n}" for n in ("mount", "pid", "net", "uts", "ipc", "fork", "kill-child")]
        argv = ["unshare", *kinds, "--propagation", "private", sys.executable, "-I", inside.__file__]
        pipe = subprocess.PIPE
        spec = _spec(self.host)
        self._process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT, start_new_session=True
        )
        try:
            self._send(spec)
            if self._receive() != "ready":
                raise RuntimeError("process 1 of the scenario does not answer")
            self._ask("write", _files(self.host))
            self._ask("remove", _removed(self))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """The process here whose only child is process 1 of the scenario."""
        return self._process.pid

    def run(
        self,
        *argv: str,
        given: str = "",
        timeout: float = 900,
        environment: Mapping[str, str] | None = None,
    ) -> Completed:
        """Run a program in the machine, as root, to its end; `given` is its standard input.

        Raises TimeoutError after `timeout` seconds (all programs in there are then ended), OSError where it
        cannot be started.
        """
        env = {**ENVIRONMENT, **(environment or {})}
        status, out, err = self._ask("run", argv, env, given.encode(), timeout)
        if status is None:
            raise TimeoutError(f"{argv[0]} ran for more than {timeout:g} seconds\n{_text(out)}{_text(err)}")
        return Completed(status, _text(out), _text(err))

    def must(self, *argv: str, given: str = "") -> str:
        """Run a program that must succeed, and return what it printed. Raises AssertionError with all it said."""
        done = self.run(*argv, given=given)
        assert done.status == 0, f"{' '.join(argv)}: exit status {done.status}\n{done.stdout}{done.stderr}"
        return done.stdout

    def emupmem(self, *arguments: str, given: str = "") -> Completed:
        """Run the emupmem of this project in the machine."""
        return self.run("/usr/local/bin/emupmem", *arguments, given=given)

    def read(self, name: str) -> str:
        """Text of a file, whatever links lead to it. Raises FileNotFoundError."""
        data: bytes | None = self._ask("read", name)
        if data is None:
            raise FileNotFoundError(name)
        return _text(data)

    def write(self, name: str, content: Content, mode: int = 0) -> None:
        """Write a file in place, or a new one with the folders above it; 0: the mode is left as it is.

        What the kernel shows is written like any file: `/proc/cmdline` is what the next program sees.
        """
        self._ask("write", {name: (_bytes(content), mode)})

    def remove(self, *names: str) -> None:
        """Remove files. Raises FileNotFoundError."""
        self._ask("remove", names)

    def boot(self, cmdline: str) -> None:
        """Have this kernel started with other words, as after a reboot: its command line and the head of its log.

        What a reservation does to the memory map is for the scenario to say, with `write`.
        """
        self.write("/proc/cmdline", f"{cmdline}\n")
        self.write("/var/lib/scenario/dmesg", _dmesg(self.host, cmdline))
        self.write("/proc/stat", _stat(int(time.time()) + 1))

    def processes(self) -> list[str]:
        """Programs that run in the machine, but for process 1."""
        found: list[str] = self._ask("processes")
        return found

    def snapshot(self, tops: Sequence[str] = ("/etc", "/boot")) -> dict[str, Node]:
        """All that is below some folders: kinds, modes, owners, bytes, links, extended attributes."""
        found: dict[str, tuple[Any, ...]] = self._ask("snapshot", tops)
        return {name: Node(*values) for name, values in found.items()}

    def _ask(self, service: str, *arguments: object) -> Any:
        self._send((service, *arguments))
        return self._receive()

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            inside.send(self._process.stdin, value)
        except BrokenPipeError:
            raise RuntimeError(self._last_words()) from None

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        value = inside.receive(self._process.stdout)
        if value is None:
            raise RuntimeError(self._last_words())
        if isinstance(value, Exception):
            raise value
        return value[0]

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        self._process.kill()
        return f"the scenario ended: {_text(self._process.stderr.read())}"

    def _end(self) -> None:
        """Process 1 ends when its input does, and the kernel ends its whole namespace before we go on."""
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # unshare --kill-child: process 1 goes with it
            self._process.wait()


def diff(before: World, after: World) -> dict[str, str]:
    """What differs between two snapshots, by path, in a few words each; empty where nothing does."""
    found = {}
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            found[name] = "new" if old is None else "gone"
        elif old != new:
            fields = [n for n in Node.__slots__ if getattr(old, n) != getattr(new, n)]
            found[name] = "; ".join(f"{n}: {getattr(old, n)!r} -> {getattr(new, n)!r}" for n in fields)
    return found


@cache
def lacking() -> str:
    """What keeps scenarios from being played here, in one line; empty where nothing does."""
    if why := tree.lacking():
        return why
    if os.uname().machine != "x86_64":
        return "a scenario is an x86-64 machine"
    if "overlay" not in Path("/proc/filesystems").read_text().split():
        subprocess.run(["modprobe", "-q", "overlay"], check=False)
        if "overlay" not in Path("/proc/filesystems").read_text().split():
            return "the kernel has no overlay file system"
    argv = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--mount-proc", "true"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


def lacking_disk(kind: str) -> str:
    """What keeps a host from having `disks` of a type, in one line; empty where nothing does."""
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    known = Path("/proc/filesystems").read_text().split()
    return "" if kind in known else f"the kernel has no {kind}"


# What a machine is made of -----------------------------------------------------------------------------


def _spec(host: Host) -> dict[str, Any]:
    """What is needed before the root is entered."""
    return {
        "tree": str(tree.tree(host.tree)),
        "project": str(PROJECT / "emupmem"),
        "project_place": f"{tree.PROJECT_PLACE}/emupmem",
        "hostname": host.hostname,
        "disks": list(host.disks),
        "esp": host.esp,
        "proc": {name: _bytes(text) for name, text in _proc(host).items()},
        "program": Path(inside.__file__).read_text(),
        "environment": ENVIRONMENT,
    }


def _proc(host: Host) -> dict[str, Content]:
    files: dict[str, Content] = {
        "/proc/cmdline": f"{host.cmdline}\n",
        "/proc/version": f"{_banner(host)}\n",
        "/proc/sys/kernel/osrelease": f"{host.release}\n",
        "/proc/iomem": host.iomem if host.iomem is not None else _iomem(host),
        "/proc/stat": _stat(host.booted),
    }
    if host.meminfo is not None:
        files["/proc/meminfo"] = host.meminfo
    return {**files, **{n: c for n, c in host.files.items() if n.startswith("/proc/")}}


def _files(host: Host) -> dict[str, tuple[bytes, int]]:
    """What is put over the tree: (content, mode) by name; a mode of 0 is that of the file that is there."""
    files = {name: (_bytes(text), 0) for name, text in _said(host).items()}
    programs = {**_stand_ins(host), **host.programs}
    files |= {f"/usr/local/sbin/{name}": (_bytes(text), 0o755) for name, text in programs.items()}
    if "grub-probe" in programs:  # grub-mkconfig looks nowhere else
        files["/usr/sbin/grub-probe"] = (_bytes(programs["grub-probe"]), 0o755)
    links = {**host.links, f"/dev/disk/by-uuid/{host.root_uuid}": f"../../{Path(host.root_device).name}"}
    files |= {name: (target.encode(), stat.S_IFLNK) for name, target in links.items()}
    return files | {n: (_bytes(c), 0) for n, c in host.files.items() if not n.startswith("/proc/")}


def _said(host: Host) -> dict[str, Content]:
    said: dict[str, Content] = {
        "/etc/machine-id": f"{host.machine_id}\n",
        "/etc/hostname": f"{host.hostname}\n",
        "/etc/fstab": f"UUID={host.root_uuid} / {host.root_fs} defaults 0 1\n",
        "/var/lib/scenario/dmesg": _dmesg(host, host.cmdline),
        host.root_device: "",
    }
    if host.os_release is not None:
        said |= {"/usr/lib/os-release": host.os_release}
    for number, (first, last, kind) in enumerate(host.e820):
        here = f"/sys/firmware/memmap/{number}"
        values = {"start": f"{first:#x}\n", "end": f"{last:#x}\n", "type": f"{SYSFS_NAMES.get(kind, kind)}\n"}
        said |= {f"{here}/{name}": text for name, text in values.items()}
    if host.efi is not None:
        said |= {"/sys/firmware/efi/fw_platform_size": "64\n"}
    return said | {_variable(name): _value(v) for name, v in (host.efi or {}).items()}


def _variable(name: str) -> str:
    full = name if name.count("-") >= 5 else f"{name}-{LOADER_GUID}"
    uuid.UUID(full[-36:])
    return f"/sys/firmware/efi/efivars/{full}"


def _value(value: Content) -> bytes:
    """A variable as efivarfs shows it: attributes (boot service and runtime access), then the value."""
    return b"\x06\0\0\0" + (value if isinstance(value, bytes) else f"{value}\0".encode("utf-16-le"))


def _banner(host: Host) -> str:
    said = "(builder@example) (gcc 14.2.0, GNU ld 2.44) #1 SMP PREEMPT_DYNAMIC"
    return host.version or f"Linux version {host.release} {said}"


def _dmesg(host: Host, cmdline: str) -> bytes:
    if host.dmesg is not None:
        return _bytes(host.dmesg)
    lines = [_banner(host), f"Command line: {cmdline}", "BIOS-provided physical RAM map:"]
    lines += [f"BIOS-e820: [mem {first:#018x}-{last:#018x}] {kind}" for first, last, kind in host.e820]
    lines += [
        "NX (Execute Disable) protection: active",
        *(["efi: EFI v2.7 by EDK II"] if host.efi is not None else []),
    ]
    return "".join(f"[    0.000000] {line}\n" for line in lines).encode()


def _iomem(host: Host) -> str:
    lines = [f"{first:08x}-{last:08x} : {IOMEM_NAMES.get(k, k)}\n" for first, last, k in host.e820]
    return "".join(lines)


def _stat(booted: int) -> str:
    return f"cpu  0 0 0 0 0 0 0 0 0 0\nbtime {booted}\n"


# Stand-ins -------------------------------------------------------------------------------------------


def _stand_ins(host: Host) -> dict[str, str]:
    """The programs that ask the machine what a folder cannot answer; all others are real."""
    found = {"dmesg": "#!/bin/sh\nexec cat /var/lib/scenario/dmesg\n"}
    if host.esp:
        found |= {name: _relaxed(name, host.esp) for name in ("bootctl", "kernel-install")}
    return found | {"grub-probe": grub_probe(host)}


def _relaxed(name: str, esp: str) -> str:
    """The real program, which takes a folder for the ESP."""
    words = f"SYSTEMD_RELAX_ESP_CHECKS=1 SYSTEMD_ESP_PATH={esp}"
    return f'#!/bin/sh\n{words} exec /usr/bin/{name} "$@"\n'


def grub_probe(host: Host) -> str:
    """What grub-probe of GRUB 2.06 (Debian 12) and 2.12 answers on a machine with a plain GPT disk.

    The real one asks the device behind an overlay, and finds none. As it: the options may come in any order,
    an empty answer is an empty line or none, an unknown target is an error.
    """
    answers = {
        "device": host.root_device,
        "disk": host.root_device.rstrip("0123456789"),
        "drive": "(hostdisk//dev/vda,gpt1)",
        "fs": {"ext4": "ext2"}.get(host.root_fs, host.root_fs),
        "fs_uuid": host.root_uuid,
        "fs_label": "",
        "partuuid": "11111111-2222-4333-8444-555555555555",
        "partmap": "gpt",
        "gpt_parttype": "0fc63daf-8483-4772-8e79-3d69d8477de4",
        "abstraction": "",
        "cryptodisk_uuid": "",
        "hints_string": "--hint-bios=hd0,gpt1 --hint-efi=hd0,gpt1 --hint-baremetal=ahci0,gpt1",
        "compatibility_hint": "hd0,gpt1",
        "bios_hints": "hd0,gpt1",
        "efi_hints": "hd0,gpt1",
        "baremetal_hints": "ahci0,gpt1",
    }
    cases = "".join(f"    {name}) echo '{answer}' ;;\n" for name, answer in answers.items() if answer)
    empty = "|".join(name for name, answer in answers.items() if not answer)
    return f"""#!/bin/sh
target=fs
while [ $# -gt 0 ]; do
    case $1 in
    -t) shift; target=$1 ;;
    --target=*) target=${{1#--target=}} ;;
    -V|--version) echo 'grub-probe (GRUB) 2.06-13+deb12u1'; exit ;;
    esac
    shift
done
case $target in
{cases}    {empty}) ;;
    *) echo "grub-probe: error: unknown target: $target." >&2; exit 1 ;;
esac
"""


def _removed(scenario: Scenario) -> list[str]:
    """Where the programs lie that the machine does not have."""
    folders = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin")
    names = [f"{folder}/{name}" for name in scenario.host.removed for folder in folders]
    there = scenario.snapshot(names)
    missing = [n for n in scenario.host.removed if not any(p.endswith(f"/{n}") for p in there)]
    if missing:
        raise RuntimeError(f"the tree has no {missing[0]} to remove")
    return list(there)


def _bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


Play = Callable[[Host], Scenario]
"""Starts a scenario that ends with the test: what the fixture `play` gives."""
