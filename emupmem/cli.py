"""The command line: call a stage, show its result, choose the exit status. No logic of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from emupmem import __version__
from emupmem.model import EmupmemError, Request
from emupmem.units import parse_size

if TYPE_CHECKING:
    from emupmem.change import Change, Outcome
    from emupmem.machine import Machine
    from emupmem.mount import Wish
    from emupmem.survey import Survey


class Exit(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_AS_PLANNED = 3


class Source(StrEnum):
    """Where the firmware's memory map is read on a running machine."""

    AUTO = "auto"
    DMESG = "dmesg"
    JOURNAL = "journal"
    SYSFS = "sysfs"


class Variable(StrEnum):
    """The GRUB variable that holds the argument."""

    LINUX = "GRUB_CMDLINE_LINUX"
    DEFAULT = "GRUB_CMDLINE_LINUX_DEFAULT"


class FileSystem(StrEnum):
    """The file systems that can map files directly."""

    EXT4 = "ext4"
    XFS = "xfs"


class NamespaceMode(StrEnum):
    """What a namespace becomes."""

    FSDAX = "fsdax"
    DEVDAX = "devdax"
    SECTOR = "sector"
    RAW = "raw"


EPILOG = (
    "Exit status: 0 as planned; 1 error; 2 wrong usage; 3 not as planned "
    "(a check failed, a reboot is pending, or --check found that something would change)."
)

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
        "--from", metavar="FILE", help="Plan from a saved boot log (- for standard input), not this machine."
    ),
]
SourceOption = Annotated[
    Source, typer.Option("--source", help="Where to read the memory map of this machine.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done and stop.")]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Edit the tree of another machine that you trust: sh reads its GRUB defaults (and finds no "
        "programs); nothing else is run.",
    ),
]


Fs = Annotated[
    FileSystem | None, typer.Option("--fs", help="The file system; ext4 unless the device holds another.")
]
Owner = Annotated[
    str, typer.Option("--owner", metavar="USER[:GROUP]", help="Whose the mounted folder shall be.")
]
Permissions = Annotated[
    str, typer.Option("--mode", metavar="MODE", help="Permissions of the mounted folder, as 0755.")
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
    from emupmem import planner

    result: dict[str, Any] = {"source": from_ or source.value, "ranges": [], "plan": None, "rejected": []}
    with _json_errors(as_json, result):
        request = _request(size, count, offset, min_free, numa_node)
        found = _survey(from_, source)
        situation = found.situation
        result |= {"source": found.source, "ranges": [_entry(e) for e in situation.firmware.entries]}
        problem: EmupmemError | None = None
        made = None
        try:
            made = planner.plan(situation, request)
        except planner.NoPlan as exc:
            problem = exc
        rejected = planner.rejected(situation, request, made)
        result["rejected"] = [{"start": r.start, "size": r.size, "reason": r.reason} for r in rejected]
        if made:
            warnings = [*found.notes, *made.warnings]
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
            offers = planner.offers(situation, request)
            render.suggestion(out, situation, found.source, offers, rejected, made)
            for note in found.notes:
                _say(f"  ! {note}")
        if problem is not None and size is not None:
            raise problem
        if problem is not None:
            if as_json:
                result["error"] = _one_line(problem)
            else:
                print()
                _say(_one_line(problem))
        elif made and not as_json:
            print(
                f"\nNext:  {_next_command(made.reservations[0].size, count, offset, min_free, numa_node, from_)}"
            )
            print(f"       (adds {shlex.quote(made.memmap)} to the kernel command line)")
    if as_json:
        _print_json(result)


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
    as_json: Json = False,
) -> None:
    """Put the reservation into GRUB's configuration, safely. It takes effect at the next reboot."""
    from emupmem import change, obstacles

    result = _change_result()
    with _json_errors(as_json, result):
        if add and replace:
            _usage("--add and --replace exclude each other")
        request = _request(size, count, offset, min_free, numa_node)
        machine = _machine(root, from_, changes=not (dry_run or check))
        warnings = obstacles.refuse(machine)
        found = _survey(from_, source, machine)
        options = change.Options(variable.value, add, replace, nokaslr)
        wishes = _wishes(mount or [], fs, owner, mode, keep or [])
        prepared = change.prepare_apply(machine, found, request, options, wishes)
        _carry_out(machine, prepared, result, [*warnings, *prepared.warnings], dry_run, check, yes, as_json)


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
    from emupmem import change

    result = _change_result()
    with _json_errors(as_json, result):
        machine = _machine(root, None, changes=not dry_run, needs_log=False)
        prepared = change.prepare_remove(machine, items or ())
        _carry_out(machine, prepared, result, list(prepared.warnings), dry_run, False, yes, as_json)


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
    from emupmem import survey
    from emupmem import verifier as judge
    from emupmem.machine import Machine

    result: dict[str, Any] = {"ok": False, "pending": False, "checks": [], "devices": []}
    with _json_errors(as_json, result):
        seen = survey.observe(Machine(), wait)
        verdict = judge.verify(seen)
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
        _print_json(result)
    raise typer.Exit(Exit.OK if ok else Exit.NOT_AS_PLANNED)


