# SPDX-License-Identifier: Apache-2.0
"""`emupmem qemu`: a virtual NVDIMM for any virtual machine. No logic of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from emupmem.cli.options import EPILOG
from emupmem.cli.output import print_json, print_product, say, size_of, usage
from emupmem.cli.session import Session
from emupmem.model import EmupmemError
from emupmem.record import record
from emupmem.system import files, lock, processes
from emupmem.system import machine as system_machine
from emupmem.units import multiples_near
from emupmem.vm import arguments, export
from emupmem.vm import backend as vm_backend
from emupmem.vm import guest as vm_guest
from emupmem.vm import size as vm_size
from emupmem.vm.arguments import DevicePlan
from emupmem.vm.guest import Guest
from emupmem.vm.wish import Backing, DeviceOptions, DeviceWish, GuestDevice, Persistence


@record
class Launch:
    """What was found and decided: the program, the guest's own arguments, and what is added to them."""

    machine: system_machine.Machine
    program: str
    given: list[str]
    guest: Guest
    wishes: list[DeviceWish]
    options: DeviceOptions
    plan: DevicePlan

    @property
    def argv(self) -> list[str]:
        """The whole command line."""
        return [self.program, *self.given, *self.plan.argv]


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
EXAMPLE = "-m 2G …"


