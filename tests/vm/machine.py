# SPDX-License-Identifier: Apache-2.0
"""Boot whole guests in QEMU and run jobs in them.

A job is a bash script.  It travels to the guest on a second disk, its output comes back over the
second serial port, and its exit status with it.  See `Machine.boot`.
"""

from __future__ import annotations

import codecs
import os
import re
import secrets
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from emupmem.demo.guest import emulated
from emupmem.system.machine import Machine as Host
from emupmem.vm.backend import PROGRAM, qemu_program, qemu_version
from tests import PROJECT
from tests.vm import progress, warm

Content = Path | bytes | str
Live = Callable[[str], None]

# Code and variables of OVMF, newest naming first.
FIRMWARE_FILES = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
)

LAST_LINES = 40
BOOT_SECONDS = 3600.0
"""The limit of one boot with its script: some twenty times what the longest takes on an idle machine."""
SECTOR = 512
MIB = 1 << 20
ORDERLY: Mapping[str, str] = {"orderly": ""}
"""A job file: between scripts all units are stopped, one by one. Without it processes are ended, disks unmounted."""


class LostMachine(Exception):
    """The guest did not answer: it hung, reset, switched itself off, or QEMU died.

    `console` and `output` hold everything it said on the first and the second serial port.
    """

    def __init__(self, reason: str, console: str, output: str) -> None:
        self.reason = reason
        self.console = console
        self.output = output
        super().__init__(
            f"{reason}\n--- last lines of the console\n{_tail(console)}"
            f"\n--- last lines of the output\n{_tail(output)}"
        )


@dataclass(frozen=True)
class JobResult:
    """What one script left behind.

    `status` is its exit status, or None when the power was cut or the guest reset under it.
    `output` is stdout and stderr together, `console` the kernel's and systemd's words, `seconds`
    the wall time from power on (or from the previous script's end) to the end of this script; a reset
    counts as that end when the next script starts.
    `files` are the files it put into /job/out, by path relative to that directory.
    """

    status: int | None
    output: str
    console: str
    seconds: float
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """A finished disk image: a directory holding `disk.raw`, `vmlinuz`, `initrd`, `modules/` and `python/`."""

    suite: str
    firmware: str
    path: Path

    @property
    def disk(self) -> Path:
        """The raw disk, never written to: machines put an overlay on it."""
        return self.path / "disk.raw"

    @property
    def kernel(self) -> Path:
        """The kernel the disk boots."""
        return self.path / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initramfs the disk boots."""
        return self.path / "initrd"

    @property
    def modules(self) -> Path:
        """The part of /lib/modules/VERSION kept for `tests.vm.kernel`."""
        return self.path / "modules"

    @property
    def python(self) -> Path:
        """The guest's Python, to be run here: see `bytecode`."""
        return self.path / "python"


