# SPDX-License-Identifier: Apache-2.0
"""Boot a kernel alone: busybox as its initramfs, and user space in seconds.

For logs as a kernel really prints them, and for tests that need no distribution.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.vm import progress
from tests.vm.image import image
from tests.vm.machine import BOOT_SECONDS, Image, converse, firmware_args, qemu, run

BUSYBOX = Path("/bin/busybox")
TOKEN = "kernel"
MODULES = ("nd_pmem", "nd_e820")
# Which image of a suite the kernel is taken from: the one that the other tests build anyway.
KEPT = {"trixie": "uefi"}

# {modules} are insmod lines.  The pmem device appears asynchronously after its driver was loaded.
INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
{modules}
if [ -e /sys/bus/nd/devices/region0 ]; then
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        [ ! -e /sys/block/pmem0 ] || break
        sleep 1
    done
fi
stty -F /dev/ttyS1 raw -echo
printf '\036{token} start 0\n' >/dev/ttyS1
sh /script </dev/null >/dev/ttyS1 2>&1
printf '\036{token} end 0 %d\n' $? >/dev/ttyS1
# The port drains before the power goes.
stty -F /dev/ttyS1 raw -echo
poweroff -f
"""


def boot_kernel(
    suite: str,
    cmdline: str = "",
    *,
    memory: str = "6G",
    nodes: Sequence[str] = (),
    firmware: str = "bios",
    qemu_args: Sequence[str] = (),
    script: str = "dmesg",
    modules: Sequence[str] = MODULES,
    launcher: Sequence[str] = (),
    timeout: float = BOOT_SECONDS,
) -> str:
    """Boot the kernel of a suite with a command line, run a busybox script, return its output.

    `memory`, `nodes` and `qemu_args` are those of `tests.vm.machine.Machine`; `modules` are loaded
    first, with what they depend on; `launcher` are the words of a program that starts QEMU with the
    arguments that follow, in place of QEMU.  Raises LostMachine when the guest panics or takes more than
    `timeout` seconds, and RuntimeError when the script fails.
    """
    made = image(suite, KEPT.get(suite, "bios"))
    with tempfile.TemporaryDirectory(prefix="emupmem-kernel-") as directory:
        scratch = Path(directory)
        packed = initramfs(made, scratch, script, modules)
        argv = [
            *qemu(memory, nodes),
            *firmware_args(firmware, scratch / "vars.fd"),
            *("-kernel", str(made.kernel), "-initrd", str(packed), "-no-reboot"),
            # A panic reboots at once, and -no-reboot turns that into the machine's end.
            *("-append", f"console=ttyS0 panic=-1 {cmdline}".strip()),
            *qemu_args,
        ]
        argv = [*launcher, *argv[1:]] if launcher else argv
        (result,) = converse(argv, TOKEN, 1, timeout, guest=progress.Boot(f"{suite} kernel"))
    if result.status != 0:
        raise RuntimeError(f"the script's status is {result.status}\n{result.output}")
    return result.output


def initramfs(made: Image, scratch: Path, script: str, modules: Sequence[str]) -> Path:
    """Pack busybox, the modules and the script."""
    tree = scratch / "tree"
    for name in ("bin", "proc", "sys", "dev", "tmp", "lib"):
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin")
    lines = [f"insmod /lib/{_unpack(path, tree / 'lib')}" for path in _load_order(made, modules)]
    init = INIT.replace("{modules}", "\n".join(lines)).replace("{token}", TOKEN)
    (tree / "init").write_text(init)
    (tree / "init").chmod(0o755)
    (tree / "script").write_text(script)
    packed = scratch / "initramfs"
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with packed.open("wb") as file:
        argv = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
        subprocess.run(argv, input=names.encode(), stdout=file, cwd=tree, check=True)
    return packed


def _load_order(made: Image, modules: Sequence[str]) -> list[Path]:
    """Return the files of the modules and of all they depend on, dependencies first."""
    (directory,) = made.modules.iterdir()
    needs: dict[str, list[str]] = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        needs[name] = others.split()
    built_in = (directory / "modules.builtin").read_text().split()
    by_name = {_module(path): path for path in (*built_in, *needs)}
    order: list[str] = []
    for name in modules:
        path = by_name[name]
        # modules.dep lists what a module needs with the deepest last.
        order += [one for one in (*reversed(needs.get(path, [])), path) if one not in order]
    return [directory / path for path in order if path in needs]


def _module(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")


def _unpack(module: Path, target: Path) -> str:
    """Copy a module, uncompressed as busybox wants it, and return its new name."""
    name = f"{_module(module.name)}.ko"
    if module.suffix == ".xz":
        (target / name).write_bytes(lzma.decompress(module.read_bytes()))
    elif module.suffix == ".zst":
        run(["zstd", "-q", "-d", str(module), "-o", str(target / name)])
    else:
        shutil.copy(module, target / name)
    return name
