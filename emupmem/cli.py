"""The command line: call a stage, show its result, choose the exit status. No logic of its own."""

from __future__ import annotations

import copy
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from emupmem import (
    __version__,
    cli_doctor,
    cli_mount,
    cli_namespaces,
    cli_nvdimm,
    cli_qemu,
    cli_trial,
    streams,
)
from emupmem.cli_change import carry_out, change_result
from emupmem.cli_common import (
    EPILOG,
    DryRun,
    Exit,
    FileSystem,
    Fs,
    Json,
    Owner,
    Permissions,
    Root,
    UsageError,
    Yes,
    as_typed,
    json_errors,
    one_line,
    print_json,
    say,
    usage,
)
from emupmem.model import EmupmemError, Request
from emupmem.units import parse_size

if TYPE_CHECKING:
    from emupmem.boot.foreign import Refused
    from emupmem.device.boot_unit import Wish
    from emupmem.planner.survey import Survey
    from emupmem.system.machine import Machine


class Source(StrEnum):
    """Where the firmware's memory map is read on a running machine."""

    AUTO = "auto"
    DMESG = "dmesg"
    JOURNAL = "journal"
    SYSFS = "sysfs"


class TrialBy(StrEnum):
    """How a trial is started."""

    GRUB = "grub"
    KEXEC = "kexec"


class Variable(StrEnum):
    """The GRUB variable that holds the argument."""

    LINUX = "GRUB_CMDLINE_LINUX"
    DEFAULT = "GRUB_CMDLINE_LINUX_DEFAULT"


app = typer.Typer(
    name="emupmem",
    help="Turn ordinary RAM into /dev/pmem0 for development: plan memmap=, put it into GRUB, prove it "
    "after the reboot. The device is emulated and volatile: its content does not survive a power cycle.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"emupmem {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback where an error comes from.")
    ] = False,
) -> None:
    if debug:
        os.environ["EMUPMEM_DEBUG"] = "1"


Size = Annotated[
    str | None, typer.Option("--size", metavar="SIZE", help="Size of each device, as 16G or 512M.")
]


Count = Annotated[int, typer.Option("--count", metavar="N", help="How many devices, 1 to 4.")]


Offset = Annotated[
    str | None,
    typer.Option("--offset", metavar="ADDR", help="Where the first begins, as 4G; else the lowest place."),
]


MinFree = Annotated[
    str, typer.Option("--min-free", metavar="SIZE", help="RAM that must stay for the system.")
]


Node = Annotated[int | None, typer.Option("--numa-node", metavar="N", help="Reserve on this NUMA node only.")]


From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Plan from a saved boot log or an archive of emupmem collect (- for standard input), not this machine.",
    ),
]


SourceOption = Annotated[
    Source, typer.Option("--source", help="Where to read the memory map of this machine.")
]


