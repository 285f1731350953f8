# SPDX-License-Identifier: Apache-2.0
"""`emupmem apply` and `emupmem remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from emupmem.boot import loader, obstacles, prepare
from emupmem.boot.foreign import Refused
from emupmem.cli import trial as cli_trial
from emupmem.cli.change import ask_and_carry_out, change_result
from emupmem.cli.options import (
    As,
    Check,
    Count,
    DryRun,
    Far,
    FileSystem,
    From,
    Fs,
    Json,
    MinFree,
    Node,
    Offset,
    Owner,
    Permissions,
    Root,
    Source,
    SourceOption,
    TrialBy,
    VariableOption,
    Yes,
)
from emupmem.cli.output import mode_of, usage
from emupmem.cli.session import Session
from emupmem.cli.suggest import TypedRequest, machine_at, refusal_with_plan, survey
from emupmem.device.boot_unit import MountWish
from emupmem.model import DeviceKind


def apply(
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="Size of each device, such as 16G or 512M.")
    ],
    count: Count = 1,
    offset: Offset = None,
    min_free: MinFree = "2G",
    numa_node: Node = None,
    far: Far = False,
    as_: As = DeviceKind.PMEM,
    variable: Annotated[
        VariableOption,
        typer.Option(
            "--variable",
            help="GRUB_CMDLINE_LINUX reaches every entry; GRUB_CMDLINE_LINUX_DEFAULT leaves recovery entries "
            "without the reservation, for machines where you want a menu entry with all the memory.",
        ),
    ] = VariableOption.LINUX,
    add: Annotated[bool, typer.Option("--add", help="Keep the existing reservation and add to it.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the existing reservation.")] = False,
    nokaslr: Annotated[
        bool,
        typer.Option(
            "--nokaslr", help="Also add nokaslr, for kernels that may place themselves in the range."
        ),
    ] = False,
    dry_run: DryRun = False,
    check: Check = False,
    yes: Yes = False,
    root: Root = None,
    from_: From = None,
    source: SourceOption = Source.AUTO,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="DIR",
            help="Make a DAX file system on the device and mount it here at every boot; repeat it for each device.",
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
            help="Save the content here at an orderly shutdown and bring it back at boot; repeat it for each --mount.",
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
    """Put the reservation into the boot configuration, safely. It takes effect at the next reboot."""
    session = Session(change_result(), as_json, dry_run=dry_run, check=check, yes=yes)
    with session.errors():
        if add and replace:
            usage("--add and --replace exclude each other")
        wishes = _wishes(mount or [], fs, owner, mode, keep or [])
        if wishes and as_ is not DeviceKind.PMEM:
            usage(f"--mount needs a block device, which --as {as_} does not make", "--as pmem does")
        if trial is not None and as_ in (DeviceKind.MEMORY, DeviceKind.DEVDAX):
            same = "--as dax --trial" if as_.soft else "--trial alone"
            usage("a trial sets nothing up at boot", f"{same} tries the same range")
        request = TypedRequest(size, count, offset, min_free, numa_node, as_, far).request()
        machine = session.machine = machine_at(root, from_, changes=not session.only_shows)
        try:
            warnings = obstacles.refuse_machine(machine, as_)
        except Refused as exc:
            raise refusal_with_plan(exc, machine, from_, source, request, nokaslr) from exc
        found = survey(from_, source, machine)
        options = loader.Options(variable.value, add, replace, nokaslr)
        if trial is not None:
            if wishes:
                usage("--mount is permanent: confirm the trial, then apply --mount")
            tried = prepare.prepare_trial(machine, found, request, options, entry=trial is TrialBy.GRUB)
            cli_trial.begin(session, tried, options, trial.value, warnings)
        prepared = prepare.prepare_apply(machine, found, request, options, wishes)
        ask_and_carry_out(session, prepared, [*warnings, *prepared.warnings])


def remove(
    items: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ITEM]...", help="What to give back, such as 1G!4G (default: everything)."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Give reserved memory back: undo what apply did. It takes effect at the next reboot."""
    session = Session(change_result(), as_json, dry_run=dry_run, yes=yes)
    with session.errors():
        session.machine = machine_at(root, None, changes=not dry_run, needs_log=False)
        prepared = prepare.prepare_remove(session.machine, items or ())
        ask_and_carry_out(session, prepared, prepared.warnings)


# Shared by the commands ------------------------------------------------------------------------------


def _wishes(
    folders: list[str], fs: FileSystem | None, owner: str, mode: str, keep: list[str]
) -> list[MountWish]:
    if not folders and (fs or owner or mode or keep):
        usage("--fs, --owner, --mode and --keep belong to --mount")
    if len(keep) > len(folders):
        usage("--keep is given more often than --mount")
    if not folders:
        return []
    mode_of(mode)
    files = [*keep, *[""] * (len(folders) - len(keep))]
    kind = (fs or FileSystem.EXT4).value
    return [MountWish(folder, kind, owner, mode, file) for folder, file in zip(folders, files, strict=True)]
