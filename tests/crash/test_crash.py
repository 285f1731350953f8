# SPDX-License-Identifier: Apache-2.0
"""Killed, or cut off from power, at every system call that changes a file: the machine would still boot.

Each change runs under tests/crash/tracer.py, which stops it (and GRUB's generator, which it starts) before every
changing call. What the disk holds at that moment is judged: the boot configuration is whole, and the next
run of the same command, or the one that takes all back, comes to the right end without litter. Equal
states are judged once.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from emupmem.boot.change import Change
from emupmem.boot.grub import defaults as grub_defaults
from emupmem.boot.grub import menu, trial
from emupmem.boot.loader import Options
from emupmem.boot.prepare import (
    prepare_abandon,
    prepare_apply,
    prepare_confirm,
    prepare_remove,
    prepare_trial,
)
from emupmem.boot.transaction import carry_out_change
from emupmem.device.boot_unit import MountWish
from emupmem.editor import shell
from emupmem.editor.shell import Sourced
from emupmem.model import GIB, Busy, EmupmemError, Request
from tests.boot import test_trial
from tests.boot.test_change import CLOUD, FOUND
from tests.crash import tracer
from tests.crash.tracer import Call, trace
from tests.crash.worlds import Disk, Node, World, essence, litter, look, rebuilt, settled
from tests.fake import FakeMachine, build, put, script

pytestmark = pytest.mark.skipif(not tracer.available(), reason="this machine lets nobody trace (x86-64 only)")

Prepare = Callable[[FakeMachine], Change]

CFG, ASIDE = "boot/grub/grub.cfg", "boot/grub/.grub.cfg.emupmem-old"
FILES = (
    "etc/default/grub",
    "etc/default/grub.d/zz-emupmem.cfg",
    "etc/grub.d/42_emupmem_trial",
    "etc/systemd/system/emupmem.service",
    "etc/systemd/system/multi-user.target.wants/emupmem.service",
    "boot/grub/grubenv",
)
WISHES = (MountWish("/mnt/pmem0", owner="0"),)


def apply(machine: FakeMachine) -> Change:
    return prepare_apply(machine, FOUND, Request(GIB), Options())


def apply_mount(machine: FakeMachine) -> Change:
    return prepare_apply(machine, FOUND, Request(GIB), Options(), WISHES)


def apply_default(machine: FakeMachine) -> Change:
    return prepare_apply(machine, FOUND, Request(GIB), Options("GRUB_CMDLINE_LINUX_DEFAULT"))


def try_it(machine: FakeMachine) -> Change:
    return prepare_trial(machine, FOUND, Request(GIB), Options())


def remove(machine: FakeMachine) -> Change:
    return prepare_remove(machine)


def do(machine: FakeMachine, prepare: Prepare) -> None:
    """Plan and carry out, as the command does."""
    prepared = prepare(machine)
    if prepared.needed:
        carry_out_change(machine, prepared)


def stock(root: Path) -> FakeMachine:
    """A machine that knows trials and can mount at boot."""
    machine = test_trial.prepare(build(root))
    put(machine, "/usr/local/bin/emupmem", "")
    script(machine, "mkfs.ext4", "#!/bin/sh\n")
    script(machine, "dmesg", '#!/bin/sh\ncat "${0%/*}/../log"\n')  # the same in every copy of the folder
    (machine.root / "etc/grub.d").mkdir()
    (machine.root / CFG).chmod(0o600)
    return machine


def cloud(root: Path) -> FakeMachine:
    machine = stock(root)
    put(machine, "/etc/default/grub.d/50-cloud.cfg", CLOUD)
    machine.output("update-grub2")
    return machine


def after(*prepares: Prepare, start: Callable[[Path], FakeMachine] = stock) -> Callable[[Path], FakeMachine]:
    def made(root: Path) -> FakeMachine:
        machine = start(root)
        for prepare in prepares:
            do(machine, prepare)
        return machine

    return made


def in_trial(root: Path) -> FakeMachine:
    machine = after(try_it)(root)
    test_trial.boots(machine)
    put(machine, "/boot/grub/grubenv", test_trial.env())
    return machine


def in_trial_without(root: Path) -> FakeMachine:
    machine = in_trial(root)
    do(machine, prepare_abandon)
    return machine


@dataclass(frozen=True)
class Scenario:
    """A change of a machine, and what takes it back: to the state of `back_to`, or else to the one before."""

    name: str
    start: Callable[[Path], FakeMachine]
    prepare: Prepare
    back: Prepare
    back_to: Callable[[Path], FakeMachine] | None = None

    def __str__(self) -> str:
        return self.name


SCENARIOS = (
    Scenario("apply", stock, apply, remove),
    Scenario("apply-mount", stock, apply_mount, remove),
    Scenario("apply-dropin", cloud, apply_default, remove),
    Scenario("apply-over-trial", after(try_it), apply, remove, stock),
    Scenario("remove", after(apply_mount), remove, apply_mount),
    Scenario("remove-dropin", after(apply_default, start=cloud), remove, apply_default),
    Scenario("trial", stock, try_it, prepare_abandon),
    Scenario("confirm", in_trial, prepare_confirm, remove, in_trial_without),
    Scenario("abandon", after(try_it), prepare_abandon, remove, stock),
)
QUICK = ("apply",)
"""That of the inner loop; the others go the same way through the transaction."""
parametrized = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


@functools.cache
def answer(with_programs: bool, texts: tuple[bytes, ...]) -> Sourced:
    return shell.judge(with_programs=with_programs)(texts)


@pytest.fixture(autouse=True)
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sh judge each text once only: it is asked the same thing hundreds of times here."""
    monkeypatch.setattr(
        grub_defaults, "judge_of", lambda machine: lambda texts: answer(machine.live, tuple(texts))
    )