@app.command(epilog=EPILOG)
def mount(
    device: Annotated[
        str | None,
        typer.Argument(metavar="[DEVICE]", help="As /dev/pmem0; else the only emulated one."),
    ] = None,
    folder: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Where; else /mnt and the device's name.")
    ] = None,
    fs: Fs = None,
    owner: Owner = "",
    mode: Permissions = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Make a new file system over the one that an emulated device holds."),
    ] = False,
    at_boot: Annotated[bool, typer.Option("--at-boot", help="Do it at every boot as well.")] = False,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="FILE",
            help="Save the content here at an orderly shutdown and bring it back at boot (with --at-boot).",
        ),
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a DAX file system on the device if it is blank, mount it, and prove that it is DAX."""
    from emupmem import mount as mounting

    result: dict[str, Any] = {
        "device": device or "",
        "dir": folder or "",
        "fs": fs.value if fs else "",
        "dax_file": None,
        "map_sync": None,
        "huge_pages": None,
        "changed": False,
    }
    with _json_errors(as_json, result):
        machine = _mounting_machine("this makes and mounts file systems")
        if keep and not at_boot:
            _usage("--keep belongs to --at-boot: what is saved at shutdown is brought back at boot")
        request = mounting.MountRequest(device, folder, fs.value if fs else None, owner, mode, force, keep)
        if dry_run:
            prepared = mounting.prepare(machine, request)
            result |= _steps(prepared.steps)
            if not as_json:
                _show_steps(prepared.steps, owner, mode)
            _finish(as_json, result, Exit.OK)
        outcome, unit = mounting.mount(machine, request, at_boot)
        seen = outcome.seen
        result |= _steps(outcome.steps) | {
            "dax_file": seen.dax_file,
            "map_sync": seen.map_sync,
            "huge_pages": seen.huge,
            "changed": outcome.changed or (unit is not None and unit.needed),
        }
        if not as_json:
            _tell_mount(outcome, unit)
    _finish(as_json, result, Exit.OK if outcome.ok else Exit.NOT_AS_PLANNED)


@app.command(epilog=EPILOG)
def umount(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where persistent memory is mounted.")],
    as_json: Json = False,
) -> None:
    """Unmount persistent memory; where it is in use, tell by whom. The content stays until the power goes."""
    from emupmem import mount as mounting

    result: dict[str, Any] = {"device": "", "dir": folder, "changed": False}
    with _json_errors(as_json, result):
        machine = _mounting_machine("this unmounts")
        gone = mounting.umount(machine, folder)
        result |= {"device": gone.source, "dir": gone.dir, "changed": True}
        if not as_json:
            print(f"✓ {gone.source} is no longer mounted at {gone.dir}")
            if mounting.is_at_boot(machine, gone.dir):
                print("It is mounted again at the next boot.")
    _finish(as_json, result, Exit.OK)


@app.command(epilog=EPILOG)
def save(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The image to write; replaced as a whole.")],
    source: Annotated[
        str | None,
        typer.Argument(metavar="[DEVICE|DIR]", help="A device, or where it is mounted; else the only one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Save the content of a device: a sparse raw image with a checksum. A mounted one is frozen meanwhile."""
    from emupmem import snapshot

    result: dict[str, Any] = {}
    with _json_errors(as_json, result):
        machine = _mounting_machine("this reads a device")
        with _progress() as progress:
            done = snapshot.save(machine, file, source, progress)
        _tell_snapshot(f"{done.device} saved to {done.file}", done, result, as_json)


