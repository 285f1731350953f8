# SPDX-License-Identifier: Apache-2.0
"""vNVDIMMs in the real QEMU, started by `emupmem qemu run`, seen by real kernels, found in the file afterwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from emupmem.model import MIB
from tests.vm.kernel import boot_kernel

WAIT = """
until [ -b /dev/pmem0 ]; do sleep 1; done
"""
LOOK = (
    WAIT
    + """
echo size $(( $(cat /sys/block/pmem0/size) * 512 ))
echo domain $(cat /sys/bus/nd/devices/region0/persistence_domain)
echo provider $(cat /sys/bus/nd/devices/region0/../provider)
echo was $(head -c 12 /dev/pmem0)
"""
)


def started(suite: str, options: list[str], script: str, modules: tuple[str, ...]) -> dict[str, str]:
    """Boot with the device added, run the script, and give what it echoed: first word -> rest."""
    launcher = [sys.executable, "-m", "emupmem", "qemu", "run", *options, "--"]
    out = boot_kernel(suite, memory="1G", script=f"set -e\n{script}", modules=modules, launcher=launcher)
    return {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in out.splitlines()}


@contextmanager
def answered(file: Path) -> Iterator[None]:
    """Somebody who shares the file: once the guest's words are in it, there are others behind them."""
    over = threading.Event()

    def head(file: Path) -> bytes:
        with file.open("rb") as stream:
            return stream.read(12)

    def answer() -> None:
        while not over.wait(0.2):
            if file.exists() and head(file) == b"first guest.":
                with file.open("r+b") as stream:
                    stream.seek(4096)
                    stream.write(b"from outside")
                return

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


LISTEN = """
while :; do
    echo 3 > /proc/sys/vm/drop_caches
    heard=$(dd if=/dev/pmem0 bs=4096 skip=1 count=1 2>/dev/null | head -c 12)
    [ -z "$heard" ] || break
    sleep 1
done
echo heard $heard
"""


def write(text: str) -> str:
    return f"printf '{text}' | dd of=/dev/pmem0 bs=4096 conv=notrunc,fsync 2>/dev/null\n"


@pytest.mark.parametrize(
    ("suite", "persistence", "domain"),
    [
        pytest.param(
            *("bookworm", "cpu", "cpu_cache"),
            marks=pytest.mark.vm(image="bookworm bios", boots=1, seconds=30),
        ),
        pytest.param(
            *("trixie", "mem-ctrl", "memory_controller"),
            marks=pytest.mark.vm(image="trixie uefi", boots=4, seconds=80),
        ),
        pytest.param(
            *("forky", "cpu", "cpu_cache"),
            marks=pytest.mark.vm(image="forky bios", boots=1, seconds=30),
        ),
    ],
)
def test_what_a_guest_writes_is_in_the_file_and_in_the_next_guest(
    tmp_path: Path, suite: str, persistence: str, domain: str
) -> None:
    file = tmp_path / "pmem.img"
    nvdimm = ("nfit", "nd_pmem")
    with answered(file):
        first = started(
            suite,
            ["--pmem", "256M", "--pmem-file", str(file), "--persistence", persistence],
            LOOK + write("first guest.") + LISTEN,
            nvdimm,
        )
    assert first["heard"] == "from outside", "what others write is visible at once"
    assert first["size"] == str(256 * MIB)
    assert first["domain"] == domain
    assert first["provider"] == "ACPI.NFIT"
    assert first["was"] == ""
    with file.open("rb") as stream:
        assert stream.read(12) == b"first guest."
    assert file.stat().st_size == 256 * MIB
    assert file.stat().st_blocks * 512 < 16 * MIB, "sparse still"
    if suite != "trixie":
        return
    # the next guests: read-only, with a private copy, by virtio-pmem
    refused = "dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=notrunc,fsync && exit 9 || true\n"
    only = started(suite, ["--backend", str(file), "--readonly"], LOOK + refused, nvdimm)
    assert only["was"] == "first guest."
    private = started(suite, ["--backend", str(file), "--share", "off"], LOOK + write("not to keep."), nvdimm)
    assert private["was"] == "first guest."
    virtio = started(
        suite,
        ["--backend", str(file), "--device", "virtio-pmem"],
        WAIT + "echo was $(head -c 12 /dev/pmem0)\n" + write("third guest."),
        ("virtio_pci", "virtio_pmem", "nd_pmem"),
    )
    assert virtio["was"] == "first guest.", "what the private guest wrote is gone"
    with file.open("rb") as stream:
        assert stream.read(12) == b"third guest."