class Machine:
    """A guest with its own overlay of an image: what it writes stays from boot to boot.

    `memory` is QEMU's -m value ("6G", "2G,slots=2,maxmem=4G"); more than the host has is fine.
    `nodes` splits it into NUMA nodes of these sizes ("4G", "4G").  `qemu_args` are appended as
    they are.  `source` is the project whose `emupmem` package the guest can import (None: none).
    With `svm` a guest in this guest can have KVM: AMD's virtualisation, emulated as well.
    """

    def __init__(
        self,
        image: Image,
        *,
        memory: str = "6G",
        nodes: Sequence[str] = (),
        qemu_args: Sequence[str] = (),
        source: Path | None = PROJECT,
        svm: bool = False,
    ) -> None:
        self.image = image
        self.memory = memory
        self.nodes = tuple(nodes)
        self.qemu_args = tuple(qemu_args)
        self.source = source
        self.svm = svm
        self.directory = Path(tempfile.mkdtemp(prefix="emupmem-vm-"))
        self.overlay = self.directory / "overlay.qcow2"
        self.variables = self.directory / "vars.fd"
        backing = ["-F", "raw", "-b", str(image.disk.resolve())]
        run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(self.overlay)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Throw the overlay and everything else of this machine away."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def boot(
        self,
        script: str,
        files: Mapping[str, Content] | None = None,
        *,
        timeout: float = BOOT_SECONDS,
        power_cut: str | None = None,
        live: Live | None = None,
        last: bool = False,
    ) -> JobResult:
        """Boot through firmware and boot loader, run one bash script as root, power off.

        `files` appear under /job by name (a Path may be a directory).  `timeout` is in seconds, for
        the whole boot.  As soon as the output matches the regular expression `power_cut`,
        QEMU is killed, which loses what the guest did not flush; the status is then None.  `live`
        gets the output as it comes.  After the `last` boot of a machine nothing is left to look at but what the
        script said: it is not shut down, which takes three seconds, but switched off.  Raises LostMachine.
        """
        run_ = self._run([script], files, timeout, power_cut, live, last)
        return run_[0]

    def boots(
        self,
        scripts: Sequence[str],
        files: Mapping[str, Content] | None = None,
        *,
        timeout: float = BOOT_SECONDS,
        live: Live | None = None,
        last: bool = False,
    ) -> list[JobResult]:
        """Run one script per boot in a single QEMU process, with warm reboots between them.

        `timeout` is for each of them.  RAM keeps its content where the firmware leaves it alone.  A
        script that resets the guest under itself (`echo b > /proc/sysrq-trigger`) has the status None.
        `last` is of the last one, see `boot`.  Raises LostMachine.
        """
        return self._run(list(scripts), files, timeout, None, live, last)

    def _run(
        self,
        scripts: Sequence[str],
        files: Mapping[str, Content] | None,
        timeout: float,
        power_cut: str | None,
        live: Live | None,
        last: bool,
    ) -> list[JobResult]:
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
            disk = Path(scratch) / "job.img"
            given = {
                **project_files(self.source),
                **bytecode(self.image, self.source, self.directory / "pyc"),
                **(files or {}),
            }
            make_job_disk(disk, token, scripts, given)
            drives = [
                *drive(self.overlay, "qcow2"),
                *drive(disk, "raw"),
                *firmware_args(self.image.firmware, self.variables),
            ]
            if len(scripts) == 1:
                drives.append("-no-reboot")
            argv = [*qemu(self.memory, self.nodes, self.svm), *drives, *self.qemu_args]
            guest = progress.Boot(f"{self.image.suite} {self.image.firmware}")
            results = converse(argv, token, len(scripts), timeout, power_cut, live, guest=guest, last=last)
            out = fetch(disk)
        return [*results[:-1], replace(results[-1], files=out)]


def project_files(source: Path | None) -> dict[str, Content]:
    """Return the job files that make a project's `emupmem` package importable in the guest.

    With its metadata, so that importlib.metadata knows the version there as well.
    """
    if source is None or not (source / "emupmem").is_dir():
        return {}
    found = re.search(r'^__version__\s*=\s*"([^"]+)"', _read(source / "emupmem/__init__.py"), re.M)
    metadata = f"Metadata-Version: 2.1\nName: emupmem\nVersion: {found[1] if found else '0'}\n"
    return {
        "src/emupmem": source / "emupmem",
        "src/emupmem.dist-info/METADATA": metadata,
        "warm": warm.SHELL,
        "warm.py": Path(warm.__file__),
    }


# Runs in the guest's Python: as PYTHONPYCACHEPREFIX wants it, for sources that lie at /job/src there.
COMPILE = """
import pathlib, py_compile, sys
source, target = map(pathlib.Path, sys.argv[1:])
for file in (source / "emupmem").rglob("*.py"):
    name = file.relative_to(source)
    made = target / name.with_suffix("." + sys.implementation.cache_tag + ".pyc")
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(file), str(made), "/job/src/" + str(name), True, invalidation_mode=mode)
"""