class TakesQemu(TyperCommand):
    """A command that tells where QEMU's own arguments belong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as exc:
            option = getattr(exc, "option_name", None)
            if type(exc).__name__ != "NoSuchOption" or not option or option.startswith("--"):
                raise
            usage(
                f"{option} is not an option of emupmem",
                f"what is QEMU's follows --: … --pmem 1G -- {EXAMPLE}",
            )


Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--pmem", metavar="SIZE", help="Size of the device, such as 1G; repeat it for more devices."
    ),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        "--pmem-file",
        metavar="PATH",
        help="What keeps its content: a file (made if missing), a folder, /dev/daxX.Y, /dev/pmemN; repeat it "
        "for each --pmem. Without it the content is lost when QEMU exits.",
    ),
]
DeviceOption = Annotated[
    GuestDevice,
    typer.Option("--device", help="nvdimm, or virtio-pmem: the honest one for ordinary files."),
]
Share = Annotated[Switch, typer.Option("--share", help="Whether what the guest writes reaches the file.")]
ReadOnly = Annotated[bool, typer.Option("--readonly", help="The guest may not write (unarmed NVDIMM).")]
Align = Annotated[str | None, typer.Option("--align", metavar="SIZE", help="Alignment of the mapping.")]
Label = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="SIZE",
        help="A label area, so that the guest can divide its region; it comes on top of SIZE.",
    ),
]
NodeList = Annotated[
    list[int] | None,
    typer.Option("--node", metavar="N", min=0, help="NUMA node of the guest; repeat it for each device."),
]
PersistenceOption = Annotated[
    Persistence | None,
    typer.Option(
        "--persistence",
        help="What the guest may rely on after a power failure: the memory controller, or the CPU caches too.",
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


@record
class Asked:
    """The options of `args` and of `run`: the same for both."""

    pmem: Sizes = None
    backend: Backends = None
    device: DeviceOption = GuestDevice.NVDIMM
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
        if "" in (self.backend or []):
            usage("--backend is empty", "omit it to use QEMU's own memory, which is lost when QEMU exits")
        if not count:
            usage("which device? --pmem SIZE, or --backend PATH, or both")
        if len(self.node or []) > count:
            usage("--node is given more often than there are devices")
        return count

    def options(self) -> DeviceOptions:
        """What all devices have in common. Raises EmupmemError for a size that is none, those of a device too."""
        for text in self.pmem or ():
            size = size_of(text)
            if size % vm_size.ALIGN or not size:
                usage(
                    f"--pmem {text} is not a multiple of 2 MiB", f"take {multiples_near(size, vm_size.ALIGN)}"
                )
        if self.label is not None:
            size_of(self.label)
        return DeviceOptions(
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


@app.command("args", cls=TakesQemu, epilog=EPILOG, context_settings=PASS)
@_taking_options
def args(context: typer.Context, asked: Asked) -> None:
    """Print the arguments: a line for a shell, or --json, --libvirt, --readconfig. Starts and makes nothing.

    What follows -- is your virtual machine: its -m and -machine are read and kept.
    """
    _print(asked.form or "print", context.args, asked)


@app.command("run", cls=TakesQemu, epilog=EPILOG, context_settings=PASS)
@_taking_options
def run(context: typer.Context, asked: Asked) -> None:
    """Start your virtual machine (its arguments follow --) with the device added: qemu run --pmem 1G -- -m 2G …

    emupmem becomes QEMU: signals, terminal and exit status are QEMU's own. With --print, --json, --libvirt
    or --readconfig it prints what it would start, and starts and makes nothing (as qemu args does).
    """
    if asked.form:
        _print(asked.form, context.args, asked)
        return
    made = _prepare(context.args, asked)
    _tell(made.plan)
    for wish in made.wishes:
        path = wish.backend.path
        if path and wish.backend.size is None:
            files.make_sparse_file(made.machine, path, wish.size)
            say(f"✓ {path} made, sparse")
        if path:
            lock.lock_until_exit(
                made.machine, path, asked.shared_backend or asked.readonly, not asked.readonly
            )
    processes.exec_program(made.machine, made.argv)


def _print(form: str, given: list[str], asked: Asked) -> None:
    result: dict[str, Any] = {"argv": [], "promises": [], "notes": []}
    with Session(result, form == "json").errors():
        made = _prepare(given, asked)
        plan = made.plan
        if form == "libvirt":
            notes = (*plan.notes, *export.libvirt_notes(made.wishes, made.options))
            promises = export.libvirt_promises(made.wishes, made.options, plan.promises)
            plan = replace(plan, notes=notes, promises=tuple(promises))
        result |= {"argv": made.argv, "promises": list(plan.promises), "notes": list(plan.notes)}
        if form == "json":
            print_json(result)
            return
        if form == "readconfig":
            if not vm_backend.knows(made.machine, made.program, "-readconfig"):
                raise EmupmemError("this QEMU has no -readconfig", "--print gives a line")
            print_product(export.readconfig(plan).removesuffix("\n"))
        elif form == "libvirt":
            print_product(export.libvirt(made.guest, made.wishes, made.options, plan).removesuffix("\n"))
        else:
            print_product(export.shell_line(made.argv))
        _tell(plan)


def _prepare(words: list[str], asked: Asked) -> Launch:
    options, count = asked.options(), asked.count
    here = system_machine.Machine()
    typed, given = vm_guest.split_program(words)
    if typed and asked.qemu not in (vm_backend.PROGRAM, typed):
        usage(f"QEMU is given twice: --qemu {asked.qemu} and {typed} after --")
    if own := vm_guest.misplaced(given):
        usage(f"{own} is an option of emupmem: it comes before --", f"emupmem qemu args {own} … -- {EXAMPLE}")
    if wrong := vm_guest.wrong_value(given):
        usage(wrong, "behind -- are the arguments of QEMU: is a variable not set?")
    program = vm_backend.qemu_program(here, typed or asked.qemu)
    version = vm_backend.qemu_version(here, program)
    guest = vm_guest.read_guest(given, lambda name: vm_backend.read_config(here, _absolute(name)))
    if options.machine and guest.machine:
        usage(f"the machine type is given twice: --machine {options.machine} and -machine {guest.machine}")
    paths = frozenset(vm_backend.same_for_all_names(here, _absolute(p)) for p in guest.paths)
    guest = replace(guest, paths=paths)
    wishes = [_wish(here, asked, guest, n) for n in range(count)]
    kinds = (Backing.DAX_FILE, Backing.DEVDAX)
    if any(w.backend.kind in kinds for w in wishes) and vm_backend.has_libpmem(here, program):
        options = replace(options, pmem=True)
    plan = arguments.plan_devices(guest, wishes, options, version)
    return Launch(here, program, given, guest, wishes, options, plan)


def _absolute(name: str) -> str:
    return str(Path(name).absolute())


def _wish(here: system_machine.Machine, asked: Asked, guest: Guest, n: int) -> DeviceWish:
    """What is wished of the device `n`."""
    path, size, node = _nth(asked.backend, n), _nth(asked.pmem, n), _nth(asked.node, n)
    shared = asked.shared_backend or asked.readonly
    inside = vm_backend.file_inside(guest.name, n)
    found = vm_backend.look_at_backend(here, _absolute(path), shared, inside) if path else vm_backend.MEMORY
    label = size_of(asked.label) if asked.label is not None else 0
    align = size_of(asked.align) if asked.align is not None else 0
    if label and found.size is not None:
        found = replace(found, old_labels=vm_backend.has_labels(here, found.path, found.size - label))
    bytes_ = vm_size.choose_size(found, size_of(size) if size is not None else None, label, align)
    return DeviceWish(found, bytes_, node, label)


def _nth(given: list[T] | None, n: int) -> T | None:
    return given[n] if given and n < len(given) else None


def _tell(plan: DevicePlan) -> None:
    for sentence in plan.promises:
        say(f"· {sentence}")
    for note in plan.notes:
        say(f"! {note}")
