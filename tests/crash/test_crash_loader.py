# SPDX-License-Identifier: Apache-2.0
"""The same as tests/crash/test_crash.py for other boot loaders: killed, or cut off from power, at every changing call.

What emupmem writes itself is whole after a power cut as well. What grubby and sdbootutil write is theirs:
there the kill is judged, and the power cut before they begin and after all is done.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot import loader, prepare, transaction
from emupmem.model import GIB, EmupmemError, Request
from tests.boot import (
    test_grub_bls,
    test_limine,
    test_loader,
    test_oneshot,
    test_refind,
    test_rpm_ostree,
    test_uki,
)
from tests.boot.test_loader import program, survey_of
from tests.crash import tracer
from tests.crash.tracer import Call, trace
from tests.crash.worlds import Disk, World, essence, litter, look, rebuilt, settled
from tests.fake import FakeMachine

pytestmark = pytest.mark.skipif(not tracer.available(), reason="this machine lets nobody trace (x86-64 only)")

PLACES = (
    "boot/efi/loader/",
    "boot/loader/",
    "etc/kernel/",
    "etc/default/",
    "boot/grub2/",
    "boot/efi/EFI/",
    "etc/kernelstub/",
    "boot/limine.conf",
)


def without_cmdline(root: Path) -> FakeMachine:
    machine = test_loader.systemd_boot(root)
    (machine.root / "etc/kernel/cmdline").unlink()
    return machine


def kernelopts(root: Path) -> FakeMachine:
    return test_loader.fedora(root, "$kernelopts", env=f"kernelopts={test_loader.ROOT}\n")


def ostree(root: Path) -> FakeMachine:
    machine = test_loader.ostree(root)
    program(machine, "ostree", test_loader.RPM_OSTREE, HEAD="")
    return machine


def in_trial(
    knows: Callable[[Path], FakeMachine], starts: Callable[[FakeMachine], None]
) -> Callable[[Path], FakeMachine]:
    """A machine whose trial runs."""

    def made(root: Path) -> FakeMachine:
        machine = knows(root)
        try_once(machine)
        starts(machine)
        return machine

    return made


STARTS: dict[str, Callable[[Path], FakeMachine]] = {
    "systemd-boot": test_loader.systemd_boot,
    "systemd-boot-without-cmdline": without_cmdline,
    "grubby": test_loader.fedora,
    "grubby-kernelopts": kernelopts,
    "grubby-without-cmdline": test_loader.fedora_without_cmdline,
    "grubby-rhel8-uefi": test_loader.rhel8_uefi,
    "sdbootutil": test_loader.opensuse,
    "kernelstub": test_loader.pop,
    "sdboot-manage": test_loader.cachyos,
    "proxmox-boot-tool": test_loader.proxmox,
    "limine": test_limine.limine,
    "refind": test_refind.refind,
    "rpm-ostree": ostree,
    "rpm-ostree-trial": ostree,
    "systemd-boot-trial": test_oneshot.knows_trials,
    "grub-bls-trial": test_grub_bls.knows_trials,
    "unified": test_uki.unified,
    "unified-trial": test_uki.knows_trials,
    "systemd-boot-confirm": in_trial(test_oneshot.knows_trials, test_oneshot.starts),
    "grub-bls-confirm": in_trial(test_grub_bls.knows_trials, test_grub_bls.starts),
    "unified-confirm": in_trial(test_uki.knows_trials, test_uki.starts),
    "rpm-ostree-confirm": in_trial(ostree, test_rpm_ostree.starts),
}


def apply(machine: FakeMachine) -> None:
    prepared = prepare.prepare_apply(machine, survey_of(machine), Request(GIB), loader.Options())
    if prepared.needed:
        transaction.carry_out_change(machine, prepared)


def try_once(machine: FakeMachine) -> None:
    prepared = prepare.prepare_trial(machine, survey_of(machine), Request(GIB), loader.Options())
    if prepared.needed:
        transaction.carry_out_change(machine, prepared)


def confirm(machine: FakeMachine) -> None:
    try:
        prepared = prepare.prepare_confirm(machine)
    except EmupmemError as exc:
        assert exc.message == "there is no trial to confirm", exc  # it was done before
        return
    transaction.carry_out_change(machine, prepared)


def remove(machine: FakeMachine) -> None:
    prepared = prepare.prepare_remove(machine)
    if prepared.needed:
        transaction.carry_out_change(machine, prepared)


class Case:
    """A change of a machine, the states before and after it, and what was judged already."""

    def __init__(self, name: str, folder: Path, backwards: bool) -> None:
        self.folder = folder
        machine = STARTS[name](folder / "old")
        states = [look(machine.root)]
        there = {"trial": try_once, "confirm": confirm}.get(name.rpartition("-")[2], apply)
        for step in (there, remove):
            step(machine)
            states.append(look(machine.root))
        self.do, self.back = (remove, there) if backwards else (there, remove)
        self.old, self.new = states[1:] if backwards else states[:2]
        self.former = states[1] if backwards else states[2]
        self.judged: set[object] = set()
        self.wrong: list[str] = []

    def judge(self, where: str, world: World) -> None:
        key = essence(world)
        if key in self.judged:
            return
        self.judged.add(key)
        names = {n for w in (world, self.old, self.new) for n in w if n.startswith(PLACES)}
        for name in names:
            if world.get(name) is not None and world[name].kind == "folder":
                continue
            now, was, will = (self._content(w, name) for w in (world, self.old, self.new))
            folder, _, base = name.rpartition("/")
            aside = world.get(f"{folder}/.{base}.emupmem-old")
            whole = aside is not None and aside.data in [c[1] for c in (was, will) if c is not None]
            # grubby writes in place what we had made: our record shows what it was
            whole |= (
                base == "cmdline"
                and now is not None
                and not now[1]
                and any(n.endswith(".made") for n in world)
            )
            if (
                now not in (was, will)
                and not whole
                and not litter({name: world[name]})
                and "/sed" not in name
            ):
                self.wrong.append(f"{where}: {name} is neither the old nor the new one")
        for step, target in ((self.do, self.new), (self.back, self.former)):
            machine = rebuilt(self.folder, world)
            step(machine)
            end = {n: o for n, o in look(machine.root).items() if "/sed" not in n}
            if litter(end):
                self.wrong.append(f"{where}: {step.__name__} leaves {litter(end)}")
            if settled(end) != settled(target):
                differ = sorted({e[0] for e in set(settled(end)) ^ set(settled(target))})
                self.wrong.append(f"{where}: {step.__name__} ends otherwise: {differ}")

    @staticmethod
    def _content(world: World, name: str) -> tuple[int, bytes] | None:
        return (world[name].mode, world[name].data) if name in world else None


def shown(call: Call) -> str:
    return f"{'' if call.own else 'the program: '}{call.name} {' '.join(p.rpartition('/')[2] for p in call.paths)}"


def directions(name: str) -> tuple[bool, ...]:
    """Whether a change is made backwards, too: what was removed has no trial to confirm any more."""
    return (False,) if name.endswith("-confirm") else (False, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backwards"),
    [
        pytest.param(
            name,
            backwards,
            id=f"{name}-{'remove' if backwards else 'apply'}",
        )
        for name in STARTS
        for backwards in directions(name)
    ],
)
def test_whatever_ends_the_entries_are_whole(tmp_path: Path, name: str, backwards: bool) -> None:
    case = Case(name, tmp_path, backwards)
    machine = rebuilt(case.folder, case.old)
    disk = Disk(machine.root)
    begun = False
    seen: list[tuple[str, World]] = []

    def on_call(call: Call) -> None:
        nonlocal begun
        begun = begun or (not call.own and call.inside(machine.root))  # ukify works elsewhere
        if call.inside(machine.root):
            for how, world in disk.worlds():
                if how == "killed" or not begun:
                    seen.append((f"{how} before {shown(call)}", world))
        disk.about_to(call)

    done = trace(lambda: case.do(machine), on_call)
    assert done.status == 0, done
    seen += [(f"{how} at the end", world) for how, world in disk.worlds()]
    disk.close()
    assert settled(look(machine.root)) == settled(case.new)
    for where, world in seen:
        case.judge(where, world)
    print(len(seen), len(case.judged))
    assert not case.wrong, "\n".join(dict.fromkeys(case.wrong))


@pytest.mark.slow
def test_a_signal_at_any_call_is_held_back_or_rolls_back(tmp_path: Path) -> None:
    case = Case("systemd-boot", tmp_path, backwards=False)
    calls: list[Call] = []
    machine = rebuilt(case.folder, case.old)
    trace(lambda: apply(machine), lambda call: calls.append(call) if call.inside(machine.root) else None)
    for at in range(0, len(calls), 3):
        machine = rebuilt(case.folder, case.old)
        count = 0

        def on_call(call: Call, machine: FakeMachine = machine, at: int = at) -> None:
            nonlocal count
            if call.inside(machine.root):
                if count == at:
                    os.kill(call.trace.main, signal.SIGTERM)
                count += 1

        trace(lambda machine=machine: apply(machine), on_call)  # type: ignore[misc]
        now = settled(look(machine.root))
        assert now in (settled(case.old), settled(case.new)), calls[at]
