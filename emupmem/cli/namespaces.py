# SPDX-License-Identifier: Apache-2.0
"""`emupmem namespaces`: the ramdax driver. No logic of its own."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from emupmem.cli.options import EPILOG, DryRun, Json, NamespaceName, Yes
from emupmem.cli.output import Exit, say, size_of, tell
from emupmem.cli.session import Session
from emupmem.device import ramdax
from emupmem.device.ramdax import RamdaxRegion, Step, Write
from emupmem.model import EmupmemError, NamespaceMode
from emupmem.system import lock
from emupmem.system.machine import Machine
from emupmem.units import human

app = typer.Typer(
    help="Divide a reserved range into namespaces of any size (the ramdax driver, Linux 6.19 and later). "
    "Emulated and volatile: labels and content do not survive a power cycle.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

AtBoot = Annotated[bool, typer.Option("--at-boot", help="Also at every boot, by a udev rule.")]


@app.command("bind", epilog=EPILOG)
def bind(at_boot: AtBoot = False, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Give the reserved ranges to ramdax. All content on them is lost."""
    _rebind(_binding(as_json, dry_run, yes), "ramdax", at_boot)


@app.command("unbind", epilog=EPILOG)
def unbind(at_boot: AtBoot = False, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Give the ranges back to the usual driver: one device each. All content on them is lost."""
    _rebind(_binding(as_json, dry_run, yes), "e820_pmem", at_boot)


def _binding(as_json: bool, dry_run: bool, yes: bool) -> Session:
    return Session({"changed": False, "driver": "", "at_boot": False}, as_json, dry_run=dry_run, yes=yes)


def _rebind(session: Session, wanted: str, at_boot: bool) -> None:
    with session.errors():
        session.be_root("this changes the driver of a device")
        machine, result = session.machine, session.result
        binds = wanted == ramdax.DRIVER
        steps = ramdax.bind_steps(machine, wanted)
        if at_boot and binds:
            ramdax.require_at_boot(machine)
        rule = ramdax.boot_step(machine, binds) if at_boot else ""
        question = f"All content of the reserved ranges is lost. Give them to {wanted}?" if steps else ""
        session.preview_or_ask([*_lines(steps), *([rule] if rule else [])], question)
        if not session.dry_run:
            if steps:
                with lock.change_lock(machine):
                    _refuse_other(ramdax.bind_steps(machine, wanted), steps)
                    ramdax.rebind(machine, steps, wanted)
                result["changed"] = True
            if rule:
                (ramdax.bind_at_boot if binds else ramdax.remove_at_boot)(machine)
                result["changed"] = True
        result |= {"driver": ramdax.driver(machine), "at_boot": machine.exists(ramdax.RULE)}
        if not session.as_json and not session.dry_run:
            kept = f", at every boot ({ramdax.RULE})" if binds and result["at_boot"] else ""
            tell(f"✓ the reserved ranges belong to {result['driver']}{kept}")
            if binds:
                tell("Next:  sudo emupmem namespaces create --size SIZE")
            elif result["at_boot"]:
                say(f"! at the next boot {ramdax.DRIVER} has them again ({ramdax.RULE})")
                say("         sudo emupmem namespaces unbind --at-boot takes that away")
        session.finish(Exit.OK)


@app.command("list", epilog=EPILOG)
def list_(as_json: Json = False) -> None:
    """Show the ranges that ramdax has and what is on them."""
    session = Session({"driver": "", "regions": []}, as_json)
    with session.errors():
        session.be_root("this asks ndctl")
        machine, result = session.machine, session.result
        ramdax.require(machine)
        result["driver"] = ramdax.driver(machine)
        there = ramdax.ramdax_regions(machine)
        result["regions"] = [asdict(region) for region in there]
        if not session.as_json:
            if result["driver"] != ramdax.DRIVER:
                tell(f"The reserved ranges belong to {result['driver'] or 'no driver'}.")
                tell("Next:  sudo emupmem namespaces bind")
            for region in there:
                room = f"room for {human(region.free)}"
                tell(f"{region.name}  {human(region.size)}, {room} · emulated, volatile")
                for one in region.namespaces:
                    tell(f"  {one.name:14} {one.mode:7} {human(one.size):>9}  /dev/{one.dev}")
        session.finish(Exit.OK)


@app.command("create", epilog=EPILOG)
def create_on_ram(
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Size of the namespace, such as 256M.")],
    mode: Annotated[
        NamespaceMode, typer.Option("--mode", help="What kind of device it becomes.")
    ] = NamespaceMode.FSDAX,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a namespace on the first range with room."""
    session = _changing(as_json, dry_run, yes=True)
    _change(session, lambda machine: ramdax.create_steps(machine, size_of(size), mode.value), "")


@app.command("resize", epilog=EPILOG)
def resize(
    name: NamespaceName,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Size of the namespace.")],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Recreate a namespace with another size. Its content is lost and its name may change."""
    question = f"All content of {name} is lost. Create it again?"
    session = _changing(as_json, dry_run, yes)
    _change(session, lambda machine: ramdax.resize_steps(machine, name, size_of(size)), question)


@app.command("delete", epilog=EPILOG)
def delete(
    name: NamespaceName,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a namespace and everything on it."""
    question = f"All content of {name} is lost. Delete it?"
    session = _changing(as_json, dry_run, yes)
    _change(session, lambda machine: ramdax.delete_steps(machine, name), question)


def _changing(as_json: bool, dry_run: bool, yes: bool) -> Session:
    return Session({"changed": False, "made": [], "regions": []}, as_json, dry_run=dry_run, yes=yes)


def _change(session: Session, plan: Callable[[Machine], Sequence[Step]], question: str) -> None:
    with session.errors():
        session.be_root("this changes namespaces")
        machine, result = session.machine, session.result
        with lock.change_lock(machine):
            steps = plan(machine)
            session.preview_or_ask(_lines(steps), question)
            before = {n for r in ramdax.ramdax_regions(machine) for n in r.namespaces}
            if not session.dry_run:
                _refuse_other(plan(machine), steps)
                _carry_out(session, steps)
                machine.settle()
            there = _seen_after(session)
        made = [n for r in there or () for n in r.namespaces if n not in before]
        result["made"] = [asdict(n) for n in made]
        result["regions"] = [asdict(r) for r in there or ()]
        if not session.as_json and not session.dry_run:
            for one in made:
                tell(f"✓ {one.name} · {one.mode}, {human(one.size)}, /dev/{one.dev} · emulated, volatile")
            if not made:
                tell("✓ done" if there is None else "✓ deleted")
        session.finish(Exit.OK)


def _carry_out(session: Session, steps: Sequence[Step]) -> None:
    """Do the steps, and say what of them is done where a later one fails. Raises EmupmemError."""
    for step in steps:
        try:
            ramdax.run_steps(session.machine, (step,))
        except EmupmemError as exc:
            if not session.result["changed"]:
                raise
            with contextlib.suppress(EmupmemError):
                session.result["regions"] = [asdict(r) for r in ramdax.ramdax_regions(session.machine)]
            raise EmupmemError(
                f"the namespace is deleted, but the new one was not made: {exc.message}",
                "sudo emupmem namespaces create --size SIZE makes one",
            ) from exc
        session.result["changed"] = True


def _refuse_other(now: Sequence[Step], asked: Sequence[Step]) -> None:
    """Planned again when the question was answered: who uses the devices now, and the steps. Raises EmupmemError."""
    if tuple(now) != tuple(asked):
        raise EmupmemError("something changed in the meantime", "nothing was done; try it again")


def _seen_after(session: Session) -> tuple[RamdaxRegion, ...] | None:
    """The regions as they are now; None where a change is made and ndctl does not say what came of it."""
    try:
        return tuple(ramdax.ramdax_regions(session.machine))
    except EmupmemError as exc:
        if session.dry_run:
            raise
        say(f"! it is done, but {exc.message}: sudo emupmem namespaces list shows it")
        return None


def _lines(steps: Sequence[Step]) -> list[str]:
    """What is done in each step, as typed in a shell."""
    return [str(s) if isinstance(s, Write) else shlex.join(s.argv) for s in steps]
