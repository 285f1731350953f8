# SPDX-License-Identifier: Apache-2.0
"""`emupmem suggest`, and what `apply` shares with it: the request, the machine, its survey."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from emupmem.boot.foreign import Refused
from emupmem.cli import render
from emupmem.cli.options import As, Count, Far, From, Json, MinFree, Node, Offset, Size, Source, SourceOption
from emupmem.cli.output import one_line, print_json, say, tell, usage
from emupmem.cli.session import Session, require_root
from emupmem.cli.terminal import Printer
from emupmem.model import DeviceKind, EmupmemError, Plan, Request, RootOnly
from emupmem.planner import plan
from emupmem.planner import situation as planner_situation
from emupmem.planner import survey as planner_survey
from emupmem.planner.kernel_map import kernel_map
from emupmem.planner.kernels import words_beside
from emupmem.planner.places import takers
from emupmem.planner.situation import Situation
from emupmem.planner.survey import Survey
from emupmem.record import record
from emupmem.system import machine as system_machine
from emupmem.system.files import is_folder
from emupmem.system.machine import Machine
from emupmem.system.streams import given_file, is_gzip, new_file
from emupmem.units import parse_size, tight


def reserved_note(found: Survey) -> list[str]:
    if not found.reserved:
        return []
    present = ",".join(found.reserved)
    return [f"memmap={present} is reserved already: this plan would take its place (apply --add keeps both)"]


def refusal_with_plan(
    refused: Refused, machine: Machine, from_: str | None, source: Source, request: Request, nokaslr: bool
) -> Refused:
    """The refusal with what would have been reserved in it."""
    from emupmem.boot import obstacles  # 25 ms, see below

    extra = ("nokaslr",) if nokaslr else ()
    return obstacles.for_plan(
        refused, lambda: plan.plan(survey(from_, source, machine).situation, request), extra
    )


def tell_refused(refused: EmupmemError) -> None:
    tell(f"\nemupmem apply refuses here: {refused.message}")
    if refused.hint:
        tell(f"Next:  {refused.hint}" if isinstance(refused, Refused) else f"       {refused.hint}")


def print_refusal(found: Survey, words: str) -> EmupmemError | None:
    """Why apply would refuse, with the planned value in the way of the tool that owns the boot entries."""
    why = found.apply_refused
    return why.for_words(words) if words and isinstance(why, Refused) else why


def suggest(
    size: Size = None,
    count: Count = 1,
    offset: Offset = None,
    min_free: MinFree = "2G",
    numa_node: Node = None,
    far: Far = False,
    as_: As = DeviceKind.PMEM,
    from_: From = None,
    source: SourceOption = Source.AUTO,
    svg: Annotated[
        str | None,
        typer.Option(
            "--svg",
            metavar="FILE",
            help="Also write the picture of the map as an SVG; a file that is there is replaced.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the usable memory and plan a reservation. Changes nothing and needs no root."""
    result: dict[str, Any] = {"source": from_ or source.value, "ranges": [], "plan": None, "rejected": []}
    result |= {"taken": [], "refused": None, "loader": ""}
    machine = system_machine.Machine()
    with Session(result, as_json).errors(), system_machine.asked_once(machine):
        wanted = TypedRequest(size, count, offset, min_free, numa_node, as_, far)
        request = wanted.request()
        found = survey(from_, source, machine if from_ is None else None)
        if from_ is None:
            found = asked(found, machine, as_)
        situation = found.situation
        result |= {"source": found.source, "ranges": [_entry(e) for e in situation.firmware.entries]}
        result["taken"], result["loader"] = list(takers(situation)), found.loader
        problem: EmupmemError | None = None
        made = None
        try:
            made = plan.plan(situation, request)
        except planner_situation.NoPlan as exc:
            problem = exc
        rejected = plan.rejected(situation, request, made)
        result["rejected"] = [{"start": r.start, "size": r.size, "reason": r.reason} for r in rejected]
        same = made is not None and set(made.memmap.removeprefix("memmap=").split(",")) == set(found.reserved)
        notes = [*found.notes, *([] if same else reserved_note(found))]
        if made:
            warnings = [*notes, *made.warnings]
            result["plan"] = {
                "memmap": made.memmap,
                "kind": as_.value,
                "reservations": [
                    {"start": r.start, "size": r.size, "align": r.align, "numa_node": r.numa_node}
                    for r in made.reservations
                ],
                "ram_left": made.ram_left,
                "nokaslr": made.add_nokaslr,
                "words": list(words_beside(made.reservations, made.needs_nokaslr)),
                "warnings": warnings,
                "kernel_map": [_entry(e) for e in kernel_map(situation, made.memmap)],
            }
        if svg is not None:
            _write_picture(svg, situation, made)
        if not as_json:
            out = Printer()
            offers = plan.offers(situation, request)
            render.suggestion(out, situation, found.source, offers, rejected, made)
            for note in notes:
                say(f"  ! {note}")
            if svg is not None:
                tell(f"✓ {svg} written")
        if problem is not None and (size is not None or offset is not None):
            raise problem
        if problem is not None:
            if as_json:
                result["error"] = one_line(problem)
            else:
                tell()
                say(one_line(problem))
        words = [made.memmap, *result["plan"]["words"]] if made else []
        refused = print_refusal(found, " ".join(words))
        if refused is None and made is not None and from_ is None:
            refused = _rehearsed(found, machine, request)
        if refused is not None:
            result["refused"] = {"message": refused.message, "hint": refused.hint}
        items = made.memmap.removeprefix("memmap=").split(",") if made else []
        if as_json or made is None:
            pass
        elif set(items) == set(found.reserved):
            proof = " (sudo emupmem verify proves it)" if from_ is None else ""
            tell(f"\nNothing to do: {made.memmap} is set up already{proof}")
        elif refused is not None:
            tell_refused(refused)
        else:
            replaces = ["--replace"] if found.reserved else []
            command = wanted.next_command(made.reservations[0].size, replaces)
            where = "   (on that machine)" if from_ is not None else ""
            tell(f"\nNext:  {command}{where}")
            tell(f"       (adds {shlex.join(words)} to the kernel command line)")
            if from_ is not None and not found.whole_machine:
                tell(
                    "       (a log does not show whether that kernel has the driver: run emupmem doctor there)"
                )
    if as_json:
        print_json(result)


