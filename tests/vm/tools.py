# SPDX-License-Identifier: Apache-2.0
"""Programs of a suite that few tests need, with the libraries that no image has: for a folder on the job disk."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.vm import image
from tests.vm.machine import run

LIBRARIES = "usr/lib/x86_64-linux-gnu"
USE = f"""
with_tools() {{ env PATH=/job/tools/usr/bin:$PATH LD_LIBRARY_PATH=/job/tools/{LIBRARIES} "$@"; }}
"""
"""What a script begins with that has them in /job/tools: `with_tools numactl …` runs one of them."""
PMDK = ("pmdk-tools", "libpmemobj1"), ("usr/bin/pmempool", f"{LIBRARIES}/libpmem*.so.1")
NUMACTL = ("numactl",), ("usr/bin/numactl", f"{LIBRARIES}/libnuma.so.1")
KDUMP = (
    ("kdump-tools", "makedumpfile"),
    (
        *("usr/sbin/kdump-config", "usr/share/kdump-tools/kdump-tools.conf", "usr/bin/makedumpfile"),
        *("usr/bin/file", "usr/share/misc/magic.mgc", "**/sbin/kexec"),
        *(f"**/lib{name}.so.*" for name in ("magic", "dw", "elf", "lzo2", "bz2", "xen*")),
    ),
)
QEMU = (
    ("qemu-system-x86",),
    (
        *("usr/bin/qemu-system-x86_64", "usr/lib64/ld-linux-x86-64.so.2"),
        f"{LIBRARIES}/lib*.so.*",
        *("usr/share/qemu/*.rom", "usr/share/qemu/*.bin", "usr/share/seabios/*.bin"),
    ),
)


def qemu_of(suite: str) -> list[str]:
    """The words that start a suite's QEMU on this host, with its own libraries and firmware. See `tools`."""
    folder = tools(suite, *QEMU)
    loader = [str(folder / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(folder / LIBRARIES)]
    firmware = [word for name in ("qemu", "seabios") for word in ("-L", str(folder / "usr/share" / name))]
    return [*loader, str(folder / "usr/bin/qemu-system-x86_64"), *firmware]


def tools(suite: str, packages: Sequence[str], files: Sequence[str]) -> Path:
    """Return a folder with these files (patterns) of these packages, made where the cache has none.

    Raises RuntimeError with the output of the tool that failed.
    """
    key = hashlib.sha256(repr((suite, packages, files)).encode()).hexdigest()[:12]
    folder = image.cache() / "tools"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{suite}-{key}"
    with image._lock(folder / "lock"):
        if not made.is_dir():
            _make(made, suite, packages, files)
    return made


def _make(made: Path, suite: str, packages: Sequence[str], files: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="emupmem-tools-") as name:
        tree, half = Path(name) / "tree", made.with_suffix(".new")
        unpack(suite, packages, tree)
        shutil.rmtree(half, ignore_errors=True)
        for pattern in files:
            found = sorted(tree.glob(pattern))
            if not found:
                raise RuntimeError(f"no {pattern} in {' '.join(packages)} of {suite}")
            for file in found:
                target = half / file.relative_to(tree)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
        half.rename(made)


def unpack(suite: str, packages: Sequence[str], tree: Path) -> None:
    """Unpack packages of a suite, with all that they depend on, into a folder that is not there yet.

    Nothing of them is set up. Raises RuntimeError with mmdebstrap's last words.
    """
    environment = [f"{n}={v}" for n, v in image._environment().items()]
    argv = ["mmdebstrap", "--mode=root", "--variant=extract", f"--include={','.join(packages)}", "--quiet"]
    argv += ['--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Languages "none"']
    argv += ['--aptopt=APT::Install-Recommends "false"', suite, str(tree), image.mirror()]
    run(["env", "-i", *environment, *argv])
