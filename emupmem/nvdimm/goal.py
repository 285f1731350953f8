# SPDX-License-Identifier: Apache-2.0
"""A goal for real modules, and the namespaces that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from emupmem.device.nature import EMULATED
from emupmem.model import Command, EmupmemError
from emupmem.nvdimm import ipmctl
from emupmem.nvdimm.create import LEAST, NamespacePlan, create_namespace, obstacle_of_region, plan_create
from emupmem.nvdimm.view import (
    Namespace,
    NvdimmRegion,
    View,
    ask_ipmctl,
    interleave_set_of,
    ipmctl_error,
    look_at_nvdimms,
    require_ndctl,
)
from emupmem.nvdimm.wish import NamespaceWish
from emupmem.record import record
from emupmem.system.machine import Machine
from emupmem.units import human


@record
class GoalPlan:
    """What the modules need: `state` is `needed`, `pending` (a reboot is due), `regions` or `done`.

    `regions`: the firmware has made them, and those in `makes` have no namespace yet.
    """

    state: str
    wanted: ipmctl.WantedGoal
    command: Command
    dimms: tuple[ipmctl.PmemModule, ...]
    regions: tuple[NvdimmRegion, ...]
    goal: tuple[ipmctl.Goal, ...] = ()
    warnings: tuple[str, ...] = ()
    makes: tuple[NamespacePlan, ...] = ()

    @property
    def commands(self) -> tuple[Command, ...]:
        """What comes next, in order."""
        makes = tuple(c for p in self.makes for c in p.commands)
        return {"needed": (self.command,), "regions": makes}.get(self.state, ())

    @property
    def loss(self) -> str:
        """What setting the goal deletes."""
        names = ", ".join(f"{r.name} ({human(r.size)})" for r in self.regions)
        return f"This deletes {names} and all content on it." if names else "No region is there to lose."

    @property
    def question(self) -> str:
        """What the user has to confirm."""
        if self.state == "regions":
            names = ", ".join(f"{r.name} ({human(r.size)})" for r in self.regions if r.name in self._empty)
            return f"Nothing is lost. Make an fsdax namespace of all the room in {names}?"
        modules = f"{len(self.dimms)} module{'s' if len(self.dimms) != 1 else ''}"
        return f"{self.loss} At the next boot the firmware reconfigures {modules}. Set the goal?"

    @property
    def _empty(self) -> set[str]:
        return {p.region for p in self.makes}


def plan_goal(machine: Machine, wanted: ipmctl.WantedGoal) -> GoalPlan:
    """Where the modules are on the way to what is wanted. Raises EmupmemError for each refusal."""
    if machine.find("ipmctl") is None:
        raise EmupmemError(
            "ipmctl is not installed: it sets the goal of Optane modules",
            "install it from your distribution; other NVDIMMs need no goal: sudo emupmem nvdimm create",
        )
    require_ndctl(machine)
    said = machine.output("ipmctl", "version")
    if said and ipmctl.is_broken(said.stdout.decode("utf-8", "replace")):
        number = ".".join(map(str, ipmctl.ipmctl_version(said.stdout.decode("utf-8", "replace"))))
        raise EmupmemError(f"ipmctl {number} writes goals that no firmware takes", "install a later one")
    dimms = ask_ipmctl(machine, ipmctl.show_dimms, ipmctl.dimms, wanted.socket)
    where = "" if wanted.socket is None else f" on socket {wanted.socket}"
    if not dimms:
        raise EmupmemError(
            f"ipmctl finds no Optane modules{where}",
            "other NVDIMMs and virtual ones need no goal: sudo emupmem nvdimm create",
        )
    if not any(d.works for d in dimms):
        states = ", ".join(f"{d.id} is {d.health}" for d in dimms)
        raise EmupmemError(f"no module{where} is in order: {states}", "sudo ipmctl show -a -dimm shows more")
    sets = ask_ipmctl(machine, ipmctl.show_regions, ipmctl.sets, wanted.socket)
    # Not every version keeps to the socket that it is asked for.
    dimms = tuple(d for d in dimms if wanted.socket is None or d.socket in (None, wanted.socket))
    sets = tuple(s for s in sets if wanted.socket is None or s.socket in (None, wanted.socket))
    goal = ipmctl.on_socket(ask_ipmctl(machine, ipmctl.show_goal, ipmctl.goals, wanted.socket), wanted.socket)
    view = look_at_nvdimms(machine)
    regions = _destroyed(view, dimms, sets)
    command = ipmctl.create_goal(wanted)
    warnings = tuple(
        f"{d.id} is {d.lock}: the firmware applies no goal to a secured module"
        for d in dimms
        if d.lock.lower() in ("locked", "unlocked", "unlocked, frozen", "exceeded")
    )
    if goal:
        return GoalPlan("pending", wanted, command, dimms, (), _judged(goal, wanted), warnings)
    if ipmctl.is_as_asked(dimms, sets, wanted):
        makes = _first_namespaces(machine, view, regions, dimms)
        return GoalPlan("regions" if makes else "done", wanted, command, dimms, regions, (), warnings, makes)
    _refuse_namespaces(regions)
    return GoalPlan("needed", wanted, command, dimms, regions, (), warnings)


def _first_namespaces(
    machine: Machine, view: View, regions: Sequence[NvdimmRegion], dimms: Sequence[ipmctl.PmemModule]
) -> tuple[NamespacePlan, ...]:
    """One fsdax namespace of all the room for each region of these modules alone that has none yet."""
    handles = {d.handle for d in dimms if d.handle is not None}
    mine = {d.name for d in view.dimms if d.handle in handles}
    empty = [r for r in regions if r.dimms and set(r.dimms) <= mine and not r.namespaces]
    able = [
        r for r in empty if r.labelled and r.largest() >= LEAST and obstacle_of_region(r, "fsdax", 0) is None
    ]
    return tuple(plan_create(machine, view, NamespaceWish(r.name)) for r in able)


def _judged(goal: tuple[ipmctl.Goal, ...], wanted: ipmctl.WantedGoal) -> tuple[ipmctl.Goal, ...]:
    """The goal that waits. Raises EmupmemError where it failed or is another than the wanted one."""
    drop = "sudo ipmctl delete -goal drops it"
    failed = next((g for g in goal if g.failed), None)
    if failed is not None:
        raise EmupmemError(f"the firmware did not take the goal of {failed.dimm}: {failed.status}", drop)
    if not ipmctl.goal_matches(goal, wanted):
        memory, direct = sum(g.memory for g in goal), sum(g.app_direct for g in goal)
        raise EmupmemError(
            f"another goal waits for a reboot: {human(memory)} RAM, {human(direct)} App Direct", drop
        )
    return goal


def _destroyed(
    view: View,
    dimms: Sequence[ipmctl.PmemModule],
    sets: Sequence[ipmctl.InterleaveSet],
) -> tuple[NvdimmRegion, ...]:
    """The regions that a goal for these modules would lay out anew. In doubt a region is one of them."""
    handles = {d.handle for d in dimms if d.handle is not None}
    mine = {d.name for d in view.dimms if d.handle in handles}
    others = {d.name for d in view.dimms if d.handle is not None} - mine
    isets = {interleave_set_of(s.iset) for s in sets if s.iset is not None}
    return tuple(
        r
        for r in view.regions
        if r.provider not in EMULATED
        and (bool(mine & set(r.dimms)) or r.iset in isets or not r.dimms or not set(r.dimms) <= others)
    )


def _refuse_namespaces(regions: Sequence[NvdimmRegion]) -> None:
    there = [n for r in regions for n in r.namespaces]
    if there:
        names = ", ".join(f"{n.name}{f' ({n.dev})' if n.dev else ''}" for n in there)
        commands = "; ".join(f"sudo emupmem nvdimm destroy {n.name}" for n in there)
        raise EmupmemError(
            f"the goal would destroy {names}, and emupmem deletes only what is named", commands
        )


def set_goal(machine: Machine, plan: GoalPlan) -> GoalPlan:
    """Tell the firmware and look whether the goal is there: the plan is pending then. Raises EmupmemError."""
    if plan.state != "needed":  # another hand was faster
        return plan
    text = ipmctl_error(machine, plan.command)
    shown = ask_ipmctl(machine, ipmctl.show_goal, ipmctl.goals, plan.wanted.socket)
    waiting = ipmctl.on_socket(shown, plan.wanted.socket)
    if not waiting:
        raise EmupmemError("ipmctl reports no goal after setting one", "sudo ipmctl show -goal")
    return replace(plan, state="pending", goal=waiting, warnings=(*plan.warnings, *ipmctl.warnings(text)))


def make_namespaces(machine: Machine, plan: GoalPlan) -> tuple[Namespace, ...]:
    """Make what the regions lack. Where it fails half way, the same command makes the rest. Raises EmupmemError."""
    return tuple(create_namespace(machine, one) for one in plan.makes)
