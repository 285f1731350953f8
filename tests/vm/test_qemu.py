# SPDX-License-Identifier: Apache-2.0
"""Virtual NVDIMMs: what is refused, what is promised, and arguments that the real QEMU takes."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import emupmem.system.machine
import emupmem.system.streams
from emupmem.device import dax, keep
from emupmem.device import image as device_image
from emupmem.device.dax import DaxProof
from emupmem.model import GIB, KIB, MIB, EmupmemError
from emupmem.system import lock, processes
from emupmem.system.machine import Machine
from emupmem.vm import arguments, export
from emupmem.vm import backend as vm_backend
from emupmem.vm.arguments import MAX_SLOTS, plan_devices, promise
from emupmem.vm.guest import Guest, read_guest
from emupmem.vm.options import ALONE, DISKS, escaped, qemu_size, split_option
from emupmem.vm.size import choose_size
from emupmem.vm.wish import Backend, Backing, DeviceOptions, DeviceWish, GuestDevice, Persistence
from tests import played
from tests.cli.runner import Run
from tests.device.pmem import PmemMachine, add_device, device_stand_ins, mounted, reserve
from tests.fake import build, put

QEMU = shutil.which("qemu-system-x86_64")
PATIENCE = 900
"""Seconds for what an idle machine does in one: only a hang takes that long."""
NEW = (10, 0)
MEMORY = Backend(Backing.RAM)
FILE = Backend(Backing.FILE, "/vm/pmem.img", GIB)


def argv(*wishes: DeviceWish, guest: tuple[str, ...] = (), **options: Any) -> list[str]:
    made = plan_devices(read_guest(guest), wishes, DeviceOptions(**options), NEW)
    return made.argv


def refused(words: str, call: Callable[[], object]) -> EmupmemError:
    with pytest.raises(EmupmemError) as caught:
        call()
    assert words in caught.value.message
    return caught.value


# The arguments ----------------------------------------------------------------------------------------


def test_the_first_line_of_the_document() -> None:
    assert shlex.join(argv(DeviceWish(MEMORY, GIB), guest=("-m", "2G"))) == (
        "-machine nvdimm=on -m slots=1,maxmem=3072M "
        "-object memory-backend-ram,id=vnvdimm0-memory,size=1024M "
        "-device nvdimm,id=vnvdimm0,memdev=vnvdimm0-memory"
    )


def test_a_file_that_is_shared() -> None:
    words = argv(
        DeviceWish(FILE, GIB, label=128 * KIB), machine="q35", ram=4 * GIB, persistence=Persistence.CPU
    )
    assert words == [
        *("-machine", "type=q35,nvdimm=on,nvdimm-persistence=cpu"),
        *("-m", "size=4096M,slots=1,maxmem=5120M", "-object"),
        "memory-backend-file,id=vnvdimm0-memory,size=1024M,mem-path=/vm/pmem.img,share=on",
        *("-device", "nvdimm,id=vnvdimm0,memdev=vnvdimm0-memory,label-size=131072"),
    ]


def test_slots_and_maxmem_count_everything() -> None:
    guest = (
        *("-m", "2G,slots=2,maxmem=3G", "-object", "memory-backend-ram,id=d0,size=512M"),
        *("-device", "pc-dimm,id=vnvdimm0,memdev=d0", "-numa", "node,nodeid=0", "-numa", "node,nodeid=1"),
    )
    made = plan_devices(
        read_guest(guest),
        [DeviceWish(MEMORY, GIB, 0), DeviceWish(replace(FILE, size=2 * GIB), 2 * GIB, 1)],
        DeviceOptions(),
        NEW,
    )
    assert dict(made.memory) == {"slots": "3", "maxmem": "5632M"}
    assert [d["id"] for _, d in made.pairs] == ["vnvdimm1", "vnvdimm1"] or len(
        {d["id"] for _, d in made.pairs}
    ) == 2
    assert [d["node"] for _, d in made.pairs] == ["0", "1"]
    large = plan_devices(
        read_guest(("-m", "1G,slots=8,maxmem=64G")), [DeviceWish(MEMORY, GIB)], DeviceOptions(), NEW
    )
    assert dict(large.memory) == {"slots": "8", "maxmem": "65536M"}, "what is there already stays"


def test_names_do_not_meet() -> None:
    guest = read_guest(("-device", "nvdimm,id=vnvdimm0,memdev=x"))
    made = plan_devices(guest, [DeviceWish(MEMORY, GIB) for _ in range(3)], DeviceOptions(), NEW)
    names = [d["id"] for _, d in made.pairs]
    assert len({*names, "vnvdimm0"}) == 4


def test_virtio_pmem_needs_no_slot() -> None:
    words = argv(DeviceWish(FILE, GIB), device=GuestDevice.VIRTIO)
    assert "nvdimm=on" not in " ".join(words)
    assert words[:2] == ["-m", "maxmem=1152M"]
    assert words[-1] == "virtio-pmem-pci,id=vnvdimm0,memdev=vnvdimm0-memory"


def test_read_only_is_unarmed_too() -> None:
    words = argv(DeviceWish(FILE, GIB), readonly=True)
    assert ",readonly=on" in words[5]
    assert ",unarmed=on" in words[7]


def test_pmem_on_only_where_it_is_true() -> None:
    durable = Backend(Backing.DAX_FILE, "/mnt/pmem0/a", GIB, sync=True)
    assert "pmem=on" in argv(DeviceWish(durable, GIB), pmem=True)[5]
    cases: tuple[tuple[Backend, dict[str, Any]], ...] = (
        (durable, {"pmem": False}),
        (durable, {"pmem": True, "share": False}),
        (replace(durable, sync=False), {"pmem": True}),
        (FILE, {"pmem": True}),
    )
    for backend, options in cases:
        assert "pmem=on" not in " ".join(argv(DeviceWish(backend, GIB), **options))


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        (MEMORY, {}, "lost when QEMU exits"),
        (FILE, {"share": False}, "lost when QEMU exits: share=off"),
        (FILE, {}, "lost when it crashes or loses power, whatever the guest flushes"),
        (FILE, {"device": GuestDevice.VIRTIO}, "unless the guest has flushed it"),
        (FILE, {"readonly": True}, "cannot write to it"),
        (
            Backend(Backing.VOLATILE_FILE, "/dev/shm/x", GIB),
            {},
            "not this machine: /dev/shm/x is in its memory",
        ),
        (
            Backend(Backing.DAX_FILE, "/mnt/a", GIB, True, True),
            {"pmem": True},
            "is emulated persistent memory",
        ),
        (
            Backend(Backing.DAX_FILE, "/mnt/a", GIB, True),
            {"pmem": True},
            "a crash of this machine and power loss",
        ),
        (Backend(Backing.DAX_FILE, "/mnt/a", GIB, True), {}, "nothing is sure: this QEMU has no libpmem"),
        (
            Backend(Backing.DAX_FILE, "/mnt/a", GIB, False),
            {"pmem": True},
            "nothing is sure: there is no MAP_SYNC",
        ),
        (Backend(Backing.DEVDAX, "/dev/dax0.0", GIB, True), {"pmem": True}, "and power loss"),
        (Backend(Backing.DEVDAX, "/dev/dax0.0", GIB, True), {}, "only if CPU caches were flushed"),
        (Backend(Backing.DEVDAX, "/dev/dax0.0", GIB, True, True), {"pmem": True}, "not this machine"),
        (Backend(Backing.BLOCK, "/dev/pmem0", GIB), {}, "through the page cache"),
    ],
)
def test_nothing_is_promised_that_is_not_kept(backend: Backend, options: dict[str, Any], words: str) -> None:
    assert words in promise(backend, DeviceOptions(**options))


# What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "options", "words"),
    [
        (DeviceWish(MEMORY, GIB + KIB), {}, "not a multiple of 2 MiB"),
        (DeviceWish(MEMORY, MIB), {}, "not a multiple of 2 MiB"),
        (
            DeviceWish(Backend(Backing.DEVDAX, "/dev/dax0.0", GIB, align=GIB), 512 * MIB),
            {},
            "maps in pieces of 1 GiB",
        ),
        (DeviceWish(FILE, GIB), {"align": 3 * MIB}, "not a power of two"),
        (DeviceWish(FILE, GIB), {"align": KIB}, "not a power of two of at least 4 KiB"),
        (
            DeviceWish(Backend(Backing.DEVDAX, "/dev/dax0.0", GIB, align=2 * MIB), GIB),
            {"align": 4096},
            "is less than the",
        ),
        (DeviceWish(FILE, GIB, label=64 * KIB), {}, "at least 128 KiB"),
        (DeviceWish(FILE, GIB, label=129 * KIB), {}, "a multiple of 4 KiB"),
        (DeviceWish(FILE, 2 * MIB, label=2 * MIB), {}, "leaves nothing"),
        (DeviceWish(FILE, GIB, label=128 * KIB), {"device": GuestDevice.VIRTIO}, "virtio-pmem has no labels"),
        (DeviceWish(FILE, GIB, 0), {"device": GuestDevice.VIRTIO}, "belongs to no NUMA node"),
        (
            DeviceWish(FILE, GIB),
            {"device": GuestDevice.VIRTIO, "readonly": True},
            "virtio-pmem cannot be read-only",
        ),
        (
            DeviceWish(FILE, GIB),
            {"device": GuestDevice.VIRTIO, "persistence": Persistence.CPU},
            "no nvdimm-persistence",
        ),
        (DeviceWish(MEMORY, GIB), {"readonly": True}, "a read-only device needs a file"),
        (DeviceWish(replace(FILE, size=None), GIB), {"readonly": True}, "there is nothing to read"),
        (DeviceWish(FILE, GIB, 1), {}, "the guest has no NUMA node 1"),
    ],
)
def test_what_qemu_or_the_guest_would_fail_on(wish: DeviceWish, options: dict[str, Any], words: str) -> None:
    refused(words, lambda: plan_devices(Guest(), [wish], DeviceOptions(**options), NEW))


def test_old_programs_other_machines_and_too_many() -> None:
    refused(
        "QEMU 4.0 is too old", lambda: plan_devices(Guest(), [DeviceWish(FILE, GIB)], DeviceOptions(), (4, 0))
    )
    refused(
        "has no read-only NVDIMMs",
        lambda: plan_devices(Guest(), [DeviceWish(FILE, GIB)], DeviceOptions(readonly=True), (5, 2)),
    )
    refused("-machine microvm has no NVDIMMs", lambda: read_guest(("-machine", "microvm,x=y")))
    refused(
        "is behind two devices",
        lambda: plan_devices(Guest(), [DeviceWish(FILE, GIB)] * 2, DeviceOptions(), NEW),
    )
    many = [DeviceWish(MEMORY, 2 * MIB)] * (MAX_SLOTS + 1)
    refused("QEMU has 256 at most", lambda: plan_devices(Guest(), many, DeviceOptions(), NEW))
    for text in ("pc", "pc-i440fx-7.2,usb=off", "q35,accel=kvm", "type=pc-q35-8.0"):
        assert read_guest(("-M", text)).machine.startswith(("pc", "q35"))


def test_what_the_guest_has_already() -> None:
    bare = read_guest(("-machine", "pc,accel=kvm,nvdimm"))
    refused(
        "refuses the bare word nvdimm",
        lambda: plan_devices(bare, [DeviceWish(MEMORY, GIB)], DeviceOptions(), (7, 2)),
    )
    assert plan_devices(bare, [DeviceWish(MEMORY, GIB)], DeviceOptions(), (6, 0)), "older ones read it"
    mine = read_guest(("-object", f"memory-backend-file,id=x,mem-path={FILE.path},size=1G"))
    refused(
        "is behind two devices", lambda: plan_devices(mine, [DeviceWish(FILE, GIB)], DeviceOptions(), NEW)
    )
    disks = (
        *((f"-{name}", FILE.path) for name in DISKS),
        (FILE.path,),
        ("-m", "1G", "-snapshot", FILE.path, "-nographic"),
        ("-nic", "none", "--enable-kvm", FILE.path),
        ("-drive", f"if=virtio,file={FILE.path}"),
    )
    for words in disks:
        plans = functools.partial(
            plan_devices, read_guest(words), [DeviceWish(FILE, GIB)], DeviceOptions(), NEW
        )
        refused("is behind two devices", plans)
    for words in (("-kernel", FILE.path), ("-nic", FILE.path), ("-m", "1G", "-unknown", FILE.path)):
        assert read_guest(words).paths == frozenset()
    assert read_guest(("-hda", "/a,b=c")).paths == {"/a,b=c"}
    main = read_guest(("-object", "memory-backend-ram,id=r,size=3G", "-machine", "pc,memory-backend=r"))
    assert main.ram == 3 * GIB
    assert (
        dict(plan_devices(main, [DeviceWish(MEMORY, GIB)], DeviceOptions(), NEW).memory)["maxmem"] == "4096M"
    )
    written = (
        *("-object", f'{{"qom-type":"memory-backend-file","id":"x","size":{GIB},"mem-path":"/vm/x"}}'),
        *(
            "-device",
            '{"driver":"nvdimm","id":"vnvdimm0","memdev":"x"}',
            "-device",
            "driver=pc-dimm,memdev=x",
        ),
    )
    libvirts = read_guest(written)
    assert (sum(libvirts.plugged), libvirts.used_slots) == (2 * GIB, 2)
    assert libvirts.paths == {"/vm/x"}
    assert libvirts.ids == {"x", "vnvdimm0"}
    assert read_guest(("-object", "{half")) == Guest()
    assert read_guest(("-name", "vm1,debug-threads=on")).name == "vm1"
    assert read_guest(("-name", "guest=vm2")).name == "vm2"


def test_sizes_of_backends() -> None:
    assert choose_size(FILE, None) == GIB
    assert choose_size(FILE, GIB) == GIB
    assert choose_size(Backend(Backing.DEVDAX, "/dev/dax0.0", 2 * GIB), GIB) == GIB
    refused("is there already and has 1 GiB", lambda: choose_size(FILE, 2 * GIB))
    refused(
        "has 1 GiB, you asked for 2 GiB",
        lambda: choose_size(Backend(Backing.DEVDAX, "/dev/dax0.0", GIB), 2 * GIB),
    )
    missing = Backend(Backing.FILE, "/vm/new.img", None, room=GIB)
    refused("does not exist: give its size", lambda: choose_size(missing, None))
    refused("1 GiB free for /vm/new.img, 2 GiB are needed", lambda: choose_size(missing, 2 * GIB))


# QEMU's own language ----------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_commas_are_doubled_and_read_back(value: str) -> None:
    assert split_option(f"a=1,path={escaped(value)}") == [("a", "1"), ("path", value)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * GIB),
        ("512", 512 * MIB),
        ("1.5g", 1536 * MIB),
        ("0x10M", 16 * MIB),
        ("7b", 7),
        ("x", None),
        ("", None),
    ],
)
def test_sizes_as_qemu_reads_them(text: str, size: int | None) -> None:
    assert qemu_size(text) == size


def test_the_guests_memory_is_found_in_any_form() -> None:
    for words in (
        ("-m", "2G"),
        ("-m", "size=2G"),
        ("--m", "2048"),
        ("-m", "1G", "-m", "2G"),
        ("-m", "2g,slots=1"),
        ("-m", "2147483648B"),
    ):
        assert read_guest(words).ram == 2 * GIB
    assert read_guest(("-m", "slots=2,maxmem=4G")).ram is None
    assert read_guest(("-drive", "-m", "-m")).ram is None


def test_versions() -> None:
    assert arguments.parse_version("QEMU emulator version 10.0.3 (Debian)") == (10, 0)
    refused("that is not QEMU", lambda: arguments.parse_version("true (GNU coreutils)"))


def test_readconfig_refuses_what_it_cannot_hold() -> None:
    made = plan_devices(Guest(), [DeviceWish(replace(FILE, path='/a"b'), GIB)], DeviceOptions(), NEW)
    refused("cannot be written into a file for -readconfig", lambda: export.readconfig(made))


def test_libvirt_refuses_what_it_cannot_say() -> None:
    for wish, options in (
        (DeviceWish(MEMORY, GIB), DeviceOptions()),
        (DeviceWish(FILE, GIB), DeviceOptions(persistence=Persistence.CPU)),
    ):
        made = plan_devices(Guest(), [wish], options, NEW)
        refused("libvirt", lambda w=wish, o=options, m=made: export.libvirt(Guest(), [w], o, m))  # type: ignore[misc]


# What is behind it -------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PmemMachine:
    """A machine with an emulated device mounted at /mnt/pmem0 and one that is not."""
    device_stand_ins(monkeypatch.setattr)
    machine = PmemMachine(build(tmp_path / "machine").root)
    add_device(machine)
    reserve(machine, "memmap=1G!4G")
    (machine.root / "vm").mkdir()
    return machine


def on(machine: PmemMachine, folder: str, fs: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all of the machine's files lie on one mount."""
    number = "259:0" if "pmem" in source else "8:1"
    put(machine, "/proc/self/mountinfo", f"30 1 {number} / {folder} rw - {fs} {source} rw\n")
    monkeypatch.setattr(machine, "file_system", lambda name: number)


