# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring, on regular files that stand for devices; real ones are in test_vm_keep.py."""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import json
import os
import random
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emupmem.device import freeze
from emupmem.device import image as device_image
from emupmem.device.checksum import ATTRIBUTE
from emupmem.device.image import restore_image, save_image
from emupmem.device.unit import SIDECAR
from emupmem.model import GIB, KIB, MIB, EmupmemError
from tests import examples
from tests.cli.runner import Run
from tests.fake import build, put, running

SIZE = 9 * MIB + 12 * KIB


class Disk:
    """A machine in a folder with /dev/pmem0 in it, which is a regular file."""

    def __init__(self, root: Path, size: int = SIZE) -> None:
        self.machine = build(root / "machine")
        self.root = root
        put(self.machine, "/proc/cmdline", "quiet memmap=1G!4G")
        self.add("pmem0", "region0", 4 * GIB, "259:0", size)
        self.mount("")

    def add(self, name: str, region: str, start: int, number: str, size: int) -> None:
        folder = f"sys/devices/platform/e820_pmem/ndbus0/{region}"
        put(self.machine, f"{folder}/resource", hex(start))
        put(self.machine, f"{folder}/size", str(size))
        put(self.machine, f"{folder}/namespace0.0/block/{name}/size", str(size // 512))
        put(self.machine, f"{folder}/namespace0.0/block/{name}/dev", number)
        root = self.machine.root
        for link, target in (
            (f"sys/bus/nd/devices/{region}", folder),
            (f"sys/class/block/{name}", f"{folder}/namespace0.0/block/{name}"),
        ):
            (root / link).parent.mkdir(parents=True, exist_ok=True)
            (root / link).symlink_to(f"/{target}")
        put(self.machine, f"/dev/{name}", b"")
        self.path.write_bytes(bytes(size)) if name == "pmem0" else None

    def mount(self, where: str, number: str = "259:0") -> None:
        other = "21 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
        ours = f"40 21 {number} / {where} rw,relatime - ext4 /dev/pmem0 rw,dax=always\n" if where else ""
        put(self.machine, "/proc/self/mountinfo", other + ours)

    @property
    def path(self) -> Path:
        return self.machine.root / "dev/pmem0"

    @property
    def file(self) -> str:
        return str(self.root / "image")

    def open(self, name: str, flags: int) -> int:
        return os.open(self.machine.path(name), flags & ~os.O_EXCL)

    def save(self, source: str | None = None, **more: Any) -> device_image.Snapshot:
        return save_image(self.machine, self.file, source, opener=self.open, **more)

    def restore(self, name: str | None = None, **more: Any) -> device_image.Snapshot:
        return restore_image(self.machine, self.file, name, opener=self.open, **more)


@functools.lru_cache(maxsize=4)
def content(seed: int, size: int) -> bytes:
    """Some blocks of noise, some of zeros, some with one byte in them."""
    made = random.Random(seed)
    out = bytearray(size)
    for _ in range(made.randrange(12)):
        at = made.randrange(size)
        length = made.choice((1, 511, 4096, 70_000, 2 * MIB))
        out[at : at + length] = made.randbytes(min(length, size - at))
    return bytes(out)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk(tmp_path)
    disk.path.write_bytes(content(3, SIZE))
    return disk


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(EmupmemError) as caught:
        call()
    return f"{caught.value.message} | {caught.value.hint}"


@examples(25)
@given(seed=st.integers(0, 1 << 32), blocks=st.integers(1, 2400), attributes=st.booleans())
def test_what_was_saved_comes_back(seed: int, blocks: int, attributes: bool) -> None:
    size = blocks * 4096
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        if not attributes:
            patch.setattr(device_image, "attach_checksum", lambda image, checksum: False)
        disk = Disk(Path(name), size)
        data = content(seed, size)
        disk.path.write_bytes(data)
        saved = disk.save()
        assert Path(disk.file).read_bytes() == data, "a plain raw image"
        disk.path.write_bytes(random.Random(seed + 1).randbytes(size))
        back = disk.restore()
        assert disk.path.read_bytes() == data
        assert saved.checksum == back.checksum != ""
        assert saved.size == back.size == size


def test_zeros_take_no_room(disk: Disk) -> None:
    data = bytearray(SIZE)
    data[5 * MIB] = 1
    disk.path.write_bytes(data)
    assert disk.save().allocated <= 64 * KIB
    assert Path(disk.file).stat().st_size == SIZE
    assert stat.S_IMODE(Path(disk.file).stat().st_mode) == 0o600


@pytest.mark.parametrize("at", [0, 1, 4096, 256 * KIB, 5 * MIB + 7, SIZE - 1])
@pytest.mark.parametrize("attributes", [True, False])
def test_one_changed_byte_is_refused_before_anything_is_written(
    disk: Disk, at: int, attributes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not attributes:
        monkeypatch.setattr(device_image, "attach_checksum", lambda image, checksum: False)
    disk.save()
    with Path(disk.file).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    disk.path.write_bytes(b"x" * SIZE)
    assert "its checksum differs; nothing was written" in refused(disk.restore)
    assert disk.path.read_bytes() == b"x" * SIZE
    assert disk.restore(force=True).checksum == ""
    assert disk.path.read_bytes() == Path(disk.file).read_bytes()


def test_a_truncated_image_and_another_size_are_refused(disk: Disk) -> None:
    disk.save()
    os.truncate(disk.file, SIZE - 4096)
    before = disk.path.read_bytes()
    assert "an image fits only a device of the same size" in refused(disk.restore)
    assert "an image fits only" in refused(lambda: disk.restore(force=True))
    assert disk.path.read_bytes() == before


def test_without_a_checksum_it_takes_force(disk: Disk) -> None:
    disk.save()
    os.removexattr(disk.file, ATTRIBUTE)
    message = refused(disk.restore)
    assert "has no checksum; nothing was written" in message
    assert "--force" in message
    assert disk.restore(force=True).checksum == ""


class Killed(BaseException):
    """SIGKILL, as far as an exception can be one."""


def test_stopped_at_any_step_the_old_image_is_whole(disk: Disk) -> None:
    disk.save()
    old = Path(disk.file).read_bytes()
    steps: list[str] = []
    disk.save(progress=lambda what, done, size: steps.append(what))
    assert steps[-1] == "to the disk"
    disk.path.write_bytes(content(4, SIZE))
    for stop in range(len(steps)):
        left = [stop]

        def progress(what: str, done: int, size: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        with pytest.raises(Killed):
            disk.save(progress=progress)
        assert Path(disk.file).read_bytes() == old
        assert sorted(p.name for p in disk.root.iterdir()) == ["image", "machine"]
    assert disk.restore().checksum


@pytest.mark.slow
@pytest.mark.parametrize("attributes", [True, False])
@pytest.mark.parametrize("where", range(12))
def test_a_crash_between_any_two_calls_pairs_no_image_with_a_wrong_sum(
    disk: Disk, where: int, attributes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not attributes:
        monkeypatch.setattr(device_image, "attach_checksum", lambda image, checksum: False)
    disk.save()
    old = disk.path.read_bytes()
    new = content(5, SIZE)
    disk.path.write_bytes(new)
    left = [where]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        # after the crash nothing cleans up: what follows it fails as well
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        crashed = False
        try:
            disk.save()
        except Killed:
            crashed = True
    assert crashed or where >= 4
    disk.path.write_bytes(bytes(SIZE))
    assert disk.restore().checksum
    assert disk.path.read_bytes() in (old, new)
    disk.path.write_bytes(new)
    disk.save()
    assert Path(disk.file).read_bytes() == new
    assert [p.name for p in disk.root.iterdir() if p.name.startswith(".")] == []


def test_interrupted_restore_leaves_no_superblock(disk: Disk) -> None:
    data = random.Random(1).randbytes(SIZE)
    disk.path.write_bytes(data)
    disk.save()
    disk.path.write_bytes(b"old" * (SIZE // 3))

    def stop(what: str, done: int, size: int) -> None:
        if what == "restoring":
            raise EmupmemError("stopped by SIGTERM")

    message = refused(lambda: disk.restore(progress=stop))
    assert "/dev/pmem0 was restored in part only: stopped by SIGTERM" in message
    assert disk.path.read_bytes()[:MIB] == bytes(MIB)
    disk.restore()
    assert disk.path.read_bytes() == data


def test_an_image_that_changes_meanwhile_is_not_believed(disk: Disk) -> None:
    disk.path.write_bytes(random.Random(1).randbytes(SIZE))
    disk.save()

    def change(what: str, done: int, size: int) -> None:
        if what == "checking" and done == size:
            with Path(disk.file).open("r+b") as file:
                file.seek(2 * MIB)
                file.write(b"changed")

    assert "the image changed while it was read" in refused(lambda: disk.restore(progress=change))
    assert disk.path.read_bytes()[:MIB] == bytes(MIB)


def test_targets_that_are_no_files_are_refused(disk: Disk) -> None:
    folder = disk.root / "folder"
    folder.mkdir()
    (disk.root / "link").symlink_to("image")
    os.mkfifo(disk.root / "fifo")
    for name, word in (
        ("folder", "is a folder"),
        ("link", "is a symbolic link"),
        ("fifo", "is not a regular file"),
        ("missing/image", "is not a folder"),
    ):
        target = str(disk.root / name)
        assert word in refused(functools.partial(save_image, disk.machine, target, opener=disk.open))
    assert "is a folder, not an image" in refused(
        lambda: restore_image(disk.machine, str(folder), opener=disk.open)
    )
    assert "cannot be read: No such file" in refused(disk.restore)


def test_traps_in_an_open_folder_are_refused(disk: Disk) -> None:
    victim = disk.root / "victim"
    victim.write_text("precious")
    trap = disk.root / ".image.emupmem-new"
    trap.symlink_to(victim)
    assert "cannot be written" in refused(disk.save)
    trap.unlink()
    trap.hardlink_to(victim)
    assert "is in the way" in refused(disk.save)
    assert victim.read_text() == "precious"


def test_two_at_once_and_what_a_killed_one_left(disk: Disk) -> None:
    left = disk.root / ".image.emupmem-new"
    left.write_bytes(b"garbage" * 10**6)
    with left.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another emupmem is saving to" in refused(disk.save)
        assert left.exists()
    disk.save()
    assert Path(disk.file).read_bytes() == disk.path.read_bytes()
    assert not left.exists()


def test_too_little_room_is_told_before_anything_is_written(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.save()
    old = Path(disk.file).read_bytes()
    real = os.fstatvfs

    def room(free: int) -> Callable[[int], os.statvfs_result]:
        def call(number: int) -> os.statvfs_result:
            fields = list(real(number))
            fields[1], fields[4] = 4096, free // 4096
            return os.statvfs_result(fields)

        return call

    disk.path.write_bytes(random.Random(2).randbytes(SIZE))
    monkeypatch.setattr(os, "fstatvfs", room(4 * MIB))
    assert "and there are 4 MiB" in refused(disk.save)
    assert Path(disk.file).read_bytes() == old
    # what is in use fits, although the device would not
    disk.path.write_bytes(b"x" * MIB + bytes(SIZE - MIB))
    disk.save()


def test_a_full_disk_leaves_the_old_image(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.save()
    old = Path(disk.file).read_bytes()

    def full(number: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    message = refused(disk.save)
    assert "cannot be written: No space left on device | the disk is full" in message
    assert Path(disk.file).read_bytes() == old
    assert sorted(p.name for p in disk.root.iterdir()) == ["image", "machine"]


def test_other_disks_are_left_alone(disk: Disk) -> None:
    put(disk.machine, "/dev/vda", b"precious")
    put(disk.machine, "/dev/pmem0p1", b"precious")
    put(disk.machine, "/sys/class/block/vda/size", "1")
    disk.add("pmem7", "region7", 64 * GIB, "259:7", MIB)  # an NVDIMM: no memmap= made it
    for name in ("/dev/vda", "/dev/pmem7", "/dev/pmem0p1"):
        for call in (disk.save, disk.restore):
            message = refused(lambda name=name, call=call: call(name))  # type: ignore[misc]
            assert f"{name} is not a device that memmap= made: it is left alone" in message
            assert "/dev/pmem0" in message
    assert "/dev/pmem9 does not exist" in refused(lambda: disk.restore("/dev/pmem9"))
    assert disk.save().device == "/dev/pmem0"


def test_which_device_when_several_or_none(disk: Disk) -> None:
    put(disk.machine, "/proc/cmdline", "memmap=1G!4G,1G!5G")
    disk.add("pmem1", "region1", 5 * GIB, "259:1", MIB)
    assert "there are 2 devices: /dev/pmem0, /dev/pmem1 | name the one you mean" in refused(disk.save)
    (disk.machine.root / "dev/by-id").symlink_to("pmem0")
    assert disk.save("/dev/by-id").device == "/dev/pmem0"
    put(disk.machine, "/proc/cmdline", "quiet")
    assert "there is no device of emulated persistent memory" in refused(disk.save)


def test_a_mounted_device_is_refused_with_the_way_to_save_it(disk: Disk) -> None:
    disk.mount("/mnt/a\\040b")
    assert "/dev/pmem0 is mounted on /mnt/a b | save /mnt/a b instead" in refused(disk.save)
    assert "/dev/pmem0 is mounted on /mnt/a b | umount /mnt/a b" in refused(disk.restore)


def test_a_folder_must_be_the_mount_point_of_a_device_of_ours(disk: Disk) -> None:
    (disk.machine.root / "mnt").mkdir()
    assert "/mnt is not a mount point" in refused(lambda: disk.save("/mnt"))
    disk.mount("/mnt", "8:1")
    assert "/mnt is not a device that memmap= made" in refused(lambda: disk.save("/mnt"))


class Ioctl:
    """FIFREEZE and FITHAW, noted; everything else is not for them."""

    def __init__(self, fails: int = 0) -> None:
        self.calls: list[int] = []
        self.fails = fails

    def __call__(self, descriptor: int, what: int, argument: int = 0) -> int:
        self.calls.append(what)
        if self.fails and what == freeze.FIFREEZE:
            raise OSError(self.fails, os.strerror(self.fails))
        return 0


def frozen_disk(disk: Disk, monkeypatch: pytest.MonkeyPatch, fails: int = 0) -> Ioctl:
    (disk.machine.root / "mnt").mkdir()
    disk.mount("/mnt")
    ioctl = Ioctl(fails)
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(device_image, "_same_disk", lambda path, where: False)
    return ioctl


def test_a_mounted_file_system_is_frozen_and_thawed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    ioctl = frozen_disk(disk, monkeypatch)
    disk.save("/mnt")
    assert ioctl.calls == [freeze.FIFREEZE, freeze.FITHAW]

    def stop(what: str, done: int, size: int) -> None:
        raise EmupmemError("stopped by SIGTERM")

    refused(lambda: disk.save("/mnt", progress=stop))
    assert ioctl.calls == [freeze.FIFREEZE, freeze.FITHAW] * 2


def test_a_file_system_that_cannot_be_frozen_is_refused(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen_disk(disk, monkeypatch, errno.EOPNOTSUPP)
    assert "cannot be frozen: Operation not supported" in refused(lambda: disk.save("/mnt"))
    assert sorted(p.name for p in disk.root.iterdir()) == ["machine"]


def test_never_onto_the_file_system_that_is_frozen(disk: Disk) -> None:
    disk.mount("/")
    assert "is on the file system that is to be saved" in refused(lambda: disk.save("/"))


def test_blank(disk: Disk) -> None:
    disk.path.write_bytes(bytes(SIZE))
    assert device_image.is_blank(disk.machine, None, disk.open)
    disk.path.write_bytes(bytes(SIZE - 1) + b"x")
    assert not device_image.is_blank(disk.machine, None, disk.open)


def test_a_copy_with_a_sidecar_is_as_good(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_image, "attach_checksum", lambda image, checksum: False)
    saved = disk.save()
    assert Path(disk.file + SIDECAR).read_text() == saved.checksum + "\n"
    assert disk.restore().checksum == saved.checksum


# The commands ------------------------------------------------------------------------------------


@pytest.fixture
def run(run: Run, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program on that machine."""
    running(monkeypatch.setattr, disk.machine)
    # the defaults of the functions are bound already: it is the opening itself that is replaced
    real = os.open

    def opening(name: Any, flags: int, *more: Any, **others: Any) -> int:
        if name == "/dev/pmem0":
            return real(disk.path, flags & ~(os.O_EXCL | os.O_DIRECT))
        return real(name, flags, *more, **others)

    monkeypatch.setattr(os, "open", opening)

    return run


def test_commands_save_and_restore(disk: Disk, run: Run) -> None:
    status, out, err = run("save", disk.file, "--json")
    assert (status, err) == (0, ""), "no progress where there is no terminal"
    saved = json.loads(out)
    assert set(saved) == {"file", "device", "size", "allocated", "seconds", "checksum"}
    assert saved["device"] == "/dev/pmem0"
    disk.path.write_bytes(bytes(SIZE - 1) + b"x")
    status, out, err = run("restore", disk.file)
    assert status == 1
    assert "no terminal to ask on" in err
    status, out, _ = run("restore", disk.file, "--yes")
    assert status == 0
    assert out.startswith(f"✓ /dev/pmem0 restored from {disk.file} · 9.0 MiB")
    os.removexattr(disk.file, ATTRIBUTE)
    status, out, err = run("restore", disk.file, "--yes", "--json")
    assert status == 1
    assert "has no checksum" in json.loads(out)["error"]
    status, out, err = run("restore", disk.file, "--yes", "--force")
    assert status == 0
    assert "! it was restored without a valid checksum" in err


def test_on_a_terminal_a_bar_shows_how_far_it_is_and_how_fast(
    disk: Disk, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    for argv in (("save", disk.file), ("restore", disk.file, "--yes")):
        assert run(*argv)[0] == 0
    for words in ("saving", "to the disk", "checking", "restoring", "9.0/9.0 MiB", "iB/s"):
        assert words in shown.getvalue()


def test_a_blank_device_is_restored_without_a_question(disk: Disk, run: Run) -> None:
    run("save", disk.file)
    disk.path.write_bytes(bytes(SIZE))
    assert run("restore", disk.file)[0] == 0


def test_commands_need_root(disk: Disk, run: Run) -> None:
    disk.machine.root_user = False
    for argv in (("save", "x"), ("restore", "x"), ("namespaces", "list")):
        status, _, err = run(*argv)
        assert status == 1
        assert "needs root" in err


def test_what_is_there_is_named_before_its_folder() -> None:
    """A disk that is given for a file is called a disk, wherever it lies; a missing name in /dev is none of ours."""
    with pytest.raises(EmupmemError, match="/dev/null is not a regular file"):
        device_image._target("/dev/null")
    with pytest.raises(EmupmemError, match="makes no files in /dev"):
        device_image._target("/dev/emupmem-none")