@app.command(epilog=EPILOG)
def restore(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An image that `emupmem save` wrote.")],
    device: Annotated[
        str | None, typer.Argument(metavar="[DEVICE]", help="Where to write it; else the only one.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take an image without a checksum, or with a wrong one, as it is.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Put a saved image back onto a device. It is checked as a whole before anything is written."""
    from emupmem import snapshot

    result: dict[str, Any] = {}
    with _json_errors(as_json, result):
        machine = _mounting_machine("this writes a device")
        if not yes and not snapshot.is_blank(machine, device):
            _ask(f"{snapshot.choose(machine, device).dev} is not blank: overwrite all of it?")
        with _progress() as progress:
            done = snapshot.restore(machine, file, device, force, progress)
        if not done.checksum:
            _say("! it was restored without a valid checksum")
        _tell_snapshot(f"{done.device} restored from {done.file}", done, result, as_json)


def _tell_snapshot(what: str, done: Any, result: dict[str, Any], as_json: bool) -> None:
    from dataclasses import asdict

    from emupmem.units import human

    result |= asdict(done)
    if as_json:
        _finish(as_json, result, Exit.OK)
    rate = human(int(done.size / max(done.seconds, 0.001)))
    sizes = f"{human(done.size)}, {human(done.allocated)} on disk"
    print(f"✓ {what} · {sizes} · {done.seconds:.1f} s, {rate}/s")


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar with rate on a terminal, silence elsewhere; a signal stops the work at a safe moment."""
    from emupmem.machine import interrupts

    with interrupts() as signals:
        if not sys.stderr.isatty():
            yield lambda what, done, size: signals.check()
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        from emupmem import render

        columns = (
            TextColumn("{task.description:11}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        # Without a thread of its own: save forks the guard of a frozen file system.
        bar = Progress(*columns, console=render.console(stderr=True), transient=True, auto_refresh=False)
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, size: int) -> None:
            signals.check()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=size)
            bar.update(tasks[what], completed=done)
            bar.refresh()

        with bar:
            yield show


namespaces = typer.Typer(
    help="Divide a reserved range into namespaces of any size (the ramdax driver, Linux 6.19 and later). "
    "Emulated and volatile: labels and content do not survive a power cycle.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(namespaces, name="namespaces")
AtBoot = Annotated[bool, typer.Option("--at-boot", help="At every boot as well, by a rule for udev.")]


@namespaces.command("bind", epilog=EPILOG)
def namespaces_bind(
    at_boot: AtBoot = False, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False
) -> None:
    """Give the reserved ranges to ramdax. All content on them is lost."""
    _rebind("ramdax", at_boot, dry_run, yes, as_json)


@namespaces.command("unbind", epilog=EPILOG)
def namespaces_unbind(
    at_boot: AtBoot = False, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False
) -> None:
    """Give the ranges back to the usual driver: one device each. All content on them is lost."""
    _rebind("e820_pmem", at_boot, dry_run, yes, as_json)


def _rebind(wanted: str, at_boot: bool, dry_run: bool, yes: bool, as_json: bool) -> None:
    from emupmem import namespaces as ns

    result: dict[str, Any] = {"changed": False, "driver": "", "at_boot": False}
    with _json_errors(as_json, result):
        machine = _mounting_machine("this changes the driver of a device")
        binds = wanted == ns.DRIVER
        steps = ns.bind_steps(machine, wanted)
        if at_boot and binds:
            ns.require_at_boot(machine)
        if steps or dry_run:
            question = f"All content of the reserved ranges is lost. Give them to {wanted}?"
            _carry_out_steps(steps, question, dry_run, yes)
        if not dry_run:
            if steps:
                with machine.lock():
                    ns.rebind(machine, steps, wanted)
            if at_boot and binds:
                ns.at_boot(machine)
            elif at_boot:
                ns.remove_at_boot(machine)
        result |= {"changed": bool(steps) and not dry_run, "driver": ns.driver(machine)}
        result["at_boot"] = machine.exists(ns.RULE)
        if not as_json and not dry_run:
            kept = f", at every boot ({ns.RULE})" if result["at_boot"] else ""
            print(f"✓ the reserved ranges belong to {result['driver']}{kept}")
            if binds:
                print("Next:  sudo emupmem namespaces create --size SIZE")
        _finish(as_json, result, Exit.OK)


@namespaces.command("list", epilog=EPILOG)
def namespaces_list(as_json: Json = False) -> None:
    """Show the ranges that ramdax has and what is on them."""
    from dataclasses import asdict

    from emupmem import namespaces as ns
    from emupmem.units import human

    result: dict[str, Any] = {"driver": "", "regions": []}
    with _json_errors(as_json, result):
        machine = _mounting_machine("this asks ndctl")
        ns.require(machine)
        result["driver"] = ns.driver(machine)
        there = ns.regions(machine)
        result["regions"] = [asdict(region) for region in there]
        if not as_json:
            if result["driver"] != ns.DRIVER:
                print(f"The reserved ranges belong to {result['driver'] or 'no driver'}.")
                print("Next:  sudo emupmem namespaces bind")
            for region in there:
                room = f"room for {human(region.free)}"
                print(f"{region.name}  {human(region.size)}, {room} · emulated, volatile")
                for one in region.namespaces:
                    print(f"  {one.name:14} {one.mode:7} {human(one.size):>9}  /dev/{one.dev}")
        _finish(as_json, result, Exit.OK)


@namespaces.command("create", epilog=EPILOG)
def namespaces_create(
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="What it takes of the range, as 256M.")],
    mode: Annotated[
        NamespaceMode, typer.Option("--mode", help="What kind of device it becomes.")
    ] = NamespaceMode.FSDAX,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a namespace on the first range with room."""
    from emupmem import namespaces as ns

    _change_namespaces(
        lambda machine: ns.create_steps(machine, _size(size), mode.value), "", dry_run, True, as_json
    )


@namespaces.command("resize", epilog=EPILOG)
def namespaces_resize(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As namespace0.0 or /dev/pmem0.")],
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="What it shall take of the range.")],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make a namespace anew with another size. Its content is lost, and its name may be another."""
    from emupmem import namespaces as ns

    question = f"All content of {name} is lost. Make it anew?"
    _change_namespaces(
        lambda machine: ns.resize_steps(machine, name, _size(size)), question, dry_run, yes, as_json
    )


@namespaces.command("delete", epilog=EPILOG)
def namespaces_delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As namespace0.0 or /dev/pmem0.")],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a namespace and all on it."""
    from emupmem import namespaces as ns

    question = f"All content of {name} is lost. Delete it?"
    _change_namespaces(lambda machine: ns.delete_steps(machine, name), question, dry_run, yes, as_json)


def _change_namespaces(plan: Any, question: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from emupmem import namespaces as ns
    from emupmem.units import human

    result: dict[str, Any] = {"changed": False, "made": [], "regions": []}
    with _json_errors(as_json, result):
        machine = _mounting_machine("this changes namespaces")
        with machine.lock():
            steps = plan(machine)
            _carry_out_steps(steps, question, dry_run, yes)
            before = {n for r in ns.regions(machine) for n in r.namespaces}
            if not dry_run:
                ns.run(machine, steps)
                machine.settle()
            there = ns.regions(machine)
        made = [n for r in there for n in r.namespaces if n not in before]
        result["changed"] = not dry_run
        result["made"] = [asdict(n) for n in made]
        result["regions"] = [asdict(r) for r in there]
        if not as_json and not dry_run:
            for one in made:
                print(f"✓ {one.name} · {one.mode}, {human(one.size)}, /dev/{one.dev} · emulated, volatile")
            if not made:
                print("✓ deleted")
        _finish(as_json, result, Exit.OK)


def _carry_out_steps(steps: Any, question: str, dry_run: bool, yes: bool) -> None:
    """Show what would be done and ask; the caller does it."""
    from emupmem.namespaces import Write

    if dry_run:
        for step in steps:
            _say(f"  {step if isinstance(step, Write) else shlex.join(step.argv)}")
    elif not yes:
        _ask(question)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except EmupmemError as exc:
        _usage(exc.message, exc.hint)


@app.command("boot-mount", hidden=True, context_settings={"ignore_unknown_options": True})
def boot_mount(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs: RANGE DIR FS OWNER MODE KEEP for each mount."""
    from emupmem import mount as mounting
    from emupmem import unit

    machine = _mounting_machine("this is for emupmem.service")
    raise typer.Exit(mounting.boot(machine, unit.from_words(words), lambda line: print(line, flush=True)))


@app.command("boot-save", hidden=True, context_settings={"ignore_unknown_options": True})
def boot_save(words: Annotated[list[str], typer.Argument()]) -> None:
    """What emupmem.service runs when it is stopped: the same words."""
    from emupmem import keep as keeping
    from emupmem import unit

    machine = _mounting_machine("this is for emupmem.service")
    well = keeping.save_all(machine, unit.from_words(words), lambda line: print(line, flush=True))
    raise typer.Exit(Exit.OK if well else Exit.ERROR)


def _mounting_machine(what: str) -> Machine:
    from emupmem.machine import Machine

    machine = Machine()
    if not machine.is_root:
        raise EmupmemError(f"{what} and needs root", f"sudo {shlex.join(_as_typed())}")
    return machine


def _steps(steps: Any) -> dict[str, Any]:
    return {"device": steps.device.dev, "dir": steps.dir, "fs": steps.fs}


def _show_steps(steps: Any, owner: str, mode: str) -> None:
    lines = [shlex.join(c.argv) for c in steps.commands]
    if steps.make:
        lines.insert(-1, f"mkdir -p {shlex.quote(steps.dir)}")
    lines += [f"chown {owner} {shlex.quote(steps.dir)}"] if owner else []
    lines += [f"chmod {mode} {shlex.quote(steps.dir)}"] if mode else []
    print(
        "\n".join(lines) or f"Already as asked: {steps.device.dev} at {steps.dir}. Nothing would be changed."
    )


def _tell_mount(outcome: Any, unit: Any) -> None:
    from emupmem import render

    if not outcome.changed:
        print(f"Already as asked: {outcome.steps.device.dev} at {outcome.steps.dir}.")
    elif outcome.steps.kept and outcome.steps.commands:
        print(f"The {outcome.steps.fs} that was on {outcome.steps.device.dev} is kept.")
    render.ladder(render.console(), outcome.rungs)
    if unit is not None:
        print(f"{'✓ ' if unit.needed else ''}emupmem.service does this at every boot")


def _wishes(folders: list[str], fs: FileSystem | None, owner: str, mode: str, keep: list[str]) -> list[Wish]:
    if not folders and (fs or owner or mode or keep):
        _usage("--fs, --owner, --mode and --keep belong to --mount")
    if len(keep) > len(folders):
        _usage("--keep is given more often than --mount")
    if not folders:
        return []
    from emupmem.mount import Wish

    files = [*keep, *[""] * (len(folders) - len(keep))]
    kind = (fs or FileSystem.EXT4).value
    return [Wish(folder, kind, owner, mode, file) for folder, file in zip(folders, files, strict=True)]


def _show_verdict(verdict: Any) -> None:
    from emupmem import render
    from emupmem.machine import Machine

    render.ladder(render.console(), verdict.checks)
    if verdict.nothing_reserved:
        print("Nothing is reserved.")
    elif verdict.pending:
        print("Reboot pending.")
    unseen = [c.name for c in verdict.checks if c.status == "skipped" and not c.found.startswith("explained")]
    if unseen:
        _say(f"not seen: {', '.join(unseen)}" + ("" if Machine().is_root else "; with sudo it can be"))


# Shared by the commands ------------------------------------------------------------------------------


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
        _usage(exc.message, exc.hint)


def _survey(from_: str | None, source: Source, machine: Machine | None = None) -> Survey:
    from emupmem import survey
    from emupmem.machine import Machine, given_file

    if from_ is not None:
        with given_file(from_) as file:
            return survey.of_log(file, "standard input" if from_ == "-" else from_)
    from emupmem import change

    machine = machine or Machine()
    boots = None
    try:
        boots = change.effective_line(machine, change.read_defaults(machine))
    except EmupmemError:
        boots = None  # no GRUB here: this boot's own command line serves
    return survey.of_machine(machine, source.value, boots)


def _machine(root: Path | None, from_: str | None, *, changes: bool, needs_log: bool = True) -> Machine:
    from emupmem.machine import Machine

    if root is None:
        if from_ is not None:
            _usage("--from plans for another machine: it needs --root, the tree of that machine")
        machine = Machine()
    else:
        if not root.is_dir():
            raise EmupmemError(f"{root} is not a folder")
        machine = Machine(root)
        if machine.live and from_ is not None:
            _usage("--root / is this machine: leave --root and --from away")
        if not machine.live and needs_log and from_ is None:
            _usage("--root needs --from: the boot log of the machine that the tree belongs to")
    if machine.live and changes and not machine.is_root:
        raise EmupmemError(
            "this changes the boot configuration and needs root", f"sudo {shlex.join(_as_typed())}"
        )
    return machine


def _as_typed() -> list[str]:
    return ["emupmem", *sys.argv[1:]]


def _carry_out(
    machine: Machine,
    prepared: Change,
    result: dict[str, Any],
    warnings: list[str],
    dry_run: bool,
    check: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Show, ask, do, tell; ends the command with its exit status."""
    from emupmem import change as changes

    booted = machine.peek("/proc/cmdline") if machine.live else ""
    result |= {"memmap": prepared.memmap, "diff": prepared.diff}
    if prepared.unit.after is not None or prepared.unit.before is not None:
        result["mounts"] = _mounts(prepared)
    for warning in warnings:
        _say(f"! {warning}")
    if not prepared.needed:
        result["reboot_required"] = machine.live and not _boots_as(booted, prepared)
        if not as_json:
            print(f"Already as asked: {prepared.memmap or 'nothing is reserved'}. Nothing was changed.")
            if result["reboot_required"]:
                print("Reboot, then:  sudo emupmem verify")
        _finish(as_json, result, Exit.OK)
    if not as_json:
        _show_change(machine, prepared)
    if dry_run or check:
        _finish(as_json, result, Exit.NOT_AS_PLANNED if check else Exit.OK)
    if not yes:
        _ask("Apply?")
    outcome = changes.carry_out(machine, prepared)
    result |= {"changed": True, "backup": outcome.backup, "reboot_required": not _boots_as(booted, prepared)}
    if not as_json:
        _tell(machine, prepared, outcome, result["reboot_required"])
    _finish(as_json, result, Exit.OK)


def _mounts(prepared: Change) -> list[dict[str, Any]]:
    """What is mounted at every boot after the change."""
    try:
        found = prepared.unit.mounts
    except EmupmemError:
        return []  # edited by somebody, and left alone
    return [
        {
            "start": m.start,
            "size": m.size,
            "dir": m.dir,
            "fs": m.fs,
            "owner": m.owner,
            "mode": m.mode,
            "keep": m.keep,
        }
        for m in found
    ]


def _boots_as(booted: str, prepared: Change) -> bool:
    from emupmem.cmdline import parse_command_line

    return tuple(i.text for i in parse_command_line(booted).reservations) == prepared.normal


def _show_change(machine: Machine, prepared: Change) -> None:
    from emupmem import render

    out = render.console()
    if prepared.plan:
        render.plan_line(out, prepared.plan)
    render.diff(out, prepared.diff)
    generator = machine.generator() if machine.live else None
    name = machine.grub_cfg()
    if generator:
        out.print(f"then: {shlex.join(generator.argv)} (and check every entry of {name})")
    elif not machine.live:
        out.print("then, on that machine: update-grub2")


def _tell(machine: Machine, prepared: Change, outcome: Outcome, reboot: bool) -> None:
    from emupmem.machine import GRUB_DEFAULT

    if outcome.backup:
        print(f"✓ {GRUB_DEFAULT} written (before: {outcome.backup})")
    if not machine.live:
        print("Nothing was run in the tree. On that machine: update-grub2, reboot, emupmem verify")
        return
    if outcome.problem:
        _say(f"! {outcome.problem}")
    what = (
        f"{outcome.entries} entries carry {prepared.memmap}"
        if prepared.memmap
        else "no entry reserves memory"
    )
    if outcome.generator:
        print(f"✓ {outcome.generator} · {what}")
    if prepared.unit.needed and not outcome.problem:
        from emupmem.unit import FILE

        mounts = ", ".join(m["dir"] for m in _mounts(prepared))
        print(f"✓ {FILE} " + (f"written: mounts {mounts} at every boot" if mounts else "removed"))
    if outcome.problem:
        _say(f"! {outcome.problem}")
    if reboot:
        print("Reboot, then:  sudo emupmem verify")
        if prepared.memmap:
            print(
                f"If the machine does not come up: in GRUB's menu (hold Shift or press Esc at the start) press e, "
                f"delete {prepared.memmap}, press Ctrl-x; then sudo emupmem remove."
            )


def _change_result() -> dict[str, Any]:
    return {"changed": False, "memmap": "", "diff": "", "backup": "", "reboot_required": False}


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise EmupmemError("there is no terminal to ask on", "--yes goes ahead without asking")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise EmupmemError("not confirmed", "nothing was changed")


def _entry(entry: Any) -> dict[str, Any]:
    return {"start": entry.start, "size": entry.size, "type": entry.kind.value}


def _next_command(
    size: int, count: int, offset: str | None, min_free: str, node: int | None, from_: str | None
) -> str:
    from emupmem.units import tight

    words = ["sudo", "emupmem", "apply", "--size", tight(size)]
    words += ["--count", str(count)] if count != 1 else []
    words += ["--offset", offset] if offset is not None else []
    words += ["--min-free", min_free] if min_free != "2G" else []
    words += ["--numa-node", str(node)] if node is not None else []
    if from_ is not None:
        return f"{shlex.join(words)}   (on that machine)"
    return shlex.join(words)


# Errors, JSON, exit -----------------------------------------------------------------------------------


class UsageError(EmupmemError):
    """Wrong options: exit status 2."""


def _usage(message: str, hint: str = "") -> NoReturn:
    raise UsageError(message, hint or "emupmem --help tells more")


def _one_line(error: EmupmemError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


def _finish(as_json: bool, result: dict[str, Any], status: Exit) -> NoReturn:
    if as_json:
        _print_json(result)
    raise typer.Exit(status)


@contextmanager
def _json_errors(as_json: bool, result: dict[str, Any]) -> Iterator[None]:
    """With --json the object is printed in every case: an error becomes its `error`."""
    try:
        yield
    except EmupmemError as exc:
        if as_json:
            _print_json(result | {"error": _one_line(exc)})
        raise


def main() -> NoReturn:
    """Run the program: one line for an error and one for what to do, a traceback only with --debug."""
    try:
        status = app(standalone_mode=False) or Exit.OK
        sys.stdout.flush()
        if status == 128 + signal.SIGINT:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
    except EmupmemError as exc:
        status = _fail(exc.message, exc.hint, Exit.USAGE if isinstance(exc, UsageError) else Exit.ERROR, exc)
    except BrokenPipeError:
        # The reader of a pipe has gone: nothing more to tell, and nobody to tell it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = Exit.ERROR
    except KeyboardInterrupt:
        # While something is changed, signals are held back: this comes before or after it.
        status = _fail("stopped", "emupmem verify tells what is in force", Exit.ERROR, None)
    except Exception as exc:
        # typer's own errors, without importing the click that it brings or does not bring
        if not hasattr(exc, "format_message"):
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
    sys.exit(int(status))


def _fail(message: str, hint: str, status: int, exc: BaseException | None) -> int:
    if exc is not None and os.environ.get("EMUPMEM_DEBUG"):
        import traceback

        traceback.print_exception(exc)
    _say(f"emupmem: {' '.join(message.split())}")
    if hint:
        _say(f"         {' '.join(hint.split())}")
    return status
