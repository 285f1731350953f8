# SPDX-License-Identifier: Apache-2.0
"""Devdax at every boot on a machine in a folder; ndctl is a stand-in (the real one: tests/vm/test_vm_soft.py)."""

from __future__ import annotations

import mmap
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from emupmem.boot.loader import Options
from emupmem.boot.prepare import prepare_apply, prepare_remove
from emupmem.boot.transaction import carry_out_change
from emupmem.device import at_boot, dax, unit
from emupmem.device.boot_unit import recorded_kinds, unit_change
from emupmem.device.unit import BootDevice, BootMount
from emupmem.model import GIB, MIB, DeviceKind, EmupmemError, Request
from emupmem.verifier.ladder import complete
from emupmem.verifier.observe import observe
from tests.boot.test_change import FOUND, default
from tests.boot.test_soft_words import apply, linux
from tests.cli.runner import Run
from tests.device.pmem import holds, pmem_machine
from tests.fake import STOCK, FakeMachine, script
from tests.verifier.test_verifier import GOOD, broken

WISH = BootDevice(4 * GIB, GIB, DeviceKind.DEVDAX)
REGION = "sys/devices/platform/e820_pmem/ndbus0/region0"
NDCTL = """#!/bin/sh
root=$(dirname "$0")/..
echo "ndctl $*" >> "$root/calls"
rm -r "$root/{region}/namespace0.0/block" "$root/sys/class/block/pmem0"
mkdir -p "$root/{region}/dax0.0/dax0.0" "$root/sys/bus/dax/devices"
echo {size} > "$root/{region}/dax0.0/dax0.0/size"
ln -s "../../../../{region}/dax0.0/dax0.0" "$root/sys/bus/dax/devices/dax0.0"
truncate -s 4M "$root/dev/dax0.0"
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    made = pmem_machine(tmp_path)
    script(made, "ndctl", NDCTL.format(region=REGION, size=GIB - 2 * MIB))
    monkeypatch.setattr(unit, "SECONDS", 0)
    return made


def calls(machine: FakeMachine) -> list[str]:
    return [c for c in machine.peek("/calls").splitlines() if c.startswith("ndctl")]


def test_the_device_is_made_once_and_proven(machine: FakeMachine) -> None:
    said: list[str] = []
    for _ in range(2):  # as after a warm restart: the mode and the content are still there
        assert at_boot.boot(machine, [WISH], said.append) == 0, said
    ready = "/dev/dax0.0 is ready · 1022 MiB, node 0 · emulated, volatile"
    assert said == [f"{ready} · mapped, stored and read back", ready]
    assert calls(machine) == ["ndctl create-namespace -f -e namespace0.0 -m devdax -M mem -a 2097152"]
    assert not any((machine.root / "dev/dax0.0").read_bytes()[:16]), "what was there is put back"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda m: holds(m, "TYPE=ext4\\n"),
            "/dev/pmem0 holds ext4, which devdax would destroy; sudo wipefs -a",
        ),
        (lambda m: script(m, "ndctl", "#!/bin/sh\necho it is busy >&2\nexit 1\n"), "failed: it is busy"),
        (lambda m: script(m, "ndctl", "#!/bin/sh\n"), "ndctl made no DAX device of namespace0.0"),
        (lambda m: (m.root / "sbin/ndctl").unlink(), "ndctl is not installed; apt-get install ndctl"),
        (
            lambda m: shutil.rmtree(m.root / "sys/bus/nd/devices"),
            "no device for memmap=1G!4G appeared within 0 seconds",
        ),
        (
            lambda m: script(
                m, "ndctl", NDCTL.format(region=REGION, size=1).replace("truncate -s 4M", ": >")
            ),
            "dax0.0 cannot be mapped",
        ),
    ],
)
def test_what_is_in_the_way_is_named(machine: FakeMachine, spoil: object, message: str) -> None:
    spoil(machine)  # type: ignore[operator]
    said: list[str] = []
    assert at_boot.boot(machine, [WISH], said.append) == 1
    assert said[0].startswith("emupmem: memmap=1G!4G is not set up as devdax: ")
    assert message in said[0]


def test_a_device_that_forgets_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "device"
    file.write_bytes(bytes(4 << 20))
    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda fd, size: real(fd, size, access=mmap.ACCESS_COPY))
    with pytest.raises(EmupmemError, match="does not hold what is stored in it"):
        dax.prove_device(str(file))


def test_the_unit_has_it_and_gives_it_up(machine: FakeMachine) -> None:
    text = unit.unit_text([WISH], "/usr/local/bin/emupmem")
    assert '"1G!4G" devdax' in text
    assert unit.read_all(text) == (WISH,)
    for words in (["1G%4G-1+0xefffffff", "devdax"], ["1G!4G", "dax"], ["1G$4G", "devdax"]):
        with pytest.raises(EmupmemError, match="is not a range such as"):
            unit.from_words(words)
    apply(machine, DeviceKind.DEVDAX)
    assert default(machine) == linux("memmap=1G!4G")
    assert recorded_kinds(machine) == {(4 * GIB, GIB): DeviceKind.DEVDAX}
    assert not apply(machine, DeviceKind.DEVDAX).needed
    with pytest.raises(EmupmemError, match="there is a different reservation already"):
        apply(machine, DeviceKind.PMEM)
    apply(machine, DeviceKind.DAX, add=True)
    assert set(recorded_kinds(machine).values()) == {DeviceKind.DEVDAX, DeviceKind.DAX}
    carry_out_change(machine, prepare_remove(machine, ["1G%5G"]))
    made = apply(machine, DeviceKind.PMEM, replace=True)
    assert made.unit.needed
    assert not made.boot_needed
    assert recorded_kinds(machine) == {}
    apply(machine, DeviceKind.DEVDAX, replace=True)
    carry_out_change(machine, prepare_remove(machine))
    assert not machine.exists(unit.FILE)
    assert default(machine) == STOCK


def test_a_mount_of_another_range_stays(machine: FakeMachine) -> None:
    mount = BootMount(8 * GIB, GIB, "/mnt/pmem0", "ext4")
    there = [(4 * GIB, GIB), (8 * GIB, GIB)]
    (machine.root / unit.FILE.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    (machine.root / unit.FILE.lstrip("/")).write_text(unit.unit_text([WISH, mount], "/usr/local/bin/emupmem"))
    assert unit_change(machine, there, plain=there[:1]).mounts == (mount,)
    assert unit_change(machine, there, plain=there[:1]).devices == ()
    assert unit_change(machine, there).devices == (WISH,)


def test_verify_waits_for_it_and_says_what_is_missing(machine: FakeMachine) -> None:
    apply(machine, DeviceKind.DEVDAX)
    seen = observe(machine, 0)
    assert not complete(seen)
    there = replace(GOOD, devdax=frozenset({4 * GIB}))
    broken(there, "dax", "/dev/pmem0 is no devdax device yet", "restart emupmem.service")
    assert at_boot.boot(machine, [WISH], lambda line: None) == 0
    seen = observe(machine, 0)
    assert complete(seen)


def test_ndctl_must_be_there_before(machine: FakeMachine) -> None:
    (machine.root / "sbin/ndctl").unlink()
    with pytest.raises(EmupmemError, match="ndctl is not installed"):
        prepare_apply(machine, FOUND, Request(GIB, kind=DeviceKind.DEVDAX), Options())


def test_options_that_exclude_it(run: Run, here: FakeMachine) -> None:
    words = ["apply", "--size", "1G", "--as", "devdax", "--dry-run"]
    assert "a trial sets nothing up at boot" in run(*words, "--trial").err
    assert "--mount needs a block device" in run(*words, "--mount", "/mnt").err
