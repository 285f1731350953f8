# SPDX-License-Identifier: Apache-2.0
"""Soft reserved memory at every boot, on a model of the kernel's dax bus and memory blocks.

The model is written after do_id_store, dax_bus_match and unbind of drivers/dax/bus.c, dev_dax_kmem_probe of
drivers/dax/kmem.c and state_store of drivers/base/memory.c (Linux 6.12). The real ones are in tests/vm/test_vm_soft.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emupmem.device import at_boot, soft, unit
from emupmem.device.boot_unit import recorded_kinds, unit_change
from emupmem.device.unit import BootDevice, BootMount
from emupmem.model import GIB, MIB, DeviceKind, EmupmemError, Span
from emupmem.system.machine import Machine
from emupmem.system.sysfs import read_dax_devices, read_memory_blocks, read_nodes
from tests.fake import FakeMachine, build, put

BLOCK = 128 * MIB
DAX = BootDevice(4 * GIB, 256 * MIB, DeviceKind.DAX)
MEMORY = BootDevice(4 * GIB, 256 * MIB, DeviceKind.MEMORY)
ITEM = "256M%4G-1+0xefffffff"
BUS, BLOCKS = "/sys/bus/dax", "/sys/devices/system/memory"


class Kernel:
    """What the kernel does with what is written to its files. `busy` are blocks that do not go offline."""

    def __init__(self, machine: FakeMachine, driver: str, policy: str = "offline") -> None:
        self.machine, self.policy = machine, policy
        self.busy: set[str] = set()
        self.refuses = ""
        self.gives_to_kmem = True  # since Linux 6.3
        self.loaded: list[str] = []
        self.wrote: list[tuple[str, str]] = []
        put(machine, f"{BLOCKS}/block_size_bytes", f"{BLOCK:x}\n")
        put(machine, f"{BLOCKS}/auto_online_blocks", f"{policy}\n")
        for name, value in (
            ("resource", hex(4 * GIB)),
            ("size", 256 * MIB),
            ("align", 2 * MIB),
            ("target_node", 1),
        ):
            put(machine, f"{BUS}/devices/dax0.0/{name}", f"{value}\n")
        for name in ("device_dax", "kmem"):
            for file in ("new_id", "unbind"):
                put(machine, f"{BUS}/drivers/{name}/{file}", "")
        if driver:
            self._bind(driver)

    def load(self, machine: Machine, module: str) -> None:
        """A module is loaded: its driver takes what has none and is of its type."""
        self.loaded.append(module)
        there = machine.exists(f"{BUS}/drivers/{module}")
        if module == "kmem" and there and self.gives_to_kmem and not read_dax_devices(self.machine)[0].driver:
            self._bind("kmem")

    def write(self, machine: Machine, name: str, text: str) -> None:
        self.wrote.append((name, text))
        folder, _, file = name.rpartition("/")
        if file == "auto_online_blocks":
            self.policy = text
            put(machine, name, f"{text}\n")
        if file == "new_id" and not self.refuses:
            self._bind(folder.rpartition("/")[2])
        elif file == "unbind":
            (machine.root / folder.lstrip("/") / text).unlink()
            for block in read_memory_blocks(machine, Span(4 * GIB, 5 * GIB)):
                assert block.state == "offline", "memory that is online would be lost until the next boot"
                self._gone(block.name)
        elif file == "state":
            block_name = folder.rpartition("/")[2]
            if text == "offline" and block_name in self.busy:
                raise EmupmemError(f"{text!r} cannot be written to {name}: Device or resource busy")
            put(machine, name, "offline" if text == "offline" else "online")
            put(
                machine,
                f"{folder}/valid_zones",
                {"offline": "Normal Movable", "online": "Normal"}.get(text, "Movable"),
            )

    def _bind(self, driver: str) -> None:
        put(self.machine, f"{BUS}/drivers/{driver}/dax0.0", "")
        for number in (32, 33) if driver == "kmem" else ():
            put(self.machine, f"{BLOCKS}/memory{number}/state", self.policy.partition("_")[0])
            zones = {"online": "Normal", "online_movable": "Movable"}.get(self.policy, "Normal Movable")
            put(self.machine, f"{BLOCKS}/memory{number}/valid_zones", zones)

    def _gone(self, block: str) -> None:
        for file in ("state", "valid_zones"):
            (self.machine.root / BLOCKS.lstrip("/") / block / file).unlink()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    made = build(tmp_path / "machine")
    put(made, "/proc/cmdline", f"ro memmap={ITEM}\n")
    monkeypatch.setattr(unit, "SECONDS", 0)
    return made


def kernel(machine: FakeMachine, patch: pytest.MonkeyPatch, driver: str, policy: str = "offline") -> Kernel:
    made = Kernel(machine, driver, policy)
    patch.setattr(soft, "write_sysfs", made.write)
    patch.setattr(soft, "_load", made.load)
    return made


@pytest.mark.parametrize("policy", ["offline", "online"])
@pytest.mark.parametrize("driver", ["", "device_dax", "kmem"])
def test_each_kind_from_each_beginning(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, driver: str, policy: str
) -> None:
    """Whatever driver the kernel chose, and whether it or udev took the memory as ordinary memory at once."""
    kernel(machine, monkeypatch, driver, policy)
    for _ in range(2):  # the second time nothing is left to do
        said: list[str] = []
        assert at_boot.boot(machine, [DAX], said.append) == 0, said
        assert said == ["/dev/dax0.0 is ready · 256 MiB, node 1 · emulated, volatile"]
        assert read_dax_devices(machine)[0].driver == "device_dax"
    for _ in range(2):
        said = []
        assert at_boot.boot(machine, [MEMORY], said.append) == 0, said
        assert said == ["256 MiB of dax0.0 is memory of the system, node 1, movable"]
    blocks = read_memory_blocks(machine, Span(4 * GIB, 5 * GIB))
    assert [(b.name, b.state, b.zones) for b in blocks] == [
        ("memory32", "online", "Movable"),
        ("memory33", "online", "Movable"),
    ]


@pytest.mark.parametrize("since_6_3", [True, False])
def test_memory_is_never_ordinary_in_between(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, since_6_3: bool
) -> None:
    """What came online as ordinary memory may be in use at once, and never goes offline again."""
    seen = kernel(machine, monkeypatch, "" if since_6_3 else "device_dax", "online")
    seen.gives_to_kmem, seen.busy = since_6_3, {"memory32", "memory33"}
    said: list[str] = []
    assert at_boot.boot(machine, [MEMORY], said.append) == 0, said
    assert seen.policy == "online", "the policy of the machine is as it was"
    assert [b.zones for b in read_memory_blocks(machine, Span(4 * GIB, 5 * GIB))] == ["Movable"] * 2


def test_the_policy_is_put_back_where_it_fails(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = kernel(machine, monkeypatch, "device_dax", "online")
    seen.refuses = "kmem"
    assert at_boot.boot(machine, [MEMORY], lambda line: None) == 1
    assert seen.policy == "online"


@pytest.mark.parametrize(
    ("words", "other", "loads"),
    [
        ("modprobe.blacklist=kmem", "", True),  # CXL memory, or a range that is not in the unit
        ("modprobe.blacklist=kmem", "kmem", False),
        ("", "", False),
    ],
)
def test_what_is_not_ours_gets_kmem_when_ours_have_theirs(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, words: str, other: str, loads: bool
) -> None:
    seen = kernel(machine, monkeypatch, "")
    put(machine, "/proc/cmdline", f"ro memmap={ITEM} {words}\n")
    put(machine, f"{BUS}/devices/dax1.0/resource", f"{8 * GIB:#x}\n")
    if other:
        put(machine, f"{BUS}/drivers/{other}/dax1.0", "")
    assert at_boot.boot(machine, [DAX], lambda line: None) == 0
    assert read_dax_devices(machine)[0].driver == "device_dax"
    assert ("kmem" in seen.loaded) is loads


def test_dax_devices_have_their_driver_before_kmem_is_loaded(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[DeviceKind] = []

    def set_up(machine: Machine, one: BootDevice) -> str:
        done.append(one.kind)
        return ""

    monkeypatch.setattr(soft, "set_up", set_up)
    here = BootDevice(8 * GIB, 256 * MIB, DeviceKind.DAX)
    put(machine, "/proc/cmdline", f"ro memmap={ITEM},{here.range}\n")
    assert at_boot.boot(machine, [MEMORY, here], lambda line: None) == 0
    assert done == [DeviceKind.DAX, DeviceKind.MEMORY]


def test_nothing_is_written_where_all_is_so(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = kernel(machine, monkeypatch, "device_dax")
    assert at_boot.boot(machine, [DAX], lambda line: None) == 0
    assert seen.wrote == []


def test_memory_in_use_stays_and_is_named(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = kernel(machine, monkeypatch, "kmem", "online")
    seen.busy = {"memory33"}
    said: list[str] = []
    assert at_boot.boot(machine, [DAX], said.append) == 1
    assert said[0].startswith(
        f"emupmem: memmap={ITEM} is not set up as dax: memory33 does not become offline: "
    )
    assert read_dax_devices(machine)[0].driver == "kmem", "unbinding it would lose the memory"


def test_a_driver_that_is_not_there_or_refuses(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = kernel(machine, monkeypatch, "device_dax")
    seen.refuses = "kmem"
    said: list[str] = []
    assert at_boot.boot(machine, [MEMORY], said.append) == 1
    assert "kmem does not take dax0.0; sudo dmesg" in said[0]
    for file in ("new_id", "unbind"):
        (machine.root / f"sys/bus/dax/drivers/kmem/{file}").unlink()
    (machine.root / "sys/bus/dax/drivers/kmem").rmdir()
    assert at_boot.boot(machine, [MEMORY], said.append) == 1
    assert "this kernel has no driver kmem" in said[1]


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("quiet", 0, f"this boot does not reserve memmap={ITEM}: no dax to set up"),
        ("memmap=256M!4G", 1, "this boot reserves memmap=256M!4G where it was"),
        ("memmap=512M%4G-1+0xefffffff", 1, "--replace --size … --as dax makes the two agree"),
        (f"memmap={ITEM}", 1, f"no device for memmap={ITEM} appeared within 0 seconds"),
    ],
)
def test_boots_without_it(machine: FakeMachine, words: str, status: int, line: str) -> None:
    put(machine, "/proc/cmdline", f"ro {words}\n")
    said: list[str] = []
    assert at_boot.boot(machine, [DAX], said.append) == status
    assert line in said[0]


def test_the_unit_tells_what_it_is(machine: FakeMachine) -> None:
    put(machine, "/usr/local/bin/emupmem", "")
    mount = BootMount(8 * GIB, GIB, "/mnt/pmem0", "ext4")
    text = unit.unit_text([MEMORY, mount], "/usr/local/bin/emupmem")
    assert '"256M%%4G-1+0xefffffff" memory' in text
    assert "Description=Emulated, volatile memory devices" in text
    assert unit.read_all(text) == (MEMORY, mount)
    assert (unit.read_devices(text), unit.read_unit(text)) == ((MEMORY,), (mount,))
    put(machine, unit.FILE, text)
    assert recorded_kinds(machine) == {(4 * GIB, 256 * MIB): DeviceKind.MEMORY}
    here, there = (4 * GIB, 256 * MIB), (8 * GIB, GIB)
    assert unit_change(machine, [there], soft=[here]).after == text, "nothing is asked of it"
    left = unit_change(machine, [there])
    assert left.mounts == (mount,)
    assert left.devices == ()
    # a range of the other kind at the same place is another one
    assert unit_change(machine, [here, there]).devices == ()
    now = unit_change(machine, [there], soft=[here], devices=[DAX])
    assert (now.devices, now.mounts) == ((DAX,), (mount,))
    assert unit_change(machine, []).after is None


@pytest.mark.parametrize(
    "words", [["1G!4G", "memory"], ["1G%4G-1+12", "dax"], [ITEM, "dax", ITEM], [ITEM, "pmem"]]
)
def test_words_that_are_none_of_the_unit(words: list[str]) -> None:
    with pytest.raises(EmupmemError):
        unit.from_words(words)


def test_a_node_that_is_reserved_as_a_whole_is_still_known(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel(machine, monkeypatch, "device_dax")
    put(machine, "/sys/devices/system/node/node0/memory0/x", "")
    put(machine, "/sys/devices/system/node/node1/x", "")
    assert [(n.node, n.start, n.end) for n in read_nodes(machine)] == [
        (0, 0, BLOCK),
        (1, 4 * GIB, 4 * GIB + 2 * BLOCK),
    ]
