# SPDX-License-Identifier: Apache-2.0
"""What is planned for ramdax, on a machine in a folder; the real driver is in test_vm_keep.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emupmem.cli import session as cli_session
from emupmem.device import ramdax
from emupmem.model import GIB, KIB, MIB, Command, EmupmemError
from emupmem.system import files
from emupmem.system.machine import Machine
from tests.cli.runner import Run
from tests.fake import FakeMachine, build, put, running, script

PLATFORM = "/sys/devices/platform/e820_pmem"


def link(machine: FakeMachine, name: str, target: str) -> None:
    """A symbolic link of the machine."""
    path = machine.root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """Linux 7.2 with the module, its range at 4 GiB bound to the usual driver."""
    made = build(tmp_path / "machine")
    put(made, "/proc/sys/kernel/osrelease", "7.2.0-amd64")
    put(made, "/lib/modules/7.2.0-amd64/modules.dep", "kernel/drivers/nvdimm/ramdax.ko.xz:\n")
    put(made, "/proc/self/mountinfo", "21 1 254:1 / / rw shared:1 - ext4 /dev/vda1 rw\n")
    put(made, f"{PLATFORM}/driver_override", "(null)")
    for name in ("e820_pmem/unbind", "drivers_probe"):
        put(made, f"/sys/bus/platform/{'' if name == 'drivers_probe' else 'drivers/'}{name}", "")
    link(made, "/sys/bus/platform/devices/e820_pmem", PLATFORM)
    bind(made, "e820_pmem")
    block = f"{PLATFORM}/ndbus0/region0/namespace0.0/block/pmem0"
    put(made, f"{block}/dev", "259:0")
    link(made, "/sys/class/block/pmem0", block)
    return made


def bind(machine: FakeMachine, driver: str) -> None:
    put(machine, f"/sys/bus/platform/drivers/{driver}/uevent", "")
    link(machine, f"{PLATFORM}/driver", f"/sys/bus/platform/drivers/{driver}")


def space(name: str, start: int, size: int, mode: str = "fsdax") -> dict[str, Any]:
    dev = {"chardev": f"dax{name[9:]}"} if mode == "devdax" else {"blockdev": f"pmem{name[9:]}"}
    return {"dev": name, "mode": mode, "size": size - 2 * MIB, "start": start, "raw": size, **dev}


def divided(machine: FakeMachine, *spaces: dict[str, Any], size: int = GIB, free: int = 0) -> None:
    """Let ramdax have the range, and ndctl tell of these namespaces."""
    bind(machine, "ramdax")
    put(machine, "/sys/bus/nd/devices/region0/resource", hex(4 * GIB))
    for one in spaces:
        put(machine, f"/sys/bus/nd/devices/{one['dev']}/size", str(one["raw"]))
        put(machine, f"/sys/bus/nd/devices/{one['dev']}/resource", hex(one["start"]))
    seed = {"dev": "namespace0.9", "mode": "raw", "size": 0, "state": "disabled"}
    region = {
        "dev": "region0",
        "size": size,
        "available_size": free,
        "max_available_extent": free,
        "namespaces": [*spaces, seed],
    }
    buses = [
        {"provider": "ACPI.NFIT", "regions": [{"dev": "region5", "size": GIB, "available_size": GIB}]},
        {"provider": "ramdax", "regions": [region]},
    ]
    put(machine, "/buses", json.dumps(buses))
    script(machine, "ndctl", f"#!/bin/sh\ncat '{machine.root}/buses'\n")


def refused(call: Any) -> str:
    with pytest.raises(EmupmemError) as caught:
        call()
    return f"{caught.value.message} | {caught.value.hint}"


def test_older_kernels_are_told_since_when(machine: FakeMachine) -> None:
    for release in ("6.1.0-18-amd64", "6.18.9", "5.15.0-generic"):
        put(machine, "/proc/sys/kernel/osrelease", release)
        message = refused(lambda: ramdax.bind_steps(machine))
        assert f"ramdax exists since Linux 6.19; this is {release}" in message
    put(machine, "/proc/sys/kernel/osrelease", "7.3.0-custom")
    assert "built without ramdax (CONFIG_RAMDAX)" in refused(lambda: ramdax.require(machine))


def test_nothing_reserved(machine: FakeMachine) -> None:
    (machine.root / "sys/bus/platform/devices/e820_pmem").unlink()
    assert "no memory is reserved in this boot" in refused(lambda: ramdax.bind_steps(machine))


def test_bind_and_unbind_are_data(machine: FakeMachine) -> None:
    here = "/sys/bus/platform"
    assert ramdax.bind_steps(machine) == (
        Command(("modprobe", "ramdax")),
        ramdax.Write(f"{here}/devices/e820_pmem/driver_override", "ramdax"),
        ramdax.Write(f"{here}/drivers/e820_pmem/unbind", "e820_pmem"),
        ramdax.Write(f"{here}/drivers_probe", "e820_pmem"),
    )
    assert ramdax.bind_steps(machine, ramdax.LEGACY) == ()
    bind(machine, "ramdax")
    assert ramdax.bind_steps(machine) == ()
    assert [str(s) for s in ramdax.bind_steps(machine, ramdax.LEGACY)[1:]] == [
        f"echo > {here}/devices/e820_pmem/driver_override",
        f"echo e820_pmem > {here}/drivers/ramdax/unbind",
        f"echo e820_pmem > {here}/drivers_probe",
    ]


def test_mounted_is_refused(machine: FakeMachine) -> None:
    put(machine, "/proc/self/mountinfo", "40 21 259:0 / /mnt rw - ext4 /dev/pmem0 rw\n")
    assert "/dev/pmem0 is mounted on /mnt | umount /mnt" in refused(lambda: ramdax.bind_steps(machine))


def test_a_mapped_devdax_is_refused(machine: FakeMachine) -> None:
    divided(machine, space("namespace0.1", 4 * GIB, 128 * MIB, "devdax"))
    put(machine, "/proc/77/comm", "database")
    put(machine, "/proc/77/maps", "7f00-7f01 rw-s 00000000 00:05 99      /dev/dax0.10\n")
    assert ramdax.delete_steps(machine, "namespace0.1")
    put(machine, "/proc/77/maps", "7f00-7f01 rw-s 00000000 00:05 99      /dev/dax0.1\n")
    message = refused(lambda: ramdax.delete_steps(machine, "namespace0.1"))
    assert "/dev/dax0.1 is in use by database (process 77)" in message


def test_an_open_devdax_is_refused(machine: FakeMachine) -> None:
    divided(machine, space("namespace0.1", 4 * GIB, 128 * MIB, "devdax"))
    put(machine, "/proc/77/comm", "database")
    put(machine, "/dev/dax0.1", "")
    link(machine, "/proc/77/fd/5", "/dev/dax0.1")
    message = refused(lambda: ramdax.delete_steps(machine, "namespace0.1"))
    assert "/dev/dax0.1 is in use by database (process 77)" in message


def test_a_devdax_that_is_memory_is_refused(machine: FakeMachine) -> None:
    divided(machine, space("namespace0.1", 4 * GIB, 128 * MIB, "devdax"))
    link(machine, "/sys/bus/dax/devices/dax0.1", f"{PLATFORM}/ndbus0/region0/dax0.1/dax0.1")
    link(machine, f"{PLATFORM}/ndbus0/region0/dax0.1/dax0.1/driver", "/sys/bus/dax/drivers/kmem")
    put(machine, "/sys/bus/dax/drivers/kmem/uevent", "")
    for steps in (
        lambda: ramdax.delete_steps(machine, "namespace0.1"),
        lambda: ramdax.resize_steps(machine, "namespace0.1", 64 * MIB),
    ):
        message = refused(steps)
        assert "/dev/dax0.1 is in use as RAM" in message
        assert "daxctl reconfigure-device --mode=devdax dax0.1" in message


def test_what_was_mounted_while_the_question_was_open_stays(
    run: Run, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(monkeypatch.setattr, machine)
    written: list[object] = []
    monkeypatch.setattr(files, "write_sysfs", lambda *words: written.append(words))
    line = "40 21 259:0 / /mnt rw - ext4 /dev/pmem0 rw\n"
    monkeypatch.setattr(cli_session, "ask", lambda question: put(machine, "/proc/self/mountinfo", line))
    done = run("namespaces", "bind")
    assert done.status == 1
    assert "/dev/pmem0 is mounted on /mnt" in done.err
    assert written == []


def test_a_driver_that_refuses_gives_the_range_back(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(machine, "modprobe", "#!/bin/sh\nexit 0\n")
    pokes: list[tuple[str, str]] = []

    def poke(_: FakeMachine, name: str, text: str) -> None:
        pokes.append((name.rpartition("/")[2], text))
        if name.endswith("unbind"):
            (machine.root / f"{PLATFORM}/driver".lstrip("/")).unlink()

    monkeypatch.setattr(files, "write_sysfs", poke)
    monkeypatch.setattr(ramdax, "wait_for", lambda ready, seconds, what: ready())
    assert "ramdax did not take the range" in refused(
        lambda: ramdax.rebind(machine, ramdax.bind_steps(machine))
    )
    assert pokes[-2:] == [("driver_override", ""), ("drivers_probe", "e820_pmem")]


def test_only_what_ramdax_has_is_listed(machine: FakeMachine) -> None:
    assert ramdax.ramdax_regions(machine) == ()
    divided(
        machine,
        space("namespace0.1", 4 * GIB + 128 * MIB, 64 * MIB),
        space("namespace0.0", 4 * GIB, 128 * MIB),
    )
    (region,) = ramdax.ramdax_regions(machine)
    assert region.name == "region0"
    assert [n.name for n in region.namespaces] == ["namespace0.0", "namespace0.1"], "no seed, in order"
    assert region.namespaces[0].raw_size == 128 * MIB
    assert region.namespaces[0].size == 126 * MIB


def test_create_needs_room_in_one_piece(machine: FakeMachine) -> None:
    assert "belongs to e820_pmem, not to ramdax | sudo emupmem namespaces bind" in refused(
        lambda: ramdax.create_steps(machine, MIB, "fsdax")
    )
    divided(machine, free=256 * MIB)
    (step,) = ramdax.create_steps(machine, 256 * MIB, "devdax")
    assert isinstance(step, Command)
    assert step.argv == ("ndctl", "create-namespace", "-r", "region0", "-m", "devdax", "-s", str(256 * MIB))
    message = refused(lambda: ramdax.create_steps(machine, 272 * MIB, "fsdax"))
    assert "no range has room for 272 MiB in one piece | the most is 256 MiB" in message


def test_resize_proves_the_room_before_it_deletes(machine: FakeMachine) -> None:
    first = space("namespace0.0", 4 * GIB, 128 * MIB)
    middle = space("namespace0.1", 4 * GIB + 256 * MIB, 128 * MIB, "devdax")
    divided(machine, first, middle)
    # a gap of 128 MiB behind the first, 640 MiB less the labels behind the second
    steps = ramdax.resize_steps(machine, "/dev/pmem0.0", 624 * MIB)
    assert [s.argv[1] for s in steps if isinstance(s, Command)] == ["destroy-namespace", "create-namespace"]
    assert "can have at most 624 MiB" in refused(
        lambda: ramdax.resize_steps(machine, "namespace0.0", 640 * MIB)
    )
    larger = ramdax.resize_steps(machine, "namespace0.1", 768 * MIB)
    assert "devdax" in larger[1].argv if isinstance(larger[1], Command) else False
    assert "there is no namespace namespace0.7 on the emulated memory | there is namespace0.0" in refused(
        lambda: ramdax.resize_steps(machine, "namespace0.7", MIB)
    )


def test_largest_gap() -> None:
    region = ramdax.RamdaxRegion("region0", 0, GIB, 0, ())
    one = ramdax.RamNamespace("namespace0.0", "raw", GIB, GIB - 16 * MIB, 0, "pmem0", "region0")
    assert ramdax.largest_gap(region, one) == GIB - 16 * MIB, "the labels take the last step"
    assert ramdax.largest_gap(region, one, 128 * KIB) == GIB - 128 * KIB


def test_the_rule_for_every_boot(machine: FakeMachine) -> None:
    ramdax.require_at_boot(machine)
    assert ramdax.boot_step(machine, binds=False) == ""
    assert ramdax.boot_step(machine, binds=True) == f"write {ramdax.RULE}"
    ramdax.bind_at_boot(machine)
    assert ramdax.boot_step(machine, binds=True) == ""
    text = (machine.root / ramdax.RULE.lstrip("/")).read_text()
    assert text == ramdax.RULE_TEXT
    rules = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(rules) == 1
    assert 'DRIVER==""' in rules[0], "never takes a range from under a driver that has it"
    assert 'PROGRAM=="/sbin/modprobe -q ramdax"' in rules[0], "nothing where the kernel has no ramdax"
    assert ramdax.boot_step(machine, binds=False) == f"rm {ramdax.RULE}"
    ramdax.remove_at_boot(machine)
    assert not machine.exists(ramdax.RULE)
    put(machine, "/lib/modules/7.2.0-amd64/modules.builtin", "kernel/drivers/nvdimm/nd_e820.ko\n")
    assert "nd_e820 is built in" in refused(lambda: ramdax.require_at_boot(machine))


def test_a_namespace_that_was_made_is_no_error(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    divided(machine, free=GIB)
    look = ramdax.ramdax_regions
    ran: list[object] = []

    def fails_afterwards(here: Machine) -> tuple[ramdax.RamdaxRegion, ...]:
        if ran:
            raise EmupmemError("ndctl has gone", "look for it")
        return look(here)

    running(monkeypatch.setattr, machine)
    monkeypatch.setattr(ramdax, "run_steps", lambda here, steps: ran.append(steps))
    monkeypatch.setattr(ramdax, "ramdax_regions", fails_afterwards)
    status, out, err = run("namespaces", "create", "--size", "512M")
    assert (status, len(ran)) == (0, 1)
    assert "✓ done" in out
    assert "! it is done, but ndctl has gone: sudo emupmem namespaces list shows it" in err


@pytest.mark.parametrize(
    ("size", "words", "hint"),
    [
        (0, "0 is not a multiple of 16 MiB, in which region0 is divided", "--size 16M is the next"),
        (1, "1 is not a multiple of 16 MiB", "--size 16M is the next"),
        (100 * MIB, "100M is not a multiple of 16 MiB", "--size 112M is the next"),
        (255 * MIB, "255M is not a multiple of 16 MiB", "--size 256M is the next"),
    ],
)
def test_a_size_that_ndctl_refuses_is_refused_before_anything_is_deleted(
    machine: FakeMachine, size: int, words: str, hint: str
) -> None:
    divided(machine, space("namespace0.0", 4 * GIB, 128 * MIB), free=256 * MIB)
    for steps in (
        lambda: ramdax.create_steps(machine, size, "fsdax"),
        lambda: ramdax.resize_steps(machine, "namespace0.0", size),
    ):
        message = refused(steps)
        assert words in message
        assert hint in message
    put(machine, "/sys/bus/nd/devices/region0/align", "0x100000")
    assert len(ramdax.create_steps(machine, 100 * MIB, "fsdax")) == 1 or size != 100 * MIB
    assert "256 MiB" not in refused(lambda: ramdax.create_steps(machine, 4 * KIB, "fsdax"))


NDCTL_THAT_REFUSES = """#!/bin/sh
case $1 in
    list) cat '{root}/buses' ;;
    destroy-namespace) cp '{root}/empty' '{root}/buses' ;;
    create-namespace)
        echo '  Error: create namespace: nobody knows why' >&2
        echo 'failed to create namespace: Invalid argument' >&2
        exit 234
        ;;