def bytecode(image: Image, source: Path | None, made: Path) -> dict[str, Content]:
    """Return the job files that spare the guest to compile `emupmem`: made once, here, by its own Python.

    An emulated processor needs five seconds for that, this one half of one.
    """
    if source is None or not (source / "emupmem").is_dir():
        return {}
    if not made.is_dir():
        run_python(image, COMPILE, str(source), str(made))
    return {"pyc": made}


def run_python(image: Image, code: str, *words: str) -> None:
    """Run code here in the guest's own Python. Raises RuntimeError with its last words."""
    library = str(image.python / "lib")
    loader = [f"{library}/ld-linux-x86-64.so.2", "--library-path", library, str(image.python / "python3")]
    names = {"PYTHONHOME": str(image.python), "PATH": "/nonexistent", "LC_ALL": "C.UTF-8"}
    given = [f"{name}={value}" for name, value in names.items()]
    run(["env", "-i", *given, *loader, "-S", "-B", "-c", code, *words])


def make_job_disk(disk: Path, token: str, scripts: Sequence[str], files: Mapping[str, Content]) -> None:
    """Write the job's scripts and files as an ext2 file system the guest mounts at /job."""
    with tempfile.TemporaryDirectory(dir=disk.parent) as directory:
        tree = Path(directory)
        tree.chmod(0o755)
        (tree / "out").mkdir()
        (tree / "token").write_text(f"{token}\n")
        for number, script in enumerate(scripts):
            (tree / f"script.{number}").write_text(script)
        for name, content in files.items():
            _put(tree / name, content)
        with disk.open("wb") as file:
            file.truncate(_tree_size(tree) * 2 + 64 * MIB)
        # Without a journal, so that debugfs can read it after a power cut.
        options = ["-O", "^has_journal", "-E", "root_owner=0:0,lazy_itable_init=0"]
        run(["mke2fs", "-q", "-F", "-t", "ext4", *options, "-d", str(tree), str(disk)])


def fetch(disk: Path) -> dict[str, bytes]:
    """Read the files below /out of a job disk, by path relative to it."""
    with tempfile.TemporaryDirectory(dir=disk.parent) as directory:
        # debugfs complains about ownership when it is not root: the content is what counts.
        run(["debugfs", "-R", f"rdump /out {directory}", str(disk)])
        out = Path(directory) / "out"
        found = sorted(path for path in out.rglob("*") if path.is_file())
        return {str(path.relative_to(out)): path.read_bytes() for path in found}


def drive(path: Path, form: str) -> list[str]:
    """Return QEMU's arguments for one virtio disk; the n-th is /dev/vd(a+n) in the guest."""
    return ["-drive", f"file={path},format={form},if=virtio,cache=writeback,discard=unmap"]


def firmware_args(firmware: str, variables: Path) -> list[str]:
    """Return QEMU's arguments for "bios", "uefi" or "sdboot"; `variables` is made when it is missing.

    Raises ValueError for another firmware and FileNotFoundError when OVMF is not installed.
    """
    if firmware == "bios":
        return []
    if firmware not in ("uefi", "sdboot"):
        raise ValueError(f"no such firmware: {firmware}")
    pairs = [pair for pair in FIRMWARE_FILES if Path(pair[0]).exists()]
    if not pairs:
        raise FileNotFoundError("OVMF is not installed (tests/vm/deps.sh)")
    code, template = pairs[0]
    if not variables.exists():
        shutil.copyfile(template, variables)
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
    ]


@cache
def acceleration(svm: bool = False) -> tuple[str, ...]:
    """QEMU's arguments for its processor.

    One CPU and no cmpxchg16b: QEMU 7.2's TCG corrupts flags around that instruction, and one boot
    in ten then dies in the kernel's slab allocator.  /dev/kvm may exist and hang: it is not used.
    The other features only cost time when they are emulated: a page table level, wide registers, modules
    (kvm, crypto) that every boot would load and test, and "fast" copies that are made byte by byte.
    Its memory for translated code (MiB) is small, so that it is emptied now and then: a page that holds the code of
    an earlier boot is written to a hundred times slower, and a warm restart takes ten times as long.
    """
    return emulated(qemu_version(Host(), qemu_program(Host(), PROGRAM)), svm)


