"""`emupmem qemu`: a virtual NVDIMM for any virtual machine. No logic of its own."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emupmem.cli.options import EPILOG
from emupmem.cli.output import json_errors, print_json, say, size_of, usage
from emupmem.model import EmupmemError
from emupmem.system import files, lock, processes
from emupmem.vm.arguments import Device, Persistence

if TYPE_CHECKING:
    from emupmem.system.machine import Machine
    from emupmem.vm.arguments import Options, Plan, Wish
    from emupmem.vm.guest import Guest

    Prepared = tuple[Machine, str, Guest, list[Wish], Options, Plan]


class Switch(StrEnum):
    """On or off."""

    ON = "on"
    OFF = "off"


class MachineType(StrEnum):
    """The machines of QEMU that have NVDIMMs."""

    PC = "pc"
    Q35 = "q35"


app = typer.Typer(
    help="Give a virtual machine a persistent-memory device (a vNVDIMM).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PASS = {"allow_extra_args": True, "ignore_unknown_options": False}
Sizes = Annotated[
    list[str] | None, typer.Option("--pmem", metavar="SIZE", help="Size of the device, as 1G; once for each.")
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        "--pmem-file",
        metavar="PATH",
        help="What keeps its content: a file (made if missing), a folder, /dev/daxX.Y, /dev/pmemN; once for each "
        "--pmem. Without it the content ends with QEMU.",
    ),
]
DeviceOption = Annotated[
    Device,
    typer.Option("--device", help="nvdimm, or virtio-pmem: the honest one for ordinary files."),
]
Share = Annotated[Switch, typer.Option("--share", help="Whether what the guest writes reaches the file.")]
ReadOnly = Annotated[bool, typer.Option("--readonly", help="The guest may not write (unarmed NVDIMM).")]
Align = Annotated[str | None, typer.Option("--align", metavar="SIZE", help="Alignment of the mapping.")]
Label = Annotated[
    str | None, typer.Option("--label", metavar="SIZE", help="A label area, so that the guest can divide it.")
]
NodeList = Annotated[
    list[int] | None,
    typer.Option("--node", metavar="N", help="NUMA node of the guest; once for each device."),
]
PersistenceOption = Annotated[
    Persistence | None,
    typer.Option(
        "--persistence", help="What the guest is told: flush to the memory controller, or caches too."
    ),
]
MachineOption = Annotated[
    MachineType | None, typer.Option("--machine", help="Machine type, where yours is not given after --.")
]
Ram = Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="RAM, where no -m is given after --.")]
Qemu = Annotated[str, typer.Option("--qemu", metavar="PROGRAM", help="Which QEMU.")]
Shared = Annotated[
    bool, typer.Option("--shared-backend", help="Let several virtual machines have the same file at once.")
]
Line = Annotated[bool, typer.Option("--print", help="Print one line for a shell.")]
Libvirt = Annotated[bool, typer.Option("--libvirt", help="Print a domain for libvirt.")]
ReadConfig = Annotated[bool, typer.Option("--readconfig", help="Print a file for -readconfig.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, its argv a list of words.")]
QEMU = "qemu-system-x86_64"


@app.command("args", epilog=EPILOG, context_settings=PASS)
def args(
    context: typer.Context,
    pmem: Sizes = None,
    backend: Backends = None,
    device: DeviceOption = Device.NVDIMM,
    share: Share = Switch.ON,
    readonly: ReadOnly = False,
    align: Align = None,
    label: Label = None,
    node: NodeList = None,
    persistence: PersistenceOption = None,
    machine: MachineOption = None,
    ram: Ram = None,
    qemu: Qemu = QEMU,
    shared_backend: Shared = False,
    as_line: Line = False,
    libvirt: Libvirt = False,
    readconfig: ReadConfig = False,
    as_json: AsJson = False,
) -> None:
    """Print the arguments: a line for a shell, or --json, --libvirt, --readconfig. Starts and makes nothing.

    What follows -- is your virtual machine: its -m and -machine are read, and stay.
    """

    def prepare() -> Prepared:
        options = _options(device, share, readonly, align, persistence, machine, ram)
        return _prepare(context.args, pmem, backend, label, node, options, qemu, shared_backend)

    _print(_form(as_line, libvirt, readconfig, as_json) or "print", prepare, context.args)


@app.command("run", epilog=EPILOG, context_settings=PASS)
def run(
    context: typer.Context,
    pmem: Sizes = None,
    backend: Backends = None,
    device: DeviceOption = Device.NVDIMM,
    share: Share = Switch.ON,
    readonly: ReadOnly = False,
    align: Align = None,
    label: Label = None,
    node: NodeList = None,
    persistence: PersistenceOption = None,
    machine: MachineOption = None,
    ram: Ram = None,
    qemu: Qemu = QEMU,
    shared_backend: Shared = False,
    as_line: Line = False,
    libvirt: Libvirt = False,
    readconfig: ReadConfig = False,
    as_json: AsJson = False,
) -> None:
    """Start your virtual machine (its arguments follow --) with the device added: qemu run --pmem 1G -- -m 2G …

    emupmem becomes QEMU: signals, terminal and exit status are QEMU's own. With --print, --json, --libvirt
    or --readconfig it prints what it would start, and starts and makes nothing (as qemu args does).
    """

    def prepare() -> Prepared:
        options = _options(device, share, readonly, align, persistence, machine, ram)
        return _prepare(context.args, pmem, backend, label, node, options, qemu, shared_backend)

    form = _form(as_line, libvirt, readconfig, as_json)
    if form:
        _print(form, prepare, context.args)
        return
    here, program, _, wishes, _, plan = prepare()
    _tell(plan)
    for wish in wishes:
        path = wish.backend.path
        if path and wish.backend.size is None:
            files.make_sparse_file(here, path, wish.size)
            say(f"✓ {path} made, sparse")
        if path:
            lock.lock_until_exit(here, path, shared_backend or readonly, not readonly)
    processes.exec_program(here, [program, *context.args, *plan.argv])


def _form(as_line: bool, libvirt: bool, readconfig: bool, as_json: bool) -> str:
    """Which form is asked for; empty for none of them."""
    asked = {"print": as_line, "libvirt": libvirt, "readconfig": readconfig, "json": as_json}
    if sum(asked.values()) > 1:
        usage("--print, --json, --libvirt and --readconfig exclude each other")
    return next((form for form, on in asked.items() if on), "")


def _print(form: str, prepare: Callable[[], Prepared], given: list[str]) -> None:
    from emupmem.vm import backend as vm_backend
    from emupmem.vm import export

    result: dict[str, Any] = {"argv": [], "promises": [], "notes": []}
    with json_errors(form == "json", result):
        here, program, guest, wishes, options, plan = prepare()
        argv = [*given, *plan.argv]
        result |= {"argv": [program, *argv], "promises": list(plan.promises), "notes": list(plan.notes)}
        if form == "json":
            print_json(result)
            return
        if form == "readconfig":
            if not vm_backend.knows(here, program, "-readconfig"):
                raise EmupmemError("this QEMU has no -readconfig", "--print gives a line")
            print(export.readconfig(plan), end="")
        elif form == "libvirt":
            print(export.libvirt(guest, wishes, options, plan), end="")
        else:
            print(export.shell_line(program, argv))
        _tell(plan)


def _options(
    device: Device,
    share: Switch,
    readonly: bool,
    align: str | None,
    persistence: Persistence | None,
    machine: MachineType | None,
    ram: str | None,
) -> Options:
    from emupmem.vm.arguments import Options

    return Options(
        device,
        share is Switch.ON,
        readonly,
        size_of(align) if align is not None else 0,
        persistence,
        machine=machine.value if machine else "",
        ram=size_of(ram) if ram is not None else None,
    )


def _prepare(
    argv: list[str],
    sizes: list[str] | None,
    paths: list[str] | None,
    label: str | None,
    nodes: list[int] | None,
    options: Options,
    qemu: str,
    shared: bool,
) -> Prepared:
    from dataclasses import replace

    from emupmem.system.machine import Machine
    from emupmem.vm import arguments
    from emupmem.vm import backend as vm_backend
    from emupmem.vm import guest as vm_guest

    count = max(len(sizes or []), len(paths or []))
    if not count:
        usage("which device? --pmem SIZE, or --backend PATH, or both")
    if len(nodes or []) > count:
        usage("--node is given more often than there are devices")
    here = Machine()
    program = vm_backend.program(here, qemu)
    version = vm_backend.version(here, program)
    guest = vm_guest.read_guest(argv)
    if options.machine and guest.machine:
        usage(f"the machine type is given twice: --machine {options.machine} and -machine {guest.machine}")
    wishes = []
    for n in range(count):
        path = (paths or [])[n] if n < len(paths or []) else None
        inside = vm_backend.file_inside(guest.name, n)
        found = (
            vm_backend.look(here, str(Path(path).absolute()), shared or options.readonly, inside)
            if path
            else vm_backend.MEMORY
        )
        asked = size_of((sizes or [])[n]) if n < len(sizes or []) else None
        node = (nodes or [])[n] if n < len(nodes or []) else None
        wishes.append(
            arguments.Wish(
                found, arguments.choose_size(found, asked), node, size_of(label) if label is not None else 0
            )
        )
    kinds = (arguments.Kind.DAX_FILE, arguments.Kind.DEVDAX)
    if any(w.backend.kind in kinds for w in wishes) and vm_backend.has_libpmem(here, program):
        options = replace(options, pmem=True)
    return here, program, guest, wishes, options, arguments.plan(guest, wishes, options, version)


def _tell(plan: Plan) -> None:
    for sentence in plan.promises:
        say(f"· {sentence}")
    for note in plan.notes:
        say(f"! {note}")