@app.command(epilog=EPILOG)
def suggest(
    size: Size = None,
    count: Count = 1,
    offset: Offset = None,
    min_free: MinFree = "2G",
    numa_node: Node = None,
    from_: From = None,
    source: SourceOption = Source.AUTO,
    as_json: Json = False,
) -> None:
    """Show the usable memory and plan a reservation. Changes nothing and needs no root."""
    from emupmem.planner import plan
    from emupmem.planner import situation as planner_situation

    result: dict[str, Any] = {"source": from_ or source.value, "ranges": [], "plan": None, "rejected": []}
    result["refused"] = None
    with json_errors(as_json, result):
        request = _request(size, count, offset, min_free, numa_node)
        found = _survey(from_, source)
        if from_ is None:
            found = _asked(found)
        situation = found.situation
        result |= {"source": found.source, "ranges": [_entry(e) for e in situation.firmware.entries]}
        problem: EmupmemError | None = None
        made = None
        try:
            made = plan.plan(situation, request)
        except planner_situation.NoPlan as exc:
            problem = exc
        rejected = plan.rejected(situation, request, made)
        result["rejected"] = [{"start": r.start, "size": r.size, "reason": r.reason} for r in rejected]
        notes = [*found.notes, *_reserved_note(found)]
        if made:
            warnings = [*notes, *made.warnings]
            result["plan"] = {
                "memmap": made.memmap,
                "reservations": [
                    {"start": r.start, "size": r.size, "align": r.align, "numa_node": r.numa_node}
                    for r in made.reservations
                ],
                "ram_left": made.ram_left,
                "nokaslr": made.add_nokaslr,
                "warnings": warnings,
            }
        if not as_json:
            from emupmem import render

            out = render.console()
            offers = plan.offers(situation, request)
            render.suggestion(out, situation, found.source, offers, rejected, made)
            for note in notes:
                say(f"  ! {note}")
        if problem is not None and size is not None:
            raise problem
        if problem is not None:
            if as_json:
                result["error"] = one_line(problem)
            else:
                print()
                say(one_line(problem))
        refused = _refused(found, made.memmap if made else "")
        if refused is not None:
            result["refused"] = {"message": refused.message, "hint": refused.hint}
        items = made.memmap.removeprefix("memmap=").split(",") if made else []
        if as_json or made is None:
            pass
        elif set(items) == set(found.reserved):
            print(f"\nNothing to do: {made.memmap} is on the kernel command line already")
        elif refused is not None:
            _tell_refused(refused)
        else:
            replaces = ["--replace"] if found.reserved else []
            command = _next_command(
                made.reservations[0].size, count, offset, min_free, numa_node, replaces, from_
            )
            print(f"\nNext:  {command}")
            print(f"       (adds {shlex.quote(made.memmap)} to the kernel command line)")
    if as_json:
        print_json(result)


