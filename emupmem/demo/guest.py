# SPDX-License-Identifier: Apache-2.0
"""One boot of the demo's guest in QEMU: what its script says is passed on as it comes."""

from __future__ import annotations

import codecs
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from emupmem.demo import recipe
from emupmem.model import EmupmemError
from emupmem.record import record
from emupmem.system.machine import Machine
from emupmem.vm.backend import PROGRAM, qemu_program, qemu_version

# QEMU 7.2 emulates cmpxchg16b wrongly with several threads; the other features only cost time when emulated.
FEATURES = "max,-cx16,-la57,-smap,-avx,-avx2,-aes,-pclmulqdq"
SLOW_COPIES_BEFORE = (8, 0)
"""QEMU 7.2 makes "fast" copies (erms) byte by byte. Without them Linux 6.1 hangs in QEMU 8.2, 10.0 and 11.1."""
WITH_KVM = ("-accel", "kvm", "-cpu", "host", "-smp", "1")
MARK = re.compile(r"\x1e(?:start|end (\d+))\n")
LAST = 20
"""Lines of the console that are told where the guest is lost."""


def emulated(version: tuple[int, int], svm: bool = False) -> tuple[str, ...]:
    """QEMU's arguments for one CPU that it emulates; with `svm` KVM can be used in the guest.

    `version` is QEMU's own, (7, 2).
    """
    less = [] if svm else ["-svm"]
    less += ["-erms"] if version < SLOW_COPIES_BEFORE else []
    return ("-accel", "tcg,thread=single,tb-size=96", "-cpu", ",".join([FEATURES, *less]), "-smp", "1")


@record
class DemoGuest:
    """The guest's own disk, and the one with what it shall do."""

    disk: Path
    job: Path
    kvm: bool = False

    def boot(self, live: Callable[[str], None], from_outside: tuple[Path, Path] | None = None) -> int:
        """Boot it, pass on what its script says, wait until it is off; the script's exit status.

        `from_outside` is a kernel and its initramfs, started without the disk's own loader. Raises EmupmemError
        where the script does not come to its end.
        """
        with tempfile.TemporaryDirectory(prefix="emupmem-demo-") as folder:
            console = Path(folder) / "console"
            argv = [*self._argv(from_outside), "-serial", f"file:{console}", "-serial", "stdio"]
            child = subprocess.Popen(
                [_program("setpriv"), "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            try:
                status = _listen(child, live)
                child.wait()
            finally:
                child.kill()
                child.wait()
            if status is None:
                text = console.read_text(errors="replace") if console.exists() else ""
                told = "\n".join(text.strip().splitlines()[-LAST:])
                raise EmupmemError(
                    f"the guest did not come to its end; the last lines of its console: {told}"
                )
            return status

    def _argv(self, from_outside: tuple[Path, Path] | None) -> list[str]:
        qemu = qemu_program(Machine(), PROGRAM)
        argv = [qemu, "-name", "emupmem-demo", "-nodefaults", "-display", "none", "-vga", "std"]
        argv += WITH_KVM if self.kvm else emulated(qemu_version(Machine(), qemu))
        argv += ["-machine", "pc", "-no-reboot"]
        argv += ["-m", recipe.MEMORY, "-device", "virtio-rng-pci"]
        # Not reserved: the guest touches a few hundred MiB of them.
        argv += ["-object", f"memory-backend-ram,id=ram,size={recipe.MEMORY},reserve=off"]
        argv += ["-machine", "memory-backend=ram"]
        for path in (self.disk, self.job):
            argv += ["-drive", f"file={path},format=raw,if=virtio"]
        if from_outside is not None:
            kernel, initrd = map(str, from_outside)
            words = f"root=UUID={recipe.ROOT_UUID} ro console=ttyS0"
            argv += ["-kernel", kernel, "-initrd", initrd, "-append", words]
        return argv


def _program(name: str) -> str:
    found = Machine().find(name)
    if found is None:
        raise EmupmemError(f"{name} is not installed")
    return found


def _listen(child: subprocess.Popen[bytes], live: Callable[[str], None]) -> int | None:
    """Pass on what comes between the marks, until nothing comes any more; None without the mark of the end."""
    assert child.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending, on, status = "", False, None
    while data := os.read(child.stdout.fileno(), 1 << 16):
        pending += decoder.decode(data)
        while found := MARK.search(pending):
            if on:
                live(pending[: found.start()])
            on, status = found[1] is None, None if found[1] is None else int(found[1])
            pending = pending[found.end() :]
        ready, mark, rest = pending.partition("\x1e")
        if on and ready:
            live(ready)
        pending = mark + rest
    child.stdout.close()
    return status