def _write_picture(file: str, situation: Situation, made: Plan | None) -> None:
    from emupmem.cli import picture  # --svg only

    title = render.title(situation)
    new_file(file, picture.svg(situation, made, title).encode(), force=True)


@record
class TypedRequest:
    """What a person asks for, in the words that were typed: sizes and places with their units."""

    size: str | None
    count: int
    offset: str | None
    min_free: str
    numa_node: int | None
    kind: DeviceKind
    far: bool

    def request(self) -> Request:
        """The same in bytes. Raises UsageError where that is nothing that can be wanted."""
        if self.far and self.numa_node is not None:
            usage("--far and --numa-node exclude each other")
        try:
            request = Request(
                parse_size(self.size) if self.size is not None else None,
                self.count,
                parse_size(self.offset, "offset") if self.offset is not None else None,
                parse_size(self.min_free, "--min-free"),
                self.numa_node,
                self.kind,
                self.far,
            )
            plan.check_values(request)
        except EmupmemError as exc:
            usage(exc.message, exc.hint)
        return request

    def next_command(self, size: int, more: list[str]) -> str:
        """The `apply` that plans the same: `size` was chosen where none was asked for."""
        words = ["sudo", "emupmem", "apply", "--size", tight(size)]
        words += ["--count", str(self.count)] if self.count != 1 else []
        words += ["--offset", self.offset] if self.offset is not None else []
        words += ["--min-free", self.min_free] if self.min_free != "2G" else []
        words += ["--numa-node", str(self.numa_node)] if self.numa_node is not None else []
        words += ["--far"] if self.far else []
        words += ["--as", self.kind.value] if self.kind is not DeviceKind.PMEM else []
        return shlex.join([*words, *more])


def survey(from_: str | None, source: Source, machine: Machine | None = None) -> Survey:
    if from_ is not None:
        name = "standard input" if from_ == "-" else from_
        with given_file(from_, say) as file:
            if is_gzip(file):
                from emupmem.report import archive, collected  # 75 ms, archives only

                found = collected.plan_from(archive.unpack(file, name), name, source.value)
            else:
                found = planner_survey.of_log(file, name)
        if machine is None:
            return planner_survey.for_kernel(found, None)
        from emupmem.boot import obstacles  # 25 ms, not for --from

        return obstacles.planned_for(machine, found)
    from emupmem.boot import obstacles, prepare  # 80 ms, not for --from

    machine = machine or system_machine.Machine()
    boots = None
    try:
        boots = prepare.next_line(machine)
    except EmupmemError:
        boots = None  # not known, or not ours to read: this boot's own command line serves
    return obstacles.planned_for(machine, planner_survey.of_machine(machine, source.value, boots))


def machine_at(root: Path | None, from_: str | None, *, changes: bool, needs_log: bool = True) -> Machine:
    if root is None:
        if from_ is not None:
            usage("--from plans for another machine: it needs --root, the tree of that machine")
        machine = system_machine.Machine()
    else:
        if not is_folder(root):
            raise EmupmemError(
                f"{root} is not a folder", "--root takes the top folder of that machine's tree"
            )
        machine = system_machine.Machine(root)
        if machine.live and from_ is not None:
            usage("--root / is this machine: leave --root and --from away")
        if not machine.live and needs_log and from_ is None:
            usage("--root needs --from: the boot log of the machine that the tree belongs to")
    if machine.live and changes:
        require_root(machine, "this changes the boot configuration")
    return machine


def asked(found: Survey, machine: Machine, kind: DeviceKind) -> Survey:
    """The survey of this machine with what apply would say here, and what starts it."""
    from emupmem.boot import detect, obstacles  # 25 ms, not for --from

    return replace(found, apply_refused=obstacles.first(machine, kind), loader=detect.title_of(machine))


def _rehearsed(found: Survey, machine: Machine, request: Request) -> EmupmemError | None:
    """Why apply would refuse this very request here; None where it would not, or where only root could tell."""
    from emupmem.boot import loader, prepare  # 80 ms, not for --from

    options = loader.Options(replace=bool(found.reserved))
    try:
        prepare.prepare_apply(machine, found, request, options)
    except EmupmemError as exc:
        unseen = isinstance(exc, RootOnly) or isinstance(exc.__cause__, PermissionError)
        return None if unseen and not machine.is_root else exc
    return None


def _entry(entry: Any) -> dict[str, Any]:
    return {"start": entry.start, "size": entry.size, "type": entry.kind.value}
