# SPDX-License-Identifier: Apache-2.0
"""`emupmem bench`: the loop loads what it says it does and writes nothing; what is not to be measured is refused.

How many ns a load takes is not judged here: it is another number on each machine.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from emupmem.device import latency as device_latency
from emupmem.model import MIB, EmupmemError
from emupmem.system import latency
from tests.cli.runner import Run
from tests.fake import FakeMachine, put
from tests.planner.test_far import NODE


def test_the_loop_loads_what_python_loads_and_leaves_it_as_it_was() -> None:
    order = latency.random_order()
    assert sorted(order) == list(range(0, latency.WINDOW, latency.STRIDE))
    content = os.urandom(latency.WINDOW)
    with latency.own_memory(None) as addresses:
        assert len(addresses) == latency.MOST // latency.WINDOW
        where = addresses[-1]
        ctypes.memmove(where, content, latency.WINDOW)
        ns, total = latency.walk(where, order)
        assert ctypes.string_at(where, latency.WINDOW) == content
    assert ns > 0
    assert total == sum(int.from_bytes(content[at : at + 8], "little") for at in order) % (1 << 64)


def test_the_page_of_the_loop_can_be_run_and_not_written() -> None:
    made = latency._routines()
    here = ctypes.addressof(ctypes.c_char.from_buffer(made.page))
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    rights = {tuple(int(x, 16) for x in words[0].split("-")): words[1] for words in lines}
    assert next(r for (low, high), r in rights.items() if low <= here < high) == "r-xp"


def test_a_processor_is_kept_and_given_back() -> None:
    before = os.sched_getaffinity(0)
    with latency.one_processor() as processor:
        assert os.sched_getaffinity(0) == {processor}
    assert os.sched_getaffinity(0) == before


def test_without_a_target_each_node_is_measured(run: Run, here: FakeMachine) -> None:
    found = run("bench", "--json").json
    assert [(r["target"], r["node"], r["times"]) for r in found["results"]] == [("node0", 0, 1.0)]
    (one,) = found["results"]
    assert 0 < one["low"] <= one["ns"] <= one["high"]
    assert one["loads"] == latency.MOST // latency.STRIDE
    assert "no slowness to be had in software" in found["notes"][0]
    put(here, "/proc/cpuinfo", "flags\t\t: fpu hypervisor\n")
    shown = run("bench", "node0")
    assert "ns a load (half of the windows" in shown.out
    assert "! this is a virtual machine" in shown.err


def test_a_processor_whose_node_has_no_memory(run: Run, here: FakeMachine) -> None:
    processor = min(os.sched_getaffinity(0))
    put(here, f"/sys/devices/system/cpu/cpu{processor}/node7/x", "")
    put(here, f"{NODE}/has_memory", "0\n")
    found = run("bench", "--json").json
    assert [r["target"] for r in found["results"]] == ["node0"]
    assert found["notes"][0] == f"node 7, where processor {processor} is, has no memory of its own"


def dax_device(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, driver: str = "device_dax") -> Path:
    """A DAX device of 4 MiB, which is a file."""
    bus = "/sys/bus/dax"
    for name, value in (
        ("resource", "0x100000000"),
        ("size", 4 * MIB),
        ("align", 2 * MIB),
        ("target_node", 0),
    ):
        put(machine, f"{bus}/devices/dax0.0/{name}", f"{value}\n")
    put(machine, f"{bus}/drivers/{driver}/dax0.0", "")
    real = FakeMachine.entry_kind
    monkeypatch.setattr(
        FakeMachine,
        "entry_kind",
        lambda self, name: "character" if name == "/dev/dax0.0" else real(self, name),
    )
    return put(machine, "/dev/dax0.0", os.urandom(4 * MIB))


def test_a_dax_device_is_only_read(run: Run, here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    file = dax_device(here, monkeypatch)
    put(here, "/proc/cmdline", "ro memmap=4M%4G-1+0xefffffff\n")
    before = file.read_bytes()
    file.chmod(0o400)
    found = run("bench", "/dev/dax0.0", "--json").json
    assert [(r["target"], r["node"]) for r in found["results"]] == [("node0", 0), ("/dev/dax0.0", 0)]
    assert found["results"][1]["loads"] == 4 * MIB // latency.STRIDE
    assert "/dev/dax0.0 is RAM of node 0, as fast as the rest of it" in found["notes"]
    assert file.read_bytes() == before


def test_a_file_is_measured_where_it_has_data(
    run: Run, here: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_latency, "is_dax_file", lambda path: True)
    file = here.root / "sample"
    with file.open("wb") as opened:
        opened.seek(8 * MIB)
        opened.write(os.urandom(3 * MIB))
        opened.truncate(100 * MIB)
    found = run("bench", "/sample", "--json").json["results"][1]
    assert (found["loads"], found["node"]) == (3 * MIB // latency.STRIDE, None)
    put(here, "/hole", b"")
    os.truncate(here.root / "hole", 64 * MIB)
    refused = run("bench", "/hole")
    assert refused.status == 1
    assert refused.err.splitlines()[0] == (
        "emupmem: /hole has less than 2 MiB of data: nothing of a hole is in that memory"
    )
    assert "dd if=/dev/urandom of=FILE" in refused.err


REFUSED = [
    ("/dev/none", "/dev/none is not there", "name a node (node1), a DAX device"),
    (
        "/etc",
        "/etc is a folder",
        "name a file in it with some MiB of data: dd if=/dev/urandom of=/etc/sample",
    ),
    ("/etc/default/grub", "/etc/default/grub is not on a DAX mount", "emupmem mount makes one"),
    ("/log.fifo", "/log.fifo is no memory to measure", "name a node"),
    ("node3", "node 3 has no memory", "nodes with memory: 0"),
]


@pytest.mark.parametrize(("target", "message", "hint"), REFUSED)
def test_what_is_not_to_be_measured(
    run: Run, here: FakeMachine, target: str, message: str, hint: str
) -> None:
    os.mkfifo(here.root / "log.fifo")
    done = run("bench", target)
    first, second = done.err.splitlines()
    assert (done.status, done.out) == (1, "")
    assert first.startswith(f"emupmem: {message}")
    assert second.strip().startswith(hint)


def test_a_block_device_and_what_kmem_has_are_refused(
    run: Run, here: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dax_device(here, monkeypatch, "kmem")
    done = run("bench", "/dev/dax0.0")
    assert (done.status, "emupmem bench node0 measures it" in done.err) == (1, True)
    monkeypatch.setattr(FakeMachine, "entry_kind", lambda self, name: "block")
    done = run("bench", "/dev/pmem0")
    assert done.status == 1
    assert "/dev/pmem0 is a block device: a program that maps it gets the page cache" in done.err
    assert "name a file on it" in done.err


def test_a_node_that_the_kernel_does_not_give_is_refused(run: Run, here: FakeMachine) -> None:
    put(here, f"{NODE}/has_memory", "0,900\n")
    done = run("bench", "node900")
    assert done.status == 1
    assert "cannot be had: " in done.err.splitlines()[0]
    assert "Mems_allowed_list" in done.err.splitlines()[1]


def test_a_full_node_is_refused_before_the_kernel_ends_programs(run: Run, here: FakeMachine) -> None:
    put(here, f"{NODE}/node0/meminfo", "Node 0 MemTotal: 999999 kB\nNode 0 MemFree:  65536 kB\n")
    done = run("bench")
    assert (done.status, done.err.splitlines()[0]) == (
        1,
        "emupmem: node 0 has 64 MiB free: 128 MiB are needed",
    )


def test_what_only_root_may_read_is_said(here: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*words: object) -> int:
        raise PermissionError(13, "Permission denied")

    dax_device(here, monkeypatch)
    monkeypatch.setattr("emupmem.device.latency.os.open", closed)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(EmupmemError, match="cannot be read: Permission denied") as caught:
        device_latency.measure(here, ["/dev/dax0.0"])
    assert caught.value.hint == "run it with sudo"


def test_what_cannot_be_mapped_is_named() -> None:
    descriptor = os.open("/", os.O_RDONLY)
    try:
        with (
            pytest.raises(EmupmemError, match="the folder cannot be mapped: ") as caught,
            latency.mapped_file(descriptor, "the folder", (0,), latency.WINDOW),
        ):
            pass
    finally:
        os.close(descriptor)
    assert caught.value.hint == "sudo dmesg may show why"


class _Forbidding:
    """A C library where nothing may be made executable."""

    def mprotect(self, *words: object) -> int:
        ctypes.set_errno(13)
        return -1


def test_where_the_loop_cannot_run_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    make = latency._routines.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(latency, "_libc", _Forbidding)
        with pytest.raises(EmupmemError, match="may not run here: Permission denied") as caught:
            make()
    assert "execmem" in caught.value.hint
    monkeypatch.setattr(
        "emupmem.system.latency.os.uname", lambda: os.uname_result(("Linux", "x", "6.1", "#1", "aarch64"))
    )
    with pytest.raises(EmupmemError, match="on x86-64 only, this is aarch64"):
        make()
