# SPDX-License-Identifier: Apache-2.0
"""RAM, names and files that QEMU's own arguments tell elsewhere than by -m, and words in the wrong place."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.model import GIB, KIB, MIB, EmupmemError
from emupmem.system.machine import Machine
from emupmem.vm import arguments, export
from emupmem.vm import backend as vm_backend
from emupmem.vm import size as vm_size
from emupmem.vm.arguments import plan_devices
from emupmem.vm.guest import Guest, read_guest
from emupmem.vm.wish import Backend, Backing, DeviceOptions, DeviceWish, GuestDevice
from tests.cli.runner import Run
from tests.vm.test_qemu import MEMORY, NEW, ask, emupmem_qemu, real, refused

CONFIG = """# as -writeconfig once wrote it
[machine]
  type = "q35"
  accel = "tcg"

[memory]
  size = "2048"
  slots = "2"

[object "more"]
  qom-type = "memory-backend-ram"
  size = "1G"

[device "vnvdimm0"]
  driver = "pc-dimm"
  memdev = "more"

[name]
  guest = "from-a-file"

[smp-opts]
  cpus = "3"
"""


def maxmem(*guest: str, **options: object) -> str:
    asked = DeviceOptions(**options)  # type: ignore[arg-type]
    made = plan_devices(read_guest(guest, lambda name: CONFIG), [DeviceWish(MEMORY, GIB)], asked, NEW)
    return dict(made.memory)["maxmem"]


def test_a_file_for_readconfig_is_read() -> None:
    guest = read_guest(("-readconfig", "x"), lambda name: CONFIG)
    assert (guest.ram, guest.machine, guest.name, guest.cpus) == (2 * GIB, "q35", "from-a-file", 3)
    assert (guest.slots, guest.used_slots, guest.plugged) == (2, 1, (GIB,))
    assert guest.ids == {"more", "vnvdimm0"}
    made = plan_devices(guest, [DeviceWish(MEMORY, GIB)], DeviceOptions(), NEW)
    assert dict(made.memory) == {"slots": "2", "maxmem": "4096M"}
    assert [d["id"] for _, d in made.pairs] == ["vnvdimm1"]
    assert read_guest(("-readconfig", "x", "-m", "1G"), lambda name: CONFIG).ram == GIB, "the later one wins"
    assert read_guest(("-m", "1G", "-readconfig", "x"), lambda name: CONFIG).ram == 2 * GIB
    assert read_guest(("-readconfig", "x"), lambda name: "[half\nsize = 1").ram is None


def test_ram_that_is_told_by_machine() -> None:
    assert maxmem("-M", "q35,memory.size=3G") == "4096M"
    assert maxmem("-M", "q35,memory.size=3G", "-m", "2G") == "3072M", "-m wins wherever it stands"
    assert maxmem("-m", "2G", "-M", "q35,memory.size=3G") == "3072M"
    assert maxmem("-M", "memory.size=2G,memory.max-size=9G,memory.slots=4") == "9216M"
    assert read_guest(("-M", "memory.slots=4")).slots == 4
    assert maxmem("-object", "memory-backend-memfd,id=r,size=3G", "-machine", "memory-backend=r") == "4096M"


@pytest.mark.parametrize(
    "device", ["virtio-mem-pci", "virtio-mem", "pc-dimm", "virtio-pmem-pci", "hv-balloon"]
)
def test_other_memory_devices_count(device: str) -> None:
    more = ("-object", "memory-backend-ram,id=v,size=4G", "-device", f"{device},memdev=v")
    assert maxmem("-m", "2G,maxmem=6G", *more) == "7168M"
    assert maxmem(*more, "-m", "2G") == "7168M"


def test_names_that_are_taken() -> None:
    for taken in ("vnvdimm0", "vnvdimm0-memory"):
        guest = read_guest(("-m", "1G", "-object", f"memory-backend-ram,id={taken},size=64M"))
        (pair,) = plan_devices(guest, [DeviceWish(MEMORY, GIB)], DeviceOptions(), NEW).pairs
        assert pair[1]["id"] == "vnvdimm1"
    guest = read_guest(("-drive", "if=none,id=vnvdimm0,file=x"))
    (pair,) = plan_devices(guest, [DeviceWish(MEMORY, GIB)], DeviceOptions(), NEW).pairs
    assert pair[1]["id"] == "vnvdimm0", "drives have names of their own"


def test_disks_and_processors_of_the_guest() -> None:
    words = (
        *(
            "-drive",
            "file=/vm/a,,b,format=raw",
            "-hda",
            "/vm/c",
            "-blockdev",
            "driver=file,filename=/vm/d,node-name=x",
        ),
        *("-blockdev", '{"driver":"raw","file":{"driver":"file","filename":"/vm/e"},"node-name":"y"}'),
        *("-smp", "sockets=2,cores=3", "-accel", "tcg,thread=single"),
    )
    guest = read_guest(words)
    assert guest.paths == {"/vm/a,b", "/vm/c", "/vm/d", "/vm/e"}
    assert (guest.cpus, guest.accelerator) == (6, "tcg")
    for smp, cpus in (("4", 4), ("cpus=2,maxcpus=8", 2), ("threads=2", 2), ("x", 1)):
        assert read_guest(("-smp", smp)).cpus == cpus


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-m", ""), "-m has no value"),
        (("-nodefaults", "-m"), "-m has no value"),
        (("-m", "G"), "-m G has no size that QEMU reads"),
        (("-m", ",slots=2"), "-m ,slots=2 has no size that QEMU reads"),
        (("--m", "size="), "-m size= has no size that QEMU reads"),
        (("-machine", ""), "-machine has no value"),
        (("-m", "1G", "-readconfig", ""), "-readconfig has no value"),
        (("-m", "slots=2,maxmem=4G"), ""),
        (("-m", "1G", "-append", "", "-name", ""), ""),
    ],
)
def test_variables_that_are_not_set(run: Run, quick: str, words: tuple[str, ...], said: str) -> None:
    done = run("args", "--qemu", quick, "--pmem", "1G", "--", *words)
    assert (done.status, done.err.partition("\n")[0] if said else "") == (
        2 if said else 0,
        f"emupmem: {said}" if said else "",
    )


@pytest.mark.slow
@real
@pytest.mark.parametrize(
    "guest",
    [
        ("-readconfig", "FILE"),
        ("-M", "q35,memory.size=256M"),
        ("-M", "q35,memory.size=256M,memory.slots=2,memory.max-size=1G"),
        (
            *("-m", "256M,maxmem=512M", "-object", "memory-backend-ram,id=v,size=256M"),
            *("-device", "virtio-mem-pci,memdev=v"),
        ),
        (
            "-m",
            "256M",
            "-object",
            "memory-backend-ram,id=vnvdimm0-memory,size=64M",
            "-device",
            "pc-dimm,memdev=vnvdimm0-memory",
        ),
    ],
)
def test_the_real_qemu_has_room_for_the_device(tmp_path: Path, guest: tuple[str, ...]) -> None:
    (tmp_path / "conf").write_text(
        CONFIG.replace('"2048"', '"256"').replace('"1G"', '"64M"').replace('  accel = "tcg"\n', "")
    )
    words = [str(tmp_path / "conf") if w == "FILE" else w for w in guest]
    done = emupmem_qemu("args", "--pmem", "64M", "--json", "--", *words)
    assert done.returncode == 0, done.stderr
    found = ask(json.loads(done.stdout)["argv"])
    assert 64 * MIB in [d["data"]["size"] for d in found if d["type"] == "nvdimm"]


@pytest.fixture
def run(run: Run) -> Run:
    return functools.partial(run, "qemu")


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """A QEMU that only tells its version."""
    path = tmp_path / "quick-qemu"
    path.write_text("#!/bin/sh\necho QEMU emulator version 9.0.0\n")
    path.chmod(0o755)
    return str(path)


@real
def test_words_in_the_wrong_place(run: Run, quick: str, tmp_path: Path) -> None:
    whole = run("args", "--pmem", "64M", "--json", "--", "qemu-system-x86_64", "-m", "1G")
    assert json.loads(whole.out)["argv"][1:3] == ["-m", "1G"], "a whole command line is taken as one"
    for argv, words in (
        (("args", "--pmem", "1G", "-m", "1G"), "QEMU's follows --"),
        (("args", "--pmem", "1G", "qemu-system-x86_64", "-nodefaults"), "QEMU's follows --"),
        (
            ("args", "--pmem", "1G", "--", "-m", "1G", "--pmem-file", "x"),
            "--pmem-file is an option of emupmem",
        ),
        (("args", "--pmem", "1G", "--", "-m", "1G", "--label=128K"), "it comes before --"),
        (("args", "--pmem", "1G", "--qemu", "/x/kvm", "--", "qemu-system-x86_64"), "QEMU is given twice"),
        (("args", "--pmem", "1G", "--backend", "", "--", "-m", "1G"), "--backend is empty"),
    ):
        done = run(*argv)
        assert (done.status, done.out) == (2, "")
        assert words in done.err
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "none", tmp_path / "pipe", "/dev/zero", tmp_path):
        done = run("args", "--qemu", quick, "--pmem", "1G", "--", "-readconfig", str(name))
        assert done.status == 1
        assert "no regular file" in done.err


# Sizes ------------------------------------------------------------------------------------------------------


def test_align() -> None:
    file = Backend(Backing.FILE, "/vm/x", GIB)
    refused(
        "--align belongs to a file",
        lambda: plan_devices(Guest(), [DeviceWish(MEMORY, GIB)], DeviceOptions(align=2 * MIB), NEW),
    )
    error = refused(
        "--align 2 GiB is more than the 1 GiB",
        lambda: plan_devices(Guest(), [DeviceWish(file, GIB)], DeviceOptions(align=2 * GIB), NEW),
    )
    assert error.hint
    refused(
        "1.5 GiB is not a multiple of --align 1 GiB",
        lambda: plan_devices(
            Guest(), [DeviceWish(Backend(Backing.FILE, "/x"), 1536 * MIB)], DeviceOptions(align=GIB), NEW
        ),
    )
    large = plan_devices(
        Guest(GIB), [DeviceWish(Backend(Backing.FILE, "/x"), 4 * GIB)], DeviceOptions(align=4 * GIB), NEW
    )
    assert dict(large.memory)["maxmem"] == "9216M", "there may be a gap before it"


@pytest.mark.slow
@real
@pytest.mark.parametrize("device", ["nvdimm", "virtio-pmem"])
def test_the_real_qemu_aligns(tmp_path: Path, device: str) -> None:
    words = ("--pmem", "2G", "--backend", str(tmp_path / "f"), "--align", "2G", "--device", device)
    done = emupmem_qemu("args", *words, "--json", "--", "-m", "256M")
    (found,) = ask(json.loads(done.stdout)["argv"])
    assert found["data"]["size"] == 2 * GIB
    assert found["data"].get("addr", found["data"].get("memaddr")) % (2 * GIB) == 0


@pytest.mark.parametrize("label", [128 * KIB, 2 * MIB, 4 * MIB])
@pytest.mark.parametrize("asked", [16 * MIB, 100 * MIB, GIB])
@pytest.mark.parametrize("kind", [Backing.RAM, Backing.FILE, Backing.DAX_FILE, Backing.VOLATILE_FILE])
def test_a_labelled_region_is_of_whole_steps(kind: Backing, asked: int, label: int) -> None:
    for align in (0, 2 * MIB, GIB) if kind is Backing.VOLATILE_FILE else (0,):
        backend = Backend(kind, "" if kind is Backing.RAM else "/vm/x", align=align)
        options = DeviceOptions()
        wish = DeviceWish(backend, vm_size.choose_size(backend, asked, label), label=label)
        vm_size.check_wish(wish, options, NEW)
        seen = vm_size.region(wish, options)
        assert seen % (16 * MIB) == 0
        assert asked <= seen < asked + max(16 * MIB, align)
        if kind is not Backing.RAM:
            assert vm_size.alignment(wish, options) % (16 * MIB) == 0
            there = Backend(kind, "/vm/x", wish.size, align=align)
            for again in (asked, None):
                assert vm_size.choose_size(there, again, label) == wish.size, "the next start finds it"
            assert vm_size.region(DeviceWish(there, wish.size, label=label), options) == seen


def test_a_given_file_with_a_label_area() -> None:
    file = Backend(Backing.FILE, "/vm/x", GIB)
    wish = DeviceWish(file, vm_size.choose_size(file, None, 128 * KIB), label=128 * KIB)
    made = plan_devices(Guest(), [wish], DeviceOptions(), NEW)
    assert "align" not in made.pairs[0][0], "labels of before stay where they are"
    note = next(n for n in made.notes if "/vm/x" in n)
    assert "the guest sees a region of 1023.8 MiB" in note
    assert "a file of 1059061760 or 1075838976 bytes would do" in note
    for fit in (1059061760, 1075838976):
        there = Backend(Backing.FILE, "/vm/x", fit)
        assert vm_size.region(DeviceWish(there, fit, label=128 * KIB), DeviceOptions()) % (16 * MIB) == 0
    dax = Backend(Backing.DEVDAX, "/dev/dax0.0", GIB, True, align=2 * MIB)
    part = DeviceWish(dax, vm_size.choose_size(dax, None, 128 * KIB), label=128 * KIB)
    assert vm_size.region(part, DeviceOptions()) == 1008 * MIB, "a device is never too large"
    refused("and 2 MiB for the label area", lambda: vm_size.choose_size(dax, GIB, 128 * KIB))


def test_labels_of_before_stay_where_they_are(run: Run, quick: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    with file.open("wb") as stream:
        stream.truncate(66 * MIB)
    words = ("args", "--qemu", quick, "--backend", str(file), "--label", "128K", "--", "-m", "1G")
    assert "align=16777216" in run(*words).out
    with file.open("r+b") as stream:
        stream.seek(66 * MIB - 128 * KIB)
        stream.write(b"NAMESPACE_INDEX\0")
    done = run(*words)
    assert "align" not in done.out
    assert "not a multiple of 16 MiB" in done.err


def test_the_note_says_what_is_there() -> None:
    made = plan_devices(Guest(GIB), [DeviceWish(MEMORY, 66 * MIB, label=128 * KIB)], DeviceOptions(), NEW)
    assert made.notes[:2] == ("the guest sees a region of 64 MiB", arguments.LABELS)
    odd = Guest(GIB, plugged=(66 * MIB,), used_slots=1)
    assert (
        "may begin where ndctl makes no fsdax"
        in plan_devices(odd, [DeviceWish(MEMORY, 66 * MIB, label=128 * KIB)], DeviceOptions(), NEW).notes[-1]
    )


@real
def test_the_real_qemu_puts_labelled_devices_at_whole_steps(tmp_path: Path) -> None:
    for backends in ((), ("--backend", str(tmp_path / "a"), "--backend", str(tmp_path / "b"))):
        words = ("--pmem", "64M", "--pmem", "100M", *backends, "--label", "128K", "--json")
        argv = json.loads(emupmem_qemu("args", *words, "--", "-m", "256M").stdout)["argv"]
        found = [d["data"] for d in ask(argv)]
        assert [d["size"] for d in found] == [64 * MIB, 112 * MIB]
        assert [d["addr"] % (16 * MIB) for d in found] == [0, 0]


# What is behind it ------------------------------------------------------------------------------------------


def test_one_file_by_two_names(run: Run, quick: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(2 * MIB))
    (tmp_path / "link").symlink_to("f")
    (tmp_path / "hard").hardlink_to(file)
    for other in ("link", "hard", "f"):
        name = str(tmp_path / other)
        for guest in (
            ("--backend", name, "--", "-m", "1G"),
            ("--", "-m", "1G", "-drive", f"file={name},format=raw"),
            ("--", "-m", "1G", "-object", f"memory-backend-file,id=x,size=2M,mem-path={name}"),
        ):
            done = run("args", "--qemu", quick, "--backend", str(file), *guest)
            assert done.status == 1
            assert "they would write over each other" in done.err
    new = ("--qemu", quick, "--pmem", "2M", "--pmem", "2M", "--backend", str(tmp_path / "n"), "--backend")
    assert run("args", *new, f"{tmp_path}/./n", "--", "-m", "1G").status == 1, "not there yet"


def test_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    target = Path("/dev/shm") / f"emupmem-{os.getpid()}"
    (tmp_path / "link").symlink_to(target)
    machine = Machine()
    assert vm_backend.look_at_backend(machine, str(tmp_path / "link")).kind is Backing.VOLATILE_FILE
    try:
        target.write_bytes(bytes(2 * MIB))
        found = vm_backend.look_at_backend(machine, str(tmp_path / "link"))
        assert (found.kind, found.size) == (Backing.VOLATILE_FILE, 2 * MIB)
    finally:
        target.unlink()
    (tmp_path / "lost").symlink_to("nowhere/x")
    refused("leads to", lambda: vm_backend.look_at_backend(machine, str(tmp_path / "lost")))


def test_a_file_that_the_kernel_uses(tmp_path: Path) -> None:
    file = tmp_path / "disk image"
    file.write_bytes(bytes(4 * MIB))
    if os.geteuid() or not Path("/dev/loop-control").exists():
        pytest.skip("only root makes loop devices")
    argv = ["losetup", "-f", "--show", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    loop = done.stdout.strip()
    try:
        error = refused(
            f"by the loop device {loop}",
            lambda: vm_backend.look_at_backend(Machine(), str(file), shared=True),
        )
        assert f"losetup -d {loop}" in error.hint
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
    assert vm_backend.look_at_backend(Machine(), str(file)).size == 4 * MIB


def test_a_file_that_is_swapped_to(tmp_path: Path) -> None:
    from tests.fake import build, put

    machine = build(tmp_path / "machine")
    put(machine, "/vm/swap file", bytes(4096))
    put(machine, "/proc/swaps", "Filename\t\t\tType\n/vm/swap\\040file  file  4 0 -2\n")
    error = refused("in use as swap space", lambda: vm_backend.look_at_backend(machine, "/vm/swap file"))
    assert "swapoff" in error.hint


def test_a_file_that_another_program_writes(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(2 * MIB))
    script = 'exec 3<>"$0"; echo ready; read x'
    with subprocess.Popen(
        ["sh", "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        refused(
            f"in use by sh (process {child.pid})", lambda: vm_backend.look_at_backend(Machine(), str(file))
        )
        child.communicate(b"\n")
    with subprocess.Popen(
        ["sh", "-c", script.replace("<>", "<"), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        assert vm_backend.look_at_backend(Machine(), str(file)).size == 2 * MIB, "a reader does no harm"
        child.communicate(b"\n")


# libvirt ----------------------------------------------------------------------------------------------------


def test_a_domain_has_the_guests_name_and_processors() -> None:
    words = (
        "-m",
        "2G",
        "-name",
        "vm/1",
        "-smp",
        "5",
        "-accel",
        "tcg",
        "-numa",
        "node,mem=1G",
        "-numa",
        "node,mem=1G",
    )
    file = Backend(Backing.FILE, "/vm/it's", None)
    wishes = [DeviceWish(file, GIB)]
    guest = read_guest(words)
    text = export.libvirt(guest, wishes, DeviceOptions(), plan_devices(guest, wishes, DeviceOptions(), NEW))
    assert '<domain type="qemu">' in text
    assert "<name>vm_1</name>" in text
    assert "<vcpu>5</vcpu>" in text
    assert 'id="0" cpus="0-1"' in text
    assert 'id="1" cpus="2-4"' in text
    told = read_guest(("-smp", "2", "-numa", "node,cpus=1", "-numa", "node,cpus=0"))
    text = export.libvirt(told, wishes, DeviceOptions(), plan_devices(told, wishes, DeviceOptions(), NEW))
    assert 'id="0" cpus="1"' in text
    notes = export.libvirt_notes(wishes, DeviceOptions())
    assert any("truncate -s 1073741824 '/vm/it'\"'\"'s'" in n for n in notes)
    assert any("allocate an NVDIMM as a whole when it starts: 1 GiB on the disk" in n for n in notes)
    assert any("of this machine's RAM" in n for n in export.libvirt_notes(wishes, DeviceOptions(share=False)))
    assert any(
        "libvirt 9.0" in n for n in export.libvirt_notes(wishes, DeviceOptions(device=GuestDevice.VIRTIO))
    )
    (said,) = export.libvirt_promises(wishes, DeviceOptions(readonly=True), ["x"])
    assert "opens the file for writing" in said


# Odd words ---------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(["9" * 400, "9" * 5000, "²", "٣", "1e400", "0x" + "f" * 400, "-1", "", "1G"])
KEYS = ("size", "slots", "maxmem", "memory.size", "memory.slots", "memory.max-size", "cpus", "cores", "mem")


@given(
    option=st.sampled_from(["-m", "-M", "-smp", "-numa", "-object", "-device"]),
    key=st.sampled_from(KEYS),
    number=NUMBERS,
)
def test_numbers_that_no_machine_has(option: str, key: str, number: str) -> None:
    for value in (number, f"{key}={number}", f"node,{key}={number}", f"size={number},{key}={number},id=x"):
        try:
            guest = read_guest((option, value))
        except EmupmemError:
            continue  # no machine of that name has NVDIMMs
        for size in (guest.ram or 0, guest.maxmem, guest.slots, guest.cpus, *(n or 0 for n in guest.nodes)):
            assert 0 <= size < 1 << 64


@given(st.text(alphabet='[]"= \n#abcmemorysize0189-.\0é', max_size=200))
def test_any_file_for_readconfig(text: str) -> None:
    for head in ("", "[memory]\n", '[device "x"]\n', "[machine]\n"):
        read_guest(("-readconfig", "x"), lambda name, head=head: head + text)  # type: ignore[misc]


@given(st.text(alphabet='{}[]":, ab1ndriverfile', max_size=60))
def test_any_json(text: str) -> None:
    read_guest(("-device", f"{{{text}}}", "-blockdev", f'{{"driver":{text}}}', "-object", "{" * 3000))
