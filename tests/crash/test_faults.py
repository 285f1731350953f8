# SPDX-License-Identifier: Apache-2.0
"""A full or read-only disk, a disk that fails, a signal: at every system call that changes a file.

The judge is that of test_crash.py, and one thing more: what the error says of the state is true. Either the
old configuration is in force and it says so, or each file that is not as before is named.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from emupmem.boot.change import Change
from emupmem.boot.prepare import prepare_abandon, prepare_confirm
from emupmem.boot.transaction import carry_out_change
from emupmem.model import EmupmemError
from tests.boot import test_grub_bls, test_limine, test_loader, test_oneshot, test_refind, test_uki
from tests.crash import tracer
from tests.crash.test_crash import (
    CFG,
    FILES,
    SCENARIOS,
    Case,
    Scenario,
    apply,
    calls_of,
    counts,
    do,
    fail_with,
    remove,
    shown,
    try_it,
)
from tests.crash.test_crash import asked_once as asked_once  # the fixture
from tests.crash.test_crash_loader import in_trial, ostree
from tests.crash.tracer import CREATING, SYNCING, WRITING, Call, Result, trace
from tests.crash.worlds import World, essence, look, settled
from tests.fake import FakeMachine, script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not tracer.available(), reason="this machine lets nobody trace (x86-64 only)"),
]

Fault = Callable[[Call], int]
"""The errno that a call fails with, 0 where it does not."""


def full(call: Call) -> int:
    wants_room = call.name in (*CREATING[1:], *WRITING, "fsetxattr") or call.creates
    return errno.ENOSPC if wants_room else 0


def no_inodes(call: Call) -> int:
    return errno.ENOSPC if call.creates or call.name in CREATING[1:] else 0


def read_only(call: Call) -> int:
    return 0 if call.name in SYNCING else errno.EROFS


def broken(call: Call) -> int:
    return errno.EIO if call.name in (*SYNCING, *WRITING) else 0


UNIT, COPY = "emupmem.service", ".emupmem-old"
LASTING = (full, no_inodes, read_only)
"""What stays so once it has begun; the other one happens once."""


def of_loader(make: Callable[[Path], FakeMachine]) -> Callable[[Path], FakeMachine]:
    def made(root: Path) -> FakeMachine:
        machine = make(root)
        script(machine, "dmesg", '#!/bin/sh\ncat "${0%/*}/../log"\n')
        return machine

    return made


CONFIRMING = of_loader(in_trial(test_oneshot.knows_trials, test_oneshot.starts))


def confirmed_and_removed(root: Path) -> FakeMachine:
    machine = CONFIRMING(root)
    do(machine, prepare_confirm)
    do(machine, remove)
    return machine


LOADERS = (
    Scenario("systemd-boot", of_loader(test_loader.systemd_boot), apply, remove),
    Scenario("systemd-boot-trial", of_loader(test_oneshot.knows_trials), try_it, prepare_abandon),
    Scenario("unified", of_loader(test_uki.unified), apply, remove),
    Scenario("unified-trial", of_loader(test_uki.knows_trials), try_it, prepare_abandon),
    Scenario("grubby", of_loader(test_loader.fedora), apply, remove),
    Scenario("sdbootutil", of_loader(test_loader.opensuse), apply, remove),
    Scenario("kernelstub", of_loader(test_loader.pop), apply, remove),
    Scenario("sdboot-manage", of_loader(test_loader.cachyos), apply, remove),
    Scenario("proxmox-boot-tool", of_loader(test_loader.proxmox), apply, remove),
    Scenario("limine", of_loader(test_limine.limine), apply, remove),
    Scenario("refind", of_loader(test_refind.refind), apply, remove),
    Scenario("grub-bls-trial", of_loader(test_grub_bls.knows_trials), try_it, prepare_abandon),
    Scenario("systemd-boot-confirm", CONFIRMING, prepare_confirm, remove, confirmed_and_removed),
    Scenario("rpm-ostree-trial", of_loader(ostree), try_it, prepare_abandon),
)
NAMES = ("apply-mount", "apply-dropin", "remove", "trial", "confirm", "abandon")
CHOSEN = [*(s for s in SCENARIOS if s.name in NAMES), *LOADERS]
parametrized = pytest.mark.parametrize("scenario", CHOSEN, ids=str)


def points(case: Case, prepared: Change) -> list[tuple[int, Call]]:
    """Where to try: each call, and of a run of equal ones the first."""
    calls = calls_of(case, prepared)
    return [
        (n, c)
        for n, c in enumerate(calls)
        if n == 0 or (c.name, c.paths) != (calls[n - 1].name, calls[n - 1].paths)
    ]


def disturbed(
    case: Case, prepared: Change, at: int, disturb: Callable[[Call, int], None]
) -> tuple[Result, World]:
    """Carry out, and disturb the calls from number `at` on; how it ended and what is there then."""
    machine = case.fresh()
    count = 0

    def on_call(call: Call) -> None:
        nonlocal count
        if counts(call, machine.root):
            if count >= at:
                disturb(call, count)
            count += 1

    return trace(lambda: carry_out_change(machine, prepared).problem, on_call), look(machine.root)


def judge(case: Case, where: str, done: Result, world: World) -> None:
    """Hold what was said against what is."""
    problems = truth(case, done, world)
    case.wrong += [f"{where}: {p} [{done.error} / {done.hint}]" for p in problems]
    case.judge(where, world)


def truth(case: Case, done: Result, world: World) -> list[str]:
    if done.unexpected:
        return [done.unexpected]
    if done.status == 0:
        # a copy that cannot be taken away is used by nobody, and the next run takes it away
        gone = {n for n in world if n.endswith(COPY) or (n.endswith(UNIT) and UNIT in done.said)}
        left = [{n: node for n, node in w.items() if n not in gone} for w in (world, case.new)]
        return [] if settled(left[0]) == settled(left[1]) else [f"success, but not as planned: {done.said}"]
    if done.status != 1 or not done.error or "\n" in done.error + done.hint:
        return [f"no clear error: {done}"]
    old, new = case.old, case.new
    names = [n for n, node in (old | new).items() if node.kind != "folder" and not n.startswith("var")]
    differ = [n for n in names if value(world, n) != value(old, n)]
    if "the reservation itself is in force" in done.hint:
        wrong = [n for n in differ if "systemd" not in n and value(world, n) != value(new, n)]
        return [f"{n} is not in force" for n in wrong]
    if "not all could be put back" in done.hint:
        said = done.hint.replace(
            "look at rpm-ostree kargs", "/kargs"
        )  # the deployment's, no file of a person's
        return [f"{n} is not as before and not named" for n in differ if f"/{n}" not in said]
    if "the old configuration is back" in done.hint or "nothing was changed" in done.hint:
        return [f"{n} is not as before" for n in differ]
    return ["nothing is said of the state"]


def value(world: World, name: str) -> tuple[str, int, bytes] | None:
    node = world.get(name)
    return (node.kind, node.mode, node.data) if node else None


@parametrized
def test_a_disk_that_fails_from_any_call_on(tmp_path: Path, scenario: Scenario) -> None:
    """All faults with one judge: most leave what another one has left, which is judged once."""
    case = Case(scenario, tmp_path)
    prepared = scenario.prepare(case.fresh())
    calls = points(case, prepared)
    for fault in (full, no_inodes, read_only, broken):
        failing = [(at, call) for at, call in calls if fault(call)]
        assert len(failing) > 3
        for at, first in failing:

            def disturb(call: Call, number: int, at: int = at, fault: Fault = fault) -> None:
                if fault(call) and (fault in LASTING or number == at):
                    call.fail(fault(call))

            done, world = disturbed(case, prepared, at, disturb)
            judge(case, f"{fault.__name__} from {shown(first)} on", done, world)
    fail_with(case)


IMMUTABLE = [
    ("apply-mount", "etc/default/grub"),
    ("apply-mount", "etc/default"),
    ("apply-mount", "boot/grub"),
    ("apply-mount", "var/backups/emupmem"),
    ("apply-mount", CFG),
    ("apply-mount", "etc/systemd/system"),
    ("remove", FILES[0]),
    ("remove", FILES[3]),
    ("apply-dropin", "etc/default/grub.d"),
    ("remove-dropin", FILES[1]),
    ("trial", CFG),
    ("trial", "boot/grub/grubenv"),
    ("trial", "etc/grub.d"),
    ("confirm", FILES[2]),
    ("abandon", FILES[2]),
    ("abandon", "boot/grub/grubenv"),
]


@pytest.mark.parametrize(("name", "place"), IMMUTABLE)
def test_a_file_or_folder_that_is_immutable(tmp_path: Path, name: str, place: str) -> None:
    case = Case(next(s for s in SCENARIOS if s.name == name), tmp_path)
    prepared = case.scenario.prepare(case.fresh())

    def disturb(call: Call, number: int) -> None:
        here = [Path(p) for p in call.paths if "/m" in p]
        names = call.creates or call.name.startswith(("rename", "unlink", "mkdir", "symlink", "link"))
        if call.name not in SYNCING and any(
            str(p).endswith(f"/{place}") or (names and str(p.parent).endswith(f"/{place}")) for p in here
        ):
            call.fail(errno.EPERM)

    done, world = disturbed(case, prepared, 0, disturb)
    judge(case, f"{place} is immutable", done, world)
    assert done.status == 1 or (name, place) == ("remove", FILES[3]), done
    fail_with(case)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("scenario", [SCENARIOS[1], SCENARIOS[6]], ids=str)
def test_a_signal_at_any_call(tmp_path: Path, scenario: Scenario, number: signal.Signals) -> None:
    case = Case(scenario, tmp_path)
    prepared = scenario.prepare(case.fresh())
    ends = set()
    for at, first in points(case, prepared):

        def disturb(call: Call, count: int, at: int = at) -> None:
            if count == at:
                call.trace.signal(number)

        done, world = disturbed(case, prepared, at, disturb)
        judge(case, f"{number.name} at {shown(first)}", done, world)
        assert done.status == 0 or done.error == f"stopped by {number.name}", done
        ends.add(done.status)
    assert ends == {0, 1}, "early it goes back, late it comes to its end"
    fail_with(case)


def test_another_one_at_any_call_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    case = Case(SCENARIOS[0], tmp_path)
    machine, prepared = case.fresh(), apply(case.fresh())
    refused: list[str] = []

    locked = False

    def on_call(call: Call) -> None:
        nonlocal locked
        locked = locked or call.name == "pwrite64"  # the number of the process, written to the lock
        if not call.inside(machine.root) or not locked:
            return
        before = look(machine.root)
        with pytest.raises(EmupmemError, match="another emupmem is at work") as caught:
            carry_out_change(machine, prepared)
        refused.append(caught.value.message)
        assert essence(look(machine.root)) == essence(before)

    done = trace(lambda: carry_out_change(machine, prepared), on_call)
    assert done.status == 0, done
    assert len(refused) > 30
    assert settled(look(machine.root)) == settled(case.new)