@dataclass
class Case:
    """A scenario with the states before and after it, and what was judged already."""

    scenario: Scenario
    folder: Path
    old: dict[str, Node] = field(default_factory=dict)
    new: dict[str, Node] = field(default_factory=dict)
    former: World = field(default_factory=dict)
    judged: set[object] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.old = look(self.scenario.start(self.folder / "old").root)
        machine = self.scenario.start(self.folder / "new")
        do(machine, self.scenario.prepare)
        self.new = look(machine.root)
        back_to = self.scenario.back_to
        self.former = look(back_to(self.folder / "former").root) if back_to else self.old

    def fresh(self) -> FakeMachine:
        """The machine before the change, once more."""
        return rebuilt(self.folder, self.old)

    def judge(self, where: str, world: World) -> None:
        key = essence(world)
        if key in self.judged:
            return
        self.judged.add(key)
        problems = self.boots(world) + self.finishes(world)
        self.wrong += [f"{where}: {p}" for p in problems]

    def boots(self, world: World) -> list[str]:
        """What would keep the machine from booting its old or its new configuration."""
        names = [
            n for n in self.old.keys() | self.new.keys() if not n.startswith(("var", "sys")) and n != CFG
        ]
        names = [n for n in names if (self.old | self.new)[n].kind != "folder"]
        torn = [n for n in names if not self._either(world, n) and not self._has_whole_copy(world, n)]
        found = [f"{n} is neither the old nor the new one" for n in torn]
        return found + (self._menu_boots(world) if CFG in self.old else [])

    def _has_whole_copy(self, world: World, name: str) -> bool:
        """Of what other programs write in place; what we write is never torn."""
        folder, _, base = name.rpartition("/")
        aside = world.get(f"{folder}/.{base}.emupmem-old")
        theirs = name.endswith("/kernel/cmdline") or "/loader/entries/" in name
        return (
            theirs
            and aside is not None
            and aside.data in [w[name].data for w in (self.old, self.new) if name in w]
        )

    def _menu_boots(self, world: World) -> list[str]:
        found = []
        aside = world.get(ASIDE)
        if not self._either(world, CFG) and (
            aside is None or aside.data not in (self.old[CFG].data, self.new[CFG].data)
        ):
            found.append("the menu is torn, and there is no whole copy")
        if aside is not None and aside.mode != self.old[CFG].mode:
            found.append(f"the copy of the menu has mode {aside.mode:o}")
        text = world[CFG].data.decode() if CFG in world else ""
        env = world["boot/grub/grubenv"].data.decode()
        chosen = f"next_entry={trial.ID}" in env
        there = any(e.ids[-1:] == (trial.ID,) for e in menu.entries(text))
        if chosen and menu.whole(text) and not there:
            found.append("the next start is a trial that the menu does not have")
        return found

    def _either(self, world: World, name: str) -> bool:
        def shown(where: World) -> tuple[str, int, bytes] | None:
            node = where.get(name)
            return (node.kind, node.mode, node.data) if node else None

        return shown(world) in (shown(self.old), shown(self.new))

    def finishes(self, world: World) -> list[str]:
        """What is not as it should be after the same command again, and after the one that takes it back."""
        found = []
        for words, prepare, target in (
            ("again", self.scenario.prepare, self.new),
            ("back", self.scenario.back, self.former),
        ):
            machine = rebuilt(self.folder, world)
            try:
                do(machine, prepare)
            except EmupmemError as exc:
                if settled(look(machine.root)) != settled(target):
                    found.append(f"{words}: {exc.message} ({exc.hint})")
                    continue
            # What sed -i makes first stays where the disk fails; nothing reads it.
            now = {n: o for n, o in look(machine.root).items() if "/sed" not in n}
            if litter(now):
                found.append(f"{words}: it leaves {', '.join(litter(now))}")
            elif settled(now) != settled(target):
                differ = {e[0] for e in set(settled(now)) ^ set(settled(target))}
                found.append(f"{words}: not as it should be: {', '.join(sorted(differ))}")
        return found