esac
"""


def test_a_namespace_that_is_gone_is_said_to_be(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    running(monkeypatch.setattr, machine)
    divided(machine, free=GIB)
    (machine.root / "buses").rename(machine.root / "empty")
    divided(machine, space("namespace0.0", 4 * GIB, 128 * MIB), free=512 * MIB)
    script(machine, "ndctl", NDCTL_THAT_REFUSES.format(root=machine.root))
    done = run("namespaces", "create", "--size", "64M", "--json")
    assert (done.status, done.json["changed"], len(done.json["regions"])) == (1, False, 0)
    assert "nobody knows why" in done.json["error"]
    done = run("namespaces", "resize", "namespace0.0", "--size", "64M", "--yes", "--json")
    assert (done.status, done.json["changed"]) == (1, True)
    assert done.json["regions"][0]["namespaces"] == []
    assert "the namespace is deleted, but the new one was not made: ndctl create-namespace" in done.err
    assert "sudo emupmem namespaces create --size SIZE makes one" in done.err


def test_what_is_done_at_every_boot_is_shown_and_counts_as_a_change(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    running(monkeypatch.setattr, machine)
    for name in ("modprobe", "udevadm"):
        script(machine, name, "#!/bin/sh\n")
    divided(machine)

    def poke(_: FakeMachine, name: str, text: str) -> None:
        if name.endswith("drivers_probe"):
            bind(machine, "e820_pmem")
        if name.endswith("unbind"):
            (machine.root / f"{PLATFORM}/driver".lstrip("/")).unlink()

    monkeypatch.setattr(files, "write_sysfs", poke)
    assert f"write {ramdax.RULE}" in run("namespaces", "bind", "--at-boot", "--dry-run").err
    for changed in (True, False):
        done = run("namespaces", "bind", "--at-boot", "--json")
        assert done.json == {"changed": changed, "driver": "ramdax", "at_boot": True}
    done = run("namespaces", "unbind", "--yes")
    assert done.out == "✓ the reserved ranges belong to e820_pmem\n"
    assert f"! at the next boot ramdax has them again ({ramdax.RULE})" in done.err
    assert "sudo emupmem namespaces unbind --at-boot" in done.err
    assert f"rm {ramdax.RULE}" in run("namespaces", "unbind", "--at-boot", "--dry-run").err
    for changed in (True, False):
        done = run("namespaces", "unbind", "--at-boot", "--json")
        assert done.json == {"changed": changed, "driver": "e820_pmem", "at_boot": False}