@app.command(epilog=EPILOG)
def apply(
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Size of each device, as 16G or 512M.")],
    count: Count = 1,
    offset: Offset = None,
    min_free: MinFree = "2G",
    numa_node: Node = None,
    variable: Annotated[
        Variable,
        typer.Option(
            "--variable",
            help="GRUB_CMDLINE_LINUX reaches every entry; GRUB_CMDLINE_LINUX_DEFAULT leaves recovery entries "
            "without the reservation, for machines where you want a menu entry with all the memory.",
        ),
    ] = Variable.LINUX,
    add: Annotated[
        bool, typer.Option("--add", help="Keep the reservation that is there and add to it.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put this in place of what is reserved.")
    ] = False,
    nokaslr: Annotated[
        bool,
        typer.Option(
            "--nokaslr", help="Also add nokaslr, for kernels that may place themselves in the range."
        ),
    ] = False,
    dry_run: DryRun = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 3 if something would change; change nothing.")
    ] = False,
    yes: Yes = False,
    root: Root = None,
    from_: From = None,
    source: SourceOption = Source.AUTO,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="DIR",
            help="Make a DAX file system on the device and mount it here at every boot; once for each device.",
        ),
    ] = None,
    fs: Fs = None,
    owner: Owner = "",
    mode: Permissions = "",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="FILE",
            help="Save the content here at an orderly shutdown and bring it back at boot; once for each --mount.",
        ),
    ] = None,
    trial: Annotated[
        TrialBy | None,
        typer.Option(
            "--trial",
            metavar="[=kexec]",
            help="Try it for one start first: nothing permanent. If the machine hangs, the next start is the old "
            "configuration. --trial=kexec starts the kernel at once, without the firmware.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the reservation into GRUB's configuration, safely. It takes effect at the next reboot."""
    from emupmem.boot import change, obstacles, prepare
    from emupmem.boot.foreign import Refused

    result = change_result()
    with json_errors(as_json, result):
        if add and replace:
            usage("--add and --replace exclude each other")
        request = _request(size, count, offset, min_free, numa_node)
        machine = _machine(root, from_, changes=not (dry_run or check))
        try:
            warnings = obstacles.refuse(machine)
        except Refused as exc:
            raise _for_plan(exc, machine, from_, source, request, nokaslr) from exc
        found = _survey(from_, source, machine)
        options = change.Options(variable.value, add, replace, nokaslr)
        wishes = _wishes(mount or [], fs, owner, mode, keep or [])
        if trial is not None:
            if wishes:
                usage("--mount is permanent: confirm the trial, then apply --mount")
            cli_trial.begin(
                machine, found, request, options, trial.value, result, warnings, dry_run, check, yes, as_json
            )
        prepared = prepare.prepare_apply(machine, found, request, options, wishes)
        carry_out(machine, prepared, result, [*warnings, *prepared.warnings], dry_run, check, yes, as_json)


@app.command(epilog=EPILOG)
def remove(
    items: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ITEM]...", help="What to give back, as '1G!4G'; else everything."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Give reserved memory back: undo what apply did. It takes effect at the next reboot."""
    from emupmem.boot import prepare

    result = change_result()
    with json_errors(as_json, result):
        machine = _machine(root, None, changes=not dry_run, needs_log=False)
        prepared = prepare.prepare_remove(machine, items or ())
        carry_out(machine, prepared, result, list(prepared.warnings), dry_run, False, yes, as_json)


@app.command(epilog=EPILOG)
def verify(
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for the device to appear."),
    ] = 10,
    require: Annotated[
        bool, typer.Option("--require", help="Exit 3 also where nothing is reserved and nothing should be.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove that what was asked is there: from GRUB's file up to a device with DAX."""
    from emupmem.system.machine import Machine
    from emupmem.verifier import ladder, observe

    result: dict[str, Any] = {"ok": False, "pending": False, "checks": [], "devices": []}
    with json_errors(as_json, result):
        seen = observe.observe(Machine(), wait)
        verdict = ladder.verify(seen)
        ok = verdict.ok and not (require and verdict.nothing_reserved)
        result |= {
            "ok": ok,
            "pending": verdict.pending,
            "checks": [
                {"name": c.name, "status": c.status, "expected": c.expected, "found": c.found, "hint": c.hint}
                for c in verdict.checks
            ],
            "devices": [{"dev": d.dev, "start": d.start, "size": d.size} for d in verdict.devices],
        }
        if not as_json:
            _show_verdict(verdict)
    if as_json:
        print_json(result)
    raise typer.Exit(Exit.OK if ok else Exit.NOT_AS_PLANNED)


def _show_verdict(verdict: Any) -> None:
    from emupmem import render
    from emupmem.system.machine import Machine

    render.ladder(render.console(), verdict.checks)
    if verdict.nothing_reserved:
        print("Nothing is reserved.")
    elif verdict.pending:
        print("Reboot pending.")
    unseen = [c.name for c in verdict.checks if c.status == "skipped" and not c.explained_by]
    if unseen:
        say(f"not seen: {', '.join(unseen)}" + ("" if Machine().is_root else "; with sudo it can be"))


# Shared by the commands ------------------------------------------------------------------------------


def _wishes(folders: list[str], fs: FileSystem | None, owner: str, mode: str, keep: list[str]) -> list[Wish]:
    if not folders and (fs or owner or mode or keep):
        usage("--fs, --owner, --mode and --keep belong to --mount")
    if len(keep) > len(folders):
        usage("--keep is given more often than --mount")
    if not folders:
        return []
    from emupmem.device.boot_unit import Wish

    files = [*keep, *[""] * (len(folders) - len(keep))]
    kind = (fs or FileSystem.EXT4).value
    return [Wish(folder, kind, owner, mode, file) for folder, file in zip(folders, files, strict=True)]


def _request(size: str | None, count: int, offset: str | None, min_free: str, node: int | None) -> Request:
    try:
        return Request(
            parse_size(size) if size is not None else None,
            count,
            parse_size(offset, "offset") if offset is not None else None,
            parse_size(min_free, "--min-free"),
            node,
        )
    except EmupmemError as exc:
        usage(exc.message, exc.hint)


def _survey(from_: str | None, source: Source, machine: Machine | None = None) -> Survey:
    from emupmem.planner import survey
    from emupmem.system.machine import Machine
    from emupmem.system.streams import given_file, is_gzip

    if from_ is not None:
        name = "standard input" if from_ == "-" else from_
        with given_file(from_) as file:
            if is_gzip(file):
                from emupmem.report import archive, collected

                found = collected.plan_from(archive.unpack(file, name), name, source.value)
            else:
                found = survey.of_log(file, name)
        if machine is None:
            return survey.for_kernel(found, None)
        from emupmem.boot import obstacles, prepare

        return obstacles.planned_for(machine, found)
    from emupmem.boot import obstacles, prepare

    machine = machine or Machine()
    boots = None
    try:
        boots = prepare.next_line(machine)
    except EmupmemError:
        boots = None  # not known, or not ours to read: this boot's own command line serves
    return obstacles.planned_for(machine, survey.of_machine(machine, source.value, boots))


def _asked(found: Survey) -> Survey:
    """The survey of this machine with what apply would say here."""
    from emupmem.boot import obstacles
    from emupmem.system.machine import Machine

    return replace(found, apply_refused=obstacles.first(Machine()))


def _refused(found: Survey, memmap: str) -> EmupmemError | None:
    """Why apply would refuse, with the planned value in the way of the tool that owns the boot entries."""
    from emupmem.boot.foreign import Refused

    why = found.apply_refused
    return why.for_words(memmap) if memmap and isinstance(why, Refused) else why


def _tell_refused(refused: EmupmemError) -> None:
    from emupmem.boot.foreign import Refused

    print(f"\nemupmem apply refuses here: {refused.message}")
    if refused.hint:
        print(f"Next:  {refused.hint}" if isinstance(refused, Refused) else f"       {refused.hint}")


def _for_plan(
    refused: Refused, machine: Machine, from_: str | None, source: Source, request: Request, nokaslr: bool
) -> Refused:
    """The refusal with what would have been reserved in it."""
    from emupmem.boot import obstacles
    from emupmem.planner import plan

    extra = ("nokaslr",) if nokaslr else ()
    return obstacles.for_plan(
        refused, lambda: plan.plan(_survey(from_, source, machine).situation, request), extra
    )


def _machine(root: Path | None, from_: str | None, *, changes: bool, needs_log: bool = True) -> Machine:
    from emupmem.system.machine import Machine

    if root is None:
        if from_ is not None:
            usage("--from plans for another machine: it needs --root, the tree of that machine")
        machine = Machine()
    else:
        if not root.is_dir():
            raise EmupmemError(f"{root} is not a folder")
        machine = Machine(root)
        if machine.live and from_ is not None:
            usage("--root / is this machine: leave --root and --from away")
        if not machine.live and needs_log and from_ is None:
            usage("--root needs --from: the boot log of the machine that the tree belongs to")
    if machine.live and changes and not machine.is_root:
        raise EmupmemError(
            "this changes the boot configuration and needs root", f"sudo {shlex.join(as_typed())}"
        )
    return machine


def _entry(entry: Any) -> dict[str, Any]:
    return {"start": entry.start, "size": entry.size, "type": entry.kind.value}


def _reserved_note(found: Survey) -> list[str]:
    if not found.reserved:
        return []
    present = ",".join(found.reserved)
    return [f"memmap={present} is reserved already: this plan would take its place (apply --add keeps both)"]


def _next_command(
    size: int,
    count: int,
    offset: str | None,
    min_free: str,
    node: int | None,
    more: list[str],
    from_: str | None,
) -> str:
    from emupmem.units import tight

    words = ["sudo", "emupmem", "apply", "--size", tight(size)]
    words += ["--count", str(count)] if count != 1 else []
    words += ["--offset", offset] if offset is not None else []
    words += ["--min-free", min_free] if min_free != "2G" else []
    words += ["--numa-node", str(node)] if node is not None else []
    words += more
    if from_ is not None:
        return f"{shlex.join(words)}   (on that machine)"
    return shlex.join(words)


cli_mount.register(app)
cli_trial.register(app)
cli_doctor.register(app)
app.add_typer(cli_namespaces.app, name="namespaces")
app.add_typer(cli_qemu.app, name="qemu")
app.add_typer(cli_nvdimm.app, name="nvdimm")


def main() -> NoReturn:
    """Run the program: one line for an error and one for what to do, a traceback only with --debug."""
    closed = tuple(name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None)
    if closed:
        from emupmem.system.streams import standard_streams

        standard_streams()
    # An option with a value that may be left out: typer has none.
    own = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv[1:own] = ["--trial=grub" if w == "--trial" else w for w in sys.argv[1:own]]
    with streams.guarded(closed):
        status = _status()
    sys.exit(status)


def _status() -> int:
    """Run the command; its exit status, every error said."""
    try:
        status: int = _needed(sys.argv[1:])(standalone_mode=False) or Exit.OK
        sys.stdout.flush()
        if status == 128 + signal.SIGINT:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
    except EmupmemError as exc:
        status = _fail(exc.message, exc.hint, Exit.USAGE if isinstance(exc, UsageError) else Exit.ERROR, exc)
    except BrokenPipeError:
        # The reader of a pipe has gone: nothing more to tell, and nobody to tell it to.
        status = Exit.ERROR
    except KeyboardInterrupt:
        # While something is changed, signals are held back: this comes before or after it.
        status = _fail("stopped", "emupmem verify tells what is in force", Exit.ERROR, None)
    except Exception as exc:
        if exc is streams.failure():
            why = streams.failure()
            return _fail(
                f"standard output cannot be written: {why.strerror if why else ''}", "", Exit.ERROR, exc
            )
        # typer's own errors, without importing the click that it brings or does not bring
        if type(exc).__name__ == "NoArgsIsHelpError":  # its message is the help: as it is, not in one line
            say(exc.format_message())  # type: ignore[attr-defined]
            status = Exit.USAGE
        elif not hasattr(exc, "format_message"):
            if os.environ.get("EMUPMEM_DEBUG"):
                raise
            name = type(exc).__name__
            status = _fail(
                f"unexpected: {name}: {exc}", "emupmem --debug shows where; please report it", Exit.ERROR, exc
            )
        else:
            status = _fail(
                exc.format_message(), "emupmem --help tells more", getattr(exc, "exit_code", Exit.USAGE), None
            )
    return int(status)


def _needed(words: list[str]) -> typer.Typer:
    """The program with the one command that was typed: to build all thirty takes longer than most of them run.

    All of it where that is not the name of one, as for --help, a wrong name or completion in the shell.
    """
    name = next((w for w in words if not w.startswith("-")), "")
    one = copy.copy(app)
    one.registered_groups = [g for g in app.registered_groups if g.name == name]
    one.registered_commands = [c for c in app.registered_commands if _name(c.name, c.callback) == name]
    return one if one.registered_groups or one.registered_commands else app


def _name(name: str | None, function: Callable[..., Any] | None) -> str:
    return name or (function.__name__.replace("_", "-") if function is not None else "")


def _fail(message: str, hint: str, status: int, exc: BaseException | None) -> int:
    if exc is not None and os.environ.get("EMUPMEM_DEBUG"):
        import traceback

        traceback.print_exception(exc)
    say(f"emupmem: {' '.join(message.split())}")
    if hint:
        say(f"         {' '.join(hint.split())}")
    return status
