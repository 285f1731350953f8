# SPDX-License-Identifier: Apache-2.0
"""`emupmem nvdimm`: regions and namespaces of NVDIMMs. No logic of its own."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer

from emupmem.cli.options import EPILOG, Check, DryRun, Json, NamespaceName, Yes
from emupmem.cli.output import Exit, one_line, say, size_of, tell, usage
from emupmem.cli.session import Session
from emupmem.model import EmupmemError, NamespaceMode
from emupmem.nvdimm import create as nvdimm_create
from emupmem.nvdimm import goal as nvdimm_goal
from emupmem.nvdimm import ipmctl
from emupmem.nvdimm import show as nvdimm_show
from emupmem.nvdimm import view as nvdimm_view
from emupmem.nvdimm import wish as nvdimm_wish
from emupmem.nvdimm.create import NamespacePlan
from emupmem.nvdimm.goal import GoalPlan
from emupmem.nvdimm.view import Namespace
from emupmem.nvdimm.wish import NamespaceWish
from emupmem.system import lock
from emupmem.system.machine import Machine


class GoalMode(StrEnum):
    """What the firmware makes of Optane modules."""

    APP_DIRECT = "appdirect"
    NOT_INTERLEAVED = "appdirect-not-interleaved"
    MEMORY = "memory"


class Map(StrEnum):
    """Where the page map of a namespace lies."""

    MEM = "mem"
    DEV = "dev"


Socket = Annotated[int | None, typer.Option("--socket", min=0, metavar="N", help="Only this socket.")]

app = typer.Typer(
    help="Regions and namespaces of NVDIMMs, real or virtual, with ndctl; the goal of Intel Optane modules "
    "with ipmctl.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("show", epilog=EPILOG)
def show(socket: Socket = None, as_json: Json = False) -> None:
    """Show modules, regions, namespaces, devices and mounts as one tree."""
    session = Session({"dimms": [], "regions": [], "goal": [], "warnings": []}, as_json)
    with session.errors():
        session.be_root("this asks ndctl")
        view = nvdimm_view.look_at_nvdimms(session.machine, socket)
        session.result |= asdict(view)
        for warning in view.warnings:
            say(f"warning: {warning}")
        if not session.as_json:
            tell("\n".join(nvdimm_show.tree(view)))
        session.finish(Exit.OK)


@app.command("goal", epilog=EPILOG)
def goal(
    mode: Annotated[GoalMode, typer.Option("--mode", help="What to use the modules as.")],
    memory_percent: Annotated[
        int | None,
        typer.Option("--memory-percent", min=0, max=100, metavar="N", help="The share that becomes RAM."),
    ] = None,
    socket: Socket = None,
    namespaces: Annotated[
        bool,
        typer.Option(
            "--namespaces/--no-namespaces",
            help="After the reboot: make an fsdax namespace in each region that has none, or leave that to create.",
        ),
    ] = True,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Configure Optane modules at the next boot; after the reboot the same command creates namespaces.

    It can be repeated at any time: it reports the progress and does the next step. It never deletes a
    namespace.
    """
    session = Session(
        {
            "changed": False,
            "state": "",
            "reboot_required": False,
            "commands": [],
            "destroys": [],
            "goal": [],
            "namespaces": [],
            "warnings": [],
        },
        as_json,
        dry_run=dry_run,
        yes=yes,
    )
    with session.errors():
        try:
            wanted = ipmctl.wanted(mode.value, memory_percent, socket)
        except EmupmemError as exc:
            usage(exc.message, exc.hint)
        session.be_root("this asks ipmctl")
        machine = session.machine
        plan = nvdimm_goal.plan_goal(machine, wanted)
        acts = plan.state == "needed" or (plan.state == "regions" and namespaces)
        session.changing()
        made: tuple[Namespace, ...] = ()
        if acts:
            lost = plan.regions if plan.state == "needed" else ()
            session.result |= {
                "commands": [c.argv for c in plan.commands],
                "destroys": [r.name for r in lost],
            }
            if plan.state == "needed" and (session.dry_run or session.yes):
                say(plan.loss)
            session.preview_or_ask((shlex.join(c.argv) for c in plan.commands), plan.question)
            if not session.dry_run:
                with lock.change_lock(machine):
                    plan, made = _next_step(machine, plan)
        session.result |= {
            "changed": acts and not session.dry_run,
            "state": plan.state,
            "reboot_required": plan.state == "pending",
            "goal": [asdict(g) for g in plan.goal],
            "namespaces": [asdict(n) for n in made],
            "warnings": plan.warnings,
        }
        for warning in plan.warnings:
            say(f"warning: {warning}")
        if not session.as_json:
            tell("\n".join(nvdimm_show.goal_lines(plan)))
            for one in made:
                tell("\n".join(nvdimm_show.made_lines(one, nvdimm_create.remains(machine, one))))
        waits = plan.state == "pending" and not acts
        session.finish(Exit.NOT_AS_PLANNED if waits else Exit.OK)


def _next_step(machine: Machine, plan: GoalPlan) -> tuple[GoalPlan, tuple[Namespace, ...]]:
    """Look again, now that nobody else of us is at work, and set the goal or make the namespaces."""
    again = nvdimm_goal.plan_goal(machine, plan.wanted)
    if again.state != plan.state or again.makes != plan.makes:
        raise EmupmemError("something changed in the meantime", "nothing was done; try it again")
    if again.state == "needed":
        return nvdimm_goal.set_goal(machine, again), ()
    with nvdimm_create.failures_told(machine):
        made = nvdimm_goal.make_namespaces(machine, again)
    try:
        return nvdimm_goal.plan_goal(machine, plan.wanted), made
    except EmupmemError as exc:  # they are made, whatever ipmctl says now
        return replace(again, warnings=(*again.warnings, one_line(exc))), made


