# SPDX-License-Identifier: Apache-2.0
"""Making and destroying namespaces."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence

from emupmem.device import ramdax
from emupmem.device.blocks import signature
from emupmem.model import MIB, Command, EmupmemError
from emupmem.nvdimm import cxl
from emupmem.nvdimm.view import (
    SECONDS,
    Namespace,
    NvdimmRegion,
    View,
    find_namespace,
    look_at_nvdimms,
    namespaces_named,
    real_first,
)
from emupmem.nvdimm.wish import MAPPED, NamespaceWish
from emupmem.record import record
from emupmem.system import processes
from emupmem.system.lock import wait_for
from emupmem.system.machine import Machine
from emupmem.units import human, tight

START = 16 * MIB
"""ndctl makes fsdax and devdax only where a namespace starts at a multiple of this."""

LEAST = 16 * MIB
"""Neither a page map nor a sector table fits into less."""


@record
class NamespacePlan:
    """Commands in order; `question` is empty where nothing is lost. `takes` is what goes, None if nothing.

    Without a command there is nothing to do: `there` is the namespace that is as asked, None where it was to be gone.
    """

    commands: tuple[Command, ...]
    region: str
    question: str = ""
    takes: Namespace | None = None
    there: Namespace | None = None


# Who uses it --------------------------------------------------------------------------------------


def refuse_if_used(machine: Machine, one: Namespace) -> None:
    """Raises EmupmemError where its device is mounted, claimed, swapped to, open as a dax device or used as RAM."""
    dev, name = one.dev, one.dev.rpartition("/")[2]
    if one.system_ram:
        raise EmupmemError(
            f"{one.name} is in use as RAM ({dev})", f"daxctl reconfigure-device --mode=devdax {name} first"
        )
    if not dev:
        return
    number = machine.peek(f"/sys/class/block/{name}/dev")
    if one.mounts:
        who = processes.processes_using(machine, number)
        used = f", in use by {', '.join(who[:5])}" if who else ""
        raise EmupmemError(
            f"{dev} is mounted on {one.mounts[0].dir}{used}", f"sudo emupmem umount {one.mounts[0].dir} first"
        )
    held = machine.names(f"/sys/class/block/{name}/holders")
    if held:
        raise EmupmemError(f"{dev} is a part of {', '.join(held)}", "take it out of there first")
    if re.search(rf"^{re.escape(dev)}\s", machine.peek("/proc/swaps"), re.MULTILINE):
        raise EmupmemError(f"{dev} is swap space", f"sudo swapoff {dev} first")
    ramdax.refuse_used(machine, (name,))


# Create -------------------------------------------------------------------------------------------


def plan_create(machine: Machine, view: View, wish: NamespaceWish) -> NamespacePlan:
    """What makes a namespace, in the named region or the first with room. Raises EmupmemError for each refusal."""
    there = _choose(machine, view, wish)
    if (why := obstacle_of_region(there, wish.mode, wish.align)) is not None:
        raise why
    options = (*(("-M", wish.map) if wish.map else ()), *(("-a", str(wish.align)) if wish.align else ()))
    if not there.labelled:
        return _plan_whole(machine, view, there, wish, options)
    _refuse_taken_name(view, wish.name)
    size = _fitting(there, wish.size, wish.mode, wish.align)
    named = ("-n", wish.name) if wish.name else ()
    argv = ("ndctl", "create-namespace", "-r", there.name, "-m", wish.mode, "-s", str(size), *options, *named)
    return NamespacePlan((Command(argv, f"make a {wish.mode} namespace of {human(size)}"),), there.name)


def _refuse_taken_name(view: View, name: str) -> None:
    """Raises EmupmemError where a namespace has this name already, for ndctl would give it twice."""
    if taken := namespaces_named(view, name):
        raise EmupmemError(
            f"{taken[0][1].name} has the name {name}", "choose another one; --if-not-exists takes that one"
        )


def _choose(machine: Machine, view: View, wish: NamespaceWish) -> NvdimmRegion:
    """The named region; else the first with labels and room, real ones before emulated ones."""
    if wish.region:
        for one in view.regions:
            if one.name == wish.region:
                return one
        listed = ", ".join(r.name for r in view.regions)
        raise EmupmemError(
            f"there is no region {wish.region}", f"there is {listed}" if listed else _no_region(machine)
        )
    if not view.regions:
        raise EmupmemError("there is no region", _no_region(machine))
    usable = real_first(r for r in view.regions if r.enabled and r.labelled)
    able = [r for r in usable if obstacle_of_region(r, wish.mode, wish.align) is None]
    if usable and not able:
        return usable[0]
    for one in able:
        if one.largest(wish.align) >= (wish.size or LEAST):
            return one
    if usable:
        most = max(able, key=lambda r: r.largest(wish.align))
        wanted = human(wish.size) if wish.size else "a namespace"
        raise EmupmemError(
            f"no region has room for {wanted} in one piece",
            f"the most is {human(most.largest(wish.align))} in {most.name}"
            if most.largest(wish.align)
            else "all are full",
        )
    first = view.regions[0]
    raise EmupmemError(
        "no region has labels: each is one namespace of all of it",
        f"--region {first.name} gives that namespace another mode; sudo emupmem nvdimm show shows what is there",
    )


def _no_region(machine: Machine) -> str:
    optane = "on Optane modules: sudo emupmem nvdimm goal --mode appdirect; otherwise there is no NVDIMM"
    return cxl.region_command(machine) or optane


def obstacle_of_region(there: NvdimmRegion, mode: str, align: int) -> EmupmemError | None:
    """Why a region cannot have such a namespace, whatever its size."""
    if not there.enabled:
        return EmupmemError(f"{there.name} is disabled", f"sudo ndctl enable-region {there.name}")
    if align and align not in there.alignments:
        can = ", ".join(tight(a) for a in there.alignments)
        return EmupmemError(f"{there.name} cannot align to {human(align)}", f"it can {can}")
    if mode in MAPPED and there.start is not None and there.start % START:
        return EmupmemError(
            f"{there.name} starts at {there.start:#x}, which is not a multiple of {human(START)}: no {mode} there",
            "it can be raw or sector",
        )
    return None


def _fitting(there: NvdimmRegion, size: int | None, mode: str, align: int) -> int:
    """The size in bytes, all that is free where none is asked. Raises EmupmemError where it does not fit."""
    step, most = there.step(align), there.largest(align)
    least = max(LEAST, align * 2 if align > START else 0)
    if size is None:
        size = most
        if not size:
            full = (
                f"{there.name} is full"
                if not there.free
                else f"{there.name} has only {human(there.free)} left"
            )
            raise EmupmemError(full, "sudo emupmem nvdimm show shows what is on it")
    elif size > there.free or size > most:
        raise EmupmemError(
            f"{there.name} has no room for {human(size)} in one piece",
            f"the largest that fits is {tight(most)}",
        )
    else:
        ramdax.refuse_size_between(there.name, size, step, most)
    if mode != "raw" and size < least:
        raise EmupmemError(f"{mode} needs at least {human(least)}", f"--size {tight(least)}")
    return size


def _plan_whole(
    machine: Machine, view: View, there: NvdimmRegion, wish: NamespaceWish, options: tuple[str, ...]
) -> NamespacePlan:
    """Give the one namespace of a region without labels another mode: its content is lost."""
    if not there.namespaces:
        raise EmupmemError(f"{there.name} has no labels and no namespace", "sudo dmesg may show why")
    if wish.name:
        raise EmupmemError(
            f"{there.name} has no labels, which keep the names of namespaces", "leave --name out"
        )
    if wish.size is not None:
        raise EmupmemError(
            f"{there.name} has no labels: its one namespace always has its whole size", _divide(view, there)
        )
    one = there.namespaces[0]
    if not one.enabled:
        raise EmupmemError(
            f"{one.name} is disabled, so that nobody can see what it holds",
            f"sudo ndctl enable-namespace {one.name}",
        )
    if there.align and there.size % there.align:
        raise EmupmemError(
            f"{there.name} has {there.size} bytes, not a multiple of {human(there.align)}: ndctl cannot change its "
            "mode",
            _divide(view, there),
        )
    refuse_if_used(machine, one)
    if one.dev and one.mode != "devdax":
        holds = signature(machine, one.dev)
        if holds:
            raise EmupmemError(
                f"{one.dev} holds {holds}, which another mode would destroy",
                f"sudo wipefs -a {one.dev} if nothing of it is needed",
            )
    argv = ("ndctl", "create-namespace", "-f", "-e", one.name, "-m", wish.mode, *options)
    question = f"All content of {one.name} ({one.mode}, {human(one.size)}) is lost. Make it {wish.mode}?"
    return NamespacePlan((Command(argv, f"make it a {wish.mode} namespace"),), there.name, question, one)


def _divide(view: View, there: NvdimmRegion) -> str:
    """How a region without labels, which has its one namespace, can be divided, for a hint."""
    if there.emulated:
        return "leave --size out; sudo emupmem namespaces divides the reserved range on Linux 6.19 and later"
    if not _can_label(view, there):
        return "leave --size out; its modules have no room for labels"
    return f"sudo emupmem nvdimm destroy {there.namespaces[0].name} writes labels: then --size works"


def _can_label(view: View, there: NvdimmRegion) -> bool:
    """Whether labels can be written for a region without touching another one."""
    known = {d.name: d for d in view.dimms}
    alone = all(not set(r.dimms) & set(there.dimms) for r in view.regions if r.name != there.name)
    return bool(there.dimms) and alone and all(n in known and known[n].label_area for n in there.dimms)


@contextlib.contextmanager
def failures_told(machine: Machine) -> Iterator[None]:
    """An error says whether the namespaces are others than before, as far as ndctl still tells."""
    before = _namespaces(machine)
    try:
        yield
    except EmupmemError as exc:
        with contextlib.suppress(EmupmemError):
            exc.changed = _namespaces(machine) != before
        raise


def _namespaces(machine: Machine) -> list[tuple[str, str, int, str]]:
    there = (n for r in look_at_nvdimms(machine).regions for n in r.namespaces)
    return sorted((n.name, n.mode, n.size, n.dev) for n in there)


def create_namespace(machine: Machine, plan: NamespacePlan) -> Namespace:
    """Carry it out; the namespace that came of it, its device there. Raises EmupmemError."""
    before = {n.name for r in look_at_nvdimms(machine).regions for n in r.namespaces}
    out = _run(machine, plan.commands)
    try:
        made = json.loads(out)["dev"]
    except (ValueError, KeyError, TypeError):
        made = ""
    machine.settle()
    there = [n for r in look_at_nvdimms(machine).regions if r.name == plan.region for n in r.namespaces]
    new = next((n for n in there if n.name == made or (not made and n.name not in before)), None)
    if new is None:
        raise EmupmemError("ndctl made no namespace", "sudo dmesg may show why")
    if not new.dev or not wait_for(lambda: machine.exists(new.dev), 10):
        raise EmupmemError(f"{new.name} was made, but has no device", "sudo dmesg may show why")
    return new


def remains(machine: Machine, one: Namespace) -> str:
    """What a new device still holds of one that was there before (`ext4`); empty where it is blank."""
    if not one.dev or one.mode == "devdax":
        return ""
    try:
        return signature(machine, one.dev)
    except EmupmemError:
        return ""


def _run(machine: Machine, commands: Sequence[Command]) -> str:
    """Run them in order; what the last one printed. Raises EmupmemError at the first that fails."""
    out = ""
    for command in commands:
        done = machine.run(command, timeout=SECONDS)
        if done.status:
            raise EmupmemError(
                f"{shlex.join(command.argv)} failed: {done.errors}", "sudo dmesg may show more"
            )
        out = done.stdout.decode("utf-8", "replace")
    return out


# Destroy ------------------------------------------------------------------------------------------


def plan_destroy(machine: Machine, view: View, name: str) -> NamespacePlan:
    """What destroys a namespace and all on it. Raises EmupmemError where it must or can not be."""
    region, one = find_namespace(view, name)
    refuse_if_used(machine, one)
    device = f" ({one.dev})" if one.dev else ""
    question = f"All content of {one.name}{device}, {human(one.size)}, is lost. Destroy it?"
    if region.labelled:
        argv = ("ndctl", "destroy-namespace", "-f", one.name)
        return NamespacePlan((Command(argv, "destroy it"),), region.name, question, one)
    if region.emulated:
        raise EmupmemError(
            f"{one.name} is all of {region.name}, which memmap= made and which has no labels: it cannot be destroyed",
            "sudo emupmem remove gives the RAM back; sudo emupmem namespaces divides it (Linux 6.19 and later)",
        )
    if not _can_label(view, region):
        raise EmupmemError(
            f"{one.name} is all of {region.name}, which has no labels and no room for them: it cannot be destroyed",
            f"sudo emupmem nvdimm create --region {region.name} --mode … gives it another mode",
        )
    # ndctl destroy-namespace would only turn it off. Labels make the region one that can be divided.
    commands = (
        Command(("ndctl", "disable-region", region.name), "stop using the region"),
        Command(("ndctl", "init-labels", *region.dimms), "write empty labels on its modules"),
        Command(("ndctl", "enable-region", region.name), "use it again, with labels"),
    )
    return NamespacePlan(commands, region.name, question, one)


def destroy_namespace(machine: Machine, plan: NamespacePlan) -> Namespace:
    """Carry it out; the namespace that is gone. Raises EmupmemError where it is still there."""
    assert plan.takes is not None
    try:
        _run(machine, plan.commands)
    except EmupmemError:
        if plan.commands[-1].argv[1] == "enable-region":
            machine.output(*plan.commands[-1].argv, timeout=SECONDS)
        raise
    machine.settle()
    if any(n.name == plan.takes.name for r in look_at_nvdimms(machine).regions for n in r.namespaces):
        raise EmupmemError(f"ndctl did not destroy {plan.takes.name}", "sudo dmesg may show why")
    return plan.takes