def test_files_and_folders(here: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    on(here, "/", "ext4", "/dev/sda1", monkeypatch)
    put(here, "/vm/there.img", bytes(2 * MIB))
    found = vm_backend.look_at_backend(here, "/vm/there.img")
    assert (found.kind, found.size, found.room) == (Backing.FILE, 2 * MIB, None)
    new = vm_backend.look_at_backend(here, "/vm/new.img")
    assert (new.kind, new.size) == (Backing.FILE, None)
    assert new.room
    assert vm_backend.look_at_backend(here, "/vm").path == "/vm/vnvdimm0.img"
    put(here, "/vm/vnvdimm0.img", bytes(4 * MIB))
    again = vm_backend.look_at_backend(here, "/vm/")
    assert (again.path, again.size) == ("/vm/vnvdimm0.img", 4 * MIB), "the next start finds its content"
    assert vm_backend.file_inside("a b/../c", 2) == "a_b_.._c-vnvdimm2.img"
    put(here, "/vm/empty", b"")
    refused("/vm/empty is empty", lambda: vm_backend.look_at_backend(here, "/vm/empty"))
    refused("/nowhere is not a folder", lambda: vm_backend.look_at_backend(here, "/nowhere/x"))
    os.mkfifo(here.root / "vm/pipe")
    refused("neither a file nor a device", lambda: vm_backend.look_at_backend(here, "/vm/pipe"))


def test_memory_is_memory(here: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    for fs in ("tmpfs", "hugetlbfs"):
        on(here, "/vm", fs, fs, monkeypatch)
        assert vm_backend.look_at_backend(here, "/vm/x").kind is Backing.VOLATILE_FILE


def test_a_dax_mount_is_proven(here: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    on(here, "/vm", "ext4", "/dev/pmem0", monkeypatch)
    asked: list[str] = []

    def prove(folder: str) -> DaxProof:
        asked.append(folder)
        return DaxProof(True, True, 2)

    monkeypatch.setattr(dax, "prove_dax", prove)
    found = vm_backend.look_at_backend(here, "/vm")
    assert (found.kind, found.sync, found.emulated) == (Backing.DAX_FILE, True, True)
    reserve(here, "quiet")
    assert not vm_backend.look_at_backend(here, "/vm").emulated, "a real NVDIMM"
    monkeypatch.setattr(dax, "prove_dax", lambda folder: DaxProof(False, False))
    assert vm_backend.look_at_backend(here, "/vm").kind is Backing.FILE
    assert asked
    put(here, "/vm/f", bytes(4096))
    monkeypatch.setattr(dax, "is_dax_file", lambda name: True)
    monkeypatch.setattr(dax, "maps_sync", lambda name: False)
    found = vm_backend.look_at_backend(here, "/vm/f")
    assert (found.kind, found.sync) == (Backing.DAX_FILE, False)


def test_images_that_are_not_raw(here: PmemMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(here, "/", "ext4", "/dev/sda1", monkeypatch)
    for form in ("qcow2", "vmdk", "vhdx", "vpc", "qed"):
        image = here.root / "vm" / form
        argv = ["qemu-img", "create", "-q", "-f", form, str(image), "64M"]
        if not shutil.which("qemu-img") or subprocess.run(argv, capture_output=True, check=False).returncode:
            pytest.skip(f"no qemu-img that makes {form}")
        look = functools.partial(vm_backend.look_at_backend, here, f"/vm/{form}")
        refused(f"is a disk image of the form {form}", look)


def test_huge_pages_come_in_whole_ones(here: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    on(here, "/vm", "hugetlbfs", "none", monkeypatch)
    monkeypatch.setattr(here, "block_size", lambda folder: GIB)
    found = vm_backend.look_at_backend(here, "/vm/x")
    refused(
        "/vm/x maps in pieces of 1 GiB",
        lambda: plan_devices(Guest(), [DeviceWish(found, 64 * MIB)], DeviceOptions(), NEW),
    )
    assert here.block_size("/vm")


def put_mapped(machine: PmemMachine, name: str) -> None:
    """Let a process have this mapped."""
    put(machine, name, b"x")
    info = machine.path(name).stat()
    mark = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x} {info.st_ino}"
    put(machine, "/proc/7/comm", "qemu\n")
    put(machine, "/proc/7/maps", f"7f00-7f01 rw-s 00000000 {mark} {name}\n")


def test_devices(here: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"/dev/pmem0": "block", "/dev/sda": "block", "/dev/dax0.0": "character", "/dev/null": "character"}
    monkeypatch.setattr(here, "entry_kind", lambda name: kinds.get(name, "missing"))
    found = vm_backend.look_at_backend(here, "/dev/pmem0")
    assert (found.kind, found.size, found.emulated) == (Backing.BLOCK, GIB, True)
    mounted(here, "pmem0", "/mnt/pmem0")
    refused("/dev/pmem0 is mounted on /mnt/pmem0", lambda: vm_backend.look_at_backend(here, "/dev/pmem0"))
    put(here, "/proc/self/mountinfo", "")
    here.claimed = True
    refused("is in use", lambda: vm_backend.look_at_backend(here, "/dev/pmem0"))
    refused("emupmem gives no other disk", lambda: vm_backend.look_at_backend(here, "/dev/sda"))
    numbers = {"/dev/dax0.0": "252:0", "/dev/null": "1:3", "/dev/dax7.0": "1:5"}
    monkeypatch.setattr(processes, "character_number", lambda machine, name: numbers[name])
    base = "/sys/devices/platform/e820_pmem/ndbus0/region0/dax0.0"
    put(here, f"{base}/size", f"{GIB - 2 * MIB}\n")
    put(here, f"{base}/align", "2097152\n")
    link = here.root / "sys/bus/dax/devices/dax0.0"
    link.parent.mkdir(parents=True)
    link.symlink_to(base)
    (here.root / "sys/dev/char").mkdir(parents=True)
    (here.root / "sys/dev/char/252:0").symlink_to(base)
    put(here, "/sys/devices/platform/e820_pmem/ndbus0/provider", "e820\n")
    refused("/dev/null is not a DAX device", lambda: vm_backend.look_at_backend(here, "/dev/null"))
    kinds["/dev/dax7.0"] = "character"
    refused("/dev/dax7.0 is not a DAX device", lambda: vm_backend.look_at_backend(here, "/dev/dax7.0"))
    put_mapped(here, "/dev/dax0.0")
    refused(
        "/dev/dax0.0 is in use by qemu (process 7)", lambda: vm_backend.look_at_backend(here, "/dev/dax0.0")
    )
    assert vm_backend.look_at_backend(here, "/dev/dax0.0", shared=True).kind is Backing.DEVDAX
    (here.root / "proc/7/maps").unlink()
    found = vm_backend.look_at_backend(here, "/dev/dax0.0")
    assert (found.kind, found.size, found.align, found.emulated) == (
        Backing.DEVDAX,
        GIB - 2 * MIB,
        2 * MIB,
        True,
    )


def test_a_mapping_on_btrfs_is_seen(here: PmemMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """There /proc/PID/maps has another device than stat (the subvolume's against the file system's)."""
    on(here, "/", "btrfs", "/dev/sda1", monkeypatch)
    put_mapped(here, "/vm/x.img")
    maps = here.peek("/proc/7/maps")
    put(here, "/proc/7/maps", re.sub(r" \w+:\w+ ", " 00:2b ", maps))
    refused("is in use by qemu (process 7)", lambda: vm_backend.look_at_backend(here, "/vm/x.img"))
    put(here, "/proc/7/maps", re.sub(r" \w+:\w+ ", " 00:2b ", maps).replace("/vm/x.img", "/other/x.img"))
    refused(
        "not a multiple",
        lambda: plan_devices(
            Guest(), [DeviceWish(vm_backend.look_at_backend(here, "/vm/x.img"), 1)], DeviceOptions(), NEW
        ),
    )


def test_a_file_that_is_mapped_is_in_use(tmp_path: Path) -> None:
    import mmap

    machine = emupmem.system.machine.Machine()
    file = tmp_path / "image"
    file.write_bytes(bytes(2 * MIB))
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0):
        error = refused("is in use by", lambda: vm_backend.look_at_backend(machine, str(file)))
        assert f"process {os.getpid()}" in error.message
        assert vm_backend.look_at_backend(machine, str(file), shared=True).size == 2 * MIB
    assert vm_backend.look_at_backend(machine, str(file)).size == 2 * MIB


# The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run: Run) -> Run:
    return functools.partial(run, "qemu")


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A QEMU that says what it was started with."""
    path = tmp_path / "qemu"
    path.write_text(
        "#!/bin/sh\ncase $1 in --version) echo QEMU emulator version 9.0.0;; "
        '*) for word; do echo "$word"; done; exit 7;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (("args",), 2, "which device?"),
        (("run",), 2, "which device?"),
        (("args", "--pmem", "1GX"), 2, "1GX"),
        (("args", "--pmem", "1G", "--node", "0", "--node", "1"), 2, "--node is given more often"),
        (("args", "--pmem", "1G", "--json", "--libvirt"), 2, "exclude each other"),
        (
            ("args", "--pmem", "1G", "--machine", "pc", "--", "-machine", "q35"),
            2,
            "machine type is given twice",
        ),
        (("args", "--pmem", "1G", "--device", "floppy"), 2, "floppy"),
        (("args", "--pmem", "1G", "--qemu", "qemu-nowhere"), 1, "qemu-nowhere is not installed"),
        (("run", "--pmem", "1G", "--qemu", "/bin/true"), 1, "that is not QEMU"),
        (("run", "--pmem", "1G", "--print", "--libvirt"), 2, "exclude each other"),
        (("args", "--pmem", "1G", "--readconfig"), 1, "this QEMU has no -readconfig"),
        (("args", "--pmem", "1G", "--", "-machine", "pc,nvdimm"), 1, "nvdimm=on is added"),
        (("args", "--pmem", "3M"), 2, "not a multiple of 2 MiB"),
    ],
)
def test_bad_requests(run: Run, stand_in: str, argv: tuple[str, ...], status: int, words: str) -> None:
    argv = argv if "--qemu" in argv else (argv[0], "--qemu", stand_in, *argv[1:])
    done = run(*argv)
    assert (done.status, done.out) == (status, "")
    assert words in done.err


def test_json_is_printed_in_every_case(run: Run, stand_in: str) -> None:
    done = run("args", "--qemu", stand_in, "--pmem", "1G", "--json", "--", "-m", "2G")
    assert json.loads(done.out)["argv"][:3] == [stand_in, "-m", "2G"]
    failed = run("args", "--qemu", stand_in, "--pmem", "3M", "--json")
    assert json.loads(failed.out)["error"]


def test_args_makes_nothing(run: Run, stand_in: str, tmp_path: Path) -> None:
    file = tmp_path / "a, b'.img"
    done = run("args", "--qemu", stand_in, "--pmem", "64M", "--pmem-file", str(file))
    assert done.status == 0
    assert f"mem-path={file}".replace(",", ",,") in " ".join(shlex.split(done.out))
    assert not file.exists()


@pytest.mark.parametrize("form", ["--print", "--json", "--libvirt", "--readconfig"])
def test_run_prints_too(run: Run, stand_in: str, tmp_path: Path, form: str) -> None:
    if form == "--readconfig" and not QEMU:
        pytest.skip("QEMU is not installed, and it must know -readconfig")
    words = ("--qemu", QEMU or stand_in, "--pmem", "64M", "--backend", str(tmp_path), form, "--", "-m", "1G")
    done = run("run", *words)
    assert (done.status, done.out) == (0, run("args", *words).out)
    assert done.out.startswith({"--json": "{", "--libvirt": "<domain", "--readconfig": "["}.get(form, "/"))
    assert list(tmp_path.glob("*.img")) == []


def emupmem_qemu(*argv: str) -> subprocess.CompletedProcess[str]:
    return played.emupmem("qemu", *argv)


def test_run_becomes_qemu(stand_in: str, tmp_path: Path) -> None:
    file = tmp_path / "pmem.img"
    words = ("--qemu", stand_in, "--pmem", "64M", "--backend", str(file), "--", "-name", "a b;$(c)")
    done = emupmem_qemu("run", *words)
    assert done.returncode == 7, "QEMU's own status"
    assert done.stdout.splitlines()[:3] == ["-name", "a b;$(c)", "-machine"]
    assert file.stat().st_size == 64 * MIB
    assert file.stat().st_blocks == 0, "sparse"
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"precious" + bytes(64 * MIB - 8))
    assert emupmem_qemu("run", *words).returncode == 7
    assert file.read_bytes()[:8] == b"precious", "never overwritten"
    other = emupmem_qemu("run", "--qemu", stand_in, "--pmem", "32M", "--backend", str(file))
    assert other.returncode == 1
    assert "is there already and has 64 MiB" in other.stderr


def test_a_folder_gives_the_same_file_again(stand_in: str, tmp_path: Path) -> None:
    folder = tmp_path / "pmem"
    folder.mkdir()
    words = ("run", "--qemu", stand_in, "--pmem", "64M", "--pmem", "32M", *("--backend", str(folder)) * 2)
    assert emupmem_qemu(*words).returncode == 7
    assert {f.name: f.stat().st_size for f in folder.iterdir()} == {
        "vnvdimm0.img": 64 * MIB,
        "vnvdimm1.img": 32 * MIB,
    }
    (folder / "vnvdimm0.img").write_bytes(b"precious" + bytes(64 * MIB - 8))
    assert emupmem_qemu(*words).returncode == 7
    assert (folder / "vnvdimm0.img").read_bytes()[:8] == b"precious"
    assert emupmem_qemu(*words, "--", "-name", "other").returncode == 7
    assert sorted(f.name for f in folder.iterdir())[:2] == ["other-vnvdimm0.img", "other-vnvdimm1.img"]
    grown = emupmem_qemu("run", "--qemu", stand_in, "--pmem", "128M", "--backend", str(folder))
    assert grown.returncode == 1
    assert "is there already and has 64 MiB" in grown.stderr


def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    file = tmp_path / "pmem.img"
    file.write_bytes(bytes(4096))
    file.chmod(0o444)
    for folder in (tmp_path, *tmp_path.parents[:3]):  # one more with xdist
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o055)
    machine = emupmem.system.machine.Machine()
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        error = refused(
            "cannot be opened: Permission denied",
            lambda: lock.lock_until_exit(machine, str(file), False),
        )
        lock.lock_until_exit(machine, str(file), True, write=False)
    finally:
        os.seteuid(user)
    assert "sudo" in error.hint


def test_signals_reach_qemu_and_the_file_is_locked_meanwhile(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text(
        "#!/bin/sh\n[ $1 = --version ] && { echo QEMU emulator version 9.0.0; exit; }\n"
        f"trap 'exit 42' TERM\ntouch '{tmp_path}/started'\nwhile :; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    words = ("run", "--qemu", str(program), "--pmem", "64M", "--backend", str(tmp_path / "f"))
    with subprocess.Popen(
        [sys.executable, "-m", "emupmem", "qemu", *words], stderr=subprocess.DEVNULL
    ) as child:
        while not (tmp_path / "started").exists() and child.poll() is None:
            time.sleep(0.1)
        second = emupmem_qemu(*words)
        assert second.returncode == 1
        assert f"(process {child.pid})" in second.stderr, "who has it"
        with pytest.raises(EmupmemError, match="in use by another virtual machine"):
            lock.lock_until_exit(Machine(), str(tmp_path / "f"), shared=False)
        with (tmp_path / "f").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == 42


# The real QEMU --------------------------------------------------------------------------------------------------


def ask(argv: list[str]) -> list[dict[str, Any]]:
    """Start QEMU without running the guest and ask for its memory devices."""
    commands = ("qmp_capabilities", "query-memory-devices", "quit")
    text = "".join(json.dumps({"execute": name}) + "\n" for name in commands)
    done = subprocess.run(
        [*argv, "-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", "stdio"],
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return next(a["return"] for a in answers if isinstance(a.get("return"), list))


real = pytest.mark.skipif(QEMU is None, reason="no QEMU here")


@pytest.mark.slow
@real
@pytest.mark.parametrize(
    ("options", "guest", "kinds"),
    [
        (("--pmem", "64M"), (), ["nvdimm"]),
        (("--pmem", "64M", "--label", "128K", "--backend", "FILE"), ("-m", "1G"), ["nvdimm"]),
        (
            ("--pmem", "64M", "--pmem", "128M", "--persistence", "mem-ctrl"),
            ("-machine", "q35"),
            ["nvdimm", "nvdimm"],
        ),
        (("--pmem", "64M", "--backend", "FILE", "--share", "off", "--align", "2M"), (), ["nvdimm"]),
        (("--pmem", "64M", "--backend", "FILE", "--device", "virtio-pmem"), ("-m", "512M"), ["virtio-pmem"]),
        (
            ("--pmem", "64M", "--pmem", "64M", "--node", "1", "--node", "0"),
            (
                *("-m", "1G,slots=1,maxmem=1100M", "-smp", "2"),
                *("-object", "memory-backend-ram,id=a,size=512M", "-numa", "node,memdev=a,cpus=0"),
                *("-object", "memory-backend-ram,id=b,size=512M", "-numa", "node,memdev=b,cpus=1"),
            ),
            ["nvdimm", "nvdimm"],
        ),
        (("--pmem", "64M", "--machine", "pc", "--ram", "256M"), (), ["nvdimm"]),
        (("--pmem", "64M"), ("-m", "0.3G"), ["nvdimm"]),
        (("--pmem", "64M", "--ram", "300001K"), ("-m", "268435456B"), ["nvdimm"]),
    ],
)
def test_the_real_qemu_takes_the_arguments(
    tmp_path: Path, options: tuple[str, ...], guest: tuple[str, ...], kinds: list[str]
) -> None:
    file = str(tmp_path / "a,b =.img")
    words = [file if w == "FILE" else w for w in options]
    done = emupmem_qemu("args", *words, "--json", "--", *guest)
    assert done.returncode == 0, done.stderr
    found = ask(json.loads(done.stdout)["argv"])
    assert [d["type"] for d in found] == kinds
    sizes = [d["data"]["size"] for d in found]
    assert all(size in (64 * MIB, 128 * MIB, 64 * MIB - 128 * KIB) for size in sizes)
    line = emupmem_qemu("args", *words, "--", *guest).stdout
    assert shlex.split(line) == json.loads(done.stdout)["argv"]


@real
def test_the_real_qemu_has_no_other_options_without_a_value() -> None:
    assert QEMU
    said = subprocess.run([QEMU, "-help"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^--?([\w-]+)(?: or -(\w+))?(?:\s{2,}[^ '<].*|)$", said, re.MULTILINE)
    alone = {name for names in found for name in names if name} - {"dtb"}  # `-dtb    file`
    assert {"snapshot", "help", "enable-kvm"} <= alone
    assert alone <= ALONE, alone - ALONE
    for name in ALONE & {"no-reboot", "S", "nographic"}:
        assert name in alone


@real
def test_the_real_qemu_reads_the_configuration_file(tmp_path: Path) -> None:
    image = tmp_path / "image, with words"
    image.write_bytes(bytes(64 * MIB))
    words = ("args", "--backend", str(image), "--label", "128K", "--persistence", "cpu")
    done = emupmem_qemu(*words, "--readconfig", "--", "-m", "1G")
    assert done.returncode == 0, done.stderr
    (tmp_path / "conf").write_text(done.stdout)
    assert QEMU
    (found,) = ask([QEMU, "-m", "1G", "-readconfig", str(tmp_path / "conf")])
    assert found["data"]["size"] == 64 * MIB - 128 * KIB
    read_only = emupmem_qemu("args", "--backend", str(image), "--readonly", "--json")
    assert ask(json.loads(read_only.stdout)["argv"])


@real
def test_libpmem_is_asked_for_and_not_guessed(tmp_path: Path) -> None:
    assert QEMU
    machine = emupmem.system.machine.Machine()
    linked = "libpmem" in subprocess.run(["ldd", QEMU], capture_output=True, text=True, check=False).stdout
    assert vm_backend.has_libpmem(machine, QEMU) is linked
    without = tmp_path / "qemu"
    without.write_text("#!/bin/sh\necho 'Lack of libpmem support while setting the pmem=on' >&2\nexit 1\n")
    without.chmod(0o755)
    assert not vm_backend.has_libpmem(machine, str(without))


@real
def test_the_real_qemu_keeps_its_words_and_its_status(tmp_path: Path) -> None:
    words = ("run", "--pmem", "64M", "--", "-display", "none", "-S")
    failed = emupmem_qemu(*words, "-device", "no-such-device")
    assert failed.returncode == 1
    assert "no-such-device" in failed.stderr
    monitor = tmp_path / "monitor"
    argv = [sys.executable, "-m", "emupmem", "qemu", *words, "-accel", "tcg", "-nodefaults"]
    with subprocess.Popen(
        [*argv, "-qmp", f"unix:{monitor},server=on,wait=off"], stderr=subprocess.PIPE
    ) as child:
        while not monitor.exists() and child.poll() is None:
            time.sleep(0.1)
        assert Path(f"/proc/{child.pid}/exe").resolve().name == "qemu-system-x86_64", "emupmem became QEMU"
        with socket.socket(socket.AF_UNIX) as talk:
            talk.connect(str(monitor))
            talk.sendall(b'{"execute": "qmp_capabilities"}')
            answers = talk.makefile("rb")
            assert b"QMP" in answers.readline()
            assert b"return" in answers.readline(), "its main loop answers, so its signal handlers are set"
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == 0, "QEMU ends in order"
        assert child.stderr
        assert b"terminating on signal 15" in child.stderr.read()


@real
def test_the_real_qemu_takes_memory_of_an_object(tmp_path: Path) -> None:
    guest = ("-object", "memory-backend-ram,id=r,size=256M", "-machine", "q35,memory-backend=r")
    done = emupmem_qemu("args", "--pmem", "64M", "--json", "--", *guest)
    (found,) = ask(json.loads(done.stdout)["argv"])
    assert found["data"]["size"] == 64 * MIB


@real
def test_the_bare_word_is_refused_by_qemu_too() -> None:
    assert QEMU
    done = subprocess.run(
        [QEMU, "-machine", "pc,nvdimm", "-S", "-display", "none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Expected '=' after parameter 'nvdimm'" in done.stderr


SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


@pytest.mark.skipif(not (SCHEMA.exists() and shutil.which("xmllint")), reason="no schema of libvirt here")
@pytest.mark.parametrize(
    "options",
    [
        DeviceOptions(),
        DeviceOptions(device=GuestDevice.VIRTIO),
        DeviceOptions(readonly=True, align=2 * MIB, ram=2 * GIB, machine="pc"),
        DeviceOptions(share=False),
        DeviceOptions(pmem=True),
    ],
)
def test_the_domain_is_valid_by_libvirts_schema(tmp_path: Path, options: DeviceOptions) -> None:
    durable = Backend(Backing.DAX_FILE, "/mnt/pmem0/a<&>b.img", GIB, True)
    label = 0 if options.device is GuestDevice.VIRTIO else 128 * KIB
    wishes = [DeviceWish(durable, GIB, label=label), DeviceWish(FILE, GIB)]
    two = read_guest(("-m", "3G", "-smp", "2", "-numa", "node,mem=1G", "-numa", "node,mem=2G"))
    guest = two if options.machine else Guest()
    if options.machine:
        wishes = [replace(w, node=n) for n, w in enumerate(wishes)]
    text = export.libvirt(guest, wishes, options, plan_devices(guest, wishes, options, NEW))
    assert text.count("<cell ") == max(len(guest.nodes), 1)
    (tmp_path / "domain.xml").write_text(text)
    argv = ["xmllint", "--noout", "--relaxng", str(SCHEMA), str(tmp_path / "domain.xml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + text


# Where no file may be made ------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("/dev/pmem9", "/dev"),
        ("/dev", "/dev"),
        ("/dev/mapper/x", "/dev"),
        ("/dev/shm/../x", "/dev"),
        ("/srv/nodes/pmem9", "/dev"),
        ("/srv/one", "/dev"),
        ("/proc/x", "/proc"),
        ("/sys/x", "/sys"),
    ],
)
def test_a_device_that_is_missing_does_not_become_a_file(
    here: PmemMachine, monkeypatch: pytest.MonkeyPatch, name: str, top: str, there: bool
) -> None:
    on(here, "/", "ext4", "/dev/sda1", monkeypatch)
    for folder in ("dev/mapper", "dev/shm", "srv", "proc", "sys"):
        (here.root / folder).mkdir(parents=True, exist_ok=True)
    (here.root / "srv/nodes").symlink_to("/dev")
    (here.root / "srv/one").symlink_to("../dev/pmem9")
    if there:
        put(here, here.real(f"{name}/vnvdimm0.img" if name == "/dev" else name), "x" * 4096)
    found = f"in {top}" if there else f"makes no files in {top}"
    error = refused(found, lambda: vm_backend.look_at_backend(here, name))
    assert error.hint
    assert vm_backend.look_at_backend(here, "/dev/shm/x").size is None


def test_relative_names_and_links_out_of_dev_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shm").symlink_to("/dev/shm")
    assert (
        vm_backend.look_at_backend(Machine(), str(tmp_path / "shm/emupmem-none")).kind
        is Backing.VOLATILE_FILE
    )
    (tmp_path / "nodes").symlink_to("/dev")
    refused(
        "makes no files in /dev",
        lambda: vm_backend.look_at_backend(Machine(), str(tmp_path / "nodes/emupmem-none")),
    )
    monkeypatch.chdir("/dev")
    refused(
        "makes no files in /dev",
        lambda: vm_backend.look_at_backend(Machine(), str(Path("emupmem-none").absolute())),
    )


@pytest.mark.parametrize("name", ["/dev/emupmem-none", "/sys/x", "/proc/x", "LINK/emupmem-none"])
def test_no_other_file_is_made_there_either(tmp_path: Path, name: str) -> None:
    (tmp_path / "LINK").symlink_to("/dev")
    name = name.replace("LINK", str(tmp_path / "LINK"))
    for call in (
        lambda: emupmem.system.streams.new_file(name, b"x"),
        lambda: emupmem.system.streams.new_file(name, b"x", force=True),
        lambda: device_image._target(name),
        lambda: keep.check_image(Machine(), name, MIB, "/mnt"),
    ):
        assert "emupmem makes no files in" in refused("", call).message
        assert not Path(name).exists()