@app.command("create", epilog=EPILOG)
def create(
    region: Annotated[
        str, typer.Option("--region", metavar="R", help="Such as region0 (default: the first with room).")
    ] = "",
    size: Annotated[
        str,
        typer.Option("--size", metavar="SIZE", help="Size (default: all that is free)."),
    ] = "",
    mode: Annotated[
        NamespaceMode, typer.Option("--mode", help="What kind of device it becomes.")
    ] = NamespaceMode.FSDAX,
    map_: Annotated[
        Map | None, typer.Option("--map", help="Where to keep the page map: in RAM or on the device itself.")
    ] = None,
    align: Annotated[
        str, typer.Option("--align", metavar="SIZE", help="The page size it is aligned to: 4K, 2M or 1G.")
    ] = "",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="A name of its own, which its label keeps.")
    ] = "",
    if_not_exists: Annotated[
        bool, typer.Option("--if-not-exists", help="Do nothing where one like that is there already.")
    ] = False,
    dry_run: DryRun = False,
    check: Check = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Create a namespace and print its device. Without labels: give the region's one namespace another mode."""
    session = _changing(as_json, dry_run, check, yes)
    session.result["holds"] = ""
    with session.errors():
        bytes_ = size_of(size) if size else None
        page_map = map_.value if map_ else ""
        try:
            step = nvdimm_wish.check_options(mode.value, page_map, align, name)
        except EmupmemError as exc:
            usage(exc.message, exc.hint)
        wish = NamespaceWish(region, bytes_, mode.value, page_map, step, name)

        def plan(machine: Machine) -> NamespacePlan:
            view = nvdimm_view.look_at_nvdimms(machine)
            there = nvdimm_wish.namespace_like(view, wish) if if_not_exists else None
            if there is not None:
                return NamespacePlan((), there.region, there=there)
            return nvdimm_create.plan_create(machine, view, wish)

        made = _change(session, plan, nvdimm_create.create_namespace)
        if made is not None:
            holds = nvdimm_create.remains(session.machine, made)
            session.result |= {"namespace": asdict(made), "device": made.dev, "holds": holds}
            if not session.result["would_change"]:
                _tell_nothing(session, f"{made.name} is like that already, {made.dev}")
            elif not session.as_json:
                tell("\n".join(nvdimm_show.made_lines(made, holds)))
        _finish(session)


@app.command("destroy", epilog=EPILOG)
def destroy(
    name: NamespaceName,
    if_exists: Annotated[bool, typer.Option("--if-exists", help="Do nothing where there is none.")] = False,
    dry_run: DryRun = False,
    check: Check = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Destroy a namespace and everything on it."""
    session = _changing(as_json, dry_run, check, yes)
    with session.errors():

        def plan(machine: Machine) -> NamespacePlan:
            view = nvdimm_view.look_at_nvdimms(machine)
            if if_exists and not nvdimm_view.namespaces_named(view, name):
                return NamespacePlan((), "")
            return nvdimm_create.plan_destroy(machine, view, name)

        gone = _change(session, plan, nvdimm_create.destroy_namespace)
        if gone is not None:
            session.result |= {"namespace": asdict(gone), "device": gone.dev}
            if not session.as_json:
                tell(f"✓ {gone.name} is gone")
        elif not session.result["would_change"]:
            _tell_nothing(session, f"There is no namespace {name}")
        _finish(session)


def _changing(as_json: bool, dry_run: bool, check: bool, yes: bool) -> Session:
    result: dict[str, Any] = {
        "changed": False,
        "would_change": False,
        "commands": [],
        "region": "",
        "loses": None,
    }
    result |= {"namespace": None, "device": ""}
    return Session(result, as_json, dry_run=dry_run, check=check, yes=yes)


def _tell_nothing(session: Session, why: str) -> None:
    if not session.as_json:
        tell(f"{why}. Nothing was changed.")


def _finish(session: Session) -> NoReturn:
    found = session.check and session.result["would_change"]
    session.finish(Exit.NOT_AS_PLANNED if found else Exit.OK)


def _change(
    session: Session,
    planned: Callable[[Machine], NamespacePlan],
    carry_out: Callable[[Machine, NamespacePlan], Namespace],
) -> Namespace | None:
    """Plan, ask where something is lost, and do it under the lock.

    Returns what was made or is gone, or what is there already as asked; None where it was only shown.
    """
    session.be_root("this changes namespaces")
    machine = session.machine
    plan = planned(machine)
    session.result |= {
        "would_change": bool(plan.commands),
        "commands": [c.argv for c in plan.commands],
        "region": plan.region,
        "loses": asdict(plan.takes) if plan.takes else None,
    }
    if not plan.commands:
        return plan.there
    session.preview_or_ask((shlex.join(c.argv) for c in plan.commands), plan.question)
    if session.only_shows:
        return None
    with lock.change_lock(machine):
        again = planned(machine)  # while we asked, others may have been at work
        if again != plan:
            raise EmupmemError("something changed in the meantime", "nothing was done; try it again")
        with nvdimm_create.failures_told(machine):
            one = carry_out(machine, again)
    session.result["changed"] = True
    return one