def shown(call: Call) -> str:
    names = [p.rpartition("/")[2] for p in call.paths]
    return f"{'' if call.own else 'generator: '}{call.name} {' '.join(names)}"


def fail_with(case: Case) -> None:
    assert not case.wrong, "\n".join(dict.fromkeys(case.wrong))


@pytest.mark.parametrize(
    "scenario",
    [s if s.name in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SCENARIOS],
    ids=str,
)
def test_all_ends_at_once_at_any_call(tmp_path: Path, scenario: Scenario) -> None:
    case = Case(scenario, tmp_path)
    machine = case.fresh()
    disk = Disk(machine.root)
    seen: list[tuple[str, World]] = []
    names: list[str] = []

    def on_call(call: Call) -> None:
        if call.inside(machine.root):
            names.append(call.name)
            seen.extend((f"{how} before {shown(call)}", world) for how, world in disk.worlds())
        disk.about_to(call)

    done = trace(lambda: do(machine, scenario.prepare), on_call)
    assert done.status == 0, done
    seen.extend((f"{how} at the end", world) for how, world in disk.worlds())
    disk.close()
    assert settled(look(machine.root)) == settled(case.new)
    defaults = [w["etc/default/grub"].data for w in (case.old, case.new) if "etc/default/grub" in w]
    assert not any(answer(True, (text,)).failed for text in defaults)
    assert {"open", "write", "fsync", "rename"} <= set(names), "all kinds of calls are seen"
    for where, world in seen:
        case.judge(where, world)
    fail_with(case)


@pytest.mark.slow
@parametrized
def test_only_emupmem_is_killed_at_any_call_and_the_generator_goes_on(
    tmp_path: Path, scenario: Scenario
) -> None:
    case = Case(scenario, tmp_path)
    prepared = scenario.prepare(case.fresh())
    calls = calls_of(case, prepared)
    assert len(calls) > 30
    for at in range(len(calls)):
        _kill(case, prepared, at)
    fail_with(case)


def counts(call: Call, root: Path) -> bool:
    """Whether a call changes the disk.

    Not what the firmware keeps, which changes as a whole or not; and not the partitions of proxmox-boot-tool, which
    are file systems of their own.
    """
    return call.inside(root) and not any(p.startswith((f"{root}/sys/", f"{root}/esps/")) for p in call.paths)


def calls_of(case: Case, prepared: Change) -> list[Call]:
    """The changing calls of a change that nothing disturbs."""
    machine, found = case.fresh(), []
    done = trace(
        lambda: carry_out_change(machine, prepared),
        lambda call: found.append(call) if counts(call, machine.root) else None,
    )
    assert done.status == 0, done
    return found


def _kill(case: Case, prepared: Change, at: int) -> None:
    """Kill emupmem before call number `at`, and judge what is there when all has ended."""
    machine = case.fresh()
    count, where = 0, ""

    def on_call(call: Call) -> None:
        nonlocal count, where
        if not counts(call, machine.root):
            return
        if count == at:
            call.trace.kill()
            where = f"emupmem is killed before {shown(call)}"
            if not call.own:
                case.wrong += [f"{where}: {p}" for p in _barred(machine)]
        count += 1

    done = trace(lambda: carry_out_change(machine, prepared), on_call)
    assert done.status == -signal.SIGKILL, done
    case.judge(where, look(machine.root))


def _barred(machine: FakeMachine) -> list[str]:
    """What lets another run begin while the generator of one that was killed goes on."""
    before = look(machine.root)
    try:
        do(machine, remove)
    except EmupmemError as exc:
        told = isinstance(exc, Busy) and "started by a killed emupmem" in exc.message
        return [] if told and essence(look(machine.root)) == essence(before) else [exc.message]
    return ["another one works beside the generator"]
