# SPDX-License-Identifier: Apache-2.0
"""`emupmem qemu`: a virtual NVDIMM for any virtual machine. No logic of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from emupmem.cli.options import EPILOG
from emupmem.cli.output import print_json, say, size_of, usage
from emupmem.cli.session import Session
from emupmem.model import EmupmemError
from emupmem.system import files, lock, processes
from emupmem.system import machine as system_machine
from emupmem.vm import arguments, export
from emupmem.vm import backend as vm_backend
from emupmem.vm import guest as vm_guest
from emupmem.vm.arguments import Device, Options, Persistence, Plan, Wish
from emupmem.vm.guest import Guest

Prepared = tuple[system_machine.Machine, str, Guest, list[Wish], Options, Plan]

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `args` and of `run`: the same for both."""

    pmem: Sizes = None
    backend: Backends = None
    device: DeviceOption = Device.NVDIMM
    share: Share = Switch.ON
    readonly: ReadOnly = False
    align: Align = None
    label: Label = None
    node: NodeList = None
    persistence: PersistenceOption = None
    machine: MachineOption = None
    ram: Ram = None
    qemu: Qemu = vm_backend.PROGRAM
    shared_backend: Shared = False
    as_line: Line = False
    libvirt: Libvirt = False
    readconfig: ReadConfig = False
    as_json: AsJson = False

    @property
    def form(self) -> str:
        """Which form is asked for; empty for none of them. Raises EmupmemError for several."""
        forms = {
            "print": self.as_line,
            "libvirt": self.libvirt,
            "readconfig": self.readconfig,
            "json": self.as_json,
        }
        if sum(forms.values()) > 1:
            usage("--print, --json, --libvirt and --readconfig exclude each other")
        return next((form for form, on in forms.items() if on), "")

    @property
    def count(self) -> int:
        """How many devices. Raises EmupmemError for none, and for more nodes than devices."""
        count = max(len(self.pmem or []), len(self.backend or []))
        if not count:
            usage("which device? --pmem SIZE, or --backend PATH, or both")
        if len(self.node or []) > count:
            usage("--node is given more often than there are devices")
        return count

    def options(self) -> Options:
        """What all devices have in common. Raises EmupmemError for a size that is none."""
        return Options(
            self.device,
            self.share is Switch.ON,
            self.readonly,
            size_of(self.align) if self.align is not None else 0,
            self.persistence,
            machine=self.machine.value if self.machine else "",
            ram=size_of(self.ram) if self.ram is not None else None,
        )


def _taking_options(command: Callable[[typer.Context, Asked], None]) -> Callable[..., None]:
    """The command as typer wants it: each option of `Asked` a parameter of its own."""

    @wraps(command)
    def taking(context: typer.Context, **given: Any) -> None:
        command(context, Asked(**given))

    hints = {"context": typer.Context, **get_type_hints(Asked, include_extras=True)}
    first = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    options = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Asked)
    ]
    taking.__annotations__ = hints
    taking.__signature__ = Signature([first, *options])  # type: ignore[attr-defined]
    return taking


@app.command("args", epilog=EPILOG, context_settings=PASS)
@_taking_options
def args(context: typer.Context, asked: Asked) -> None:
    """Print the arguments: a line for a shell, or --json, --libvirt, --readconfig. Starts and makes nothing.

    What follows -- is your virtual machine: its -m and -machine are read, and stay.
    """
    _print(asked.form or "print", context.args, asked)


@app.command("run", epilog=EPILOG, context_settings=PASS)
@_taking_options
def run(context: typer.Context, asked: Asked) -> None:
    """Start your virtual machine (its arguments follow --) with the device added: qemu run --pmem 1G -- -m 2G …

    emupmem becomes QEMU: signals, terminal and exit status are QEMU's own. With --print, --json, --libvirt
    or --readconfig it prints what it would start, and starts and makes nothing (as qemu args does).
    """
    if asked.form:
        _print(asked.form, context.args, asked)
        return
    here, program, _, wishes, _, plan = _prepare(context.args, asked)
    _tell(plan)
    for wish in wishes:
        path = wish.backend.path
        if path and wish.backend.size is None:
            files.make_sparse_file(here, path, wish.size)
            say(f"✓ {path} made, sparse")
        if path:
            lock.lock_until_exit(here, path, asked.shared_backend or asked.readonly, not asked.readonly)
    processes.exec_program(here, [program, *context.args, *plan.argv])


def _print(form: str, given: list[str], asked: Asked) -> None:
    result: dict[str, Any] = {"argv": [], "promises": [], "notes": []}
    with Session(result, form == "json").errors():
        here, program, guest, wishes, options, plan = _prepare(given, asked)
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


def _prepare(argv: list[str], asked: Asked) -> Prepared:
    options, count = asked.options(), asked.count
    here = system_machine.Machine()
    program = vm_backend.program(here, asked.qemu)
    version = vm_backend.version(here, program)
    guest = vm_guest.read_guest(argv)
    if options.machine and guest.machine:
        usage(f"the machine type is given twice: --machine {options.machine} and -machine {guest.machine}")
    wishes = [_wish(here, asked, guest, n) for n in range(count)]
    kinds = (arguments.Kind.DAX_FILE, arguments.Kind.DEVDAX)
    if any(w.backend.kind in kinds for w in wishes) and vm_backend.has_libpmem(here, program):
        options = replace(options, pmem=True)
    return here, program, guest, wishes, options, arguments.plan(guest, wishes, options, version)


def _wish(here: system_machine.Machine, asked: Asked, guest: Guest, n: int) -> Wish:
    """What is wished of the device `n`."""
    path, size, node = _nth(asked.backend, n), _nth(asked.pmem, n), _nth(asked.node, n)
    shared = asked.shared_backend or asked.readonly
    inside = vm_backend.file_inside(guest.name, n)
    found = vm_backend.look(here, str(Path(path).absolute()), shared, inside) if path else vm_backend.MEMORY
    bytes_ = arguments.choose_size(found, size_of(size) if size is not None else None)
    return arguments.Wish(found, bytes_, node, size_of(asked.label) if asked.label is not None else 0)


def _nth(given: list[T] | None, n: int) -> T | None:
    return given[n] if given and n < len(given) else None


def _tell(plan: Plan) -> None:
    for sentence in plan.promises:
        say(f"· {sentence}")
    for note in plan.notes:
        say(f"! {note}")