def qemu(memory: str, nodes: Sequence[str] = (), svm: bool = False) -> list[str]:
    """Return QEMU's command line without disks: memory, CPU, no network.

    There is a graphics card, though nobody looks at it: without one GRUB hangs under SeaBIOS.
    """
    sizes = list(nodes) or [memory.split(",")[0]]
    argv = [PROGRAM, "-name", "emupmem", "-nodefaults", "-display", "none", "-vga", "std"]
    argv += [*acceleration(svm), "-machine", "pc", "-m", memory, "-device", "virtio-rng-pci"]
    for number, size in enumerate(sizes):
        # Not reserved: a guest of 20 GiB touches a few hundred MiB of them.
        argv += ["-object", f"memory-backend-ram,id=ram{number},size={size},reserve=off"]
        argv += ["-numa", f"node,memdev=ram{number}"] if nodes else ["-machine", "memory-backend=ram0"]
    return argv


def converse(
    argv: Sequence[str],
    token: str,
    count: int,
    timeout: float,
    power_cut: str | None = None,
    live: Live | None = None,
    *,
    guest: progress.Boot,
    last: bool = False,
) -> list[JobResult]:
    """Run QEMU until the guest has run `count` scripts and switched itself off, if it is not the `last` boot.

    The guest frames each script's output on the second serial port with the lines that
    `_Stream` knows; `guest` tells people about it.  Returns one result per script; raises LostMachine.
    """
    with tempfile.TemporaryDirectory(prefix="emupmem-qemu-") as directory:
        console = Path(directory) / "console"
        errors = Path(directory) / "errors"
        full = [*argv, "-serial", f"file:{console}", "-serial", "stdio"]
        # QEMU must not outlive this process, however that ends.
        full = ["setpriv", "--pdeathsig", "KILL", *full]
        stream = _Stream(token, power_cut, live, count if last else None)
        reason = ""
        before = os.times()
        with errors.open("wb") as stderr:
            process = subprocess.Popen(full, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
            try:
                reason = _listen(process, stream, timeout, guest, console)
            finally:
                process.kill()
                process.wait()
                if process.stdout:
                    process.stdout.close()
        after = os.times()
        guest.off(sum(after[2:4]) - sum(before[2:4]))
        said = console.read_text(errors="replace") if console.exists() else ""
        if not reason and process.returncode != 0 and not stream.cut:
            reason = f"QEMU failed: {errors.read_text(errors='replace').strip()}"
        if not reason and len(stream.ended) < count and not stream.cut:
            reason = f"the guest went off after {len(stream.ended)} of {count} scripts"
        if reason:
            raise LostMachine(reason, said, stream.text)
        return stream.results(said)


def _listen(
    process: subprocess.Popen[bytes],
    stream: _Stream,
    timeout: float,
    guest: progress.Boot,
    console: Path,
) -> str:
    """Feed the stream until QEMU ends or the power is cut; return why the machine is lost, or ""."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    guest.power_on(process.pid)
    while not stream.cut:
        left = deadline - time.monotonic()
        if left <= 0:
            return (
                f"no end after {timeout:.0f} s (the guest hangs, or this machine is very slow: "
                f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs)"
            )
        if not select.select([process.stdout], [], [], min(left, progress.QUIET))[0]:
            guest.alive(progress.stage(console, stream.said()))
            continue
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            process.wait(timeout=timeout)
            return ""
        stream.feed(data)
        for event, status in stream.events():
            _tell(guest, event, status)
            deadline = time.monotonic() + timeout
    return ""


def _tell(guest: progress.Boot, event: str, status: int | None) -> None:
    """Pass on what the stream saw: a script begins, ends, or a boot is over without its end."""
    if event == "start":
        guest.step("the script runs")
    elif event == "restart":
        guest.power_on()
    else:
        guest.over("power cut or reset" if status is None else f"done with status {status}")


class _Stream:
    """The second serial port: output of scripts between `RS token start N` and `RS token end N STATUS`.

    `cut` says that the power goes now: at a match of `power_cut`, or after `count` scripts if that is given.
    """

    def __init__(
        self, token: str, power_cut: str | None, live: Live | None, count: int | None = None
    ) -> None:
        self.mark = re.compile(rf"\x1e{token} (start|end) (\d+)(?: (\d+))?\n")
        self.hold = 1 + len(token) + len(" start 999 999\n")
        self.power_cut = re.compile(power_cut) if power_cut else None
        self.live = live
        self.count = count
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pending = ""
        self.text = ""
        self.current: int | None = None
        self.output: dict[int, str] = {}
        self.ended: dict[int, tuple[int | None, float]] = {}
        self.cut = False
        self.last = time.monotonic()
        self.seen: list[tuple[str, int | None]] = []

    def events(self) -> list[tuple[str, int | None]]:
        """What happened since the last call: "start", or "end" with its status."""
        seen, self.seen = self.seen, []
        return seen

    def said(self) -> str:
        """What the script that runs now has said."""
        return "" if self.current is None else self.output[self.current]

    def feed(self, data: bytes) -> None:
        """Take some bytes: split marks from output, pass the output on, watch for the power cut."""
        self.pending += self.decoder.decode(data)
        while found := self.mark.search(self.pending):
            self._say(self.pending[: found.start()])
            self.pending = self.pending[found.end() :]
            self._marked(found)
        # A mark may still be incomplete at the end: keep everything from its first character.
        start = self.pending.rfind("\x1e", max(0, len(self.pending) - self.hold))
        ready = len(self.pending) if start < 0 else start
        self._say(self.pending[:ready])
        self.pending = self.pending[ready:]

    def _marked(self, found: re.Match[str]) -> None:
        number = int(found[2])
        if found[1] == "start":
            if self.current is not None:  # it never came to its end: the guest reset
                self._end(self.current, None)
            self.current = number
            self.output[number] = ""
            if number:
                self.seen.append(("restart", None))
            self.seen.append(("start", None))
        else:
            self._end(number, int(found[3]))
            self.cut = number + 1 == self.count

    def _end(self, number: int, status: int | None) -> None:
        now = time.monotonic()
        self.ended[number] = (status, now - self.last)
        self.seen.append(("end", status))
        self.last = now
        self.current = None

    def _say(self, text: str) -> None:
        if not text or self.current is None:
            return
        self.text += text
        self.output[self.current] += text
        if self.live:
            self.live(text)
        if self.power_cut and self.power_cut.search(self.output[self.current]):
            self._end(self.current, None)
            self.cut = True

    def results(self, console: str) -> list[JobResult]:
        """Return one result per script that began."""
        return [
            JobResult(status, self.output.get(number, ""), console, seconds)
            for number, (status, seconds) in sorted(self.ended.items())
        ]


def run(argv: Sequence[str], *, text: str = "") -> str:
    """Run a host command with `text` on its stdin, return its stdout; RuntimeError has its last words."""
    # mke2fs and its kin live in sbin, which is not in everybody's PATH.
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    done = subprocess.run(
        list(argv),
        check=False,
        env={**os.environ, "PATH": path},
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}\n{_tail(done.stderr)}")
    return done.stdout


def _put(target: Path, content: Content) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path) and content.is_dir():
        shutil.copytree(content, target, ignore=shutil.ignore_patterns("__pycache__"))
    elif isinstance(content, Path):
        shutil.copy(content, target)
    else:
        target.write_bytes(content.encode() if isinstance(content, str) else content)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _tree_size(tree: Path) -> int:
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LAST_LINES:])
